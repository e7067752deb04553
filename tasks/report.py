"""The step `report`: figures, tables and timings from the results of the other steps."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as parquet
from pyarrow.csv import read_csv
from safetensors.numpy import load_file

from memit.redaction import one_line
from memit.requests import read_counterfact
from tasks.engine.artifacts import write_json, write_text
from tasks.engine.cost import Cost
from tasks.engine.loaded_model import ModelFiles
from tasks.engine.results import (
    EDIT_FILE,
    FACTS_FILE,
    FIGURES,
    GENERATIONS_FILE,
    METRICS_FILE,
    MODEL_FILE,
    PAGE_FILE,
    PROMPTS_FILE,
    REQUESTS_FILE,
    TABLE_FILE,
    TARGETS_FILE,
    TIMINGS_FILE,
)
from tasks.reporting.figures import draw_losses, draw_margins, draw_updates
from tasks.reporting.formats import ROWS, markdown_table, of_known_facts, read_json
from tasks.reporting.page import Results, render


def write_report(
    timings: Mapping[str, Cost], parameters: Mapping[str, Any], provenance: Mapping[str, str]
) -> None:
    """Draw the figures, and write the table and the page, which shows the arguments."""
    metrics, edit = read_json(METRICS_FILE), read_json(EDIT_FILE)
    prompts = parquet.read_table(PROMPTS_FILE)
    figures = {
        "margins": draw_margins(prompts),
        "losses": draw_losses(load_file(TARGETS_FILE)["losses"]),
        "updates": draw_updates(edit),
    }
    results = Results(
        metrics=metrics,
        edit=edit,
        model=ModelFiles.model_validate(read_json(MODEL_FILE)),
        records=read_counterfact(REQUESTS_FILE),
        prompts=prompts,
        facts=read_csv(FACTS_FILE),
        texts=parquet.read_table(GENERATIONS_FILE),
        parameters=parameters,
        provenance=provenance,
        figures=figures,
    )
    for path in FIGURES:
        write_text(path, figures[path.stem])
    write_text(PAGE_FILE, render(results))
    write_text(TABLE_FILE, markdown(metrics, timings, edit["dropped"]))
    write_json(TIMINGS_FILE, {step: cost.model_dump() for step, cost in timings.items()})


def rows(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """Name, before, after and meaning of each metric that was measured."""
    before, after = metrics["before"], metrics["after"]
    found = [row for row in ROWS if row[0] in before and row[0] in after]
    known = " (known facts)" if of_known_facts(metrics) else ""
    return [
        {
            "metric": name + (known if key == "score" else ""),
            "before": f"{before[key]:.2f}",
            "after": f"{after[key]:.2f}",
        }
        | {"meaning": meaning}
        for key, name, meaning in found
    ]


def escaped(text: str) -> str:
    """A data set's text, escaped for a Markdown page: neither markup nor HTML."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(one_line(text)))


def markdown(
    metrics: Mapping[str, Any],
    timings: Mapping[str, Cost],
    dropped: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The results as a Markdown page; `dropped` are edits that could not be written."""
    edit = metrics["edit"]
    lines = [
        "# Results",
        "",
        f"{edit['count']} edits in layers {', '.join(map(str, edit['layers']))}.",
        "",
    ]
    if dropped:
        lines += [
            f"{len(dropped)} more could not be written and were dropped; they count as failed in "
            "every metric of prompts:",
            "",
            *(
                f"- {escaped(edit['prompt'])} (case {edit['case_id']}): {escaped(edit['reason'])}"
                for edit in dropped
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
        *markdown_table(rows(metrics), text=(0, 3)),
        "",
        "Every fact, its neighbours and the figures: [index.html](index.html).",
        "",
        *markdown_table(costs),
    ]
    return "\n".join(lines) + "\n"
