"""One Prefect server for several processes, for as long as they run."""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

from flows.service.watched import running
from memit.errors import UnreachableError
from tasks.engine.databases import check_database
from tasks.engine.signals import GO_ON, exit_now

PORT = 4_200
"""Of a server that others see, if it is free."""
START_SECONDS = 180.0
"""A first start makes the data base, which takes half a minute on a slow machine."""
PING_SECONDS = 5.0
PINGS = 6
"""A server is lost when it has left so many questions in a row without an answer."""
PRIVATE = "MEMIT_PRIVATE_SERVER"
"""Variable with the address of a server that nobody else uses."""


@contextmanager
def prefect_server(port: int = 0) -> Iterator[str]:
    """Start a server on a loopback port, give its API address, stop it at the end.

    The port is a free one where that is taken, or where 0 is asked for: then the server is for this
    process and its children. Prefect's settings and ``PREFECT_API_URL`` point to it meanwhile. A
    server that they point to already is used as it is.

    Raises:
        UnreachableError: it did not come up.
        ResourceError: Prefect's data base cannot be used.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.engine.workers import environment

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
    """A server that has come up."""
    import prefect
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

    kind, _, database = str(PREFECT_API_DATABASE_CONNECTION_URL.value()).partition(":///")
    if kind.startswith("sqlite"):
        migrations = Path(prefect.__file__).parent / "server/database/_migrations/versions/sqlite"
        check_database(Path(database), "Prefect", migrations)
    port, log = _free_port(wanted), Path(os.environ["PREFECT_HOME"]) / "server.log"
    words = [*server_options(port), "--log-level", "ERROR", "--ui" if wanted else "--no-ui"]
    address = f"http://127.0.0.1:{port}/api"
    log.parent.mkdir(parents=True, exist_ok=True)
    # Ctrl-C is for the stages; the server ends after them.
    with (
        open(log, "ab") as file,
        running("prefect", *words, stdout=file, stderr=file, start_new_session=True) as process,
    ):
        deadline = time.monotonic() + START_SECONDS
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnreachableError(
                    f"Prefect's server did not come up: the end of {log} says why."
                )
            time.sleep(0.2)
        yield address


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # it is busy, or wants a key
    except (OSError, HTTPException):
        return False


def end_without(address: str) -> None:
    """Let this process end soon when a server is lost, whatever its threads are waiting for.

    Prefect repeats each of its requests for half a minute, one after the other.
    """

    def watch() -> None:
        missed = 0
        while missed < PINGS:
            time.sleep(PING_SECONDS)
            missed = 0 if _answers(address) else missed + 1
        exit_now(2, f"error: Prefect's server at {address} does not answer any more: {GO_ON}")

    threading.Thread(target=watch, daemon=True).start()


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
