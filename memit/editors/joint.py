"""Joint values: outputs of the down-projections of all edited layers, optimised at once.

What MEMIT spreads over layers is a change of the hidden state, which a down-projection can only
write where its output m is added as it is. Where a norm follows (Gemma 2 and 3, OLMo 2), the change
d of m in front of the norm is optimised instead, one for each edited layer, all in one
optimisation through the model's own norms. Each layer then gets the update that writes its own d.
The equations, and what this does on ordinary models, are in `docs/joint.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from memit.editors.base import Resources, register
from memit.editors.memit import Memit
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.layer_walk import layer_keys
from memit.requests import EditRequest
from memit.targets import Targets, edit_rows


@register("joint")
@dataclass(frozen=True)
class Joint(Memit):
    """Values of all edited layers at once; the closed form of a layer is MEMIT's."""

    def check(self, lm: LanguageModel) -> None:
        """It edits every model that has down-projections."""

    @property
    def target_hyperparameters(self) -> Hyperparameters:
        """Its own, at the outputs of the down-projections."""
        return replace(self.hyperparameters, site="down_projections")

    def goal(
        self,
        lm: LanguageModel,
        requests: Sequence[EditRequest],
        targets: Targets,
        resources: Resources,
    ) -> Mapping[int, Tensor]:
        """W K + D of each layer (d × n, float64), with the keys of the unedited model: the bias,
        which an edit leaves alone, is in neither what is there nor what is wanted."""
        settings, edits = self.hyperparameters, edit_rows(lm, requests, resources.prefixes)
        keys = layer_keys(
            lm,
            edits,
            settings.layers,
            settings.key_average,
            token_budget=resources.token_budget,
        )
        changes = (targets.z - targets.hidden).split(lm.width, dim=1)
        return {
            layer: lm.weight(layer).to(K.device).double() @ K + change.T.to(K.device).double()
            for (layer, K), change in zip(keys.items(), changes, strict=True)
        }


def editor_for(settings: Hyperparameters) -> Memit:
    """The editor that spreads the targets which settings describe."""
    return Joint(settings) if settings.site == "down_projections" else Memit(settings)
