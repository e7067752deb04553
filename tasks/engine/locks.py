"""Locks between processes."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from tasks.engine.artifacts import cache_directory


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
