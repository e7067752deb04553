"""Reading JSON results; Markdown and CSV tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ABSENT = "–"
"""The cell of a metric that was not measured."""


def read_json(path: Path) -> dict[str, Any]:
    """A result of an earlier step."""
    return json.loads(path.read_text(encoding="utf-8"))


def markdown_table(rows: Sequence[Mapping[str, str]], text: Collection[int] = (0,)) -> list[str]:
    """Lines of a Markdown table. Columns whose indices are in `text` are left-aligned."""
    titles = _columns(rows)
    alignment = ["---" if index in text else "---:" for index in range(len(titles))]
    cells = [[row.get(title, ABSENT) for title in titles] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (titles, alignment, *cells)]


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A CSV table; missing values are empty."""
    target = io.StringIO()
    writer = csv.DictWriter(target, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys of all rows, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))
