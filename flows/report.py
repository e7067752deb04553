"""Step 8: tell of it. Figures, tables, timings, and one MLflow run for the experiment.

Results: ``report/`` and ``timings.json``.
"""

from __future__ import annotations

from flows.command.parameters import Parameters
from flows.command.script import console, given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from flows.service.dvc_lock import origin
from memit.errors import UnreachableError
from tasks.engine.results import STEPS, read_timings, upstream
from tasks.report import write_report
from tasks.reporting.tracking import Experiment, log_experiment, tracking_uri


@flow(name="report", validate_parameters=False)
def report(parameters: Parameters) -> None:
    """Draw, tabulate and log what the other steps left."""
    earlier = [step for step in STEPS if step != "report"]
    given = upstream(*earlier)
    timings = read_timings(earlier)
    write_report(timings)
    experiment = Experiment(
        name=parameters.report.experiment,
        parameters=parameters.model_dump(include=set(STEPS)),
        manifests=given,
        timings=timings,
        tags=origin(parameters, given),
    )
    try:
        log_experiment(experiment, tracking_uri(parameters.report.tracking_uri))
    except UnreachableError as error:
        console.print(f"[yellow]warning:[/] {error}")


if __name__ == "__main__":
    run_flow(report)
