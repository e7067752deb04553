"""The tasks of the step `evaluation`: score prompts and answers, and generate texts, in pieces."""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count as counter
from math import isfinite
from typing import Any, Literal

import numpy as np
import pyarrow

from memit.editors.saved_edit import load_edit
from memit.errors import InputError, NumericsError
from memit.evaluation import DECIMALS, DETAILS, OWN
from memit.evaluation.counterfact import SCORE_OF, overall, record_means, score_prompts
from memit.evaluation.drift import Reading, drift, read_text
from memit.evaluation.free_generation import answer_freely, free_record_means
from memit.evaluation.generations import (
    TOTAL_TOKENS,
    answer_briefly,
    generation_record_means,
    write_about,
)
from memit.evaluation.intervals import bootstrap_intervals
from memit.evaluation.kept import (
    Unedited,
    answers_to,
    kept_record_means,
    kept_table,
    unedited_answers,
)
from memit.evaluation.own_metrics import Metric, own_metrics
from memit.evaluation.reference import References, references_from_corpus
from memit.evaluation.zsre import zsre_record_means
from memit.language_model import LanguageModel
from memit.positions import open_ids
from memit.requests import Record
from tasks.engine.artifacts import Artifact, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.code import code_of_own
from tasks.engine.edited_model import with_edit
from tasks.engine.loaded_model import ModelReference
from tasks.engine.progress import advance, progress_bar
from tasks.engine.tables import store_table
from tasks.requests import Source, read_source
from tasks.statistics import Corpus, read_texts

RECORDS_PER_PIECE = 16
"""Records whose texts are generated in a piece: a text takes a hundred steps."""
KEPT_PER_PIECE = 16
"""Prompts that the unedited model answers in a piece, at most: a fact more costs one of them."""
KEPT_TOGETHER = 6
"""So many of these pieces are one for the edited model, all of whose answers are new anyway."""
ROUNDED_TOGETHER = 24
"""The same where weights are rounded: then each such piece loads both models from the disk."""


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

    def table(
        self, lm: LanguageModel, records: Sequence[Record], token_budget: int
    ) -> pyarrow.Table:
        """The value of each record, null where it has none.

        Raises:
            InputError: the metric gives another number of values.
        """
        found = [float(value) for value in self.measure(lm, records, token_budget)]
        if len(found) != len(records):
            raise InputError(
                f"{self.name} in {self.path} gives {len(found)} values for {len(records)} records: "
                "it must give one for each."
            )
        values = pyarrow.array(found, from_pandas=True)  # NaN becomes null
        return pyarrow.table({"case_id": [r.case_id for r in records], "value": values})


Measure = Literal["prompts", "texts", "answers", "examples"] | OwnMetric
"""What a model is asked: to score prompts, to write about records, to answer records in full, or
briefly as text for people; or a metric of the user's own."""


@cached_task("evaluation")
def measure_piece(
    items: Sequence[Any],
    measure: Measure,
    model: ModelReference,
    edit: Artifact | None,
    token_budget: int,
    seed: int = 0,
) -> Artifact:
    """What is found of some prompts or records, on the unedited model or with an edit in it."""
    with with_edit(model, edit, shared=measure == "prompts") as lm:
        return store_table("evaluation", _measured(lm, measure, items, seed, token_budget))


def _measured(
    lm: LanguageModel,
    measure: Measure,
    items: Sequence[Any],
    seed: int,
    token_budget: int,
) -> pyarrow.Table:
    if isinstance(measure, OwnMetric):
        return measure.table(lm, items, token_budget)
    if measure == "examples":
        return answer_briefly(lm, items, token_budget=token_budget)
    measures: dict[str, Callable[..., pyarrow.Table]] = {
        "prompts": score_prompts,
        "answers": answer_freely,
        "texts": partial(write_about, seed=seed, total_tokens=min(TOTAL_TOKENS, lm.context_length)),
    }
    return measures[measure](lm, items, token_budget=token_budget, progress=advance)


@cached_task("unedited")
def answer_kept(prompts: Sequence[str], model: ModelReference, token_budget: int) -> Artifact:
    """What the unedited model says to kept prompts."""
    with with_edit(model, None) as lm:
        found = unedited_answers(lm, prompts, token_budget=token_budget, progress=advance)
    return store_piece("evaluation", ".safetensors", found.save)


