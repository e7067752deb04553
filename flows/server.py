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
from contextlib import contextmanager
from pathlib import Path

from memit.errors import UnreachableError

START_SECONDS = 180.0
"""A first start makes the data base, which takes half a minute on a slow machine."""


@contextmanager
def prefect_server() -> Iterator[str]:
    """Start a server on a free loopback port, give its API address, stop it at the end.

    While it runs ``PREFECT_API_URL`` points to it. A server named there already is used as it is.

    Raises:
        UnreachableError: it did not come up.
    """
    known = os.environ.get("PREFECT_API_URL")
    if known:
        yield known
        return
    port = _free_port()
    address = f"http://127.0.0.1:{port}/api"
    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "server.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *server_options(port), "--no-ui"],
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
        _stop(process)
        atexit.unregister(process.kill)


def server_options(port: int) -> list[str]:
    """Prefect's words for a server on loopback."""
    return ["server", "start", "--host", "127.0.0.1", "--port", str(port)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UnreachableError(f"Prefect's server did not come up: see {log}.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
