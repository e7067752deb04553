"""Spreading residuals over layers (Eqns. 17-20, Algorithm 1 lines 5-15)."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memit.costs import HELD_IN_MEMORY
from memit.errors import EditError, NumericsError, ResourceError
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.layer_walk import HeldStates, Walk
from memit.placement import solving_device
from memit.requests import EditRequest
from memit.second_moment import SecondMoment, cholesky
from memit.targets import edit_rows
from memit.weight_delta import Dense, LowRank, WeightDelta, base_digests, check_rounded

logger = logging.getLogger(__name__)

MIN_TOKENS = 64
"""Below this budget a device that runs out of memory cannot be helped."""


@dataclass(frozen=True)
class Spread:
    """The result of spreading n residuals over several layers."""

    delta: WeightDelta
    """What to add to the weights."""
    residuals: Mapping[int, float]
    """Mean ‖z_i − h_i‖ in front of each layer's update."""
    update_ratios: Mapping[int, float]
    """‖Δ‖ / ‖W‖ of each layer (Frobenius)."""
    residual_left: float
    """Mean ‖z_i − h_i‖ after the last update."""


def spread(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    z: Tensor,
    moments: Mapping[int, SecondMoment],
    hp: Hyperparameters,
    *,
    token_budget: int,
    held_bytes: int = HELD_IN_MEMORY,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Spread:
    """Compute Δ for each layer of `hp.layers` so that the model reaches z (n × d) at layer L.

    `moments` may read its values on demand. Hidden states beyond `held_bytes` wait on disk;
    `observe` is handed each layer's K (f × n) and R (d × n). The model is given back with its own
    weights.
    Raises `EditError` for edits whose keys or residuals are not finite or whose part in an update
    makes it larger than `hp.largest_update`, `NumericsError` for a second moment that is not
    positive definite and for weights that the model's dtype cannot hold.
    """
    edits = edit_rows(lm, requests, prefixes)
    base = {layer: lm.weight(layer).clone() for layer in hp.layers}
    while True:
        try:
            with tempfile.TemporaryDirectory() as directory:
                held = HeldStates(held_bytes, Path(directory))
                walk = Walk(lm, edits, hp.layers[-1], token_budget, held)
                return _walk_layers(walk, requests, z, moments, hp, observe, progress)
        except torch.OutOfMemoryError as error:
            if token_budget < MIN_TOKENS:
                raise ResourceError(
                    "the device's memory does not hold one edit's rows; use a smaller dtype or a "
                    "larger device."
                ) from error
            token_budget //= 2
            logger.warning("out of memory: starting over with %d tokens at a time", token_budget)
        finally:
            for layer, weight in base.items():
                lm.set_weight(layer, weight)


def _walk_layers(
    walk: Walk,
    requests: Sequence[EditRequest],
    z: Tensor,
    moments: Mapping[int, SecondMoment],
    hp: Hyperparameters,
    observe: Callable[[int, Tensor, Tensor], None] | None,
    progress: Callable[[int], None] | None,
) -> Spread:
    """Algorithm 1, lines 5-15; leaves the updates in the model's weights."""
    lm = walk.lm
    digests = base_digests(lm, map(lm.weight_name, hp.layers))
    target = z.to(solving_device(lm.device)).T.double()
    residuals: dict[int, float] = {}
    ratios: dict[int, float] = {}
    changes: dict[str, LowRank | Dense] = {}
    for done, layer in enumerate(hp.layers):
        walk.advance(layer)
        K, hidden = walk.read(hp.key_average)
        residuals[layer] = _mean_norm(target - hidden)
        R = (target - hidden) / (len(hp.layers) - done)
        _check_columns(K, R, requests, layer)
        if observe is not None:
            observe(layer, K, R)
        change = solve(K, R, moments[layer], hp.covariance_weight, f"layer {layer}")
        changes[lm.weight_name(layer)] = change.transposed() if lm.is_transposed(layer) else change
        master = lm.weight(layer).float()
        delta = change.dense().to(master.device)
        ratios[layer] = float(delta.norm() / master.norm())
        if not ratios[layer] <= hp.largest_update:
            size = float(master.norm())
            raise _too_large(K, R, moments[layer], requests, layer, ratios[layer], size, hp)
        check_rounded(master + delta, lm.dtype, f"layer {layer}")
        lm.set_weight(layer, master + delta)
        if progress is not None:
            progress(1)
    left = _mean_norm(target - walk.read_hidden())
    return Spread(WeightDelta(changes, {"base": digests}), residuals, ratios, left)


def _check_columns(K: Tensor, R: Tensor, requests: Sequence[EditRequest], layer: int) -> None:
    """Raise `EditError` for edits whose key or residual is not finite."""
    broken = torch.nonzero(~(K.isfinite().all(0).cpu() & R.isfinite().all(0).cpu()))[:, 0].tolist()
    if broken:
        raise EditError(
            f"what the model computes for {_named(requests, broken)} at layer {layer} is not "
            "finite: run it in float32 or bfloat16.",
            broken,
        )


def _too_large(
    K: Tensor,
    R: Tensor,
    moment: SecondMoment,
    requests: Sequence[EditRequest],
    layer: int,
    ratio: float,
    size: float,
    hp: Hyperparameters,
) -> NumericsError:
    """What to say of an update that exceeds the limit: it names the edits whose own part in it
    does so alone, or else the one with the largest part."""
    way_out = (
        f"raise edit.covariance_weight ({hp.covariance_weight:g}), collect statistics over more "
        f"text, or raise edit.largest_update ({hp.largest_update:g})."
    )
    if not math.isfinite(ratio):
        return NumericsError(f"the update of layer {layer} is not finite: {way_out}")
    K, R = K.double(), R.double().to(K.device)
    A = _woodbury(K, moment, hp.covariance_weight, f"layer {layer}")
    parts = R.norm(dim=0) * A.norm(dim=0) / size
    alone = torch.nonzero(parts > hp.largest_update)[:, 0].tolist()
    edits = alone or [int(parts.argmax())]
    return EditError(
        f"the update of layer {layer} is {ratio:.3g} times as large as its weights, most of it for "
        f"{_named(requests, edits)}: {way_out}",
        edits,
    )


def _named(requests: Sequence[EditRequest], edits: Sequence[int]) -> str:
    more = f" and {len(edits) - 1} more" if len(edits) > 1 else ""
    return f"{requests[edits[0]].text!r}{more}"


def _mean_norm(columns: Tensor) -> float:
    return float(columns.norm(dim=0).mean())


# --- the closed form --------------------------------------------------------------------------


def solve(
    K: Tensor,
    R: Tensor,
    moment: SecondMoment,
    covariance_weight: float,
    where: str,
) -> LowRank | Dense:
    """Δ = R Kᵀ (λC + K Kᵀ)⁻¹ in float64, for keys K (f × n) and residuals R (d × n).

    The cheapest of three forms, all by Cholesky: while factors are smaller than Δ, Woodbury with
    the factor of λC (n right-hand sides); else with that of λC + K Kᵀ, for K (n ≤ d) or for K Rᵀ
    (n > d).
    """
    K, R = K.double(), R.double().to(K.device)
    (f, n), d = K.shape, R.shape[0]
    if n * (d + f) < d * f:
        A = _woodbury(K, moment, covariance_weight, where)
        return LowRank(R.float().cpu(), A.float().cpu())
    M = moment.mean.to(K.device).mul_(covariance_weight).addmm_(K, K.T)
    L = cholesky(M, where)
    if n <= d:
        return Dense((R @ torch.cholesky_solve(K, L).T).float().cpu())
    return Dense(torch.cholesky_solve(K @ R.T, L).T.float().contiguous().cpu())


def _woodbury(K: Tensor, moment: SecondMoment, covariance_weight: float, where: str) -> Tensor:
    """(λC + K Kᵀ)⁻¹ K = (λC)⁻¹ K (I + Kᵀ (λC)⁻¹ K)⁻¹ (f × n)."""
    L = cholesky(moment.mean.to(K.device), where).mul_(math.sqrt(covariance_weight))
    half = torch.linalg.solve_triangular(L, K, upper=False)
    small = half.T @ half
    small.diagonal().add_(1.0)
    inner = torch.cholesky_solve(half.T, torch.linalg.cholesky(small)).T
    return torch.linalg.solve_triangular(L.T, inner, upper=True)
