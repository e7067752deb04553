"""The step ``targets``: where each edited fact must end up, computed in pieces of some edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memit.hyperparameters import Hyperparameters
from memit.requests import EditRequest
from tasks.engine.artifacts import Artifact, Value, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.cost import Cost, Meter
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import piece_progress


class TargetsPiece(Value):
    """The targets of consecutive requests."""

    targets: Artifact
    cost: Cost


def target_settings(hyperparameters: Hyperparameters) -> Hyperparameters:
    """Only what the targets depend on; the rest at fixed values, so that it spoils no cache."""
    return replace(
        hyperparameters,
        layers=hyperparameters.layers[-1:],
        covariance_weight=1.0,
        key_average="nested",
        largest_update=Hyperparameters.largest_update,
    )


@cached_task("targets")
def optimise_targets(
    requests: Sequence[EditRequest],
    model: ModelReference,
    prefixes: Sequence[str],
    hyperparameters: Hyperparameters,
    token_budget: int,
) -> TargetsPiece:
    """Optimise the targets of some requests (Eqn. 16)."""
    from memit.targets import compute_targets

    with loaded(model) as lm, Meter() as meter, piece_progress("targets") as progress:
        targets = compute_targets(
            lm, requests, prefixes, hyperparameters, token_budget=token_budget, progress=progress
        )
    return TargetsPiece(
        targets=store_piece("targets", ".safetensors", targets.save), cost=meter.cost
    )
