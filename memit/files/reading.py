"""Files of the user's: ordinary ones of a bearable size, read as text or JSON, or refused."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from memit.errors import InputError

SIZE_LIMIT = 1 << 30
"""Bytes of the largest file that is read as a whole."""


def check_file(path: str | Path, what: str, size_limit: int | None = SIZE_LIMIT) -> None:
    """Raise `InputError` unless there is an ordinary file of at most `size_limit` bytes.

    A pipe or a device, which could make a reader wait for ever, is none. `what` says whose path it
    is, e.g. "the records".
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
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8, unpack it if it is "
            "compressed, or fetch it again."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from None
    if "\0" in text:
        raise InputError(
            f"{path} is no text (character {text.index(chr(0))} is NUL): save it as UTF-8, or "
            "fetch it again."
        )
    return text


def parse_json(text: str, where: str | Path) -> Any:
    """A JSON text's value. Raises `InputError` for what is not JSON: NaN and infinities, a key that
    an object names twice, numbers and nesting beyond any use."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        advice = "it may be truncated, fetch or write it again"
        if text[error.pos :].strip() and "," in (text[error.pos], text[: error.pos].rstrip()[-1:]):
            advice = "a comma too many, remove it"
        raise InputError(
            f"{where} is not whole JSON ({line}column {error.colno}: {error.msg}): {advice}."
        ) from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply: records have three levels.") from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}): correct it.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
