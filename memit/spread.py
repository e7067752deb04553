"""Spreading residuals over layers (Eqns. 17-20, Algorithm 1 lines 5-15).

The layers are walked once. Every row's hidden states in front of the present layer are held, so
that a layer costs one run of its block before the update (for the keys), one after it, and for the
plain rows the blocks between it and L; never a forward pass from the start.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from memit.batches import planned
from memit.errors import ResourceError
from memit.forward import Padded, block_output, pad, reading_keys
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel, tensor_digest
from memit.requests import EditRequest
from memit.second_moment import SecondMoment, cholesky
from memit.targets import EditRows, edit_rows
from memit.weight_delta import Dense, LowRank, WeightDelta, base_digests

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
    held_bytes: int = 1 << 32,
    factors: Path | None = None,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Spread:
    """Compute Δ for each layer of `hp.layers` so that the model reaches z (n × d) at layer L.

    `moments` may read its values on demand. Hidden states beyond `held_bytes` wait on disk;
    `factors` is a directory where Cholesky factors of C are kept for other runs; `observe` is
    handed each layer's K (f × n) and R (d × n). The model is given back with its own weights.
    Raises `NumericsError` for a second moment that is not positive definite.
    """
    edits = edit_rows(lm, requests, prefixes)
    base = {layer: lm.weight(layer).clone() for layer in hp.layers}
    while True:
        try:
            with tempfile.TemporaryDirectory() as directory:
                held = _Held(held_bytes, Path(directory))
                walk = _Walk(lm, _row_batches(lm, edits, token_budget), hp.layers[-1], held)
                return _walk_layers(walk, z, moments, hp, factors, observe, progress)
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
    walk: _Walk,
    z: Tensor,
    moments: Mapping[int, SecondMoment],
    hp: Hyperparameters,
    factors: Path | None,
    observe: Callable[[int, Tensor, Tensor], None] | None,
    progress: Callable[[int], None] | None,
) -> Spread:
    """Algorithm 1, lines 5-15; leaves the updates in the model's weights."""
    lm = walk.lm
    digests = base_digests(lm, map(lm.weight_name, hp.layers))
    target = z.to(lm.device).T.double()
    residuals: dict[int, float] = {}
    ratios: dict[int, float] = {}
    changes: dict[str, LowRank | Dense] = {}
    for done, layer in enumerate(hp.layers):
        walk.advance(layer)
        K, hidden = walk.read(hp.key_average)
        residuals[layer] = _mean_norm(target - hidden)
        R = (target - hidden) / (len(hp.layers) - done)
        if observe is not None:
            observe(layer, K, R)
        change = solve(K, R, moments[layer], hp.covariance_weight, f"layer {layer}", factors)
        changes[lm.weight_name(layer)] = change.transposed() if lm.is_transposed(layer) else change
        master = lm.weight(layer).float()
        delta = change.dense().to(master.device)
        ratios[layer] = float(delta.norm() / master.norm())
        lm.set_weight(layer, master + delta)
        if progress is not None:
            progress(1)
    left = _mean_norm(target - walk.read_hidden())
    return Spread(WeightDelta(changes, {"base": digests}), residuals, ratios, left)


def _mean_norm(columns: Tensor) -> float:
    return float(columns.norm(dim=0).mean())


# --- the closed form --------------------------------------------------------------------------


def solve(
    K: Tensor,
    R: Tensor,
    moment: SecondMoment,
    covariance_weight: float,
    where: str,
    factors: Path | None = None,
) -> LowRank | Dense:
    """Δ = R Kᵀ (λC + K Kᵀ)⁻¹ in float64, for keys K (f × n) and residuals R (d × n).

    The cheapest of three forms, all by Cholesky: while factors are smaller than Δ, Woodbury with
    the factor of λC (n right-hand sides); else with that of λC + K Kᵀ, for K (n ≤ d) or for K Rᵀ
    (n > d).
    """
    K, R = K.double(), R.double().to(K.device)
    (f, n), d = K.shape, R.shape[0]
    if n * (d + f) < d * f:
        A = _woodbury(K, moment, covariance_weight, where, factors)
        return LowRank(R.float().cpu(), A.float().cpu())
    M = moment.mean.to(K.device).mul_(covariance_weight).addmm_(K, K.T)
    L = cholesky(M, where)
    if n <= d:
        return Dense((R @ torch.cholesky_solve(K, L).T).float().cpu())
    return Dense(torch.cholesky_solve(K @ R.T, L).T.float().contiguous().cpu())


def _woodbury(
    K: Tensor, moment: SecondMoment, covariance_weight: float, where: str, factors: Path | None
) -> Tensor:
    """(λC + K Kᵀ)⁻¹ K = (λC)⁻¹ K (I + Kᵀ (λC)⁻¹ K)⁻¹ (f × n)."""
    L = _factor(moment, where, factors, K.device).mul_(math.sqrt(covariance_weight))
    half = torch.linalg.solve_triangular(L, K, upper=False)
    small = half.T @ half
    small.diagonal().add_(1.0)
    inner = torch.cholesky_solve(half.T, torch.linalg.cholesky(small)).T
    return torch.linalg.solve_triangular(L.T, inner, upper=True)


def _factor(moment: SecondMoment, where: str, factors: Path | None, device: torch.device) -> Tensor:
    """Lower Cholesky factor of C, from the directory of factors if it is there."""
    if factors is None:
        return cholesky(moment.mean.to(device), where)
    path = factors / f"{tensor_digest(moment.sum)}-{moment.count}.safetensors"
    if path.exists():
        return load_file(path)["L"].to(device)
    L = cholesky(moment.mean.to(device), where)
    factors.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({"L": L.cpu().contiguous()}, partial)
    partial.replace(path)
    return L


