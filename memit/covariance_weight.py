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

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from memit.errors import NumericsError
from memit.spread import Spread

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
        """For an edit's provenance: λ, why, and the curve of λ and the share left."""
        curve = [[trial.weight, round(trial.left, 4)] for trial in self.trials]
        return {"weight": self.weight, "reason": self.reason, "curve": curve}


def choose_covariance_weight(
    width: int, attempt: Callable[[float], Spread], margin: float = MARGIN
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
        trials[step] = Trial(weight, found.share_left)
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
