"""Spreading residuals over layers (Eqns. 17-20, Algorithm 1 lines 5-15)."""

import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from memit.errors import EditError, NumericsError, ResourceError
from memit.forward.probes import output_factor
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.layer_walk import COLUMNS_IN_MEMORY, HELD_IN_MEMORY, HeldStates, Walk
from memit.quadratic import Quadratic, directions, solve, solve_in_parts
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
    progress: Callable[[int], None] | None = None,
) -> Spread:
    """Compute Δ for each layer of S so that the model's output of block L approaches z (n × d), or
    that each down-projection's output changes as a z of its own says.

    `form` gives a layer's closed form when it is needed. Hidden states beyond `held_bytes` go to
    disk. Keys and residuals are read batch by batch where they and z take more than
    `COLUMNS_IN_MEMORY`. The model keeps its own weights.

    Raises:
        EditError: keys or residuals of some edits are not finite, or their share alone makes an
            update larger than `hyperparameters.largest_update`.
        NumericsError: a layer's form is not positive definite, the model's dtype cannot hold the
            edited weights, or the residual has grown.
        ResourceError: the device's memory does not hold one edit.
    """
    edits = edit_rows(lm, requests, prefixes)
    # K is f × n, and z, h and R are d × n, in float64.
    whole = 8 * len(edits) * (lm.inner_width + 3 * lm.width) <= COLUMNS_IN_MEMORY
    base = {layer: lm.weight(layer).clone() for layer in hyperparameters.layers}
    while True:
        try:
            with tempfile.TemporaryDirectory() as directory:
                held = HeldStates(held_bytes, Path(directory))
                walk = Walk(lm, edits, hyperparameters.layers[-1], token_budget, held)
                return _walk_layers(walk, requests, z, form, hyperparameters, whole, progress)
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


@dataclass(frozen=True)
class _Columns:
    """Keys and residuals of some edits at a layer, in float64."""

    edits: Tensor
    """Indices of the edits (b)."""
    K: Tensor
    """Averaged keys (f × b)."""
    lacking: Tensor
    """z_i − h_i, or the changes of the layer's own output that are wanted (d × b)."""
    R: Tensor
    """The part of it that is this layer's (d × b)."""


def _columns(
    walk: Walk, z: Goal, hyperparameters: Hyperparameters, whole: bool
) -> Iterator[_Columns]:
    """Keys and residuals at the walk's block: of all edits at once, or batch by batch."""
    layer, layers = walk.block, hyperparameters.layers
    factor = (isinstance(z, Tensor) and output_factor(walk.lm, layer)) or 1.0
    for edits, K, hidden in walk.read(hyperparameters.key_average, whole=whole):
        if isinstance(z, Tensor):
            # r_i = (z_i − h_i) / (number of edited layers from this one on)    (Eqn. 20)
            lacking = z[edits].to(K.device).T.double() - hidden
            R = lacking / (len(layers) - layers.index(layer))
            R /= factor  # the block multiplies what W_out gives
        else:
            R = lacking = z[layer][edits].T.to(K.device).double()
        yield _Columns(edits, K, lacking, R)


