"""True objects of records that name none: the unedited model's own answers."""

from collections.abc import Sequence
from dataclasses import replace

from memit.generation import generate_texts
from memit.language_model import LanguageModel
from memit.requests import Record

TOKENS_A_WORD = 6


def with_true_objects(
    lm: LanguageModel, records: Sequence[Record], *, token_budget: int
) -> list[Record]:
    """Give each record without a true object the model's own (greedy) answer to its prompt.

    The answer has as many words as the new object, so that the two are comparable. A record for
    which the model gives no word, or the new object itself, is unchanged.
    """
    wanting = [record for record in records if record.request.target_true is None]
    answers: dict[int, str] = {}
    for words in sorted({len(record.request.target_new.split()) for record in wanting}):
        group = [r for r in wanting if len(r.request.target_new.split()) == words]
        texts = generate_texts(
            lm,
            [record.request.text for record in group],
            new_tokens=TOKENS_A_WORD * words,
            token_budget=token_budget,
        )
        for record, text in zip(group, texts, strict=True):
            answers[record.case_id] = _first_words(text, words)
    completed = []
    for record in records:
        answer = answers.get(record.case_id)
        if answer and answer != record.request.target_new:
            record = replace(record, request=replace(record.request, target_true=answer))
        completed.append(record)
    return completed


def _first_words(text: str, count: int) -> str:
    """The first words of the first line, without the punctuation around them."""
    line = text.lstrip().split("\n")[0].replace("\ufffd", "")
    return " ".join(line.split()[:count]).strip(" .,;:!?\"'()[]")
