"""Step 5: optimise the hidden state at the last edited layer that each fact needs (Eqn. 16).

Results: `artifacts/targets.safetensors`, the targets of the requests in their order, and
`artifacts/stored_targets.safetensors`, those of all facts that were ever asked for with the same
settings: facts come and go, and what is optimised once is not optimised again.
"""

from collections.abc import Sequence

from flows.service.step import Run, step
from memit.hyperparameters import Hyperparameters
from memit.requests import EditRequest
from tasks.engine.artifacts import Artifact, write_file
from tasks.engine.cache import content_key
from tasks.engine.checkpoints import forget_work, unfinished_work
from tasks.engine.code import code_of
from tasks.engine.results import STORED_TARGETS_FILE, TARGETS_FILE, read_timings
from tasks.targets import (
    StoredTargets,
    optimise_targets,
    plan_pieces,
    target_settings,
)


@step("targets", reads=("model", "requests", "prefixes"))
def targets(run: Run) -> None:
    """Optimise the targets that are not stored, store them, and choose those of the requests."""
    requests = [record.request for record in run.records]
    earlier = run.earlier if run.parameters.targets.upon == "edited" else None
    inputs = (run.model, run.prefixes, target_settings(run.hyperparameters))
    inputs += (earlier,) if earlier else ()
    key = content_key("targets", code_of(optimise_targets.uncached), {"": inputs})[:32]
    work = f"targets/{key}"
    stored = StoredTargets.load(STORED_TARGETS_FILE, key)
    if stored.rows:
        run.costs += read_timings([run.step]).values()
    size = run.parameters.targets.requests_per_piece
    plan = plan_pieces(stored.missing(requests), size, unfinished_work(work) / "plan.json")
    pieces = optimise(run, plan, run.hyperparameters, earlier) if plan else []
    stored = stored.with_pieces(plan, pieces)
    # No result of the step, whose results must not tell which facts were withdrawn.
    write_file(STORED_TARGETS_FILE, stored.save)
    run.write(TARGETS_FILE, stored.of(requests).save)
    forget_work(work)


def optimise(
    run: Run,
    pieces: Sequence[Sequence[EditRequest]],
    hyperparameters: Hyperparameters,
    earlier: Artifact | None = None,
) -> list[Artifact]:
    """The targets of each piece, in the model with `earlier` edits if there are any."""
    section = run.parameters.targets
    blocks = hyperparameters.trained_blocks(run.model.model.layers)
    return run.map(
        "edits",
        optimise_targets,
        pieces,
        model=run.model,
        prefixes=run.prefixes,
        hyperparameters=target_settings(hyperparameters),
        token_budget=run.token_budget(section.token_budget, trained_blocks=blocks),
        earlier=earlier,
    )
