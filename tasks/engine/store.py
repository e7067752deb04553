"""The shared store of workers on several machines: files by the digest of their content, records.

A store is whatever fsspec reaches: a directory, or an address such as `s3://bucket/memit`. Every
machine keeps its own `.cache/`; what is missing there is fetched from the store.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import fsspec

from memit.errors import UnreachableError

VARIABLE = "MEMIT_STORE"
"""The environment variable that names the store of this process and of those that it starts."""


class Store:
    """Files under a path of some file system, written atomically."""

    def __init__(self, address: str) -> None:
        """Open the store; `UnreachableError` if fsspec has no such kind of address."""
        self.address = address
        with self._reporting("opened"):
            self._system, self._root = fsspec.core.url_to_fs(address)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it does not exist."""
        with self._reporting("read"):
            try:
                return int(self._system.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def put(self, path: Path, name: str) -> None:
        """Upload a file under a temporary name and rename it."""
        partial, target = self._path(f"partial/{secrets.token_hex(16)}"), self._path(name)
        with self._reporting("written"):
            for needed in (partial, target):
                self._system.makedirs(needed.rpartition("/")[0], exist_ok=True)
            self._system.put_file(str(path), partial)
            self._system.mv(partial, target)

    def get(self, name: str, path: Path) -> None:
        """Download a file to `path`, unchecked."""
        with self._reporting("read"):
            self._system.get_file(self._path(name), str(path))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every file system raises types of its own
            raise UnreachableError(
                f"the store {self.address} cannot be {what} ({error}): correct runner.store, or "
                "install what fsspec needs for it."
            ) from error


def shared_store() -> Store | None:
    """The store that this process shares with others, if there is one."""
    address = os.environ.get(VARIABLE)
    return _opened(address) if address else None


_opened = cache(Store)
