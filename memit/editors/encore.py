"""ENCORE: MEMIT in sequence with a price on the norm of every update (arXiv 2502.01636)."""

from dataclasses import dataclass, replace
from typing import Annotated

from memit.editors.base import Resources, register
from memit.editors.memit_sequence import MemitSequence
from memit.hyperparameters import Hyperparameters
from memit.quadratic import Quadratic
from memit.ranges import Range, check_settings


@register("encore")
@dataclass(frozen=True)
class Encore(MemitSequence):
    """N = λC + λ_n I + C_p + K Kᵀ, and targets that stop early; the defaults are those published
    for GPT-2 XL."""

    ridge: Annotated[float, Range(0, 1e12)] = 10.0
    """λ_n; published: 10 for GPT-2 XL and Llama 2, 20 for Llama 3."""
    argmax_stop: Annotated[int, Range(0, 10_000)] = 4
    """`Hyperparameters.argmax_stop` of its targets; published: 4 for GPT-2 XL, 3 for Llama 2, 2 for
    Llama 3."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def target_hyperparameters(self) -> Hyperparameters:
        """MEMIT's, with the early stop."""
        return replace(self.hyperparameters, argmax_stop=self.argmax_stop)

    def quadratic(self, layer: int, resources: Resources) -> Quadratic:
        """MEMIT's in sequence, and λ_n."""
        return replace(super().quadratic(layer, resources), ridge=self.ridge)
