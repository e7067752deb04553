"""Edits on an ordinary model directory: put in, taken out again to the very bits.

An edit changes some matrices inside the directory's safetensors files. What stood there before, the
delta, and the digests of both states are kept next to them, in ``memit-edits/0001/`` and so on.
Files are replaced whole, so that what links to them (a hub cache, DVC's cache) keeps its content.
Headers and everything else in them stay, so that a reverted file equals the original byte for byte.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memit.errors import InputError, IntegrityError, ResourceError
from memit.files.atomic import temporary
from tasks.engine.artifacts import copy_file, write_file, write_json
from tasks.engine.loaded_model import WEIGHT_FILES, weight_files

if TYPE_CHECKING:
    from torch import Tensor


EDITS = "memit-edits"
LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, the format's own limit."""


@dataclass(frozen=True)
class StoredMatrix:
    """Where a parameter lies in a checkpoint."""

    file: Path
    key: str
    """Its name in the file, which may lack the model's own prefix."""
    start: int
    """First byte in the file."""
    stop: int
    """The byte behind the last."""


def applied_edits(directory: Path) -> list[Path]:
    """The edits that stand in a model directory, oldest first."""
    folder = directory / EDITS
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit())


def apply_edit(directory: Path, delta_file: Path) -> Path:
    """Put a delta into the weights of a model directory; gives the folder that undoes it.

    Raises:
        InputError: the directory holds no such model, or an edit that is not finished.
        IntegrityError: the delta was made for other weights.
        ResourceError: there is no room.
    """
    from memit.weight_delta import WeightDelta, added, check_weights

    delta = WeightDelta.load(delta_file)
    _check_finished(directory)
    places = _locate(directory, weight_files(directory), delta.changes)
    base = {name: _read(place) for name, place in places.items()}
    check_weights(delta, base.items(), directory)
    edited = {name: added(base[name], delta, name).to(base[name].dtype) for name in places}
    number = 1 + max((int(folder.name) for folder in applied_edits(directory)), default=0)
    folder = directory / EDITS / f"{number:04}"
    _write_record(folder, delta_file, places, base, edited)
    _write_matrices(places, edited)
    return folder


def revert_edit(directory: Path) -> Path:
    """Take the last edit out of a model directory; gives the folder that recorded it, now gone.

    Raises:
        InputError: no edit stands in it.
        IntegrityError: the weights were changed since, or what was kept is damaged.
    """
    from safetensors.torch import load_file

    edits = applied_edits(directory)
    if not edits:
        raise InputError(f"no edit stands in {directory}: there is nothing to revert.")
    folder = edits[-1]
    record = _read_record(folder)
    try:
        base = load_file(folder / "base.safetensors")
    except Exception as error:
        raise IntegrityError(f"{folder}/base.safetensors is damaged ({error}).") from error
    places = _locate(directory, record["files"], record["base"])
    for name, place in places.items():
        if _digest(base[name]) != record["base"][name]:
            raise IntegrityError(f"{folder}/base.safetensors is damaged at {name}.")
        if _digest(_read(place)) not in (record["base"][name], record["edited"][name]):
            raise IntegrityError(
                f"{name} in {place.file} was changed after the edit was applied: it is left alone."
            )
    _write_matrices(places, base)
    gone = folder.with_name(f"{folder.name}-reverted-{secrets.token_hex(4)}")
    os.replace(folder, gone)
    for name in ("base.safetensors", "delta.safetensors", "edit.json"):
        (gone / name).unlink(missing_ok=True)
    with suppress(OSError):  # what the user put there stays
        gone.rmdir()
    return folder


def _check_finished(directory: Path) -> None:
    for folder in applied_edits(directory)[-1:]:
        record = _read_record(folder)
        places = _locate(directory, record["files"], record["edited"])
        found = {name: _digest(_read(place)) for name, place in places.items()}
        if found != record["edited"]:
            raise InputError(
                f"the last edit in {directory} was interrupted or its weights were changed since: "
                f"run `memit revert {directory}` first."
            )


