"""The tables of ``docs/scaling.md``: ``python -m benchmarks.projection``.

Nothing here is measured. Operations and bytes are counted (`flows.command.costs`), and times follow
from rates that are assumed.
"""

from collections.abc import Iterable, Iterator

from flows.command import costs
from flows.command.costs import Lengths
from memit.hyperparameters import Hyperparameters, preset
from memit.model_shape import ModelShape

RATE = 300e12
"""Operations a second in bfloat16 that a device is assumed to sustain."""
RATE_FLOAT64 = 30e12
"""The same in float64."""
LENGTHS = Lengths(before=8, after=8)
PROMPTS = 13
"""Of a record that are scored: its own, two paraphrases, ten of the neighborhood."""
CORPUS = 50e6
"""Tokens that the second moments are collected over."""
DEVICES = 64
"""Of the worked plan."""
SHARDS = 10
"""Of the text, in the worked plan."""

MODELS = {
    "gpt-j-6b": ModelShape(28, 4_096, 16_384, 6_050_882_784),
    "gpt-neox-20b": ModelShape(44, 6_144, 24_576, 20_554_567_680),
    "llama-70b": ModelShape(80, 8_192, 28_672, 70_553_706_496),
}
"""From the published configurations; the last one is Llama's of 70 billion parameters."""


def sizes() -> Iterator[tuple[str, ...]]:
    """What each model needs whatever n is, and up to which n factors are kept."""
    yield "", "layers", "weights", "C of a layer", "equations", "Δ of a layer", "factors up to n ="
    for name, shape in MODELS.items():
        f, d = shape.inner_width, shape.width
        yield (
            name,
            ", ".join(map(str, _settings(name).layers)),
            _size(2 * shape.parameters),
            _size(costs.moment_bytes(shape)),
            _size(costs.solve_bytes(shape)),
            _size(4 * f * d),
            f"{d * f // (d + f):,}",
        )


def times(n: float) -> Iterator[tuple[str, ...]]:
    """Hours of one device for n edits."""
    yield "", "statistics", "targets", "of them an edit", "walk", "solve", "evaluation"
    for name in MODELS:
        seconds = _seconds(name, n)
        yield (
            name,
            _time(seconds["statistics"]),
            _time(seconds["targets"]),
            f"{1_000 * seconds['targets'] / n:.0f} ms",
            _time(seconds["walk"]),
            _time(seconds["solve"]),
            _time(seconds["evaluation"]),
        )


def growing(n: float) -> Iterator[tuple[str, ...]]:
    """What n edits have, and what is written for them."""
    yield "", "keys and residuals", "held hidden states", "targets", "deltas"
    for name, shape in MODELS.items():
        settings = _settings(name)
        yield (
            name,
            _size(costs.keys_bytes(shape, n)),
            _size(costs.held_bytes(shape, n, LENGTHS, 2)),
            _size(costs.targets_bytes(shape, n, settings.evaluations)),
            _size(len(settings.layers) * costs.delta_bytes(shape, n)),
        )


def plan(n: float) -> Iterator[tuple[str, ...]]:
    """The same n edits of each model over many devices."""
    shared = [f"{step} / {DEVICES}" for step in ("targets", "evaluation")]
    yield "", f"statistics / {SHARDS}", *shared, "walk + solve"
    for name in MODELS:
        seconds = _seconds(name, n)
        yield (
            name,
            _time(seconds["statistics"] / SHARDS),
            _time(seconds["targets"] / DEVICES),
            _time(seconds["evaluation"] / DEVICES),
            _time(seconds["walk"] + seconds["solve"]),
        )


def tables() -> dict[str, str]:
    """All tables in Markdown."""
    return {
        "sizes": markdown(sizes()),
        "times": markdown(times(10_000)),
        "growing": markdown(growing(1e6)),
        "plan": markdown(plan(1e6)),
    }


def markdown(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as a table, the first one its head."""
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    rule = "|---" * (head.count("|") - 1) + "|"
    return "\n".join([head, rule, *rest])


def _settings(name: str) -> Hyperparameters:
    return preset(name, MODELS[name])


def _seconds(name: str, n: float) -> dict[str, float]:
    shape, settings = MODELS[name], _settings(name)
    layers, last = settings.layers, settings.layers[-1]
    tokens = LENGTHS.before + LENGTHS.after
    evaluations = settings.evaluations
    operations = {
        "statistics": costs.statistics_operations(shape, layers, CORPUS),
        "targets": costs.targets_operations(shape, last, evaluations, n, LENGTHS),
        "walk": costs.walk_operations(shape, layers, n, LENGTHS),
        "evaluation": costs.evaluation_operations(shape, PROMPTS * n, tokens),
    }
    seconds = {step: count / RATE for step, count in operations.items()}
    return seconds | {"solve": len(layers) * costs.solve_operations(shape, n) / RATE_FLOAT64}


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count < 1e11 else f"{count / 1e9:.0f} GB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"{name}\n\n{table}\n")
