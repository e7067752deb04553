"""What the machine can do, and the least that each step must do.

A floor is the larger of two times: counted floating-point operations over the measured rate of
matrix products, and bytes that must be moved over the measured rate of a copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.workload import Shape


@dataclass(frozen=True)
class Machine:
    """Measured rates."""

    flops: float
    """Floating-point operations a second in matrix products of the model's dtype."""
    flops64: float
    """The same in float64."""
    bytes: float
    """Bytes read plus bytes written a second."""


@dataclass(frozen=True)
class Work:
    """The least that a step must do."""

    flops: float = 0.0
    """Floating-point operations in the model's dtype."""
    flops64: float = 0.0
    """Floating-point operations in float64."""
    bytes: float = 0.0
    """Bytes read and written."""

    def seconds(self, machine: Machine) -> float:
        """The time below which the step cannot go on this machine."""
        arithmetic = self.flops / machine.flops + self.flops64 / machine.flops64
        return max(arithmetic, self.bytes / machine.bytes)


class Timing(NamedTuple):
    """How long something took."""

    seconds: float
    cpu_seconds: float
    """Of all threads of this process."""

    def times(self, factor: float) -> Timing:
        """That of so many times the work."""
        return Timing(factor * self.seconds, factor * self.cpu_seconds)


def timed(run: Callable[[], object], device: str) -> Timing:
    """Times of one run, device work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return Timing(time.perf_counter() - start, time.process_time() - cpu)


def median_time(
    run: Callable[[], object],
    device: str,
    repeats: int = 5,
    first: Callable[[], object] | None = None,
) -> Timing:
    """The run of median seconds among several, after one that is not counted, or after `first`."""
    (first or run)()
    return statistics.median_low(timed(run, device) for _ in range(repeats))


def measure_machine(device: str, dtype: torch.dtype) -> Machine:
    """Rates of a large matrix product and a large copy, on random data."""
    size = 8192 if device == "cuda" else 1536
    block = (1 << 30) if device == "cuda" else (1 << 27)

    def rate(kind: torch.dtype) -> float:
        side = size if kind != torch.float64 or device == "cpu" else size // 2
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        return 2 * side**3 / median_time(lambda: a @ b, device).seconds

    source = torch.randint(0, 255, (block,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * block / median_time(lambda: target.copy_(source), device).seconds
    return Machine(flops=rate(dtype), flops64=rate(torch.float64), bytes=copy)


def _attention_flops(shape: Shape, queries: float, keys: float) -> float:
    return 4 * shape.width * queries * keys


def targets_work(
    shape: Shape,
    edits: int,
    evaluations: int,
    *,
    row_tokens: tuple[int, int],
    prefix_tokens: int,
    rows: int,
    element: int,
    batches: int,
) -> Work:
    """Once all blocks for every row, its prefix for all edits together; then blocks above L forward
    and backward at the positions from the subject's last token on, of the last block only keys and
    values at those that the loss does not read, and the head where it does."""
    before, after = row_tokens
    above = shape.depth - 1 - shape.layers[-1]
    scored = rows * 2 + 1
    block, last = 2 * shape.block_parameters, 2 * shape.key_value_parameters
    tokens = edits * rows * (before + after) + (rows - 1) * prefix_tokens
    once = tokens * block * shape.depth
    positions = rows * after
    body = (above - 1) * positions * block + positions * last + scored * (block - last)
    body += above * _attention_flops(shape, positions, before + after + prefix_tokens)
    head = 2 * scored * shape.width * shape.vocabulary
    # The pass over all rows is the first evaluation, and the last one has no backward pass.
    flops = once + edits * (head + 2 * (evaluations - 1) * (body + head))
    weights = above * shape.block_parameters + shape.width * shape.vocabulary
    return Work(flops=flops, bytes=batches * evaluations * 2 * weights * element)


def spread_work(shape: Shape, edits: int, row_tokens: int, rows: int) -> Work:
    """The blocks up to L once for every row, twice for the edited ones, the plain rows' way to L
    from each, and the solve."""
    d, f, n = shape.width, shape.inner, edits
    layers, top = len(shape.layers), shape.layers[-1]
    runs = (top + 1) + layers
    plain = sum(top - layer for layer in shape.layers)
    block = 2 * shape.block_parameters
    flops = n * row_tokens * block * (rows * runs + plain)
    if n * (d + f) < d * f:
        solve = f**3 / 3 + 2 * f * f * n + n * n * f + n**3 / 3
    else:
        solve = f * f * n + f**3 / 3 + 2 * f * f * min(n, d) + 2 * d * f * n
    return Work(flops=flops, flops64=layers * solve)


def covariance_work(shape: Shape, tokens: int, layers: int, last: int, mean_length: float) -> Work:
    """The blocks up to the last layer, and half a product for each layer."""
    f = shape.inner
    body = (last + 1) * (
        tokens * 2 * shape.block_parameters + _attention_flops(shape, tokens, mean_length / 2)
    )
    return Work(flops=body + layers * tokens * f * f)


def evaluation_work(shape: Shape, prompts: int, tokens: int, object_tokens: int) -> Work:
    """All blocks for each prompt once and for all but the last token of both objects, and the head
    where an object's token is scored."""
    run = prompts * (tokens + 2 * (object_tokens - 1))
    head = prompts * (2 * object_tokens - 1)
    flops = run * 2 * shape.block_parameters * shape.depth
    return Work(flops=flops + head * 2 * shape.width * shape.vocabulary)


def generation_work(shape: Shape, tokens: int, steps: int, element: int) -> Work:
    """All blocks and the head for each token; the weights are read at each step."""
    weights = shape.block_parameters * shape.depth + shape.width * shape.vocabulary
    return Work(flops=2 * tokens * weights, bytes=steps * weights * element)
