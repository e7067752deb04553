"""Whether a model's context has room for what will be asked of it, before anything is computed."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from memit.evaluation.counterfact import objects_of, plus_prompts_of, prompts_of
from memit.evaluation.zsre import ZsreRecord, as_records, questions_of
from memit.language_model import LanguageModel
from memit.positions import continuation_rows
from memit.prefixes import TOKENS, WORDS
from memit.requests import Record
from memit.targets import REQUESTS_AT_ONCE
from memit.true_objects import TOKENS_A_WORD

TOKENS_A_BYTE = 2
"""More than any tokenizer makes of a byte of Unicode's decomposed form."""

Asked = tuple[int, str, str, str | None, int]
"""A record, a kind of prompt, the prompt, what follows it, and how many tokens come to them."""


def check_records(
    lm: LanguageModel,
    records: Sequence[Record],
    questions: Sequence[ZsreRecord] = (),
    *,
    plus: bool = False,
    written: int | None = 0,
) -> None:
    """Raise `InputError` for the first prompt of records or of zsRE's questions that is too long.

    `plus` asks CounterFact+ too, and `written` is how many of the records that have generation
    prompts are written about (None: all). What is short enough in any tokens is not tokenised,
    unless the tokenizer has some that the model does not know.
    """
    foreign = len(lm.tokenizer) > lm.model.config.get_text_config().vocab_size
    asked = [
        one
        for one in _asked(lm, records, questions, plus, written)
        if foreign or TOKENS_A_BYTE * _bytes(one) + one[4] > lm.context_length
    ]
    for start in range(0, len(asked), REQUESTS_AT_ONCE):
        part = asked[start : start + REQUESTS_AT_ONCE]
        pairs = ((prompt, answer or " a") for _, _, prompt, answer, _ in part)
        rows = continuation_rows(lm.tokenizer, pairs)
        for (record, kind, prompt, answer, more), row in zip(part, rows, strict=True):
            ids = row.ids if answer else row.ids[: row.target[0] + 1]
            lm.check_room(ids, f"the {kind} prompt of record {record}, {prompt[:80]!r},", more)


def _bytes(asked: Asked) -> int:
    return len(unicodedata.normalize("NFKD", f"{asked[2]}{asked[3]}").encode())


def _asked(
    lm: LanguageModel,
    records: Sequence[Record],
    questions: Sequence[ZsreRecord],
    plus: bool,
    written: int | None,
) -> Iterator[Asked]:
    for one in prompts_of(records) + (plus_prompts_of(records) if plus else []):
        for answer in objects_of(one):
            yield one.case_id, one.kind, one.prompt, answer, 0
    for row in (row for question in questions for row in questions_of(question)):
        yield row["case_id"], row["kind"], row["prompt"], f" {row['answer'].strip()}", 0
    first = f"{WORDS[0]}."  # of a prefix, whose other tokens are not known yet
    more = TOKENS + 1 - len(lm.tokenizer(first, add_special_tokens=False)["input_ids"])
    for record in (*records, *as_records(questions)):
        request = record.request
        yield record.case_id, "prefixed", f"{first} {request.text}", request.ending(), more
    for record in (record for record in records if record.request.target_true is None):
        tokens = TOKENS_A_WORD * len(record.request.target_new.split())
        yield record.case_id, "rewrite", record.request.text, None, tokens
    for record in [record for record in records if record.generation_prompts][:written]:
        for prompt in record.generation_prompts:
            yield record.case_id, "generation", prompt, None, 0
