"""The page of the report: what became of every fact, in one HTML file that needs no network.

Words and layout are in `page.html`, `page.css` and `page.js`; here is what they show. Equal results
give equal bytes.
"""

import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import yaml
from jinja2 import Environment, FileSystemLoader

from memit.evaluation.counterfact import means_by_record, record_means
from memit.redaction import redacted
from memit.requests import Record
from tasks.engine.loaded_model import ModelFiles
from tasks.reporting.figures import ACCENT, AFTER, BEFORE, INK, margins
from tasks.reporting.formats import digits, measured
from tasks.reporting.labels import editor_label

FACTS, WORST, TEXTS, RELATIONS = 2000, 15, 24, 30
"""The most facts, neighbours, generated texts and relations that are shown."""
STATES = ("before", "after")
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
    facts: pyarrow.Table
    """The content of `facts.csv`."""
    kept: pyarrow.Table
    """The content of `kept.csv`."""
    texts: pyarrow.Table
    """Every generated text, before and after the edit."""
    said: Sequence[Mapping[str, str]]
    """The content of `generated.csv`."""
    parameters: Mapping[str, Any]
    """The sections of `params.yaml`."""
    provenance: Mapping[str, str]
    """The code's commit as `code`, versions, and digests."""
    figures: Mapping[str, str]
    """SVGs by the names that the template has for them."""
    verdict: Sequence[str]
    """Sentences about the run."""


def render(results: Results) -> str:
    """The page."""
    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters["shell"] = shlex.quote
    rows = _prompts(results.prompts) + list(_kept_prompts(results))
    relations = _relations(results)
    return pages.get_template("page.html").render(
        results=results,
        editor=editor_label(results.edit),
        measured=measured(results.metrics),
        digits=digits,
        facts=_facts(results, rows)[:FACTS],
        worst=_worst(rows),
        relations=relations[:RELATIONS],
        more_relations=len(relations) > RELATIONS,
        texts=_texts(results),
        settings=redacted(yaml.safe_dump(results.parameters, sort_keys=False, allow_unicode=True)),
        figures={name: _inlined(svg) for name, svg in results.figures.items()},
    )


def _prompts(table: pyarrow.Table) -> list[dict[str, Any]]:
    """The scored prompts with answers and margins in both states, and what became of them."""
    rows = table.to_pylist()
    for state in STATES:
        for row, margin in zip(rows, margins(table, state).tolist(), strict=True):
            row |= {f"margin_{state}": margin, f"answer_{state}": _answer(row, state)}
    return [row | {"outcome": _outcome(row)} for row in rows]


def _kept_prompts(results: Results) -> Iterator[dict[str, Any]]:
    """The prompts whose answers must stay, in the form of scored ones."""
    objects = {record.case_id: record.request.target_new for record in results.records}
    for row in results.kept.to_pylist():
        answers = {f"answer_{state}": (row[f"answer_{state}"], True) for state in STATES}
        margin = {f"margin_{state}": math.nan for state in STATES}
        outcome = {"kind": "kept", "outcome": "begins" if row["same_token"] else "hurt"}
        if row["same_answer"]:
            outcome["outcome"] = "kept"
        yield row | answers | margin | outcome | {"target_new": objects[row["case_id"]]}


def _answer(row: Mapping[str, Any], state: str) -> tuple[str | None, bool]:
    """The object that the model gives or else prefers, and whether it gives it (argmax)."""
    new, true = row["target_new"], row["target_true"]
    if row[f"hit_new_{state}"] or row[f"hit_true_{state}"]:
        return new if row[f"hit_new_{state}"] else true, True
    if true is None:
        return None, False
    return new if row[f"nll_new_{state}"] < row[f"nll_true_{state}"] else true, False


