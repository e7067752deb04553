"""The files of a model directory that belong to the model."""

from pathlib import Path
from typing import Any

from memit.errors import InputError
from memit.files.digests import file_sha256
from memit.files.reading import parse_json, read_text

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
"""What transformers looks for: the weights, or else the names of the files that hold them."""


def weight_files(directory: Path) -> list[str]:
    """The safetensors files that transformers reads from a model directory, present or not.

    Copies and other formats may be in the same directory.

    Raises:
        InputError: config.json or the index of the files is damaged.
    """
    named = _read_object(directory / "config.json").get("transformers_weights")
    present = [name for name in WEIGHT_FILES if (directory / name).is_file()]
    names = [str(named)] if named else present[:1]
    if names and names[0].endswith(".json"):
        shards = _read_object(directory / names[0]).get("weight_map")
        names = sorted({str(n) for n in shards.values()}) if isinstance(shards, dict) else ["."]
    if any(Path(name).name != name for name in names):
        raise InputError(f"{directory} names no weights of its own: fetch the model again.")
    return names


def _read_object(path: Path) -> dict[str, Any]:
    found = parse_json(read_text(path, "the model"), path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def directory_digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file that belongs to a model, by its name: that of a GGUF file, or of a
    directory those of weights (`weight_files`), configuration and tokenizer; others do not count.
    """
    if directory.is_file():
        return {directory.name: file_sha256(directory)}
    kinds, weights = {".json", ".txt", ".model"}, weight_files(directory)
    return {
        path.name: file_sha256(path)
        for path in sorted(directory.iterdir())
        if path.is_file() and (path.name in weights or path.suffix in kinds) and path.name[0] != "."
    }
