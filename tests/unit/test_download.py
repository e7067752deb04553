"""Downloads: whole and right, or nothing at all."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from memit.download import fetch, file_sha256, verify_sha256
from memit.errors import InputError, IntegrityError, UnreachableError

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


def test_a_right_file_arrives_whole(server: str, tmp_path: Path):
    read: list[int] = []
    path = fetch(f"{server}/facts", DIGEST, tmp_path / "deep/facts", progress=read.append)
    assert path.read_bytes() == CONTENT
    assert sum(read) == len(CONTENT)


def test_a_file_that_is_there_is_not_fetched_again(tmp_path: Path):
    (tmp_path / "facts").write_bytes(CONTENT)
    assert fetch("http://127.0.0.1:1/facts", DIGEST, tmp_path / "facts").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("page", "digest", "limit", "error", "complaint"),
    [
        ("/facts", "0" * 64, 1 << 20, IntegrityError, "what http.* sent has the sha256"),
        ("/broken", None, 1 << 20, IntegrityError, "start again"),
        ("/absent", None, 1 << 20, InputError, "answers 404"),
        ("/facts", None, 100, InputError, "over the limit of 100"),
    ],
)
def test_what_fails_leaves_the_old_file(
    server: str, tmp_path: Path, page, digest, limit, error, complaint
):
    (tmp_path / "facts").write_bytes(b"old")
    with pytest.raises(error, match=complaint):
        fetch(server + page, digest, tmp_path / "facts", size_limit=limit)
    assert [path.name for path in tmp_path.iterdir()] == ["facts"]
    assert (tmp_path / "facts").read_bytes() == b"old"


def test_an_address_that_does_not_answer(tmp_path: Path):
    with pytest.raises(UnreachableError, match="cannot be reached"):
        fetch("http://127.0.0.1:1/facts", DIGEST, tmp_path / "facts")
    with pytest.raises(InputError, match="is no address"):
        fetch("http://[::1", DIGEST, tmp_path / "new/folder/facts")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no http or https address"):
        fetch("ftp://127.0.0.1/facts", DIGEST, tmp_path / "facts")


def test_checksums(tmp_path: Path):
    (tmp_path / "facts").write_bytes(CONTENT)
    assert file_sha256(tmp_path / "facts") == DIGEST
    verify_sha256(tmp_path / "facts", DIGEST.upper())
    with pytest.raises(IntegrityError, match=f"sha256 {DIGEST} where 00 was expected"):
        verify_sha256(tmp_path / "facts", "00")
