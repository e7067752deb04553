"""A Prefect server ends with the process that started it; runs end when their server is lost."""

import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

from flows.service.server import prefect_server
from memit.errors import ResourceError
from tests import python

CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess
from flows.service.watched import watched
process = subprocess.Popen(watched("child"), start_new_session=True)
print(process.pid, flush=True)
process.wait()
"""
CLIENT = """
import sys, time
from flows.service import server
server.PING_SECONDS = 0.1
server.exit_without_server(sys.argv[1])
time.sleep(float(sys.argv[2]))
"""


def test_a_subprocess_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        started = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
        parent.kill()
        assert psutil.wait_procs(started, timeout=20)[1] == []


def process_with_server(address: str, seconds: float) -> subprocess.CompletedProcess[str]:
    return python("-c", CLIENT, address, str(seconds), timeout=60)


def test_a_process_ends_when_its_server_is_lost() -> None:
    started = time.monotonic()
    ended = process_with_server("http://127.0.0.1:9/api", 600)
    assert time.monotonic() - started < 30
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: Prefect's server at http://127.0.0.1:9/api")
    assert len(ended.stderr.splitlines()) == 1


class Busy(BaseHTTPRequestHandler):
    """Responds with an error status."""

    def do_GET(self) -> None:
        self.send_error(503)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def busy() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def test_a_server_that_is_busy_is_not_lost(busy: str) -> None:
    assert process_with_server(busy, 2).returncode == 0


def test_a_server_is_not_started_on_a_damaged_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import (
        PREFECT_API_DATABASE_CONNECTION_URL,
        PREFECT_API_URL,
        temporary_settings,
    )

    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "prefect.db").write_bytes(b"no database" * 100)
    address = f"sqlite+aiosqlite:///{tmp_path}/prefect.db"
    with (
        temporary_settings(
            {PREFECT_API_DATABASE_CONNECTION_URL: address}, restore_defaults={PREFECT_API_URL}
        ),
        pytest.raises(ResourceError, match=r"prefect\.db"),
        prefect_server(),
    ):
        pytest.fail("it came up")
    assert not (tmp_path / "server.log").exists()
