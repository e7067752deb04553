"""The state of an interrupted training, in one safetensors file that is whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memit.errors import IntegrityError


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.AdamW, step: int, losses: list[float]
) -> None:
    """Writes weights, AdamW's moments, the number of finished steps and their losses.

    The file is written under another name, flushed to the disk and only then renamed: a process
    that is killed at any moment leaves the former checkpoint or the new one.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors[f"weight/{name}"] = parameter.detach()
        tensors[f"first/{name}"] = state["exp_avg"]
        tensors[f"second/{name}"] = state["exp_avg_sq"]
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"step": str(step), "losses": json.dumps(losses)})
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.AdamW
) -> tuple[int, list[float]]:
    """Puts the stored state into `model` and `optimizer`.

    Returns:
        Finished steps and the loss of each.

    Raises:
        IntegrityError: the file is damaged, or is of another model.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata()
            step, losses = int(metadata["step"]), json.loads(metadata["losses"])
            for name, parameter in model.named_parameters():
                _copy_into(parameter, stored.get_tensor(f"weight/{name}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": stored.get_tensor(f"first/{name}"),
                    "exp_avg_sq": stored.get_tensor(f"second/{name}"),
                }
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as cause:
        raise IntegrityError(
            f"The training checkpoint {path} cannot be read ({cause}): "
            "delete it, and training starts from the beginning."
        ) from cause
    return step, losses


@torch.no_grad()
def _copy_into(parameter: Tensor, value: Tensor) -> None:
    if parameter.shape != value.shape:
        raise ValueError(f"shape {tuple(value.shape)} instead of {tuple(parameter.shape)}")
    parameter.copy_(value)


def _flush(path: Path) -> None:
    """Asks the system to have a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
