"""The kind and the dimensions of a model: its costs and its preset follow from them.

Needs neither torch nor the model.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Depth, widths, number of parameters and architecture."""

    depth: int
    """Blocks."""
    width: int
    """d, of the hidden states."""
    inner_width: int
    """f, of the keys."""
    parameters: int
    architecture: str = ""
    """The name of its Hugging Face class; empty where only costs are asked for."""
    output_norm: bool = False
    """Whether a norm follows the down-projections."""
