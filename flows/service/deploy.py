"""Serve the deployments of `prefect.yaml` on this machine: `memit deploy` and its runner."""

import asyncio
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from prefect import serve
from prefect.client.orchestration import get_client
from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner
from prefect.schedules import Schedule

from flows.command.parameters import read_parameters
from flows.command.script import console, reporting
from flows.service.server import PORT, exit_without_server, prefect_server
from flows.service.watched import running

FIRST = "experiment/run"
"""The deployment that is run at the start."""
QUERY_SECONDS = 2.0
"""Time between queries for runs to start."""


def deploy(once: bool) -> int:
    """Start a server, unless there is one, and a runner; returns the runner's exit status."""
    with prefect_server(PORT) as address:
        exit_without_server(address)
        console.print(f"Prefect's server: {address.removesuffix('/api')}")
        # A process of its own, whose runs end with it before the server does.
        options = ["--once"] if once else []
        with running("flows.service.deploy", *options, start_new_session=True) as runner:
            return runner.wait()


def project() -> dict[str, Any]:
    """A build step of `prefect.yaml`: this directory and its parameters."""
    return {"directory": str(Path.cwd()), "parameters": read_parameters().model_dump(mode="json")}


def run_deployments(once: bool) -> int:
    """Run the first deployment and, unless `once`, serve all of them until this process is ended.

    Returns:
        The exit status: 0 if the first run completed.
    """
    deployments = _read_deployments()
    # Without a limit of 1, so that an older run which is due does not take the place of this one;
    # runs in one directory wait for each other.
    runner = Runner(pause_on_shutdown=False)
    for deployment in deployments:
        runner.add_deployment(deployment)
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(FIRST)
        run = client.create_flow_run_from_deployment(deployment.id)
    console.print(f"running {FIRST} as {run.name!r}")
    asyncio.run(runner.start(run_once=True))
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run.id).state
    assert state is not None
    console.print(f"{FIRST} {state.type.value.lower()} {state.message or ''}", markup=False)
    if not once:
        console.print("Stop with Ctrl-C.")
        serve(*deployments, limit=1, pause_on_shutdown=False, query_seconds=QUERY_SECONDS)
    return 0 if state.is_completed() else 1


def _read_deployments() -> list[RunnerDeployment]:
    """Those of `prefect.yaml`, without its work pool."""
    entries = yaml.safe_load(Path("prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    parameters = project()["parameters"]
    for entry in entries:
        del entry["work_pool"]
        entry["schedules"] = [Schedule(**schedule) for schedule in entry.get("schedules", ())]
        given = entry.get("parameters", {}).get("parameters")
        if isinstance(given, str):  # a place for those of the file; others are completed by the run
            entry["parameters"] = {"parameters": parameters}
    return [RunnerDeployment.from_entrypoint(**entry) for entry in entries]


if __name__ == "__main__":
    # Prefect's handler of SIGTERM does not await it.
    warnings.filterwarnings("ignore", "coroutine 'Runner.astop' was never awaited")
    sys.exit(reporting(lambda: run_deployments("--once" in sys.argv)))