@cached_task("kept")
def compare_kept(
    asked: Sequence[tuple[Sequence[str], Artifact]],
    model: ModelReference,
    edit: Artifact | None,
    token_budget: int,
) -> Artifact:
    """What an edit does to kept prompts, piece by piece with what `answer_kept` has found that the
    unedited model says to them."""
    prompts = [prompt for part, _ in asked for prompt in part]
    unedited = Unedited.concatenate([Unedited.load(found.checked()) for _, found in asked])
    with with_edit(model, None) as lm:
        before = after = unedited.answers(lm)
    if edit is not None:
        with with_edit(model, edit) as lm:
            after = answers_to(lm, prompts, token_budget=token_budget, progress=advance)
    return store_table("evaluation", kept_table(prompts, before, after))


@cached_task("reading")
def read_held_out(
    held_out: Artifact, model: ModelReference, token_budget: int
) -> tuple[Artifact, float] | None:
    """What the unedited model makes of text that nothing has seen, and its perplexity; None where
    no document has two tokens."""
    documents = read_texts(held_out.checked())
    with (
        with_edit(model, None) as lm,
        suppress(InputError),
        _token_bar("perplexity", lm, documents) as count,
    ):
        found = read_text(lm, documents, token_budget=token_budget, progress=count)
        return store_piece("evaluation", ".safetensors", found.save), found.perplexity
    return None


@cached_task("held_out")
def measure_text(
    held_out: Artifact,
    reading: Artifact | None,
    model: ModelReference,
    edit: Artifact,
    token_budget: int,
) -> tuple[float, float | None]:
    """With an edit in the model, the perplexity of text that nothing has seen, and the KL of next
    tokens from the unedited model, in nats, of which `reading` is what `read_held_out` has found;
    without it, the perplexity alone."""
    documents = read_texts(held_out.checked())
    with (
        with_edit(model, None if reading else edit) as lm,
        _token_bar("perplexity", lm, documents) as count,
    ):
        if reading is None:
            found = read_text(lm, documents, token_budget=token_budget, progress=count)
            return found.perplexity, None
        read, moving = Reading.load(reading.checked()), load_edit(edit.checked())
        return drift(lm, moving, documents, read, token_budget=token_budget, progress=count)


@contextmanager
def _token_bar(
    name: str, lm: LanguageModel, documents: Sequence[str]
) -> Iterator[Callable[[int], None]]:
    """A bar of the tokens of documents that are predicted."""
    lengths = [min(len(ids), lm.context_length) for ids in open_ids(lm.tokenizer, documents)]
    with progress_bar(name, sum(max(length - 1, 0) for length in lengths), "tokens") as bar:
        yield bar.advance


@dataclass(frozen=True)
class Measured:
    """What was measured of a model, edited or not; every metric follows from it."""

    prompts: pyarrow.Table
    """Scored prompts: those of records, or zsRE's questions."""
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
    own: Mapping[str, pyarrow.Table]
    """Metrics of the user's own file: cases and values."""

    def metrics(
        self, records: Sequence[Record], references: References, failed: Collection[int] = ()
    ) -> dict[str, float]:
        """All metrics that the tables support, those of records with their 95% bootstrap intervals
        over these, and the number of records. Generated texts are compared with the references;
        cases whose edits have `failed` count as failures in each metric of prompts.

        Raises:
            NumericsError: the perplexity or the drift is not finite.
        """
        is_zsre = "specificity" in self.prompts["kind"].to_pylist()
        means = (zsre_record_means if is_zsre else record_means)(self.prompts, failed)
        ordered = sorted(records, key=lambda record: record.case_id)
        means |= generation_record_means(self.texts, ordered, references)
        means |= kept_record_means(self.kept, ordered)
        means |= free_record_means(self.said, records) if self.said else {}
        means |= self._own_means(ordered)
        summary = overall(means, self.prompts)
        summary |= bootstrap_intervals(means, harmonic={"score": SCORE_OF}, seed=0)
        of_text = {"perplexity": self.perplexity, "drift": self.drift}
        known = {name: value for name, value in of_text.items() if value is not None}
        if not all(map(isfinite, known.values())):
            raise NumericsError(
                "the perplexity is not a finite number: use another model.dtype or "
                "evaluation.dtype, or a smaller edit."
            )
        return {name: round(value, DECIMALS) for name, value in (summary | known).items()}

    def _own_means(self, ordered: Sequence[Record]) -> dict[str, np.ndarray]:
        """The user's metrics of each record, without those that no record has."""
        means = {}
        for name, table in self.own.items():
            found = dict(zip(table["case_id"].to_pylist(), table["value"].to_numpy(), strict=True))
            values = np.array([found[record.case_id] for record in ordered])
            if not np.isnan(values).all():
                means[OWN + name] = values
        return means


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
