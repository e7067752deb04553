"""One language model in memory for each process, used by one piece at a time.

Hooks on a torch model know nothing of threads, and a CPU has only the cores that it has: whoever
computes holds the lock. While one piece computes, the others read, write and hash.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memit.errors import InputError, IntegrityError, ResourceError
from memit.files.reading import file_sha256, parse_json, read_text
from memit.model_shape import ModelShape
from tasks.engine.artifacts import Artifact, Value, cache_directory, describe, fetch_stored
from tasks.engine.store import shared_store

if TYPE_CHECKING:
    from memit.editors.base import Edit
    from memit.language_model import LanguageModel


WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
"""What transformers looks for: the weights, or else the names of the files that hold them."""
BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}
"""Size of a number."""


class ModelFiles(Value):
    """``model.json``: which model it is, to the last bit."""

    source: str
    id: str
    """Hub id, ``synthetic``, or the name of the local directory."""
    revision: str | None
    """The commit, of a model from the hub."""
    files: dict[str, str]
    """Each file of the model directory and its SHA-256."""
    architecture: str
    layers: int
    width: int
    """Hidden size d."""
    inner_width: int
    """Input size f of the down-projection."""
    parameters: int
    recall: float | None = None
    """Of a model trained here: share of its facts, in percent, that it answers (argmax)."""

    @property
    def shape(self) -> ModelShape:
        """What its costs follow from."""
        return ModelShape(self.layers, self.width, self.inner_width, self.parameters)

    @property
    def digest(self) -> str:
        """SHA-256 over the names and contents of all files."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


class ModelReference(Value):
    """A model for a task: what it is, where it lies, and how it computes."""

    directory: str
    model: ModelFiles
    dtype: str
    device: str
    threads: int
    served_in: str | None = None
    """A dtype to round the weights to after an edit was applied in ``dtype``; None leaves them."""

    @property
    def cache_key(self) -> dict[str, object]:
        """Everything that the bits of a result depend on; not where the files lie."""
        return {
            "model": self.model.digest,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "served_in": self.served_in,
        }

    def share(self) -> None:
        """Put the model's files into the store, if there is one, for machines that lack them."""
        for name in self.model.files:
            describe(Path(self.directory) / name).share()

    @property
    def is_rounded(self) -> bool:
        """Whether the weights are rounded after the edit, so that another edit needs fresh ones."""
        return self.served_in not in (None, self.dtype)


class _Slot:
    """The model that is loaded now, and the edit that stands in its weights."""

    lock = threading.RLock()
    reference: ModelReference | None = None
    model: LanguageModel | None = None
    edit: str | None = None
    applied: Edit | None = None


@contextmanager
def loaded(reference: ModelReference) -> Iterator[LanguageModel]:
    """The unedited model, for this thread alone.

    Raises:
        IntegrityError: a file of the model is not what it was.
    """
    with _held(reference, None, lambda lm: None) as lm:
        yield lm


@contextmanager
def with_edit(reference: ModelReference, edit: Artifact | None) -> Iterator[LanguageModel]:
    """The model with the edit in the file ``edit``, if there is one, for this thread alone.

    Raises:
        IntegrityError: a file of the model or the delta is not what it was.
    """
    with _held(reference, edit and edit.sha256, lambda lm: _put(lm, edit)) as lm:
        yield lm


@contextmanager
def _held(
    reference: ModelReference, wanted: str | None, put: Callable[[LanguageModel], None]
) -> Iterator[LanguageModel]:
    """The model with the ``wanted`` edit, which ``put`` puts in where none stands."""
    with _Slot.lock:
        stale = reference.is_rounded and _Slot.edit != wanted
        if _Slot.model is None or _Slot.reference != reference or stale:
            _Slot.reference = _Slot.model = _Slot.edit = _Slot.applied = None
            lm = load_reference(reference)
            put(lm)
            if reference.is_rounded:
                _round_weights(lm, reference)
            _Slot.model, _Slot.reference = lm, reference
        elif _Slot.edit != wanted:
            if _Slot.applied is not None:
                _Slot.applied.revert(_Slot.model)
                _Slot.edit = _Slot.applied = None
            put(_Slot.model)
        yield _Slot.model


def token_budget(
    setting: int | str, reference: ModelReference, *, trained_blocks: int | None = None
) -> int:
    """Padded tokens in a batch: as set, or for ``auto`` what `memit.batches` finds.

    Results' last bits depend on it: a flow asks once and tells all workers.
    """
    if isinstance(setting, int):
        return setting
    from memit.batches import auto_token_budget

    shape, size = reference.model.shape, BYTES[reference.dtype]
    return auto_token_budget(shape, size, reference.device, trained_blocks=trained_blocks)


def weight_files(directory: Path) -> list[str]:
    """The safetensors files that transformers reads from a model directory, there or not.

    Copies and other formats' files may lie beside them. Raises `InputError` if config.json or the
    index of the files is damaged.
    """
    named = _read_object(directory / "config.json").get("transformers_weights")
    there = [name for name in WEIGHT_FILES if (directory / name).is_file()]
    names = [str(named)] if named else there[:1]
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
    """The SHA-256 of each file that belongs to a model, by its name.

    Weights (`weight_files`), configuration and tokenizer count; other files do not.
    """
    kinds, weights = {".json", ".txt", ".model"}, weight_files(directory)
    return {
        path.name: file_sha256(path)
        for path in sorted(directory.iterdir())
        if path.is_file() and (path.name in weights or path.suffix in kinds) and path.name[0] != "."
    }


def load_reference(reference: ModelReference) -> LanguageModel:
    """Load a model into memory after its files were compared with their digests.

    Raises:
        IntegrityError: one of them is missing or changed.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from memit.language_model import load_model

    disable_progress_bar()  # the step's own bar says more
    torch.set_num_threads(reference.threads)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
    directory = _directory(reference)
    for name, digest in reference.model.files.items():
        path = directory / name
        if not path.is_file() or file_sha256(path) != digest:
            raise IntegrityError(
                f"{path} is missing or is not the file that model.json describes: run the step "
                "model again."
            )
    lm = load_model(directory, dtype=reference.dtype, device=reference.device)
    lm.name, lm.revision = reference.model.id, reference.model.revision
    return lm


def _directory(reference: ModelReference) -> Path:
    """The model's directory, on a machine that lacks it one with what the store has of it."""
    given = Path(reference.directory)
    if given.is_dir() or shared_store() is None:
        return given
    fetched = cache_directory() / "models" / reference.model.digest
    fetched.mkdir(parents=True, exist_ok=True)
    for name, digest in reference.model.files.items():
        path = fetch_stored(digest)
        if path is not None and not (fetched / name).is_file():
            (fetched / name).unlink(missing_ok=True)
            (fetched / name).symlink_to(path)
    return fetched


def _round_weights(lm: LanguageModel, reference: ModelReference) -> None:
    from torch import nn

    from memit.language_model import DTYPES
    from memit.weight_delta import check_rounded

    if lm.is_offloaded:
        raise ResourceError(
            f"{lm.name} does not fit on its devices, and only weights there are rounded to "
            "evaluation.dtype: leave it null, or set model.dtype."
        )
    dtype = DTYPES[str(reference.served_in)]
    for name, parameter in lm.model.named_parameters():
        check_rounded(parameter, dtype, name)
    nn.Module.to(lm.model, dtype=dtype)


def _put(lm: LanguageModel, edit: Artifact | None) -> None:
    from memit.editors.saved_edit import load_edit

    if edit is not None:
        wanted = load_edit(edit.checked())
        wanted.apply(lm)
        _Slot.edit, _Slot.applied = edit.sha256, wanted
