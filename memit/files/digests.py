"""SHA-256 digests of files and of plain values."""

import hashlib
import json
from pathlib import Path
from typing import Any

from memit.errors import IntegrityError


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(content: Any) -> str:
    """SHA-256 over values that JSON can hold, in hexadecimal; the order of keys does not count."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify_sha256(path: str | Path, expected: str) -> None:
    """Raise `IntegrityError` unless the file's SHA-256 is the expected one (hexadecimal)."""
    found = file_sha256(path)
    if found != expected.strip().lower():
        raise IntegrityError(
            f"{path} has the sha256 {found} where {expected} was expected: "
            "it is damaged or another version, fetch it again or correct the checksum."
        )
