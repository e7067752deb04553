"""The step ``compare``: from what each method did to the table of all methods."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.reporting.labels import LABELS
from tasks.reporting.published import Published

SUCCESS = (
    ("score", "S"),
    ("efficacy", "ES"),
    ("paraphrase", "PS"),
    ("neighborhood", "NS"),
    ("neighborhood_plus", "NS+"),
    ("entropy", "GE"),
    ("reference", "RS"),
    ("perplexity", "PPL"),
    ("seconds", "seconds"),
)
"""Metric and column of the first table."""
STRICT = tuple(
    (f"{name}_{kind}", f"{short} {kind}")
    for kind in ("accuracy", "magnitude")
    for name, short in (("efficacy", "E"), ("paraphrase", "P"), ("neighborhood", "N"))
)
"""Those of the second."""
ABSENT = "–"


@dataclass(frozen=True)
class Comparison:
    """The numbers of all methods."""

    model: str
    records: int
    methods: Mapping[str, Mapping[str, float]]
    """Metrics of each method by its name; those that the data set does not support are absent."""
    exact_entropy: bool
    """Whether words were cut as NLTK's `word_tokenize` does."""
    published: Mapping[str, Published]
    """The paper's numbers by method, where it has edited this model with as many such records."""
    notes: tuple[str, ...]
    """What a reader of the table must know."""


def table_rows(comparison: Comparison) -> list[dict[str, str]]:
    """The first table as rows of texts."""
    columns = _present(comparison, SUCCESS)
    return [
        {"method": LABELS.get(name, name)}
        | {title: _number(metrics.get(key)) for key, title in columns}
        for name, metrics in comparison.methods.items()
    ]


def markdown(comparison: Comparison) -> str:
    """The tables as a Markdown page."""
    lines = [f"# {comparison.records} edits of {html.escape(comparison.model)}", ""]
    lines += _table(comparison, SUCCESS)
    lines += [
        "",
        "S: harmonic mean of efficacy ES, paraphrase PS and neighborhood NS success (percent of "
        "prompts on which the wanted object is preferred). NS+: neighborhood prompts behind the "
        "edited fact. PPL: perplexity of held-out text. GE: entropy of generated text"
        + ("" if comparison.exact_entropy else " (approximate: NLTK's `punkt_tab` is missing)")
        + ". RS: its similarity to reference texts. In brackets 95% bootstrap intervals over "
        f"records. {ABSENT}: the records do not support it.",
        "",
        "Argmax accuracy (all of the object's tokens, teacher-forced) and magnitude (difference of "
        "exp(−nll)), in percent:",
        "",
    ]
    lines += _table(comparison, STRICT)
    lines += ["", *(f"- {note}" for note in comparison.notes)]
    if comparison.published:
        lines += ["", *_published_table(comparison)]
    return "\n".join(lines) + "\n"


def csv_text(comparison: Comparison) -> str:
    """All numbers, a row for each method."""
    return as_csv([{"method": name, **each} for name, each in comparison.methods.items()])


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under the names of all their columns; empty where a row lacks one."""
    target = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(target, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


def as_table(corner: str, titles: Iterable[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of a Markdown table with the cells of each method."""
    head = f"|{corner}| {' | '.join(titles)} |"
    lines = [head, f"|---|{'---:|' * (head.count('|') - 2)}"]
    return lines + [f"| {LABELS.get(n, n)} | {' | '.join(cells)} |" for n, cells in rows.items()]


def _table(comparison: Comparison, columns: Sequence[tuple[str, str]]) -> list[str]:
    shown = _present(comparison, columns)
    rows = {
        name: [_with_interval(metrics, key) for key, _ in shown]
        for name, metrics in comparison.methods.items()
    }
    return as_table(" ", [title for _, title in shown], rows)


def _present(comparison: Comparison, columns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Columns that at least one method has; S, ES, PS and NS always."""
    return [
        (key, title)
        for place, (key, title) in enumerate(columns)
        if (columns is SUCCESS and place < 4)
        or any(key in metrics for metrics in comparison.methods.values())
    ]


def _with_interval(metrics: Mapping[str, float], key: str) -> str:
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    interval = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
    return _number(metrics.get(key)) + interval


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}"


def _published_table(comparison: Comparison) -> list[str]:
    """Ours, the paper's and the difference, for the methods that the paper has."""
    columns = [(key, title) for key, title in SUCCESS if _is_published(comparison, key)]
    rows = {
        name: [
            _beside(metrics.get(key), getattr(comparison.published[name], key))
            for key, _ in columns
        ]
        for name, metrics in comparison.methods.items()
        if name in comparison.published
    }
    table = as_table(" ", [title for _, title in columns], rows)
    return ["## Beside the paper's numbers", "", "Ours / the paper's / difference.", "", *table]


def _is_published(comparison: Comparison, key: str) -> bool:
    return any(getattr(each, key, None) is not None for each in comparison.published.values())


def _beside(ours: float | None, theirs: float | None) -> str:
    if ours is None or theirs is None:
        return f"{_number(ours)} / {_number(theirs)} / {ABSENT}"
    return f"{ours:.1f} / {theirs:.1f} / {ours - theirs:+.1f}"


def plain(comparison: Comparison) -> dict[str, Any]:
    """The numbers without what a repetition changes, for ``metrics.json``."""
    return {
        name: {key: value for key, value in metrics.items() if key != "seconds"}
        for name, metrics in comparison.methods.items()
    }
