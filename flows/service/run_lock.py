"""One run at a time writes the named results of a working directory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process works in this directory; others wait for the end of the body.

    A command holds it for the flow that it runs; a flow that a deployment starts takes it itself.
    """
    from tasks.engine.artifacts import cache_directory
    from tasks.engine.locks import FileLocks

    locks, holder = FileLocks(cache_directory() / "locks"), str(os.getpid())
    key = "run-" + hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:32]
    if locks.is_lock_holder(key, holder):
        yield
        return
    if not locks.acquire_lock(key, holder, acquire_timeout=0):
        Console(stderr=True).print("another run works in this directory: waiting for its end")
        locks.acquire_lock(key, holder)
    try:
        yield
    finally:
        locks.release_lock(key, holder)
