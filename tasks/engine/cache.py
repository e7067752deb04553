"""The cache of finished pieces: Prefect tasks whose results are kept under their content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any

from prefect import Task
from prefect.cache_policies import CachePolicy
from pydantic import BaseModel

from tasks.engine.code import code_of
from tasks.engine.cost import Cost, Meter
from tasks.engine.locks import FileLocks
from tasks.engine.progress import piece_progress
from tasks.engine.records import Records


def cached_task(name: str) -> Callable[[Callable[..., Any]], CachedTask]:
    """A Prefect task whose result is remembered under its name, code and inputs' content.

    Its code is what `tasks.engine.code` finds: a change in a module that the result comes from, or
    in a library beneath it, gives a new result. A result whose record or files are missing or
    damaged is computed again. Two processes that want the same result compute it once: the second
    waits.

    The result must be a plain value or a pydantic model (or a list of them) that can be written as
    JSON and names its files as `Artifact`. Its cost is kept with it. Inputs are plain values,
    dataclasses, pydantic models, or objects with a `cache_key`.
    """

    def decorate(function: Callable[..., Any]) -> CachedTask:
        @wraps(function)
        def metered(*arguments: Any, **named: Any) -> list[Any]:
            code_of(function)  # Prefect only logs what a key function raises
            with Meter() as meter, piece_progress(name):
                result = function(*arguments, **named)
            return [result, meter.cost]

        policy = CachePolicy.from_cache_key_fn(
            lambda _, inputs: f"{name}-{content_key(name, code_of(function), inputs)}"
        )
        task = CachedTask(
            metered,
            name=name,
            persist_result=True,
            result_serializer="json",
            cache_policy=policy.configure(isolation_level="SERIALIZABLE", lock_manager=FileLocks()),
            cache_result_in_memory=False,
        )
        task.result_storage = Records()  # Prefect's own argument wants one that its server knows
        task.uncached = function
        return task

    return decorate


class CachedTask(Task[..., Any]):
    """A task that other processes find by its name, with the code and the cache that they have.

    Futures of it give a list of the result and its cost.
    """

    uncached: Callable[..., Any]
    """The function itself."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The result alone."""
        return self.with_cost(*arguments, **named)[0]

    def with_cost(self, *arguments: Any, **named: Any) -> tuple[Any, Cost]:
        """The result, and what it cost when it was computed."""
        result, cost = super().__call__(*arguments, **named)
        return result, cost

    def __reduce__(self) -> tuple[Any, ...]:
        return _find_task, (self.fn.__module__, self.fn.__qualname__)


def _find_task(module: str, name: str) -> CachedTask:
    return getattr(import_module(module), name)


def content_key(name: str, code: Mapping[str, str], inputs: Mapping[str, Any]) -> str:
    """SHA-256 over a task's name, the digests of its code and the content of its inputs."""
    content = {"task": name, "code": dict(code), "inputs": _plain(inputs)}
    canonical = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value as JSON, with `cache_key` in place of objects that have one."""
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
