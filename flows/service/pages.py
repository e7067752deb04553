"""The pages of MLflow and of Prefect in the browser, until Ctrl-C."""

from contextlib import ExitStack

from flows.command.parameters import ReportSection
from flows.command.script import console
from flows.service.server import PORT, free_port, prefect_server, wait_for
from flows.service.watched import running
from memit.errors import InputError
from memit.redaction import redacted
from tasks.engine.artifacts import cache_directory
from tasks.engine.environment import environment
from tasks.reporting.tracking import open_store, runs_page, store_lock, tracking_uri


def serve_pages(section: ReportSection, port: int, *, with_prefect: bool) -> None:
    """Serve MLflow's pages, on a free port if the wanted one is taken, and Prefect's if asked for.

    Raises:
        InputError: the runs are logged by another server.
        UnreachableError: a server does not start.
        ResourceError: MLflow's store cannot be used.
    """
    uri, log = tracking_uri(section.tracking_uri), cache_directory() / "mlflow.log"
    if uri.startswith("http"):
        raise InputError(f"the runs are logged at {redacted(uri)}: open that in a browser.")
    with store_lock():
        open_store(uri)
    log.parent.mkdir(parents=True, exist_ok=True)
    free = free_port(port)
    address = f"http://127.0.0.1:{free}"
    options = f"--host 127.0.0.1 --port {free} --workers 1 --backend-store-uri".split()
    with ExitStack() as servers:
        # Requests are logged to a file, or they would push the addresses off the screen.
        file = servers.enter_context(open(log, "ab"))
        servers.enter_context(environment({"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}))
        process = servers.enter_context(
            running("mlflow", "ui", *options, uri, stdout=file, stderr=file, start_new_session=True)
        )
        wait_for(address, process, "MLflow", log)
        lines = [f"MLflow   {address}{runs_page(uri, section.experiment)}"]
        if with_prefect:
            api = servers.enter_context(prefect_server(PORT))
            lines.append(f"Prefect  {api.removesuffix('/api')}")
        if free != port:
            console.print(f"port {port} is taken by another program")
        console.print("\n".join([*lines, "Ctrl-C ends"]), soft_wrap=True)
        try:
            process.wait()
        except KeyboardInterrupt:
            console.print("ended")
