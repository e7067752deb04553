"""What can be found wrong before the long work starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from flows.parameters import Parameters
from memit.errors import InputError, ResourceError
from tasks.artifacts import project_root
from tasks.loading import BYTES, ModelFiles
from tasks.model import describe_model, fetch_description, resolve_commit
from tasks.requests import locate_records, read_source, sample


def check_inputs(parameters: Parameters) -> None:
    """Read the user's files, look at the model's structure, and compare needs with the machine.

    Raises:
        MemitError: the first thing that would stop the experiment later.
    """
    _check_device(parameters.model.device)
    _check_requests(parameters)
    _check_corpus(parameters)
    described = _describe_model(parameters)
    if described is not None:
        parameters.hyperparameters(described.id, described.layers)
        _check_disk(parameters, described)
        _check_memory(parameters, described)


def _check_device(device: str) -> None:
    if device in ("cpu", "auto"):
        return
    import torch

    if device == "mps":
        present = torch.backends.mps.is_available()
    else:
        number = int(device.partition(":")[2] or 0)
        present = torch.cuda.is_available() and number < torch.cuda.device_count()
    if not present:
        raise InputError(
            f"model.device is {device!r}, which torch does not find on this machine: use cpu, or "
            "install torch for the device (make TORCH_INDEX=...)."
        )


def _check_requests(parameters: Parameters) -> None:
    section = parameters.requests
    if section.source == "synthetic":
        return
    records, _ = read_source(
        section.source, locate_records(section.path, section.url, section.sha256)
    )
    sample(records, section.count, section.seed)


def _check_corpus(parameters: Parameters) -> None:
    section = parameters.statistics
    if section.source == "file" and not Path(str(section.path)).is_file():
        raise InputError(f"{section.path} does not exist: correct statistics.path in params.yaml.")


def _describe_model(parameters: Parameters) -> ModelFiles | None:
    """The structure of a model that is not made here, without its weights."""
    section = parameters.model
    if section.source == "hub":
        name = str(section.id)
        commit = resolve_commit(name, str(section.revision))
        return describe_model("hub", name, commit, fetch_description(name, commit))
    if section.source == "local":
        directory = Path(str(section.path))
        if not directory.is_dir():
            raise InputError(f"{directory} is no directory: correct model.path in params.yaml.")
        return describe_model("local", directory.resolve().name, None, directory)
    return None


def _check_disk(parameters: Parameters, model: ModelFiles) -> None:
    """Compare the space that the statistics and the edit take with what is free."""
    layers = len(parameters.hyperparameters(model.id, model.layers).layers)
    section = parameters.statistics
    moment = 4 * model.inner_width**2
    shards = -(-(section.documents or 1) // section.documents_per_shard)
    changed = 3 * 4 * model.inner_width * model.width
    needed = layers * (moment * (shards + 1) + changed)
    free = shutil.disk_usage(project_root()).free
    if needed > free:
        fitting = int((free / layers - changed) / moment - 1)
        advice = (
            f"use fewer, larger shards (at most {fitting}: raise statistics.documents_per_shard)"
            if fitting > 0
            else "make room, or edit fewer layers"
        )
        raise ResourceError(
            f"the statistics of {layers} layers in {shards} shards and the edit take "
            f"{needed / 1e9:.1f} GB, and {project_root()} has {free / 1e9:.1f} GB free: {advice}."
        )


def _check_memory(parameters: Parameters, model: ModelFiles) -> None:
    """Compare the weights and one layer's equations with the memory of the device."""
    section = parameters.model
    weights = model.parameters * BYTES[section.dtype]
    solve = 3 * 8 * model.inner_width**2
    room, where = _memory(section.device)
    if weights + solve > room:
        raise ResourceError(
            f"{model.id} takes {weights / 1e9:.1f} GB in {section.dtype} and a layer's equations "
            f"{solve / 1e9:.1f} GB, and {where} has {room / 1e9:.1f} GB: use a smaller dtype, or "
            "model.device: sharded over several devices."
        )


def _memory(device: str) -> tuple[int, str]:
    """Bytes that the weights may take, and the name of what has them."""
    import psutil
    import torch

    main = psutil.virtual_memory().available
    cards = range(torch.cuda.device_count()) if device in ("auto", "sharded", "cuda") else ()
    sizes = [torch.cuda.get_device_properties(card).total_memory for card in cards]
    if device == "sharded":
        return sum(sizes) + main, "all devices together"
    if device.startswith("cuda:") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory, device
    return (sizes[0], "the GPU") if sizes else (main, "this machine's memory")
