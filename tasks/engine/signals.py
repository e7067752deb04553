"""Stopping when asked: at once where that is possible, and in any case within seconds.

A piece in the making cannot be interrupted, only left behind: files appear whole or not at all, so
nothing is lost but that piece.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from typing import NoReturn

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
TERMINATED = 143
"""Exit status after SIGTERM."""
GO_ON = "finished pieces are kept; run it again to go on."
PATIENCE = 4.0
"""Seconds for Prefect to note the end of its runs."""


def leave(status: int, sentence: str = f"stopped: {GO_ON}") -> NoReturn:
    """Say how to go on and end the process, whatever its threads are doing."""
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what fails on the way out concerns nobody
    late = threading.Timer(2 * PATIENCE, os._exit, (status,))
    late.daemon = True
    late.start()
    atexit._run_exitfuncs()  # a temporary Prefect server or cluster is stopped here
    os._exit(status)


def end_when_asked() -> None:
    """From here on Ctrl-C and SIGTERM end the process within seconds, whoever handles them.

    Prefect puts a handler of its own in place while a flow runs, which tells its server of the end
    and waits for minutes where that has died. Python names each signal in a socket, too, whatever
    its handler is. Call this in the main thread.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reader, writer), daemon=True)
    listener.start()


def _listen(reader: socket.socket, writer: socket.socket) -> None:
    statuses = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
    while writer.fileno() >= 0:
        for number in reader.recv(64):
            if number in statuses:
                leave_soon(statuses[signal.Signals(number)])


def leave_soon(status: int) -> None:
    """End the process in some seconds, if it has not ended by itself until then."""
    timer = threading.Timer(PATIENCE, leave, (status,))
    timer.daemon = True
    timer.start()
