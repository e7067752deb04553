"""The figures of the report, drawn from the result files alone."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BEFORE, AFTER, ACCENT, INK = "#9aa5b1", "#2f6f9f", "#c2571a", "#5a6772"
PANELS = {"rewrite": "Edited prompts", "paraphrase": "Paraphrases", "neighborhood": "Neighbours"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and in the font of the page
    "svg.hashsalt": "memit",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}


@matplotlib.rc_context(STYLE)
def draw_margins(prompts: pyarrow.Table) -> str:
    """An SVG with histograms of the margins before and after the edit."""
    kinds = np.array(prompts["kind"].to_pylist())
    found = {state: margins(prompts, state) for state in ("before", "after")}
    known = np.concatenate([values[~np.isnan(values)] for values in found.values()])
    edges = np.histogram_bin_edges(known if known.size else [-1.0, 1.0], 28)
    panels = [kind for kind in PANELS if kind in kinds]
    figure = Figure(figsize=(11.0, 2.8), layout="constrained")
    shared = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    for axes, kind in zip(shared, panels, strict=True):
        set_style(axes, PANELS[kind])
        for state, color, width in (("after", AFTER, 0), ("before", BEFORE, 1.8)):
            counts, _ = np.histogram(found[state][kinds == kind], edges)
            axes.stairs(counts, edges, fill=not width, color=color, linewidth=width, label=state)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.axvline(0, color=INK, linewidth=1, linestyle=":")
        axes.set_xlabel("margin, nats per token")
    shared[0].set_ylabel("prompts")
    shared[0].legend(frameon=False)
    return _svg(figure)


def margins(prompts: pyarrow.Table, state: str) -> np.ndarray:
    """nll of the unwanted object less that of the wanted one (prompts), in nats per token; NaN
    without a true object. `prompts` holds both states."""
    new, true = (prompts[f"nll_{target}_{state}"].to_numpy() for target in ("new", "true"))
    kinds = np.array(prompts["kind"].to_pylist())
    return np.where(kinds == "neighborhood", new - true, true - new)


@matplotlib.rc_context(STYLE)
def draw_updates(edit: Mapping[str, Any]) -> str:
    """An SVG with the relative size of each layer's update, and what it was to make up for."""
    layers = [str(layer) for layer in edit["layers"]]
    figure, axes = _single()
    ratios = [100 * edit["update_ratio"][layer] for layer in layers]
    axes.bar_label(axes.bar(layers, ratios, 0.6, color=AFTER), fmt="%.1f", padding=2, fontsize=9)
    axes.set_xlabel("layer")
    axes.set_ylabel("‖Δ‖ / ‖W‖, percent")
    axes.margins(y=0.15)
    right = axes.twinx()
    right.plot(layers, [edit["residuals"][layer] for layer in layers], "o-", color=ACCENT)
    lacking = "‖D‖" if edit["hyperparameters"]["site"] == "down_projections" else "‖z − h‖"
    right.set_ylabel(f"mean {lacking} before the update", color=ACCENT)
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def draw_losses(losses: np.ndarray) -> str:
    """An SVG with the loss of the targets (edits × evaluations, NaN after an edit has stopped)."""
    figure, axes = _single()
    steps, median, low, high = loss_curve(losses)
    axes.fill_between(steps, low, high, color=AFTER, alpha=0.2, label="middle 80 % of the edits")
    axes.plot(steps, median, color=AFTER, label="median")
    axes.set_yscale("log")
    axes.set_xlabel("evaluation")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    return _svg(figure)


def loss_curve(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Evaluation, median, 10th and 90th percentile; an edit that stopped keeps its last loss."""
    filled = losses.copy()
    for column in range(1, filled.shape[1]):
        stopped = np.isnan(filled[:, column])
        filled[stopped, column] = filled[stopped, column - 1]
    low, median, high = np.percentile(filled, (10, 50, 90), axis=0)
    return np.arange(1, losses.shape[1] + 1), median, low, high


def set_style(axes: Axes, title: str = "") -> None:
    """The style that all figures share."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without date or version, so that equal figures have equal bytes."""
    figure.savefig(path, format="png", metadata={"Software": None})


def _svg(figure: Figure) -> str:
    target, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    return target.getvalue()


def _single() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    set_style(axes)
    return figure, axes
