"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError

from memit.errors import ResourceError

PARTIAL = ".partial"
"""Ending of a file that is still being written."""

noted: Callable[[Path], AbstractContextManager[object]] = nullcontext
"""Entered with every temporary name while it is used. A project puts its journal here, so that what
a killed process leaves is known by more than its name."""

_temporary: set[Path] = set()


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for the file or directory that will be renamed to it.

    What still has the name at the end is deleted.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    _temporary.add(partial)
    with noted(partial):
        try:
            yield partial
        finally:
            remove(partial)
            _temporary.discard(partial)


def remove(path: Path) -> None:
    """Delete a file, a link or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(
    path: Path, write: Callable[[Path], object], name: Callable[[Path], str] | None = None
) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, flush it to the disk and rename it.

    Whoever reads ``path`` sees the old content or the new, at any moment, also after a power cut.
    A link gives way to the file: what it leads to, or shares its content with, stays as it was.
    ``name`` finds the file's name from what was written; None leaves that of ``path``.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    if path in _temporary:  # it is being written whole already
        write(path)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as partial:
            write(partial)
            _flush(partial)
            os.replace(partial, path.with_name(name(partial)) if name else path)
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
