"""Telling DVC what a flow made, so that ``dvc status`` is clean and ``dvc repro`` skips it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from filecmp import cmp
from pathlib import Path

from flows.command.parameters import Parameters, read_parameters
from flows.command.script import console
from memit.errors import InputError
from tasks.engine.artifacts import cache_directory, copy_file
from tasks.engine.results import STEPS, Manifest, flow_runs
from tasks.reporting.tracking import origin_tags

LOCK = Path("dvc.lock")
RWLOCK = Path(".dvc/tmp/rwlock")
"""Files that DVC writes in place, so that a kill can tear them."""

RESULTS = (Path("artifacts"), Path("evaluation"), Path("report"))
CURES = {
    "not a git repository": "`git init`, or `dvc config core.no_scm true`, and then ",
    "is outside of": "put a directory in the link's place (`dvc cache dir` uses other disks), and ",
}
"""What helps where DVC says these words."""


def commit_stages(parameters: Parameters, stages: Sequence[str]) -> None:
    """Enter finished stages into ``dvc.lock`` (``dvc commit``).

    Does nothing where DVC itself runs the flow, outside of a DVC project, and after a run with
    other parameters than ``params.yaml`` has, which is where DVC would read them.
    """
    if "DVC_STAGE" in os.environ or not (Path(".dvc").is_dir() and Path("dvc.yaml").exists()):
        return
    if not stand_in_the_file(parameters):
        console.print(
            f"[yellow]note:[/] params.yaml says otherwise, so {', '.join(stages)} stay out of "
            "dvc.lock; `dvc checkout` brings back what it names."
        )
        return
    _drop_torn_rwlock()
    _drop_damaged_copies()
    failed = _commit(stages)
    if failed and LOCK.exists():
        failed = _commit_anew(STEPS[: STEPS.index(stages[-1]) + 1]) and failed
    if failed:
        lines = failed.splitlines()
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        cure = next((cure for words, cure in CURES.items() if words in reason), "")
        console.print(
            f"[yellow]warning:[/] DVC did not take the results ({reason}); they stand: {cure}"
            "`dvc commit -f` enters them."
        )


def _commit_anew(stages: Sequence[str]) -> str:
    """Commit to a new ``dvc.lock``, since the old one may be torn; put it back if that fails.

    The old one is kept in ``.cache/``: it may know stages of the user's.
    """
    kept = cache_directory() / "dvc.lock"
    copy_file(LOCK, kept)
    LOCK.unlink()
    failed = _commit(stages)
    if failed:
        copy_file(kept, LOCK)
    return failed


def _drop_torn_rwlock() -> None:
    """It names processes that work now; one that was torn names none and stops DVC for ever."""
    try:
        json.loads(RWLOCK.read_bytes())
    except FileNotFoundError:
        pass
    except ValueError:
        RWLOCK.unlink(missing_ok=True)


def _drop_damaged_copies() -> None:
    """Delete from DVC's cache what is not the content that it should be.

    Results are links into it: what was damaged in place is damaged there, too, and DVC would link
    the result that was made anew to that copy, which it does not look at again.
    """
    copies = Path(_ask_dvc("cache", "dir").stdout.strip() or ".dvc/cache", "files/md5")
    for path in (path for folder in RESULTS for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        copy = copies / digest[:2] / digest[2:]
        if copy.exists() and not copy.samefile(path) and not cmp(path, copy, shallow=False):
            copy.unlink()


def _commit(stages: Sequence[str]) -> str:
    """What DVC says when it fails, nothing when it does not."""
    result = _ask_dvc("commit", "--force", *stages)
    return (result.stderr.strip() or "no reason given") if result.returncode != 0 else ""


def _ask_dvc(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def origin(parameters: Parameters, manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """Where results come from, as tags; without ``dvc.lock`` where it speaks of others."""
    tags = origin_tags(flow_runs(manifests))
    if not stand_in_the_file(parameters):
        tags.pop("dvc.lock", None)
    return tags


def stand_in_the_file(parameters: Parameters) -> bool:
    """Whether ``params.yaml`` says the same: a deployment may have handed over others."""
    try:
        return _without_runner(parameters) == _without_runner(read_parameters())
    except InputError:
        return False


def _without_runner(parameters: Parameters) -> dict[str, object]:
    return parameters.model_dump(exclude={"runner"})  # no result depends on it
