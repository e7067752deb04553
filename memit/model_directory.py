"""Edits of the weights in a model directory, reversible to the byte.

An edit changes some matrices inside the directory's safetensors files. Their former values, the
delta and the digests of both states are kept in `memit-edits/0001/` and so on. Each file is
replaced by a new one, so that what links to it (a hub cache, DVC's cache) keeps its content; its
header and all other tensors are copied, so that a reverted file equals the original byte for byte.

A delta that was made for the weights before the last edit takes the place of that edit. The new
record holds the weights before both, so that either can be completed or undone after a kill.
"""

import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def apply_edit(directory: Path, delta_file: Path, origin: Mapping[str, str] | None = None) -> Path:
    """Add a delta to the weights in a model directory; gives the folder that records the edit.

    If it was made for the weights before the last edit, it replaces that edit; if it is that edit,
    nothing changes. `origin` is kept in the record.

    Raises:
        InputError: the directory holds no such model, or it is a GGUF file; or the delta may have
            been made for the weights before or after the last edit.
        IntegrityError: the delta was made for other weights, or they were changed since the last
            edit.
        ResourceError: the disk is full.
    """
    if directory.is_file():
        raise InputError(
            f"{directory} is a file, and only a directory is edited in place: `memit export DIR "
            f"--model {directory}` writes the edited model of a GGUF file to a directory."
        )
    delta = WeightDelta.load(delta_file)
    edits = applied_edits(directory)
    last = _read_record(edits[-1]) if edits else {"edited": {}}
    stored = _locate(directory, weight_files(directory), {*delta.changes, *last["edited"]})
    base = {name: matrix.read() for name, matrix in stored.items()}
    if edits and _is_applied(delta_file, edits[-1], base, last["edited"]):
        return edits[-1]
    former = base | _former_weights(edits[-1], last) if edits else base
    replaced: list[Path] = []
    if edits and _is_for(delta, former):
        if delta.changes.keys().isdisjoint(last["edited"]):  # then nothing tells which it is for
            raise InputError(
                f"{delta_file} changes other matrices than {edits[-1]}, and fits {directory} with "
                "that edit and without it: revert it first (memit revert), or edit its layers, too."
            )
        _check_unchanged(edits, base, directory)
        base, replaced = former, [*_left_to_remove(edits, last), edits[-1]]
    check_weights(delta, [(name, base[name]) for name in delta.changes], directory)
    edited = {
        name: added(weight, delta, name).to(weight.dtype) if name in delta.changes else weight
        for name, weight in base.items()
    }
    number = 1 + max((int(folder.name) for folder in edits), default=0)
    folder = directory / EDITS / f"{number:04}"
    record = {"replaces": [path.name for path in replaced], "origin": dict(origin or {})}
    _write_record(folder, delta_file, stored, base, edited, record)
    _write_matrices(stored, edited)
    for path in replaced:
        _remove_record(path)
    return folder


def _is_applied(
    delta_file: Path, folder: Path, weights: Mapping[str, Tensor], edited: Mapping[str, str]
) -> bool:
    """Whether a delta is the one that a folder records, and its result is in the weights."""
    kept = folder / "delta.safetensors"
    is_same = kept.is_file() and file_sha256(kept) == file_sha256(delta_file)
    return is_same and all(tensor_digest(weights[name]) == edited[name] for name in edited)


def _is_for(delta: WeightDelta, weights: Mapping[str, Tensor]) -> bool:
    """Whether a delta was made for these weights."""
    with suppress(IntegrityError):
        check_weights(delta, [(name, weights[name]) for name in delta.changes], "")
        return True
    return False


def _check_unchanged(edits: Sequence[Path], weights: Mapping[str, Tensor], where: Path) -> None:
    """Check that weights are those before or after an edit, as a killed process may leave them.

    Raises:
        IntegrityError: they were changed since by something else.
    """
    records = [_read_record(folder) for folder in edits]
    for name in records[-1]["edited"]:
        known = {record[state].get(name) for record in records for state in ("base", "edited")}
        if tensor_digest(weights[name]) not in known:
            raise IntegrityError(
                f"{name} in {where} was changed after the edit, so nothing was done: restore the "
                "edited file, or fetch the model again."
            )


def _former_weights(folder: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights before an edit.

    Raises:
        IntegrityError: they are damaged.
    """
    try:
        base = load_file(folder / "base.safetensors")
    except Exception as error:
        raise IntegrityError(f"{folder}/base.safetensors is damaged ({error}).") from error
    for name, digest in record["base"].items():
        if tensor_digest(base[name]) != digest:
            raise IntegrityError(f"{folder}/base.safetensors is damaged at {name}.")
    return base


def _left_to_remove(edits: Sequence[Path], record: Mapping[str, Any]) -> list[Path]:
    """Folders of edits that the record's edit replaces, which a killed process has left."""
    return [folder for folder in edits if folder.name in record.get("replaces", [])]


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
    base = _former_weights(folder, record)
    stored = _locate(directory, record["files"], record["base"])
    weights = {name: matrix.read() for name, matrix in stored.items()}
    _check_unchanged(edits, weights, directory)
    _write_matrices(stored, base)
    for path in [*_left_to_remove(edits, record), folder]:
        _remove_record(path)
    return folder


def _remove_record(folder: Path) -> None:
    reverted = folder.with_name(f"{folder.name}-reverted-{secrets.token_hex(4)}")
    os.replace(folder, reverted)
    for name in ("base.safetensors", "delta.safetensors", "edit.json"):
        (reverted / name).unlink(missing_ok=True)
    with suppress(OSError):  # the user's own files stay
        reverted.rmdir()


def edit_status(
    directory: Path,
) -> Iterator[tuple[Path, str, Mapping[str, str], Mapping[str, Any]]]:
    """The edits of a model directory, oldest first: the folder, whether the edit is in the weights,
    what `apply_edit` was told of its origin, and its delta's provenance.

    Raises:
        InputError, IntegrityError: the directory is not what they were made in, or damaged.
    """
    edits = applied_edits(directory)
    for folder in edits:
        record, state = _read_record(folder), "below the next one"
        if folder == edits[-1]:
            stored = _locate(directory, record["files"], record["edited"])
            weights = {name: matrix.read() for name, matrix in stored.items()}
            _check_unchanged(edits, weights, directory)
            state = "in the weights"
            if {name: tensor_digest(weights[name]) for name in weights} != record["edited"]:
                state = "interrupted: apply it again to complete it, or revert it"
        delta = WeightDelta.load(folder / "delta.safetensors")
        yield folder, state, record.get("origin", {}), delta.provenance


def _write_record(
    folder: Path,
    delta_file: Path,
    stored: Mapping[str, StoredMatrix],
    base: Mapping[str, Tensor],
    edited: Mapping[str, Tensor],
    more: Mapping[str, Any],
) -> None:
    """Keep everything that undoes the edit before anything is changed."""
    record = {
        **more,
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
