"""Step 7: measure what the edit did. Every prompt is scored before and after; all metrics follow.

Results: `evaluation/prompts.parquet`, `evaluation/generations.parquet`, `evaluation/facts.csv`,
`evaluation/answers.csv`, `evaluation/kept.csv`, `evaluation/generated.csv`,
`evaluation/intervals.json` and `metrics.json`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from prefect import Task

from flows.command.parameters import Parameters
from flows.requests import records_source
from flows.service.step import Run, chunks, steady_chunks, step
from flows.statistics import corpus_of
from memit.evaluation.counterfact import before_and_after, facts_table, prompts_of
from memit.evaluation.free_generation import free_record_means
from memit.evaluation.generations import ANSWERS, SCHEMA
from memit.evaluation.kept import SCHEMA as KEPT_SCHEMA
from memit.evaluation.own_metrics import own_metrics
from memit.evaluation.reference import References, read_snippets
from memit.requests import Record
from tasks.engine.artifacts import Artifact
from tasks.engine.results import (
    ANSWERS_FILE,
    DELTA_FILE,
    DETAILS_FILE,
    EDIT_FILE,
    FACTS_FILE,
    GENERATED_FILE,
    GENERATIONS_FILE,
    HELD_OUT_FILE,
    KEPT_FILE,
    METRICS_FILE,
    PROMPTS_FILE,
    STATISTICS_FILE,
)
from tasks.evaluation import (
    RECORDS_PER_PIECE,
    OwnMetric,
    TablePiece,
    answer_in_full,
    answer_records,
    collect_references,
    compare_kept,
    described_edit,
    examples,
    having_prompts,
    measure_drift,
    measure_own,
    measure_perplexity,
    metrics_of,
    read_references,
    read_table,
    score_piece,
    without_details,
    write_piece,
)
from tasks.reporting.formats import OWN
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
    said: pyarrow.Table
    """Free answers of the unedited model and of this one; no rows if they were not asked for."""
    perplexity: float | None
    """None where there is no held-out text."""
    drift: float | None
    """KL from the unedited model; None where there is no held-out text."""
    own: Mapping[str, Mapping[int, float]]
    """Metrics of the user's own file, of each case."""

    def metrics(
        self, records: Sequence[Record], references: References, failed: Collection[int] = ()
    ) -> dict[str, float]:
        """All metrics; generated texts are compared with the references. `failed` are the cases
        whose edits could not be written."""
        cases = sorted(record.case_id for record in records)
        more = free_record_means(self.said, records) if self.said else {}
        for name, found in self.own.items():
            more[OWN + name] = np.array([found.get(case, np.nan) for case in cases])
        tables = self.prompts, self.texts, self.kept
        metrics = metrics_of(*tables, records, references, failed, more)
        of_text = {"perplexity": self.perplexity, "drift": self.drift}
        known = {name: value for name, value in of_text.items() if value is not None}
        return metrics | {name: round(value, DECIMALS) for name, value in known.items()}


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
    failed = [one["case_id"] for one in edit["dropped"]]
    metrics, details = without_details(
        {
            "before": before.metrics(records, references),
            "after": after.metrics(records, references, failed),
        }
    )
    metrics["edit"] = described_edit(edit)
    if section.survival:
        metrics["survival"] = {bits: _survived(run, bits, failed) for bits in section.survival}
    if notes := run.given["requests"].notes:
        metrics["requests"] = notes
    run.write_json(METRICS_FILE, metrics)
    run.write_json(DETAILS_FILE, details)


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
    *,
    served_in: str | None = None,
) -> Measured:
    """Let `score` judge what the model, with the edit in it, is `asked`; let the model write about
    the records that are to be `described`; compare its answers to the kept prompts of all
    `records`, and its free answers, with the unedited model's; take its perplexity and its drift on
    the held-out text. Weights are rounded to `served_in`, by default to `evaluation.dtype`."""
    section = run.parameters.evaluation
    shared: dict[str, Any] = {
        "model": run.model.model_copy(update={"served_in": served_in or section.dtype}),
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
    perplexity = moved = None
    if held_out is not None:
        perplexity = run.compute(measure_perplexity, held_out, **shared).perplexity
        moved = 0.0 if edit is None else _drift(run, held_out, edit)
    return Measured(
        prompts=read_table(scored),
        texts=read_table(texts, SCHEMA),
        kept=read_table(kept, KEPT_SCHEMA),
        said=_said(run, records[: section.free_generation], **shared),
        perplexity=perplexity,
        drift=moved,
        own=_own(run, records, **shared),
    )


def _own(run: Run, records: Sequence[Record], **shared: Any) -> dict[str, dict[int, float]]:
    """The metrics of the file in `evaluation.metrics`, of each case that has them."""
    path = run.parameters.evaluation.metrics
    found: dict[str, dict[int, float]] = {}
    if path is None or not records:
        return found
    for name in own_metrics(path):
        pieces = chunks(records, RECORDS_PER_PIECE)
        values = run.map("records", measure_own, pieces, metric=OwnMetric(path, name), **shared)
        numbers = [value for piece in values for value in piece.values]
        pairs = zip(records, numbers, strict=True)
        found[name] = {record.case_id: v for record, v in pairs if v is not None}
    return found


def _drift(run: Run, held_out: Artifact, edit: Artifact) -> float | None:
    """Of weights that are not rounded, which would move the model by itself."""
    budget = run.token_budget(run.parameters.evaluation.token_budget)
    return run.compute(measure_drift, held_out, run.model, edit, budget).drift


def _said(
    run: Run, records: Sequence[Record], edit: Artifact | None, **shared: Any
) -> pyarrow.Table:
    """Free answers of the unedited model, which come from the cache after the first time, and of
    the edited one."""
    before, after = (
        read_table(
            run.map("records", answer_in_full, pieces, edit=each, **shared) if pieces else (),
            ANSWERS,
        )
        for pieces in (chunks(records, RECORDS_PER_PIECE),)
        for each in (None, edit)
    )
    return before_and_after(before, after)


def _survived(run: Run, bits: str, failed: Collection[int]) -> dict[str, float]:
    """Metrics of prompts and perplexity after the edited weights were rounded."""
    edit, prompts = run.input("edit", DELTA_FILE), prompts_of(run.records)
    rounded = measure(
        run, edit, score_piece, prompts, (), (), held_out_text(run), 0, served_in=bits
    )
    return replace(rounded, drift=None).metrics(run.records, {}, failed)


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
    run.write(GENERATED_FILE, lambda path: pyarrow.csv.write_csv(after.said, path))
    run.write(GENERATIONS_FILE, lambda path: pyarrow.parquet.write_table(texts, path))
