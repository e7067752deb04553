"""MLflow tracking: one run per experiment, and one with nested runs per comparison.

A run is tagged with the digest of its parameters and results. Results that are logged already are
not logged again, and a run that a killed process left unfinished is replaced. Tracking never
changes a result: without the store the results are kept, and the next report logs them.
"""

import hashlib
import json
import logging
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
import yaml
from filelock import FileLock
from mlflow import MlflowClient, entities
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from mlflow.utils.uri import is_http_uri
from sqlalchemy.exc import SQLAlchemyError

from memit.errors import ResourceError, UnreachableError
from memit.files.atomic import write_whole
from memit.files.digests import content_digest
from memit.redaction import redacted
from tasks.engine import results
from tasks.engine.artifacts import cache_directory, project_root
from tasks.engine.cost import Cost
from tasks.engine.databases import LOCK_SECONDS, check_database
from tasks.engine.git import commit_of, git
from tasks.engine.loaded_model import ModelFiles
from tasks.reporting.formats import ROWS, STRICT, read_json
from tasks.reporting.labels import editor_label

DIGEST_TAG = "memit.experiment"
WRITER_TAG = "memit.writer"
LIMITS_TAG = "memit.limits"
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Lets MLflow's pages begin with the runs, not with traces of chat models."""
VIEW = "memit"
"""The view of the runs that `memit ui` opens, and MLflow's pages list under Views."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
COLUMNS = ("score", "efficacy", "paraphrase", "neighborhood", "neighborhood_accuracy")
"""The metrics that it shows, in this order, before those of own facts and of text."""
LARGEST_DELTA = 100 << 20
"""Bytes of an edit that is logged as a file; a larger one stays with DVC."""
LONGEST = 6_000
"""MLflow's limit on the characters of a parameter, and less than that of a note."""
LOGGED_FILES = (
    *results.FIGURES,
    results.TABLE_FILE,
    results.PAGE_FILE,
    results.PROMPTS_FILE,
    results.FACTS_FILE,
    results.KEPT_FILE,
    results.ANSWERS_FILE,
    results.GENERATED_FILE,
    results.METRICS_FILE,
    results.DETAILS_FILE,
    results.TIMINGS_FILE,
    results.EDIT_FILE,
    results.PREFIXES_FILE,
    results.STATISTICS_FILE,
)
CODE = ("memit", "tasks", "flows", "methods", "constraints.txt")
MIGRATIONS = Path(str(mlflow.__file__)).parent / "store/db_migrations/versions"
STORE_ERRORS = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ResourceError)


