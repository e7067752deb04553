"""After the report: leave this batch of facts to the next one, where `edit.history` names a
directory (`memit.history`). Nothing is left by a run that did not come that far.
"""

from pathlib import Path

from flows.command.limits import check_limits
from flows.command.script import console
from flows.service.step import Run, step
from memit.errors import IntegrityError
from memit.history import keep_state
from tasks.engine.results import DELTA_FILE, EDIT_FILE
from tasks.history import sum_keys
from tasks.reporting.formats import read_json


@step("history", reads=("model", "requests", "prefixes", "edit"))
def history(run: Run) -> None:
    """Add the keys of the facts that were written to those of earlier batches, and keep both the
    sums and the delta."""
    directory, before = run.parameters.edit.history, run.history
    if directory is None:
        return
    check_limits(run.parameters.limits)  # after `memit repro` nothing else has
    edit = read_json(EDIT_FILE)
    if edit.get("upon") != (run.earlier and run.earlier.sha256):  # which DVC does not know of
        raise IntegrityError(
            f"the edit was made upon another state of {directory}: run the step edit again."
        )
    dropped = {one["case_id"] for one in edit["dropped"]}
    summed = run.compute(
        sum_keys,
        [record.request for record in run.records if record.case_id not in dropped],
        run.model,
        run.input("edit", DELTA_FILE),
        prefixes=run.prefixes,
        settings=run.hyperparameters,
        sums=run.earlier_sums,
        token_budget=run.token_budget(run.parameters.edit.token_budget, trained_blocks=0),
    )
    sums = {layer: piece.checked() for layer, piece in summed.files.items()}
    keep_state(Path(directory), before, run.batch, run.model.model.digest, DELTA_FILE, sums)
    count = len(before.batches) + 1 if before else 1
    console.print(f"{directory} holds {count} batches", soft_wrap=True, markup=False)
