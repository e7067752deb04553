"""One language model in memory for each process, used by one task at a time or by two pieces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ConfigDict
from torch import nn
from transformers.utils.logging import disable_progress_bar

from memit.batches import auto_token_budget
from memit.errors import IntegrityError, ResourceError
from memit.files.digests import content_digest, file_sha256
from memit.language_model import DTYPES, LanguageModel, load_model
from memit.model_shape import ModelShape
from memit.rounding import round_to_int8
from memit.weight_delta import WeightDelta, check_rounded
from tasks.engine.artifacts import Artifact, Value, cache_directory, fetch_stored
from tasks.engine.cost import unmetered
from tasks.engine.store import shared_store

if TYPE_CHECKING:
    from memit.editors.base import Edit


INT8 = "int8"
"""Weights in eight bits, computed with in the model's dtype."""


class ModelFiles(Value):
    """Contents of `model.json`: which model it is, to the last bit."""

    model_config = ConfigDict(extra="ignore")  # earlier versions wrote more

    source: str
    id: str
    """Hub id, `synthetic`, the package, or the name of the local directory or file."""
    revision: str | None
    """The commit, of a model from the hub; the version, of a package."""
    files: dict[str, str]
    """Each file of the model directory and its SHA-256; or only the GGUF file."""
    quantisation: str | None = None
    """Of a GGUF file: how most of its weights are stored, such as Q4_1."""
    architecture: str
    layers: int
    width: int
    """Hidden size d."""
    inner_width: int
    """Input size f of the down-projection."""
    parameters: int
    output_norm: bool = False
    """Whether a norm follows the down-projections."""

    @property
    def shape(self) -> ModelShape:
        """The kind and the dimensions that costs and presets depend on."""
        widths = self.width, self.inner_width
        kind = self.architecture, self.output_norm
        return ModelShape(self.layers, *widths, self.parameters, *kind)

    def within(self, directory: Path) -> Path:
        """What to load from the directory that holds the files: itself, or its GGUF file."""
        return directory / next(iter(self.files)) if self.quantisation else directory

    @property
    def digest(self) -> str:
        """SHA-256 over the names and contents of all files."""
        return content_digest(self.files)


class ModelReference(Value):
    """A model as a task's input: which one, in which directory, and how it computes."""

    directory: str
    model: ModelFiles
    dtype: str
    device: str
    threads: int
    served_in: str | None = None
    """A dtype, or `int8`, to round the weights to after an edit was applied in `dtype`; None leaves
    them."""

    @property
    def cache_key(self) -> dict[str, object]:
        """Everything that the bits of a result depend on; not the files' path."""
        return {
            "model": self.model.digest,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "served_in": self.served_in,
        }

    def share(self) -> None:
        """Put the model's files into the store, if there is one, for machines that lack them."""
        for name, digest in self.model.files.items():
            path = Path(self.directory, name).absolute()
            Artifact(path=str(path), sha256=digest, size=path.stat().st_size).share()

    @property
    def threads_of_a_piece(self) -> int:
        """The threads of a piece that shares the model, whether or not another one runs."""
        return self.threads // pieces_at_once(self.device, self.threads)

    @property
    def is_rounded(self) -> bool:
        """Whether the weights are rounded after the edit, so that another edit needs fresh ones."""
        return self.served_in not in (None, self.dtype)


def pieces_at_once(device: str, threads: int) -> int:
    """How many pieces of a step compute at the same time in a process.

    Two cores do more for two pieces than for one: threads that divide one piece wait for each other
    at every operation.
    """
    return 2 if device == "cpu" and threads > 1 else 1