# --- the walk --------------------------------------------------------------------------------


class _Held:
    """Hidden states of batches between layers: in memory up to a limit, the rest on disk."""

    def __init__(self, limit: int, directory: Path):
        self.limit = limit
        self.directory = directory
        self.in_memory: dict[int, Tensor] = {}

    def put(self, index: int, hidden: Tensor) -> None:
        hidden = hidden.cpu()
        self.in_memory.pop(index, None)
        used = sum(part.nbytes for part in self.in_memory.values())
        if used + hidden.nbytes <= self.limit:
            self.in_memory[index] = hidden
        else:
            save_file({"hidden": hidden.contiguous()}, self.directory / str(index))

    def get(self, index: int) -> Tensor:
        if index in self.in_memory:
            return self.in_memory[index]
        return load_file(self.directory / str(index))["hidden"]


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch of edits, each cut after the subject's last token."""

    edits: Tensor
    """Which edits these are (b)."""
    padded: Padded
    """b plain rows, then the prefixed rows edit by edit."""
    last: Tensor
    """Position of the subject's last token (rows)."""

    @property
    def plain(self) -> slice:
        """The plain rows."""
        return slice(0, len(self.edits))


class _Walk:
    """Holds what enters the present block for every row of every edit."""

    def __init__(self, lm: LanguageModel, batches: Sequence[_Rows], top: int, held: _Held):
        self.lm = lm
        self.batches = batches
        self.top = top
        """L, where the residual is measured."""
        self.held = held
        self.block = 0
        """The block that the held states enter; for block 0 that is the tokens themselves."""

    def _states(self, index: int) -> Tensor | None:
        return None if self.block == 0 else self.held.get(index).to(self.lm.device)

    def _run(self, index: int, stop: int) -> Tensor:
        """Output of block `stop` for a batch (rows × tokens × d)."""
        padded, hidden = self.batches[index].padded, self._states(index)
        return block_output(self.lm, padded, stop, start=self.block, hidden=hidden)

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Go on to the input of `block`, through the blocks as they now are."""
        if block == self.block:
            return
        for index in range(len(self.batches)):
            self.held.put(index, self._run(index, block - 1))
        self.block = block

    @torch.no_grad()
    def read(self, key_average: str) -> tuple[Tensor, Tensor]:
        """Averaged keys of the present block (f × n), and h_i at block L (d × n), float64."""
        keys, hidden = [], []
        for index, rows in enumerate(self.batches):
            with reading_keys(self.lm, [self.block]) as found:
                output = self._run(index, self.block)
            at_subject = _flat_places(rows).to(found[self.block].device)
            keys.append(_averaged(found[self.block][at_subject], len(rows.edits), key_average))
            hidden.append(self._hidden(rows, output))
        return self._in_order(keys), self._in_order(hidden)

    @torch.no_grad()
    def read_hidden(self) -> Tensor:
        """h_i at block L (d × n, float64)."""
        outputs = (self._run(index, self.block) for index in range(len(self.batches)))
        pairs = zip(self.batches, outputs, strict=True)
        return self._in_order([self._hidden(rows, output) for rows, output in pairs])

    def _hidden(self, rows: _Rows, output: Tensor) -> Tensor:
        """h_i of a batch (b × d) from the present block's output, by its plain rows alone."""
        last, padded, top = rows.last[rows.plain], rows.padded[rows.plain], output[rows.plain]
        length = int(last.max()) + 1
        padded, top = Padded(padded.ids[:, :length], padded.mask[:, :length]), top[:, :length]
        if self.block < self.top:
            top = block_output(self.lm, padded, self.top, start=self.block + 1, hidden=top)
        return top[torch.arange(len(last), device=top.device), last.to(top.device)]

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Columns in the order of the requests (width × n, float64)."""
        edits = torch.cat([rows.edits for rows in self.batches])
        whole = torch.cat([part.to(self.lm.device) for part in parts]).double()
        return whole[edits.argsort().to(whole.device)].T


def _flat_places(rows: _Rows) -> Tensor:
    count, length = rows.padded.ids.shape
    return torch.arange(count, device=rows.last.device) * length + rows.last


def _averaged(keys: Tensor, count: int, key_average: str) -> Tensor:
    """One key an edit (count × f) from those of its rows: plain ones first, then the prefixed."""
    plain = keys[:count].float()
    prefixed = keys[count:].float().reshape(count, -1, keys.shape[1])
    if prefixed.shape[1] == 0:
        return plain
    if key_average == "uniform":
        return torch.cat([plain[:, None], prefixed], dim=1).mean(1)
    return (plain + prefixed.mean(1)) / 2


def _row_batches(lm: LanguageModel, edits: Sequence[EditRows], token_budget: int) -> list[_Rows]:
    order = sorted(range(len(edits)), key=lambda index: _shape(edits[index])[::-1])
    batches = planned(order, lambda index: _shape(edits[index]), token_budget)
    return [_rows(lm, edits, indices) for indices in batches]


def _shape(edit: EditRows) -> tuple[int, int]:
    rows = (edit.plain, *edit.prefixed)
    return len(rows), max(row.subject_last for row in rows) + 1


def _rows(lm: LanguageModel, edits: Sequence[EditRows], indices: Sequence[int]) -> _Rows:
    chosen = [edits[index] for index in indices]
    rows = [edit.plain for edit in chosen] + [row for edit in chosen for row in edit.prefixed]
    padded = pad([row.ids[: row.subject_last + 1] for row in rows], lm.device)
    last = torch.tensor([row.subject_last for row in rows], device=lm.device)
    return _Rows(torch.tensor(indices), padded, last)
