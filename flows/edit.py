"""Step 6: spread the residuals over the edited layers (Algorithm 1, lines 5-15).

Results: `artifacts/edit/` with the delta (low-rank factors and provenance), the changed matrices,
and `edit.json` with the sizes of targets, residuals and updates.
"""

from flows.service.step import Run, step
from memit.editors.joint import editor_for
from tasks.edit import Method, changed_weights, describe_edit, edit_with
from tasks.engine import results


@step("edit", reads=("model", "requests", "prefixes", "statistics", "targets"))
def edit(run: Run) -> None:
    """Compute the updates of all layers, or find those of the same inputs."""
    editor = editor_for(run.hyperparameters)
    method = Method(editor.name, editor)
    section = run.parameters.edit
    made = run.compute(
        edit_with,
        method,
        run.model,
        run.input("requests", results.REQUESTS_FILE),
        prefixes=run.prefixes,
        moments={
            layer: run.input("statistics", results.STATISTICS / f"layer-{layer:02}.parquet")
            for layer in method.editor.moment_layers
        },
        targets=run.input("targets", results.TARGETS_FILE),
        token_budget=run.token_budget(section.token_budget, trained_blocks=0),
        on_failure=section.on_failure,
        earlier=run.earlier,
        sums=run.earlier_sums,
    )
    run.copy(made.edit, results.DELTA_FILE)
    run.copy(changed_weights(run.model, made.edit), results.EDITED_WEIGHTS_FILE)
    note = run.parameters.settings_note(run.model.model.id, run.model.model.shape)
    described = describe_edit(made, results.TARGETS_FILE, results.REQUESTS_FILE, note)
    if run.earlier is not None:
        described["upon"] = run.earlier.sha256
    run.write_json(results.EDIT_FILE, described)
