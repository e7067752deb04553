"""What tests of every kind share: where files are, what is in a folder, and processes that end."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"

session: Path
"""A folder that all processes of a test session share; the fixture of this name sets it."""


class Stopped(Exception):
    """Stands for a process that is killed."""


def stop_after(steps: int) -> Callable[[int], None]:
    """A progress callback that stops what calls it after so many steps."""
    finished = 0

    def progress(newly: int) -> None:
        nonlocal finished
        finished += newly
        if finished >= steps:
            raise Stopped

    return progress


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder by their paths in it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def python(
    *words: str, env: Mapping[str, str] = os.environ, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """What a new interpreter, which finds the project, said, and how it ended; the `options` are
    those of `subprocess.run`."""
    return subprocess.run(
        [sys.executable, *words],
        env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=check,
        **options,
    )


def imported(ended: subprocess.CompletedProcess[str]) -> set[str]:
    """The modules that an interpreter with `-X importtime` has imported."""
    return {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
