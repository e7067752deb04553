"""Checkpoints: where a task keeps the state of long work, to resume when its process was killed."""

import shutil
from pathlib import Path

from prefect.transactions import get_transaction

from memit.errors import IntegrityError
from tasks.engine.artifacts import cache_directory


def unfinished_work(key: str) -> Path:
    """The directory for unfinished work of this key."""
    return cache_directory() / "unfinished" / key


def work_directory() -> Path | None:
    """The directory for the checkpoints of the cached task that runs, under the key of its record,
    with which they are deleted; None outside of Prefect, where nothing has a record.

    Raises:
        IntegrityError: Prefect has found no key, since code has changed while it was used.
    """
    transaction = get_transaction()
    if transaction is None:
        return None
    if transaction.key is None:
        raise IntegrityError("source code was changed while it was used: start the run again.")
    return unfinished_work(transaction.key)


def forget_work(key: str) -> None:
    """Delete the checkpoints of a task. Call it when its record is stored: a process that is killed
    between the two then loses nothing."""
    shutil.rmtree(unfinished_work(key), ignore_errors=True)
