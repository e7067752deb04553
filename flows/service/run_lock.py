"""One run at a time writes the named results of a working directory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from tasks.engine.locks import lock_file, release


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process works in this directory; others wait for the end of the body.

    A command holds the lock for the flow that it runs, which may enter again; a flow that a
    deployment starts takes it itself.
    """
    name = hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:32]
    lock = FileLock(lock_file(f"run-{name}"), thread_local=False, is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        Console(stderr=True).print("another run works in this directory: waiting for its end")
        lock.acquire()
    try:
        yield
    finally:
        release(lock)
