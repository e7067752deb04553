"""The dimensions of a model that its costs follow from; needs neither torch nor the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Depth, widths and number of parameters."""

    depth: int
    """Blocks."""
    width: int
    """d, of the hidden states."""
    inner_width: int
    """f, of the keys."""
    parameters: int
