"""Where a model's weights are: on one device, on several, or offloaded to memory or disk.

accelerate spreads a model that is too large for one device. The parameters of an offloaded block
have no content; a hook loads them for its forward pass. Reads and writes of such a weight must go
through that hook.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from memit.errors import InputError

WEIGHT_SHARE = 0.8
"""Part of the free memory that weights may fill; batches and equations need the rest."""


def device_map(device: str, room: Mapping[int | str, int] | None) -> dict[str, Any]:
    """How `from_pretrained` places weights: each is read once, to its device.

    For `sharded`, weights beyond `room` (or beyond `WEIGHT_SHARE` of each device's free memory) are
    offloaded to memory or stay in the checkpoint's files.

    Raises:
        InputError: the device is not known.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "sharded":
        try:
            return {"device_map": {"": str(torch.device(device))}}
        except RuntimeError as error:
            message = f"device '{device}' is not known; use auto, cpu, cuda or cuda:N."
            raise InputError(message) from error
    if not room:
        from accelerate.utils import get_max_memory  # not on every image

        room = {card: int(WEIGHT_SHARE * free) for card, free in get_max_memory().items()}
    return {"device_map": "auto", "max_memory": dict(room)}


def device_of(module: nn.Module) -> torch.device:
    """The device that a module with a weight computes on."""
    weight = cast(Tensor, module.weight)
    hook = offloading_hook(module)
    return weight.device if hook is None else torch.device(hook.execution_device)


def solving_device(device: torch.device) -> torch.device:
    """The device for linear systems of tensors on `device`: itself, unless it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def read_weight(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module itself, offloaded or not."""
    hook = offloading_hook(module)
    return getattr(module, name) if hook is None else hook.weights_map[name]


@torch.no_grad()
def write_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Change a parameter of a module itself, rounded to its dtype.

    An offloaded one stays in memory from then on: checkpoints are not written to.
    """
    kept = cast(Tensor, getattr(module, name))
    hook = offloading_hook(module)
    if hook is None:
        kept.copy_(value)
        return
    offloaded = hook.weights_map
    changed = value.detach().to("cpu", kept.dtype, copy=True).contiguous()
    offloaded.dataset.state_dict[offloaded.prefix + name] = changed


def offloading_hook(module: nn.Module) -> Any:
    """The hook that loads a module's parameters, if they are offloaded."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None
