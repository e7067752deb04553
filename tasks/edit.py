"""The step ``edit``: spread the targets over the layers and keep what that adds to the weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from memit.errors import EditError, IntegrityError
from memit.hyperparameters import Hyperparameters
from memit.requests import EditRequest, Record, read_counterfact
from tasks.engine.artifacts import Artifact, Value, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.cost import Cost, Meter
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import progress_bar

if TYPE_CHECKING:
    from memit.language_model import LanguageModel
    from memit.second_moment import SecondMoment
    from memit.spread import Spread
    from memit.targets import Targets
    from memit.weight_delta import WeightDelta

OnFailure = Literal["stop", "drop"]
"""What becomes of edits that cannot be written: the run stops, or goes on without them."""
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class Edit(Value):
    """An edit of all requests."""

    delta: Artifact
    """Low-rank factors of the updates, with their provenance (safetensors)."""
    weights: Artifact
    """The changed matrices, under their names in the model (safetensors)."""
    summary: Artifact
    """How large targets, residuals and updates are (JSON)."""
    cost: Cost


class StoredMoments(Mapping[int, "SecondMoment"]):
    """The second moments of the layers, each read when it is asked for."""

    def __init__(self, files: Mapping[int, Artifact], model_digest: str) -> None:
        self.files = files
        self.model_digest = model_digest

    def __getitem__(self, layer: int) -> SecondMoment:
        """Read one layer's sums, checked to be those of this model and layer."""
        from memit.second_moment import read_moment

        path = self.files[layer].checked()
        moment, provenance = read_moment(path)
        if (provenance.get("model"), provenance.get("layer")) != (self.model_digest, layer):
            raise IntegrityError(
                f"{path} holds statistics of another model or layer: run the step statistics again."
            )
        return moment

    def __iter__(self) -> Iterator[int]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


@cached_task("edit")
def spread_edit(
    model: ModelReference,
    records: Artifact,
    prefixes: Sequence[str],
    targets: Artifact,
    moments: Mapping[int, Artifact],
    hyperparameters: Hyperparameters,
    token_budget: int,
    on_failure: OnFailure = "stop",
) -> Edit:
    """Compute the update of every layer (Algorithm 1, lines 5-15).

    Raises:
        EditError: edits cannot be written, and ``on_failure`` is not to drop them.
        NumericsError: a layer's equations have no solution that can be stored.
    """
    from memit.spread import spread
    from memit.targets import Targets, check_targets

    chosen = read_counterfact(records.checked())
    goals = Targets.load(targets.checked())
    layers = hyperparameters.layers
    with loaded(model) as lm, Meter() as meter:

        def write(kept: Sequence[int]) -> Spread:
            requests = [chosen[place].request for place in kept]
            aims = goals.chosen(kept)
            check_targets(requests, aims)
            with progress_bar("edit", len(layers), "layers") as bar:
                return spread(
                    lm,
                    requests,
                    prefixes,
                    aims.z,
                    StoredMoments(moments, model.model.digest),
                    hyperparameters,
                    token_budget=token_budget,
                    progress=lambda done: bar.advance(0, done),
                )

        result, dropped = write_what_can_be(write, len(chosen), on_failure)
        kept = [place for place in range(len(chosen)) if place not in dropped]
        delta = _signed(result.delta, lm, [chosen[p].request for p in kept], hyperparameters)
        summary = _summarise(result, goals.chosen(kept), hyperparameters)
        summary["dropped"] = [_dropped(chosen[place], reason) for place, reason in dropped.items()]
    with loaded(model) as lm:
        weights = store_piece("edit", ".safetensors", lambda path: _save_changed(lm, delta, path))
    return Edit(
        delta=store_piece("edit", ".safetensors", delta.save),
        weights=weights,
        summary=store_piece("edit", ".json", lambda path: _save_json(summary, path)),
        cost=meter.cost,
    )


def write_what_can_be(
    write: Callable[[Sequence[int]], Result], count: int, on_failure: OnFailure
) -> tuple[Result, dict[int, str]]:
    """Write ``count`` edits, or those that can be; gives what ``write`` makes of these, and why
    each of the others was dropped.

    Raises:
        EditError: some cannot be written, and ``on_failure`` is "stop", or none can.
    """
    dropped: dict[int, str] = {}
    while True:
        kept = [place for place in range(count) if place not in dropped]
        try:
            return write(kept), dropped
        except EditError as error:
            if on_failure == "stop" or len(error.edits) == len(kept):
                raise
            logger.warning("%s %d edits are dropped.", error, len(error.edits))
            dropped |= {kept[place]: str(error) for place in error.edits}


def _dropped(record: Record, reason: str) -> dict[str, Any]:
    return {"case_id": record.case_id, "prompt": record.request.text, "reason": reason}


def _signed(
    delta: WeightDelta,
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    hyperparameters: Hyperparameters,
) -> WeightDelta:
    """The delta with where it came from written inside."""
    from memit.editors.base import provenance
    from memit.editors.memit import Memit
    from memit.weight_delta import WeightDelta

    origin = provenance(Memit(hyperparameters), lm, requests)
    return WeightDelta(delta.changes, {**origin, **delta.provenance})


def _summarise(
    result: Spread, targets: Targets, hyperparameters: Hyperparameters
) -> dict[str, Any]:
    """What ``edit.json`` says; norms are Frobenius norms."""
    return {
        "count": len(targets.z),
        "layers": list(hyperparameters.layers),
        "target_shift": round(float(targets.delta_ratios.mean()), 6),
        "residuals": {str(layer): round(norm, 6) for layer, norm in result.residuals.items()},
        "residual_left": round(result.residual_left, 6),
        "update_ratio": {str(layer): round(r, 6) for layer, r in result.update_ratios.items()},
        "hyperparameters": asdict(hyperparameters),
    }


def _save_changed(lm: LanguageModel, delta: WeightDelta, path: Path) -> None:
    """Write W + Δ of each changed parameter as it stands in a checkpoint of the model."""
    from safetensors.torch import save_file

    delta.apply(lm)
    try:
        matrices = {name: lm.parameter(name).cpu().contiguous() for name in delta.changes}
        save_file(matrices, path, {"format": "pt"})
    finally:
        delta.revert(lm)


def _save_json(content: object, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
