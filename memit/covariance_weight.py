"""λ by rule: the largest λ that still lets an edit land.

How much of the way to their targets z the hidden states h make hardly depends on λ over a wide
range, in which a larger λ protects other keys better; beyond it the edit no longer lands. Where
that range ends depends on the model, the layers and the facts, so the edit itself is tried:

- Candidates are half decades around f, the dimension of the keys: E kᵀC⁻¹k = f for the keys of the
  corpus, and (λC + k kᵀ)⁻¹ k weighs λ against that, whatever the scale of the activations.
- The smallest candidate with which the edit can be made shows how much of the way is left anyhow.
- The largest candidate that leaves at most `MARGIN` more is found by bisection.
- While its drift exceeds `LARGEST_DRIFT`, the next larger one is taken: many edits can never all
  land, and ever smaller λ would ruin all other keys for a few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from memit.errors import NumericsError
from memit.language_model import LanguageModel
from memit.second_moment import SecondMoment
from memit.spread import Spread
from memit.weight_delta import LowRank

HALF_DECADES = range(-5, 3)
"""The candidates: λ is from f/316 to 10 f."""
TRIALS = 4
"""Edits that are usually tried: the smallest λ, and three steps of the bisection."""
MARGIN = 0.04
"""Share of the way to the targets that may be left beyond what the smallest λ leaves."""
LARGEST_DRIFT = 0.5
"""Largest drift, see `drift`."""


@dataclass(frozen=True)
class Trial:
    """What the edit did with one λ."""

    weight: float
    """λ."""
    left: float
    """Mean ‖z − h‖ after it, as a share of that before it; infinite if it could not be made."""
    drift: float
    """See `drift`."""


@dataclass(frozen=True)
class Choice:
    """A λ, and why."""

    spread: Spread
    """The edit with it."""
    weight: float
    """λ."""
    reason: str
    trials: tuple[Trial, ...]
    """All λ that were tried, ascending."""

    def described(self) -> dict[str, Any]:
        """For an edit's provenance: λ, why, and the curve of λ, the share left and the drift."""
        curve = [[t.weight, round(t.left, 4), round(t.drift, 4)] for t in self.trials]
        return {"weight": self.weight, "reason": self.reason, "curve": curve}


def candidates(width: int) -> list[float]:
    """The λ that may be chosen for keys of `width` dimensions, rounded to two digits, ascending."""
    return [float(f"{width * 10 ** (step / 2):.2g}") for step in HALF_DECADES]


def choose_covariance_weight(
    width: int,
    attempt: Callable[[float], Spread],
    drift_of: Callable[[Spread], float],
    margin: float = MARGIN,
) -> Choice:
    """Choose λ for keys of `width` dimensions. `attempt` makes the edit with one λ.

    `margin` is the share of the way that may be left beyond what the smallest λ leaves.

    Raises:
        NumericsError: the edit cannot be made with any λ.
    """
    weights = candidates(width)
    trials: dict[float, Trial] = {}

    def edit(weight: float) -> Spread:
        trials[weight] = Trial(weight, inf, inf)
        made = attempt(weight)
        trials[weight] = Trial(weight, made.share_left, drift_of(made))
        return made

    chosen, made = _first_possible(weights, edit)
    allowed = trials[weights[chosen]].left + margin
    beyond = len(weights)
    while beyond - chosen > 1:
        middle = (chosen + beyond) // 2
        tried = edit(weights[middle])
        if trials[weights[middle]].left <= allowed:
            chosen, made = middle, tried
        else:
            beyond = middle
    reason = f"the largest λ that leaves at most {margin:.0%} more of the way than the smallest"
    while trials[weights[chosen]].drift > LARGEST_DRIFT and chosen + 1 < len(weights):
        chosen += 1
        made = edit(weights[chosen])
        reason = f"the smallest λ that moves other outputs by at most {LARGEST_DRIFT:.0%}"
    ascending = tuple(trials[weight] for weight in sorted(trials))
    return Choice(made, weights[chosen], reason, ascending)


def _first_possible(weights: list[float], edit: Callable[[float], Spread]) -> tuple[int, Spread]:
    """The index of the smallest λ with which the edit can be made, and that edit."""
    for index, weight in enumerate(weights):
        try:
            return index, edit(weight)
        except NumericsError:
            if index + 1 == len(weights):
                raise
    raise ValueError("there are no candidates")


def drift(lm: LanguageModel, made: Spread, moments: Mapping[int, SecondMoment]) -> float:
    """How far an edit moves the outputs at ordinary keys: √(E‖Δk‖² / E‖Wk‖²) over the keys of the
    corpus, which is √(tr ΔCΔᵀ / tr WCWᵀ); the largest of all layers."""
    shares = []
    for layer in made.residuals:
        change, W = made.delta.changes[lm.weight_name(layer)], lm.weight(layer).double()
        if lm.is_transposed(layer):
            change = change.transposed()
        C = moments[layer].mean.to(W.device)
        if isinstance(change, LowRank):  # Δ = R Aᵀ: tr ΔCΔᵀ = ⟨AᵀCA, RᵀR⟩
            R, A = change.left.to(W.device).double(), change.right.to(W.device).double()
            moved = ((A.T @ C @ A) * (R.T @ R)).sum()
        else:
            delta = change.delta.to(W.device).double()
            moved = ((delta @ C) * delta).sum()
        shares.append(float(moved / ((W @ C) * W).sum()))
    return max(shares) ** 0.5
