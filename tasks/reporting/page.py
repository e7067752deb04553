"""The page of the report: what became of every fact, in one HTML file that needs no network.

Words and layout are in `page.html`, `page.css` and `page.js`; here is what they show. Equal results
give equal bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from memit.evaluation.counterfact import is_right, record_means
from memit.redaction import redacted
from memit.requests import Record
from tasks.engine.loaded_model import ModelFiles
from tasks.reporting.figures import ACCENT, AFTER, BEFORE, INK

WORST = 15
"""Neighbours that are shown as the worst."""
TEXTS = 24
"""Records of which a generated text is shown."""
RELATIONS = 30
"""Relations that are shown, the commonest first."""
COLORS = {BEFORE: "before", AFTER: "after", ACCENT: "accent", INK: "muted"}
"""Colours of the figures, and the page's names for them; they follow its light or dark mode."""


@dataclass(frozen=True)
class Results:
    """What the page shows, as the steps have left it."""

    metrics: Mapping[str, Any]
    edit: Mapping[str, Any]
    """The content of `edit.json`."""
    model: ModelFiles
    records: Sequence[Record]
    prompts: pyarrow.Table
    """Every scored prompt, before and after the edit."""
    texts: pyarrow.Table
    """Every generated text, before and after the edit."""
    parameters: Mapping[str, Any]
    """The sections of `params.yaml`."""
    provenance: Mapping[str, str]
    """What the results come from: digests, the code's commit, versions."""
    figures: Mapping[str, str]
    """SVGs by the names that the template has for them."""


def render(results: Results) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = _prompts(results.prompts)
    return environment.get_template("page.html").render(
        results=results,
        facts=_facts(results, rows),
        worst=_worst(rows),
        relations=_relations(results),
        texts=_texts(results),
        settings=redacted(yaml.safe_dump(results.parameters, sort_keys=False, allow_unicode=True)),
        figures={name: _inlined(svg) for name, svg in results.figures.items()},
    )


def _prompts(table: pyarrow.Table) -> list[dict[str, Any]]:
    """The scored prompts with both answers, both margins, and what became of them."""
    rows = table.to_pylist()
    for row in rows:
        was, now = (_state(row, state) for state in ("before", "after"))
        row |= {"was": _answer(was), "now": _answer(now), "outcome": _outcome(was, now)}
        row |= {"margin_before": _margin(was), "margin_after": _margin(now)}
    return rows


def _state(row: Mapping[str, Any], state: str) -> dict[str, Any]:
    return {name.removesuffix(f"_{state}"): value for name, value in row.items()}


def _answer(row: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The object that the model gives or else prefers, and whether it gives it (argmax)."""
    if row["hit_new"] or row["hit_true"]:
        return row["target_new" if row["hit_new"] else "target_true"], True
    if row["nll_true"] is None:
        return None, False
    return row["target_new" if row["nll_new"] < row["nll_true"] else "target_true"], False


def _margin(row: Mapping[str, Any]) -> float | None:
    """nll of the unwanted object less that of the wanted one, in nats per token."""
    if row["nll_true"] is None:
        return None
    margin = row["nll_true"] - row["nll_new"]
    return -margin if row["kind"] == "neighborhood" else margin


def _outcome(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A word for what the edit did to a prompt; the page explains and colours it."""
    if now["kind"] != "neighborhood":
        return "took" if now["hit_new"] else "preferred" if is_right(now) else "missed"
    if now["nll_true"] is None:
        return "unknown"
    if is_right(was):
        return "kept" if is_right(now) else "hurt"
    return "mended" if is_right(now) else "wrong"


def _facts(results: Results, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each record with its prompts, in the order of the case ids."""
    of_case: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        of_case.setdefault(row["case_id"], []).append(row)
    dropped = {edit["case_id"]: edit["reason"] for edit in results.edit["dropped"]}
    return [
        _fact(record, of_case[record.case_id], dropped.get(record.case_id))
        for record in sorted(results.records, key=lambda record: record.case_id)
    ]


def _fact(record: Record, rows: Sequence[dict[str, Any]], dropped: str | None) -> dict[str, Any]:
    rewrite, *others = rows
    outcomes = [row["outcome"] for row in others]
    paraphrases = [row["outcome"] for row in others if row["kind"] == "paraphrase"]
    before, after = record.request.prompt.split("{}")
    return {
        "case": record.case_id,
        "request": record.request,
        "prompt": (before, record.request.subject, after),
        "rewrite": rewrite,
        "others": others,
        "outcome": "dropped" if dropped else rewrite["outcome"],
        "dropped": dropped,
        "paraphrases": len(paraphrases),
        "paraphrases_right": len(paraphrases) - paraphrases.count("missed"),
        "neighbors": len(outcomes) - len(paraphrases) - outcomes.count("unknown"),
        "neighbors_right": outcomes.count("kept") + outcomes.count("mended"),
        "hurt": outcomes.count("hurt"),
    }


def _worst(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The neighbours whose true object has lost most of its margin."""
    known = [row for row in rows if row["kind"] == "neighborhood" and row["outcome"] != "unknown"]
    lost = sorted(known, key=lambda row: row["margin_after"] - row["margin_before"])
    return [row for row in lost[:WORST] if row["margin_after"] < row["margin_before"]]


def _relations(results: Results) -> list[dict[str, Any]]:
    """Success after the edit, by relation or, where a record names none, by prompt."""
    ordered = sorted(results.records, key=lambda record: record.case_id)
    names = np.array([r.request.relation_id or r.request.prompt for r in ordered])
    columns = [name.removesuffix("_after") for name in results.prompts.column_names]
    means = record_means(results.prompts.rename_columns(columns))
    found, counts = np.unique(names, return_counts=True)
    order = np.lexsort((found, -counts))[:RELATIONS]
    return [
        {"name": str(name), "count": int(count)}
        | {metric: _mean(values[names == name]) for metric, values in means.items()}
        for name, count in zip(found[order], counts[order], strict=True)
    ]


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _texts(results: Results) -> list[dict[str, Any]]:
    """The first text of each of the first records, cut where one of its objects stands."""
    requests = {record.case_id: record.request for record in results.records}
    first = {row["case_id"]: row for row in reversed(results.texts.to_pylist())}
    shown = [first[case] for case in sorted(first)[:TEXTS]]
    for row in shown:
        request = requests[row["case_id"]]
        objects = [name for name in (request.target_new, request.target_true) if name]
        pattern = f"({'|'.join(map(re.escape, sorted(objects, key=len, reverse=True)))})"
        row |= {"new": request.target_new, "true": request.target_true}
        for state in ("before", "after"):
            row[state] = re.split(pattern, row[f"text_{state}"].removeprefix(row["prompt"]))
    return shown


def _inlined(svg: str) -> str:
    """A figure as a part of the page: without prologue and names, in the page's colours."""
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    svg = re.sub(r' (xmlns(:xlink)?|version|width="[\d.]+pt" height)="[^"]*"', "", svg, count=4)
    svg = re.sub(r" font-family: [^;]*;|<style.*?</style>", "", svg, flags=re.DOTALL)
    for color, name in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", svg)
