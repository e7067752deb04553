"""Attention keys and values of positions in front of those that a pass computes.

A pass with a `Recorder` leaves them behind as `KeyValues`; later passes continue from these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from memit.language_model import LanguageModel


class _RecordedLayer(DynamicLayer):
    """Keys and values of one attention layer as they were computed."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0  # the mask of a recording pass starts at its first token


class _IgnoredLayer(DynamicLayer):
    """A layer whose keys and values are not kept."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        return key_states, value_states


class _FrozenLayer(DynamicLayer):
    """Constant keys and values of earlier positions; later ones are attended to, but not kept."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.before, self.length = (keys, values), keys.shape[-2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        keys, values = self.before
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers before 5.2 hands over the positions themselves
        queries = query_length if isinstance(query_length, int) else len(query_length)
        return self.length + queries, 0


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


class Recorder:
    """Records the attention keys and values of blocks from `start` on during a forward pass."""

    def __init__(self, lm: LanguageModel, start: int):
        self.start = start
        self.layers: list[Any] = [_IgnoredLayer() for _ in range(start)]
        self.layers += [_RecordedLayer() for _ in range(start, lm.depth)]

    def cache(self) -> Cache:
        """The cache to hand to the forward pass."""
        return Cache(layers=self.layers)

    def before(self, lengths: Tensor) -> KeyValues:
        """Keys and values of each row's first `lengths` positions (rows), for the blocks that were
        run."""
        longest = int(lengths.max())
        run = [layer for layer in self.layers[self.start :] if layer.is_initialized]
        if longest == int(lengths.min()):  # aligned already: views instead of copies
            cut = tuple((layer.keys[:, :, :longest], layer.values[:, :, :longest]) for layer in run)
            return KeyValues(self.start, cut, lengths)
        # Right alignment: column c of a row of length n is its position c - (longest - n). Columns
        # before position 0 are masked, so that any content serves there.
        columns = torch.arange(longest, device=lengths.device)
        source = (columns[None] - (longest - lengths[:, None])).clamp(min=0)
        held = tuple((_gather(layer.keys, source), _gather(layer.values, source)) for layer in run)
        return KeyValues(self.start, held, lengths)


def _gather(states: Tensor, source: Tensor) -> Tensor:
    """The positions `source` (rows × positions) of each row's states."""
    rows = torch.arange(len(source), device=states.device)[:, None]
    return states.transpose(1, 2)[rows, source.to(states.device)].transpose(1, 2).contiguous()
