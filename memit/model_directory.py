"""Edits of the weights in a model directory, reversible to the byte.

An edit changes some matrices inside the directory's safetensors files. Their former values, the
delta and the digests of both states are kept in `memit-edits/0001/` and so on. Each file is
replaced by a new one, so that what links to it (a hub cache, DVC's cache) keeps its content; its
header and all other tensors are copied, so that a reverted file equals the original byte for byte.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from memit.errors import InputError, IntegrityError
from memit.files.atomic import temporary, write_whole
from memit.files.digests import file_sha256
from memit.files.tensors import tensor_digest
from memit.model_files import WEIGHT_FILES, weight_files
from memit.weight_delta import WeightDelta, added, check_weights

EDITS = "memit-edits"
LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, the format's own limit."""


@dataclass(frozen=True)
class StoredMatrix:
    """A parameter's position in a safetensors file."""

    file: Path
    key: str
    """Its name in the file, which may lack the model's own prefix."""
    start: int
    """Offset of its first byte in the file."""

    def read(self) -> Tensor:
        """Its value, on the CPU."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.key)


def applied_edits(directory: Path) -> list[Path]:
    """The records of the edits that are applied to a model directory, oldest first."""
    return sorted(path for path in (directory / EDITS).glob("*") if path.name.isdigit())


def apply_edit(directory: Path, delta_file: Path) -> Path:
    """Add a delta to the weights in a model directory; gives the folder that records the edit.

    Raises:
        InputError: the directory holds no such model, an unfinished edit or this one already, or it
            is a GGUF file.
        IntegrityError: the delta was made for other weights.
        ResourceError: the disk is full.
    """
    if directory.is_file():
        raise InputError(
            f"{directory} is a file, and only a directory is edited in place: `memit export DIR "
            f"--model {directory}` writes the edited model of a GGUF file to a directory."
        )
    delta = WeightDelta.load(delta_file)
    edits = applied_edits(directory)
    for folder in edits:
        former = folder / "delta.safetensors"
        if former.is_file() and file_sha256(former) == file_sha256(delta_file):
            raise InputError(
                f"this edit is in {directory} already ({folder}): nothing was changed; `memit "
                f"revert {directory}` undoes the last edit."
            )
    for folder in edits[-1:]:
        record = _read_record(folder)
        matrices = _locate(directory, record["files"], record["edited"])
        if {name: tensor_digest(m.read()) for name, m in matrices.items()} != record["edited"]:
            raise InputError(
                f"the last edit of {directory} was interrupted or its weights were changed since: "
                f"run `memit revert {directory}` first."
            )
    stored = _locate(directory, weight_files(directory), delta.changes)
    base = {name: matrix.read() for name, matrix in stored.items()}
    check_weights(delta, base.items(), directory)
    edited = {name: added(base[name], delta, name).to(base[name].dtype) for name in stored}
    number = 1 + max((int(folder.name) for folder in edits), default=0)
    folder = directory / EDITS / f"{number:04}"
    _write_record(folder, delta_file, stored, base, edited)
    _write_matrices(stored, edited)
    return folder


def revert_edit(directory: Path) -> Path:
    """Undo the last edit of a model directory; gives the folder that recorded it, now removed.

    Raises:
        InputError: no edit is applied.
        IntegrityError: the weights were changed since, or their former values are damaged.
    """
    edits = applied_edits(directory)
    if not edits:
        raise InputError(f"no edit is applied to {directory}: there is nothing to revert.")
    folder = edits[-1]
    record = _read_record(folder)
    try:
        base = load_file(folder / "base.safetensors")
    except Exception as error:
        raise IntegrityError(f"{folder}/base.safetensors is damaged ({error}).") from error
    stored = _locate(directory, record["files"], record["base"])
    for name, matrix in stored.items():
        if tensor_digest(base[name]) != record["base"][name]:
            raise IntegrityError(f"{folder}/base.safetensors is damaged at {name}.")
        if tensor_digest(matrix.read()) not in (record["base"][name], record["edited"][name]):
            raise IntegrityError(
                f"{name} in {matrix.file} was changed after the edit, so nothing was reverted: "
                "restore the edited file, or fetch the model again."
            )
    _write_matrices(stored, base)
    reverted = folder.with_name(f"{folder.name}-reverted-{secrets.token_hex(4)}")
    os.replace(folder, reverted)
    for name in ("base.safetensors", "delta.safetensors", "edit.json"):
        (reverted / name).unlink(missing_ok=True)
    with suppress(OSError):  # the user's own files stay
        reverted.rmdir()
    return folder


def _write_record(
    folder: Path,
    delta_file: Path,
    stored: Mapping[str, StoredMatrix],
    base: Mapping[str, Tensor],
    edited: Mapping[str, Tensor],
) -> None:
    """Keep everything that undoes the edit before anything is changed."""
    record = {
        "base": {name: tensor_digest(matrix) for name, matrix in base.items()},
        "edited": {name: tensor_digest(matrix) for name, matrix in edited.items()},
        "files": sorted({matrix.file.name for matrix in stored.values()}),
    }
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    folder.parent.mkdir(exist_ok=True)
    with temporary(folder) as making:
        write_whole(making / "base.safetensors", lambda path: save_file(dict(base), path))
        write_whole(making / "delta.safetensors", lambda path: shutil.copyfile(delta_file, path))
        write_whole(making / "edit.json", lambda path: path.write_text(text, encoding="utf-8"))
        os.replace(making, folder)


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "edit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{folder}/edit.json is damaged ({error}): restore the model's weights by hand from "
            f"{folder}/base.safetensors."
        ) from error


def _write_matrices(stored: Mapping[str, StoredMatrix], matrices: Mapping[str, Tensor]) -> None:
    """Replace each file that holds some of the matrices by one with their new values."""
    for file in sorted({matrix.file for matrix in stored.values()}):
        new = {m: matrices[name] for name, m in stored.items() if m.file == file}
        write_whole(file, partial(_copy_with, file, new))


def _copy_with(source: Path, matrices: Mapping[StoredMatrix, Tensor], target: Path) -> None:
    shutil.copyfile(source, target)
    with open(target, "r+b") as stream:
        for stored, matrix in matrices.items():
            stream.seek(stored.start)
            stream.write(matrix.contiguous().view(torch.uint8).numpy().tobytes())


def _locate(directory: Path, files: Sequence[str], names: Iterable[str]) -> dict[str, StoredMatrix]:
    """Find parameters in some of a model directory's safetensors files.

    A file may know a parameter by its name without the prefix of the model's class.
    """
    if not files:
        raise InputError(
            f"{directory} holds no safetensors weights ({' or '.join(WEIGHT_FILES)}): give a model "
            "directory."
        )
    known = [matrix for file in files for matrix in _index(directory / file)]
    located = {}
    for name in names:
        found = [m for m in known if name == m.key or name.endswith(f".{m.key}")]
        if not found:
            raise InputError(
                f"{directory} has no weights named {name}: the edit belongs to another model."
            )
        if len(found) > 1:
            one, other = (f"{matrix.key} in {matrix.file.name}" for matrix in found[:2])
            raise IntegrityError(
                f"{directory} holds both {one} and {other}: remove the files that do not belong "
                "to the model."
            )
        located[name] = found[0]
    return located


def _index(file: Path) -> list[StoredMatrix]:
    """The tensors that a safetensors file's header names."""
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > LARGEST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
    except (OSError, struct.error, ValueError) as error:
        raise IntegrityError(f"{file} is no safetensors file ({error}): fetch it again.") from error
    return [
        StoredMatrix(file, key, 8 + length + entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    ]