@dataclass(frozen=True)
class Experiment:
    """The run of an experiment."""

    experiment: str
    """The name of the MLflow experiment."""
    parameters: Mapping[str, Any]
    """The validated parameters of `params.yaml`."""
    manifests: Mapping[str, results.Manifest]
    """The results of each step."""
    timings: Mapping[str, Cost]
    tags: Mapping[str, str]
    beyond: Sequence[str] = ()
    """Which limits the results are beyond; if any, the run is marked and not registered."""
    step = "report"

    @property
    def digest(self) -> str:
        """SHA-256 over parameters and results; equal for a repetition."""
        content = {
            "parameters": {k: v for k, v in self.parameters.items() if k != "report"},
            "results": {step: manifest.digest for step, manifest in self.manifests.items()},
        }
        return content_digest(content)

    def log(self, client: MlflowClient, experiment_id: str, run_id: str) -> None:
        """Log parameters, metrics, files, and the edited model."""
        metrics = read_json(results.METRICS_FILE)
        model = ModelFiles.model_validate(read_json(results.MODEL_FILE))
        editor = editor_label(read_json(results.EDIT_FILE))
        name = f"{metrics['edit']['count']} edits by {editor}, {model.id.split('/')[-1]}"
        client.update_run(run_id, name=f"{name} ({self.digest[:6]})")
        table = results.TABLE_FILE.read_text(encoding="utf-8")
        client.set_tag(run_id, MLFLOW_RUN_NOTE, table[:LONGEST])
        points = _points(metrics, self.timings)
        client.log_batch(run_id, _metrics(points), _parameters(self.parameters))
        for path in LOGGED_FILES:
            client.log_artifact(run_id, str(path), path.parent.name)
        if results.DELTA_FILE.stat().st_size <= LARGEST_DELTA:
            client.log_artifact(run_id, str(results.DELTA_FILE), results.DELTA_FILE.parent.name)
        files = {**self.manifests["requests"].files, **self.manifests["edit"].files}
        edited = mlflow.create_external_model(  # the weights stay with DVC
            name=f"edited-{self.digest[:6]}",
            source_run_id=run_id,
            tags={"base.id": model.id, "base.sha256": model.digest, **files},
            params={key: str(metrics["edit"][key]) for key in ("count", "layers")},
            model_type="edited",
            experiment_id=experiment_id,
        )
        client.log_outputs(run_id, [entities.LoggedModelOutput(edited.model_id, 0)])
        self.mark(client, experiment_id, run_id)

    def mark(self, client: MlflowClient, experiment_id: str, run_id: str) -> None:
        """Say which limits a logged run is beyond; it has a version in the registry if none."""
        client.set_tag(run_id, LIMITS_TAG, "; ".join(self.beyond) or "kept")
        versions = client.search_model_versions(f"run_id = '{run_id}'")
        for version in versions if self.beyond else ():
            client.delete_model_version(version.name, version.version)
        if not self.beyond and not versions:
            of_run = f"source_run_id = '{run_id}'"
            for edited in client.search_logged_models([experiment_id], of_run):
                _register(client, run_id, edited)


@dataclass(frozen=True)
class ParentRun:
    """The run of a comparison, with one nested run per method."""

    experiment: str
    """The name of the MLflow experiment."""
    step: str
    """The step that made the results."""
    digest: str
    """Of the step's results; equal for a repetition."""
    parameters: Mapping[str, Any]
    tags: Mapping[str, str]
    files: Sequence[Path]
    methods: Mapping[str, Sequence[tuple[str, float, int]]]
    """Metric, value and step (number of edits) of each method."""

    def log(self, client: MlflowClient, experiment_id: str, run_id: str) -> None:
        """Log parameters and files, and each method's metrics to its nested run."""
        client.update_run(run_id, name=f"{self.step}-{self.digest[:6]}")
        client.log_batch(run_id, params=_parameters(self.parameters))
        for path in self.files:
            client.log_artifact(run_id, str(path), path.parent.name)
        for method, points in self.methods.items():
            tags = {**self.tags, MLFLOW_PARENT_RUN_ID: run_id}
            child = client.create_run(experiment_id, tags=tags, run_name=method).info.run_id
            client.log_batch(child, _metrics(points), [entities.Param("method", method)])
            client.set_terminated(child, "FINISHED")


def log_run(run: Experiment | ParentRun, uri: str) -> str:
    """Log a run unless its results are logged already, and return its id.

    Unfinished runs of this project are deleted first: their processes were killed.

    Raises:
        UnreachableError: the store cannot be reached or does not take the run.
    """
    with store_errors_as_unreachable(uri, run.step), store_lock():
        open_store(uri)
        mlflow.set_tracking_uri(uri)
        client = MlflowClient()
        experiment_id = _experiment_id(client, run.experiment)
        writer = _sha256(f"{socket.gethostname()}:{project_root()}")[:32]
        unfinished = f"tags.`{WRITER_TAG}` = '{writer}' and attributes.status = 'RUNNING'"
        same = f"tags.`{DIGEST_TAG}` = '{run.digest}'"
        for condition in (unfinished, same):
            for known in client.search_runs([experiment_id], condition):
                if known.info.status == "FINISHED":
                    if isinstance(run, Experiment):  # under other limits, perhaps
                        run.mark(client, experiment_id, known.info.run_id)
                    return known.info.run_id
                _delete_run(client, experiment_id, known.info.run_id)
        tags = {**run.tags, DIGEST_TAG: run.digest, WRITER_TAG: writer}
        run_id = client.create_run(experiment_id, tags=tags).info.run_id
        run.log(client, experiment_id, run_id)
        client.set_terminated(run_id, "FINISHED")
        return run_id


