"""Tensors in a safetensors file that carries the checksum of its content."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memit.errors import IntegrityError
from memit.files.atomic import write_whole

ENTRY = "memit"
"""The only entry of the file's metadata, as JSON: the format does not keep the order of several."""


def tensor_digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{flat.dtype} {tuple(flat.shape)}\n".encode())
    digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata atomically; equal content gives equal bytes.

    Raises:
        ResourceError: the disk is full.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {"metadata": dict(metadata), "sha256": _checksum(plain, metadata)}
    entry = {ENTRY: json.dumps(described, sort_keys=True, ensure_ascii=False)}
    write_whole(Path(path), lambda partial: save_file(plain, partial, entry))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata that `save_tensors` wrote.

    Raises:
        IntegrityError: the file is damaged, or was not written by `save_tensors`.
    """
    with _opened(path) as file:
        metadata, checksum = _described(file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if checksum != _checksum(tensors, metadata):
        raise IntegrityError(
            f"{path} is damaged, its checksum is of another content; make or fetch it again."
        )
    return tensors, metadata


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata alone, which is not compared with the checksum.

    Raises:
        IntegrityError: the file was not written by `save_tensors`.
    """
    with _opened(path) as file:
        return _described(file)[0]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path} cannot be read ({error!r}); make or fetch it again."
        ) from error


def _described(file: Any) -> tuple[dict[str, str], str]:
    """Metadata and checksum; raises KeyError, TypeError or ValueError if there are none."""
    described = json.loads((file.metadata() or {})[ENTRY])
    return dict(described["metadata"]), described["sha256"]


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata and the name, dtype, shape and bytes of each tensor."""
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    content = json.dumps([dict(metadata), digests], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
