"""Files that tasks exchange: described by their content, written atomically, cached in pieces.

Named results (`artifacts/`, `evaluation/`, `report/`) are in the working directory and belong to
DVC. Finished pieces are in `.cache/` under the project's root, named by their content, and belong
to Prefect's cache: deleting `.cache/` costs time and nothing else. Machines that share a
`tasks.engine.store` keep pieces and their records there, too, and fetch them from it on demand.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from memit.errors import IntegrityError
from memit.files import atomic
from memit.files.atomic import PARTIAL, write_whole
from memit.files.digests import file_sha256
from tasks.engine.store import shared_store


def project_root() -> Path:
    """The directory that holds `.cache/` and `mlflow.db`.

    `DVC_ROOT` names it when DVC runs an experiment in a scratch clone, so that all experiments
    share the finished pieces; otherwise it is the working directory.
    """
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def cache_directory() -> Path:
    """`.cache/` under the project's root."""
    return project_root() / ".cache"


class Value(BaseModel):
    """Input or result of a task: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Artifact(Value):
    """A file and its expected content. Inside `.cache/` the path is relative to it."""

    path: str
    sha256: str
    size: int

    @property
    def file(self) -> Path:
        """The file's path on this machine."""
        return cache_directory() / self.path

    @property
    def cache_key(self) -> str:
        """What a cached task sees of a file: its content, never its name."""
        return self.sha256

    def intact(self) -> bool:
        """Whether the file is here with exactly this content, or else in the store."""
        return self._is_here() or self._is_stored()

    def checked(self) -> Path:
        """The file's path, after a look at its content; fetched from the store if it is not here.

        Raises:
            IntegrityError: it is missing, truncated or changed.
        """
        if self._is_here():
            return self.file
        fetched = fetch_stored(self.sha256)
        if fetched is None:
            raise IntegrityError(
                f"{self.file} is missing or is not what was written there: delete it and run again."
            )
        return fetched

    def share(self) -> None:
        """Put the file into the store, if there is one and it lacks it."""
        store = shared_store()
        if store is not None and not self._is_stored():
            store.put(self.checked(), _stored_name(self.sha256))

    def _is_here(self) -> bool:
        try:
            return self.file.stat().st_size == self.size and file_sha256(self.file) == self.sha256
        except OSError:
            return False

    def _is_stored(self) -> bool:
        store = shared_store()
        return store is not None and store.size(_stored_name(self.sha256)) == self.size


def describe(path: Path) -> Artifact:
    """The artifact for a file that is already in place."""
    return Artifact(path=str(path.absolute()), sha256=file_sha256(path), size=path.stat().st_size)


def write_file(path: Path, write: Callable[[Path], object]) -> Artifact:
    """Write a file atomically and describe it.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    write_whole(path, write)
    return describe(path)


def write_text(path: Path, text: str) -> Artifact:
    """Write a text file atomically."""
    return write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> Artifact:
    """Write JSON with sorted keys, so that equal content has equal bytes. NaN is refused."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return write_text(path, text + "\n")


def copy_file(source: Path, target: Path) -> Artifact:
    """Copy a file atomically."""
    return write_file(target, lambda partial: shutil.copyfile(source, partial))


def store_piece(step: str, suffix: str, write: Callable[[Path], object]) -> Artifact:
    """Let `write` fill a file of `.cache/pieces/<step>/`, named by its content, and share it."""
    pieces: list[Artifact] = []

    def name(partial: Path) -> str:
        found = describe(partial)
        piece = as_piece(found, step, suffix)
        pieces.append(piece)
        return Path(piece.path).name

    write_whole(cache_directory() / "pieces" / step / "new piece", write, name)
    (piece,) = pieces
    piece.share()  # here, since Prefect would go on without a piece that its record cannot share
    return piece


def as_piece(file: Artifact, step: str, suffix: str | None = None) -> Artifact:
    """The piece of the cache that has the content of a file."""
    suffix = Path(file.path).suffix if suffix is None else suffix
    return file.model_copy(update={"path": f"pieces/{step}/{file.sha256[:40]}{suffix}"})


def fetch_stored(sha256: str) -> Path | None:
    """A file of the store by the digest of its content, in `.cache/fetched/`; None without one.

    Raises:
        IntegrityError: what the store holds under this digest is something else.
    """
    path = cache_directory() / "fetched" / sha256
    if path.exists() and file_sha256(path) == sha256:
        return path
    store = shared_store()
    if store is None or store.size(_stored_name(sha256)) is None:
        return None

    def fetch(partial: Path) -> None:
        store.get(_stored_name(sha256), partial)
        if file_sha256(partial) != sha256:
            raise IntegrityError(
                f"{_stored_name(sha256)} in the store {store.address} is damaged: delete it there "
                "and run again."
            )

    write_whole(path, fetch)
    return path


def _stored_name(sha256: str) -> str:
    return f"files/{sha256[:2]}/{sha256}"


def artifacts_in(value: Any) -> Iterator[Artifact]:
    """The files that a result or an argument names."""
    if isinstance(value, Artifact):
        yield value
    elif isinstance(value, BaseModel):
        yield from artifacts_in(dict(value))
    elif isinstance(value, Mapping):
        yield from artifacts_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from artifacts_in(item)


# --- temporary files of killed processes ----------------------------------------------------------


@contextmanager
def _noted(partial: Path) -> Iterator[None]:
    """Keep a note of a temporary path in `.cache/`, locked for as long as this process lives.

    Without a writable `.cache/` there is no note, and what a killed process leaves there stays.
    """
    note = _notes() / partial.name
    with ExitStack() as stack:
        with suppress(OSError):
            if note.parent.parent.is_dir():
                note.parent.mkdir(exist_ok=True)
                stream = stack.enter_context(note.open("wb", buffering=0))
                stack.callback(note.unlink, missing_ok=True)
                fcntl.flock(stream, fcntl.LOCK_EX)
                stream.write(os.fsencode(partial.absolute()))
        yield


atomic.noted = _noted


def remove_leftovers() -> None:
    """Delete the temporary files of killed processes of this project, as their notes name them."""
    for note in _notes().glob(f".*{PARTIAL}"):
        with suppress(OSError), note.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial = Path(os.fsdecode(stream.read()))
            if partial.name == note.name:  # else the note was torn
                for path in partial.parent.glob(f"{escape(partial.name)}*"):  # SQLite's journal
                    atomic.remove(path)
            note.unlink()


def _notes() -> Path:
    return cache_directory() / "writing"
