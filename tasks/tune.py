"""The step `tune`: which settings are tried, how trials compare, their table and figure, and the
preset of the best."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path

import matplotlib
import tomlkit
from matplotlib.figure import Figure

from memit.hyperparameters import AUTO, Hyperparameters, short_name
from memit.model_shape import ModelShape
from tasks.reporting.figures import ACCENT, AFTER, BEFORE, INK, STYLE, save_figure, set_style
from tasks.reporting.formats import markdown_table

WIDTH = 5
"""Layers of a trial, until other numbers are tried."""
WIDTHS = (3, 8)
"""The others."""
DEPTHS = (0.1, 0.17, 0.3, 0.45, 0.6)
"""Where the last edited layer is tried, as shares of the model's depth."""
FACTOR = 3.0
"""Between values of λ."""
LARGEST_LOSS = 10.0
"""Points of neighbourhood success, and percent of perplexity, that a good edit may cost."""
LOWEST_SCORE = 60.0
"""S of a model that can be edited."""
MARKS = {
    "efficacy": ("ES", "|", INK),
    "paraphrase": ("PS", "x", BEFORE),
    "neighborhood": ("NS", "o", ACCENT),
    "score": ("S", "o", AFTER),
}
"""Name, marker and colour of each metric, in the order of drawing."""


@dataclass(frozen=True)
class Trial:
    """What an edit with some settings did."""

    settings: Hyperparameters
    """As they were proposed: λ may be `auto`."""
    weight: float = 0.0
    """λ, chosen or given."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the edited model; none where the edit could not be made."""
    failure: str = ""
    """Why it could not be made."""

    @property
    def title(self) -> str:
        """The settings that trials differ in, on one line."""
        one = self.settings
        layers = f"{one.layers[0]}–{one.layers[-1]}"
        effort = f"{one.evaluations} × {one.learning_rate:g}"
        return f"layers {layers}, λ {self.weight:,g}, clamp {one.clamp_factor:.3g}, {effort}"

    def keeps(self, before: Mapping[str, float]) -> bool:
        """Whether neighbours and, where it was measured, the perplexity stay nearly as `before`."""
        lost = before["neighborhood"] - self.metrics.get("neighborhood", 0.0)
        perplexity = self.metrics.get("perplexity", 0.0)
        highest = before.get("perplexity", perplexity) * (1 + LARGEST_LOSS / 100)
        return lost <= LARGEST_LOSS and perplexity <= highest

    def rank(self, before: Mapping[str, float]) -> tuple[bool, float]:
        """By which trials compare: first those that keep what must stay, then S."""
        return self.keeps(before), self.metrics.get("score", 0.0)

    def figures(self, before: Mapping[str, float]) -> str:
        """What it made of the figures `before`, in words."""
        return "; ".join(
            f"{name} {before[name]:.1f} to {self.metrics[name]:.1f}"
            for name in ("score", "efficacy", "paraphrase", "neighborhood", "perplexity")
            if name in before and name in self.metrics
        )


def positions(best: Hyperparameters, depth: int) -> list[Hyperparameters]:
    """Windows of layers over the lower part of the model."""
    return [_window(best, round(share * depth), WIDTH, depth) for share in DEPTHS]


def widths(best: Hyperparameters, depth: int) -> list[Hyperparameters]:
    """Fewer and more layers below the same last one, which share its targets."""
    return [_window(best, best.layers[-1], width, depth) for width in WIDTHS]


def weights(best: Hyperparameters, depth: int) -> list[Hyperparameters]:
    """λ around the one that was chosen, with the same targets."""
    weight = float(best.covariance_weight)
    others = (float(f"{other:.2g}") for other in (weight / FACTOR, weight * FACTOR))
    return [replace(best, covariance_weight=other) for other in others]


