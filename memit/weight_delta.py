"""Changes of weights: low-rank factors where these are smaller, applied, reverted exactly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memit.errors import InputError, IntegrityError, NumericsError
from memit.files.reading import holding
from memit.files.tensors import load_tensors, save_tensors, tensor_digest
from memit.requests import Record

if TYPE_CHECKING:  # files of weights are edited without transformers, whose import takes seconds
    from memit.language_model import LanguageModel

MOST_NAMED = 100_000
"""Facts in a provenance: safetensors takes a header of 100 MB."""
ROUNDED = ("bfloat16", "float16")
"""Formats in which the rounded weights of a model are recognised."""


@dataclass(frozen=True)
class LowRank:
    """Δ = left · rightᵀ; for MEMIT on a d × f weight, left is R and right is (λC + K Kᵀ)⁻¹ K."""

    left: Tensor
    """One column for each edit (rows of the weight × n, float32)."""
    right: Tensor
    """One column for each edit (columns of the weight × n, float32)."""

    def dense(self) -> Tensor:
        """Δ (float32); multiplied in float64 so that the device hardly matters."""
        return (self.left.double() @ self.right.double().T).float()

    def transposed(self) -> LowRank:
        """The same change of the transposed weight."""
        return LowRank(self.right, self.left)

    def compact(self) -> LowRank | Dense:
        """The same on the CPU: the factors in float32, or Δ itself where it is smaller."""
        (d, n), f = self.left.shape, len(self.right)
        if n * (d + f) < d * f:
            return LowRank(self.left.float().cpu(), self.right.float().cpu())
        return Dense(self.dense().cpu())

    @staticmethod
    def concatenated(parts: Sequence[LowRank]) -> LowRank:
        """The sum of several changes: their columns side by side."""
        left = torch.cat([part.left for part in parts], 1)
        return LowRank(left, torch.cat([part.right for part in parts], 1))


@dataclass(frozen=True)
class Dense:
    """Δ itself, where factors would be larger or there are none."""

    delta: Tensor
    """Δ (float32)."""

    def dense(self) -> Tensor:
        """Δ (float32)."""
        return self.delta

    def transposed(self) -> Dense:
        """The same change of the transposed weight."""
        return Dense(self.delta.T.contiguous())


def _sum(one: LowRank | Dense, other: LowRank | Dense) -> LowRank | Dense:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return LowRank.concatenated([one, other]).compact()
    return Dense(one.dense() + other.dense())


@dataclass(frozen=True)
class WeightDelta:
    """What an edit adds to a model's weights, and its provenance."""

    changes: Mapping[str, LowRank | Dense]
    """Δ of each changed parameter, by its name in the model and in the model's orientation."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Method, model, revision, request digest, hyperparameters, and the `base` digests of the
    weights that it was made for."""

    def __repr__(self) -> str:
        origin, outcome = self.provenance, self.provenance.get("outcome")
        facts = f"{origin.get('count', '?')} facts"
        said = f", {outcome['said']} of them said" if outcome else ""
        where = f"{len(self.changes)} matrices of {origin.get('model')}"
        return f"WeightDelta({facts} in {where}{said})"

    def naming(self, records: Sequence[Record]) -> WeightDelta:
        """The same with the facts that are in it, and where they come from, in its provenance;
        unless there are more than a file's header holds."""
        if len(records) > MOST_NAMED:
            return self
        facts = [
            {"prompt": r.request.text, "target": r.request.target_new, **r.origin.given}
            for r in records
        ]
        return WeightDelta(self.changes, {**self.provenance, "facts": facts})

    def upon(self, earlier: WeightDelta) -> WeightDelta:
        """This change and the earlier one that it was made upon, as one change of the weights that
        the earlier one was made for."""
        told = {**self.provenance, "base": earlier.provenance["base"]}
        told["count"] = told["count"] + earlier.provenance["count"]
        facts = [*earlier.provenance.get("facts", ()), *told.pop("facts", ())]
        if told["count"] <= MOST_NAMED:
            told["facts"] = facts
        pairs = {name: (earlier.changes[name], change) for name, change in self.changes.items()}
        return WeightDelta({name: _sum(*pair) for name, pair in pairs.items()}, told)

    @torch.no_grad()
    def apply(self, lm: LanguageModel) -> None:
        """Add it to the weights: W + Δ in float32, rounded once to the model's dtype.

        Raises:
            IntegrityError: it was made for other weights; the model is unchanged.
            NumericsError: it is not finite; the model is unchanged.
        """
        for name in self.changes.keys() - dict(lm.model.named_parameters()).keys():
            raise IntegrityError(
                f"the delta changes {name}, which {lm.name} does not have; "
                f"it was made for {self.provenance.get('model')}."
            )
        weights = {name: lm.parameter(name) for name in self.changes}
        check_weights(self, weights.items(), lm.name)
        base = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        changed = {name: added(weight, self, name) for name, weight in weights.items()}
        for name in weights:
            lm.set_parameter(name, changed[name])
        lm.applied.append(AppliedEdit(self, base))

    def revert(self, lm: LanguageModel) -> None:
        """Restore the weights before it, to the bit.

        Raises:
            InputError: it is not the edit that was applied last.
        """
        if not lm.applied:
            raise InputError(f"no edit is applied to {lm.name}; there is nothing to revert.")
        last = lm.applied[-1]
        if last.delta.changes is not self.changes:
            raise InputError("another edit was applied later; revert that one first.")
        for name, weight in last.base.items():
            lm.set_parameter(name, weight)
        lm.applied.pop()

    def save(self, path: Path) -> None:
        """Write factors and provenance as safetensors; equal deltas give equal bytes.

        Raises:
            NumericsError: the change is not finite; nothing is written.
        """
        for name, change in self.changes.items():
            if not all(bool(part.isfinite().all()) for part in change.__dict__.values()):
                raise NumericsError(
                    f"the update of {name} is not finite, so nothing was written: lower the "
                    "editor's learning rate, or run the model in float32 or bfloat16."
                )
        tensors = {
            f"{name}:{part}": tensor
            for name, change in self.changes.items()
            for part, tensor in change.__dict__.items()
        }
        save_tensors(tensors, path, {"provenance": json.dumps(self.provenance, sort_keys=True)})

    @staticmethod
    def load(path: Path) -> WeightDelta:
        """Read a file of `save`.

        Raises:
            IntegrityError: the file is no such file, or damaged.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        with holding(path, "a weight delta", "make or fetch it again"):
            tensors, metadata = load_tensors(path)
            for key, tensor in tensors.items():
                name, part = key.split(":")
                parts.setdefault(name, {})[part] = tensor
            changes = {
                name: Dense(**found) if "delta" in found else LowRank(**found)
                for name, found in parts.items()
            }
            return WeightDelta(changes, json.loads(metadata["provenance"]))


@dataclass(frozen=True)
class AppliedEdit:
    """An edit that is in a model's weights, and the weights before it."""

    delta: WeightDelta
    base: Mapping[str, Tensor]
    """The parameters before (in the model's dtype, on the CPU)."""


