"""The step ``evaluation``: measure the model before and after, in pieces of some prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from tasks.artifacts import Artifact, cached_task, store_piece
from tasks.corpus import read_texts
from tasks.loading import ModelReference, loaded
from tasks.measure import Cost, Meter
from tasks.progress import piece_progress

if TYPE_CHECKING:
    import pyarrow

    from memit.evaluation.counterfact import ScoredPrompt

DECIMALS = 6
"""Places after the point in ``metrics.json``."""


class ScoredPiece(BaseModel):
    """The scores of consecutive prompts (Parquet)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: Artifact
    cost: Cost


class MeasuredPerplexity(BaseModel):
    """Perplexity on held-out text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity: float
    cost: Cost


@cached_task(
    "evaluation",
    version=1,
    code=("memit.evaluation.continuations", "memit.evaluation.counterfact", "memit.forward"),
)
def score_piece(
    prompts: Sequence[ScoredPrompt],
    model: ModelReference,
    edit: Artifact | None,
    token_budget: int,
) -> ScoredPiece:
    """Score some prompts against both objects, on the unedited model or with a delta in it."""
    import pyarrow.parquet as parquet

    from memit.evaluation.counterfact import score_prompts

    with loaded(model, edit) as lm, Meter() as meter, piece_progress("evaluation") as progress:
        table = score_prompts(lm, prompts, token_budget=token_budget, progress=progress)
    piece = store_piece("evaluation", ".parquet", lambda path: parquet.write_table(table, path))
    return ScoredPiece(table=piece, cost=meter.cost)


@cached_task("perplexity", version=1, code=("memit.evaluation.perplexity", "memit.forward"))
def measure_perplexity(
    held_out: Artifact, model: ModelReference, edit: Artifact | None, token_budget: int
) -> MeasuredPerplexity:
    """Perplexity of the unedited model, or with a delta in it, on text that nothing has seen."""
    from memit.evaluation.perplexity import perplexity

    documents = read_texts(held_out.checked())
    with loaded(model, edit) as lm, Meter() as meter:
        value = perplexity(lm, documents, token_budget=token_budget)
    return MeasuredPerplexity(perplexity=value, cost=meter.cost)


def read_table(pieces: Sequence[ScoredPiece]) -> pyarrow.Table:
    """The rows of all pieces, in order."""
    import pyarrow
    import pyarrow.parquet as parquet

    return pyarrow.concat_tables([parquet.read_table(piece.table.checked()) for piece in pieces])


def make_metrics(
    before: pyarrow.Table,
    after: pyarrow.Table,
    perplexities: tuple[float, float] | None,
    edit: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of ``metrics.json``: what was measured, and nothing that a repetition changes."""
    from memit.evaluation.counterfact import SCORE_OF, record_means, summarise
    from memit.evaluation.intervals import bootstrap_intervals

    def measured(table: pyarrow.Table, state: int) -> dict[str, float]:
        means = {name: of for name, of in record_means(table).items() if name in SCORE_OF}
        intervals = bootstrap_intervals(means, harmonic={"score": SCORE_OF}, seed=0)
        text = {} if perplexities is None else {"perplexity": perplexities[state]}
        values = {**summarise(table), **intervals, **text}
        return {name: _rounded(value) for name, value in values.items()}

    described = ("count", "layers", "target_shift", "residual_left", "update_ratio")
    return {
        "before": measured(before, 0),
        "after": measured(after, 1),
        "edit": {name: edit[name] for name in described},
    }


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else round(value, DECIMALS)
