"""The tasks of the step `evaluation`: score prompts and answers, and generate texts, in pieces."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count as counter
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from memit.editors.saved_edit import load_edit
from memit.errors import InputError
from memit.evaluation.counterfact import (
    SCORE_OF,
    ScoredPrompt,
    harmonic_mean,
    record_means,
    score_prompts,
    summarise,
)
from memit.evaluation.drift import drift
from memit.evaluation.free_generation import answer_freely
from memit.evaluation.generations import (
    TOTAL_TOKENS,
    answer_briefly,
    generation_record_means,
    write_about,
)
from memit.evaluation.intervals import bootstrap_intervals
from memit.evaluation.kept import answers_to, kept_record_means, kept_table
from memit.evaluation.own_metrics import Metric, own_metrics
from memit.evaluation.perplexity import perplexity
from memit.evaluation.reference import References, references_from_corpus
from memit.evaluation.zsre import ZsreRecord, score_zsre, zsre_record_means
from memit.language_model import LanguageModel
from memit.positions import open_ids
from memit.requests import Record
from tasks.engine.artifacts import Artifact, Value, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.code import code_of_own
from tasks.engine.cost import Cost, Meter
from tasks.engine.edited_model import with_edit
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import piece_progress, progress_bar
from tasks.reporting.labels import DECIMALS
from tasks.requests import Source, read_source
from tasks.statistics import Corpus, read_texts

DETAILS = ("_low", "_high", "_magnitude")
"""What the keys of intervals and magnitudes end in."""
RECORDS_PER_PIECE = 16
"""Records whose texts are generated in a piece: a text takes a hundred steps."""


class TablePiece(Value):
    """What was found of consecutive prompts or records (Parquet)."""

    table: Artifact
    cost: Cost


class MeasuredPerplexity(Value):
    """Perplexity on held-out text; None where no document has two tokens."""

    perplexity: float | None
    cost: Cost


@dataclass(frozen=True)
class OwnMetric:
    """A metric of the user's file `path`."""

    path: str
    name: str

    @property
    def measure(self) -> Metric:
        """The function itself."""
        return own_metrics(self.path)[self.name]

    @property
    def cache_key(self) -> dict[str, object]:
        """Its name, and the SHA-256 of each source file that it comes from."""
        return {"name": self.name, "code": code_of_own(self.measure)}


class OwnValues(Value):
    """A metric of each record; None where it has none."""

    values: tuple[float | None, ...]
    cost: Cost


class MeasuredDrift(Value):
    """KL from the unedited model on held-out text, in nats; None where no document has two
    tokens."""

    drift: float | None
    cost: Cost


@cached_task("evaluation")
def score_piece(
    prompts: Sequence[ScoredPrompt],
    model: ModelReference,
    edit: Artifact | None,
    token_budget: int,
) -> TablePiece:
    """Score some prompts against both objects, on the unedited model or with a delta in it."""
    with (
        with_edit(model, edit, shared=True) as lm,
        Meter() as meter,
        piece_progress("evaluation") as progress,
    ):
        table = score_prompts(lm, prompts, token_budget=token_budget, progress=progress)
    return store_table("evaluation", table, meter.cost)


@cached_task("zsre")
def answer_piece(
    questions: Sequence[ZsreRecord],
    model: ModelReference,
    edit: Artifact | None,
    token_budget: int,
) -> TablePiece:
    """Answer some of zsRE's questions under teacher forcing."""
    with (
        with_edit(model, edit, shared=True) as lm,
        Meter() as meter,
        piece_progress("zsre") as progress,
    ):
        table = score_zsre(lm, questions, token_budget=token_budget, progress=progress)
    return store_table("evaluation", table, meter.cost)


@cached_task("generation")
def write_piece(
    records: Sequence[Record],
    model: ModelReference,
    edit: Artifact | None,
    seed: int,
    token_budget: int,
) -> TablePiece:
    """Continue the generation prompts of some records."""
    with with_edit(model, edit) as lm, Meter() as meter, piece_progress("generation") as progress:
        table = write_about(
            lm,
            records,
            seed=seed,
            token_budget=token_budget,
            total_tokens=min(TOTAL_TOKENS, lm.context_length),
            progress=progress,
        )
    return store_table("generation", table, meter.cost)


