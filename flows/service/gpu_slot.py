"""Steps that compute on a GPU hold a slot of a concurrency limit at Prefect's server.

They hold it for the whole step: passing a slot on takes some seconds. The slot of a process that
was killed becomes free when its lease expires.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings

from flows.service.server import PRIVATE

GPU_LIMIT = "gpu"
"""Name of the limit."""
LEASE_SECONDS = 60.0
"""Length of a lease, which Prefect renews; the shortest that it allows."""


@contextmanager
def gpu_slot(device: str) -> Iterator[None]:
    """Wait for a slot and hold it if the device is a GPU and other runs use the server, too.

    A server without the limit gets one with a single slot.
    """
    if get_current_settings().api.url in (None, os.environ.get(PRIVATE)) or not is_gpu(device):
        yield
        return
    limit = GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=1)
    with suppress(ObjectAlreadyExists), get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(limit)
    with concurrency(GPU_LIMIT, strict=True, lease_duration=LEASE_SECONDS):
        yield


def is_gpu(device: str) -> bool:
    """Whether a value of `model.device` means a GPU on this machine."""
    if device in ("auto", "sharded"):
        return torch.cuda.is_available()
    return device != "cpu"
