"""The step ``edit``: spread the targets over the layers and keep what that adds to the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from memit.errors import IntegrityError, NumericsError
from memit.hyperparameters import Hyperparameters
from memit.requests import EditRequest, Record, read_counterfact
from tasks.artifacts import Artifact, cached_task, store_piece
from tasks.loading import ModelReference, loaded
from tasks.measure import Cost, Meter
from tasks.progress import progress_bar

if TYPE_CHECKING:
    from memit.language_model import LanguageModel
    from memit.second_moment import SecondMoment
    from memit.spread import Spread
    from memit.targets import Targets
    from memit.weight_delta import WeightDelta


class Edit(BaseModel):
    """An edit of all requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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


@cached_task(
    "edit",
    version=1,
    code=(
        "memit.forward",
        "memit.positions",
        "memit.second_moment",
        "memit.spread",
        "memit.weight_delta",
    ),
)
def spread_edit(
    model: ModelReference,
    records: Artifact,
    prefixes: Sequence[str],
    targets: Artifact,
    moments: Mapping[int, Artifact],
    hyperparameters: Hyperparameters,
    token_budget: int,
) -> Edit:
    """Compute the update of every layer (Algorithm 1, lines 5-15)."""
    from memit.spread import spread
    from memit.targets import Targets

    chosen = read_counterfact(records.checked())
    requests = [record.request for record in chosen]
    goals = Targets.load(targets.checked())
    _check_finite(chosen, goals)
    layers = hyperparameters.layers
    with (
        loaded(model) as lm,
        Meter() as meter,
        progress_bar("edit", len(layers), "layers") as bar,
    ):
        result = spread(
            lm,
            requests,
            prefixes,
            goals.z,
            StoredMoments(moments, model.model.digest),
            hyperparameters,
            token_budget=token_budget,
            progress=lambda done: bar.advance(0, done),
        )
        delta = _signed(result.delta, lm, requests, hyperparameters)
        summary = _summarise(result, goals, hyperparameters)
    with loaded(model) as lm:
        weights = store_piece("edit", ".safetensors", lambda path: _save_changed(lm, delta, path))
    return Edit(
        delta=store_piece("edit", ".safetensors", delta.save),
        weights=weights,
        summary=store_piece("edit", ".json", lambda path: _save_json(summary, path)),
        cost=meter.cost,
    )


def _check_finite(records: Sequence[Record], targets: Targets) -> None:
    lost = [record for record, finite in zip(records, targets.finite, strict=True) if not finite]
    if lost:
        raise NumericsError(
            f"the target of record {lost[0].case_id} ({lost[0].request.text!r}) is not finite"
            + (f", and those of {len(lost) - 1} more" if len(lost) > 1 else "")
            + ": lower targets.learning_rate, or run the model in float32 or bfloat16."
        )


def _signed(
    delta: WeightDelta,
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    hyperparameters: Hyperparameters,
) -> WeightDelta:
    """The delta with where it came from written inside."""
    from memit.editors import Memit
    from memit.editors.base import provenance
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
