"""Files from a URL, checked by their sha256 and put in place whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from memit.errors import InputError, IntegrityError, UnreachableError

_BLOCK = 1 << 20
_BUSY = (408, 425, 429)
"""Answers that say "later", unlike others that are no good."""


def file_sha256(path: str | Path) -> str:
    """Sha256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_sha256(path: str | Path, expected: str) -> None:
    """Raise `IntegrityError` unless the file's sha256 is the expected one (hexadecimal)."""
    found = file_sha256(path)
    if found != expected.strip().lower():
        raise IntegrityError(
            f"{path} has the sha256 {found} where {expected} was expected: "
            "it is damaged or another version, fetch it again or correct the checksum."
        )


def fetch(
    url: str,
    sha256: str | None,
    to: str | Path,
    *,
    size_limit: int = 1 << 32,
    timeout: float = 60.0,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Download an http(s) URL to the file `to`, which appears only when it is whole and right.

    A file already there with the right checksum is left as it is. `size_limit` is in bytes,
    `timeout` in seconds without an answer; `progress` is told the bytes newly read. Raises
    `UnreachableError`, `IntegrityError`, or `InputError` if the URL is none, is refused by the
    server, or holds too much.
    """
    target = Path(to)
    if sha256 is not None and target.is_file() and file_sha256(target) == sha256.lower():
        return target
    if not url.lower().startswith(("http://", "https://")):
        raise InputError(f"{url} is no http or https address: give one, or a path to a local file.")
    new_folders = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            _download(url, file, size_limit, timeout, progress)
        if sha256 is not None:
            _verify_download(url, Path(name), sha256)
        os.chmod(name, 0o644)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
        with suppress(OSError):  # they stay if something lies in them
            for folder in new_folders:
                folder.rmdir()
    return target


def _verify_download(url: str, path: Path, expected: str) -> None:
    try:
        verify_sha256(path, expected)
    except IntegrityError as error:
        raise IntegrityError(str(error).replace(str(path), f"what {url} sent", 1)) from None


def _download(
    url: str,
    file: BinaryIO,
    size_limit: int,
    timeout: float,
    progress: Callable[[int], None] | None,
) -> None:
    way_out = "check the address and the network, or give a path to a local copy."
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            announced = int(answer.headers.get("Content-Length") or 0)
            read = _copy(answer, file, max(announced, 0), url, size_limit, progress)
    except urllib.error.HTTPError as error:
        kind = UnreachableError if error.code >= 500 or error.code in _BUSY else InputError
        raise kind(f"{url} answers {error.code} {error.reason}: {way_out}") from None
    except http.client.IncompleteRead:
        raise IntegrityError(f"{url} broke off before its end: start again.") from None
    except (ValueError, http.client.InvalidURL) as error:
        raise InputError(f"{url} is no address ({error}): {way_out}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UnreachableError(f"{url} cannot be reached ({reason}): {way_out}") from None
    if read < announced:
        raise IntegrityError(
            f"{url} sent {read} of {announced} bytes: the connection broke, start again."
        )


def _copy(
    answer: BinaryIO,
    file: BinaryIO,
    announced: int,
    url: str,
    size_limit: int,
    progress: Callable[[int], None] | None,
) -> int:
    read = 0
    while announced <= size_limit and read <= size_limit:
        block = answer.read(_BLOCK)
        if not block:
            return read
        file.write(block)
        read += len(block)
        if progress is not None:
            progress(len(block))
    raise InputError(
        f"{url} holds {max(announced, read)} bytes or more, over the limit of {size_limit}: "
        "raise the limit if this is the right file."
    )
