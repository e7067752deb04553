"""Checkpoints: where a task keeps the state of long work, to resume when its process was killed."""

import shutil
from pathlib import Path

from prefect.transactions import get_transaction

from tasks.engine.artifacts import cache_directory


def unfinished_work(key: str) -> Path:
    """The directory for unfinished work of this key."""
    return cache_directory() / "unfinished" / key


def work_directory() -> Path | None:
    """The directory for the checkpoints of the cached task that runs, under the key of its record,
    with which they are deleted. None outside of Prefect."""
    key = getattr(get_transaction(), "key", None)
    return key and unfinished_work(key)


def forget_work(key: str) -> None:
    """Delete the checkpoints of a task. Call it when its record is stored: a process that is killed
    between the two then loses nothing."""
    shutil.rmtree(unfinished_work(key), ignore_errors=True)
