"""Step 8: write the report and log the run to MLflow.

Results: `report/` and `timings.json`.
"""

from __future__ import annotations

from flows.command.parameters import Parameters
from flows.command.script import console
from flows.service.dvc_lock import origin
from flows.service.step import Run, step
from memit.errors import UnreachableError
from tasks.engine.results import STEPS, read_timings
from tasks.report import write_report
from tasks.reporting.tracking import Experiment, ParentRun, log_run, tracking_uri


@step("report", reads=STEPS[:-1])
def report(run: Run) -> None:
    """Draw, tabulate and log the results of the other steps."""
    timings = read_timings(STEPS[:-1])
    write_report(timings)
    experiment = Experiment(
        experiment=run.parameters.report.experiment,
        parameters=run.parameters.model_dump(include=set(STEPS)),
        manifests=run.given,
        timings=timings,
        tags=origin(run.parameters, run.given),
    )
    log(run.parameters, experiment)


def log(parameters: Parameters, run: Experiment | ParentRun) -> None:
    """Log to MLflow. If its store cannot be reached, a warning is printed and the run goes on."""
    try:
        log_run(run, tracking_uri(parameters.report.tracking_uri))
    except UnreachableError as error:
        console.print(f"[yellow]warning:[/] {error}")