def _outcome(row: Mapping[str, Any]) -> str:
    """A word for what the edit did to a prompt; the page explains and colours it."""
    was, now = row["margin_before"] > 0, row["margin_after"] > 0
    if row["kind"] != "neighborhood":
        return "took" if row["hit_new_after"] else "preferred" if now else "missed"
    if row["target_true"] is None:
        return "unknown"
    return (("wrong", "mended"), ("hurt", "kept"))[was][now]


def _facts(results: Results, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `facts.csv`, each with its request and its prompts, in the order of case ids."""
    prompts: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        prompts.setdefault(row["case_id"], []).append(row)
    records = {record.case_id: record for record in results.records}
    said: dict[int, list[Mapping[str, str]]] = defaultdict(list)
    for answer in results.said:
        said[int(answer["case_id"])].append(answer)
    dropped = {edit["case_id"]: edit["reason"] for edit in results.edit["dropped"]}
    return [
        fact
        | {"request": records[case].request, "origin": records[case].origin}
        | {"prompts": prompts[case], "said": said[case], "dropped": dropped.get(case)}
        | {"outcome": "dropped" if case in dropped else prompts[case][0]["outcome"]}
        for fact in sorted(results.facts.to_pylist(), key=itemgetter("case_id"))
        for case in (fact["case_id"],)
    ]


def _worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The neighbours whose true object has lost most of its margin, and the prompts of a user's own
    facts whose answers have changed most."""
    neighbors = [row for row in rows if row["kind"] == "neighborhood"]
    known = {(row["prompt"], row["target_new"]): row for row in neighbors}  # records share some
    lost = [row for row in known.values() if row["margin_after"] < row["margin_before"]]
    changed = [row for row in rows if row["kind"] == "kept" and row["outcome"] == "hurt"]
    ordered = sorted(lost, key=lambda row: row["margin_after"] - row["margin_before"])
    ordered += sorted(changed, key=lambda row: -(row["divergence"] or 0.0))
    return ordered[:WORST]


def _relations(results: Results) -> list[dict[str, Any]]:
    """Success after the edit, by relation or, where a record names none, by prompt; the commonest
    first."""
    ordered = sorted(results.records, key=lambda record: record.case_id)
    relations = [record.request.relation_id or record.request.prompt for record in ordered]
    names, counts = np.unique(relations, return_counts=True)
    table = pyarrow.table({"case_id": relations})  # to average over records as over prompts
    columns = [name.removesuffix("_after") for name in results.prompts.column_names]
    failed = [one["case_id"] for one in results.edit["dropped"]]
    metrics = record_means(results.prompts.rename_columns(columns), failed)
    means = {metric: means_by_record(table, values) for metric, values in metrics.items()}
    found = [
        {"name": name, "count": counts[index]} | {key: of[index] for key, of in means.items()}
        for index, name in enumerate(names.tolist())
    ]
    return sorted(found, key=lambda row: -row["count"])


def _texts(results: Results) -> list[dict[str, Any]]:
    """The first text of each of the first records, cut where one of its objects stands."""
    requests = {record.case_id: record.request for record in results.records}
    first = {row["case_id"]: row for row in reversed(results.texts.to_pylist())}
    shown = [first[case] | {"request": requests[case]} for case in sorted(first)[:TEXTS]]
    for row in shown:
        objects = filter(None, (row["request"].target_new, row["request"].target_true))
        pattern = "|".join(re.escape(name) for name in sorted(objects, key=len, reverse=True))
        for state in STATES:
            row[state] = re.split(f"({pattern})", row[f"text_{state}"].removeprefix(row["prompt"]))
    return shown


def _inlined(svg: str) -> str:
    """A figure as a part of the page: without prologue and names, in the page's colours."""
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    svg = re.sub(r' (xmlns(:xlink)?|version|width="[\d.]+pt" height)="[^"]*"', "", svg, count=4)
    svg = re.sub(r" font-family: [^;]*;|<style.*?</style>", "", svg, flags=re.DOTALL)
    for color, name in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", svg)
