"""Step 8: write the report and log the run to MLflow.

Results: `report/` and `timings.json`. Of `report/`, `index.html` is the page to read first.
"""

import csv
import os
import platform
import shlex
import shutil
from collections.abc import Mapping, Sequence

from prefect.artifacts import create_link_artifact
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from flows.command.limits import beyond_limits
from flows.command.parameters import Parameters
from flows.command.script import console, output
from flows.service.dvc_lock import origin
from flows.service.step import Run, step
from memit.errors import UnreachableError
from memit.redaction import one_line
from tasks.engine.code import library_versions
from tasks.engine.git import commit_of
from tasks.engine.results import (
    ANSWERS_FILE,
    EDIT_FILE,
    METRICS_FILE,
    PAGE_FILE,
    STEPS,
    read_timings,
    remember_run,
)
from tasks.report import read_facts, write_report
from tasks.reporting.formats import STRICT_LEGEND, read_json, rows
from tasks.reporting.labels import edit_title
from tasks.reporting.tracking import Experiment, ParentRun, code_commit, log_run, tracking_uri
from tasks.reporting.verdict import DAMAGE, verdict

KINDS = {"rewrite": "edited", "paraphrase": "in other words", "neighborhood": "stays"}
"""Names of the kinds of prompts."""


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
    facts = run.parameters.requests.origin
    remember_run(run.given, facts, commit_of(facts))
    if "DVC_EXP_NAME" in os.environ:  # `dvc exp run` shows nothing by itself
        show_results()


def log(parameters: Parameters, run: Experiment | ParentRun) -> None:
    """Log to MLflow. If its store cannot be reached, a warning is printed and the run goes on."""
    try:
        log_run(run, tracking_uri(parameters.report.tracking_uri))
    except UnreachableError as error:
        console.print(f"[yellow]warning:[/] {error}")


def show_results(seconds: float | None = None) -> None:
    """Print the table of results, how long the run took, and where to look next."""
    metrics, edit = read_json(METRICS_FILE), read_json(EDIT_FILE)
    table = Table(
        title=edit_title(edit),
        title_justify="left",
        caption=f"{metrics['after']['records']} records"
        + (f", {seconds:.0f} s" if seconds else ""),
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
    with open(ANSWERS_FILE, encoding="utf-8", newline="") as file:
        answers = list(csv.DictReader(file))
    output.print(answers_table(answers))
    output.print()
    for sentence in verdict(read_facts(), edit, metrics):
        style = "bold red" if sentence.startswith(DAMAGE) else ""
        output.print(Text(f"• {one_line(sentence)}", style=style))
    console.print("\nWhere to look next:")
    for meaning, command in (
        ("what became of each fact", f"{PAGE_FILE} in a browser"),
        ("all experiments", _command("ui")),
        ("how both models go on", _command("ask", answers[0]["prompt"])),
    ):
        console.print(Text.assemble(f"  {meaning:<25}", (command, "bold")), soft_wrap=True)


def _command(name: str, prompt: str = "") -> str:
    """How a command is typed in this shell: `memit` itself is there in an active environment, which
    cannot be told from the PATH that make sets."""
    if shutil.which("memit") and "MAKELEVEL" not in os.environ:
        return f"memit {name} {shlex.quote(prompt)}" if prompt else f"memit {name}"
    in_make = shlex.quote(prompt.replace("$", "$$"))
    return f"make {name} PROMPT={in_make}" if prompt else f"make {name}"


def answers_table(answers: Sequence[Mapping[str, str]]) -> Table:
    """What both models say to prompts of some facts, out of `answers.csv`."""
    table = Table(title="What the model says", title_justify="left")
    for name in ("", "prompt", "before", "after"):
        table.add_column(name, overflow="fold")
    for row in answers:
        if row["kind"] == "rewrite" and table.row_count:
            table.add_section()
        said = (row[f"answer_{state}"].strip() for state in ("before", "after"))
        table.add_row(KINDS[row["kind"]], *map(Text, map(one_line, (row["prompt"], *said))))
    return table
