"""Where the pieces that a flow maps are computed: what the section ``runner`` says."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from flows.command.parameters import Parameters
from tasks.engine.workers import Workers, mapping_over


def with_runner(step: Callable[[Parameters], None]) -> Callable[[Parameters], None]:
    """Let what the body of a flow maps run on the workers of ``params.yaml``."""

    @wraps(step)
    def run(parameters: Parameters) -> None:
        with mapping_over(workers_of(parameters)):
            step(parameters)

    return run


def workers_of(parameters: Parameters) -> Workers:
    """What the section ``runner`` says, and what a piece of this model occupies."""
    section, model = parameters.runner, parameters.model
    return Workers(
        kind=section.kind,
        address=section.address,
        count=section.workers,
        store=section.store,
        threads=model.threads,
        device=model.device,
    )
