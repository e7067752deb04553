"""Step 8: write the report and log the run to MLflow.

Results: `report/` and `timings.json`. Of `report/`, `index.html` is the page to read first.
"""

from __future__ import annotations

import platform

from prefect.artifacts import create_link_artifact

from flows.command.limits import beyond_limits
from flows.command.parameters import Parameters
from flows.command.script import console
from flows.service.dvc_lock import origin
from flows.service.step import Run, step
from memit.errors import UnreachableError
from tasks.engine.code import library_versions
from tasks.engine.results import PAGE_FILE, STEPS, read_timings, remember_run
from tasks.report import write_report
from tasks.reporting.tracking import Experiment, ParentRun, code_commit, log_run, tracking_uri


@step("report", reads=STEPS[:-1])
def report(run: Run) -> None:
    """Draw, tabulate and log the results of the other steps."""
    timings = read_timings(STEPS[:-1])
    provenance = {"code": code_commit(), "python": platform.python_version()}
    provenance |= library_versions()
    for manifest in run.given.values():
        provenance |= manifest.files
    settings = run.parameters.model_dump(mode="json", include=set(STEPS))  # as in params.yaml
    write_report(timings, settings, provenance)
    page = PAGE_FILE.absolute()
    create_link_artifact(page.as_uri(), str(page), key="report", description="what the edit did")
    experiment = Experiment(
        experiment=run.parameters.report.experiment,
        parameters=run.parameters.model_dump(include=set(STEPS)),
        manifests=run.given,
        timings=timings,
        tags=origin(run.parameters, run.given),
        beyond=beyond_limits(run.parameters.limits),
    )
    log(run.parameters, experiment)
    remember_run(run.given, run.parameters.requests.origin)


def log(parameters: Parameters, run: Experiment | ParentRun) -> None:
    """Log to MLflow. If its store cannot be reached, a warning is printed and the run goes on."""
    try:
        log_run(run, tracking_uri(parameters.report.tracking_uri))
    except UnreachableError as error:
        console.print(f"[yellow]warning:[/] {error}")
