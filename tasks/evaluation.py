"""The step ``evaluation``: measure the model before and after, in pieces of some prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from memit.errors import InputError
from tasks.corpus import read_texts
from tasks.engine.artifacts import Artifact, Value, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.cost import Cost, Meter
from tasks.engine.loaded_model import ModelReference, with_edit
from tasks.engine.progress import piece_progress

if TYPE_CHECKING:
    import pyarrow

    from memit.evaluation.counterfact import ScoredPrompt
    from memit.evaluation.reference import References
    from memit.requests import Record

DECIMALS = 6
"""Places after the point in ``metrics.json``."""


class TablePiece(Value):
    """What was found of consecutive prompts or records (Parquet)."""

    table: Artifact
    cost: Cost


class MeasuredPerplexity(Value):
    """Perplexity on held-out text; None where no document has two tokens."""

    perplexity: float | None
    cost: Cost


@cached_task("evaluation")
def score_piece(
    prompts: Sequence[ScoredPrompt],
    model: ModelReference,
    edit: Artifact | None,
    token_budget: int,
) -> TablePiece:
    """Score some prompts against both objects, on the unedited model or with a delta in it."""
    from memit.evaluation.counterfact import score_prompts

    with with_edit(model, edit) as lm, Meter() as meter, piece_progress("evaluation") as progress:
        table = score_prompts(lm, prompts, token_budget=token_budget, progress=progress)
    return kept_table("evaluation", table, meter.cost)


def kept_table(step: str, table: pyarrow.Table, cost: Cost) -> TablePiece:
    """Put what a piece has found into the cache."""
    import pyarrow.parquet as parquet

    piece = store_piece(step, ".parquet", lambda path: parquet.write_table(table, path))
    return TablePiece(table=piece, cost=cost)


@cached_task("perplexity")
def measure_perplexity(
    held_out: Artifact, model: ModelReference, edit: Artifact | None, token_budget: int
) -> MeasuredPerplexity:
    """Perplexity of the unedited model, or with a delta in it, on text that nothing has seen."""
    from memit.evaluation.perplexity import perplexity

    documents = read_texts(held_out.checked())
    with with_edit(model, edit) as lm, Meter() as meter:
        value = None
        with suppress(InputError):
            value = perplexity(lm, documents, token_budget=token_budget)
    return MeasuredPerplexity(perplexity=value, cost=meter.cost)


def read_table(pieces: Sequence[TablePiece]) -> pyarrow.Table:
    """The rows of all pieces, in order."""
    import pyarrow
    import pyarrow.parquet as parquet

    return pyarrow.concat_tables([parquet.read_table(piece.table.checked()) for piece in pieces])


def metrics_of(
    prompts: pyarrow.Table,
    texts: pyarrow.Table,
    records: Sequence[Record],
    references: References,
) -> dict[str, float]:
    """All metrics that tables of prompts (or zsRE's answers) and of generated texts support, each
    with its 95% bootstrap interval over records, and the number of records."""
    from memit.evaluation.counterfact import SCORE_OF, record_means, summarise
    from memit.evaluation.generations import generation_record_means
    from memit.evaluation.intervals import bootstrap_intervals

    if "answer" in prompts.column_names:
        means, summary = _of_answers(prompts)
    else:
        means, summary = dict(record_means(prompts)), summarise(prompts)
    ordered = sorted(records, key=lambda record: record.case_id)
    written = generation_record_means(texts, ordered, references)
    means |= written
    summary |= {name: float(np.nanmean(values)) for name, values in written.items()}
    intervals = bootstrap_intervals(means, harmonic={"score": SCORE_OF}, seed=0)
    return {name: _rounded(value) for name, value in (summary | intervals).items()}


def _of_answers(answers: pyarrow.Table) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """zsRE's metrics under the names that they have in all tables; NS is its specificity."""
    from memit.evaluation.counterfact import harmonic_mean
    from memit.evaluation.zsre import zsre_record_means

    means = zsre_record_means(answers)
    values = {name: float(of.mean()) for name, of in means.items()}
    return means, {"score": harmonic_mean(list(values.values()))} | values


def described_edit(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What ``metrics.json`` says of an edit, out of ``edit.json``."""
    described = ("count", "layers", "target_shift", "residual_left", "update_ratio")
    return {name: summary[name] for name in described} | {"dropped": len(summary["dropped"])}


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else round(value, DECIMALS)
