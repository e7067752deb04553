"""What an edit of n facts takes: operations, bytes held, bytes written. See `docs/scaling.md`.

Counted, not measured: a multiplication with an addition is two operations, attention over so few
tokens is left out, and a backward pass that wants no gradient of weights costs what a forward pass
does.
"""

from dataclasses import dataclass

from memit.model_shape import ModelShape

ROWS = 6
"""Rows of an edit: the plain prompt and five with prefixes."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row of an edit, on average."""

    before: float
    """From the prompt's beginning up to the subject's last token."""
    after: float
    """From there to the end of the new object."""


def _block(shape: ModelShape) -> float:
    """Parameters of a block."""
    return shape.parameters / shape.depth


def statistics_operations(shape: ModelShape, layers: tuple[int, ...], tokens: float) -> float:
    """Blocks up to the last edited layer, and half of k kᵀ for each edited one."""
    f = shape.inner_width
    return tokens * (2 * _block(shape) * (layers[-1] + 1) + len(layers) * f**2)


def sampling_operations(shape: ModelShape, layers: tuple[int, ...], tokens: float) -> float:
    """Statistics over tokens that went once through everything when they were sampled."""
    return 2 * shape.parameters * tokens + statistics_operations(shape, layers, tokens)


def targets_operations(
    shape: ModelShape, last: int, evaluations: int, n: float, lengths: Lengths
) -> float:
    """One pass through everything; then, for each evaluation, the tokens from the subject's last
    on through the blocks above `last`, forward and backward."""
    whole = 2 * shape.parameters * (lengths.before + lengths.after)
    again = 4 * _block(shape) * (shape.depth - last - 1) * lengths.after
    return n * ROWS * (whole + evaluations * again)


def walk_operations(
    shape: ModelShape, layers: tuple[int, ...], n: float, lengths: Lengths
) -> float:
    """Every row once through the blocks up to the last layer and once more through the edited
    ones; plain rows also from each edited layer to the last one."""
    last = layers[-1]
    blocks = ROWS * (last + 1 + len(layers)) + sum(last - layer for layer in layers)
    return n * 2 * _block(shape) * lengths.before * blocks


def solve_operations(shape: ModelShape, n: float) -> float:
    """The closed form for one layer, in float64."""
    f, d = shape.inner_width, shape.width
    if is_low_rank(shape, n):
        return f**3 / 3 + 2 * n * f**2 + n**2 * f + n**3 / 3
    return f**3 / 3 + 2 * n * f**2 + 2 * min(n, d) * f**2 + 2 * n * d * f


def evaluation_operations(shape: ModelShape, prompts: float, tokens: float) -> float:
    """Every prompt once on the unedited and once on the edited model."""
    return 2 * prompts * 2 * shape.parameters * tokens


def is_low_rank(shape: ModelShape, n: float) -> bool:
    """Whether factors of Δ are smaller than Δ, and are what is kept."""
    return n * (shape.width + shape.inner_width) < shape.width * shape.inner_width


def moment_bytes(shape: ModelShape) -> float:
    """A layer's second moment, as it is stored (float32)."""
    return 4.0 * shape.inner_width**2


def solve_bytes(shape: ModelShape) -> float:
    """A layer's equations: C, its sum with K Kᵀ, and the factor (float64)."""
    return 3 * 8.0 * shape.inner_width**2


def keys_bytes(shape: ModelShape, n: float) -> float:
    """Keys, targets, hidden states and residuals of a layer (float64)."""
    return 8.0 * n * (shape.inner_width + 3 * shape.width)


def held_bytes(shape: ModelShape, n: float, lengths: Lengths, size: int) -> float:
    """Hidden states that wait between layers; `size` is that of a number."""
    return float(size) * n * ROWS * lengths.before * shape.width


def delta_bytes(shape: ModelShape, n: float) -> float:
    """A layer's Δ, as factors or whole (float32)."""
    f, d = shape.inner_width, shape.width
    return 4.0 * (n * (f + d) if is_low_rank(shape, n) else f * d)


def targets_bytes(shape: ModelShape, n: float, evaluations: int) -> float:
    """z, h and the losses (float32)."""
    return 4.0 * n * (2 * shape.width + evaluations)
