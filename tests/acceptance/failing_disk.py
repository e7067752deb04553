"""Run the experiment on a disk that fails: python failing_disk.py ENOSPC|EROFS CALLS.

After so many calls that write under the working directory's results or ``.cache/``, these and all
later ones fail with that error, as on a disk that is full or has become read-only.
"""

import errno
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fail_after(calls: int, number: int, inside: Path) -> None:
    """Let every writing call of the system but the first ``calls`` raise error ``number``."""
    made = 0
    spared = (inside / ".prefect", inside / ".git", inside / ".dvc")

    def check(path: Any) -> None:
        nonlocal made
        place = Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path)
        place = place.absolute()
        if not place.is_relative_to(inside) or any(map(place.is_relative_to, spared)):
            return
        made += 1
        if made > calls:
            raise OSError(number, os.strerror(number), str(place))

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(path: Any, *arguments: Any, **named: Any) -> Any:
            check(path)
            return call(path, *arguments, **named)

        return checked

    really_open = os.open

    def checked_open(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & os.O_CREAT and number == errno.EROFS:
            check(path)
        return really_open(path, flags, *arguments, **named)

    os.open = checked_open
    for name in ("fsync", "replace", "mkdir"):
        setattr(os, name, failing(getattr(os, name)))


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    fail_after(int(sys.argv[2]), getattr(errno, sys.argv[1]), Path.cwd())
    sys.argv[1:] = ["experiment"]
    runpy.run_module("flows", run_name="__main__")
