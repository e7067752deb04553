"""Where a task keeps the state of long work, to go on from when its process was killed."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.engine.artifacts import cache_directory
from tasks.engine.cache import FUNCTIONS, content_key
from tasks.engine.code import code_of


def work_directory(task: str, *inputs: object) -> Path:
    """The directory for the unfinished work of a cached task on these inputs."""
    key = content_key(task, code_of(FUNCTIONS[task]), {"": inputs})
    return cache_directory() / "unfinished" / task / key[:32]


def forget_work(task: str, *inputs: object) -> None:
    """Delete it. To be called when the task has given its result, which is stored by then: a
    process that is killed between the two has lost nothing."""
    shutil.rmtree(work_directory(task, *inputs), ignore_errors=True)
