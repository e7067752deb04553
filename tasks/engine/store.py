"""What workers on several machines share: files by the digest of their content, and records.

A store is any place that fsspec reaches: a directory, or an address such as ``s3://bucket/memit``.
Every machine keeps its own ``.cache/``; what is not there is looked for in the store.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from memit.errors import UnreachableError

VARIABLE = "MEMIT_STORE"
"""The environment variable that names the store of this process and of those that it starts."""

Result = TypeVar("Result")


class Store:
    """Files under a path of some file system. They appear whole or not at all."""

    def __init__(self, address: str) -> None:
        """Raises `UnreachableError` if fsspec knows no such kind of address."""
        import fsspec

        self.address = address
        self._system, self._root = self._do("opened", lambda: fsspec.core.url_to_fs(address))

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none of that name."""

        def ask() -> int | None:
            try:
                return int(self._system.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

        return self._do("read", ask)

    def put(self, path: Path, name: str) -> None:
        """Upload a file under a temporary name and rename it."""
        partial = self._path(f"partial/{secrets.token_hex(16)}")

        def send() -> None:
            for place in (partial, self._path(name)):
                self._system.makedirs(place.rpartition("/")[0], exist_ok=True)
            self._system.put_file(str(path), partial)
            self._system.mv(partial, self._path(name))

        self._do("written", send)

    def get(self, name: str, path: Path) -> None:
        """Download a file; what is at ``path`` then has still to be checked."""
        self._do("read", lambda: self._system.get_file(self._path(name), str(path)))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _do(self, what: str, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except Exception as error:  # every file system raises types of its own
            raise UnreachableError(
                f"the store {self.address} cannot be {what} ({error}): correct runner.store, or "
                "install what fsspec needs for it."
            ) from error


def shared_store() -> Store | None:
    """The store that this process shares with others, if there is one."""
    address = os.environ.get(VARIABLE)
    return _opened(address) if address else None


@cache
def _opened(address: str) -> Any:
    return Store(address)
