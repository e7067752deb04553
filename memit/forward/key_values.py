"""Attention keys and values of positions in front of those that a pass computes.

A pass leaves them behind in a `DynamicCache`; later passes continue from `recorded` ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _FrozenLayer(DynamicLayer):
    """Constant keys and values of earlier positions; later ones are attended to, but not kept."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.before = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        keys, values = self.before
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of positions before the computed ones, for blocks from `start` on.

    Rows are aligned to the right, so that distances between positions are those of the text and a
    model's sliding window keeps its meaning.
    """

    start: int
    """The first block that they belong to."""
    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each block from `start` on (rows × heads × positions × head size)."""
    lengths: Tensor
    """How many of the positions are real in each row (rows)."""

    @property
    def positions(self) -> int:
        """Number of positions, alignment included."""
        return self.layers[0][0].shape[2]

    def select(self, rows: Tensor) -> KeyValues:
        """Those of the given rows, in this order; a row may occur several times."""
        lengths = self.lengths[rows]
        # Alignment is on the right: what no chosen row needs is cut off on the left.
        cut = self.positions - int(lengths.max())
        layers = tuple(
            (k[rows.to(k.device), :, cut:], v[rows.to(v.device), :, cut:]) for k, v in self.layers
        )
        return KeyValues(self.start, layers, lengths)

    def between(self, start: int, stop: int) -> KeyValues:
        """Those of blocks `start` to `stop`, both included."""
        layers = self.layers[start - self.start : stop + 1 - self.start]
        return KeyValues(start, layers, self.lengths)

    def cache(self) -> Cache:
        """A cache that puts them before the computed positions."""
        layers: list[Any] = [_FrozenLayer(keys, values) for keys, values in self.layers]
        # Blocks below do not run, but the mask takes the number of positions from the first layer.
        return Cache(layers=[*layers[:1] * self.start, *layers])

    def mask(self) -> Tensor:
        """1 where a position is real (rows × positions)."""
        columns = torch.arange(self.positions, device=self.lengths.device)
        return (columns[None] >= self.positions - self.lengths[:, None]).long()


def recorded(cache: Cache, start: int, lengths: Tensor) -> KeyValues:
    """Keys and values of each row's first `lengths` positions (rows), for the blocks from `start`
    on that a pass with this cache has run."""
    longest = int(lengths.max())
    layers: list[Any] = cache.layers[start:]
    if longest == int(lengths.min()):  # aligned already: views instead of copies
        cut = tuple((layer.keys[:, :, :longest], layer.values[:, :, :longest]) for layer in layers)
        return KeyValues(start, cut, lengths)
    # Right alignment: column c of a row of length n is its position c - (longest - n). Columns
    # before position 0 are masked, so that any content serves there.
    columns = torch.arange(longest, device=lengths.device)
    source = (columns[None] - (longest - lengths[:, None])).clamp(min=0)
    held = tuple((_gather(layer.keys, source), _gather(layer.values, source)) for layer in layers)
    return KeyValues(start, held, lengths)


def _gather(states: Tensor, source: Tensor) -> Tensor:
    """The positions `source` (rows × positions) of each row's states."""
    rows = torch.arange(len(source), device=states.device)[:, None]
    return states.transpose(1, 2)[rows, source.to(states.device)].transpose(1, 2).contiguous()
