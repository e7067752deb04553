"""The mapped steps on clusters of two processes: the bytes of threads, also when a worker dies."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import distributed
import psutil
import pytest
from distributed.utils import get_mp_context
from prefect import flow

from flows.command.parameters import Parameters, check_parameters
from flows.edit import edit
from flows.evaluation import evaluation
from flows.model import model
from flows.prefixes import prefixes
from flows.requests import requests
from flows.service.step import workers_of
from flows.statistics import statistics
from flows.targets import targets
from memit.errors import ResourceError
from tasks.engine.artifacts import PARTIAL
from tasks.engine.hub import open_model
from tasks.engine.progress import gather
from tasks.engine.results import STORED_TARGETS_FILE, TARGETS_FILE
from tasks.engine.workers import mapping_over, scatter, thread_runner
from tests.integration.cluster_tasks import mark
from tests.integration.deadly_task import die

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]

EDITS = 8
TINY: dict[str, Any] = {
    "model": {
        "source": "synthetic",
        "threads": 2,  # two pieces share the model, where a process of a cluster computes one
        "world": {"people": 12, "relations": 3, "objects": 4, "biographies": 8},
        "training": {"layers": 3, "width": 32, "heads": 2, "vocabulary": 400, "steps": 30}
        | {"warmup_steps": 10},
    },
    "requests": {"source": "synthetic", "count": EDITS},
    "statistics": {
        "source": "synthetic",
        "documents": 80,
        "documents_per_shard": 20,
        "held_out_documents": 10,
    },
    "targets": {"requests_per_piece": 1, "evaluations": 25, "loss_threshold": 0.0},
    "evaluation": {"prompts_per_piece": 32, "generation_records": 2},
}
FORKED = ("multiprocessing-method", "forkserver")
MAPPED = ("statistics", "targets", "evaluation")


def with_runner(step: Callable[[Parameters], None]) -> Callable[[Parameters], None]:
    """Let what the body of a flow maps run on the workers of its parameters."""

    @wraps(step)
    def run(parameters: Parameters) -> None:
        with mapping_over(workers_of(parameters)):
            step(parameters)

    return run


class Project:
    """The experiment in the working directory."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.cache = place / ".cache"

    def files(self) -> list[Path]:
        """What must be the same to the byte."""
        names = ("artifacts/statistics/*.parquet", "artifacts/*.safetensors", "evaluation/*")
        found = [path for name in names for path in self.place.glob(name)]
        return [*found, self.place / "metrics.json"]

    def results(self) -> dict[str, bytes]:
        """Its content."""
        return {path.name: path.read_bytes() for path in self.files()}

    def forget(self, steps: Sequence[str], results: Iterable[Path]) -> None:
        """Delete the pieces of some steps with all records, and what came of them."""
        for path in ("records", *(f"pieces/{step}" for step in steps)):
            shutil.rmtree(self.cache / path, ignore_errors=True)
        for path in results:
            path.unlink()

    def pieces(self, step: str) -> int:
        """How many finished pieces of a step there are."""
        found = (self.cache / "pieces" / step).glob("*")
        return sum(not path.name.endswith(PARTIAL) for path in found)