def _digest(matrix: Tensor) -> str:
    from memit.files.tensors import tensor_digest

    return tensor_digest(matrix)


def _write_record(
    folder: Path,
    delta_file: Path,
    places: Mapping[str, StoredMatrix],
    base: Mapping[str, Tensor],
    edited: Mapping[str, Tensor],
) -> None:
    """Keep everything that undoes the edit before anything is changed."""
    from safetensors.torch import save_file

    record = {
        "base": {name: _digest(matrix) for name, matrix in base.items()},
        "edited": {name: _digest(matrix) for name, matrix in edited.items()},
        "files": sorted({place.file.name for place in places.values()}),
    }
    folder.parent.mkdir(exist_ok=True)
    with temporary(folder) as making:
        write_file(making / "base.safetensors", lambda path: save_file(dict(base), path))
        copy_file(delta_file, making / "delta.safetensors")
        write_json(making / "edit.json", record)
        os.replace(making, folder)


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "edit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{folder}/edit.json is damaged ({error}): put the model's weights back by hand from "
            f"{folder}/base.safetensors."
        ) from error


def _write_matrices(places: Mapping[str, StoredMatrix], matrices: Mapping[str, Tensor]) -> None:
    """Replace each file that holds some of the matrices by one with their new values."""
    for file in sorted({place.file for place in places.values()}):
        new = {p: matrices[name] for name, p in places.items() if p.file == file}
        room = shutil.disk_usage(file.parent).free
        if file.stat().st_size > room:
            raise ResourceError(f"{file} is rewritten whole, for which {file.parent} has no room.")
        write_file(file, lambda path, f=file, n=new: _copy_with(f, n, path))


def _copy_with(source: Path, matrices: Mapping[StoredMatrix, Tensor], target: Path) -> None:
    import torch

    shutil.copyfile(source, target)
    with open(target, "r+b") as stream:
        for place, matrix in matrices.items():
            content = matrix.contiguous().view(torch.uint8).numpy().tobytes()
            if len(content) != place.stop - place.start:
                raise IntegrityError(f"{place.key} in {source} has another size than the edit.")
            stream.seek(place.start)
            stream.write(content)


def _read(place: StoredMatrix) -> Tensor:
    from safetensors import safe_open

    with safe_open(place.file, framework="pt") as file:
        return file.get_tensor(place.key)


def _locate(directory: Path, files: Sequence[str], names: Iterable[str]) -> dict[str, StoredMatrix]:
    """Find parameters in some of a model directory's safetensors files."""
    if not files:
        raise InputError(
            f"{directory} holds no safetensors weights ({' or '.join(WEIGHT_FILES)}): give a model "
            "directory."
        )
    known = [place for file in files for place in _index(directory / file)]
    return {name: _match(directory, name, known) for name in names}


def _match(directory: Path, name: str, known: Sequence[StoredMatrix]) -> StoredMatrix:
    """The place of a parameter, under its own name or without the prefix of the model's class."""
    parts = name.split(".")
    names = {".".join(parts[first:]) for first in range(len(parts))}
    found = [place for place in known if place.key in names]
    if not found:
        raise InputError(
            f"{directory} has no weights named {name}: the edit belongs to another model."
        )
    if len(found) > 1:
        one, other = (f"{place.key} in {place.file.name}" for place in found[:2])
        raise IntegrityError(
            f"{directory} holds {one} and {other}, so that it cannot be told which is read: remove "
            "the files that do not belong to it."
        )
    return found[0]


def _index(file: Path) -> list[StoredMatrix]:
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > LARGEST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
    except (OSError, struct.error, ValueError) as error:
        raise IntegrityError(f"{file} is no safetensors file ({error}).") from error
    return [
        StoredMatrix(file, key, *(8 + length + offset for offset in entry["data_offsets"]))
        for key, entry in header.items()
        if key != "__metadata__"
    ]