def store_lock() -> FileLock:
    """Two processes, also of experiments that DVC runs elsewhere, must not both find no store or
    no run."""
    return FileLock(cache_directory() / "mlflow.lock")


def tracking_uri(setting: str | None) -> str:
    """The store: as set, as in the environment, or `mlflow.db` in the project."""
    default = f"sqlite:///{project_root() / 'mlflow.db'}"
    return setting or os.environ.get("MLFLOW_TRACKING_URI") or default


def open_store(uri: str) -> None:
    """Create an SQLite store, or check an existing one and update its paths to this project.

    Raises:
        ResourceError: it cannot be created or used.
    """
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///"))
    if path.exists() and path.stat().st_size:
        check_database(path, "MLflow", MIGRATIONS)
        _update_artifact_paths(path)
        return
    artifacts = (project_root() / "mlartifacts").as_uri()
    # Atomic, since MLflow cannot open a database that was only half created.
    write_whole(path, lambda part: SqlAlchemyStore(f"sqlite:///{part}", artifacts).engine.dispose())


def _update_artifact_paths(database: Path) -> None:
    """Update MLflow's absolute artifact paths if this project was moved or copied.

    A store outside the project may be shared with others, whose paths exist and are kept.
    """
    shared = database.resolve().parent != project_root()
    experiments = {"experiments": "artifact_location"}
    columns = {**experiments, "runs": "artifact_uri", "logged_models": "artifact_location"}
    with closing(sqlite3.connect(database, timeout=LOCK_SECONDS)) as store, store:
        if not store.execute("select 1 from sqlite_master where name = 'experiments'").fetchone():
            return  # an empty database, which MLflow fills
        known = store.execute("select experiment_id, name, artifact_location from experiments")
        for number, name, location in known.fetchall():
            former, current = Path(unquote(urlsplit(location).path)), _artifact_directory(name)
            is_ours = former.parts[-2:] == current.parts[-2:] and former != current
            if not is_ours or (shared and former.exists()):
                continue
            # Without the artifacts themselves only new runs are redirected.
            for table, column in (columns if current.is_dir() else experiments).items():
                change = f"update {table} set {column} = replace({column}, ?, ?)"
                values = (location, current.as_uri(), number)
                store.execute(f"{change} where experiment_id = ?", values)


def _artifact_directory(name: str) -> Path:
    """An experiment's artifacts. Its name is user input and never becomes part of a path."""
    return project_root() / "mlartifacts" / _sha256(name)[:12]


