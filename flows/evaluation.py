"""Step 7: what the edit did. Every prompt is scored before and after; all else follows from that.

Results: ``evaluation/prompts.parquet``, ``evaluation/generations.parquet``,
``evaluation/facts.csv`` and ``metrics.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.command import given_parameters, run_flow
from flows.parameters import Parameters

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from flows.gpu import taking_turns
from flows.requests import records_source
from flows.runner import with_runner
from flows.statistics import corpus_of
from memit.requests import Record, read_counterfact
from tasks.artifacts import Artifact, write_file, write_json
from tasks.evaluation import (
    DECIMALS,
    described_edit,
    measure_perplexity,
    metrics_of,
    read_table,
    score_in_pieces,
    score_piece,
)
from tasks.generation import collect_references, having_prompts, read_references, write_texts
from tasks.loading import ModelReference, token_budget
from tasks.measure import Cost
from tasks.model import open_model
from tasks.results import (
    DELTA_FILE,
    EDIT_FILE,
    FACTS_FILE,
    GENERATIONS_FILE,
    HELD_OUT_FILE,
    METRICS_FILE,
    PROMPTS_FILE,
    REQUESTS_FILE,
    STATISTICS_FILE,
    Manifest,
    finish_step,
    upstream,
)
from tasks.runners import thread_runner

if TYPE_CHECKING:
    import pyarrow

    from memit.evaluation.reference import References


@dataclass(frozen=True)
class State:
    """What was found out about the model before or after the edit."""

    prompts: pyarrow.Table
    texts: pyarrow.Table | None
    """None where no record has generation prompts."""
    perplexity: float | None
    """None where there is no held-out text."""
    costs: tuple[Cost, ...]


@flow(
    name="evaluation",
    validate_parameters=False,
    task_runner=thread_runner(),
)
@taking_turns
@with_runner
def evaluation(parameters: Parameters) -> None:
    """Score the prompts and write the texts that are missing, on both models, and sum up."""
    given = upstream("model", "requests", "statistics", "edit")
    section = parameters.evaluation
    records = read_counterfact(REQUESTS_FILE)
    model = open_model(**parameters.model.placement()).model_copy(
        update={"served_in": section.dtype}
    )
    before, after = (
        _measure(parameters, given, model, edit, records)
        for edit in (None, given["edit"].file(DELTA_FILE))
    )
    wanted = references(parameters) if before.texts is not None else {}
    metrics = {
        "before": _metrics(before, records, wanted),
        "after": _metrics(after, records, wanted),
        "edit": described_edit(json.loads(EDIT_FILE.read_text(encoding="utf-8"))),
    }
    files = _write_tables(before, after)
    write_json(METRICS_FILE, metrics)
    finish_step("evaluation", [*files, METRICS_FILE], given, [*before.costs, *after.costs])


def references(parameters: Parameters) -> References:
    """Texts that generated ones are compared with: the published snippets, or the texts of the
    corpus that tell what the records know; none where statistics come without a corpus."""
    from memit.evaluation.reference import read_snippets

    snippets = parameters.evaluation.snippets
    if snippets is not None:
        return read_snippets(snippets)
    if parameters.statistics.source == "published":
        return {}
    return read_references(collect_references(*records_source(parameters), corpus_of(parameters)))


def _measure(
    parameters: Parameters,
    given: Mapping[str, Manifest],
    model: ModelReference,
    edit: Artifact | None,
    records: Sequence[Record],
) -> State:
    from memit.evaluation.counterfact import prompts_of

    section = parameters.evaluation
    budget = token_budget(section.token_budget, model)
    scored = score_in_pieces(
        score_piece, prompts_of(records), section.prompts_per_piece, model, edit, budget
    )
    costs = [piece.cost for piece in scored]
    texts = perplexity = None
    described = having_prompts(records, section.generation_records)
    if described:
        texts, writing = write_texts(described, model, edit, section.seed, budget)
        costs += writing
    if json.loads(STATISTICS_FILE.read_text(encoding="utf-8"))["held_out_documents"]:
        held_out = given["statistics"].file(HELD_OUT_FILE)
        measured = measure_perplexity(held_out, model, edit, budget)
        perplexity = measured.perplexity
        costs.append(measured.cost)
    return State(read_table(scored), texts, perplexity, tuple(costs))


def _metrics(state: State, records: Sequence[Record], wanted: References) -> dict[str, float]:
    metrics = metrics_of(state.prompts, state.texts, records, wanted)
    if state.perplexity is not None:
        metrics["perplexity"] = round(state.perplexity, DECIMALS)
    return metrics


def _write_tables(before: State, after: State) -> list[Path]:
    """Write the results and give their paths."""
    import pyarrow.csv
    import pyarrow.parquet

    from memit.evaluation.counterfact import before_and_after, facts_table
    from memit.evaluation.generations import SCHEMA, side_by_side

    joined = before_and_after(before.prompts, after.prompts)
    facts = facts_table(before.prompts, after.prompts)
    nothing = SCHEMA.empty_table()  # DVC knows the file by its name
    texts = side_by_side(*(nothing if s.texts is None else s.texts for s in (before, after)))
    write_file(PROMPTS_FILE, lambda path: pyarrow.parquet.write_table(joined, path))
    write_file(FACTS_FILE, lambda path: pyarrow.csv.write_csv(facts, path))
    write_file(GENERATIONS_FILE, lambda path: pyarrow.parquet.write_table(texts, path))
    return [PROMPTS_FILE, FACTS_FILE, GENERATIONS_FILE]


if __name__ == "__main__":
    run_flow(evaluation)
