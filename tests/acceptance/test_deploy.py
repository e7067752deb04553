"""`make deploy` from nothing: server, deployments, a worker, a finished run; then nothing left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.command.parameters import Parameters
from flows.service.gpu_slot import gpu_turn
from memit.errors import InputError
from tests.acceptance.project import ROOT, Project, hear_interrupts

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]

DEPLOYED = {"experiment/local", "comparison/local", "scaling-run/local", "reproduce/local"}
TURNS = """
import sys, time
from pathlib import Path
from prefect import flow
from flows.service.gpu_slot import taking_turns
from flows.command.parameters import check_parameters

def note(what):
    with open("turns.txt", "a") as file:
        file.write(f"{sys.argv[1]} {what}\\n")

@flow(validate_parameters=False)
@taking_turns
def dummy(parameters):
    note("in")
    time.sleep(float(sys.argv[2]))
    note("out")

dummy(check_parameters({"model": {"device": "cuda"}}))
"""


class Deployment:
    """A project in which ``make deploy`` runs."""

    def __init__(self, place: Path) -> None:
        self.project = Project(place, "")
        self.place = place
        for name in ("Makefile", "prefect.yaml", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, place / name)
        (place / "turns.py").write_text(TURNS)
        self.environment = {**self.project.environment, "PYTHONPATH": str(place)}
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):
            self.environment.pop(name, None)
        self.output = place / "deploy.txt"
        venv = sys.prefix
        words = ["make", "deploy", f"VENV={venv}", "-o", f"{venv}/.installed"]
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                words,
                cwd=place,
                env=self.environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=hear_interrupts,
            )

    def wait_for(self, words: str, seconds: float = 300.0) -> str:
        """What it has said, once that contains ``words``."""
        deadline = time.monotonic() + seconds
        while words not in (said := self.output.read_text()):
            assert self.process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        return said

    @property
    def address(self) -> str:
        """Of the server's API."""
        said = self.wait_for("server is up: ")
        return said.split("server is up: ")[1].split()[0] + "/api"

    def ask(self, path: str, **content: Any) -> Any:
        """The API's answer: of a POST where there is something to say, else of a GET."""
        method = "POST" if content else "GET"
        deadline = time.monotonic() + 60
        while True:
            url = f"{self.address}{path}"
            answer = httpx.request(method, url, json=content or None, timeout=60)
            # A server whose data base is busy says so and wants to be asked again.
            if answer.status_code != 503 or time.monotonic() > deadline:
                answer.raise_for_status()
                return answer.json()
            time.sleep(1)

    def deployment(self, name: str) -> Any:
        """What the server knows of a deployment."""
        return self.ask(f"/deployments/name/{name}")

    def submit(self, name: str, **parameters: Any) -> str:
        """Ask for a run; gives its id."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return self.ask(path, parameters=parameters, state={"type": "SCHEDULED"})["id"]

    def log_of(self, run: str, wanted: str) -> str:
        """What a run has logged, once ``wanted`` is there: lines come some seconds behind."""
        deadline = time.monotonic() + 30
        while True:
            lines = self.ask("/logs/filter", logs={"flow_run_id": {"any_": [run]}}, limit=200)
            said = "\n".join(line["message"] for line in lines)
            if wanted in said or time.monotonic() > deadline:
                return said
            time.sleep(0.5)

    def end_of(self, run: str, seconds: float = 180.0) -> tuple[str, str]:
        """The last state of a run and its message."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.ask(f"/flow_runs/{run}")["state"]
            if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return state["type"], state["message"] or ""
            assert time.monotonic() < deadline, f"{state}\n{self.output.read_text()}"
            time.sleep(0.5)

    def take_turn(self, name: str, seconds: float) -> subprocess.Popen[bytes]:
        """A run that holds the GPU for some seconds."""
        environment = {**self.environment, "PREFECT_API_URL": self.address}
        words = [sys.executable, "turns.py", name, str(seconds)]
        return subprocess.Popen(words, cwd=self.place, env=environment)

    def turns(self) -> list[str]:
        """Who went in and out, in order."""
        path = self.place / "turns.txt"
        return path.read_text().splitlines() if path.exists() else []

    def processes(self) -> list[psutil.Process]:
        """Everything that was started."""
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The end of the first run; meanwhile one that held the GPU was killed."""
    deployment = Deployment(tmp_path_factory.mktemp("deploy") / "project")
    try:
        deployment.wait_for("deployed what prefect.yaml says")
        killed = deployment.take_turn("killed", 1_000)
        while deployment.turns() != ["killed in"]:
            assert killed.poll() is None
            time.sleep(0.1)
        killed.kill()
        killed.wait()
        deployment.wait_for("Stop with Ctrl-C")
        yield deployment
    finally:
        started = deployment.processes() if deployment.process.poll() is None else []
        if deployment.process.poll() is None:
            os.killpg(deployment.process.pid, signal.SIGKILL)
        for process in psutil.wait_procs(started, timeout=1)[1]:
            process.kill()


def test_from_nothing_to_a_finished_run_that_a_newcomer_understands(deployed: Deployment) -> None:
    said = deployed.output.read_text()
    assert "experiment/local completed" in said
    assert "Score S" in said
    assert "Traceback" not in said
    assert "warning" not in said
    assert (deployed.place / "metrics.json").exists()


def test_the_deployments_show_their_parameters(deployed: Deployment) -> None:
    listed = deployed.ask("/deployments/filter", limit=50)
    flows = {flow["id"]: flow["name"] for flow in deployed.ask("/flows/filter", limit=50)}
    assert {f"{flows[one['flow_id']]}/{one['name']}" for one in listed} == DEPLOYED
    for name in DEPLOYED - {"reproduce/local"}:
        one = deployed.deployment(name)
        assert {"memit", "gpu"} <= set(one["tags"])
        known = one["parameter_openapi_schema"]["definitions"]
        assert set(known["Parameters"]["properties"]) == set(Parameters.model_fields)
        count = known["RequestsSection"]["properties"]["count"]
        assert (count["default"], count["description"]) == (64, "null: all of them")
        assert one["parameters"]["parameters"]["requests"]["count"] == 8
    asked = deployed.deployment("reproduce/local")["parameter_openapi_schema"]["properties"]
    assert "dvc exp run -S" in asked["settings"]["description"]
    schedules = deployed.deployment("experiment/local")["schedules"]
    assert [(each["slug"], each["active"]) for each in schedules] == [("nightly", False)]
    assert deployed.ask("/v2/concurrency_limits/gpu")["limit"] == 1
    assert deployed.ask("/work_pools/local")["concurrency_limit"] == 1


def test_what_a_run_is_given_lies_over_params_yaml_and_is_checked(deployed: Deployment) -> None:
    wrong = deployed.submit("experiment/local", parameters={"requests": {"count": 0}})
    again = deployed.submit("reproduce/local")
    kind, message = deployed.end_of(wrong)
    assert kind == "FAILED"
    assert "InputError: parameters: requests.count is 0: input should be" in message
    assert deployed.end_of(again)[0] == "COMPLETED"
    assert "up to date" in deployed.log_of(again, "up to date")


def test_one_at_a_time_computes_on_the_gpu(deployed: Deployment) -> None:
    """Also after one that held it was killed: its lease has run out meanwhile, or does now."""
    runs = [deployed.take_turn(name, 2) for name in ("a", "b")]
    assert [run.wait(timeout=150) for run in runs] == [0, 0]
    turns = deployed.turns()[1:]
    assert turns in (
        ["a in", "a out", "b in", "b out"],
        ["b in", "b out", "a in", "a out"],
    )


def test_without_the_limit_nothing_computes_on_a_gpu(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    httpx.delete(f"{deployed.address}/v2/concurrency_limits/gpu").raise_for_status()
    with temporary_settings({PREFECT_API_URL: deployed.address}):
        with (
            pytest.raises(InputError, match=r"no concurrency limit 'gpu'.*make deploy"),
            gpu_turn("cuda"),
        ):
            pytest.fail("it went on")
        with gpu_turn("cpu"):
            pass


def test_it_stops_within_seconds_and_leaves_no_process(deployed: Deployment) -> None:
    run = deployed.submit("experiment/local", parameters={"model": {"seed": 1}})
    while deployed.ask(f"/flow_runs/{run}")["state"]["type"] != "RUNNING":
        time.sleep(0.1)
    started = deployed.processes()
    assert len(started) >= 4
    before = time.monotonic()
    os.killpg(deployed.process.pid, signal.SIGINT)
    deployed.process.wait(timeout=60)
    print(f"stopped after {time.monotonic() - before:.1f} s")
    assert time.monotonic() - before < 40
    assert psutil.wait_procs(started, timeout=1)[1] == []
    said = deployed.output.read_text()
    assert "Traceback" not in said
