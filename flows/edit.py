"""Step 6: write the facts. Spread the residuals over the edited layers (Algorithm 1, lines 5-15).

Results: ``artifacts/edit/`` with the delta (low-rank factors and provenance), the changed matrices,
and ``edit.json`` saying how large everything is.
"""

from __future__ import annotations

from flows.command.parameters import Parameters
from flows.command.script import given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from flows.service.gpu_slot import taking_turns
from tasks.edit import spread_edit
from tasks.engine.artifacts import copy_file
from tasks.engine.loaded_model import token_budget
from tasks.engine.results import (
    DELTA_FILE,
    EDIT_FILE,
    EDITED_WEIGHTS_FILE,
    PREFIXES_FILE,
    REQUESTS_FILE,
    STATISTICS,
    TARGETS_FILE,
    finish_step,
    upstream,
)
from tasks.model import open_model
from tasks.prefixes import read_prefixes


@flow(name="edit", validate_parameters=False)
@taking_turns
def edit(parameters: Parameters) -> None:
    """Compute the updates of all layers, or find those of the same inputs."""
    given = upstream("model", "requests", "prefixes", "statistics", "targets")
    model = open_model(**parameters.model.placement())
    hyperparameters = parameters.hyperparameters(model.model.id, model.model.layers)
    moments = {
        layer: given["statistics"].file(STATISTICS / f"layer-{layer:02}.parquet")
        for layer in hyperparameters.layers
    }
    made = spread_edit(
        model,
        given["requests"].file(REQUESTS_FILE),
        read_prefixes(PREFIXES_FILE),
        given["targets"].file(TARGETS_FILE),
        moments,
        hyperparameters,
        token_budget(parameters.edit.token_budget, model, trained_blocks=0),
        parameters.edit.on_failure,
    )
    copy_file(made.delta.checked(), DELTA_FILE)
    copy_file(made.weights.checked(), EDITED_WEIGHTS_FILE)
    copy_file(made.summary.checked(), EDIT_FILE)
    files = [DELTA_FILE, EDITED_WEIGHTS_FILE, EDIT_FILE]
    finish_step("edit", files, given, [made.cost])


if __name__ == "__main__":
    run_flow(edit)
