"""Taking turns on the GPU: a step that computes on one holds a slot of a limit at Prefect's server.

Steps take turns, not pieces: handing a slot over takes some seconds. Whoever is killed loses the
slot when its lease runs out.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from flows.command.parameters import Parameters
from flows.service.server import PRIVATE
from memit.errors import InputError

GPU_LIMIT = "gpu"
"""The limit's name at the server."""
LEASE_SECONDS = 60.0
"""For so long a slot stays taken after its holder was killed; the least that Prefect allows."""


def taking_turns(step: Callable[[Parameters], None]) -> Callable[[Parameters], None]:
    """A step that waits until the GPU is free, where it computes on one."""

    @functools.wraps(step)
    def waiting(parameters: Parameters) -> None:
        with gpu_turn(parameters.model.device):
            step(parameters)

    return waiting


@contextmanager
def gpu_turn(device: str) -> Iterator[None]:
    """Hold a slot of the limit while the body runs; a CPU needs none.

    Nor does a run with a server of its own: nobody else could see the slot.

    Raises:
        InputError: the server has no such limit.
    """
    server = get_current_settings().api.url
    if server in (None, os.environ.get(PRIVATE)) or not is_gpu(device):
        yield
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        except ObjectNotFound:
            raise InputError(
                f"Prefect's server at {server} has no concurrency limit {GPU_LIMIT!r}, without "
                "which several runs could compute on the GPU at once: deploy to it (make deploy), "
                f"or run `prefect gcl create {GPU_LIMIT} --limit 1`."
            ) from None
    with concurrency(GPU_LIMIT, strict=True, lease_duration=LEASE_SECONDS):
        yield


def make_limit(runs: int) -> None:
    """Let so many runs at a time compute on the GPU; an older limit is changed."""
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, runs)


def is_gpu(device: str) -> bool:
    """Whether a value of ``model.device`` means a GPU on this machine."""
    if device in ("auto", "sharded"):
        import torch

        return torch.cuda.is_available()
    return device != "cpu"
