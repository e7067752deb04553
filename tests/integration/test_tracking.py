"""MLflow only observes: a store that cannot be had costs seconds and no result."""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from memit.errors import UnreachableError
from tasks.engine import databases
from tasks.reporting import tracking
from tasks.reporting.tracking import Experiment, log_experiment

EXPERIMENT = Experiment(name="x", parameters={"a": 1}, manifests={}, timings={}, tags={})


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(databases, "LOCK_SECONDS", 0.2)
    return tmp_path


def refused(uri: str) -> str:
    """What is said of a store that does not take the run."""
    started = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        log_experiment(EXPERIMENT, uri)
    assert time.monotonic() - started < 60
    message = str(caught.value)
    assert "\n" not in message
    assert "results stand" in message
    return message


def test_a_store_that_is_no_file(project: Path) -> None:
    (project / "mlflow.db").mkdir()
    assert "unable to open" in refused(f"sqlite:///{project / 'mlflow.db'}")


def test_a_store_that_is_locked(project: Path) -> None:
    path = project / "mlflow.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as store:
        store.execute("create table t (x)")
        store.execute("begin exclusive")
        assert "locked" in refused(f"sqlite:///{path}")


def test_a_store_that_is_damaged(project: Path) -> None:
    path = project / "mlflow.db"
    path.write_bytes(b"no data base at all" * 100)
    assert "not a database" in refused(f"sqlite:///{path}")
    assert path.read_bytes() == b"no data base at all" * 100


def test_a_server_that_does_not_answer_and_its_password() -> None:
    said = refused("http://me:secret@127.0.0.1:9")
    assert "secret" not in said
    assert "http://***@127.0.0.1:9" in said


def logged(uri: str, digest: str) -> None:
    """One run with a file."""

    def log(client: MlflowClient, experiment: str) -> str:
        run = client.create_run(experiment, tags=tracking._known_by(digest, {})).info.run_id
        client.log_text(run, digest, "note.txt")
        return run

    tracking.open_store(uri)
    tracking._log_once(uri, "x", digest, log)


def notes(uri: str) -> list[str]:
    """What the runs of a store hold, as MLflow finds it."""
    client = MlflowClient(uri)
    runs = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()]
    )
    files = [client.download_artifacts(run.info.run_id, "note.txt") for run in runs]
    return sorted(Path(file).read_text() for file in files)


def files_of(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("outside", [False, True])
def test_a_moved_project_keeps_its_files_where_it_is(
    project: Path, monkeypatch: pytest.MonkeyPatch, outside: bool
) -> None:
    former, now = project / "a b", project / "ä#c"
    former.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(former))
    store = project if outside else former
    logged(f"sqlite:///{store / 'mlflow.db'}", "before")
    former.rename(now)
    monkeypatch.setenv("DVC_ROOT", str(now))
    uri = f"sqlite:///{(project if outside else now) / 'mlflow.db'}"
    logged(uri, "after")
    assert not former.exists()
    assert notes(uri) == ["after", "before"]


def test_a_copy_leaves_the_original_its_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, other = project / "original", project / "copy"
    original.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(original))
    logged(f"sqlite:///{original / 'mlflow.db'}", "first")
    shutil.copytree(original, other)
    before = files_of(original)
    monkeypatch.setenv("DVC_ROOT", str(other))
    uri = f"sqlite:///{other / 'mlflow.db'}"
    logged(uri, "second")
    assert files_of(original) == before
    assert notes(f"sqlite:///{original / 'mlflow.db'}") == ["first"]
    shutil.rmtree(original)
    assert notes(uri) == ["first", "second"]


def test_a_data_base_without_tables_becomes_a_store(project: Path) -> None:
    with closing(sqlite3.connect(project / "mlflow.db")) as base, base:
        base.execute("create table held (x)")
    uri = f"sqlite:///{project / 'mlflow.db'}"
    logged(uri, "first")
    assert notes(uri) == ["first"]


def test_projects_that_share_a_store_leave_each_other_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{project / 'mlflow.db'}"
    for name in ("one", "two"):
        (project / name).mkdir()
        monkeypatch.setenv("DVC_ROOT", str(project / name))
        logged(uri, name)
    assert notes(uri) == ["one", "two"]


def test_what_a_killed_process_left_is_deleted(project: Path) -> None:
    uri = f"sqlite:///{project / 'mlflow.db'}"

    def begin(client: MlflowClient, experiment: str, digest: str) -> str:
        return client.create_run(experiment, tags=tracking._known_by(digest, {})).info.run_id

    def die(client: MlflowClient, experiment: str) -> str:
        begin(client, experiment, "a")
        raise KeyboardInterrupt

    def finish(client: MlflowClient, experiment: str) -> str:
        run = begin(client, experiment, "b")
        client.set_terminated(run)
        return run

    tracking.open_store(uri)
    assert [path.name for path in project.iterdir()] == ["mlflow.db"]
    with pytest.raises(KeyboardInterrupt):
        tracking._log_once(uri, "x", "a", die)
    logged = tracking._log_once(uri, "x", "b", finish)
    assert tracking._log_once(uri, "x", "b", die) == logged
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        runs = store.execute("select status, lifecycle_stage from runs order by status").fetchall()
    assert runs == [("FINISHED", "active"), ("KILLED", "deleted")]


def test_an_experiment_is_known_by_what_it_is() -> None:
    same = Experiment(name="y", parameters={"a": 1}, manifests={}, timings={}, tags={"t": "1"})
    other = Experiment(name="x", parameters={"a": 2}, manifests={}, timings={}, tags={})
    told = Experiment(name="x", parameters={"a": 1, "report": 3}, manifests={}, timings={}, tags={})
    assert EXPERIMENT.digest == same.digest == told.digest != other.digest
