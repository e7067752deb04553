"""Checkpoints of a training: one safetensors file, written atomically."""

import json
from pathlib import Path

import torch
from torch import nn

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
    save_tensors(tensors, path, {"losses": json.dumps(losses), "origin": origin})


def resume(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, origin: str) -> list[float]:
    """Load a checkpoint into `model` and `optimizer`; gives the loss of each finished step.

    Without a checkpoint there are none. One that is damaged or of another training is deleted, and
    the training starts anew.
    """
    if not path.exists():
        return []
    try:
        tensors, metadata = load_tensors(path)
    except IntegrityError:
        tensors, metadata = {}, {}
    if metadata.get("origin") != origin:
        path.unlink()
        return []
    losses = json.loads(metadata["losses"])
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors[f"weight/{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(len(losses))),
            "exp_avg": tensors[f"first/{name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"second/{name}"].to(parameter.device),
        }
    return losses