@cached_task("answers")
def answer_records(
    records: Sequence[Record], model: ModelReference, edit: Artifact | None, token_budget: int
) -> TablePiece:
    """What the model says to prompts of some records, as text for people."""
    with with_edit(model, edit) as lm, Meter() as meter:
        table = answer_briefly(lm, records, token_budget=token_budget)
    return store_table("evaluation", table, meter.cost)


@cached_task("free_generation")
def answer_in_full(
    records: Sequence[Record], model: ModelReference, edit: Artifact | None, token_budget: int
) -> TablePiece:
    """What the model says to the prompts of some records, until it stops by itself."""
    with with_edit(model, edit) as lm, Meter() as meter, piece_progress("answers") as progress:
        table = answer_freely(lm, records, token_budget=token_budget, progress=progress)
    return store_table("evaluation", table, meter.cost)


@cached_task("kept")
def compare_kept(
    records: Sequence[Record], model: ModelReference, edit: Artifact | None, token_budget: int
) -> TablePiece:
    """What an edit does to the kept prompts of some records."""
    with piece_progress("kept") as progress, Meter() as meter:
        with with_edit(model, None) as lm:
            before = answers_to(lm, records, token_budget=token_budget)
        with with_edit(model, edit) as lm:
            after = answers_to(lm, records, token_budget=token_budget, progress=progress)
    return store_table("evaluation", kept_table(records, before, after), meter.cost)


@cached_task("perplexity")
def measure_perplexity(
    held_out: Artifact, model: ModelReference, edit: Artifact | None, token_budget: int
) -> MeasuredPerplexity:
    """Perplexity of the unedited model, or with a delta in it, on text that nothing has seen."""
    documents = read_texts(held_out.checked())
    with with_edit(model, edit) as lm, Meter() as meter:
        value = None
        with suppress(InputError), _token_bar("perplexity", lm, documents) as advance:
            value = perplexity(lm, documents, token_budget=token_budget, progress=advance)
    return MeasuredPerplexity(perplexity=value, cost=meter.cost)


@cached_task("own_metric")
def measure_own(
    records: Sequence[Record],
    metric: OwnMetric,
    model: ModelReference,
    edit: Artifact | None,
    token_budget: int,
) -> OwnValues:
    """A user's metric of some records.

    Raises:
        InputError: it gives another number of values.
    """
    with with_edit(model, edit) as lm, Meter() as meter:
        found = [float(value) for value in metric.measure(lm, records, token_budget)]
    if len(found) != len(records):
        raise InputError(
            f"{metric.name} in {metric.path} gives {len(found)} values for {len(records)} records: "
            "it must give one for each."
        )
    known = tuple(None if np.isnan(value) else value for value in found)
    return OwnValues(values=known, cost=meter.cost)


@cached_task("drift")
def measure_drift(
    held_out: Artifact, model: ModelReference, edit: Artifact, token_budget: int
) -> MeasuredDrift:
    """How far the edit moves next-token distributions on text that nothing has seen."""
    documents = read_texts(held_out.checked())
    with loaded(model) as lm, Meter() as meter:
        value = None
        with suppress(InputError), _token_bar("drift", lm, documents) as advance:
            applied = load_edit(edit.checked())
            value = drift(lm, applied, documents, token_budget=token_budget, progress=advance)
    return MeasuredDrift(drift=value, cost=meter.cost)


@contextmanager
def _token_bar(
    name: str, lm: LanguageModel, documents: Sequence[str]
) -> Iterator[Callable[[int], None]]:
    """A bar of the tokens of documents that are predicted."""
    lengths = [min(len(ids), lm.context_length) for ids in open_ids(lm.tokenizer, documents)]
    with progress_bar(name, sum(max(length - 1, 0) for length in lengths), "tokens") as bar:
        yield bar.advance


