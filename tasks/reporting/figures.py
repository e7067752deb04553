"""The figures of the report, drawn from the result files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

matplotlib.use("agg")

from matplotlib import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER = "#9aa5b1", "#2f6f9f"
SHOWN = ("score", "efficacy", "paraphrase", "neighborhood")


def draw_metrics(metrics: Mapping[str, Any], path: Path) -> None:
    """Success before and after the edit, side by side."""
    before, after = metrics["before"], metrics["after"]
    names = [name for name in SHOWN if name in after]
    figure, axes = _figure("Success before and after the edit")
    for offset, label, state, color in (
        (-0.2, "before", before, BEFORE),
        (0.2, "after", after, AFTER),
    ):
        heights = [state.get(name, 0.0) for name in names]
        bars = axes.bar(
            [place + offset for place in range(len(names))], heights, 0.38, label=label, color=color
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("percent")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def draw_updates(edit: Mapping[str, Any], path: Path) -> None:
    """How large the update of each layer is, and what is left to do in front of it."""
    layers = [str(layer) for layer in edit["layers"]]
    figure, axes = _figure("What was added to each layer")
    bars = axes.bar(layers, [100 * edit["update_ratio"][layer] for layer in layers], color=AFTER)
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    axes.set_xlabel("layer")
    axes.set_ylabel("‖Δ‖ / ‖W‖, percent")
    axes.margins(y=0.15)
    right = axes.twinx()
    residuals = [edit["residuals"][layer] for layer in layers]
    right.plot(layers, residuals, "o-", color="#c2571a", label="residual before the update")
    right.set_ylabel("mean ‖z − h‖ at the last layer", color="#c2571a")
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)
    _save(figure, path)


def draw_losses(losses: np.ndarray, path: Path) -> None:
    """The loss of the target optimisation (edits × evaluations, NaN after an edit has stopped)."""
    figure, axes = _figure("Optimising the targets")
    steps, middle, low, high = loss_curve(losses)
    axes.fill_between(steps, low, high, color=AFTER, alpha=0.2, label="middle 80 % of the edits")
    axes.plot(steps, middle, color=AFTER, label="median")
    axes.set_yscale("log")
    axes.set_xlabel("evaluation")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    _save(figure, path)


def loss_curve(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Evaluation, median, 10th and 90th percentile; an edit that stopped keeps its last loss."""
    filled = losses.copy()
    for column in range(1, filled.shape[1]):
        gone = np.isnan(filled[:, column])
        filled[gone, column] = filled[gone, column - 1]
    low, middle, high = np.percentile(filled, (10, 50, 90), axis=0)
    return np.arange(1, losses.shape[1] + 1), middle, low, high


def _figure(title: str) -> tuple[Figure, Axes]:
    figure, axes = pyplot.subplots(figsize=(7.0, 3.8), dpi=150, layout="constrained")
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    # No date and no version inside, so that equal figures have equal bytes.
    figure.savefig(path, format="png", metadata={"Software": None})
    pyplot.close(figure)
