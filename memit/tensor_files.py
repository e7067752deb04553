"""Tensors in a safetensors file that carries the checksum of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memit.errors import IntegrityError
from memit.language_model import tensor_digest

CHECKSUM = "sha256"
"""Where the metadata holds the checksum."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and what is said of them; equal content gives equal bytes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, {**metadata, CHECKSUM: _checksum(plain, metadata)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata that `save_tensors` wrote.

    Raises:
        IntegrityError: the file is damaged, or was not written by `save_tensors`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}); make or fetch it again.") from error
    if metadata.pop(CHECKSUM, None) != _checksum(tensors, metadata):
        raise IntegrityError(
            f"{path} is damaged, its checksum is of another content; make or fetch it again."
        )
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata and the name, dtype, shape and bytes of each tensor."""
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    content = json.dumps([dict(metadata), digests], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
