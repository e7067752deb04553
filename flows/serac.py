"""What SERAC learns before it edits: a scope classifier and a counterfactual model.

Results: ``artifacts/serac/`` with both models and the losses of both trainings.
"""

from __future__ import annotations

from flows.command import given_parameters, run_flow
from flows.parameters import Parameters, overridden

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from flows.systems import split
from tasks.artifacts import copy_file
from tasks.mend import Trained
from tasks.model import open_model
from tasks.results import SERAC, SERAC_MODELS_FILE, finish_step, upstream
from tasks.serac import train_serac_models
from tasks.unfinished import forget_work


@flow(name="serac", validate_parameters=False)
def serac(parameters: Parameters) -> None:
    """Train both models on records that are not edited, or find those that were."""
    given = upstream("model")
    trained = trained_serac(parameters)
    losses = SERAC / "losses.json"
    copy_file(trained.file.checked(), SERAC_MODELS_FILE)
    copy_file(trained.losses.checked(), losses)
    finish_step("serac", [SERAC_MODELS_FILE, losses], given, [trained.cost])


def trained_serac(parameters: Parameters) -> Trained:
    """The models for the records that ``params.yaml`` names."""
    from memit.editors.serac import serac_preset

    model = open_model(**parameters.model.placement())
    settings = overridden(serac_preset(model.model.id), parameters.serac)
    records = split(parameters).training
    trained = train_serac_models(model, records, settings)
    forget_work("serac", model, records, settings)
    return trained


if __name__ == "__main__":
    run_flow(serac)