def _walk_layers(
    walk: Walk,
    requests: Sequence[EditRequest],
    z: Goal,
    form: Callable[[int], Quadratic],
    hyperparameters: Hyperparameters,
    whole: bool,
    progress: Callable[[int], None] | None,
) -> Spread:
    """Algorithm 1, lines 5-15; leaves the updates in the model's weights."""
    lm = walk.lm
    digests = base_digests(lm, map(lm.weight_name, hyperparameters.layers))
    residuals: dict[int, float] = {}
    left: dict[int, float] = {}
    ratios: dict[int, float] = {}
    ranks: dict[int, int] = {}
    changes: dict[str, LowRank | Dense] = {}
    count = len(requests)
    for layer in hyperparameters.layers:
        # K at this layer and h at L, with the updates of all lower layers in the weights.
        walk.advance(layer)
        read = partial(_columns, walk, z, hyperparameters, whole)
        held = list(read()) if whole else None  # else each look reads them again
        lacking = torch.empty(count, dtype=torch.float64)
        columns = _checked(held or read(), requests, layer, lacking)
        quadratic = form(layer)
        if quadratic.basis is not None:
            ranks[layer] = quadratic.basis.shape[1]
        if whole:
            change = solve(*next(columns), quadratic, f"layer {layer}")
        else:
            change = solve_in_parts(columns, quadratic, f"layer {layer}")
        residuals[layer] = float(lacking.mean())
        changes[lm.weight_name(layer)] = change.transposed() if lm.is_transposed(layer) else change
        # W + Δ in float32, rounded once to the model's dtype.
        master = lm.weight(layer).float()
        dense = change.dense().to(master.device)
        size = float(master.norm())
        ratios[layer] = float(dense.norm()) / size
        if not ratios[layer] <= hyperparameters.largest_update:  # true for NaN, too
            limit = hyperparameters.largest_update
            raise _too_large(held, quadratic, requests, layer, ratios[layer], size, limit)
        if not isinstance(z, Tensor):
            missed = (
                (part.edits, part.R - dense.to(part.K.device).double() @ part.K)
                for part in held or read()
            )
            left[layer] = _mean_size(missed, count)
        check_rounded(master + dense, lm.dtype, f"layer {layer}")
        lm.set_weight(layer, master + dense)
        if progress is not None:
            progress(1)
    before = residuals[hyperparameters.layers[0]]
    if isinstance(z, Tensor):
        reached = walk.read_hidden()
        missed = ((edits, z[edits].to(h.device).T.double() - h) for edits, h in reached)
        after = _mean_size(missed, count)
    else:  # a layer's keys depend on lower layers alone, so that what is left there stays
        before, after = fmean(residuals.values()), fmean(left.values())
    _check_fallen(before, after)
    delta, share = WeightDelta(changes, {"base": digests}), after / max(before, 1e-12)
    return Spread(delta, residuals, ratios, after, share, ranks)


def _checked(
    columns: Iterable[_Columns], requests: Sequence[EditRequest], layer: int, lacking: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """K and R of columns that are finite; writes how much each edit lacks (n). Raises `EditError`
    for edits whose key or residual is not finite."""
    for part in columns:
        lacking[part.edits] = part.lacking.norm(dim=0).cpu()
        finite = part.K.isfinite().all(0).cpu() & part.R.isfinite().all(0).cpu()
        broken = part.edits[~finite].tolist()
        if broken:
            raise EditError(
                f"key or residual of {_named(requests, broken)} at layer {layer} is not finite: "
                "run the model in float32 or bfloat16.",
                broken,
            )
        yield part.K, part.R


def _mean_size(columns: Iterable[tuple[Tensor, Tensor]], count: int) -> float:
    """Mean norm of the columns of `count` edits, given with the indices of their edits."""
    sizes = torch.empty(count, dtype=torch.float64)
    for edits, part in columns:
        sizes[edits] = part.norm(dim=0).cpu()
    return float(sizes.mean())


def _check_fallen(before: float, left: float) -> None:
    """Raise `NumericsError` for an edit after which targets are further away (mean ‖z − h‖)."""
    if not left <= before:  # true for NaN, too
        raise NumericsError(
            f"the edit moves the hidden states away from their targets (mean distance {before:.3g} "
            f"before it, {left:.3g} after it), so it is not kept: raise edit.covariance_weight, or "
            "name other layers in edit.layers."
        )


def _too_large(
    held: Sequence[_Columns] | None,
    quadratic: Quadratic,
    requests: Sequence[EditRequest],
    layer: int,
    ratio: float,
    size: float,
    limit: float,
) -> NumericsError:
    """The error for an update above the limit. It names the edits whose own terms exceed the limit,
    or else the edit with the largest term, if their keys and residuals are held."""
    way_out = (
        f"raise edit.covariance_weight ({quadratic.covariance_weight:g}), collect statistics over "
        f"more text, or raise edit.largest_update ({limit:g})."
    )
    if not math.isfinite(ratio):
        return NumericsError(f"the update of layer {layer} is not finite: {way_out}")
    if not held:
        return NumericsError(
            f"the update of layer {layer} is {ratio:.3g} times as large as its weights: {way_out}"
        )
    # Δ = Σ r_i a_iᵀ (where B is 0), and edit i's term has the norm ‖r_i‖ ‖a_i‖.
    K, R = held[0].K, held[0].R
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
