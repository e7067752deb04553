"""From nothing to a finished deployment run: ``python -m flows.service.deploy [--once]``.

A server on loopback, the work pool, the limit for the GPU, the deployments of ``prefect.yaml``, a
process worker, and a run of the experiment through it. Then server and worker go on until Ctrl-C;
with ``--once`` they stop there. A server that ``PREFECT_API_URL`` names is used as it is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flows.command.parameters import read_parameters
from flows.command.script import console, given_parameters, reporting

if __name__ == "__main__":
    given_parameters()

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.workers.process import ProcessWorker

from flows.command.checks import check_inputs
from flows.service.gpu_slot import make_limit
from flows.service.server import PORT, end_without, prefect_server
from flows.service.watched import running, watched
from memit.errors import MemitError, UnreachableError
from tasks.engine.signals import TERMINATED

POOL = "local"
FIRST = "experiment/local"
"""The deployment that is run."""


def prepare(gpu_runs: int) -> dict[str, Any]:
    """A step of ``prefect.yaml``: make the GPU's limit, and say where and with what runs work."""
    make_limit(gpu_runs)
    return {
        "directory": str(Path.cwd()),
        "parameters": read_parameters().model_dump(mode="json"),
    }


def deploy(once: bool) -> int:
    """Do all that; gives 0 if the run completed."""
    with prefect_server(PORT) as api:
        end_without(api)
        address = api.removesuffix("/api")
        console.print(f"Prefect's server is up: {address}")
        _make_pool()
        _deploy_all()
        with _worker() as worker:
            completed = _run(worker)
            if not once:
                console.print(
                    f"Start more of them at {address}/deployments (Custom run shows the "
                    "parameters), or with `prefect deployment run`.\nStop with Ctrl-C."
                )
                worker.wait()
    return 0 if completed else 1


def _make_pool() -> None:
    """The pool for runs in this directory, which all write the same files: one at a time."""
    template = ProcessWorker.get_default_base_job_template()
    pool = WorkPoolCreate(
        name=POOL, type="process", base_job_template=template, concurrency_limit=1
    )
    with suppress(ObjectAlreadyExists), get_client(sync_client=True) as client:
        client.create_work_pool(pool)


def _deploy_all() -> None:
    """Put the deployments of ``prefect.yaml`` on the server; those that are there are changed."""
    log = Path(os.environ["PREFECT_HOME"]) / "deploy.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        words = watched("prefect", "--no-prompt", "deploy", "--all")
        status = subprocess.run(words, stdout=file, stderr=file, check=False).returncode
    if status:
        said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise MemitError(
            f"Prefect did not take the deployments of prefect.yaml ({said[-1].strip()}): see {log}."
        )
    console.print("deployed what prefect.yaml says, with the parameters of params.yaml as they are")


@contextmanager
def _worker() -> Iterator[subprocess.Popen[bytes]]:
    """A process worker of the pool, stopped at the end together with what it runs."""
    words = ("prefect", "worker", "start", "--pool", POOL, "--type", "process")
    # Ctrl-C is for this process, which stops the run first and then the worker.
    with running(*words, start_new_session=True) as process:
        try:
            yield process
        finally:  # impatience must not leave processes behind
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(worker: subprocess.Popen[bytes]) -> bool:
    """Run the first deployment and wait for its end; whether it completed.

    Raises:
        UnreachableError: the worker ended before the run did.
    """
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(FIRST)
        run = client.create_flow_run_from_deployment(deployment.id)
        console.print(f"running {FIRST} as {run.name!r} through a process worker")
        while (state := client.read_flow_run(run.id).state) is None or not state.is_final():
            if worker.poll() is not None:
                raise UnreachableError(
                    "Prefect's worker ended before the run: see its lines above."
                )
            time.sleep(1)
    style = "green" if state.is_completed() else "red"
    reason = "" if state.is_completed() else f": {state.message}"
    console.print(f"[bold {style}]{FIRST} {str(state.name).lower()}[/]", end="")
    console.print(reason, markup=False, highlight=False, soft_wrap=True)
    return state.is_completed()


if __name__ == "__main__":
    parameters = given_parameters()
    reporting(lambda: check_inputs(parameters))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(TERMINATED))
    sys.exit(reporting(lambda: deploy("--once" in sys.argv[1:])))
