"""A task for the workers of a cluster, which import this module and nothing of the tests."""

import os
import time

from prefect import task

from tasks.engine.loaded_model import ModelReference, loaded


@task
def mark(number: int, reference: ModelReference) -> tuple[int, int]:
    """The process that answers, and the first number that its loaded model was marked with."""
    time.sleep(0.2)  # so that all workers get some
    with loaded(reference) as lm:
        lm.__dict__.setdefault("mark", number)
        return os.getpid(), lm.__dict__["mark"]
