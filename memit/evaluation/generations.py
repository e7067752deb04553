"""Texts that a model generates about edited subjects, and their metrics."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from memit.evaluation.entropy import record_entropies
from memit.evaluation.reference import References, reference_scores
from memit.generation import ANSWER_TOKENS, count_repetitions, generate_texts
from memit.language_model import LanguageModel
from memit.requests import Record

TOTAL_TOKENS = 100
"""Length of a text in tokens, prompt included (paper, section 5.2)."""
TOP_K = 5

SCHEMA = pa.schema(
    [
        pa.field("case_id", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
"""Columns of the table of generated texts; a text holds its prompt."""


ANSWERS = pa.schema(
    [
        pa.field("case_id", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
    ]
)
"""Columns of the table of answers."""


def answer_briefly(lm: LanguageModel, records: Sequence[Record], *, token_budget: int) -> pa.Table:
    """What the model says (greedily, `ANSWER_TOKENS` tokens) to the prompt of each record, to its
    first paraphrase and to its first prompt about something else: a table of `ANSWERS`."""
    asked = [
        (record.case_id, kind, prompt)
        for record in records
        for kind, prompts in (
            ("rewrite", (record.request.text,)),
            ("paraphrase", record.paraphrase_prompts[:1]),
            ("neighborhood", (record.neighborhood_prompts or record.kept_prompts)[:1]),
        )
        for prompt in prompts
    ]
    return answer_all(lm, asked, new_tokens=ANSWER_TOKENS, token_budget=token_budget)


def answer_all(lm: LanguageModel, asked: Sequence[tuple[int, str, str]], **length: Any) -> pa.Table:
    """What the model says (greedily) to prompts that are given with their cases and kinds: a table
    of `ANSWERS`. How long it is, and in which batches it is written, is for `generate_texts`."""
    texts = generate_texts(lm, [prompt for _, _, prompt in asked], **length)
    rows = [(*question, text) for question, text in zip(asked, texts, strict=True)]
    return pa.Table.from_pylist(
        [dict(zip(ANSWERS.names, row, strict=True)) for row in rows], schema=ANSWERS
    )


def write_about(
    lm: LanguageModel,
    records: Sequence[Record],
    *,
    seed: int,
    token_budget: int,
    total_tokens: int = TOTAL_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> pa.Table:
    """Continue the generation prompts of each record; a table of `SCHEMA`, empty if there are none.

    A record's texts do not depend on the other records. `progress` is called with the number of
    newly generated texts.
    """
    prompts = [(record.case_id, text) for record in records for text in record.generation_prompts]
    texts = generate_texts(
        lm,
        [prompt for _, prompt in prompts],
        total_tokens=total_tokens,
        top_k=TOP_K,
        seed=seed,
        repetitions=[n for r in records for n in count_repetitions(r.generation_prompts)],
        token_budget=token_budget,
        progress=progress,
    )
    columns = [[case for case, _ in prompts], [prompt for _, prompt in prompts], texts]
    return pa.table(columns, schema=SCHEMA)


def generation_record_means(
    table: pa.Table, records: Sequence[Record], references: References
) -> dict[str, np.ndarray]:
    """`entropy` and `reference` of each record in the order of `records`, NaN where it has
    none; a metric that no record has is left out."""
    texts: dict[int, list[str]] = {}
    for row in table.to_pylist():
        texts.setdefault(row["case_id"], []).append(row["text"])
    written = [texts.get(record.case_id, []) for record in records]
    means = {
        "entropy": np.array(record_entropies(written)),
        "reference": np.array(reference_scores(records, written, references)),
    }
    return {name: values for name, values in means.items() if not np.isnan(values).all()}
