"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from memit.errors import ResourceError

PARTIAL = ".partial"
"""Ending of a file that is still being written."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, flush it to the disk and rename it.

    Whoever reads ``path`` sees the old content or the new, at any moment, also after a power cut.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            _flush(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(
            f"{path} cannot be written ({reason}): make room or use another disk."
        ) from error


def _flush(path: Path) -> None:
    """Ask the system to have a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
