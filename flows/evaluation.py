"""Step 7: what the edit did. Every prompt is scored before and after; all else follows from that.

Results: ``evaluation/prompts.parquet``, ``evaluation/generations.parquet``,
``evaluation/facts.csv`` and ``metrics.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.command.parameters import EvaluationSection, Parameters
from flows.command.script import given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()

from prefect import Task, flow

from flows.requests import records_source
from flows.service.gpu_slot import taking_turns
from flows.service.workers import with_runner
from flows.statistics import corpus_of
from memit.requests import Record, read_counterfact
from tasks.engine.artifacts import Artifact, write_file, write_json
from tasks.engine.cost import Cost
from tasks.engine.loaded_model import ModelReference, token_budget
from tasks.engine.results import (
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
from tasks.engine.workers import map_in_pieces, thread_runner
from tasks.evaluation import (
    DECIMALS,
    TablePiece,
    described_edit,
    measure_perplexity,
    metrics_of,
    read_table,
    score_piece,
)
from tasks.generation import collect_references, having_prompts, read_references, write_texts
from tasks.model import open_model

if TYPE_CHECKING:
    import pyarrow

    from memit.evaluation.reference import References


@dataclass(frozen=True)
class Measured:
    """What was found out about a model, edited or not; every number follows from it."""

    prompts: pyarrow.Table
    """Scored prompts, or answers to zsRE's questions."""
    texts: pyarrow.Table
    """Generated texts; no rows where no record has generation prompts."""
    perplexity: float | None
    """None where there is no held-out text."""
    costs: tuple[Cost, ...]

    def metrics(self, records: Sequence[Record], wanted: References) -> dict[str, float]:
        """All metrics; generated texts are compared with those that are ``wanted``."""
        metrics = metrics_of(self.prompts, self.texts, records, wanted)
        if self.perplexity is not None:
            metrics["perplexity"] = round(self.perplexity, DECIMALS)
        return metrics


@flow(
    name="evaluation",
    validate_parameters=False,
    task_runner=thread_runner(),
)
@taking_turns
@with_runner
def evaluation(parameters: Parameters) -> None:
    """Score the prompts and write the texts that are missing, on both models, and sum up."""
    from memit.evaluation.counterfact import prompts_of

    given = upstream("model", "requests", "statistics", "edit")
    section = parameters.evaluation
    records = read_counterfact(REQUESTS_FILE)
    model = open_model(**parameters.model.placement()).model_copy(
        update={"served_in": section.dtype}
    )
    before, after = (
        measure(
            model,
            edit,
            score_piece,
            prompts_of(records),
            having_prompts(records, section.generation_records),
            held_out_text(given["statistics"]),
            section,
            section.seed,
        )
        for edit in (None, given["edit"].file(DELTA_FILE))
    )
    wanted = references(parameters) if len(before.texts) else {}
    metrics = {
        "before": before.metrics(records, wanted),
        "after": after.metrics(records, wanted),
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


def held_out_text(statistics: Manifest) -> Artifact | None:
    """The documents that the step ``statistics`` has set aside for the perplexity."""
    described = json.loads(STATISTICS_FILE.read_text(encoding="utf-8"))
    return statistics.file(HELD_OUT_FILE) if described["held_out_documents"] else None


def measure(
    model: ModelReference,
    edit: Artifact | None,
    score: Task[..., TablePiece],
    asked: Sequence[Any],
    described: Sequence[Record],
    held_out: Artifact | None,
    section: EvaluationSection,
    seed: int,
) -> Measured:
    """Let ``score`` judge what the model is ``asked``, in pieces; let the model write about records
    that are to be ``described``, and take its perplexity on the held-out text."""
    budget = token_budget(section.token_budget, model)
    scored: list[TablePiece] = map_in_pieces(
        "evaluation",
        "prompts",
        score,
        asked,
        section.prompts_per_piece,
        model=model,
        edit=edit,
        token_budget=budget,
    )
    texts, writing = write_texts(described, model, edit, seed, budget)
    costs = [piece.cost for piece in scored] + writing
    perplexity = None
    if held_out is not None:
        measured = measure_perplexity(held_out, model, edit, budget)
        perplexity = measured.perplexity
        costs.append(measured.cost)
    return Measured(read_table(scored), texts, perplexity, tuple(costs))


def _write_tables(before: Measured, after: Measured) -> list[Path]:
    """Write the results and give their paths."""
    import pyarrow.csv
    import pyarrow.parquet

    from memit.evaluation.counterfact import before_and_after, facts_table
    from memit.evaluation.generations import side_by_side

    joined = before_and_after(before.prompts, after.prompts)
    facts = facts_table(before.prompts, after.prompts)
    texts = side_by_side(before.texts, after.texts)
    write_file(PROMPTS_FILE, lambda path: pyarrow.parquet.write_table(joined, path))
    write_file(FACTS_FILE, lambda path: pyarrow.csv.write_csv(facts, path))
    write_file(GENERATIONS_FILE, lambda path: pyarrow.parquet.write_table(texts, path))
    return [PROMPTS_FILE, FACTS_FILE, GENERATIONS_FILE]


if __name__ == "__main__":
    run_flow(evaluation)
