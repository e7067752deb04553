"""The figure and the mean effects of the step `tracing`."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyarrow.compute import field

from memit.evaluation import DECIMALS
from memit.tracing import KINDS, PARTS, Kind, critical_layers
from tasks.reporting.figures import ACCENT, AFTER, BEFORE, STYLE, save_figure, set_style

NORMAL_95 = 1.96
"""Half the width of a 95% interval, in standard errors."""
TITLES: dict[Kind, str] = {
    "state": "a block's output",
    "mlp": "MLP outputs around the layer",
    "severed": "a block's output, MLPs severed",
}
COLORS: dict[Kind, str] = {"state": AFTER, "mlp": ACCENT, "severed": BEFORE}


def effects(traces: pyarrow.Table) -> dict[str, Any]:
    """Mean effects at the subject's last token: what a restored state adds to the probability of
    the clean answer under noise, with the half width of its 95% interval, by kind and layer."""
    last = _last(traces)
    found = {kind: _by_layer(last, kind) for kind in KINDS}
    critical = critical_layers(found["state"][0].tolist(), found["severed"][0].tolist())
    return {
        "facts": len(set(last["case_id"].to_pylist())),
        "clean": round(float(last["clean"].to_numpy().mean()), DECIMALS),
        "noised": round(float(last["noised"].to_numpy().mean()), DECIMALS),
        "effects": {
            kind: {
                "mean": np.round(mean, DECIMALS).tolist(),
                "half_width": np.round(half, DECIMALS).tolist(),
            }
            for kind, (mean, half) in found.items()
        },
        "critical_layers": list(critical),
    }


@matplotlib.rc_context(STYLE)
def draw_tracing(traces: pyarrow.Table, path: Path) -> None:
    """Effects by layer at the subject's last token, and maps of tokens × layers."""
    mapped = traces.filter(field("mapped"))
    maps: list[Kind] = [kind for kind in KINDS if kind in mapped["kind"].to_pylist()]
    figure = Figure(figsize=(4.2 + 3.8 * len(maps), 3.4), dpi=140, layout="constrained")
    panels = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
    last = _last(traces)
    _draw_layers(panels[0], last)
    for axes, kind in zip(panels[1:], maps, strict=True):
        set_style(axes, TITLES[kind][0].upper() + TITLES[kind][1:])
        table = _map(mapped, kind)
        shown = axes.imshow(table, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(PARTS)), PARTS if axes is panels[1] else [""] * len(PARTS))
        figure.colorbar(shown, ax=axes)
    for axes in panels:
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


def _draw_layers(axes: Axes, last: pyarrow.Table) -> None:
    facts = len(set(last["case_id"].to_pylist()))
    set_style(axes, f"Subject's last token, {facts} facts")
    for kind in KINDS:
        mean, half = _by_layer(last, kind)
        layers = np.arange(len(mean))
        axes.fill_between(layers, mean - half, mean + half, color=COLORS[kind], alpha=0.2)
        axes.plot(layers, mean, color=COLORS[kind], label=TITLES[kind])
    axes.set_ylabel("effect on the answer's probability")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.4 * (high - low))  # room for the legend
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _last(traces: pyarrow.Table) -> pyarrow.Table:
    return traces.filter(~field("mapped"))


def _depth(traces: pyarrow.Table) -> int:
    return 1 + int(traces["layer"].to_numpy().max())


def _effects(table: pyarrow.Table, kind: str) -> np.ndarray:
    """What each restored state of a kind adds (traced tokens × layers)."""
    chosen = table.filter(field("kind") == kind)
    added = chosen["restored"].to_numpy() - chosen["noised"].to_numpy()
    return added.reshape(-1, _depth(table))  # layers are in order


def _by_layer(table: pyarrow.Table, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean effect at each layer, and the half width of its 95% interval (layers each)."""
    found = _effects(table, kind)
    deviation = found.std(0, ddof=1) if len(found) > 1 else np.zeros(found.shape[1])
    return found.mean(0), NORMAL_95 * deviation / np.sqrt(len(found))


def _map(table: pyarrow.Table, kind: str) -> np.ndarray:
    """Mean effect in each part of the prompt (parts × layers); NaN where no prompt has it."""
    parts = {part: table.filter(field("part") == part) for part in PARTS}
    nothing = np.full(_depth(table), np.nan)
    return np.stack([_effects(p, kind).mean(0) if len(p) else nothing for p in parts.values()])