class LoadedModel:
    """The model in this process's memory, and the edit in its weights.

    A task has the model for itself, or shares it with another piece: then each computes with its
    own modules, which hold the same weights, on its share of the cores.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        """Threads that compute with the model."""
        self._is_shared = False
        """Whether others may compute with it meanwhile."""
        self._twins: list[LanguageModel] = []
        """Unused modules with the same weights."""
        self._reference: ModelReference | None = None
        self._model: LanguageModel | None = None
        self._edit: str | None = None
        """SHA-256 of the edit's file."""
        self._applied: Edit | None = None

    def __reduce__(self) -> str:
        """Tasks that travel to another process find the model of that one."""
        return "LOADED"

    @contextmanager
    def held(
        self,
        reference: ModelReference,
        edit: Artifact | None = None,
        *,
        load: Callable[[Path], Edit] = WeightDelta.load,
        shared: bool = False,
    ) -> Iterator[LanguageModel]:
        """The model, unedited or with the edit that `load` reads from a file, by default a change
        of its weights, as soon as no other thread is in the way: for this one alone, or `shared`
        with other pieces, which must change no weights then.

        Raises:
            IntegrityError: a file of the model or the edit is not what it was.
        """
        shared = shared and reference.threads_of_a_piece < reference.threads
        with unmetered(), self._changed:
            self._changed.wait_for(lambda: self._users == 0 or self._fits(reference, edit, shared))
            _use_threads(reference.threads)  # the last bits of edited weights depend on them
            main = self._loaded(reference, edit, load)
            _use_threads(reference.threads_of_a_piece if shared else reference.threads)
            # Edits that route to another model, and devices that fetch weights, serve one thread.
            self._is_shared = shared and main.router is None and not main.is_offloaded
            lm = (self._twins.pop() if self._twins else _twin(main)) if self._is_shared else main
            self._users += 1
        try:
            yield lm
        finally:
            with self._changed:
                self._users -= 1
                if lm is not main:
                    self._twins.append(lm)
                self._changed.notify_all()

    def _fits(self, reference: ModelReference, edit: Artifact | None, shared: bool) -> bool:
        is_here = (self._reference, self._edit) == (reference, edit and edit.sha256)
        at_once = pieces_at_once(reference.device, reference.threads)
        return shared and self._is_shared and is_here and self._users < at_once

    def _loaded(
        self, reference: ModelReference, edit: Artifact | None, load: Callable[[Path], Edit]
    ) -> LanguageModel:
        """The model, loaded if it is another one, with the edit in its weights."""
        is_other = self._edit != (edit and edit.sha256)
        if self._reference != reference or (reference.is_rounded and is_other):
            self._reference = self._model = self._edit = self._applied = None  # makes room
            self._twins.clear()
            self._model = load_reference(reference)
            self._put(self._model, edit, load)
            if reference.is_rounded:
                _round_weights(self._model, reference)
            self._reference = reference
        assert self._model is not None
        self._put(self._model, edit, load)
        return self._model

    def _put(self, lm: LanguageModel, edit: Artifact | None, load: Callable[[Path], Edit]) -> None:
        """Replace the edit in the weights, unless it is this one already."""
        if self._edit == (edit and edit.sha256):
            return
        if self._applied is not None:
            self._applied.revert(lm)
            self._edit = self._applied = None
        if edit is not None:
            applied = load(edit.checked())
            applied.apply(lm)
            self._edit, self._applied = edit.sha256, applied


LOADED = LoadedModel()
loaded = LOADED.held
"""The model in this process's memory, see there."""


def _use_threads(count: int) -> None:
    """Let this thread, and it alone, compute with so many threads."""
    torch.get_num_threads()  # else its first operation would take the number that another one set
    torch.set_num_threads(count)


def _twin(lm: LanguageModel) -> LanguageModel:
    """The same weights in modules of their own: hooks on a torch model are not thread-safe, and
    neither are tokenizers."""
    weights = {id(tensor): tensor for tensor in (*lm.model.parameters(), *lm.model.buffers())}
    model, tokenizer = deepcopy(lm.model, weights), deepcopy(lm.tokenizer)
    return LanguageModel(model, tokenizer, name=lm.name, revision=lm.revision)


def token_budget(
    setting: int | str, reference: ModelReference, *, trained_blocks: int | None = None
) -> int:
    """Padded tokens in a batch: as set, or for `auto` what `memit.batches` finds.

    The last bits of results depend on it, so that a flow finds it once for all workers.
    """
    if isinstance(setting, int):
        return setting
    shape, size = reference.model.shape, DTYPES[reference.dtype].itemsize
    return auto_token_budget(shape, size, reference.device, trained_blocks=trained_blocks)


def load_reference(reference: ModelReference) -> LanguageModel:
    """Load a model into memory after comparing its files with their digests.

    Raises:
        IntegrityError: one of them is missing or changed.
    """
    disable_progress_bar()  # the step has its own
    _use_threads(reference.threads)
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
    place = reference.model.within(directory)
    lm = load_model(place, dtype=reference.dtype, device=reference.device)
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
    if lm.is_offloaded:
        raise ResourceError(
            f"{lm.name} does not fit on its devices, and only weights there are rounded to "
            "evaluation.dtype: leave it null, or set model.dtype."
        )
    if reference.served_in == INT8:
        round_to_int8(lm)
        return
    dtype = DTYPES[str(reference.served_in)]
    for name, parameter in lm.model.named_parameters():
        check_rounded(parameter, dtype, name)
    nn.Module.to(lm.model, dtype=dtype)
