"""MLflow only observes: an unavailable store costs seconds and no result."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from memit.errors import UnreachableError
from tasks.engine import databases
from tasks.reporting.tracking import Experiment, ParentRun, log_run

EXPERIMENT = Experiment(experiment="x", parameters={"a": 1}, manifests={}, timings={}, tags={})


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(databases, "LOCK_SECONDS", 0.2)
    return enter(tmp_path, monkeypatch)


def enter(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory.mkdir(exist_ok=True)
    monkeypatch.setenv("DVC_ROOT", str(directory))
    return directory


def store(directory: Path) -> str:
    return f"sqlite:///{directory / 'mlflow.db'}"


def refused(uri: str) -> str:
    """The error of a store that does not take the run."""
    started = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        log_run(EXPERIMENT, uri)
    assert time.monotonic() - started < 60
    assert "\n" not in str(caught.value)
    return str(caught.value)


def is_a_directory(path: Path) -> None:
    path.mkdir()


def is_damaged(path: Path) -> None:
    path.write_bytes(b"no database at all" * 100)


@pytest.mark.parametrize("spoil", [is_a_directory, is_damaged])
def test_an_unusable_store_is_named_and_kept(project: Path, spoil: Callable[[Path], None]) -> None:
    path = project / "mlflow.db"
    spoil(path)
    before = path.stat()
    assert str(path) in refused(store(project))
    assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, before.st_size)


def test_a_store_that_is_locked(project: Path) -> None:
    with closing(sqlite3.connect(project / "mlflow.db", isolation_level=None)) as base:
        base.execute("create table t (x)")
        base.execute("begin exclusive")
        assert "locked" in refused(store(project))


def test_a_server_that_does_not_answer_and_its_password() -> None:
    message = refused("http://me:secret@127.0.0.1:9")
    assert "secret" not in message
    assert "http://***@127.0.0.1:9" in message


def logged(uri: str, note: str, directory: Path) -> str:
    """A parent run with a file and a nested run."""
    path = directory / "note.txt"
    path.write_text(note)
    run = ParentRun(
        experiment="x",
        step="compare",
        digest=note,
        parameters={"a": {"b": 1}},
        tags={},
        files=[path],
        methods={"memit": [("score", 1.0, 10), ("score", 2.0, 20)]},
    )
    return log_run(run, uri)


def notes(uri: str) -> list[str]:
    """The files of the parent runs of a store, as MLflow finds them."""
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    parents = [r for r in client.search_runs(experiments) if "memit.writer" in r.data.tags]
    listed = [(run.info.run_id, client.list_artifacts(run.info.run_id)[0].path) for run in parents]
    files = [client.download_artifacts(run, f"{folder}/note.txt") for run, folder in listed]
    return sorted(Path(file).read_text() for file in files)


def test_the_same_results_are_logged_once_with_a_nested_run_per_method(project: Path) -> None:
    parent = logged(store(project), "first", project)
    assert logged(store(project), "first", project) == parent
    client = MlflowClient(store(project))
    nested = f"tags.`mlflow.parentRunId` = '{parent}'"
    (child,) = client.search_runs([client.get_run(parent).info.experiment_id], nested)
    history = client.get_metric_history(child.info.run_id, "score")
    assert [(each.step, each.value) for each in history] == [(10, 1.0), (20, 2.0)]
    assert client.get_run(parent).data.params == {"a.b": "1"}
    assert {client.get_run(parent).info.status, child.info.status} == {"FINISHED"}


@pytest.mark.parametrize("outside", [False, True])
def test_a_moved_project_keeps_its_files(
    project: Path, monkeypatch: pytest.MonkeyPatch, outside: bool
) -> None:
    former = enter(project / "a b", monkeypatch)
    logged(store(project if outside else former), "before", project)
    current = enter(former.rename(project / "ä#c"), monkeypatch)
    uri = store(project if outside else current)
    logged(uri, "after", project)
    assert not former.exists()
    assert notes(uri) == ["after", "before"]


def test_a_copy_does_not_change_the_original(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, copy = enter(project / "original", monkeypatch), project / "copy"
    logged(store(original), "first", project)
    shutil.copytree(original, copy)
    before = {path for path in original.rglob("*") if path.is_file()}
    enter(copy, monkeypatch)
    logged(store(copy), "second", project)
    assert {path for path in original.rglob("*") if path.is_file()} == before
    assert notes(store(original)) == ["first"]
    shutil.rmtree(original)
    assert notes(store(copy)) == ["first", "second"]


def test_a_database_without_tables_becomes_a_store(project: Path) -> None:
    with closing(sqlite3.connect(project / "mlflow.db")) as base, base:
        base.execute("create table held (x)")
    logged(store(project), "first", project)
    assert notes(store(project)) == ["first"]


def test_projects_that_share_a_store_keep_their_own_files(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        enter(project / name, monkeypatch)
        logged(store(project), name, project)
    assert notes(store(project)) == ["one", "two"]


def test_runs_of_killed_processes_are_replaced(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", killed)
        with pytest.raises(KeyboardInterrupt):
            logged(store(project), "first", project)
    logged(store(project), "second", project)
    with closing(sqlite3.connect(project / "mlflow.db")) as base:
        runs = base.execute("select status, lifecycle_stage from runs").fetchall()
    assert sorted(runs) == [("FINISHED", "active"), ("FINISHED", "active"), ("KILLED", "deleted")]


def killed(*given: object) -> None:
    raise KeyboardInterrupt


def test_an_experiment_is_identified_by_parameters_and_results() -> None:
    same = replace(EXPERIMENT, experiment="y", tags={"t": "1"}, parameters={"a": 1, "report": 3})
    assert EXPERIMENT.digest == same.digest
    assert EXPERIMENT.digest != replace(EXPERIMENT, parameters={"a": 2}).digest
