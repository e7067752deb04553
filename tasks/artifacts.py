"""Where results are kept: files written whole or not at all, and the cache of finished pieces.

Two places, two owners. Named results (``artifacts/``, ``evaluation/``, ``report/``) lie in the
working directory and belong to DVC. Finished pieces lie in ``.cache/`` under the project's root,
are named by their content, and belong to Prefect's cache: deleting ``.cache/`` costs time and
nothing else. Where machines share a `tasks.store`, pieces and their records lie there, too, and are
fetched from it when they are wanted.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.results import ResultRecord  # pyright: ignore[reportPrivateImportUsage]
from pydantic import BaseModel, ConfigDict

from memit import whole_files
from memit.errors import IntegrityError
from memit.reading import file_sha256
from memit.whole_files import PARTIAL, write_whole
from tasks.code import code_of
from tasks.records import Records, origin_key, read_record
from tasks.store import shared_store


def project_root() -> Path:
    """The directory that holds ``.cache/`` and ``mlflow.db``.

    ``DVC_ROOT`` names it when DVC runs an experiment in a scratch clone, so that all experiments
    share the finished pieces; otherwise it is the working directory.
    """
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def cache_directory() -> Path:
    """``.cache/`` under the project's root."""
    return project_root() / ".cache"


class Value(BaseModel):
    """What tasks take and give: plain, and with no other fields than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Artifact(Value):
    """A file and what it must contain. Inside ``.cache/`` the path is relative to it."""

    path: str
    sha256: str
    size: int

    @property
    def file(self) -> Path:
        """Where the file lies on this machine."""
        return cache_directory() / self.path

    @property
    def cache_key(self) -> str:
        """What a cached task sees of a file: its content, never its name."""
        return self.sha256

    def intact(self) -> bool:
        """Whether the file is there with exactly this content, or in the store."""
        store = shared_store()
        return self._lies_at(self.file) or (
            store is not None and store.size(_stored_name(self.sha256)) == self.size
        )

    def checked(self) -> Path:
        """The file, fetched from the store if it is not here, and compared with the digest.

        Raises:
            IntegrityError: it is missing, truncated or changed.
        """
        if self._lies_at(self.file):
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
        if store is not None and store.size(_stored_name(self.sha256)) != self.size:
            store.put(self.checked(), _stored_name(self.sha256))

    def _lies_at(self, path: Path) -> bool:
        try:
            return path.stat().st_size == self.size and file_sha256(path) == self.sha256
        except OSError:
            return False


def describe(path: Path) -> Artifact:
    """The artifact for a file that is already in place."""
    return Artifact(path=str(path.absolute()), sha256=file_sha256(path), size=path.stat().st_size)


def write_file(path: Path, write: Callable[[Path], object]) -> Artifact:
    """Write a file whole or not at all, and say what it contains.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    described: list[Artifact] = []

    def fill(partial: Path) -> None:
        write(partial)
        described.append(describe(partial))

    write_whole(path, fill)
    return described[0].model_copy(update={"path": str(path.absolute())})


def write_text(path: Path, text: str) -> Artifact:
    """Write a text file whole or not at all."""
    return write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> Artifact:
    """Write JSON with sorted keys, so that equal content has equal bytes. NaN is refused."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return write_text(path, text + "\n")


def copy_file(source: Path, target: Path) -> Artifact:
    """Copy a file whole or not at all."""
    return write_file(target, lambda partial: shutil.copyfile(source, partial))


def store_piece(step: str, suffix: str, write: Callable[[Path], object]) -> Artifact:
    """Let ``write`` fill a file and keep it in ``.cache/pieces/<step>/``, named by its content."""
    pieces: list[Artifact] = []

    def name(partial: Path) -> str:
        found = describe(partial)
        name = found.sha256[:40] + suffix
        pieces.append(found.model_copy(update={"path": f"pieces/{step}/{name}"}))
        return name

    write_whole(cache_directory() / "pieces" / step / "new piece", write, name)
    (piece,) = pieces
    piece.share()
    return piece


def fetch_stored(sha256: str) -> Path | None:
    """A file of the store by the digest of its content, in ``.cache/fetched/``; None without one.

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

    write_file(path, fetch)
    return path


