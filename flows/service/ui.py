"""The experiments in the browser: ``python -m flows.service.ui``, on loopback only.

MLflow always; Prefect's server and UI too where the environment says ``PREFECT=1``.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress

from flows.command.parameters import Parameters
from flows.command.script import console, given_parameters, reporting
from flows.service.server import PORT, prefect_server
from flows.service.watched import running

MLFLOW_PORT = 5_000


def show(parameters: Parameters) -> None:
    """Start the servers and wait until Ctrl-C."""
    from tasks.reporting.tracking import open_store, tracking_uri

    uri = tracking_uri(parameters.report.tracking_uri)
    open_store(uri)
    # It would start eight processes for jobs that nobody submits here.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    place = ["--host", "127.0.0.1", "--port", str(MLFLOW_PORT)]
    with ExitStack() as stack:
        console.print(f"MLflow:  http://127.0.0.1:{MLFLOW_PORT}  (ready in a quarter of a minute)")
        if os.environ.get("PREFECT"):
            api = stack.enter_context(prefect_server(PORT))
            console.print(f"Prefect: {api.removesuffix('/api')}")
        console.print("Stop with Ctrl-C.")
        words = ("mlflow", "ui", "--backend-store-uri", uri, *place)
        process = stack.enter_context(running(*words, env=environment))
        with suppress(KeyboardInterrupt):
            process.wait()


if __name__ == "__main__":
    given = given_parameters()
    reporting(lambda: show(given))
