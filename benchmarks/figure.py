"""The benchmark's figure: time against the oracle and against the floor."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def draw(table: Path) -> Path:
    """Draw the table of results next to it as PNG."""
    result = json.loads(table.read_text())
    rows = [row for row in result["rows"] if "speedup" in row]
    growth = [row for row in result["rows"] if row["step"].startswith("growth")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    _bars(left, rows)
    _growth(right, growth)
    figure.suptitle(f"{result['machine']['device']}, torch {result['machine']['torch']}")
    path = table.with_suffix(".png")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _bars(axes: Axes, rows: list[dict]) -> None:
    labels = [f"{row['step']}\n× {row['speedup']:.1f}" for row in rows]
    places = range(len(rows))
    colours = {"oracle": "#b0b0b0", "ours": "#2b6cb0", "floor": "#dd6b20"}
    for offset, (name, key) in enumerate(
        (("oracle", "oracle_seconds"), ("ours", "seconds"), ("floor", "floor_seconds"))
    ):
        heights = [place + 0.25 * (1 - offset) for place in places]
        values = [row.get(key, 0) for row in rows]
        axes.barh(heights, values, height=0.24, color=colours[name], label=name)
    axes.set_yticks(list(places), labels, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("each step beside the literal oracle and the machine's floor", fontsize=10)


def _growth(axes: Axes, rows: list[dict]) -> None:
    if not rows:
        axes.set_axis_off()
        return
    for step in dict.fromkeys(row["step"] for row in rows):
        chosen = [row for row in rows if row["step"] == step]
        counts = [row["count"] for row in chosen]
        each = [1000 * row["seconds"] / row["count"] for row in chosen]
        axes.plot(counts, each, marker="o", label=step.removeprefix("growth: "))
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("edits")
    axes.set_ylabel("milliseconds an edit")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("growth with the number of edits", fontsize=10)
