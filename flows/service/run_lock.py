"""One run at a time writes the named results of a working directory."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from tasks.engine.locks import lock_file, release

HELD = "MEMIT_RUN_LOCK"
"""Environment variable with the lock that a process holds for those that it starts."""


def lock_name() -> str:
    """That of this directory's lock."""
    return hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:32]


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process works in this directory; others wait for the end of the body.

    A command holds the lock for the flow that it runs, which may enter again, and for DVC's stages:
    DVC deletes a stage's results before the stage could wait. A flow that a deployment starts takes
    the lock itself.
    """
    if os.environ.get(HELD) == lock_name():
        yield
        return
    lock = FileLock(lock_file(f"run-{lock_name()}"), thread_local=False, is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        Console(stderr=True).print("another run works in this directory: waiting for its end")
        lock.acquire()
    try:
        yield
    finally:
        release(lock)
