"""The figures of the report, drawn from the result files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BEFORE, AFTER, ACCENT = "#9aa5b1", "#2f6f9f", "#c2571a"
SHOWN = ("score", "efficacy", "paraphrase", "neighborhood")


def draw_metrics(metrics: Mapping[str, Any], path: Path) -> None:
    """Success before and after the edit, side by side."""
    names = [name for name in SHOWN if name in metrics["after"]]
    figure, axes = _single("Success before and after the edit")
    for offset, state, color in ((-0.2, "before", BEFORE), (0.2, "after", AFTER)):
        heights = [metrics[state].get(name, 0.0) for name in names]
        bars = axes.bar(np.arange(len(names)) + offset, heights, 0.38, label=state, color=color)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 112)
    axes.set_ylabel("percent")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path)


def draw_updates(edit: Mapping[str, Any], path: Path) -> None:
    """The relative size of each layer's update, and the residual before it."""
    layers = [str(layer) for layer in edit["layers"]]
    figure, axes = _single("Updates by layer")
    bars = axes.bar(layers, [100 * edit["update_ratio"][layer] for layer in layers], color=AFTER)
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    axes.set_xlabel("layer")
    axes.set_ylabel("‖Δ‖ / ‖W‖, percent")
    axes.margins(y=0.15)
    right = axes.twinx()
    right.plot(layers, [edit["residuals"][layer] for layer in layers], "o-", color=ACCENT)
    right.set_ylabel("mean ‖z − h‖ before the update", color=ACCENT)
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)
    save_figure(figure, path)


def draw_losses(losses: np.ndarray, path: Path) -> None:
    """The loss of the target optimisation (edits × evaluations, NaN after an edit has stopped)."""
    figure, axes = _single("Target optimisation")
    steps, median, low, high = loss_curve(losses)
    axes.fill_between(steps, low, high, color=AFTER, alpha=0.2, label="middle 80 % of the edits")
    axes.plot(steps, median, color=AFTER, label="median")
    axes.set_yscale("log")
    axes.set_xlabel("evaluation")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    save_figure(figure, path)


def loss_curve(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Evaluation, median, 10th and 90th percentile; an edit that stopped keeps its last loss."""
    filled = losses.copy()
    for column in range(1, filled.shape[1]):
        stopped = np.isnan(filled[:, column])
        filled[stopped, column] = filled[stopped, column - 1]
    low, median, high = np.percentile(filled, (10, 50, 90), axis=0)
    return np.arange(1, losses.shape[1] + 1), median, low, high


def set_style(axes: Axes, title: str) -> None:
    """The style that all figures share."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without date or version, so that equal figures have equal bytes."""
    figure.savefig(path, format="png", metadata={"Software": None})


def _single(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.0, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    set_style(axes, title)
    return figure, axes
