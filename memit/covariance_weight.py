"""λ by rule: the largest λ that still lets an edit land.

How much of the way to their targets z the hidden states h are left to go hardly depends on λ over
a wide range, in which a larger λ protects other keys better. Beyond it the edit no longer lands;
and with many edits a small λ leaves more again, since the updates then harm what is between the
edited layers and L. Where the range ends depends on the model, the layers and the facts, so the
edit itself is tried, in half decades of λ:

- down from λ = f, the dimension of the keys, as long as that leaves clearly less of the way. (For
  the keys of the corpus E kᵀC⁻¹k = f, and the update weighs λ against kᵀC⁻¹k.)
- up from there, if f itself leaves little enough.
- The largest λ is taken that leaves at most `MARGIN` more than the one that leaves least.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from memit.errors import NumericsError
from memit.language_model import LanguageModel
from memit.placement import solving_device
from memit.second_moment import SecondMoment
from memit.spread import Spread
from memit.weight_delta import LowRank

LOWEST, HIGHEST = -5, 2
"""Half decades from f: λ is from f/316 to 10 f."""
TRIALS = 4
"""Edits that are usually tried."""
MARGIN = 0.02
"""Share of the way to the targets that may be left beyond the least."""
FLAT = 0.01
"""A smaller λ that leaves less by no more than this is the last one that is tried."""


@dataclass(frozen=True)
class Trial:
    """What the edit did with one λ."""

    weight: float
    """λ."""
    left: float
    """Mean ‖z − h‖ after it, as a share of that before it."""
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


def choose_covariance_weight(
    width: int,
    attempt: Callable[[float], Spread],
    drift_of: Callable[[Spread], float],
    margin: float = MARGIN,
) -> Choice:
    """Choose λ for keys of `width` dimensions. `attempt` makes the edit with one λ.

    `margin` is the share of the way that may be left beyond the least.

    Raises:
        NumericsError: the edit cannot be made with any λ.
    """
    trials: dict[int, Trial] = {}
    made: dict[int, Spread] = {}

    def least() -> float:
        return min((trial.left for trial in trials.values()), default=inf)

    def lands(step: int) -> bool:
        """Whether the edit can be made with the λ of a step, and leaves little enough."""
        weight = float(f"{width * 10 ** (step / 2):.2g}")
        try:
            found = attempt(weight)
        except NumericsError:
            if step == HIGHEST and not trials:
                raise
            return False
        trials[step] = Trial(weight, found.share_left, drift_of(found))
        made[step] = found
        for other in [n for n in made if trials[n].left > least() + margin]:
            del made[other]  # a Δ takes memory
        return step in made

    for step in range(0, LOWEST - 1, -1):
        before = least()
        lands(step)
        if step not in trials or trials[step].left > before - FLAT:
            break
    for step in range(1, HIGHEST + 1) if 0 in made or not trials else ():
        if not lands(step) and trials:
            break
    best = max(made)
    reason = f"the largest that leaves at most {margin:.0%} more of the way than the best one tried"
    ascending = tuple(trials[step] for step in sorted(trials))
    return Choice(made[best], trials[best].weight, reason, ascending)


def drift(lm: LanguageModel, made: Spread, moments: Mapping[int, SecondMoment]) -> float:
    """How far an edit moves the outputs at ordinary keys: √(E‖Δk‖² / E‖Wk‖²) over the keys of the
    corpus, which is √(tr ΔCΔᵀ / tr WCWᵀ); the largest of all layers."""
    shares = []
    for layer in made.residuals:
        change, W = made.delta.changes[lm.weight_name(layer)], lm.weight(layer)
        W = W.to(solving_device(W.device)).double()
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
