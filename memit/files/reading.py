"""Reading user-supplied files: regular, size-limited, UTF-8; and errors that name a file."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memit.errors import InputError, IntegrityError

SIZE_LIMIT = 1 << 30
"""Bytes of the largest file that is read as a whole."""


def check_file(path: str | Path, what: str, size_limit: int | None = SIZE_LIMIT) -> None:
    """Raise `InputError` unless `path` is a regular file of at most `size_limit` bytes.

    Reading a pipe or a device might never end. `what` is what the file holds, e.g. "the records".
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path of {what}.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}): check the path of {what}.") from None
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path} is a directory: give the file in it that holds {what}.")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is a pipe or a device: give an ordinary file with {what}.")
    if size_limit is not None and found.st_size > size_limit:
        raise InputError(
            f"{path} has {found.st_size} bytes, more than the {size_limit} that are read of "
            f"{what}: give a smaller file."
        )


def read_text(path: str | Path, what: str, size_limit: int = SIZE_LIMIT) -> str:
    """A file's text, without a byte order mark; raises `InputError` for anything but UTF-8."""
    check_file(path, what, size_limit)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8, unpack it if it is "
            "compressed, or fetch it again."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from None


def parse_json(text: str, where: str | Path) -> Any:
    """A JSON text's value; raises `InputError`, which names `where`, for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} is not whole JSON ({error}): correct it, or fetch or write it again."
        ) from None


@contextmanager
def holding(path: Path, what: str, way_out: str) -> Iterator[None]:
    """Turn any error of reading `what` from a file of ours into an `IntegrityError` that names the
    file and a way out."""
    try:
        yield
    except Exception as error:
        raise IntegrityError(f"{path} does not hold {what} ({error}); {way_out}.") from error
