"""What the pieces of a step are mapped over."""

from __future__ import annotations

from typing import Any

from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

WORKERS = 2
"""Threads: one computes while the other reads, hashes and writes."""


def thread_runner() -> TaskRunner[Any]:
    """Threads of this process, which share its model and take turns with it."""
    return ThreadPoolTaskRunner(max_workers=WORKERS)  # pyright: ignore[reportReturnType]
