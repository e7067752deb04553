"""Fine-tuning on the requests: all parameters of one block, or its down-projection alone.

With weight decay it is the paper's FT-W; without, and with a bound on how far each weight may move,
the same editor is the unconstrained and the constrained baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from memit.batches import split_into_batches
from memit.editors.base import Editor, Resources, provenance, register
from memit.errors import InputError, NumericsError
from memit.forward.passes import Padded, block_output, logits_at, pad, target_positions
from memit.forward.probes import can_resume
from memit.hyperparameters import published_layer
from memit.language_model import LanguageModel
from memit.positions import TokenRow
from memit.ranges import Range, check_settings
from memit.requests import EditRequest
from memit.targets import plain_rows
from memit.weight_delta import Dense, WeightDelta, base_digests

PUBLISHED_LAYERS = {"gpt-j-6b": 21}
"""The tuned block by the last part of the model's name."""

Loss = Literal["teacher_forced", "published"]


@register("fine_tuning")
@dataclass(frozen=True)
class FineTuning(Editor):
    """Adam on the mean nll of the new objects, in batches of requests in their order."""

    layer: Annotated[int, Range(0, 10_000)]
    """The block that is tuned; blocks below it are run once."""
    parameters: Literal["block", "down_projection"] = "block"
    """Everything in the block, or W_out alone."""
    learning_rate: Annotated[float, Range(0, 1e30, exclusive=True)] = 5e-4
    weight_decay: Annotated[float, Range(0, 1e12)] | Literal["power_law"] = 0.0
    """Coupled L2: added to the gradient times the weight. `power_law` takes n^−0.870 · e^0.156 for
    n requests, as published."""
    bound: Annotated[float | None, Range(0, 1e12)] = None
    """How far a weight may move from its base value, at most; None leaves it free."""
    batch_size: Annotated[int, Range(1, 10_000_000)] = 64
    """Requests of one step."""
    epochs: Annotated[int, Range(1, 10_000_000)] = 25
    """Passes over all requests, at most."""
    loss_threshold: Annotated[float, Range(0, 1e12)] = 1e-2
    """A batch below it makes no step, and an epoch whose mean is below it is the last."""
    loss: Loss = "teacher_forced"
    """`teacher_forced`: each token of the object is scored after those before it; `published`: all
    of them are scored at the prompt's last position."""

    def __post_init__(self) -> None:
        check_settings(self)

    def edit(
        self, lm: LanguageModel, requests: Sequence[EditRequest], resources: Resources
    ) -> WeightDelta:
        """Tune the block until the requests are learnt.

        Raises:
            NumericsError: the loss is not finite; names the mean loss of every epoch so far.
        """
        lm.check_layers((self.layer,))
        names = self.parameter_names(lm)
        rows = plain_rows(lm, requests)
        with _trainable(lm, names) as masters:
            optimizer = torch.optim.Adam(
                [master.weight for master in masters],
                lr=self.learning_rate,
                weight_decay=self.decay_for(len(requests)),
            )
            batches = self._batches(lm, rows, resources.token_budget)
            progress = resources.progress or (lambda edits: None)
            losses = self._tune(lm, batches, masters, optimizer, progress)
            changes = {
                name: Dense((master.weight - master.base).cpu())
                for name, master in zip(names, masters, strict=True)
            }
        origin = {**provenance(self, lm, requests), "base": base_digests(lm, names)}
        return WeightDelta(changes, {**origin, "losses": losses})

    def parameter_names(self, lm: LanguageModel) -> list[str]:
        """The parameters that are tuned, by their names in the model."""
        down = lm.weight_name(self.layer)
        if self.parameters == "down_projection":
            return [down]
        inside = {id(parameter) for parameter in lm.blocks[self.layer].parameters()}
        return [name for name, found in lm.model.named_parameters() if id(found) in inside]

    def decay_for(self, count: int) -> float:
        """The weight decay for `count` requests."""
        if self.weight_decay == "power_law":
            return count**-0.870 * math.exp(0.156)
        return self.weight_decay

    def _batches(
        self, lm: LanguageModel, rows: Sequence[TokenRow], token_budget: int
    ) -> list[list[_Chunk]]:
        """The requests of each step, in chunks under the token budget."""
        steps = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return [
            [
                _chunk(lm, part, self.layer, self.loss)
                for part in split_into_batches(step, lambda row: (1, len(row.ids)), token_budget)
            ]
            for step in steps
        ]

    def _tune(
        self,
        lm: LanguageModel,
        batches: Sequence[Sequence[_Chunk]],
        masters: Sequence[_Master],
        optimizer: torch.optim.Optimizer,
        progress: Callable[[int], None],
    ) -> list[float]:
        """Run the epochs; the mean loss of each. A request counts in equal parts in every epoch."""
        sizes = [sum(len(chunk.padded.ids) for chunk in batch) for batch in batches]
        means: list[float] = []
        seen = 0
        for _ in range(self.epochs):
            total = 0.0
            for batch, size in zip(batches, sizes, strict=True):
                loss = _backward(lm, batch, size, self.layer)
                total += loss * size
                if not math.isfinite(loss):
                    losses = ", ".join(f"{mean:.3g}" for mean in [*means, loss])
                    raise NumericsError(
                        f"fine-tuning diverged in epoch {len(means) + 1} (mean losses so far: "
                        f"{losses}); lower its learning rate."
                    )
                if loss >= self.loss_threshold:
                    _step(masters, optimizer, self.bound)
                for master in masters:
                    master.parameter.grad = None
                finished, seen = seen // self.epochs, seen + size
                progress(seen // self.epochs - finished)
            means.append(total / sum(sizes))
            if means[-1] < self.loss_threshold:
                break
        progress(sum(sizes) - seen // self.epochs)
        return means


VARIANTS: dict[str, dict[str, Any]] = {
    "ft": {},
    # FT-W, the paper's baseline: weight decay 5e-4
    "ft_w": {"weight_decay": 5e-4},
    # LocFT-BF (arXiv 2509.22072): the down-projection of one late block, in small batches that go
    # through all requests before any comes again
    "ft_bf": {"parameters": "down_projection", "batch_size": 8},
    # FT+L: the down-projection of block 0, each weight within a bound of its base value
    "ft_l": {"layer": 0, "parameters": "down_projection", "bound": 5e-5},
}
"""What the variants differ in from `FineTuning` on the published block, by their names."""


def fine_tuning_preset(variant: str, model_name: str, depth: int) -> FineTuning:
    """Settings of a variant for a model of `depth` blocks; see `published_layer`."""
    layer = published_layer(PUBLISHED_LAYERS, model_name, depth)
    return FineTuning(**{"layer": layer, **VARIANTS[variant]})


# --- what is scored -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Rows that are run together, and the positions that are scored."""

    padded: Padded
    hidden: Tensor | None
    """What enters the tuned block (rows × tokens × d, on the CPU); None if all blocks are run."""
    row: Tensor
    """Row of each scored token (k)."""
    column: Tensor
    """Position that scores it (k)."""
    wanted: Tensor
    """The token (k)."""
    weight: Tensor
    """Its share of its row's mean (k)."""


@torch.no_grad()
def _chunk(lm: LanguageModel, rows: Sequence[TokenRow], layer: int, loss: Loss) -> _Chunk:
    row, column, wanted = target_positions(rows, lm.device)
    if loss == "published":  # all tokens of the object are asked for at the prompt's last position
        column = torch.tensor([r.target[0] - 1 for r in rows], device=lm.device)[row]
    weight = torch.tensor([1 / len(r.target) for r in rows], device=lm.device)[row]
    # Blocks below the tuned one do not change: run them once and keep what enters it.
    padded = pad([r.ids[:-1] for r in rows], lm.device)
    held = layer > 0 and can_resume(lm)
    hidden = block_output(lm, padded, layer - 1).cpu() if held else None
    return _Chunk(padded, hidden, row, column, wanted, weight)


def _backward(lm: LanguageModel, batch: Sequence[_Chunk], size: int, layer: int) -> float:
    """Accumulate the gradients of the batch's mean loss; gives that loss."""
    total = 0.0
    for chunk in batch:
        hidden = None if chunk.hidden is None else chunk.hidden.to(lm.device)
        with torch.enable_grad():
            logits = logits_at(
                lm, chunk.padded, chunk.row, chunk.column, start=layer, hidden=hidden
            )
            log_p = torch.log_softmax(logits, -1).gather(1, chunk.wanted[:, None])[:, 0]
            loss = -(log_p * chunk.weight).sum() / size
            loss.backward()
        total += loss.item()
    return total


# --- what is tuned ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Master:
    """A parameter of the model and its float32 value, since low precision loses small steps."""

    parameter: Tensor
    weight: Tensor
    base: Tensor


@contextmanager
def _trainable(lm: LanguageModel, names: Sequence[str]) -> Iterator[list[_Master]]:
    """Let some parameters have gradients, and restore their values at the end."""
    if any(lm.parameter(name) is not lm.model.get_parameter(name) for name in names):
        raise InputError(
            f"fine-tuning needs its block's weights on a device, and {lm.name} does not fit there: "
            "leave fine-tuning out of the methods, or use a smaller dtype or larger devices."
        )
    parameters = [lm.parameter(name) for name in names]
    kept = [parameter.detach().clone() for parameter in parameters]
    masters = [
        _Master(parameter.requires_grad_(), base.float().clone(), base.float())
        for parameter, base in zip(parameters, kept, strict=True)
    ]
    try:
        yield masters
    finally:
        for parameter, base in zip(parameters, kept, strict=True):
            parameter.grad = None
            parameter.requires_grad_(False).copy_(base)


@torch.no_grad()
def _step(
    masters: Sequence[_Master], optimizer: torch.optim.Optimizer, bound: float | None
) -> None:
    """One step of Adam on the float32 values, kept within the bound, rounded into the model."""
    for master in masters:
        grad = master.parameter.grad
        master.weight.grad = None if grad is None else grad.float()
    optimizer.step()
    for master in masters:
        if bound is not None:
            master.weight.clamp_(master.base - bound, master.base + bound)
        master.parameter.copy_(master.weight)