@dataclass
class Watched:
    """What was seen of a run on a cluster."""

    undisturbed: dict[str, bytes]
    marks: set[tuple[int, int]]
    killed: int
    """Finished targets when a worker was killed."""
    disturbed: dict[str, bytes]
    said: str
    """Of a piece that kills every worker that takes it."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, api: str) -> Iterator[Project]:
    """An experiment that threads have carried out."""
    place = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DVC_ROOT", str(place))
        given = parameters()
        for step in (model, requests, prefixes, statistics, targets, edit, evaluation):
            step(given)
        yield Project(place)


@pytest.fixture(scope="module")
def by_threads(project: Project) -> dict[str, bytes]:
    """The results of threads."""
    return project.results()


def parameters(**runner: object) -> Parameters:
    return check_parameters({**TINY, "runner": runner})


@pytest.fixture(scope="module", params=["dask", "ray"])
def watched(
    request: pytest.FixtureRequest, project: Project, by_threads: dict[str, bytes]
) -> Watched:
    """The mapped steps twice on one cluster: undisturbed, and with the death of a worker."""
    given = parameters(kind=request.param)

    @flow(task_runner=thread_runner(), validate_parameters=False)
    @with_runner
    def both(given: Parameters) -> None:
        reference = open_model(**given.model.placement())
        seen = gather("mark", "marks", scatter(mark, range(4), reference=reference), [1] * 4)
        project.forget(MAPPED, project.files())
        for step in (statistics, targets, evaluation):
            step(given)
        undisturbed = project.results()
        seen += gather("mark", "marks", scatter(mark, range(4, 8), reference=reference), [1] * 4)
        project.forget(["targets"], [TARGETS_FILE, STORED_TARGETS_FILE])
        with killing_a_worker(project) as killed:
            targets(given)
        disturbed = project.results()
        with pytest.raises(ResourceError) as error:
            gather("die", "pieces", scatter(die, range(1)), [1])
        found.append(Watched(undisturbed, set(seen), killed[0], disturbed, str(error.value)))

    found: list[Watched] = []
    with pytest.MonkeyPatch.context() as patch:
        # A piece may die once with its worker, which takes seconds to start again.
        patch.setitem(distributed.config["distributed"]["scheduler"], "allowed-failures", 1)
        patch.setattr("tasks.engine.workers.RESTARTS", 1)
        # Dask's processes need not import it all; those of the cluster elsewhere do.
        patch.setitem(distributed.config["distributed"]["worker"], *FORKED)
        get_mp_context().set_forkserver_preload(["flows.evaluation"])
        both(given)
    return found[0]


class killing_a_worker:
    """Kill a process that computes targets as soon as some of them are finished."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.killed: list[int] = []
        self.thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        deadline = time.monotonic() + 120
        while (finished := self.project.pieces("targets")) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        if running := workers():
            max(running, key=lambda process: sum(process.cpu_times()[:2])).kill()
            self.killed.append(finished)

    def __enter__(self) -> list[int]:
        self.thread.start()
        return self.killed

    def __exit__(self, *_: object) -> None:
        self.thread.join()
        assert self.killed, "there was no worker to kill"


def workers() -> list[psutil.Process]:
    """The processes of the clusters that were started here."""
    found = []
    for process in psutil.Process().children(recursive=True):
        words = " ".join(process.cmdline())
        parent = " ".join(psutil.Process(process.ppid()).cmdline())
        if words.startswith("ray::") or "multiprocessing.forkserver" in parent:
            found.append(process)
    return found


def test_a_cluster_gives_the_bytes_of_threads(
    watched: Watched, by_threads: dict[str, bytes]
) -> None:
    assert len(by_threads) > 5
    assert watched.undisturbed == by_threads


def test_a_process_loads_the_model_once(watched: Watched) -> None:
    processes = [process for process, _ in watched.marks]
    assert len(processes) == len(set(processes)) == 2
    assert os.getpid() not in processes
    assert all(first < 4 for _, first in watched.marks)


def test_a_killed_worker_changes_nothing(watched: Watched, by_threads: dict[str, bytes]) -> None:
    assert 2 <= watched.killed < EDITS
    assert watched.disturbed == by_threads


def test_a_piece_that_kills_every_worker_is_named(watched: Watched) -> None:
    assert "the workers that computed a piece of die died several times" in watched.said
    assert "a smaller token_budget" in watched.said


def test_clusters_end_with_their_flow(watched: Watched) -> None:
    deadline = time.monotonic() + 20
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers() == []


@pytest.fixture
def elsewhere(api: str, tmp_path: Path, unused_port: int) -> Iterator[tuple[str, Path]]:
    """The address of a Dask cluster whose worker lives in another directory, and that directory."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
    environment |= {"PREFECT_API_URL": api}
    address = f"tcp://127.0.0.1:{unused_port}"
    scheduler = ["scheduler", "--host", "127.0.0.1", "--port", str(unused_port), "--no-dashboard"]
    worker = ["worker", address, "--nthreads", "1", "--no-dashboard", "--memory-limit", "0"]
    with ExitStack() as stack:
        for words in (scheduler, worker):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "dask", *words],
                    cwd=place,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            stack.callback(process.terminate)
        yield address, place


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_workers_in_another_directory_give_the_same_through_a_store(
    project: Project, by_threads: dict[str, bytes], elsewhere: tuple[str, Path], tmp_path: Path
) -> None:
    address, place = elsewhere
    given = parameters(kind="dask", address=address, store=f"file://{tmp_path}/store")

    @flow(task_runner=thread_runner(), validate_parameters=False)
    @with_runner
    def mapped(given: Parameters) -> None:
        project.forget(MAPPED, project.files())
        for step in (statistics, targets, evaluation):
            step(given)

    mapped(given)
    assert project.results() == by_threads
    for step in ("statistics", "targets", "evaluation"):
        assert list((place / ".cache" / "pieces" / step).glob("*"))  # computed there
    assert any(path.is_file() for path in (tmp_path / "store").rglob("*"))
