"""The tasks of the step `tracing`: choose facts that the model answers; trace them in pieces."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow

from memit.errors import InputError
from memit.known_facts import known_facts
from memit.language_model import LanguageModel
from memit.requests import Record, drawn_order
from memit.tracing import (
    KINDS,
    Kind,
    Trace,
    TracedPrompt,
    embedding_deviation,
    everywhere,
    trace,
    traced_prompts,
)
from memit.true_objects import with_true_objects
from tasks.engine.artifacts import Artifact, Value
from tasks.engine.cache import cached_task
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import advance
from tasks.engine.tables import store_table
from tasks.requests import TOKEN_BUDGET, Source, keep_records, read_source

MAPPED: tuple[Kind, ...] = ("state", "mlp")
"""What is restored at every token."""


class TracedFacts(Value):
    """The facts that are traced."""

    records: Artifact
    count: int
    deviation: float
    """Standard deviation of the embeddings of all subjects of the source."""


@cached_task("traced_facts")
def choose_traced(
    source: Source, file: Artifact, count: int, seed: int, model: ModelReference
) -> TracedFacts:
    """The first `count` facts in drawn order that the model answers, or as many as there are.

    Raises:
        InputError: the model answers none.
    """
    records, _ = read_source(source, file.checked())
    drawn = [records[index] for index in drawn_order(records, seed)]
    with loaded(model) as lm:
        drawn = with_true_objects(lm, drawn, token_budget=TOKEN_BUDGET)
        known, _ = known_facts(lm, drawn, count, token_budget=TOKEN_BUDGET, answered=True)
        deviation = embedding_deviation(lm, [record.request.subject for record in records])
    if not known:
        raise InputError(
            f"{model.model.id} gives the true object of none of {len(records)} facts, so none can "
            "be traced: name facts that it knows in requests."
        )
    return TracedFacts(records=keep_records(known), count=len(known), deviation=deviation)


@cached_task("tracing")
def trace_piece(
    records: Sequence[Record],
    model: ModelReference,
    deviation: float,
    token_budget: int,
    mapped: bool,
) -> Artifact:
    """Trace some facts at their subjects' last tokens, in all kinds; or, to map them, at every
    token from the subject's first one on. Gives probabilities of their answers, by token, kind and
    layer (Parquet)."""
    with loaded(model, shared=True) as lm:
        prompts = traced_prompts(lm, [record.request for record in records])
        traced = [
            (record.case_id, each)
            for record, prompt in zip(records, prompts, strict=True)
            for each in (everywhere(prompt) if mapped else [prompt])
        ]
        found = trace(
            lm,
            [prompt for _, prompt in traced],
            deviation,
            MAPPED if mapped else KINDS,
            token_budget=token_budget,
            progress=None if mapped else advance,
        )
        table = pyarrow.Table.from_pylist(list(_rows(lm, traced, found, mapped)))
    return store_table("tracing", table)


def _rows(
    lm: LanguageModel, traced: Sequence[tuple[int, TracedPrompt]], found: Trace, mapped: bool
) -> Iterator[dict[str, Any]]:
    """A row for each case and prompt, kind and layer."""
    for index, (case, prompt) in enumerate(traced):
        shared = {
            "mapped": mapped,
            "case_id": case,
            "position": prompt.restored,
            "token": lm.tokenizer.decode([prompt.ids[prompt.restored]]),
            "part": prompt.part,
            "clean": found.clean[index].item(),
            "noised": found.noised[index].item(),
        }
        for kind, table in found.restored.items():
            for layer, probability in enumerate(table[index].tolist()):
                yield shared | {"kind": kind, "layer": layer, "restored": probability}
