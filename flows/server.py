"""One Prefect server for several processes, for as long as they run."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memit.errors import UnreachableError

START_SECONDS = 180.0
"""A first start makes the data base, which takes half a minute on a slow machine."""


@contextmanager
def prefect_server(port: int = 0) -> Iterator[str]:
    """Start a server on a loopback port, give its API address, stop it at the end.

    The port is a free one where 0 is asked for, or one that is taken. While the server runs
    ``PREFECT_API_URL`` points to it. A server named there already is used as it is.

    Raises:
        UnreachableError: it did not come up.
    """
    known = os.environ.get("PREFECT_API_URL")
    if known:
        yield known
        return
    port = _free_port(port)
    address = f"http://127.0.0.1:{port}/api"
    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "server.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *server_options(port)],
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the stages; the server is stopped after them
        )
    os.environ["PREFECT_API_URL"] = address
    atexit.register(process.kill)  # for those who leave in a hurry
    try:
        _wait(process, address, home / "server.log")
        yield address
    finally:
        del os.environ["PREFECT_API_URL"]
        stop(process)
        atexit.unregister(process.kill)


def server_options(port: int) -> list[str]:
    """Prefect's words for a server on loopback."""
    return ["server", "start", "--host", "127.0.0.1", "--port", str(port)]


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise UnreachableError("no port of the loopback address is free: close other servers.")


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UnreachableError(f"Prefect's server did not come up: see {log}.")


def stop(process: subprocess.Popen[bytes], patience: float = 20.0) -> None:
    """Interrupt a process of Prefect's; kill it if it has not ended after ``patience`` seconds."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
