"""The step `report`: figures, tables and timings from the results of the other steps."""

import csv
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
from safetensors.numpy import load_file

from memit.evaluation.counterfact import FACTS
from memit.evaluation.kept import SCHEMA as KEPT_COLUMNS
from memit.requests import read_counterfact
from tasks.engine import results
from tasks.engine.artifacts import write_json, write_text
from tasks.engine.cost import Cost
from tasks.engine.loaded_model import ModelFiles
from tasks.engine.tables import read_csv_table
from tasks.reporting.figures import draw_losses, draw_margins, draw_updates
from tasks.reporting.formats import (
    STRICT_LEGEND,
    escaped,
    markdown_table,
    read_json,
    rows,
)
from tasks.reporting.labels import edit_title
from tasks.reporting.page import Results, render
from tasks.reporting.verdict import verdict


def write_report(
    timings: Mapping[str, Cost], parameters: Mapping[str, Any], provenance: Mapping[str, str]
) -> None:
    """Draw the figures, and write the table and the page, which shows the arguments."""
    metrics, edit = results.read_metrics(), read_json(results.EDIT_FILE)
    prompts, facts = parquet.read_table(results.PROMPTS_FILE), read_facts()
    sentences = verdict(facts, edit, metrics)
    with open(results.GENERATED_FILE, encoding="utf-8", newline="") as file:
        said = list(csv.DictReader(file))
    figures = {
        "margins": draw_margins(prompts),
        "losses": draw_losses(load_file(results.TARGETS_FILE)["losses"]),
        "updates": draw_updates(edit),
    }
    shown = Results(
        metrics=metrics,
        edit=edit,
        model=ModelFiles.model_validate(read_json(results.MODEL_FILE)),
        records=read_counterfact(results.REQUESTS_FILE),
        prompts=prompts,
        facts=facts,
        kept=read_csv_table(results.KEPT_FILE, KEPT_COLUMNS),
        texts=parquet.read_table(results.GENERATIONS_FILE),
        said=said,
        parameters=parameters,
        provenance=provenance,
        figures=figures,
        verdict=sentences,
    )
    for path in results.FIGURES:
        write_text(path, figures[path.stem])
    write_text(results.PAGE_FILE, render(shown))
    write_text(results.TABLE_FILE, markdown(metrics, edit, timings, sentences))
    write_json(results.TIMINGS_FILE, {step: cost.model_dump() for step, cost in timings.items()})


def read_facts() -> pyarrow.Table:
    """The content of `facts.csv`."""
    return read_csv_table(results.FACTS_FILE, FACTS)


def markdown(
    metrics: Mapping[str, Any],
    edit: Mapping[str, Any],
    timings: Mapping[str, Cost],
    sentences: Sequence[str] = (),
) -> str:
    """The results as a Markdown page; `edit` is the content of `edit.json`, and `sentences` are
    those of `verdict`."""
    lines = [f"# {edit_title(edit)}", ""]
    if dropped := edit["dropped"]:
        lines += [
            f"{len(dropped)} more could not be written and were dropped; they count as failed in "
            "every metric of prompts:",
            "",
            *(
                f"- {escaped(one['prompt'])} (case {one['case_id']}): {escaped(one['reason'])}"
                for one in dropped
            ),
            "",
        ]
    costs = [
        {
            "step": step,
            "seconds": f"{cost.seconds:.1f}",
            "peak memory": f"{cost.peak_memory / 2**20:.0f} MiB",
        }
        for step, cost in timings.items()
    ]
    lines += [
        *markdown_table(rows(metrics, intervals=True), text=(0, 6)),
        "",
        STRICT_LEGEND,
        "",
        *(f"- {escaped(sentence)}" for sentence in sentences),
        "",
        "Every fact, its neighbours and the figures: [index.html](index.html).",
        "",
        *markdown_table(costs),
    ]
    return "\n".join(lines) + "\n"
