"""A resumable training loop, which stops when the loss diverges."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

from memit.errors import NumericsError
from memit.files.atomic import write_whole
from memit.files.checkpoint import resume, save_checkpoint

WINDOW = 50
"""Steps over which a loss is averaged before it is judged."""
CHECKPOINT_EVERY = 200
"""Steps that are lost at most when the process is killed, unless a training sets its own."""
DIVERGED = 10.0
"""A loss that has grown by this factor since the first steps does not recover."""


@dataclass(frozen=True)
class Training:
    """How long a network is trained, with which step sizes, and where its state is kept."""

    name: str
    """What is trained, with a digest of all that it depends on; for messages and file names."""
    steps: int
    directory: Path | None
    """For checkpoints and the loss curve of a training that diverged; None keeps nothing."""
    largest_gradient: float
    """Gradients of a larger norm are scaled down to it."""
    schedule: Callable[[float, int], float] = lambda peak, _: peak
    """The learning rate of a step from the optimiser's own."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: `CHECKPOINT_EVERY`."""
    progress: Callable[[int], None] | None = None
    """Called with the number of newly finished steps."""


def warmup(steps: int) -> Callable[[float, int], float]:
    """A schedule that rises linearly in so many steps and is constant afterwards."""
    return lambda peak, step: peak * min(1.0, (step + 1) / max(1, steps))


def run_training(
    training: Training,
    network: nn.Module,
    optimizer: torch.optim.AdamW,
    loss_at: Callable[[int], Tensor],
) -> list[float]:
    """Minimise `loss_at(step)`, resuming from a checkpoint if there is one; the loss of each step.

    `loss_at` must depend on the step and the network alone, so that an interrupted training ends
    with the same weights.

    Raises:
        NumericsError: the loss or a gradient is not finite, or the loss has grown tenfold.
        ResourceError: the disk is full.
    """
    path = training.directory and training.directory / f"checkpoint-{training.name}.safetensors"
    progress = training.progress or (lambda steps: None)
    every = training.checkpoint_every or CHECKPOINT_EVERY
    losses = resume(path, network, optimizer, training.name) if path else []
    if losses:
        progress(len(losses))
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(len(losses), training.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = training.schedule(peak, step)
        loss = _seeded(loss_at, step, training.name, network)
        losses.append(loss.item())
        if not _update(network, optimizer, loss, training.largest_gradient):
            losses[-1] = math.nan
        _check(training, losses)
        if path and ((step + 1) % every == 0 or step + 1 == training.steps):
            save_checkpoint(path, network, optimizer, losses, training.name)
        progress(1)
    return losses


def _seeded(loss_at: Callable[[int], Tensor], step: int, name: str, network: nn.Module) -> Tensor:
    """The loss at a step, with a dropout that depends on the step and on what is trained alone."""
    cards = {parameter.device for parameter in network.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(cards)):
        torch.manual_seed(crc32(f"{name} {step}".encode()))
        return loss_at(step)


def _update(
    network: nn.Module, optimizer: torch.optim.AdamW, loss: Tensor, largest_gradient: float
) -> bool:
    """One step of the optimiser; False, and no step, if a gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    parameters = list(network.parameters())
    for parameter in parameters:  # those that the loss does not reach need moments to be stored
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest_gradient)
    finite = bool(norm.isfinite())
    if finite:  # else every weight would be NaN after a last, finite loss
        optimizer.step()
    return finite


def _check(training: Training, losses: list[float]) -> None:
    start, now = losses[:WINDOW], losses[-WINDOW:]
    grown = len(losses) > 2 * WINDOW and sum(now) > DIVERGED * max(sum(start), WINDOW * 0.1)
    if math.isfinite(losses[-1]) and not grown:
        return
    kept = ""
    if training.directory is not None:
        path = training.directory / f"{training.name}-diverged.json"
        # JSON has no infinity.
        curve = json.dumps({"losses": [x if math.isfinite(x) else str(x) for x in losses]})
        write_whole(path, lambda partial: partial.write_text(curve, encoding="utf-8"))
        kept = f" (its losses are in {path})"
    raise NumericsError(
        f"the training of {training.name} diverges: its loss is {losses[-1]:.3g} at step "
        f"{len(losses)}{kept}; lower its learning rate."
    )
