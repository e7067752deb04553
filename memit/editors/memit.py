"""MEMIT: targets at one layer, spread over several (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memit.editors.base import Editor, Resources, provenance, register
from memit.errors import InputError
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.quadratic import Quadratic
from memit.requests import EditRequest
from memit.spread import Goal, spread
from memit.targets import Targets, check_targets, compute_targets
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

    @property
    def target_hyperparameters(self) -> Hyperparameters:
        """Its own."""
        return self.hyperparameters

    def check(self, lm: LanguageModel) -> None:
        """Raise `InputError` for a model that does not add its MLPs' outputs as they are."""
        if lm.has_output_norm:
            raise InputError(
                f"{lm.name} passes its MLPs' outputs through a norm, behind which {self.name} "
                "cannot write: use joint, that is targets.site: down_projections, and in "
                "compare.methods joint in place of it."
            )

    def quadratic(self, layer: int, resources: Resources) -> Quadratic:
        """The closed form of a layer: λC."""
        return Quadratic(resources.moments[layer], self.hyperparameters.covariance_weight)

    def goal(self, lm: LanguageModel, targets: Targets) -> Goal:
        """What the updates should reach: z at the output of block L (n × d)."""
        return targets.z

    def edit(
        self, lm: LanguageModel, requests: Sequence[EditRequest], resources: Resources
    ) -> WeightDelta:
        """Spread the targets over the layers, after optimising them where they are not given.

        The provenance holds how large residuals and updates are (Frobenius norms), and how many
        directions the updates could use where the method restricts them.

        Raises:
            EditError: some edits cannot be written.
            NumericsError: none can.
        """
        hyperparameters, budget = self.target_hyperparameters, resources.token_budget
        targets, progress = resources.targets, resources.progress
        if targets is None:
            prefixes = resources.prefixes
            targets = compute_targets(
                lm, requests, prefixes, hyperparameters, token_budget=budget, progress=progress
            )
            progress = None
        check_targets(requests, targets)
        edits_per_layer = -(-len(requests) // len(hyperparameters.layers))
        result = spread(
            lm,
            requests,
            resources.prefixes,
            self.goal(lm, targets),
            lambda layer: self.quadratic(layer, resources),
            hyperparameters,
            token_budget=budget,
            progress=progress and (lambda layers: progress(layers * edits_per_layer)),
        )
        sizes = {
            "residuals": {str(layer): round(norm, 6) for layer, norm in result.residuals.items()},
            "residual_left": round(result.residual_left, 6),
            "update_ratio": {str(layer): round(r, 6) for layer, r in result.update_ratios.items()},
        }
        if result.ranks:
            sizes["ranks"] = {str(layer): rank for layer, rank in result.ranks.items()}
        origin = {**provenance(self, lm, requests), **sizes, **result.delta.provenance}
        return WeightDelta(result.delta.changes, origin)
