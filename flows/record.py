"""Telling DVC what a flow made, so that ``dvc status`` is clean and ``dvc repro`` skips it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.command import console


def commit_stages(stages: Sequence[str]) -> None:
    """Enter finished stages into ``dvc.lock`` (``dvc commit``).

    Does nothing where DVC itself runs the flow, or outside of a DVC project.
    """
    if "DVC_STAGE" in os.environ or not (Path(".dvc").is_dir() and Path("dvc.yaml").exists()):
        return
    result = subprocess.run(
        [dvc_command(), "commit", "--quiet", "--force", *stages],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[0]
        console.print(
            f"[yellow]warning:[/] DVC did not take the results ({reason}); they stand, and "
            "`dvc commit -f` enters them."
        )


def dvc_command() -> str:
    """DVC beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("dvc")
    return str(beside) if beside.exists() else (shutil.which("dvc") or "dvc")
