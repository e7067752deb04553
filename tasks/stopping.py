"""Stopping when asked: at once where that is possible, and in any case within seconds.

A piece in the making cannot be interrupted, only left behind: files appear whole or not at all, so
nothing is lost but that piece.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
TERMINATED = 143
"""Exit status after SIGTERM."""
PATIENCE = 4.0
"""Seconds for Prefect to note the end of its runs."""


def leave(status: int) -> NoReturn:
    """Say how to go on and end the process, whatever its threads are doing."""
    sys.stderr.write("stopped: finished pieces are kept; run it again to go on.\n")
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what fails on the way out concerns nobody
    atexit._run_exitfuncs()  # a temporary Prefect server or cluster is stopped here
    os._exit(status)


def leave_soon(status: int) -> None:
    """End the process in some seconds, if it has not ended by itself until then."""
    timer = threading.Timer(PATIENCE, leave, (status,))
    timer.daemon = True
    timer.start()
