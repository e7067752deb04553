"""AlphaEdit: updates in directions that ordinary keys do not use (Fang et al., ICLR 2025)."""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from memit.editors.base import Resources, register
from memit.editors.memit_sequence import MemitSequence
from memit.errors import InputError
from memit.hyperparameters import Hyperparameters
from memit.quadratic import Quadratic
from memit.ranges import Range, check_settings


@register("alphaedit")
@dataclass(frozen=True)
class AlphaEdit(MemitSequence):
    """Δ = R Kᵀ U (Uᵀ (C_p + K Kᵀ) U + ρI)⁻¹ Uᵀ, where U spans the directions in which C is small;
    the defaults are the published ones for all models."""

    ridge: Annotated[float, Range(0, 1e12, exclusive=True)] = 10.0
    """ρ."""
    threshold: Annotated[float, Range(0, 1e12)] = 0.02
    """Directions with a smaller singular value of C belong to U. It depends on the scale of C."""
    energy: Annotated[float | None, Range(0, 1)] = None
    """Instead of the threshold: the largest share of C's trace that the directions of U may hold
    together, whatever the scale."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def target_hyperparameters(self) -> Hyperparameters:
        """MEMIT's, without a λ by rule: it uses none."""
        return replace(self.hyperparameters, covariance_weight=1.0)

    def quadratic(self, layer: int, resources: Resources) -> Quadratic:
        """No price on C, a basis instead, and the earlier keys."""
        moment = resources.moments[layer]
        basis = quiet_directions(moment.mean, self.threshold, self.energy)
        if not basis.shape[1]:
            raise InputError(
                f"the keys of layer {layer} use all directions, so that AlphaEdit may change none: "
                "raise its threshold, or set its energy (a share of C's trace, such as 0.02)."
            )
        past = resources.past.sum_of(layer)
        return Quadratic(moment, 0.0, past=past, basis=basis, basis_ridge=self.ridge)


def quiet_directions(C: Tensor, threshold: float, energy: float | None = None) -> Tensor:
    """U (f × r): eigenvectors of C (f × f, float64) with an eigenvalue below the threshold; with
    `energy`, those of the smallest eigenvalues whose sum is at most this share of all."""
    values, vectors = torch.linalg.eigh(C)  # ascending; C is symmetric: these are singular values
    if energy is not None:
        held = values.clamp(min=0).cumsum(0)
        return vectors[:, held <= energy * held[-1]]
    return vectors[:, values < threshold]
