"""Chains of steps: the whole experiment, and the comparisons with the steps that they need.

Steps and pieces that are unchanged come from caches.
"""

import time
from collections.abc import Sequence

from prefect import Flow, get_run_logger
from prefect.artifacts import create_table_artifact

from flows.command.checks import check_comparison, check_inputs, check_list, check_scaling
from flows.command.limits import check_limits
from flows.command.parameters import Parameters
from flows.command.script import console
from flows.compare import compare
from flows.edit import edit
from flows.evaluation import evaluation
from flows.history import history
from flows.model import model
from flows.prefixes import prefixes
from flows.report import report, show_results
from flows.requests import requests
from flows.scaling import scaling
from flows.service.dvc_lock import commit_stages, users_files
from flows.service.step import chain
from flows.statistics import statistics
from flows.targets import targets
from flows.tune import tune
from tasks.engine.artifacts import remove_leftovers
from tasks.engine.results import EDIT_FILE, METRICS_FILE, STEPS
from tasks.report import read_facts
from tasks.reporting.formats import read_json, rows
from tasks.reporting.verdict import verdict

Step = Flow[[Parameters], None]


@chain("experiment", check_list)
def experiment(parameters: Parameters) -> None:
    """Run all steps, record their results in dvc.lock, and print a summary."""
    remove_leftovers()
    started, read = time.monotonic(), users_files(parameters)
    steps = (model, requests, prefixes, statistics, targets, edit, evaluation)
    run_steps(steps, parameters, of=len(STEPS))
    # The report names the digest of dvc.lock, so the others are recorded there before.
    is_recorded = commit_stages(parameters, STEPS[:-1], read)
    run_steps([report], parameters, first=len(STEPS), of=len(STEPS))
    if is_recorded:
        commit_stages(parameters, STEPS[-1:], read)
    metrics = read_json(METRICS_FILE)
    create_table_artifact(key="results", table=rows(metrics), description="before and after")
    for sentence in verdict(read_facts(), read_json(EDIT_FILE), metrics):
        get_run_logger().info("%s", sentence)
    show_results(time.monotonic() - started)
    check_limits(parameters.limits)
    if parameters.edit.history is not None:
        history(parameters)


@chain("comparison", check_comparison)
def comparison(parameters: Parameters) -> None:
    """All methods on the same model and the same records: the table in `comparison/`."""
    run_steps((model, prefixes, statistics, compare), parameters, of=4)


@chain("scaling-run", check_scaling)
def scaling_run(parameters: Parameters) -> None:
    """All methods on more and more edits: table and figure in `scaling/`."""
    run_steps((model, prefixes, statistics, scaling), parameters, of=4)


@chain("tuning", check_inputs)
def tuning(parameters: Parameters) -> None:
    """Settings for the model: the trials and the preset in `tuning/`."""
    run_steps((model, prefixes, tune), parameters, of=3)


def run_steps(steps: Sequence[Step], parameters: Parameters, *, of: int, first: int = 1) -> None:
    """Run steps and print how long each took; `first` is the number of the first one."""
    for number, step in enumerate(steps, first):
        before = time.monotonic()
        step(parameters)
        seconds = time.monotonic() - before
        console.print(f"[green]✓[/] {number}/{of} {step.name:<12} {seconds:7.1f} s")
        get_run_logger().info("%d/%d %s: %.1f s", number, of, step.name, seconds)
