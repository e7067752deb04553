"""The table and the figure of the step `scaling`: every method on growing numbers of edits."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memit.evaluation import DECIMALS
from memit.evaluation.counterfact import SCORE_OF, harmonic_mean
from tasks.reporting.figures import save_figure, set_style
from tasks.reporting.formats import ABSENT, csv_table, markdown_table, titled
from tasks.reporting.labels import LABELS, label

PANELS = (
    ("score", "Score S"),
    ("entropy", "Generation entropy GE"),
    ("seconds", "Seconds of editing"),
    ("efficacy", "Efficacy success ES"),
    ("paraphrase", "Paraphrase success PS"),
    ("neighborhood", "Neighborhood success NS"),
    ("efficacy_accuracy", "Efficacy, strict"),
    ("paraphrase_accuracy", "Paraphrase, strict"),
    ("neighborhood_accuracy", "Neighborhood, strict"),
)
"""Metrics of the table and panels of the figure."""
MARKERS = "osD^vPX*<"
COLORS = [colormaps["tab20"](shade) for shade in (*range(0, 20, 2), *range(1, 20, 2))]


@dataclass(frozen=True)
class Point:
    """One method after one number of edits of one sample."""

    method: str
    edits: int
    seed: int
    metrics: Mapping[str, float]
    """Those that the records support; `seconds` is the time of editing, and `dropped` counts
    requests that could not be written."""


@dataclass(frozen=True)
class Mean:
    """A metric over the samples of one size."""

    edits: int
    value: float
    deviation: float
    """Standard deviation over the samples; 0 for a single one."""

    def __str__(self) -> str:
        return f"{self.value:.1f}" + (f" ± {self.deviation:.1f}" if self.deviation else "")


def curve(points: Iterable[Point], method: str, metric: str) -> list[Mean]:
    """A metric over the samples of each size, where it was measured.

    Means over samples of equal size are means over all of their records. S is the harmonic mean of
    such means, since S of a single record is mostly 0.
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


def methods_of(points: Iterable[Point]) -> list[str]:
    """The methods in the order in which they were measured."""
    return list(dict.fromkeys(point.method for point in points))


def csv_text(points: Sequence[Point]) -> str:
    """All metrics as CSV, one row per method, number of edits and seed."""
    return csv_table(
        [{"method": p.method, "edits": p.edits, "seed": p.seed, **p.metrics} for p in points]
    )


def markdown(points: Sequence[Point], notes: Sequence[str], only_known: bool) -> str:
    """A table for each metric, with a row per method and a column per number of edits; `only_known`
    says whether all facts were known to the model."""
    counts = sorted({point.edits for point in points})
    lines = ["# Scaling", ""]
    for metric, title in PANELS:
        rows = []
        for method in methods_of(points):
            found = {mean.edits: str(mean) for mean in curve(points, method, metric)}
            cells = {f"{count:,}": found.get(count, ABSENT) for count in counts}
            rows.append({"edits": label(method)} | cells)
        lines += [f"**{titled(metric, title, only_known)}**", "", *markdown_table(rows), ""]
    lines += ["± is the standard deviation over samples.", ""]
    lines += [f"- {note}" for note in notes]
    return "\n".join([*lines, "", "![scaling](scaling.png)"]) + "\n"


def plain(points: Sequence[Point]) -> dict[str, dict[str, dict[str, float]]]:
    """Means by method, number of edits and metric, without seconds, for `metrics.json`."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    for point in points:
        means.setdefault(point.method, {}).setdefault(str(point.edits), {})
    for method, by_count in means.items():
        for metric, _ in PANELS:
            for mean in curve(points, method, metric) if metric != "seconds" else ():
                by_count[str(mean.edits)][metric] = round(mean.value, DECIMALS)
    return means


def draw_scaling(points: Sequence[Point], path: Path, only_known: bool) -> None:
    """Every metric against the number of edits (logarithmic), one line per method; `only_known` as
    in `markdown`."""
    measured = {metric for point in points for metric in point.metrics}
    shown = [(metric, title) for metric, title in PANELS if metric in measured]
    rows = -(-len(shown) // 3)
    figure = Figure(figsize=(11.0, 3.1 * rows + 0.5), dpi=140, layout="constrained")
    for index, (metric, title) in enumerate(shown, 1):
        axes = figure.add_subplot(rows, 3, index)
        set_style(axes, titled(metric, title, only_known))
        _draw_panel(axes, points, metric)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    save_figure(figure, path)


def _draw_panel(axes: Axes, points: Sequence[Point], metric: str) -> None:
    methods = methods_of(points)
    order = list(dict.fromkeys([*LABELS, *methods]))  # a method looks alike in every comparison
    for method in methods:
        if (method, metric) == ("unedited", "seconds"):
            continue  # 0 on a logarithmic axis
        means = curve(points, method, metric)
        index = order.index(method)
        axes.errorbar(
            [mean.edits for mean in means],
            [mean.value for mean in means],
            yerr=[mean.deviation for mean in means],
            label=label(method),
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="--" if method == "unedited" else "-",
            linewidth=2.2 if method == "memit" else 1.4,
            markersize=4,
            capsize=2,
        )
    axes.set_xscale("log")
    axes.set_xlabel("edits")
    axes.grid(axis="y", alpha=0.4)
    if metric == "seconds":
        axes.set_yscale("log")
    elif metric != "entropy":
        axes.set_ylim(-3, 103)
