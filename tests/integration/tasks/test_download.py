"""Downloads are complete and verified, or leave nothing."""

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from memit.errors import InputError, IntegrityError, UnreachableError
from memit.files.digests import verify_sha256
from tasks import requests

fetch: Callable[[str, str, Path], Path] = requests.fetch.__wrapped__  # type: ignore[attr-defined]
"""A single attempt."""

CONTENT = b"facts " * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class _Files(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/absent":
            self.send_error(404)
            return
        self.send_response(200)
        announced = len(CONTENT) + (500 if self.path == "/broken" else 0)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Files) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_file_is_downloaded(server: str, tmp_path: Path):
    path = fetch(f"{server}/facts", DIGEST, tmp_path / "deep/facts")
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["facts"]
    verify_sha256(path, DIGEST.upper())
    with pytest.raises(IntegrityError, match=DIGEST):
        verify_sha256(path, "00")


def test_an_existing_file_is_not_downloaded_again(tmp_path: Path):
    (tmp_path / "facts").write_bytes(CONTENT)
    assert fetch("http://127.0.0.1:1/facts", DIGEST, tmp_path / "facts").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("page", "error"),
    [("/facts", IntegrityError), ("/broken", IntegrityError), ("/absent", InputError)],
)
def test_a_failed_download_leaves_the_old_file(server: str, tmp_path: Path, page, error):
    (tmp_path / "facts").write_bytes(b"old")
    with pytest.raises(error, match=page):
        fetch(server + page, "0" * 64, tmp_path / "facts")
    assert [path.name for path in tmp_path.iterdir()] == ["facts"]
    assert (tmp_path / "facts").read_bytes() == b"old"


def test_an_address_that_does_not_answer(tmp_path: Path):
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1/facts"):
        fetch("http://127.0.0.1:1/facts", DIGEST, tmp_path / "facts")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError):
        fetch("http://[::1", DIGEST, tmp_path / "facts")


def test_a_silent_server_times_out(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(requests, "SILENT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UnreachableError):
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/", DIGEST, tmp_path / "facts")
    assert socket.getdefaulttimeout() is None
