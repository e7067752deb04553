"""Step 7: measure what the edit did. Every prompt is scored before and after; all metrics follow.

Results: `evaluation/prompts.parquet`, `evaluation/generations.parquet`, `evaluation/facts.csv`,
`evaluation/answers.csv`, `evaluation/kept.csv`, `evaluation/generated.csv`,
`evaluation/intervals.json` and `metrics.json`.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow

from flows.command.parameters import Parameters
from flows.requests import records_source
from flows.service.step import Run, chunks, steady_chunks, step
from flows.statistics import corpus_inputs
from memit.evaluation.counterfact import ScoredPrompt, before_and_after, facts_table, prompts_of
from memit.evaluation.generations import ANSWERS, SCHEMA
from memit.evaluation.kept import SCHEMA as KEPT_SCHEMA
from memit.evaluation.kept import kept_by_record
from memit.evaluation.own_metrics import own_metrics
from memit.evaluation.reference import References, read_snippets
from memit.requests import Record
from tasks.engine import results
from tasks.engine.artifacts import Artifact
from tasks.engine.tables import read_tables
from tasks.evaluation import (
    KEPT_PER_PIECE,
    KEPT_TOGETHER,
    RECORDS_PER_PIECE,
    ROUNDED_TOGETHER,
    Measure,
    Measured,
    OwnMetric,
    answer_kept,
    collect_references,
    compare_kept,
    described_edit,
    examples,
    having_prompts,
    measure_piece,
    measure_text,
    read_held_out,
    read_references,
    without_details,
)
from tasks.statistics import collect_corpus

EXAMPLES = 5
"""Facts whose answers are shown as text."""
SCHEMAS = {"texts": SCHEMA, "answers": ANSWERS}
"""Columns of tables that may have no rows."""
COUNTS: dict[str, Callable[[Sequence[Record]], int]] = {
    "texts": lambda records: sum(len(record.generation_prompts) for record in records),
}
"""What the progress bar counts, other than items."""


@step("evaluation", reads=("model", "requests", "statistics", "edit"))
def evaluation(run: Run) -> None:
    """Score the prompts and write the texts that are missing, on both models, and sum up."""
    section, records = run.parameters.evaluation, run.records
    before, after = (
        measure(
            run,
            edit,
            prompts_of(records),
            having_prompts(records, section.generation_records),
            records,
            held_out_text(run),
            section.seed,
        )
        for edit in (None, run.input("edit", results.DELTA_FILE))
    )
    references = references_of(run.parameters) if len(before.texts) else {}
    _write_tables(run, before, after)
    _write_answers(run)
    edit = json.loads(results.EDIT_FILE.read_text(encoding="utf-8"))
    failed = [one["case_id"] for one in edit["dropped"]]
    metrics, details = without_details(
        {
            "before": before.metrics(records, references),
            "after": after.metrics(records, references, failed),
        }
    )
    metrics["edit"] = described_edit(edit)
    if section.survival:
        survived = {bits: _survived(run, bits, failed) for bits in section.survival}
        metrics["survival"] = without_details(survived)[0]
    if notes := run.given["requests"].notes:
        metrics["requests"] = notes
    run.write_json(results.METRICS_FILE, metrics)
    run.write_json(results.DETAILS_FILE, details)


def references_of(parameters: Parameters) -> References:
    """Texts that generated ones are compared with: the published snippets, or the corpus's texts
    about what the records know; none where statistics come without a corpus: texts that the model
    writes are about anything."""
    snippets = parameters.evaluation.snippets
    if snippets is not None:
        return read_snippets(snippets)
    if parameters.statistics.source in ("published", "sampled"):
        return {}
    corpus = collect_corpus(*corpus_inputs(parameters))
    return read_references(collect_references(*records_source(parameters), corpus))


def held_out_text(run: Run) -> Artifact | None:
    """The documents that the step `statistics` has set aside for the perplexity."""
    described = json.loads(results.STATISTICS_FILE.read_text(encoding="utf-8"))
    return (
        run.input("statistics", results.HELD_OUT_FILE) if described["held_out_documents"] else None
    )


@dataclass(frozen=True)
class Subject:
    """A model that is measured: the unedited one, or one with an edit in its weights."""

    run: Run
    edit: Artifact | None
    served_in: str | None
    """What the weights are rounded to after the edit; None leaves them."""

    def table(
        self, measure: Measure, pieces: Sequence[Sequence[Any]], **more: Any
    ) -> pyarrow.Table:
        """What `measure` finds in the pieces, in order."""
        name = "records" if isinstance(measure, OwnMetric) else measure
        more |= {"measure": measure, "edit": self.edit}
        found = self.run.map(
            name, measure_piece, pieces, COUNTS.get(name, len), **self._model, **more
        )
        return read_tables(found, SCHEMAS.get(name))

    def kept(self, records: Sequence[Record]) -> pyarrow.Table:
        """What becomes of the unedited model's answers to the records' kept prompts."""
        prompts = dict.fromkeys(prompt for record in records for prompt in record.kept_prompts)
        pieces = steady_chunks(list(prompts), KEPT_PER_PIECE)
        before = self.run.map("kept prompts", answer_kept, pieces, **self._model)
        together = ROUNDED_TOGETHER if self._model["model"].is_rounded else KEPT_TOGETHER
        asked = chunks(list(zip(pieces, before, strict=True)), together)
        found = self.run.map(
            "kept prompts",
            compare_kept,
            asked,
            lambda group: sum(len(prompts) for prompts, _ in group),
            edit=self.edit,
            **self._model,
        )
        return kept_by_record(records, read_tables(found, KEPT_SCHEMA))

    def text(self, held_out: Artifact | None) -> tuple[float | None, float | None]:
        """Perplexity of held-out text, and drift from the unedited model; None where there is
        nothing to predict."""
        compute, model, edit = self.run.compute, self._model, self.edit
        if edit is not None and model["model"].is_rounded:  # which would move it by itself
            exact, moved = replace(self, served_in=None).text(held_out)
            if exact is None:
                return None, None
            return compute(measure_text, held_out, None, edit=edit, **model)[0], moved
        read = held_out and compute(read_held_out, held_out, **model)
        if read is None or edit is None:
            return (read[1], 0.0) if read else (None, None)
        return compute(measure_text, held_out, read[0], edit=edit, **model)

    @property
    def _model(self) -> dict[str, Any]:
        budget = self.run.parameters.evaluation.token_budget
        return {
            "model": self.run.model.model_copy(update={"served_in": self.served_in}),
            "token_budget": self.run.token_budget(budget),
        }


def measure(
    run: Run,
    edit: Artifact | None,
    asked: Sequence[ScoredPrompt],
    described: Sequence[Record],
    records: Sequence[Record],
    held_out: Artifact | None,
    seed: int,
    *,
    served_in: str | None = None,
) -> Measured:
    """Score the prompts that the model, with the edit in it, is `asked`; let it write about the
    records that are to be `described`; compare its answers to the kept prompts of all `records`,
    and its free answers, with the unedited model's; take its perplexity and its drift on the
    held-out text. Weights are rounded to `served_in`, by default to `evaluation.dtype`."""
    section = run.parameters.evaluation
    subject = Subject(run, edit, served_in or section.dtype)
    answered, unedited = _pieces(records[: section.free_generation]), replace(subject, edit=None)
    own = own_metrics(section.metrics) if section.metrics and records else ()
    perplexity, moved = subject.text(held_out)
    return Measured(
        prompts=subject.table("prompts", steady_chunks(asked, section.prompts_per_piece)),
        texts=subject.table("texts", _pieces(described), seed=seed),
        kept=subject.kept(records),
        said=before_and_after(
            unedited.table("answers", answered), subject.table("answers", answered)
        ),
        perplexity=perplexity,
        drift=moved,
        own={
            name: subject.table(OwnMetric(str(section.metrics), name), _pieces(records))
            for name in own
        },
    )


def _pieces(records: Sequence[Record]) -> list[Sequence[Record]]:
    return chunks(records, RECORDS_PER_PIECE)


def _survived(run: Run, bits: str, failed: Collection[int]) -> dict[str, float]:
    """Metrics of prompts and perplexity after the edited weights were rounded."""
    edit, prompts = run.input("edit", results.DELTA_FILE), prompts_of(run.records)
    rounded = measure(run, edit, prompts, (), (), held_out_text(run), 0, served_in=bits)
    return replace(rounded, drift=None).metrics(run.records, {}, failed)


def _write_answers(run: Run) -> None:
    """Let both models say, in their own words, what becomes of some facts."""
    shown, dtype = [examples(run.records, EXAMPLES)], run.parameters.evaluation.dtype
    before, after = (
        Subject(run, edit, dtype).table("examples", shown)
        for edit in (None, run.input("edit", results.DELTA_FILE))
    )
    run.write_csv(results.ANSWERS_FILE, before_and_after(before, after))


def _write_tables(run: Run, before: Measured, after: Measured) -> None:
    prompts = before_and_after(before.prompts, after.prompts)
    origins = {record.case_id: record.origin for record in run.records}
    facts = facts_table(before.prompts, after.prompts, after.kept.to_pylist(), origins)
    texts = before_and_after(before.texts, after.texts)
    run.write_table(results.PROMPTS_FILE, prompts)
    run.write_table(results.GENERATIONS_FILE, texts)
    run.write_csv(results.FACTS_FILE, facts)
    run.write_csv(results.KEPT_FILE, after.kept)
    run.write_csv(results.GENERATED_FILE, after.said)