def _stored_name(sha256: str) -> str:
    return f"files/{sha256[:2]}/{sha256}"


@contextmanager
def _noted(partial: Path) -> Iterator[None]:
    """Keep a note of a temporary name in ``.cache/``, under a lock that a killed process loses.

    Where there is no ``.cache/`` to write to there is no note, and what is left there stays.
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


whole_files.noted = _noted


def remove_leftovers() -> None:
    """Delete what killed processes of this project were writing: what their notes name, no more."""
    for note in _notes().glob(f".*{PARTIAL}"):
        with suppress(OSError), note.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial = Path(os.fsdecode(stream.read()))
            if partial.name == note.name:  # else the note was torn
                for path in partial.parent.glob(f"{escape(partial.name)}*"):  # SQLite's journal
                    whole_files.remove(path)
            note.unlink()


def _notes() -> Path:
    return cache_directory() / "writing"


# --- the cache of finished pieces ---------------------------------------------------------------


FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What each cached task runs."""


def cached_task(name: str) -> Callable[[Callable[..., Any]], Task[..., Any]]:
    """A Prefect task whose result is remembered under its name, code and inputs' content.

    Its code is what `tasks.code` finds: whoever changes a module that the result comes from, or a
    library beneath it, gets a new result.

    The result must be a pydantic model (or a list or tuple of them) that can be written as JSON and
    names its files as `Artifact`. Inputs are plain values, dataclasses, pydantic models, or objects
    with a ``cache_key``.
    """

    def decorate(function: Callable[..., Any]) -> Task[..., Any]:
        FUNCTIONS[name] = function
        return CachedTask(
            function,
            name=name,
            persist_result=True,
            result_serializer="json",
            cache_policy=content_policy(name, function),
            cache_result_in_memory=False,
            on_completion=[_share_record],
        )

    return decorate


class CachedTask(Task[..., Any]):
    """A task that other processes find by its name, with the code and the cache that they have."""

    @property
    def result_storage(self) -> Records:
        """Where this process keeps records."""
        return Records(basepath=str(_records()))

    @result_storage.setter
    def result_storage(self, _: object) -> None:
        """What Prefect would set is the same in every process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _find_task, (self.fn.__module__, self.fn.__qualname__)


def _find_task(module: str, name: str) -> CachedTask:
    return getattr(import_module(module), name)


def content_policy(name: str, function: Callable[..., Any]) -> CachePolicy:
    """The policy behind `cached_task`.

    A record that is damaged, or whose files are missing or changed, is dropped before it is looked
    up, so a damaged piece is computed again. Two processes that want the same piece compute it
    once: the second waits.
    """
    locks = FileLocks()

    def key(context: TaskRunContext, inputs: dict[str, Any]) -> str:
        digest = content_key(name, code_of(function), inputs)
        holder = f"{os.getpid()} {context.task_run.id}"
        locks.acquire_lock(digest, holder)  # whoever computes it now may be writing the record
        try:
            _fetch_record(digest)
            _drop_broken_record(_records() / digest)
        finally:
            locks.release_lock(digest, holder)
        return digest

    return CachePolicy.from_cache_key_fn(key).configure(
        isolation_level="SERIALIZABLE", lock_manager=locks
    )


def content_key(name: str, code: Mapping[str, str], inputs: Mapping[str, Any]) -> str:
    """SHA-256 over a task's name, the digests of its code and the content of its inputs."""
    return origin_key({"task": name, "code": dict(code), "inputs": _plain(dict(inputs))})


