"""Spreading residuals over layers (Eqns. 17-20, Algorithm 1 lines 5-15)."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from memit.errors import EditError, NumericsError, ResourceError
from memit.forward.probes import output_factor
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.layer_walk import HELD_IN_MEMORY, HeldStates, Walk
from memit.placement import solving_device
from memit.quadratic import Quadratic, directions, solve
from memit.requests import EditRequest
from memit.targets import edit_rows
from memit.weight_delta import Dense, LowRank, WeightDelta, base_digests, check_rounded

logger = logging.getLogger(__name__)

Goal = Tensor | Mapping[int, Tensor]
"""Targets of block L's output (n × d), or the changes of each down-projection's output (n × d)."""
MIN_TOKENS = 64
"""Below this budget a device that runs out of memory cannot be helped."""


@dataclass(frozen=True)
class Spread:
    """The result of spreading n residuals over several layers."""

    delta: WeightDelta
    """What to add to the weights."""
    residuals: Mapping[int, float]
    """Mean ‖z_i − h_i‖ before each layer's update, or mean size of the layer's own changes."""
    update_ratios: Mapping[int, float]
    """‖Δ‖ / ‖W‖ of each layer (Frobenius)."""
    residual_left: float
    """The same after the last update, or the mean of what is left at each layer."""
    share_left: float
    """What is left as a share of what it was before the first update."""
    ranks: Mapping[int, int]
    """Number of directions that each layer's Δ could use, where its form has a basis."""


def spread(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    z: Goal,
    form: Callable[[int], Quadratic],
    hyperparameters: Hyperparameters,
    *,
    token_budget: int,
    held_bytes: int = HELD_IN_MEMORY,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Spread:
    """Compute Δ for each layer of S so that the model's output of block L approaches z (n × d), or
    that each down-projection's output changes as a z of its own says.

    `form` gives a layer's closed form when it is needed. Hidden states beyond `held_bytes` go to
    disk; `observe` is called with each layer, its K (f × n) and its R (d × n). The model keeps its
    own weights.

    Raises:
        EditError: keys or residuals of some edits are not finite, or their share alone makes an
            update larger than `hyperparameters.largest_update`.
        NumericsError: a layer's form is not positive definite, the model's dtype cannot hold the
            edited weights, or the residual has grown.
        ResourceError: the device's memory does not hold one edit.
    """
    edits = edit_rows(lm, requests, prefixes)
    base = {layer: lm.weight(layer).clone() for layer in hyperparameters.layers}
    while True:
        try:
            with tempfile.TemporaryDirectory() as directory:
                held = HeldStates(held_bytes, Path(directory))
                walk = Walk(lm, edits, hyperparameters.layers[-1], token_budget, held)
                return _walk_layers(walk, requests, z, form, hyperparameters, observe, progress)
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
    z: Goal,
    form: Callable[[int], Quadratic],
    hyperparameters: Hyperparameters,
    observe: Callable[[int, Tensor, Tensor], None] | None,
    progress: Callable[[int], None] | None,
) -> Spread:
    """Algorithm 1, lines 5-15; leaves the updates in the model's weights."""
    lm = walk.lm
    digests = base_digests(lm, map(lm.weight_name, hyperparameters.layers))
    if isinstance(z, Tensor):
        z = z.to(solving_device(lm.device)).T.double()
    residuals: dict[int, float] = {}
    left: dict[int, float] = {}
    ratios: dict[int, float] = {}
    ranks: dict[int, int] = {}
    changes: dict[str, LowRank | Dense] = {}
    for done, layer in enumerate(hyperparameters.layers):
        # K at this layer and h at L, with the updates of all lower layers in the weights.
        walk.advance(layer)
        K, hidden = walk.read(hyperparameters.key_average)
        if isinstance(z, Tensor):
            # r_i = (z_i − h_i) / (number of edited layers from this one on)    (Eqn. 20)
            lacking = z - hidden
            R = lacking / (len(hyperparameters.layers) - done)
            R /= output_factor(lm, layer) or 1.0  # the block multiplies what W_out gives
        else:
            R = lacking = z[layer].T.to(K.device).double()
        residuals[layer] = float(lacking.norm(dim=0).mean())
        _check_columns(K, R, requests, layer)
        if observe is not None:
            observe(layer, K, R)
        quadratic = form(layer)
        if quadratic.basis is not None:
            ranks[layer] = quadratic.basis.shape[1]
        change = solve(K, R, quadratic, f"layer {layer}")
        changes[lm.weight_name(layer)] = change.transposed() if lm.is_transposed(layer) else change
        # W + Δ in float32, rounded once to the model's dtype.
        master = lm.weight(layer).float()
        delta = change.dense().to(master.device)
        size = float(master.norm())
        ratios[layer] = float(delta.norm()) / size
        if not ratios[layer] <= hyperparameters.largest_update:  # true for NaN, too
            limit = hyperparameters.largest_update
            raise _too_large(K, R, quadratic, requests, layer, ratios[layer], size, limit)
        if not isinstance(z, Tensor):
            left[layer] = float((R - delta.to(K.device).double() @ K).norm(dim=0).mean())
        check_rounded(master + delta, lm.dtype, f"layer {layer}")
        lm.set_weight(layer, master + delta)
        if progress is not None:
            progress(1)
    before = residuals[hyperparameters.layers[0]]
    if isinstance(z, Tensor):
        after = float((z - walk.read_hidden()).norm(dim=0).mean())
    else:  # a layer's keys depend on lower layers alone, so that what is left there stays
        before, after = fmean(residuals.values()), fmean(left.values())
    _check_fallen(before, after)
    whole, share = WeightDelta(changes, {"base": digests}), after / max(before, 1e-12)
    return Spread(whole, residuals, ratios, after, share, ranks)


