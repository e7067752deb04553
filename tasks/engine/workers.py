"""Workers that compute the pieces of a step: threads, or processes of a Dask or Ray cluster.

Workers get the path of the cache, or the store's address in its place; pieces travel as references.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from prefect import Task, unmapped
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from memit.errors import InputError, UnreachableError
from tasks.engine.artifacts import Value, artifacts_in, project_root
from tasks.engine.environment import environment
from tasks.engine.loaded_model import ModelReference
from tasks.engine.store import VARIABLE, shared_store

if TYPE_CHECKING:
    from distributed import Client

WORKERS = 2
"""Threads: one computes while the other reads, hashes and writes."""
OBJECT_STORE_BYTES = 128 << 20
"""What Ray keeps for results: references only."""
RESTARTS = 3
"""Retries of a piece after its worker died."""

Kind = Literal["threads", "dask", "ray"]


class Workers(Value):
    """The workers that compute pieces. No result depends on them."""

    kind: Kind
    address: str | None
    """Of a running cluster; None starts one on this machine."""
    workers: int
    """Processes of a cluster that is started here."""
    store: str | None
    """Shared by all workers; None: they see this project's `.cache/` under the same path."""
    threads: int
    """Cores that a piece occupies."""
    device: str
    """The device of a piece's model, as in `ModelReference`."""


def thread_runner() -> TaskRunner[Any]:
    """Threads of this process, which share its model."""
    return ThreadPoolTaskRunner(max_workers=WORKERS)  # pyright: ignore[reportReturnType]


def check_workers(kind: Kind) -> None:
    """Check that the packages for this kind of workers are installed.

    Raises:
        InputError: they are not.
    """
    modules = {"dask": "prefect_dask", "ray": "prefect_ray"}
    if kind in modules and find_spec(modules[kind]) is None:
        raise InputError(
            f"runner.kind is {kind}, which is not installed: "
            f'pip install -c constraints.txt -e ".[{kind}]".'
        )


@contextmanager
def mapping_over(workers: Workers) -> Iterator[None]:
    """Let the running flow map its tasks over these workers.

    The connection to a cluster serves inner flows, too, and ends with the outermost, as does a
    cluster that is started here.

    Raises:
        InputError: an extra is not installed.
        UnreachableError: the cluster does not answer.
    """
    check_workers(workers.kind)
    context = FlowRunContext.get()
    assert context is not None, "pieces are mapped inside a flow"
    with ExitStack() as stack:
        stack.enter_context(environment(worker_environment(workers)))
        if workers.kind != "threads" and not _connected:
            connection = {"dask": _dask, "ray": _ray}[workers.kind](workers)
            _connected.append(stack.enter_context(connection))
            stack.callback(_connected.clear)
        for runner in _connected:
            stack.enter_context(context.model_copy(update={"task_runner": runner}))
        yield


def scatter(task: Task[..., Any], pieces: Sequence[Any], **shared: Any) -> list[PrefectFuture[Any]]:
    """Map a task over pieces, its first argument; the others are the same for all.

    Files that arguments name are put into the shared store, if there is one.
    """
    if shared_store() is not None:
        for artifact in artifacts_in([pieces, shared]):
            artifact.share()
        for value in shared.values():
            if isinstance(value, ModelReference):
                value.share()
    constant: dict[str, Any] = {name: unmapped(value) for name, value in shared.items()}
    return list(task.map(list(pieces), **constant))


def worker_environment(workers: Workers) -> dict[str, str]:
    """Environment variables that tell workers where files are."""
    if workers.store is None:
        return {"DVC_ROOT": str(project_root())}
    return {VARIABLE: workers.store}


_connected: list[TaskRunner[Any]] = []
"""The connection to a cluster that flows of this process use."""


# --- Dask ---------------------------------------------------------------------------------------


@contextmanager
def _dask(workers: Workers) -> Iterator[TaskRunner[Any]]:
    from distributed import LocalCluster
    from prefect_dask.task_runners import DaskTaskRunner

    with ExitStack() as stack:
        address = workers.address
        if address is None:
            cluster = LocalCluster(
                n_workers=workers.workers,
                threads_per_worker=1,
                dashboard_address=None,  # pyright: ignore[reportArgumentType]
                memory_limit=None,  # a model cannot be spilled to disk
                silence_logs=logging.CRITICAL,
            )
            stack.enter_context(cluster)
            address = cluster.scheduler_address
        runner = stack.enter_context(DaskTaskRunner(address=address))
        try:
            client = runner.client
        except OSError as error:
            raise UnreachableError(
                f"no Dask scheduler answers at {address} ({error}): correct runner.address."
            ) from error
        _prepare(client, worker_environment(workers), started=workers.address is None)
        yield runner


def _prepare(client: Client, environment: dict[str, str], *, started: bool) -> None:
    """Set variables in all workers, also in those that join later."""
    from distributed import WorkerPlugin

    class Prepared(WorkerPlugin):
        name = "memit"

        def setup(self, worker: object) -> None:
            os.environ.update(environment)
            if started:  # the flow handles Ctrl-C and then ends its workers
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    client.register_plugin(Prepared())


# --- Ray ----------------------------------------------------------------------------------------


@contextmanager
def _ray(workers: Workers) -> Iterator[TaskRunner[Any]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    started: dict[str, Any] = {
        "num_cpus": workers.workers * workers.threads,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            workers.address,
            namespace="memit",
            runtime_env={"env_vars": worker_environment(workers)},
            logging_level=logging.CRITICAL,
            log_to_driver=False,
            **({} if workers.address else started),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UnreachableError(
            f"no Ray cluster answers at {workers.address} ({error}): correct runner.address."
        ) from error
    finally:
        with suppress(ValueError):  # in another thread, where Ray has not replaced it either
            signal.signal(signal.SIGTERM, handler)  # for the flow's orderly end
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        runner = stack.enter_context(RayTaskRunner())
        cores, gpus = workers.threads, _gpus(workers.device)
        stack.enter_context(remote_options(num_cpus=cores, num_gpus=gpus, max_retries=RESTARTS))
        yield runner


def _gpus(device: str) -> int:
    """The number of GPUs that a piece needs for itself; Ray hides the others from it."""
    present = torch.cuda.device_count()
    if device == "sharded":
        return present
    return int(present > 0 and device.startswith(("auto", "cuda")))
