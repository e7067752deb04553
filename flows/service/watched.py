"""A Python module as a command that ends when the process that started it has ended, however.

Run by its path, so that it imports nothing of the project.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

PATIENCE = 6.0
"""Seconds that processes have for their end."""


def watched(*words: str) -> list[str]:
    """A module and its arguments, as a command that ends with this process."""
    return [sys.executable, "-P", __file__, str(os.getpid()), *words]


@contextmanager
def running(*words: str, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Such a command while the body runs; ``options`` are those of `subprocess.Popen`."""
    process = subprocess.Popen(watched(*words), **options)
    try:
        yield process
    finally:
        end(process.pid)
        process.wait()


def end(number: int) -> None:
    """Ask what a process has started to end, then the process itself; kill who goes on."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(number)
        for group in (parent.children(recursive=True), [parent]):
            for process in group:
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
            for process in psutil.wait_procs(group, timeout=PATIENCE)[1]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    end(os.getpid())


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    del sys.argv[:2]
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