def base_digests(lm: LanguageModel, names: Iterable[str]) -> dict[str, Any]:
    """The dtype and the digests of the weights that a delta is made for, and of the same weights in
    each of the narrower `ROUNDED`, in which models are often kept."""
    weights = {name: lm.parameter(name) for name in names}
    narrower = [kind for kind in ROUNDED if getattr(torch, kind).itemsize < lm.dtype.itemsize]
    return {
        "dtype": _name(lm.dtype),
        "sha256": {name: tensor_digest(weight) for name, weight in weights.items()},
        "rounded": {
            kind: {name: tensor_digest(w.to(getattr(torch, kind))) for name, w in weights.items()}
            for kind in narrower
        },
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_weights(delta: WeightDelta, weights: Iterable[tuple[str, Tensor]], where: object) -> None:
    """Check that the delta was made for these weights, rounded to the dtype that it was made in, or
    for weights of which these are the rounded ones.

    Raises:
        IntegrityError: it was made for others.
    """
    made_for = delta.provenance.get("base")
    if made_for is None:
        raise IntegrityError(
            "the delta does not name the weights it was made for; make it again with this version."
        )
    dtype = getattr(torch, made_for["dtype"])
    for name, weight in weights:
        rounded = made_for.get("rounded", {}).get(_name(weight.dtype), {}).get(name)
        if rounded is not None and tensor_digest(weight) == rounded:
            continue
        if tensor_digest(weight.to(dtype)) != made_for["sha256"].get(name):
            raise IntegrityError(
                f"the delta was made for other weights than those of {name} in {where} "
                f"(it names {delta.provenance.get('model')}); use the same model and revision, and "
                "revert later edits first."
            )


def added(weight: Tensor, delta: WeightDelta, name: str) -> Tensor:
    """W + Δ in float32.

    Raises:
        IntegrityError: the shapes differ.
        NumericsError: Δ, or W + Δ in the weight's dtype, is not finite.
    """
    change = delta.changes[name].dense().to(weight.device)
    if change.shape != weight.shape:
        raise IntegrityError(f"the delta of {name} has another shape than the weight.")
    if not bool(torch.isfinite(change).all()):
        raise NumericsError(f"the delta of {name} is not finite; nothing was changed.")
    changed = weight.float() + change
    check_rounded(changed, weight.dtype, name)
    return changed


def check_rounded(weight: Tensor, dtype: torch.dtype, where: str) -> None:
    """Raise `NumericsError` if a weight is not finite in `dtype`."""
    if not bool(weight.to(dtype).isfinite().all()):
        raise NumericsError(
            f"the edited weights of {where} are larger than {_name(dtype)} "
            "holds: use bfloat16 or float32."
        )
