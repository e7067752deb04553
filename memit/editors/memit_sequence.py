"""MEMIT in batches, each of which keeps what the earlier ones wrote.

With C_p = Σ K Kᵀ over all earlier keys beside λC, an update costs as much at a key that was edited
before as at a new one. For one layer with fixed targets the updates of all batches add up to the
update of all facts at once (recursive least squares; arXiv 2605.26670).
"""

from dataclasses import dataclass

from memit.editors.base import register
from memit.editors.memit import Memit


@register("memit_sequence")
@dataclass(frozen=True)
class MemitSequence(Memit):
    """MEMIT with N = λC + C_p + K Kᵀ; without earlier edits the same as MEMIT."""

    @property
    def past_layers(self) -> tuple[int, ...]:
        """All edited layers."""
        return self.hyperparameters.layers
