"""Step 5: optimise the hidden state at the last edited layer that each fact needs (Eqn. 16).

Result: `artifacts/targets.safetensors`.
"""

from __future__ import annotations

from collections.abc import Sequence

from flows.service.step import Run, chunks, step
from memit.hyperparameters import Hyperparameters
from memit.requests import EditRequest
from tasks.engine.results import TARGETS_FILE
from tasks.targets import TargetsPiece, optimise_targets, read_targets, target_settings


@step("targets", reads=("model", "requests", "prefixes"))
def targets(run: Run) -> None:
    """Optimise the targets that are missing and put all of them into one file."""
    requests = [record.request for record in run.records]
    pieces = optimise(run, requests, run.hyperparameters)
    run.write(TARGETS_FILE, read_targets([piece.targets for piece in pieces]).save)


def optimise(
    run: Run, requests: Sequence[EditRequest], hyperparameters: Hyperparameters
) -> list[TargetsPiece]:
    """The targets of requests, in pieces of the size that the section `targets` names."""
    section = run.parameters.targets
    blocks = hyperparameters.trained_blocks(run.model.model.layers)
    return run.map(
        "edits",
        optimise_targets,
        chunks(requests, section.requests_per_piece),
        model=run.model,
        prefixes=run.prefixes,
        hyperparameters=target_settings(hyperparameters),
        token_budget=run.token_budget(section.token_budget, trained_blocks=blocks),
    )
