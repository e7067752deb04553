"""MLflow only observes: an unavailable store costs seconds and no result."""

import json
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from memit.errors import UnreachableError
from tasks.reporting.tracking import Experiment, ParentRun, log_run, runs_page
from tests.acceptance.project import empty_store

NAME = "../../x"
"""An experiment named like a path, which its artifacts must not follow."""
EXPERIMENT = Experiment(experiment=NAME, parameters={"a": 1}, manifests={}, timings={}, tags={})


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def enter(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory.mkdir(exist_ok=True)
    monkeypatch.setenv("DVC_ROOT", str(directory))
    return directory


def uri(directory: Path) -> str:
    return f"sqlite:///{directory / 'mlflow.db'}"


def refused(store: str) -> str:
    """The error of a store that does not take the run."""
    started = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        log_run(EXPERIMENT, store)
    assert time.monotonic() - started < 60
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_damaged_store_is_kept(project: Path) -> None:
    path = project / "mlflow.db"
    path.write_bytes(b"no database at all" * 100)
    assert "mlflow.db" in refused(uri(project))
    assert path.read_bytes() == b"no database at all" * 100


def test_a_server_that_does_not_answer_and_its_password() -> None:
    message = refused("http://me:secret@127.0.0.1:9")
    assert "secret" not in message
    assert "http://***@127.0.0.1:9" in message


Log = Callable[[Path, str], str]


@pytest.fixture
def log(project: Path) -> Log:
    """Log a parent run with a file and a nested run to the store in a directory."""

    def log_note(directory: Path, note: str) -> str:
        if not (directory / "mlflow.db").exists():
            shutil.copy(empty_store(), directory)
        (project / "note.txt").write_text(note)
        metrics = [("score", 1.0, 10), ("score", 2.0, 20)]
        files, methods = [project / "note.txt"], {"memit": metrics}
        run = ParentRun(NAME, "compare", note, {"a": {"b": 1}}, {}, files, methods)
        return log_run(run, uri(directory))

    return log_note


def test_a_store_is_made_whole() -> None:
    assert [path.name for path in empty_store().parent.iterdir()] == ["mlflow.db"]


def notes(directory: Path) -> list[str]:
    """The files of the parent runs in a store, as MLflow finds them."""
    client = MlflowClient(uri(directory))
    (experiment,) = client.search_experiments(filter_string=f"name = '{NAME}'")
    runs = client.search_runs([experiment.experiment_id], "params.`a.b` = '1'")
    folders = [client.list_artifacts(run.info.run_id)[0].path for run in runs]
    files = [
        client.download_artifacts(run.info.run_id, f"{folder}/note.txt")
        for run, folder in zip(runs, folders, strict=True)
    ]
    return sorted(Path(file).read_text() for file in files)


def test_the_same_results_are_logged_once_with_a_nested_run_per_method(
    project: Path, log: Log
) -> None:
    parent = log(project, "first")
    assert log(project, "first") == parent
    client = MlflowClient(uri(project))
    nested = f"tags.`mlflow.parentRunId` = '{parent}'"
    experiment = client.get_experiment(client.get_run(parent).info.experiment_id)
    place = experiment.artifact_location.removeprefix(f"{project.as_uri()}/mlartifacts/")
    assert re.fullmatch("[0-9a-f]{12}", place)
    (child,) = client.search_runs([experiment.experiment_id], nested)
    history = client.get_metric_history(child.info.run_id, "score")
    assert [(each.step, each.value) for each in history] == [(10, 1.0), (20, 2.0)]
    assert {client.get_run(parent).info.status, child.info.status} == {"FINISHED"}


def test_the_runs_open_in_a_saved_view_that_begins_with_the_score(project: Path, log: Log) -> None:
    assert runs_page(uri(project), NAME) == ""
    log(project, "first")
    experiment = MlflowClient(uri(project)).get_experiment_by_name(NAME)
    assert experiment is not None
    view = runs_page(uri(project), NAME).rpartition("viewStateShareKey=")[2]
    saved = json.loads(experiment.tags[f"mlflow.sharedViewState.{view}"])
    assert (saved["name"], type(saved["createdAt"])) == (view, int)  # else it is not listed
    state = json.loads(saved["state"])
    assert state["selectedColumns"] == state["columnOrder"]
    assert state["columnOrder"][0] == "metrics.`score`"


@pytest.mark.parametrize("outside", [False, True])
def test_a_moved_project_keeps_its_files(
    project: Path, log: Log, monkeypatch: pytest.MonkeyPatch, outside: bool
) -> None:
    former = enter(project / "a b", monkeypatch)
    log(project if outside else former, "before")
    current = enter(former.rename(project / "ä#c"), monkeypatch)
    store = project if outside else current
    log(store, "after")
    assert not former.exists()
    assert notes(store) == ["after", "before"]


def test_a_copy_does_not_change_the_original(
    project: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, copy = enter(project / "original", monkeypatch), project / "copy"
    log(original, "first")
    shutil.copytree(original, copy)
    before = sorted(original.rglob("*"))
    enter(copy, monkeypatch)
    log(copy, "second")
    assert sorted(original.rglob("*")) == before
    assert notes(original) == ["first"]
    shutil.rmtree(original)
    assert notes(copy) == ["first", "second"]


def test_projects_that_share_a_store_keep_their_own_files(
    project: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        enter(project / name, monkeypatch)
        log(project, name)
    assert notes(project) == ["one", "two"]


def test_runs_of_killed_processes_are_replaced(
    project: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", killed)
        with pytest.raises(KeyboardInterrupt):
            log(project, "first")
    log(project, "second")
    with closing(sqlite3.connect(project / "mlflow.db")) as base:
        runs = base.execute("select status, lifecycle_stage from runs").fetchall()
    assert sorted(runs) == [("FINISHED", "active"), ("FINISHED", "active"), ("KILLED", "deleted")]


def test_an_experiment_is_identified_by_parameters_and_results() -> None:
    same = replace(EXPERIMENT, experiment="y", tags={"t": "1"}, parameters={"a": 1, "report": 3})
    assert EXPERIMENT.digest == same.digest
    assert EXPERIMENT.digest != replace(EXPERIMENT, parameters={"a": 2}).digest


@pytest.fixture
def server(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The address of an MLflow server that keeps artifacts itself."""
    from mlflow.server import app, constants, handlers  # it takes a second
    from werkzeug.serving import make_server

    place = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store(), place)
    monkeypatch.setenv(constants.BACKEND_STORE_URI_ENV_VAR, uri(place))
    monkeypatch.setenv(constants.ARTIFACT_ROOT_ENV_VAR, "mlflow-artifacts:/")
    monkeypatch.setenv(constants.ARTIFACTS_DESTINATION_ENV_VAR, str(place / "artifacts"))
    monkeypatch.setenv(constants.SERVE_ARTIFACTS_ENV_VAR, "true")
    for name in ("_tracking_store", "_model_registry_store", "_artifact_repo"):
        monkeypatch.setattr(handlers, name, None)
    listening = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.port}"
    listening.shutdown()
    thread.join()


def test_a_server_keeps_the_files_of_runs(project: Path, server: str) -> None:
    note = project / "note.txt"
    note.write_text("first")
    run = log_run(ParentRun("x", "compare", "digest", {}, {}, [note], {}), server)
    client = MlflowClient(server)
    assert str(client.get_run(run).info.artifact_uri).startswith("mlflow-artifacts:")
    (folder,) = client.list_artifacts(run)
    (file,) = client.list_artifacts(run, folder.path)
    assert file.file_size == len("first")
    assert not (project / "mlartifacts").exists()
