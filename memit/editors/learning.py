"""The loop in which editors that learn are trained: resumable, shown, stopped when it diverges."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memit.errors import NumericsError
from memit.files.atomic import write_whole
from memit.files.checkpoint import resume, save_checkpoint

WINDOW = 50
"""Steps over which a loss is averaged before it is judged."""
CHECKPOINT_EVERY = 200
"""Steps that are lost at most when the process is killed."""
DIVERGED = 10.0
"""A loss that is so many times that of the first steps does not come back."""


@dataclass(frozen=True)
class Training:
    """How long a network is trained, and where its state is kept meanwhile."""

    name: str
    """Of what is trained, with a digest of what it depends on: for messages and file names."""
    steps: int
    directory: Path | None
    """For checkpoints and the loss curve of a training that diverged; None keeps nothing."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises to its full height, which it keeps."""
    progress: Callable[[int], None] | None = None
    """Told the number of newly finished steps."""

    @property
    def checkpoint(self) -> Path | None:
        """Where the state of the training lies."""
        return self.directory and self.directory / f"{self.name}.safetensors"


def content_digest(content: Any) -> str:
    """sha256 over plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def run_training(
    training: Training,
    network: nn.Module,
    optimizer: torch.optim.AdamW,
    loss_at: Callable[[int], Tensor],
    *,
    largest_gradient: float,
) -> list[float]:
    """Minimise `loss_at(step)`, going on from a checkpoint where there is one; every step's loss.

    `loss_at` must depend on the step and the network alone, so that an interrupted training ends
    with the same weights. Raises `NumericsError` if the loss is no longer finite or has grown
    tenfold, with the loss curve saved; `ResourceError` if the disk is full.
    """
    kept = training.checkpoint
    losses = resume(kept, network, optimizer, training.name) if kept else []
    if training.progress is not None and losses:
        training.progress(len(losses))
    parameters = list(network.parameters())
    heights = [group["lr"] for group in optimizer.param_groups]
    for step in range(len(losses), training.steps):
        loss = loss_at(step)
        losses.append(loss.item())
        _check(training, losses)
        optimizer.zero_grad()
        loss.backward()
        _fill_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, largest_gradient)
        if not bool(norm.isfinite()):  # would make every weight NaN behind a last, finite loss
            losses[-1] = math.nan
            _check(training, losses)
        for group, height in zip(optimizer.param_groups, heights, strict=True):
            group["lr"] = height * min(1.0, (step + 1) / max(1, training.warmup_steps))
        optimizer.step()
        due = (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == training.steps
        if kept and due:
            save_checkpoint(kept, network, optimizer, losses, training.name)
        if training.progress is not None:
            training.progress(1)
    return losses


def _fill_gradients(parameters: list[nn.Parameter]) -> None:
    """Parameters that the loss does not reach have a state too, or it could not be stored."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _check(training: Training, losses: list[float]) -> None:
    start, now = losses[:WINDOW], losses[-WINDOW:]
    grown = len(losses) > 2 * WINDOW and sum(now) > DIVERGED * max(sum(start), WINDOW * 0.1)
    if math.isfinite(losses[-1]) and not grown:
        return
    kept = ""
    if training.directory is not None:
        path = training.directory / f"{training.name}-diverged.json"
        curve = json.dumps({"losses": [_number(x) for x in losses]})
        write_whole(path, lambda partial: partial.write_text(curve, encoding="utf-8"))
        kept = f" (its losses are in {path})"
    raise NumericsError(
        f"the training of {training.name} diverges: its loss is {losses[-1]:.3g} at step "
        f"{len(losses)}{kept}; lower its learning rate."
    )


def _number(loss: float) -> float | str:
    """JSON has no infinity."""
    return loss if math.isfinite(loss) else str(loss)
