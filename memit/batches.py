"""Batches under a token budget, which is halved when the device runs out of memory."""

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TypeVar

import torch

from memit.errors import ResourceError
from memit.model_shape import ModelShape
from memit.placement import WEIGHT_SHARE

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

CPU_TOKENS = 1024
"""More tokens at a time make a CPU slower, since they leave its caches."""
CPU_TOKENS_OF_EDITS = 4096
"""The same for targets and their spread, whose rows are short."""
CPU_BYTES_OF_EDITS = 1 << 30
"""Memory that these may take on a CPU, unless the weights take more. Larger batches are no faster
where an edit's rows alone fill matrix products, and have more padding."""
GPU_TOKENS = 131_072
"""More tokens at a time do not make a GPU faster."""
MEMORY_SHARE = 0.6
"""Part of the free memory that batches may fill; the rest is for fragmentation and results."""
_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


def auto_token_budget(
    model: ModelShape, size: int, device: str, *, trained_blocks: int | None = None
) -> int:
    """Padded tokens at a time, a power of two: on a GPU what its free memory holds, on a CPU what
    was measured to be fastest, or less for edits of large models, whose activations are kept for
    the backward pass. It is the same before and after the model is loaded.

    `size` is the bytes of a number, `device` what `load_model` takes, and `trained_blocks` how many
    blocks keep activations for a backward pass of an edit; None where nothing is edited.
    """
    cards = _cards(device)
    if not cards and trained_blocks is None:
        return CPU_TOKENS
    weights = size * model.parameters
    if cards:
        most, room = GPU_TOKENS, min(_measured_room(card) for card in cards)
        # Weights that are sharded leave the rest of the room free.
        room = MEMORY_SHARE * (room - min(weights, int(WEIGHT_SHARE * room)))
    else:
        most, room = CPU_TOKENS_OF_EDITS, max(CPU_BYTES_OF_EDITS, weights)
    wide = 6 * model.width + 2 * model.inner_width
    per_token = size * (4 * wide + (2 * wide + 10 * model.width) * (trained_blocks or 0))
    tokens = max(256, min(most, int(room / per_token)))
    return 1 << (tokens.bit_length() - 1)


def _cards(device: str) -> Sequence[int]:
    """The GPUs that a model is put on."""
    if device in ("cpu", "mps") or not torch.cuda.is_available():
        return ()
    if device == "sharded":
        return range(torch.cuda.device_count())
    return (0 if device == "auto" else torch.device(device).index or 0,)


@cache
def _measured_room(card: int) -> int:
    """Bytes that this process has or can get, in eighths of the card, so that small differences do
    not change the budget; measured once, before workers of this process have taken their share."""
    free, total = torch.cuda.mem_get_info(card)
    return round(8 * (free + torch.cuda.memory_reserved(card)) / total) * total // 8


def run_in_batches(
    items: Sequence[Item],
    shape: Callable[[Item], tuple[int, int]],
    token_budget: int,
    run: Callable[[Sequence[Item]], Result],
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Run consecutive items together as long as rows × longest row stays within the budget.

    `shape` gives an item's rows and its longest row in tokens. When the device runs out of memory
    the budget is halved and the batch tried again; raises `ResourceError` when a single item does
    not fit.
    """
    start, budget = 0, token_budget
    while start < len(items):
        batch = items[start : _batch_end(items, shape, budget, start)]
        try:
            result = run(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise ResourceError(
                    "the device's memory does not hold one item; use a smaller dtype, a larger "
                    "device, or spread the model over several."
                ) from error
            shapes = [shape(item) for item in batch]
            used = sum(rows for rows, _ in shapes) * max(length for _, length in shapes)
            budget = max(1, used // 2)
        else:
            yield batch, result
            start += len(batch)
            continue
        # Outside the except clause, whose traceback keeps the failed batch's tensors alive.
        torch.cuda.empty_cache()
        logger.warning("out of memory: continuing with %d tokens at a time", budget)


def release_memory() -> None:
    """Return freed memory to the system, where the C library is glibc: its heap keeps whatever is
    below a block in use, and tensors of changing sizes make it grow with every batch."""
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


def split_into_batches(
    items: Sequence[Item], shape: Callable[[Item], tuple[int, int]], token_budget: int
) -> list[Sequence[Item]]:
    """The batches of consecutive items that `run_in_batches` makes while memory suffices."""
    return [part for part, _ in run_in_batches(items, shape, token_budget, lambda part: None)]


def _batch_end(
    items: Sequence[Item], shape: Callable[[Item], tuple[int, int]], budget: int, start: int
) -> int:
    rows, longest = shape(items[start])
    stop = start + 1
    while stop < len(items):
        more, length = shape(items[stop])
        rows, longest = rows + more, max(longest, length)
        if rows * longest > budget:
            break
        stop += 1
    return stop
