"""Telling DVC what a flow made, so that ``dvc status`` is clean and ``dvc repro`` skips it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.command import console

WRITTEN_IN_PLACE = {
    "unable to read: 'dvc.lock'": Path("dvc.lock"),
    "dvc.lock' validation failed": Path("dvc.lock"),
    "RWLock-file": Path(".dvc/tmp/rwlock"),
}
"""What DVC says of a file of which it was killed in the middle, and that file. All that it holds is
written again."""


def commit_stages(stages: Sequence[str]) -> None:
    """Enter finished stages into ``dvc.lock`` (``dvc commit``).

    Does nothing where DVC itself runs the flow, or outside of a DVC project.
    """
    if "DVC_STAGE" in os.environ or not (Path(".dvc").is_dir() and Path("dvc.yaml").exists()):
        return
    failed = _commit(stages)
    if torn := [path for name, path in WRITTEN_IN_PLACE.items() if failed and name in failed]:
        for path in torn:
            path.unlink(missing_ok=True)
        failed = _commit(stages)
    if failed:
        reason = failed.splitlines()[0]
        console.print(
            f"[yellow]warning:[/] DVC did not take the results ({reason}); they stand, and "
            "`dvc commit -f` enters them."
        )


def _commit(stages: Sequence[str]) -> str:
    """What DVC says when it fails, nothing when it does not."""
    result = subprocess.run(
        [dvc_command(), "commit", "--quiet", "--force", *stages],
        capture_output=True,
        text=True,
        check=False,
    )
    return (result.stderr.strip() or "no reason given") if result.returncode != 0 else ""


def dvc_command() -> str:
    """DVC beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("dvc")
    return str(beside) if beside.exists() else (shutil.which("dvc") or "dvc")
