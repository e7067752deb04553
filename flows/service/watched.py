"""Run a Python module as a subprocess that ends with its parent, even if that is killed.

Started by path, so that it imports nothing else of the project.
"""

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

GRACE_SECONDS = 6.0
"""Time between SIGTERM and SIGKILL."""


def watched(*words: str) -> list[str]:
    """The command line for a module with its arguments."""
    return [sys.executable, "-P", __file__, str(os.getpid()), *words]


@contextmanager
def running(*words: str, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Such a process while the body runs; `options` are those of `subprocess.Popen`."""
    process = subprocess.Popen(watched(*words), **options)
    try:
        yield process
    finally:
        end(process.pid)
        process.wait()


def end(pid: int) -> None:
    """End the descendants of a process and then the process: SIGTERM first, then SIGKILL."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for group in (parent.children(recursive=True), [parent]):
            for process in group:
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
            for process in psutil.wait_procs(group, timeout=GRACE_SECONDS)[1]:
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
