"""The closed form of an update, which most weight editors share:

    Δ = (R Kᵀ + B) U (Uᵀ N U + ρI)⁻¹ Uᵀ,   N = λC + λ_n I + C_p + K Kᵀ,   B = 0 or −Δ_tot (λC + C_p)

For B = 0, Δ (d × f) makes ‖ΔK − R‖² + ρ‖Δ‖² + tr Δ (N − K Kᵀ) Δᵀ least among the changes whose
rows are in the span of U: the edits want R at their keys K, and every other effect has its price.
With C and λ alone it is MEMIT's Eqn. 14. `docs/methods.md` says what the other editors use.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memit.second_moment import SecondMoment, cholesky
from memit.weight_delta import Dense, LowRank


@dataclass(frozen=True)
class Past:
    """What earlier edits, which are in the weights, leave for the next one, by layer."""

    keys: Mapping[int, SecondMoment] = field(default_factory=dict)
    """C_p = Σ K Kᵀ over the earlier edits' keys (f × f); may read its values on demand."""
    change: Mapping[int, Tensor] = field(default_factory=dict)
    """Δ_tot, the sum of their updates (d × f, float64)."""

    def sum_of(self, layer: int) -> Tensor | None:
        """C_p of a layer (f × f, float64); None without earlier edits."""
        keys = self.keys.get(layer)
        return None if keys is None else keys.sum.double()


NO_PAST = Past()


@dataclass(frozen=True)
class Quadratic:
    """What an editor says about the update of one layer: the parts of the form besides K and R."""

    moment: SecondMoment
    """C (f × f)."""
    covariance_weight: float
    """λ."""
    ridge: float = 0.0
    """λ_n."""
    past: Tensor | None = None
    """C_p (f × f, float64); None: 0."""
    forgotten: Tensor | None = None
    """Δ_tot (d × f, float64), of which the update takes back what it need not keep; None: B = 0."""
    basis: Tensor | None = None
    """U, orthonormal directions in which a row of Δ may lie (f × r, float64); None: I."""
    basis_ridge: float = 0.0
    """ρ, where there is a basis."""

    def preserved(self, device: torch.device) -> Tensor:
        """Uᵀ (λC + λ_n I + C_p) U + ρI (r × r, float64), a new tensor."""
        total = self.moment.mean.to(device).mul_(self.covariance_weight)
        total.diagonal().add_(self.ridge)
        if self.past is not None:
            total += self.past.to(device)
        if self.basis is not None:
            basis = self.basis.to(device)
            total = basis.T @ total @ basis
            total.diagonal().add_(self.basis_ridge)
        return total

    def factor(self, device: torch.device, where: str) -> Tensor:
        """Lower Cholesky factor of `preserved`."""
        if self.ridge == 0 and self.past is None and self.basis is None:  # λC: independent of λ
            factor = cholesky(self.moment.mean.to(device), where)
            return factor.mul_(math.sqrt(self.covariance_weight))
        return cholesky(self.preserved(device), where)

    def inside(self, columns: Tensor) -> Tensor:
        """Uᵀ times columns of size f."""
        return columns if self.basis is None else self.basis.to(columns.device).T @ columns

    def outside(self, columns: Tensor) -> Tensor:
        """U times columns of size r."""
        return columns if self.basis is None else self.basis.to(columns.device) @ columns

    def pull(self, device: torch.device) -> Tensor | None:
        """Bᵀ = −(λC + C_p) Δ_totᵀ (f × d), or None."""
        if self.forgotten is None:
            return None
        price = replace(self, ridge=0.0, basis=None).preserved(device)
        return -price @ self.forgotten.to(device).T


def solve(K: Tensor, R: Tensor, quadratic: Quadratic, where: str) -> LowRank | Dense:
    """Δ of the form in float64, for keys K (f × n) and residuals R (d × n).

    The cheapest of three ways, all by Cholesky: while factors are smaller than Δ (and B is 0),
    Woodbury with the factor of N − K Kᵀ (n right-hand sides); else the factor of N, for K (n ≤ d)
    or for K Rᵀ + Bᵀ (d right-hand sides).

    Raises:
        NumericsError: the matrix is not positive definite; it names `where`.
    """
    K, R = K.double(), R.double().to(K.device)
    (f, n), d = K.shape, R.shape[0]
    pull = quadratic.pull(K.device)
    if pull is None and n * (d + f) < d * f:
        A = directions(K, quadratic, where)
        return LowRank(R.float().cpu(), A.float().cpu())
    inner = quadratic.inside(K)
    L = cholesky(quadratic.preserved(K.device).addmm_(inner, inner.T), where)
    if pull is None and n <= d:  # Δ = R (N⁻¹ K)ᵀ
        return Dense((R @ quadratic.outside(torch.cholesky_solve(inner, L)).T).float().cpu())
    return _from_factor(L, inner @ R.T, quadratic, pull)


def solve_in_parts(
    parts: Iterable[tuple[Tensor, Tensor]], quadratic: Quadratic, where: str
) -> Dense:
    """`solve` for K (f × b) and R (d × b) of some edits at a time, of which only K Kᵀ (f × f) and
    K Rᵀ (f × d) are kept."""
    total = wanted = torch.empty(0)
    for K, R in parts:
        inner, R = quadratic.inside(K.double()), R.double().to(K.device)
        if not len(total):
            total = quadratic.preserved(K.device)
            wanted = inner.new_zeros(len(inner), len(R))
        total.addmm_(inner, inner.T)
        wanted.addmm_(inner, R.T)
    return _from_factor(cholesky(total, where), wanted, quadratic, quadratic.pull(total.device))


def _from_factor(L: Tensor, wanted: Tensor, quadratic: Quadratic, pull: Tensor | None) -> Dense:
    """Δᵀ = N⁻¹ (K Rᵀ + Bᵀ), from the factor of N and K Rᵀ."""
    if pull is not None:
        wanted = wanted + quadratic.inside(pull)
    delta = quadratic.outside(torch.cholesky_solve(wanted, L)).T
    return Dense(delta.float().contiguous().cpu())


def directions(K: Tensor, quadratic: Quadratic, where: str) -> Tensor:
    """A = U (Uᵀ N U + ρI)⁻¹ Uᵀ K (f × n), so that Δ = R Aᵀ where B is 0, by Woodbury: with
    F = N − K Kᵀ, N⁻¹ K = F⁻¹ K (I + Kᵀ F⁻¹ K)⁻¹."""
    # With F = L Lᵀ and half = L⁻¹ K: Kᵀ F⁻¹ K = halfᵀ half (n × n).
    L = quadratic.factor(K.device, where)
    half = torch.linalg.solve_triangular(L, quadratic.inside(K), upper=False)
    small = half.T @ half
    small.diagonal().add_(1.0)
    # F⁻¹ K (…)⁻¹ = L⁻ᵀ (half (I + halfᵀ half)⁻¹)
    inner = torch.cholesky_solve(half.T, torch.linalg.cholesky(small)).T
    return quadratic.outside(torch.linalg.solve_triangular(L.T, inner, upper=True))
