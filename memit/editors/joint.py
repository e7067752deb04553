"""Joint values: changes of the down-projections' outputs in all edited layers, optimised at once.

MEMIT spreads a change of the hidden state over layers, and a down-projection can write its share
only where its output m is added as it is. Where a norm follows (Gemma 2 and 3, OLMo 2), changes of
m in front of the norm are optimised instead, one for each edited layer, all of them together and
through the model's own norms. Each layer's update then writes its own change. Equations and figures
are in `docs/joint.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from memit.editors.base import register
from memit.editors.memit import Memit
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.targets import Targets


@register("joint")
@dataclass(frozen=True)
class Joint(Memit):
    """Values of all edited layers at once; the closed form of a layer is MEMIT's."""

    site: ClassVar[str] = "down_projections"
    margin: ClassVar[float] = 0.5
    """Optimised together, the changes reach further than they must."""

    def check(self, lm: LanguageModel) -> None:
        """It edits every model that has down-projections."""

    @property
    def target_hyperparameters(self) -> Hyperparameters:
        """Its own, at the outputs of the down-projections."""
        return replace(self.hyperparameters, site="down_projections")

    def goal(self, lm: LanguageModel, targets: Targets) -> Mapping[int, Tensor]:
        """D of each layer (n × d)."""
        changes = (targets.z - targets.hidden).split(lm.width, dim=1)
        return dict(zip(self.hyperparameters.layers, changes, strict=True))


def editor_for(settings: Hyperparameters) -> Memit:
    """The editor that spreads the targets which settings describe."""
    return Joint(settings) if settings.site == "down_projections" else Memit(settings)
