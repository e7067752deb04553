"""The tasks of the step `targets`: optimise targets in pieces, and select some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memit.hyperparameters import Hyperparameters
from memit.requests import EditRequest
from memit.targets import Targets, compute_targets
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
    """Only what the targets depend on; the rest is fixed, so that it changes no cache key."""
    at_block = hyperparameters.site == "block"
    return replace(
        hyperparameters,
        layers=hyperparameters.layers[-1:] if at_block else hyperparameters.layers,
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
    with loaded(model) as lm, Meter() as meter, piece_progress("targets") as progress:
        targets = compute_targets(
            lm, requests, prefixes, hyperparameters, token_budget=token_budget, progress=progress
        )
    return TargetsPiece(
        targets=store_piece("targets", ".safetensors", targets.save), cost=meter.cost
    )


def read_targets(pieces: Sequence[Artifact]) -> Targets:
    """The targets of all pieces, in order."""
    return Targets.concatenate([Targets.load(piece.checked()) for piece in pieces])


@cached_task("select_targets")
def select_targets(pieces: Sequence[Artifact], rows: Sequence[int]) -> Artifact:
    """Targets of some requests, each given by its row in all of the pieces, as one file."""
    return store_piece("targets", ".safetensors", read_targets(pieces).chosen(rows).save)
