"""The workers that compute the pieces of a flow, from the section `runner`."""

from flows.command.parameters import Parameters
from tasks.engine.loaded_model import pieces_at_once
from tasks.engine.workers import Workers


def workers_of(parameters: Parameters) -> Workers:
    """The workers of the section `runner`, and what a piece of this model occupies."""
    section, model = parameters.runner, parameters.model
    return Workers(
        kind=section.kind,
        address=section.address,
        count=section.workers,
        store=section.store,
        threads=model.threads // pieces_at_once(model.device, model.threads),
        device=model.device,
    )
