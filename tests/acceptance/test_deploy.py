"""`make deploy` from nothing: a server, deployments, a finished run; then nothing left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.command.parameters import Parameters
from tests.acceptance.forked import Forked
from tests.acceptance.project import ROOT, Project, hear_interrupts

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]

FULL = {"experiment/run", "comparison/compare", "scaling-run/scale"}
DEPLOYED = FULL | {"experiment/stream", "reproduce/repro"}
HOLDER = """
import sys, time
from flows.service.gpu_slot import gpu_slot

def note(what):
    with open("slots.txt", "a") as file:
        file.write(f"{sys.argv[1]} {what}\\n")

with gpu_slot("cuda"):
    note("in")
    time.sleep(float(sys.argv[2]))
    note("out")
"""


def until(condition: Callable[[], object], seconds: float = 180.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


class Deployment:
    """A project in which `make deploy` runs."""

    holders: Sequence[Forked]
    """Processes that want the GPU's slot."""

    def __init__(self, place: Path) -> None:
        self.project = Project(place, "")
        self.place = place
        for name in ("Makefile", "prefect.yaml", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, place / name)
        self.environment = {**self.project.environment, "PYTHONPATH": str(place)}
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):
            self.environment.pop(name, None)
        self.process = subprocess.Popen(
            ["make", "deploy", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"],
            cwd=place,
            env=self.environment,
            stdout=(place / "deploy.txt").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=hear_interrupts,
        )
        self.wait_for("Prefect's server: ")
        self.address = self.output().split("Prefect's server: ")[1].split()[0] + "/api"

    def output(self) -> str:
        """What it has printed."""
        return (self.place / "deploy.txt").read_text()

    def wait_for(self, words: str) -> None:
        """Wait until the output contains `words`."""
        until(lambda: words in self.output() or self.process.poll() is not None)
        assert self.process.poll() is None, self.output()

    def ask(self, path: str, **content: Any) -> Any:
        """The API's response, to a POST if there is content and to a GET if not."""
        method = "POST" if content else "GET"
        url = f"{self.address}{path}"
        # A server whose database is busy wants to be asked again.
        while (answer := httpx.request(method, url, json=content or None)).status_code == 503:
            time.sleep(1)
        answer.raise_for_status()
        return answer.json()

    def submit(self, name: str, **parameters: Any) -> str:
        """Schedule a run; returns its id."""
        path = f"/deployments/{self.ask(f'/deployments/name/{name}')['id']}/create_flow_run"
        return self.ask(path, parameters=parameters, state={"type": "SCHEDULED"})["id"]

    def state(self, run: str) -> dict[str, Any]:
        """The current state of a run."""
        return self.ask(f"/flow_runs/{run}")["state"]

    def end_of(self, run: str) -> tuple[str, str]:
        """The last state of a run and its message."""
        until(lambda: self.state(run)["type"] in ("COMPLETED", "FAILED", "CRASHED"))
        state = self.state(run)
        return state["type"], state["message"] or ""

    def log_of(self, run: str) -> str:
        """What a run has logged."""
        lines = self.ask("/logs/filter", logs={"flow_run_id": {"any_": [run]}}, limit=200)
        return "\n".join(line["message"] for line in lines)

    def hold_gpu(self, name: str, seconds: float) -> Forked:
        """A process that holds the GPU's slot."""
        environment = {**self.environment, "PREFECT_API_URL": self.address}
        (self.place / "holder.py").write_text(HOLDER)
        with open(os.devnull) as null:
            words = [sys.executable, "holder.py", name, str(seconds)]
            return Forked(words, self.place, environment, null)

    def slots(self) -> list[str]:
        """Which process went in and out, in order."""
        path = self.place / "slots.txt"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """After the first run; meanwhile a process that held the GPU's slot was killed."""
    deployment = Deployment(tmp_path_factory.mktemp("deploy") / "project")
    try:
        killed = deployment.hold_gpu("killed", 1_000)
        until(lambda: deployment.slots() == ["killed in"])
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        # They wait until its lease has expired, and then for each other.
        deployment.holders = [deployment.hold_gpu(name, 2) for name in ("a", "b")]
        deployment.wait_for("Stop with Ctrl-C")
        yield deployment
    finally:
        if deployment.process.poll() is None:
            os.killpg(deployment.process.pid, signal.SIGKILL)


def test_from_nothing_to_a_finished_run(deployed: Deployment) -> None:
    output = deployed.output()
    assert "experiment/run completed" in output
    assert "Score S" in output
    assert "Traceback" not in output
    assert "warning" not in output.lower()
    assert (deployed.place / "metrics.json").exists()


def test_the_deployments_show_their_parameters(deployed: Deployment) -> None:
    found = {name: deployed.ask(f"/deployments/name/{name}") for name in DEPLOYED}
    assert len(deployed.ask("/deployments/filter", limit=50)) == len(found)
    asked = found["reproduce/repro"]["parameter_openapi_schema"]["properties"]
    assert "dvc exp run -S" in asked["settings"]["description"]
    schedules = found["experiment/run"]["schedules"]
    assert [(each["slug"], each["active"]) for each in schedules] == [("nightly", False)]
    assert found["experiment/stream"]["parameters"]["parameters"]["edit"]["history"] == "history"
    for name in FULL:
        assert {"memit", "gpu"} <= set(found[name]["tags"])
        known = found[name]["parameter_openapi_schema"]["definitions"]
        assert set(known["Parameters"]["properties"]) == set(Parameters.model_fields)
        count = known["RequestsSection"]["properties"]["count"]
        assert (count["default"], count["description"]) == (
            "auto",
            "auto: 64 of the embedded facts, all of others; null: all",
        )
        assert found[name]["parameters"]["parameters"]["requests"]["count"] == 8


def test_parameters_of_a_run_are_laid_over_params_yaml_and_checked(deployed: Deployment) -> None:
    wrong = deployed.submit("experiment/run", parameters={"requests": {"count": 0}})
    again = deployed.submit("reproduce/repro")
    with pytest.raises(httpx.HTTPStatusError):
        deployed.submit("reproduce/repro", settings="requests.count=4")
    kind, message = deployed.end_of(wrong)
    assert kind == "FAILED"
    assert "InputError: parameters: requests.count is 0" in message
    assert deployed.end_of(again)[0] == "COMPLETED"
    until(lambda: "up to date" in deployed.log_of(again), 30)


def test_one_at_a_time_computes_on_the_gpu(deployed: Deployment) -> None:
    """Also after a holder was killed."""
    assert [holder.wait(timeout=150) for holder in deployed.holders] == [0, 0]
    orders = (["a in", "a out", "b in", "b out"], ["b in", "b out", "a in", "a out"])
    assert deployed.slots()[1:] in orders


def test_it_stops_within_seconds_and_leaves_no_process(deployed: Deployment) -> None:
    run = deployed.submit("experiment/run", parameters={"model": {"seed": 1}})
    until(lambda: deployed.state(run)["type"] == "RUNNING")
    started = psutil.Process(deployed.process.pid).children(recursive=True)
    assert len(started) >= 4
    before = time.monotonic()
    os.killpg(deployed.process.pid, signal.SIGINT)
    deployed.process.wait(timeout=60)
    assert time.monotonic() - before < 20
    assert psutil.wait_procs(started, timeout=1)[1] == []
    assert "Traceback" not in deployed.output()