def _plain(value: Any) -> Any:
    """A value as JSON, with ``cache_key`` in place of objects that have one."""
    if hasattr(value, "cache_key"):
        return _plain(value.cache_key)
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no content that a cache could be keyed on")


def _records() -> Path:
    return cache_directory() / "records"


def _fetch_record(key: str) -> None:
    """Take a record from the store that another machine has put there."""
    store = shared_store()
    path = _records() / key
    if store is not None and not path.exists() and store.size(f"records/{key}") is not None:
        write_file(path, lambda partial: store.get(f"records/{key}", partial))


def _share_record(task: Task[..., Any], run: TaskRun, state: State[Any]) -> None:
    """Put the record of a finished piece into the store."""
    del task, run
    store = shared_store()
    if store is not None and isinstance(state.data, ResultRecord):
        key = Path(str(state.data.metadata.storage_key)).name
        store.put(_records() / key, f"records/{key}")


def _drop_broken_record(path: Path) -> None:
    try:
        stored, _ = read_record(path)
        artifacts = list(artifacts_in(ResultRecord.deserialize(stored).result))
    except FileNotFoundError:
        return
    except Exception:  # damaged, or its result's class is not the one that it was
        path.unlink(missing_ok=True)
        return
    if not all(artifact.intact() for artifact in artifacts):
        path.unlink(missing_ok=True)


def artifacts_in(value: Any) -> Iterator[Artifact]:
    """The files that a result or an argument names."""
    if isinstance(value, Artifact):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from artifacts_in(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from artifacts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from artifacts_in(item)


class FileLocks:
    """Prefect's lock manager on ``flock``, which the system releases when a process dies.

    Prefect's own `FileSystemLockManager` leaves its file behind after SIGKILL, and the next run
    would wait for it for ever.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """Keep the locks in ``directory``; None: in the project's ``.cache/``."""
        self.given = directory

    @property
    def directory(self) -> Path:
        """Where the files of the locks lie."""
        return self.given or cache_directory() / "locks"

    def acquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,
    ) -> bool:
        """Wait for the lock; False when ``acquire_timeout`` seconds were not enough."""
        del hold_timeout
        if self.is_lock_holder(key, holder):
            return True
        deadline = None if acquire_timeout is None else time.monotonic() + acquire_timeout
        while (descriptor := self._try(key)) is None:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        _HELD[self._path(key)] = (holder, descriptor)
        return True

    async def aacquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,
    ) -> bool:
        """The same for an asynchronous caller."""
        return self.acquire_lock(key, holder, acquire_timeout, hold_timeout)

    def release_lock(self, key: str, holder: str) -> None:
        """Give the lock back; ValueError if ``holder`` does not have it."""
        if not self.is_lock_holder(key, holder):
            raise ValueError(f"{holder} does not hold the lock of {key}")
        _, descriptor = _HELD.pop(self._path(key))
        self._path(key).unlink(missing_ok=True)
        os.close(descriptor)

    def is_locked(self, key: str) -> bool:
        """Whether any process or thread holds the lock."""
        descriptor = self._try(key)
        if descriptor is None:
            return True
        self._path(key).unlink(missing_ok=True)
        os.close(descriptor)
        return False

    def is_lock_holder(self, key: str, holder: str) -> bool:
        """Whether ``holder`` (of this process) holds the lock."""
        held = _HELD.get(self._path(key))
        return held is not None and held[0] == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """Wait until nobody holds the lock; False when ``timeout`` seconds were not enough."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.is_locked(key):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        return True

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """The same for an asynchronous caller."""
        return self.wait_for_lock(key, timeout)

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.lock"

    def _try(self, key: str) -> int | None:
        """An open, locked descriptor of the lock's file, or None if another has it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path(key), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have deleted this very file: then it guards nothing any more.
            if os.fstat(descriptor).st_ino == self._path(key).stat().st_ino:
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        return None


_HELD: dict[Path, tuple[str, int]] = {}
