"""MEMIT in batches that replace what the earlier ones wrote.

With B = −Δ_tot (λC + C_p) the sum of all updates is what the last batch alone would need from the
original weights, Σ Δ = (V − W₀ K) Kᵀ (λC + C_p + K Kᵀ)⁻¹, where earlier keys get back the original
outputs: facts that are edited again and again do not pile up in the weights (arXiv 2605.26670).
"""

from dataclasses import dataclass, replace

from memit.editors.base import Resources, register
from memit.editors.memit_sequence import MemitSequence
from memit.quadratic import Quadratic


@register("memit_forgetting")
@dataclass(frozen=True)
class MemitForgetting(MemitSequence):
    """MEMIT in sequence with B = −Δ_tot (λC + C_p)."""

    def quadratic(self, layer: int, resources: Resources) -> Quadratic:
        """MEMIT's in sequence, and the earlier changes, which are taken back."""
        forgotten = resources.past.change.get(layer)
        return replace(super().quadratic(layer, resources), forgotten=forgotten)
