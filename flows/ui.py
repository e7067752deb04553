"""The experiments in the browser: ``python -m flows.ui``, on loopback only.

MLflow always; Prefect's server and UI too where the environment says ``PREFECT=1``.
"""

from __future__ import annotations

import os
import subprocess
import sys

from flows.command import console, given_parameters, reporting
from flows.parameters import Parameters
from flows.server import server_options

MLFLOW_PORT, PREFECT_PORT = 5_000, 4_200


def show(parameters: Parameters) -> None:
    """Start the servers and wait until Ctrl-C."""
    from tasks.tracking import tracking_uri

    uri = tracking_uri(parameters.report.tracking_uri)
    # It would start eight processes for jobs that nobody submits here.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    place = ["--host", "127.0.0.1", "--port", str(MLFLOW_PORT)]
    commands = [["mlflow", "ui", "--backend-store-uri", uri, *place]]
    console.print(f"MLflow:  http://127.0.0.1:{MLFLOW_PORT}  (ready in a quarter of a minute)")
    if os.environ.get("PREFECT"):
        commands.append(["prefect", *server_options(PREFECT_PORT)])
        console.print(f"Prefect: http://127.0.0.1:{PREFECT_PORT}")
    console.print("Stop with Ctrl-C.")
    processes = [
        subprocess.Popen([sys.executable, "-m", *command], env=environment) for command in commands
    ]
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


if __name__ == "__main__":
    given = given_parameters()
    reporting(lambda: show(given))
