"""MEMIT: targets at one layer, spread over several (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from memit.covariance_weight import MARGIN, Choice, choose_covariance_weight
from memit.editors.base import Editor, Resources, provenance, register
from memit.errors import InputError
from memit.hyperparameters import AUTO, Hyperparameters
from memit.language_model import LanguageModel
from memit.quadratic import Quadratic
from memit.requests import EditRequest
from memit.spread import Goal, Spread, spread
from memit.targets import Targets, check_targets, compute_targets
from memit.weight_delta import WeightDelta


@register("memit")
@dataclass(frozen=True)
class Memit(Editor):
    """Mass-editing memory in a transformer."""

    hyperparameters: Hyperparameters
    """Layers, λ and the settings of the optimisation."""
    site: ClassVar[str] = "block"
    """`Hyperparameters.site` of its targets."""
    margin: ClassVar[float] = MARGIN
    """See `choose_covariance_weight`."""

    @property
    def moment_layers(self) -> tuple[int, ...]:
        """All edited layers."""
        return self.hyperparameters.layers

    @property
    def target_hyperparameters(self) -> Hyperparameters:
        """Its own."""
        return self.hyperparameters

    def check(self, lm: LanguageModel) -> None:
        """Raise `InputError` for a model that does not add its MLPs' outputs as they are, and for
        targets that are not at a block's output."""
        if lm.has_output_norm:
            raise InputError(
                f"{lm.name} passes its MLPs' outputs through a norm, behind which {self.name} "
                "cannot write: use joint, that is targets.site: down_projections, and in "
                "compare.methods joint in place of it."
            )
        self._check_site()

    def _check_site(self) -> None:
        if self.target_hyperparameters.site != self.site:
            raise InputError(
                f"{self.name} has no targets at {self.target_hyperparameters.site} (targets.site): "
                "use joint, in compare.methods in place of it, or set targets.site to block."
            )

    def quadratic(self, layer: int, resources: Resources) -> Quadratic:
        """The closed form of a layer: λC, and C_p where earlier edits are to be kept."""
        weight = float(self.hyperparameters.covariance_weight)  # `edit` has chosen it by then
        return Quadratic(resources.moments[layer], weight, past=resources.past.sum_of(layer))

    def goal(self, lm: LanguageModel, targets: Targets) -> Goal:
        """What the updates should reach: z at the output of block L (n × d)."""
        return targets.z

    def edit(
        self, lm: LanguageModel, requests: Sequence[EditRequest], resources: Resources
    ) -> WeightDelta:
        """Spread the targets over the layers, after optimising them where they are not given.

        The provenance holds how large residuals and updates are (Frobenius norms), how many
        directions the updates could use where the method restricts them, and how λ was chosen.

        Raises:
            EditError: some edits cannot be written.
            InputError: the settings have targets elsewhere than this method.
            NumericsError: none can.
        """
        self._check_site()
        hyperparameters, budget = self.target_hyperparameters, resources.token_budget
        targets, progress = resources.targets, resources.progress
        if targets is None:
            prefixes = resources.prefixes
            targets = compute_targets(
                lm, requests, prefixes, hyperparameters, token_budget=budget, progress=progress
            )
            progress = None
        check_targets(requests, targets)
        resources, chosen = replace(resources, targets=targets, progress=progress), None
        if hyperparameters.covariance_weight == AUTO:
            chosen = self._choose(lm, requests, resources)
        result = chosen.spread if chosen else self._spread(lm, requests, resources)
        sizes: dict[str, Any] = {
            "residuals": {str(layer): round(norm, 6) for layer, norm in result.residuals.items()},
            "residual_left": round(result.residual_left, 6),
            "share_left": round(result.share_left, 6),
            "update_ratio": {str(layer): round(r, 6) for layer, r in result.update_ratios.items()},
        }
        if result.ranks:
            sizes["ranks"] = {str(layer): rank for layer, rank in result.ranks.items()}
        editor = self
        if chosen:
            sizes["covariance_weight"] = chosen.described()
            editor = self._weighing(chosen.weight)
        origin = {**provenance(editor, lm, requests), **sizes, **result.delta.provenance}
        return WeightDelta(result.delta.changes, origin)

    def _weighing(self, weight: float) -> Memit:
        """The editor with this λ."""
        settings = replace(self.hyperparameters, covariance_weight=weight)
        return replace(self, hyperparameters=settings)

    def _choose(
        self, lm: LanguageModel, requests: Sequence[EditRequest], resources: Resources
    ) -> Choice:
        """λ by rule, and the edit with it."""
        progress, silent = resources.progress, replace(resources, progress=None)
        found = choose_covariance_weight(
            lm.inner_width,
            lambda weight: self._weighing(weight)._spread(lm, requests, silent),
            self.margin,
        )
        if progress is not None:
            progress(len(requests))
        return found

    def _spread(
        self, lm: LanguageModel, requests: Sequence[EditRequest], resources: Resources
    ) -> Spread:
        """Spread the targets of `resources` over the layers, with a λ that is a number."""
        hyperparameters, progress = self.target_hyperparameters, resources.progress
        edits_per_layer = -(-len(requests) // len(hyperparameters.layers))
        assert resources.targets is not None
        return spread(
            lm,
            requests,
            resources.prefixes,
            self.goal(lm, resources.targets),
            lambda layer: self.quadratic(layer, resources),
            hyperparameters,
            token_budget=resources.token_budget,
            progress=progress and (lambda layers: progress(layers * edits_per_layer)),
        )
