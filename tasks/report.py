"""The step ``report``: figures, tables and timings from the files that the other steps left."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memit.errors import IntegrityError
from memit.redaction import one_line
from tasks.engine.artifacts import write_file, write_json, write_text
from tasks.engine.cost import Cost
from tasks.engine.results import EDIT_FILE, METRICS_FILE, REPORT_FILES, TARGETS_FILE, TIMINGS_FILE
from tasks.reporting import figures

ROWS = (
    ("score", "Score S", "harmonic mean of the next three"),
    ("efficacy", "Efficacy ES", "edited prompts prefer the new one"),
    ("paraphrase", "Paraphrase PS", "so do their paraphrases"),
    ("neighborhood", "Neighborhood NS", "others keep their true object"),
    ("efficacy_accuracy", "Efficacy, argmax", "the model would say the new object"),
    ("paraphrase_accuracy", "Paraphrase, argmax", "also to paraphrases"),
    ("neighborhood_accuracy", "Neighborhood, argmax", "and the true one of others"),
    ("entropy", "Fluency GE", "entropy of texts that it writes"),
    ("reference", "Consistency RS", "their likeness to the new object's"),
    ("perplexity", "Perplexity", "of held-out text"),
)
"""Metric, its name in tables, and what it says."""


def write_report(timings: Mapping[str, Cost]) -> None:
    """Draw the figures and write the tables."""
    metrics = read_json(METRICS_FILE)
    edit = read_json(EDIT_FILE)
    losses = read_losses(TARGETS_FILE)
    drawn_metrics, drawn_updates, drawn_losses, page = REPORT_FILES
    write_file(drawn_metrics, lambda path: figures.draw_metrics(metrics, path))
    write_file(drawn_updates, lambda path: figures.draw_updates(edit, path))
    write_file(drawn_losses, lambda path: figures.draw_losses(losses, path))
    write_text(page, markdown(metrics, timings, edit["dropped"]))
    write_json(TIMINGS_FILE, {step: cost.model_dump() for step, cost in timings.items()})


def read_json(path: Path) -> dict[str, Any]:
    """A result of an earlier step."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_losses(path: Path) -> Any:
    """Losses of the target optimisation (edits × evaluations)."""
    from safetensors.numpy import load_file

    try:
        return load_file(path)["losses"]
    except Exception as error:
        raise IntegrityError(
            f"{path} does not hold targets ({error}): run the step targets again."
        ) from error


def rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, before, after and meaning of each metric that was measured."""
    before, after = metrics["before"], metrics["after"]
    return [
        (name, f"{before[key]:.2f}", f"{after[key]:.2f}", meaning)
        for key, name, meaning in ROWS
        if key in before and key in after
    ]


def rows_by_name(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """The same with the names of the columns, as Prefect's tables want it."""
    names = ("metric", "before", "after", "what it says")
    return [dict(zip(names, row, strict=True)) for row in rows(metrics)]


def escaped(text: str) -> str:
    """A text of a data set as it is, in a Markdown page: neither markup nor HTML."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(one_line(text)))


def markdown(
    metrics: Mapping[str, Any],
    timings: Mapping[str, Cost],
    dropped: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The results as a Markdown page; ``dropped`` are edits that could not be written."""
    edit = metrics["edit"]
    lines = [
        "# Results",
        "",
        f"{edit['count']} edits in layers {', '.join(map(str, edit['layers']))}.",
        "",
        *_dropped_lines(dropped),
        "| | before | after | |",
        "|---|---:|---:|---|",
        *(f"| {' | '.join(row)} |" for row in rows(metrics)),
        "",
        "![before and after](metrics.png)",
        "![updates](updates.png)",
        "![losses](losses.png)",
        "",
        "| step | seconds | peak memory |",
        "|---|---:|---:|",
        *(
            f"| {step} | {cost.seconds:.1f} | {cost.peak_memory / 2**20:.0f} MiB |"
            for step, cost in timings.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _dropped_lines(dropped: Sequence[Mapping[str, Any]]) -> list[str]:
    if not dropped:
        return []
    return [
        f"{len(dropped)} more could not be written and were dropped; the evaluation counts them as "
        "it finds them, unedited:",
        "",
        *(
            f"- {escaped(edit['prompt'])} (case {edit['case_id']}): {escaped(edit['reason'])}"
            for edit in dropped
        ),
        "",
    ]
