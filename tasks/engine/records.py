"""The record of a finished piece: what its task gave, where that came from, and a checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from prefect.filesystems import LocalFileSystem

from memit.errors import IntegrityError
from memit.files.atomic import write_whole

LONGEST = 300
"""Characters of an input that a record spells out; of a longer one it holds the SHA-256."""

_origins: dict[str, dict[str, Any]] = {}
"""Where the pieces come from that this process wants, by their keys."""


def origin_key(origin: dict[str, Any]) -> str:
    """SHA-256 over where a piece comes from, which is remembered for its record.

    ``origin`` holds the task, its code's digests, and its inputs as plain values.
    """
    short = {name: _shortened(value) for name, value in origin["inputs"].items()}
    short_origin = {**origin, "inputs": short}
    key = _digest(short_origin)
    _origins[key] = short_origin
    return key


def read_record(path: Path) -> tuple[bytes, dict[str, Any]]:
    """What Prefect stored of a piece, and where the piece comes from.

    Raises:
        IntegrityError: the record is damaged, or is that of another piece.
        FileNotFoundError: there is none.
    """
    content = path.read_bytes()
    try:
        kept = json.loads(content)
        checksum = kept.pop("sha256")
        stored, origin = str(kept["record"]).encode(), dict(kept["origin"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is no record of a piece: delete it and run again.") from error
    if _digest(kept) != checksum or _digest(origin) != path.name:
        raise IntegrityError(f"{path} is damaged or misplaced: delete it and run again.")
    return stored, origin


class Records(LocalFileSystem):
    """Where Prefect keeps the records: files that are whole or absent, and checked when read."""

    _block_type_name = "Checked Records"

    def read_path(self, path: str, _sync: bool = True) -> bytes:
        """The content that was written under this key; raises `IntegrityError` if it is damaged."""
        return read_record(self._resolve_path(path))[0]

    async def aread_path(self, path: str) -> bytes:
        """The same for an asynchronous caller."""
        return self.read_path(path)

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> str:
        """Write the content with its origin; raises `ResourceError` if the disk is full."""
        place = self._resolve_path(path)
        kept = {"origin": _origins[place.name], "record": content.decode()}
        text = json.dumps({**kept, "sha256": _digest(kept)}, indent=1, sort_keys=True) + "\n"
        write_whole(place, lambda partial: partial.write_text(text, encoding="utf-8"))
        return str(place)

    async def awrite_path(self, path: str, content: bytes) -> str:
        """The same for an asynchronous caller."""
        return self.write_path(path, content)


def _shortened(value: Any) -> Any:
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return value if len(text) <= LONGEST else {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