def _check_columns(K: Tensor, R: Tensor, requests: Sequence[EditRequest], layer: int) -> None:
    """Raise `EditError` for edits whose key or residual is not finite."""
    broken = torch.nonzero(~(K.isfinite().all(0).cpu() & R.isfinite().all(0).cpu()))[:, 0].tolist()
    if broken:
        raise EditError(
            f"key or residual of {_named(requests, broken)} at layer {layer} is not finite: run "
            "the model in float32 or bfloat16.",
            broken,
        )


def _check_fallen(before: float, left: float) -> None:
    """Raise `NumericsError` for an edit after which targets are further away (mean ‖z − h‖)."""
    if not left <= before:  # true for NaN, too
        raise NumericsError(
            f"the edit moves the hidden states away from their targets (mean distance {before:.3g} "
            f"before it, {left:.3g} after it), so it is not kept: raise edit.covariance_weight, or "
            "name other layers in edit.layers."
        )


def _too_large(
    K: Tensor,
    R: Tensor,
    quadratic: Quadratic,
    requests: Sequence[EditRequest],
    layer: int,
    ratio: float,
    size: float,
    limit: float,
) -> NumericsError:
    """The error for an update above the limit. It names the edits whose own terms exceed the limit,
    or else the edit with the largest term."""
    way_out = (
        f"raise edit.covariance_weight ({quadratic.covariance_weight:g}), collect statistics over "
        f"more text, or raise edit.largest_update ({limit:g})."
    )
    if not math.isfinite(ratio):
        return NumericsError(f"the update of layer {layer} is not finite: {way_out}")
    # Δ = Σ r_i a_iᵀ (where B is 0), and edit i's term has the norm ‖r_i‖ ‖a_i‖.
    K, R = K.double(), R.double().to(K.device)
    A = directions(K, quadratic, f"layer {layer}")
    parts = R.norm(dim=0) * A.norm(dim=0) / size
    alone = torch.nonzero(parts > limit)[:, 0].tolist()
    edits = alone or [int(parts.argmax())]
    return EditError(
        f"the update of layer {layer} is {ratio:.3g} times as large as its weights, most of it for "
        f"{_named(requests, edits)}: {way_out}",
        edits,
    )


def _named(requests: Sequence[EditRequest], edits: Sequence[int]) -> str:
    more = f" and {len(edits) - 1} more" if len(edits) > 1 else ""
    return f"{requests[edits[0]].text!r}{more}"
