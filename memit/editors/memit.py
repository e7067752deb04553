"""MEMIT: targets at one layer, spread over several (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memit.editors.base import Editor, Resources, provenance, register
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.requests import EditRequest
from memit.spread import spread
from memit.targets import check_targets, compute_targets
from memit.weight_delta import WeightDelta


@register("memit")
@dataclass(frozen=True)
class Memit(Editor):
    """Mass-editing memory in a transformer."""

    hyperparameters: Hyperparameters
    """Layers, λ and the settings of the optimisation."""

    @property
    def moment_layers(self) -> tuple[int, ...]:
        """All edited layers."""
        return self.hyperparameters.layers

    def edit(
        self, lm: LanguageModel, requests: Sequence[EditRequest], resources: Resources
    ) -> WeightDelta:
        """Optimise all targets, then spread them over the layers.

        Raises `EditError` for edits that cannot be written, `NumericsError` for all of them.
        """
        hp, budget = self.hyperparameters, resources.token_budget
        targets = compute_targets(
            lm,
            requests,
            resources.prefixes,
            hp,
            token_budget=budget,
            progress=resources.progress,
        )
        check_targets(requests, targets)
        result = spread(
            lm, requests, resources.prefixes, targets.z, resources.moments, hp, token_budget=budget
        )
        origin = {**provenance(self, lm, requests), **result.delta.provenance}
        return WeightDelta(result.delta.changes, origin)
