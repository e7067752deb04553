"""A Prefect server on loopback for as long as a command runs."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import prefect
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    temporary_settings,
)

from flows.service.watched import running
from memit.errors import UnreachableError
from tasks.engine.databases import check_database
from tasks.engine.environment import environment
from tasks.engine.signals import GO_ON, exit_now

PORT = 4_200
"""Preferred port of a server that other commands use, too."""
START_SECONDS = 180.0
"""Time limit for starting: creating the database takes half a minute on a slow machine."""
PING_SECONDS = 5.0
PINGS = 6
"""A server is lost after this many unanswered pings in a row."""
PRIVATE = "MEMIT_PRIVATE_SERVER"
"""Environment variable with the address of a server that only one command uses."""


@contextmanager
def prefect_server(port: int = 0) -> Iterator[str]:
    """Start a server and stop it at the end, unless Prefect's settings name one.

    Meanwhile Prefect's settings and `PREFECT_API_URL` name it. Yields the address of its API.

    Args:
        port: replaced by a free one if it is taken; 0: the server, which then has no UI, is private
            to this process and its children

    Raises:
        UnreachableError: the server did not start.
        ResourceError: Prefect's database cannot be used.
    """
    known = os.environ.get("PREFECT_API_URL") or PREFECT_API_URL.value()
    if known:
        yield known
        return
    with (
        _started(port) as address,
        temporary_settings({PREFECT_API_URL: address}),
        environment({"PREFECT_API_URL": address, PRIVATE: "" if port else address}),
    ):
        yield address


@contextmanager
def _started(wanted: int) -> Iterator[str]:
    """A server that answers."""
    kind, _, database = str(PREFECT_API_DATABASE_CONNECTION_URL.value()).partition(":///")
    if kind.startswith("sqlite"):
        migrations = Path(prefect.__file__).parent / "server/database/_migrations/versions/sqlite"
        check_database(Path(database), "Prefect", migrations)
    port, log = free_port(wanted), Path(os.environ["PREFECT_HOME"]) / "server.log"
    options = [*server_options(port), "--log-level", "ERROR", "--ui" if wanted else "--no-ui"]
    address = f"http://127.0.0.1:{port}/api"
    log.parent.mkdir(parents=True, exist_ok=True)
    # In a session of its own, so that Ctrl-C does not stop it before the runs that need it.
    with (
        open(log, "ab") as file,
        running("prefect", *options, stdout=file, stderr=file, start_new_session=True) as process,
    ):
        wait_for(f"{address}/health", process, "Prefect's server", log)
        yield address


def wait_for(address: str, process: subprocess.Popen[bytes], what: str, log: Path) -> None:
    """Wait until the server of a process answers.

    Raises:
        UnreachableError: it has ended, or does not answer within `START_SECONDS`.
    """
    deadline = time.monotonic() + START_SECONDS
    while not _answers(address):
        if process.poll() is not None or time.monotonic() > deadline:
            raise UnreachableError(f"{what} did not start: see the end of {log}.")
        time.sleep(0.2)


def _answers(address: str) -> bool:
    """Whether there is any response; an error status is one, since a server may be busy."""
    try:
        urlopen(address, timeout=5).close()
    except (HTTPError, HTTPException):
        return True
    except OSError:
        return False
    return True


def exit_without_server(address: str) -> None:
    """Exit this process soon after the server is lost, even if its threads are blocked.

    Prefect's client retries each request for half a minute, one after the other.
    """

    def watch() -> None:
        missed = 0
        while missed < PINGS:
            time.sleep(PING_SECONDS)
            missed = 0 if _answers(f"{address}/health") else missed + 1
        exit_now(2, f"error: Prefect's server at {address} does not answer any more: {GO_ON}")

    threading.Thread(target=watch, daemon=True).start()


def server_options(port: int) -> list[str]:
    """Arguments of `prefect` for a server on loopback."""
    return ["server", "start", "--host", "127.0.0.1", "--port", str(port)]


def free_port(wanted: int) -> int:
    """The wanted port of this machine, or another one if it is taken."""
    try:
        probe = socket.create_server(("127.0.0.1", wanted))
    except OSError:
        probe = socket.create_server(("127.0.0.1", 0))
    with probe:
        return probe.getsockname()[1]
