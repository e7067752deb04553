"""Locks between processes: `flock` through `filelock`, which ends when its holder is killed."""

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tasks.engine.artifacts import cache_directory

_held: dict[Path, tuple[str, FileLock]] = {}
"""Holder and lock of each lock file that Prefect's tasks of this process hold."""


def lock_file(key: str) -> Path:
    """The file of a lock of this project."""
    path = cache_directory() / "locks" / f"{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def release(lock: FileLock) -> None:
    """Release a lock and delete its file; waiting processes then lock a new file."""
    if lock.lock_counter == 1:
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


class FileLocks:
    """A `LockManager` for Prefect, see there for the methods.

    Prefect's own `FileSystemLockManager` leaves its file behind after SIGKILL, and the next run
    would wait for it for ever.
    """

    def acquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,
    ) -> bool:
        del hold_timeout
        if self.is_lock_holder(key, holder):
            return True
        lock = _acquired(key, acquire_timeout)
        if lock is not None:
            _held[lock_file(key)] = (holder, lock)
        return lock is not None

    async def aacquire_lock(self, *arguments: Any, **named: Any) -> bool:
        return self.acquire_lock(*arguments, **named)

    def release_lock(self, key: str, holder: str) -> None:
        if not self.is_lock_holder(key, holder):
            raise ValueError(f"{holder} does not hold the lock of {key}")
        release(_held.pop(lock_file(key))[1])

    def is_locked(self, key: str) -> bool:
        return not self.wait_for_lock(key, timeout=0)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        return _held.get(lock_file(key), ("", None))[0] == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        lock = _acquired(key, timeout)
        if lock is not None:
            release(lock)
        return lock is not None

    async def await_for_lock(self, *arguments: Any, **named: Any) -> bool:
        return self.wait_for_lock(*arguments, **named)


def _acquired(key: str, timeout: float | None) -> FileLock | None:
    """The lock, held now; None when `timeout` seconds were not enough."""
    lock = FileLock(lock_file(key), thread_local=False)
    try:
        lock.acquire(timeout=-1 if timeout is None else timeout)
    except Timeout:
        return None
    return lock
