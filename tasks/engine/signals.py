"""Stopping on request: at once where that is possible, and within seconds in any case.

A piece in progress cannot be interrupted, only abandoned: files are written atomically, so that
nothing but that piece is lost.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import NoReturn

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
TERMINATED = 143
"""Exit status after SIGTERM."""
GO_ON = "finished pieces are kept; run it again to go on."
PATIENCE = 4.0
"""Seconds for Prefect to record the end of its runs."""


def exit_now(status: int, message: str = f"stopped: {GO_ON}") -> NoReturn:
    """Print how to go on and end the process, whatever its threads are doing."""
    print(message, file=sys.stderr, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides what fails during the exit
    _in_daemon_thread(2 * PATIENCE, os._exit, status)
    atexit._run_exitfuncs()  # a temporary Prefect server or cluster is stopped here
    os._exit(status)


def exit_after_grace(status: int) -> None:
    """End the process in some seconds, if it has not ended by itself until then."""
    _in_daemon_thread(PATIENCE, exit_now, status)


def exit_on_signal() -> None:
    """From here on Ctrl-C and SIGTERM end the process within seconds, whatever handles them.

    Prefect installs a handler of its own while a flow runs, which reports the end to its server and
    waits for minutes where that has died. Python writes each signal to a socket, too, whatever its
    handler is. Call this in the main thread.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reader, writer), daemon=True).start()


def resend_swallowed() -> None:
    """Send Ctrl-C and SIGTERM once more where Python prints what their handler raises and goes on:
    in a destructor or a callback of the garbage collector."""
    sys.unraisablehook = _resend


def _resend(error: sys.UnraisableHookArgs) -> None:
    raised = {"KeyboardInterrupt": signal.SIGINT, "TerminationSignal": signal.SIGTERM}
    number = raised.get(error.exc_type.__name__)
    if number is None:
        sys.__unraisablehook__(error)
    else:
        _in_daemon_thread(0.05, partial(os.kill, os.getpid()), number)


def _listen(reader: socket.socket, writer: socket.socket) -> None:
    statuses = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
    while writer.fileno() >= 0:  # which also keeps the writer from being collected
        for number in reader.recv(64):
            if number in statuses:
                exit_after_grace(statuses[signal.Signals(number)])


def _in_daemon_thread(seconds: float, end: Callable[[int], object], status: int) -> None:
    timer = threading.Timer(seconds, end, (status,))
    timer.daemon = True
    timer.start()
