"""Deltas of down-projections: kept as low-rank factors, applied, taken back exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from memit.errors import InputError, IntegrityError, NumericsError
from memit.language_model import LanguageModel, tensor_digest


@dataclass(frozen=True)
class LowRank:
    """Δ = R Aᵀ."""

    R: Tensor
    """Residuals (d × n, float32)."""
    A: Tensor
    """(λC + K Kᵀ)⁻¹ K (f × n, float32)."""

    def dense(self) -> Tensor:
        """Δ (d × f, float32); multiplied in float64 so that the device hardly matters."""
        return (self.R.double() @ self.A.double().T).float()


@dataclass(frozen=True)
class Dense:
    """Δ itself, where factors would be larger."""

    delta: Tensor
    """Δ (d × f, float32)."""

    def dense(self) -> Tensor:
        """Δ (d × f, float32)."""
        return self.delta


@dataclass(frozen=True)
class WeightDelta:
    """What an edit adds to down-projections, and where that came from."""

    layers: Mapping[int, LowRank | Dense]
    """Δ of each edited layer."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Method, model, revision, request digest, hyperparameters, and the `base` digests of the
    weights that it was made for."""

    def save(self, path: Path) -> None:
        """Write factors and provenance as safetensors; equal deltas give equal bytes."""
        tensors = {
            f"layer.{layer}.{name}": part.cpu().contiguous()
            for layer, change in self.layers.items()
            for name, part in change.__dict__.items()
        }
        save_file(tensors, path, {"provenance": json.dumps(self.provenance, sort_keys=True)})

    @staticmethod
    def load(path: Path) -> WeightDelta:
        """Read what `save` wrote; raises `IntegrityError` for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                provenance = json.loads(file.metadata()["provenance"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return WeightDelta(_grouped(tensors), provenance)
        except Exception as error:
            raise IntegrityError(
                f"{path} does not hold a weight delta ({error}); make or fetch it again."
            ) from error


def _grouped(tensors: Mapping[str, Tensor]) -> dict[int, LowRank | Dense]:
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        _, layer, name = key.split(".")
        parts.setdefault(int(layer), {})[name] = tensor
    return {
        layer: Dense(**found) if "delta" in found else LowRank(**found)
        for layer, found in sorted(parts.items())
    }


def base_digests(lm: LanguageModel, layers: tuple[int, ...]) -> dict[str, Any]:
    """What a delta remembers of the weights it was made for: the dtype they were in, and their
    digests."""
    return {
        "dtype": str(lm.dtype).removeprefix("torch."),
        "sha256": {str(layer): lm.weight_digest(layer) for layer in layers},
    }


@dataclass(frozen=True)
class AppliedDelta:
    """A delta that stands in a model's weights, and what stood there before."""

    delta: WeightDelta
    """What was applied."""
    base: Mapping[int, Tensor]
    """The weights before (d × f, in the model's dtype, on the CPU)."""
    digests: Mapping[int, str]
    """Their digests."""


def check_base(lm: LanguageModel, delta: WeightDelta) -> None:
    """Raise `IntegrityError` unless the delta was made for the weights that stand in `lm` now.

    Weights in another dtype are compared after rounding them to the one that the delta was made in.
    """
    made_for = delta.provenance.get("base")
    if made_for is None:
        raise IntegrityError(
            "the delta does not say which weights it was made for; make it again with this version."
        )
    dtype = getattr(torch, made_for["dtype"])
    for layer in delta.layers:
        if not 0 <= layer < lm.depth:
            raise IntegrityError(
                f"the delta edits layer {layer}, which {lm.name} does not have; "
                f"it was made for {delta.provenance.get('model')}."
            )
        if lm.weight_digest(layer, dtype) != made_for["sha256"].get(str(layer)):
            raise IntegrityError(
                f"the delta was made for other weights than those of layer {layer} in {lm.name} "
                f"(it names {delta.provenance.get('model')}); use the same model and revision, and "
                "revert later edits first."
            )


@torch.no_grad()
def apply(lm: LanguageModel, delta: WeightDelta) -> None:
    """Add a delta to the weights: W + Δ in float32, rounded once to the model's dtype.

    Raises `IntegrityError` if it was made for other weights, `NumericsError` if it is not finite;
    the model is left as it was then.
    """
    check_base(lm, delta)
    base = {layer: lm.weight(layer).cpu().clone() for layer in delta.layers}
    changed = {layer: _added(lm.weight(layer), delta, layer) for layer in delta.layers}
    for layer, weight in changed.items():
        lm.set_weight(layer, weight)
    digests = {layer: tensor_digest(weight) for layer, weight in base.items()}
    lm.applied.append(AppliedDelta(delta, base, digests))


def _added(weight: Tensor, delta: WeightDelta, layer: int) -> Tensor:
    change = delta.layers[layer].dense().to(weight.device)
    if change.shape != weight.shape:
        raise IntegrityError(f"the delta of layer {layer} has another shape than the weight.")
    if not bool(torch.isfinite(change).all()):
        raise NumericsError(f"the delta of layer {layer} is not finite; nothing was changed.")
    return weight.float() + change


def revert(lm: LanguageModel) -> WeightDelta:
    """Take the last applied delta back: the very bits that stood there before return.

    Raises `InputError` if nothing is applied, `IntegrityError` if what was kept is damaged.
    """
    if not lm.applied:
        raise InputError(f"no edit stands in {lm.name}; there is nothing to revert.")
    last = lm.applied[-1]
    for layer, weight in last.base.items():
        if tensor_digest(weight) != last.digests[layer]:
            raise IntegrityError(f"the kept weights of layer {layer} are damaged; load the model.")
    for layer, weight in last.base.items():
        lm.set_weight(layer, weight)
    lm.applied.pop()
    return last.delta
