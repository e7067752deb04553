"""Whether all prompts fit into a model's context, before anything is computed."""

import unicodedata
from collections.abc import Iterator, Sequence

from memit.evaluation.counterfact import objects_of, plus_prompts_of, prompts_of
from memit.evaluation.zsre import ZsreRecord, as_records, questions_of
from memit.generation import ANSWER_TOKENS
from memit.language_model import LanguageModel
from memit.positions import continuation_rows
from memit.prefixes import TOKENS, WORDS
from memit.requests import Record
from memit.true_objects import TOKENS_A_WORD

TOKENS_A_BYTE = 2
"""An upper bound of the tokens for a byte of text in Unicode's decomposed form."""

Asked = tuple[int, str, str, str | None, int]
"""A record, a kind of prompt, the prompt, what follows it, and the number of further tokens."""


def check_records(
    lm: LanguageModel,
    records: Sequence[Record],
    questions: Sequence[ZsreRecord] = (),
    *,
    plus: bool = False,
    written: int | None = 0,
) -> None:
    """Check the prompts of records and of zsRE's questions.

    `plus` includes the prompts of CounterFact+, and `written` is the number of records whose
    generation prompts are used (None: all). Texts that are short enough in any tokens are not
    tokenised, unless the tokenizer has tokens that the model does not know.

    Raises:
        InputError: a prompt is too long, the first one.
    """
    foreign = len(lm.tokenizer) > lm.model.config.get_text_config().vocab_size
    asked = [
        one
        for one in _asked(lm, records, questions, plus, written)
        if foreign or _most_tokens(one) > lm.context_length
    ]
    pairs = ((prompt, answer or " a") for _, _, prompt, answer, _ in asked)
    rows = continuation_rows(lm.tokenizer, pairs)
    for (record, kind, prompt, answer, more), row in zip(asked, rows, strict=True):
        ids = row.ids if answer else row.ids[: row.target[0] + 1]
        lm.check_room(ids, f"the {kind} prompt of record {record}, {prompt[:80]!r},", more)


def _most_tokens(asked: Asked) -> int:
    _, _, prompt, answer, more = asked
    text = unicodedata.normalize("NFKD", f"{prompt}{answer}")
    return TOKENS_A_BYTE * len(text.encode()) + more


def _asked(
    lm: LanguageModel,
    records: Sequence[Record],
    questions: Sequence[ZsreRecord],
    plus: bool,
    written: int | None,
) -> Iterator[Asked]:
    behind_facts = plus_prompts_of(records) if plus else []
    for one in (*prompts_of(records), *behind_facts, *questions_of(questions)):
        for answer in objects_of(one):
            yield one.case_id, one.kind, one.prompt, answer, 0
    first = f"{WORDS[0]}."  # of a prefix, whose other tokens are not known yet
    more = TOKENS + 1 - len(lm.tokenizer(first, add_special_tokens=False)["input_ids"])
    for record in (*records, *as_records(questions)):
        request = record.request
        yield record.case_id, "prefixed", f"{first} {request.text}", request.ending(), more
    for record in (record for record in records if record.request.target_true is None):
        tokens = TOKENS_A_WORD * len(record.request.target_new.split())
        yield record.case_id, "rewrite", record.request.text, None, tokens
    for record in records:
        for prompt in record.kept_prompts:
            yield record.case_id, "kept", prompt, None, ANSWER_TOKENS
    for record in [record for record in records if record.generation_prompts][:written]:
        for prompt in record.generation_prompts:
            yield record.case_id, "generation", prompt, None, 0
