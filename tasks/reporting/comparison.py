"""The tables of the step `compare`: every method on the same records."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.reporting.formats import ABSENT, csv_table, escaped, markdown_table, titled
from tasks.reporting.labels import label
from tasks.reporting.published import SOURCES, Published

SUCCESS = {
    "score": "S",
    "efficacy": "ES",
    "efficacy_accuracy": "E strict",
    "paraphrase": "PS",
    "paraphrase_accuracy": "P strict",
    "neighborhood": "NS",
    "neighborhood_accuracy": "N strict",
    "neighborhood_plus": "NS+",
    "kept": "kept",
    "kept_accuracy": "kept strict",
    "entropy": "GE",
    "reference": "RS",
    "perplexity": "PPL",
    "seconds": "seconds",
}
"""Metrics of the first table with their column titles."""
REQUIRED = ("score", "efficacy", "paraphrase", "neighborhood")
"""Metrics whose columns are shown even if no method has them."""
MAGNITUDE = {f"{name}_magnitude": name for name in ("efficacy", "paraphrase", "neighborhood")}
"""Metrics of the second table with their column titles."""
LEGEND = """\
S: harmonic mean of efficacy ES, paraphrase PS and neighborhood NS success (percent of prompts on
which the desired object is preferred to the other one). Strict: the model says the whole object
(argmax, teacher-forced). NS+: neighborhood prompts that follow the edited fact. Kept: prompts of
your own facts to which the next token, strictly the whole answer, stays the unedited model's. PPL:
perplexity of held-out text. GE: entropy of generated text. RS: its similarity to reference texts.
In brackets: 95% bootstrap intervals over records. –: not supported by the records.
"""
MAGNITUDE_LEGEND = "Magnitude, the difference of exp(−nll), in percent:\n"


@dataclass(frozen=True)
class Comparison:
    """The metrics of all methods."""

    model: str
    records: int
    edits: Mapping[str, int]
    """How many of the records each method edited."""
    methods: Mapping[str, Mapping[str, float]]
    """Metrics of each method by its name; those that the data set does not support are absent."""
    exact_entropy: bool
    """Whether words were split as NLTK's `word_tokenize` does."""
    only_known: bool
    """Whether only facts that the model knew were edited."""
    published: Mapping[str, Published]
    """Published results by method, if this model was edited with as many such records."""
    notes: tuple[str, ...]
    """Remarks below the tables."""


def table_rows(comparison: Comparison) -> list[dict[str, str]]:
    """The first table, without intervals, as one dictionary per method."""
    return _rows(comparison, SUCCESS, lambda metrics, key: _number(metrics.get(key)))


def markdown(comparison: Comparison) -> str:
    """The tables as a Markdown page."""
    notes = [f"- {note}" for note in comparison.notes]
    if not comparison.exact_entropy:
        notes.append("- GE is approximate: NLTK's `punkt_tab` is missing.")
    lines = [
        f"# {comparison.records} edits of {escaped(comparison.model)}",
        "",
        *markdown_table(_rows(comparison, SUCCESS, _with_interval)),
        "",
        LEGEND,
        MAGNITUDE_LEGEND,
        *markdown_table(_rows(comparison, MAGNITUDE, _with_interval)),
        "",
        *notes,
    ]
    if comparison.published:
        source = SOURCES[comparison.records]
        lines += ["", "## Beside published numbers", "", f"Ours / {source} / difference.", ""]
        lines += markdown_table(_published_rows(comparison))
    return "\n".join(lines) + "\n"


def csv_text(comparison: Comparison) -> str:
    """All metrics as CSV, one row per method."""
    return csv_table([{"method": name, **each} for name, each in comparison.methods.items()])


def plain(comparison: Comparison) -> dict[str, Any]:
    """The metrics for `metrics.json`, without seconds, which differ between repetitions."""
    return {
        name: {key: value for key, value in metrics.items() if key != "seconds"}
        for name, metrics in comparison.methods.items()
    }


def _rows(
    comparison: Comparison,
    columns: Mapping[str, str],
    cell: Callable[[Mapping[str, float], str], str],
) -> list[dict[str, str]]:
    """A row per method, with the columns that are required or that at least one method has."""
    present = set(REQUIRED).union(*comparison.methods.values())
    return [
        {"method": _row_label(comparison, name)}
        | {
            titled(key, title, comparison.only_known): cell(metrics, key)
            for key, title in columns.items()
            if key in present
        }
        for name, metrics in comparison.methods.items()
    ]


def _published_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Our result, the published one and the difference, for the methods and metrics of both."""
    rows = []
    for name in comparison.methods:
        if name not in comparison.published or comparison.edits[name] < comparison.records:
            continue
        row = {"method": label(name)}
        for key, title in SUCCESS.items():
            ours = comparison.methods[name].get(key)
            theirs = getattr(comparison.published[name], key, None)
            if theirs is not None:
                difference = ABSENT if ours is None else f"{ours - theirs:+.1f}"
                row[title] = f"{_number(ours)} / {theirs:.1f} / {difference}"
        rows.append(row)
    return rows


def _row_label(comparison: Comparison, name: str) -> str:
    """A method's name, and how many edits it made where these are fewer than the others'."""
    edits = comparison.edits[name]
    return label(name) + (f" ({edits} edits)" if edits < comparison.records else "")


def _with_interval(metrics: Mapping[str, float], key: str) -> str:
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    interval = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
    return _number(metrics.get(key)) + interval


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}"
