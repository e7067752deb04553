"""Checkpoints of a training: one safetensors file, written atomically."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from memit.errors import IntegrityError
from memit.files.tensors import load_tensors, save_tensors


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.AdamW, losses: list[float], origin: str
) -> None:
    """Write weights, AdamW's moments and the loss of each finished step.

    `origin` is a digest of everything that the training depends on.

    Raises:
        ResourceError: the disk is full.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors[f"weight/{name}"] = parameter
        tensors[f"first/{name}"] = state["exp_avg"]
        tensors[f"second/{name}"] = state["exp_avg_sq"]
    metadata = {"losses": json.dumps(losses), "origin": origin}
    save_tensors(tensors, path, metadata)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, origin: str) -> list[float]:
    """Load a checkpoint into `model` and `optimizer`; gives the loss of each finished step.

    Without a checkpoint there are none. One that is damaged or of another training is deleted, and
    the training starts anew.
    """
    if not path.exists():
        return []
    try:
        tensors, metadata = load_tensors(path)
        state = _state(model, tensors)
    except IntegrityError:
        state = None
    if state is None or metadata.get("origin") != origin:
        path.unlink()
        return []
    losses = json.loads(metadata["losses"])
    for parameter, (weight, first, second) in state.items():
        with torch.no_grad():
            parameter.copy_(weight)
        optimizer.state[parameter] = {
            "step": torch.tensor(float(len(losses))),
            "exp_avg": first.to(parameter.device),
            "exp_avg_sq": second.to(parameter.device),
        }
    return losses


def _state(
    model: nn.Module, tensors: dict[str, Tensor]
) -> dict[nn.Parameter, tuple[Tensor, Tensor, Tensor]] | None:
    """Weight and moments of each parameter, or None if they are not those of this model."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = [tensors.get(f"{kind}/{name}") for kind in ("weight", "first", "second")]
        if any(part is None or part.shape != parameter.shape for part in parts):
            return None
        found[parameter] = tuple(parts)
    return found
