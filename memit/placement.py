"""Where a model's weights lie: on one device, on several, or waiting in memory or on disk.

accelerate spreads a model that is too large for one device. A block that does not fit anywhere
waits outside, its parameters without content, and a hook brings them for the time of its forward
pass. Whoever reads or writes such a weight has to ask the hook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

ROOM = 0.8
"""Part of the free memory that weights may fill; batches and equations need the rest."""


def room_for_weights() -> dict[int | str, int]:
    """Bytes that weights may fill on each GPU and in main memory, from what is free now."""
    from accelerate.utils import get_max_memory

    return {device: int(ROOM * free) for device, free in get_max_memory().items()}


def device_map(device: str, room: Mapping[int | str, int] | None) -> dict[str, Any]:
    """How `from_pretrained` places weights: each is read once, to where it belongs.

    For `sharded`, what has no room on the devices waits in memory or in the checkpoint's files.
    """
    if device != "sharded":
        return {"device_map": {"": device}}
    return {"device_map": "auto", "max_memory": dict(room or room_for_weights())}


def device_of(module: nn.Module) -> torch.device:
    """Where a module with a weight computes."""
    weight = cast(Tensor, module.weight)
    hook = _offloading_hook(module)
    return weight.device if hook is None else torch.device(hook.execution_device)


def solving_device(device: torch.device) -> torch.device:
    """Where equations of tensors on a device are solved: there, unless it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def is_offloaded(module: nn.Module) -> bool:
    """Whether some weights of a module wait outside its device."""
    return any(_offloading_hook(part) is not None for part in module.modules())


def read_weight(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module itself: the one that it holds, or the one that waits for it."""
    hook = _offloading_hook(module)
    return getattr(module, name) if hook is None else hook.weights_map[name]


@torch.no_grad()
def write_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Change a parameter of a module itself, rounded to its dtype.

    One that waits elsewhere stays in memory from then on: checkpoints are not written to.
    """
    kept = cast(Tensor, getattr(module, name))
    hook = _offloading_hook(module)
    if hook is None:
        kept.copy_(value)
        return
    waiting = hook.weights_map
    changed = value.detach().to("cpu", kept.dtype, copy=True).contiguous()
    waiting.dataset.state_dict[waiting.prefix + name] = changed


def _offloading_hook(module: nn.Module) -> Any:
    """The hook that brings a module's parameters, if these wait outside."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None
