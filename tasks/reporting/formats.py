"""Reading JSON results; the rows of tables; Markdown and CSV tables."""

import csv
import io
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.reporting.labels import OWN

ABSENT = "–"
"""The cell of a metric that was not measured."""
ROWS = (
    ("score", "Score S", "harmonic mean of ES, PS, NS"),
    ("efficacy", "Efficacy ES", "new object, edited prompts"),
    ("paraphrase", "Paraphrase PS", "new object, other wordings"),
    ("neighborhood", "Neighborhood NS", "true object, other subjects"),
    ("kept", "Kept", "unedited answers, your neighbors"),
    ("kept_divergence", "Kept, KL", "of the next token, nats"),
    ("generated_efficacy_contains", "Efficacy, generated", "new object in its own text"),
    ("generated_efficacy_exact", "Efficacy, generated exactly", "nothing else in its own text"),
    ("generated_paraphrase_contains", "Paraphrase, generated", "the same, other wordings"),
    ("generated_neighborhood", "Neighborhood, generated", "the same text as before"),
    ("entropy", "Fluency GE", "entropy of texts; a fall is repetition"),
    ("reference", "Consistency RS", "similarity to texts about the new object"),
    ("perplexity", "Perplexity", "of held-out text; a rise is damage"),
    ("drift", "Drift", "KL of next tokens there, nats"),
)
"""The metrics of the report and of MLflow: each one's key, its name in tables, its meaning."""
IN_NATS = ("drift", "kept_divergence")
"""Metrics of small numbers."""
STRICT = "_accuracy"
"""What the key of a metric ends in where the model must say the object, not only prefer it."""
STRICT_LEGEND = (
    "Strict: the model says the whole object (argmax); otherwise it prefers it to the other one. "
    "Kept: its next token is the same; strictly, its whole answer."
)


def of_known_facts(metrics: Mapping[str, Any]) -> bool:
    """Whether only facts that the model knew were edited, so that S does not compare with that of
    other choices of facts."""
    return "known_share" in metrics.get("requests", {})


def measured(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Those of `ROWS`, and the user's own metrics, that were measured before and after."""
    before, after = metrics["before"], metrics["after"]
    own = [key for key in after if re.fullmatch(rf"{OWN}(?!.*_(low|high)$).*", key)]
    rows = (*ROWS, *((key, key.removeprefix(OWN), "of your own file") for key in own))
    return [row for row in rows if row[0] in before and row[0] in after]


def digits(key: str) -> int:
    """Digits after the point of a metric in tables."""
    return 4 if key in IN_NATS else 2


def rows(metrics: Mapping[str, Any], *, intervals: bool = False) -> list[dict[str, str]]:
    """Name, values and meaning of each metric that was measured: lenient beside strict."""
    known = " (known facts)" if of_known_facts(metrics) else ""
    return [
        {
            "metric": name + (known if key == "score" else ""),
            **{state: _value(metrics[state], key) for state in ("before", "after")},
            **({"95% interval": _interval(metrics["after"], key)} if intervals else {}),
            **{f"strict {at}": _value(metrics[at], key + STRICT) for at in ("before", "after")},
            "meaning": meaning,
        }
        for key, name, meaning in measured(metrics)
    ]


def _value(metrics: Mapping[str, float], key: str) -> str:
    return f"{metrics[key]:.{digits(key)}f}" if key in metrics else ABSENT


def _interval(metrics: Mapping[str, float], key: str) -> str:
    low, high = (metrics.get(f"{key}_{end}") for end in ("low", "high"))
    return ABSENT if low is None else f"{low:.{digits(key)}f} to {high:.{digits(key)}f}"


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