def read_table(pieces: Sequence[TablePiece], schema: pyarrow.Schema | None = None) -> pyarrow.Table:
    """The rows of all pieces, in order; without pieces an empty table of the schema."""
    if not pieces and schema is not None:
        return schema.empty_table()
    return pyarrow.concat_tables([parquet.read_table(piece.table.checked()) for piece in pieces])


def metrics_of(
    prompts: pyarrow.Table,
    texts: pyarrow.Table,
    kept: pyarrow.Table,
    records: Sequence[Record],
    references: References,
    failed: Collection[int] = (),
    more: Mapping[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """All metrics that tables of prompts (or zsRE's answers), generated texts and kept prompts
    support, and `more` of each record, each with its 95% bootstrap interval over records, and the
    number of records. Records whose edit has `failed` count as failures in each metric of
    prompts."""
    if "answer" in prompts.column_names:
        means, summary = _of_answers(prompts)
    else:
        means, summary = dict(record_means(prompts, failed)), summarise(prompts, failed)
    ordered = sorted(records, key=lambda record: record.case_id)
    others = generation_record_means(texts, ordered, references)
    others |= kept_record_means(kept, ordered) | dict(more or {})
    means |= others
    summary |= {name: float(np.nanmean(values)) for name, values in others.items()}
    intervals = bootstrap_intervals(means, harmonic={"score": SCORE_OF}, seed=0)
    return {name: _rounded(value) for name, value in (summary | intervals).items()}


def _of_answers(answers: pyarrow.Table) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """zsRE's metrics under the names that they have in all tables; NS is its specificity."""
    means = zsre_record_means(answers)
    values = {name: float(of.mean()) for name, of in means.items()}
    return means, {"score": harmonic_mean(list(values.values()))} | values


def without_details(
    metrics: Mapping[str, Mapping[str, float]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics by which runs are compared, and apart from them intervals and magnitudes."""
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for state, values in metrics.items():
        for number, part in enumerate(parts):
            part[state] = {k: v for k, v in values.items() if k.endswith(DETAILS) == bool(number)}
    return parts


def described_edit(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `metrics.json` says of an edit, out of `edit.json`."""
    described = ("count", "layers", "target_shift", "residual_left", "update_ratio")
    return {name: summary[name] for name in described} | {"dropped": len(summary["dropped"])}


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else round(value, DECIMALS)


@cached_task("references")
def collect_references(source: Source, file: Artifact, corpus: Corpus) -> Artifact:
    """Texts of a corpus about each relation and object, as the records in `file` know it (JSON).

    Give all records of a data set, not only those that are edited.
    """
    known, _ = read_source(source, file.checked())
    documents = (text for part in corpus.ranges for text in read_texts(part.texts.checked()))
    found = references_from_corpus(known, documents)
    rows = json.dumps([[*key, list(texts)] for key, texts in found.items()])
    return store_piece("references", ".json", lambda path: path.write_text(rows))


def read_references(file: Artifact) -> References:
    """What `collect_references` found."""
    rows = json.loads(file.checked().read_text(encoding="utf-8"))
    return {(relation, target): texts for relation, target, texts in rows}


def examples(records: Sequence[Record], count: int) -> list[Record]:
    """`count` records, of different relations where there are so many."""
    turns: defaultdict[str, Iterator[int]] = defaultdict(counter)
    return sorted(records, key=lambda record: next(turns[record.request.fact[1]]))[:count]


def having_prompts(records: Sequence[Record], most: int | None) -> list[Record]:
    """The first `most` records that have generation prompts; None takes all of them."""
    return [record for record in records if record.generation_prompts][:most]


def store_table(step: str, table: pyarrow.Table, cost: Cost) -> TablePiece:
    """Put what a piece has found into the cache."""
    piece = store_piece(step, ".parquet", lambda path: parquet.write_table(table, path))
    return TablePiece(table=piece, cost=cost)