def neighbors(best: Hyperparameters, depth: int) -> list[Hyperparameters]:
    """The same number of layers a little lower and higher."""
    step, width = max(1, depth // 15), len(best.layers)
    return [_window(best, best.layers[-1] + by, width, depth) for by in (-step, step)]


def efforts(best: Hyperparameters, depth: int) -> list[Hyperparameters]:
    """Targets that may move further, or are optimised longer or in other steps."""
    return [
        replace(best, clamp_factor=best.clamp_factor * 1.5),
        replace(best, clamp_factor=best.clamp_factor / 1.5),
        replace(best, evaluations=2 * best.evaluations),
        replace(best, learning_rate=2 * best.learning_rate),
        replace(best, learning_rate=best.learning_rate / 2),
    ]


STAGES: tuple[Callable[[Hyperparameters, int], list[Hyperparameters]], ...] = (
    positions,
    widths,
    weights,
    neighbors,
    efforts,
)
"""What is tried, coarse to fine; each stage starts from the best settings so far."""


def _window(settings: Hyperparameters, last: int, width: int, depth: int) -> Hyperparameters:
    """Up to `width` layers that end with `last`, or near it; λ by rule."""
    last = min(max(last, 0), max(depth - 2, 0))
    layers = tuple(range(max(0, last + 1 - width), last + 1))
    return replace(settings, layers=layers, covariance_weight=AUTO)


def trials_table(trials: Sequence[Trial], before: Mapping[str, float], confirmed: str) -> str:
    """All trials as a Markdown page, best first; `confirmed` are the best one's figures on other
    facts."""
    ordered = sorted(trials, key=lambda trial: trial.rank(before), reverse=True)
    lines = [
        "# Trials",
        "",
        f"Neighborhood before the edit: {before['neighborhood']:.1f}. A trial that costs more than "
        f"{LARGEST_LOSS:g} points of it comes after all others.",
        "",
        *markdown_table([_row(trial) for trial in ordered], text=(0, 9)),
        "",
        f"The best one, on facts that the search has not seen: {confirmed}.",
    ]
    return "\n".join(lines) + "\n"


def _row(trial: Trial) -> dict[str, str]:
    settings, metrics = trial.settings, trial.metrics
    names = {"score": "S", "efficacy": "ES", "paraphrase": "PS", "neighborhood": "NS"}
    rule = " (rule)" if settings.covariance_weight == AUTO else ""
    return {
        "layers": f"{settings.layers[0]}–{settings.layers[-1]}",
        "λ": f"{trial.weight:,g}{rule}",
        "clamp": f"{settings.clamp_factor:.3g}",
        "evaluations": str(settings.evaluations),
        "rate": f"{settings.learning_rate:g}",
        **{title: f"{metrics[key]:.1f}" if key in metrics else "–" for key, title in names.items()},
        "failure": trial.failure,
    }


@matplotlib.rc_context(STYLE)
def draw_trials(trials: Sequence[Trial], before: Mapping[str, float], path: Path) -> None:
    """A line for each trial, best first, with its settings and what became of the metrics; the
    band is where neighbours must stay."""
    ordered = sorted(trials, key=lambda trial: trial.rank(before))
    figure = Figure(figsize=(7.5, 1.4 + 0.24 * len(ordered)), dpi=140, layout="constrained")
    axes = figure.subplots()
    set_style(axes)
    axes.set_yticks(range(len(ordered)), [trial.title for trial in ordered], fontsize=8)
    axes.set_xlabel("percent")
    axes.grid(axis="y", color=BEFORE, alpha=0.3)
    kept = before["neighborhood"]
    axes.axvspan(kept - LARGEST_LOSS, kept, color=ACCENT, alpha=0.12)
    rows = [row for row, trial in enumerate(ordered) if trial.metrics]  # the others failed
    for metric, (name, marker, color) in MARKS.items():
        axes.plot(
            [ordered[row].metrics[metric] for row in rows], rows, marker, color=color, label=name
        )
    axes.legend(frameon=False, ncols=len(MARKS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save_figure(figure, path)


def preset_text(
    model: str, shape: ModelShape, best: Trial, before: Mapping[str, float], facts: int
) -> str:
    """A preset file with the best settings and the figures that chose them."""
    values = {name: value for name, value in asdict(best.settings).items() if value != inf}
    preset = {
        "models": [short_name(model)],
        "architecture": shape.architecture,
        "size": [shape.depth, shape.width, shape.inner_width],
        "source": "memit tune: trials.md beside this file",
        "checked": f"{facts} facts that the search has not seen: {best.figures(before)}",
        "settings": values,
    }
    return tomlkit.dumps(preset)
