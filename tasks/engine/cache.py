"""The cache of finished pieces: Prefect tasks whose results are kept under their content."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.results import ResultRecord  # pyright: ignore[reportPrivateImportUsage]
from pydantic import BaseModel

from tasks.engine.artifacts import artifacts_in, cache_directory, write_file
from tasks.engine.code import code_of
from tasks.engine.locks import FileLocks
from tasks.engine.records import Records, origin_key, read_record
from tasks.engine.store import shared_store

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What each cached task runs."""


def cached_task(name: str) -> Callable[[Callable[..., Any]], Task[..., Any]]:
    """A Prefect task whose result is remembered under its name, code and inputs' content.

    Its code is what `tasks.engine.code` finds: whoever changes a module that the result comes from,
    or a library beneath it, gets a new result.

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
