"""Step 7: measure what the edit did. Every prompt is scored before and after; all metrics follow.

Results: `evaluation/prompts.parquet`, `evaluation/generations.parquet`, `evaluation/facts.csv`,
`evaluation/answers.csv`, `evaluation/kept.csv` and `metrics.json`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
from prefect import Task

from flows.command.parameters import Parameters
from flows.requests import records_source
from flows.service.step import Run, chunks, steady_chunks, step
from flows.statistics import corpus_of
from memit.evaluation.counterfact import before_and_after, facts_table, prompts_of
from memit.evaluation.generations import SCHEMA
from memit.evaluation.kept import SCHEMA as KEPT_SCHEMA
from memit.evaluation.reference import References, read_snippets
from memit.requests import Record
from tasks.engine.artifacts import Artifact
from tasks.engine.results import (
    ANSWERS_FILE,
    DELTA_FILE,
    EDIT_FILE,
    FACTS_FILE,
    GENERATIONS_FILE,
    HELD_OUT_FILE,
    KEPT_FILE,
    METRICS_FILE,
    PROMPTS_FILE,
    STATISTICS_FILE,
)
from tasks.evaluation import (
    RECORDS_PER_PIECE,
    TablePiece,
    answer_records,
    collect_references,
    compare_kept,
    described_edit,
    examples,
    having_prompts,
    measure_perplexity,
    metrics_of,
    read_references,
    read_table,
    score_piece,
    write_piece,
)
from tasks.reporting.labels import DECIMALS

EXAMPLES = 5
"""Facts whose answers are shown as text."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a model, edited or not; every metric follows from it."""

    prompts: pyarrow.Table
    """Scored prompts, or answers to zsRE's questions."""
    texts: pyarrow.Table
    """Generated texts; no rows where no record has generation prompts."""
    kept: pyarrow.Table
    """Prompts whose answers must stay; no rows where no record has any."""
    perplexity: float | None
    """None where there is no held-out text."""

    def metrics(
        self, records: Sequence[Record], references: References, failed: Collection[int] = ()
    ) -> dict[str, float]:
        """All metrics; generated texts are compared with the references. `failed` are the cases
        whose edits could not be written."""
        metrics = metrics_of(self.prompts, self.texts, self.kept, records, references, failed)
        if self.perplexity is not None:
            metrics["perplexity"] = round(self.perplexity, DECIMALS)
        return metrics


@step("evaluation", reads=("model", "requests", "statistics", "edit"))
def evaluation(run: Run) -> None:
    """Score the prompts and write the texts that are missing, on both models, and sum up."""
    section, records = run.parameters.evaluation, run.records
    before, after = (
        measure(
            run,
            edit,
            score_piece,
            prompts_of(records),
            having_prompts(records, section.generation_records),
            records,
            held_out_text(run),
            section.seed,
        )
        for edit in (None, run.input("edit", DELTA_FILE))
    )
    references = references_of(run.parameters) if len(before.texts) else {}
    _write_tables(run, before, after)
    _write_answers(run)
    edit = json.loads(EDIT_FILE.read_text(encoding="utf-8"))
    metrics: dict[str, Any] = {
        "before": before.metrics(records, references),
        "after": after.metrics(records, references, [one["case_id"] for one in edit["dropped"]]),
        "edit": described_edit(edit),
    }
    if notes := run.given["requests"].notes:
        metrics["requests"] = notes
    run.write_json(METRICS_FILE, metrics)


def references_of(parameters: Parameters) -> References:
    """Texts that generated ones are compared with: the published snippets, or the corpus's texts
    about what the records know; none where statistics come without a corpus: texts that the model
    writes are about anything."""
    snippets = parameters.evaluation.snippets
    if snippets is not None:
        return read_snippets(snippets)
    if parameters.statistics.source in ("published", "sampled"):
        return {}
    return read_references(collect_references(*records_source(parameters), corpus_of(parameters)))


def held_out_text(run: Run) -> Artifact | None:
    """The documents that the step `statistics` has set aside for the perplexity."""
    described = json.loads(STATISTICS_FILE.read_text(encoding="utf-8"))
    return run.input("statistics", HELD_OUT_FILE) if described["held_out_documents"] else None


def measure(
    run: Run,
    edit: Artifact | None,
    score: Task[..., TablePiece],
    asked: Sequence[Any],
    described: Sequence[Record],
    records: Sequence[Record],
    held_out: Artifact | None,
    seed: int,
) -> Measured:
    """Let `score` judge what the model, with the edit in it, is `asked`; let the model write about
    the records that are to be `described`; compare its answers to the kept prompts of all `records`
    with the unedited model's; take its perplexity on the held-out text."""
    section = run.parameters.evaluation
    shared: dict[str, Any] = {
        "model": run.model.model_copy(update={"served_in": section.dtype}),
        "edit": edit,
        "token_budget": run.token_budget(section.token_budget),
    }
    scored = run.map("prompts", score, steady_chunks(asked, section.prompts_per_piece), **shared)
    texts = run.map(
        "texts",
        write_piece,
        chunks(described, RECORDS_PER_PIECE),
        lambda piece: sum(len(record.generation_prompts) for record in piece),
        seed=seed,
        **shared,
    )
    kept = run.map(
        "kept prompts",
        compare_kept,
        chunks([record for record in records if record.kept_prompts], RECORDS_PER_PIECE),
        lambda piece: sum(len(record.kept_prompts) for record in piece),
        **shared,
    )
    perplexity = None
    if held_out is not None:
        perplexity = run.compute(measure_perplexity, held_out, **shared).perplexity
    return Measured(
        read_table(scored), read_table(texts, SCHEMA), read_table(kept, KEPT_SCHEMA), perplexity
    )


def _write_answers(run: Run) -> None:
    """Let both models say, in their own words, what becomes of some facts."""
    section, shown = run.parameters.evaluation, examples(run.records, EXAMPLES)
    model = run.model.model_copy(update={"served_in": section.dtype})
    before, after = (
        run.compute(answer_records, shown, model, edit, run.token_budget(section.token_budget))
        for edit in (None, run.input("edit", DELTA_FILE))
    )
    answers = before_and_after(read_table([before]), read_table([after]))
    run.write(ANSWERS_FILE, lambda path: pyarrow.csv.write_csv(answers, path))


def _write_tables(run: Run, before: Measured, after: Measured) -> None:
    prompts = before_and_after(before.prompts, after.prompts)
    origins = {record.case_id: record.origin.given for record in run.records}
    facts = facts_table(before.prompts, after.prompts, after.kept.to_pylist(), origins)
    texts = before_and_after(before.texts, after.texts)
    run.write(PROMPTS_FILE, lambda path: pyarrow.parquet.write_table(prompts, path))
    run.write(FACTS_FILE, lambda path: pyarrow.csv.write_csv(facts, path))
    run.write(KEPT_FILE, lambda path: pyarrow.csv.write_csv(after.kept, path))
    run.write(GENERATIONS_FILE, lambda path: pyarrow.parquet.write_table(texts, path))
