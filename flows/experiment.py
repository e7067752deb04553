"""Chains of steps: the whole experiment, and the comparisons with the steps that they need.

Steps and pieces that are unchanged come from caches.
"""

from __future__ import annotations

import csv
import shlex
import shutil
import time
from collections.abc import Sequence

from prefect import Flow
from prefect.artifacts import create_table_artifact
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from flows.command.checks import check_comparison, check_inputs, check_list, check_scaling
from flows.command.limits import check_limits
from flows.command.parameters import Parameters
from flows.command.script import console, output
from flows.compare import compare
from flows.edit import edit
from flows.evaluation import evaluation
from flows.model import model
from flows.prefixes import prefixes
from flows.report import report
from flows.requests import requests
from flows.scaling import scaling
from flows.service.dvc_lock import commit_stages
from flows.service.step import chain
from flows.statistics import statistics
from flows.targets import targets
from flows.tune import tune
from memit.redaction import one_line
from tasks.engine.artifacts import remove_leftovers
from tasks.engine.results import ANSWERS_FILE, EDIT_FILE, METRICS_FILE, PAGE_FILE, STEPS
from tasks.report import read_facts, rows
from tasks.reporting.formats import STRICT_LEGEND, read_json
from tasks.reporting.verdict import DAMAGE, verdict

Step = Flow[[Parameters], None]
KINDS = {"rewrite": "edited", "paraphrase": "in other words", "neighborhood": "stays"}


@chain("experiment", check_list)
def experiment(parameters: Parameters) -> None:
    """Run all steps, record their results in dvc.lock, and print a summary."""
    remove_leftovers()
    started = time.monotonic()
    steps = (model, requests, prefixes, statistics, targets, edit, evaluation)
    run_steps(steps, parameters, of=len(STEPS))
    # The report names the digest of dvc.lock, so the others are recorded there before.
    commit_stages(parameters, STEPS[:-1])
    run_steps([report], parameters, first=len(STEPS), of=len(STEPS))
    commit_stages(parameters, STEPS[-1:])
    create_table_artifact(key="results", table=rows(read_json(METRICS_FILE)))
    show_results(time.monotonic() - started)
    check_limits(parameters.limits)


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


def show_results(seconds: float) -> None:
    """Print the table of results and where to look next."""
    metrics = read_json(METRICS_FILE)
    edit = metrics["edit"]
    table = Table(
        title=f"{edit['count']} edits in layers {', '.join(map(str, edit['layers']))}",
        title_justify="left",
        caption=f"{metrics['after']['records']} records, {seconds:.0f} s",
        caption_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("", "before", "after", "strict\nbefore", "strict\nafter"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("")
    for row in rows(metrics):
        table.add_row(*row.values())
    output.print()
    output.print(table)
    output.print(STRICT_LEGEND, style="dim")
    output.print(answers_table())
    output.print()
    for sentence in verdict(read_facts(), read_json(EDIT_FILE), metrics):
        style = "bold red" if sentence.startswith(DAMAGE) else ""
        output.print(Text(f"• {one_line(sentence)}", style=style))
    with open(ANSWERS_FILE, encoding="utf-8", newline="") as file:
        prompt = next(csv.DictReader(file))["prompt"]
    console.print("\nWhere to look next:")
    for meaning, command in (
        ("what became of each fact", f"{PAGE_FILE} in a browser"),
        ("all experiments", _command("ui")),
        ("how both models go on", _command("ask", prompt)),
    ):
        console.print(Text.assemble(f"  {meaning:<25}", (command, "bold")), soft_wrap=True)


def _command(name: str, prompt: str = "") -> str:
    """How a command is typed in this shell: `memit` itself is there in an active environment."""
    if shutil.which("memit"):
        return f"memit {name} {shlex.quote(prompt)}" if prompt else f"memit {name}"
    in_make = shlex.quote(prompt.replace("$", "$$"))
    return f"make {name} PROMPT={in_make}" if prompt else f"make {name}"


def answers_table() -> Table:
    """What both models say to prompts of some facts."""
    table = Table(title="What the model says", title_justify="left")
    for name in ("", "prompt", "before", "after"):
        table.add_column(name, overflow="fold")
    for row in csv.DictReader(ANSWERS_FILE.read_text(encoding="utf-8").splitlines(True)):
        if row["kind"] == "rewrite" and table.row_count:
            table.add_section()
        answers = (row[f"answer_{state}"].strip() for state in ("before", "after"))
        table.add_row(KINDS[row["kind"]], *map(Text, map(one_line, (row["prompt"], *answers))))
    return table
