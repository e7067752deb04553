"""Atomic file writes."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError

from memit.errors import ResourceError

PARTIAL = ".partial"
"""Suffix of a file that is still being written."""

noted: Callable[[Path], AbstractContextManager[object]] = nullcontext
"""Entered with every temporary path while it is in use; a project's journal of unfinished files."""

_temporary: set[Path] = set()


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be renamed to it; deleted at the end if left."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    _temporary.add(partial)
    with noted(partial):
        try:
            yield partial
        finally:
            remove(partial)
            _temporary.discard(partial)


def remove(path: Path) -> None:
    """Delete a file, a link or a directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(
    path: Path, write: Callable[[Path], object], name: Callable[[Path], str] | None = None
) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it.

    A reader of `path` sees the old content or the new, also after a power cut. A link is replaced,
    and the file that it leads to is left as it was. `name` derives the file's name from what was
    written; None keeps that of `path`.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    if path in _temporary:  # an atomic write of it is in progress
        write(path)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode  # that of the umask
            partial.unlink()
            write(partial)
            if partial.is_file():  # safetensors would let nobody else read it
                partial.chmod(mode)
            for file in (*partial.rglob("*"), partial):
                _flush(file)
            os.replace(partial, path.with_name(name(partial)) if name else path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(
            f"{path} cannot be written ({reason}): make room or use another disk."
        ) from error


def _flush(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
