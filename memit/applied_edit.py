"""An edit that is in a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class AppliedEdit:
    """An edit that is in a model's weights, and the weights before it."""

    delta: Any
    """The `WeightDelta` that was applied."""
    base: Mapping[str, Tensor]
    """The parameters before (in the model's dtype, on the CPU)."""
    digests: Mapping[str, str]
    """Their digests."""
