"""The step ``scaling``: how each method fares as edits become more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from memit.evaluation.counterfact import SCORE_OF, harmonic_mean
from tasks.reporting.comparison import ABSENT, as_csv, as_table
from tasks.reporting.labels import DECIMALS, LABELS

PANELS = (
    ("score", "Score S"),
    ("efficacy", "Efficacy success ES"),
    ("paraphrase", "Paraphrase success PS"),
    ("neighborhood", "Neighborhood success NS"),
    ("entropy", "Generation entropy GE"),
    ("seconds", "Seconds of editing"),
)
"""Metrics of the table and panels of the figure."""
COLORS = {
    "unedited": "#8a94a0",
    "ft": "#d9a441",
    "ft_w": "#c98b2b",
    "ft_l": "#8c6d1f",
    "mend": "#7d5ba6",
    "rome": "#c2571a",
    "memit": "#2f6f9f",
    "serac": "#3f8f5f",
}
OTHER_COLORS = ("#b03a6f", "#4a4a8a", "#607d3b", "#8a4b3c")
MARKERS = "osD^vPX*<>"
LABELS_APART = 1.4
"""By what factor two labels of an axis differ at least."""


@dataclass(frozen=True)
class Point:
    """One method after one number of edits of one sample."""

    method: str
    edits: int
    seed: int
    metrics: Mapping[str, float]
    """Those that the records support; seconds are those of editing, and `dropped` counts requests
    that could not be written."""


@dataclass(frozen=True)
class Mean:
    """What the samples of one size gave."""

    edits: int
    value: float
    deviation: float
    """Standard deviation over the samples; 0 for a single one."""


def curve(points: Iterable[Point], method: str, metric: str) -> list[Mean]:
    """A metric over the samples of each size, where it was measured.

    Means over samples of equal size are means over all of their records; S is the harmonic mean
    of such means, since that of a single record is mostly 0.
    """
    samples: dict[int, list[Mapping[str, float]]] = {}
    for point in points:
        if point.method == method and metric in point.metrics:
            samples.setdefault(point.edits, []).append(point.metrics)
    return [
        Mean(
            edits,
            _pooled(found, metric),
            float(np.std([each[metric] for each in found], ddof=1)) if found[1:] else 0.0,
        )
        for edits, found in sorted(samples.items())
    ]


def _pooled(samples: Sequence[Mapping[str, float]], metric: str) -> float:
    if metric == "score":
        return harmonic_mean([_pooled(samples, part) for part in SCORE_OF])
    return float(np.mean([each[metric] for each in samples]))


def methods_of(points: Sequence[Point]) -> list[str]:
    """The methods in the order in which they were measured."""
    return list(dict.fromkeys(point.method for point in points))


def csv_text(points: Sequence[Point]) -> str:
    """All numbers, a row for each method, number of edits and seed."""
    return as_csv(
        [{"method": p.method, "edits": p.edits, "seed": p.seed, **p.metrics} for p in points]
    )


def markdown(points: Sequence[Point], notes: Sequence[str]) -> str:
    """A table for each metric: methods down, numbers of edits across."""
    counts = sorted({point.edits for point in points})
    lines = ["# Scaling", ""]
    for metric, title in PANELS:
        rows = {}
        for method in methods_of(points):
            found = {mean.edits: mean for mean in curve(points, method, metric)}
            rows[method] = [_cell(found.get(count)) for count in counts]
        table = as_table(" edits ", [f"{count:,}" for count in counts], rows)
        lines += [f"**{title}**", "", *table, ""]
    lines += ["± is the standard deviation over samples.", ""]
    lines += [f"- {note}" for note in notes]
    return "\n".join([*lines, "", "![scaling](scaling.png)"]) + "\n"


def _cell(mean: Mean | None) -> str:
    if mean is None:
        return ABSENT
    return f"{mean.value:.1f}" + (f" ± {mean.deviation:.1f}" if mean.deviation else "")


def plain(points: Sequence[Point]) -> dict[str, dict[str, dict[str, float]]]:
    """Means by method, number of edits and metric, without seconds, for ``metrics.json``."""
    return {
        method: {
            str(count): {
                metric: round(mean.value, DECIMALS)
                for metric, _ in PANELS
                if metric != "seconds"
                for mean in curve(points, method, metric)
                if mean.edits == count
            }
            for count in sorted({point.edits for point in points})
        }
        for method in methods_of(points)
    }


def draw_scaling(points: Sequence[Point], path: Path) -> None:
    """Every metric against the number of edits (logarithmic), a line for each method."""
    shown = [(metric, title) for metric, title in PANELS if _has(points, metric)]
    rows = -(-len(shown) // 3)
    figure, grid = pyplot.subplots(
        rows, 3, figsize=(11.0, 3.1 * rows + 0.5), dpi=140, layout="constrained", squeeze=False
    )
    panels = list(grid.flat)
    for axes, (metric, title) in zip(panels, shown, strict=False):
        _draw_panel(axes, points, metric, title)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    # No date and no version inside, so that equal figures have equal bytes.
    figure.savefig(path, format="png", metadata={"Software": None})
    pyplot.close(figure)


def _has(points: Sequence[Point], metric: str) -> bool:
    return any(metric in point.metrics for point in points)


def apart(counts: Iterable[int]) -> list[int]:
    """Those that can be written below a logarithmic axis side by side, from the largest down."""
    chosen: list[int] = []
    for count in sorted(counts, reverse=True):
        if not chosen or chosen[-1] >= LABELS_APART * count:
            chosen.append(count)
    return chosen[::-1]


def _draw_panel(axes: Axes, points: Sequence[Point], metric: str, title: str) -> None:
    for place, method in enumerate(methods_of(points)):
        means = curve(points, method, metric)
        if metric == "seconds" and method == "unedited":
            means = []
        axes.errorbar(
            [mean.edits for mean in means],
            [mean.value for mean in means],
            yerr=[mean.deviation for mean in means],
            label=LABELS.get(method, method),
            color=COLORS.get(method, OTHER_COLORS[place % len(OTHER_COLORS)]),
            marker=MARKERS[place % len(MARKERS)],
            linestyle="--" if method == "unedited" else "-",
            linewidth=2.2 if method == "memit" else 1.4,
            markersize=4,
            capsize=2,
            zorder=3 if method == "memit" else 2,
        )
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xscale("log")
    counts = apart({point.edits for point in points})
    axes.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=8, rotation=45)
    axes.minorticks_off()
    axes.set_xlabel("edits", fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", color="#e4e7ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if metric == "seconds":
        axes.set_yscale("log")
    elif metric != "entropy":
        axes.set_ylim(-3, 103)
