"""Checkpoints: where a task keeps the state of long work, to resume when its process was killed."""

import shutil
from pathlib import Path

from tasks.engine.artifacts import cache_directory
from tasks.engine.cache import FUNCTIONS, content_key
from tasks.engine.code import code_of


def work_directory(task: str, *inputs: object) -> Path:
    """The directory for the checkpoints of a cached task on these inputs."""
    key = content_key(task, code_of(FUNCTIONS[task]), {"": inputs})
    return cache_directory() / "unfinished" / task / key[:32]


def forget_work(task: str, *inputs: object) -> None:
    """Delete the checkpoints. Call it when the task's result is stored: a process that is killed
    between the two then loses nothing."""
    shutil.rmtree(work_directory(task, *inputs), ignore_errors=True)
