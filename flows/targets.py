"""Step 5: where each edited fact must end up at the last edited layer (Eqn. 16).

Result: ``artifacts/targets.safetensors``.
"""

from __future__ import annotations

from collections.abc import Sequence

from flows.command.parameters import Parameters
from flows.command.script import given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from flows.service.gpu_slot import taking_turns
from flows.service.workers import with_runner
from memit.requests import EditRequest, read_counterfact
from tasks.engine.artifacts import write_file
from tasks.engine.loaded_model import ModelReference, token_budget
from tasks.engine.results import PREFIXES_FILE, REQUESTS_FILE, TARGETS_FILE, finish_step, upstream
from tasks.engine.workers import map_in_pieces, thread_runner
from tasks.model import open_model
from tasks.prefixes import read_prefixes
from tasks.targets import TargetsPiece, optimise_targets, target_settings


@flow(
    name="targets",
    validate_parameters=False,
    task_runner=thread_runner(),
)
@taking_turns
@with_runner
def targets(parameters: Parameters) -> None:
    """Optimise the targets that are missing and put all of them into one file."""
    from memit.targets import Targets

    given = upstream("model", "requests", "prefixes")
    model = open_model(**parameters.model.placement())
    chosen = [record.request for record in read_counterfact(REQUESTS_FILE)]
    finished = targets_of(chosen, parameters, model, read_prefixes(PREFIXES_FILE))
    joined = Targets.concatenate([Targets.load(piece.targets.checked()) for piece in finished])
    write_file(TARGETS_FILE, joined.save)
    finish_step("targets", [TARGETS_FILE], given, [piece.cost for piece in finished])


def targets_of(
    requests: Sequence[EditRequest],
    parameters: Parameters,
    model: ModelReference,
    prefixes: Sequence[str],
) -> list[TargetsPiece]:
    """The targets of requests, in pieces of the size that the section ``targets`` names."""
    section = parameters.targets
    hyperparameters = parameters.hyperparameters(model.model.id, model.model.layers)
    above = model.model.layers - 1 - hyperparameters.layers[-1]
    return map_in_pieces(
        "targets",
        "edits",
        optimise_targets,
        requests,
        section.requests_per_piece,
        model=model,
        prefixes=prefixes,
        hyperparameters=target_settings(hyperparameters),
        token_budget=token_budget(section.token_budget, model, trained_blocks=above),
    )


if __name__ == "__main__":
    run_flow(targets)
