"""The whole experiment: every step in turn, then DVC is told, then the results are shown.

This is what ``make run`` runs. Steps and pieces that are unchanged come from caches.
"""

from __future__ import annotations

import time

from flows.command.parameters import Parameters, deployable
from flows.command.script import console, given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()

from prefect import Flow, flow
from prefect.artifacts import create_table_artifact
from rich.table import Table

from flows.command.checks import check_inputs
from flows.edit import edit
from flows.evaluation import evaluation
from flows.model import model
from flows.prefixes import prefixes
from flows.report import report
from flows.requests import requests
from flows.service.dvc_lock import commit_stages
from flows.service.run_lock import alone
from flows.service.workers import with_runner
from flows.statistics import statistics
from flows.targets import targets
from tasks.engine.artifacts import remove_leftovers
from tasks.engine.results import METRICS_FILE, STEPS
from tasks.report import read_json, rows, rows_by_name

FLOWS = (model, requests, prefixes, statistics, targets, edit, evaluation, report)
"""The steps, in order."""


@flow(name="experiment", validate_parameters=False)
@deployable
@alone()
@with_runner
def experiment(parameters: Parameters) -> None:
    """Run all steps and show what came out."""
    check_inputs(parameters)
    remove_leftovers()
    started = time.monotonic()
    for number, step in enumerate(FLOWS, 1):
        if step is report:
            # The report names the digest of dvc.lock, so the others are entered there before.
            commit_stages(parameters, [name for name in STEPS if name != "report"])
        run_step(step, parameters, f"{number}/{len(FLOWS)}")
    commit_stages(parameters, ["report"])
    create_table_artifact(key="results", table=rows_by_name(read_json(METRICS_FILE)))
    show_results(time.monotonic() - started)


def run_step(step: Flow[[Parameters], None], parameters: Parameters, place: str) -> None:
    """Run a step and say how long it took; ``place`` is where it stands among the others."""
    before = time.monotonic()
    step(parameters)
    console.print(f"[green]✓[/] {place} {step.name:<12} {time.monotonic() - before:7.1f} s")


def show_results(seconds: float) -> None:
    """Print the table of results and where to look next."""
    metrics = read_json(METRICS_FILE)
    edit = metrics["edit"]
    table = Table(
        title=f"{edit['count']} edits in layers {', '.join(map(str, edit['layers']))}",
        title_justify="left",
        caption=f"{metrics['after']['records']} records, {seconds:.0f} s",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("")
    for row in rows(metrics):
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print(
        "\nWhere to look next:\n"
        "  [bold]report/results.md[/]     with figures; evaluation/facts.csv: what became of each "
        "fact\n"
        "  [bold]make ui[/]               every experiment in MLflow, in the browser\n"
        "  [bold]dvc metrics diff[/]      what changed since the last commit\n"
        'Ask both models: [bold]memit ask "..."[/]\n'
        "Try another:     [bold]dvc exp run -S requests.count=128[/]\n"
    )


if __name__ == "__main__":
    run_flow(experiment, check_inputs)