@contextmanager
def store_errors_as_unreachable(uri: str, step: str) -> Iterator[None]:
    """Turn any failure of the store into UnreachableError with the command to run again."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the log of the store's migrations
    try:
        yield
    except STORE_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UnreachableError(
            f"MLflow at {redacted(uri)} did not take the run ({redacted(reason)}); the results "
            f"are kept, and the next `python -m flows {step}` logs them."
        ) from error
    finally:
        logging.disable(disabled)


def _experiment_id(client: MlflowClient, name: str) -> str:
    known = client.get_experiment_by_name(name)
    if known is None:
        # A server has its own place for artifacts; what it is told, its clients would write to.
        is_ours = not is_http_uri(client.tracking_uri)
        place = _artifact_directory(name).as_uri() if is_ours else None
        number = client.create_experiment(name, artifact_location=place, tags=KIND)
    else:
        number = known.experiment_id
        if known.lifecycle_stage == "deleted":
            client.restore_experiment(number)
    columns = [f"metrics.`{column}`" for column in (*COLUMNS, "kept", "perplexity")]
    state = json.dumps({"selectedColumns": columns, "columnOrder": columns})
    saved = {"name": VIEW, "createdAt": 0, "state": state}
    client.set_experiment_tag(number, VIEW_TAG, json.dumps(saved))
    return number


def runs_page(uri: str, name: str) -> str:
    """Where MLflow's pages show an experiment's runs with `COLUMNS`; empty before its first run."""
    known = MlflowClient(uri).get_experiment_by_name(name)
    if known is None or VIEW_TAG not in known.tags:
        return ""
    query = f"workflowType=machine_learning&viewStateShareKey={VIEW}"  # not that of chat models
    return f"/#/experiments/{known.experiment_id}/runs?{query}"


def _delete_run(client: MlflowClient, experiment_id: str, run_id: str) -> None:
    """Delete a run with its nested runs and logged models."""
    nested = client.search_runs([experiment_id], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'")
    for each in (*(run.info.run_id for run in nested), run_id):
        client.set_terminated(each, "KILLED")  # a deleted run can be restored
        client.delete_run(each)
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        client.delete_model_version(version.name, version.version)
    for model in client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'"):
        client.delete_logged_model(model.model_id)


def _register(client: MlflowClient, run_id: str, edited: entities.LoggedModel) -> None:
    """Add a version to MLflow's registry, with the tags of the logged model: its base, and the
    files of the edit, which DVC owns."""
    name = f"{edited.tags['base.id'].split('/')[-1]}-edited"
    with suppress(MlflowException):  # it is registered already
        client.create_registered_model(name)
    own = {key: value for key, value in edited.tags.items() if not key.startswith("mlflow.")}
    client.create_model_version(
        name, f"models:/{edited.model_id}", run_id, tags=own, model_id=edited.model_id
    )


def _points(
    metrics: Mapping[str, Any], timings: Mapping[str, Cost]
) -> list[tuple[str, float, int]]:
    """Name, value and step of the dozen numbers by which runs are compared; all of them are in
    `metrics.json`, which is logged as a file."""
    after = metrics["after"]
    names = [each for name, *_ in ROWS for each in (name, name + STRICT)]
    values = {name: after[name] for name in names if name in after}
    if "perplexity" in after:
        values["perplexity_before"] = metrics["before"]["perplexity"]
    values["seconds"] = round(sum(cost.seconds for cost in timings.values()), 1)
    return [(name, value, 0) for name, value in values.items()]


def _metrics(points: Iterable[tuple[str, float, int]]) -> list[entities.Metric]:
    now = int(time.time() * 1000)
    return [entities.Metric(name, float(value), now, step) for name, value, step in points]


def _parameters(tree: Mapping[str, Any], prefix: str = "") -> list[entities.Param]:
    """Parameters as MLflow takes them: flat, of limited length, and without secrets."""
    params = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            params += _parameters(value, f"{prefix}{name}.")
        else:
            params.append(entities.Param(f"{prefix}{name}", redacted(str(value))[:LONGEST]))
    return params


def origin_tags(flow_runs: Mapping[str, str]) -> dict[str, str]:
    """Provenance of an experiment: git commit, `dvc.lock`, DVC experiment, Prefect flow runs."""
    tags = {
        # ends in -dirty if tracked files were changed
        "git.commit": git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"),
        "dvc.lock": _lock_digest(Path("dvc.lock")),
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        **{f"prefect.{step}": run for step, run in flow_runs.items()},
    }
    return {name: value for name, value in tags.items() if value}


def code_commit() -> str:
    """The last commit that changed the code, so that commits of results leave it as it is; empty
    outside of a git repository."""
    return commit_of(*CODE)


def _lock_digest(path: Path) -> str:
    """SHA-256 of `dvc.lock` without the stage `report`, which is locked after it has run."""
    try:
        lock = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return ""
    stages = {name: stage for name, stage in lock.get("stages", {}).items() if name != "report"}
    return content_digest(stages)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
