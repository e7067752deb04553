"""One MLflow run for each experiment, made from the files that the steps left.

The run is found by the experiment's digest, so logging twice makes no second one, and a run that a
killed process left half-written is replaced. Nothing here changes a result: when the store cannot
be reached the results stand, and the next report logs them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from memit.errors import ResourceError, UnreachableError
from memit.files.atomic import write_whole
from memit.redaction import redacted
from tasks.engine.artifacts import project_root
from tasks.engine.cost import Cost
from tasks.engine.databases import LOCK_SECONDS, check_database
from tasks.engine.loaded_model import ModelFiles
from tasks.engine.locks import FileLocks
from tasks.engine.results import (
    DELTA_FILE,
    EDIT_FILE,
    EDITED_WEIGHTS_FILE,
    FACTS_FILE,
    METRICS_FILE,
    MODEL_FILE,
    PREFIXES_FILE,
    PROMPTS_FILE,
    REPORT_FILES,
    REQUESTS_FILE,
    STATISTICS_FILE,
    TARGETS_FILE,
    TIMINGS_FILE,
    Manifest,
)
from tasks.report import read_json, read_losses
from tasks.reporting import figures

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Param

DIGEST_TAG = "memit.experiment"
WRITER_TAG = "memit.writer"
LONGEST = 6_000
"""Characters of a parameter, the most that MLflow takes."""


@dataclass(frozen=True)
class Experiment:
    """What one run is about."""

    name: str
    """Of the MLflow experiment."""
    parameters: Mapping[str, Any]
    """``params.yaml``, as it was checked."""
    manifests: Mapping[str, Manifest]
    """What each step made."""
    timings: Mapping[str, Cost]
    tags: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 over parameters and results; equal for a repetition."""
        content = {
            "parameters": {k: v for k, v in self.parameters.items() if k != "report"},
            "results": {step: manifest.digest for step, manifest in self.manifests.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tracking_uri(setting: str | None) -> str:
    """Where runs are kept: as set, as in the environment, or ``mlflow.db`` in the project."""
    default = f"sqlite:///{project_root() / 'mlflow.db'}"
    return setting or os.environ.get("MLFLOW_TRACKING_URI") or default


def log_experiment(experiment: Experiment, uri: str) -> str:
    """Log an experiment unless it is logged already; gives the id of its run.

    Raises:
        UnreachableError: the store cannot be reached or does not take the run.
    """
    with _taking(uri, "python -m flows.report"):
        log = partial(_log_run, experiment)
        return _log_once(uri, experiment.name, experiment.digest, log)


@contextmanager
def _taking(uri: str, command: str) -> Iterator[None]:
    """Whatever goes wrong at the store is one error, which names what to run again."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    refusals = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ResourceError)
    locks, holder = FileLocks(), f"report-{os.getpid()}"
    with ExitStack() as stack:
        # Two processes, also of experiments that DVC runs elsewhere, must not both find no run.
        locks.acquire_lock("report", holder)
        stack.callback(locks.release_lock, "report", holder)
        # The store's migration log stays out of the terminal.
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        try:
            open_store(uri)
            yield
        except refusals as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UnreachableError(
                f"MLflow at {uri} did not take the run ({reason}); the "
                f"results stand, and the next `{command}` logs them."
            ) from error


def open_store(uri: str) -> None:
    """Make a store that is a file, or see that it can be used and names this project's place.

    Raises:
        ResourceError: it cannot be made or used.
    """
    import mlflow
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///"):
        return
    if path.exists() and path.stat().st_size:
        schemas = Path(mlflow.__file__).parent / "store/db_migrations/versions"
        check_database(path, "MLflow", schemas)
        _follow(path)
        return
    place = (project_root() / "mlartifacts").as_uri()
    # Whole or not at all: half a data base could never be opened.
    write_whole(path, lambda part: SqlAlchemyStore(f"sqlite:///{part}", place).engine.dispose())


def _follow(path: Path) -> None:
    """Note where the files of a project are that was moved or copied: MLflow keeps absolute places.

    In a store outside of this project others have theirs, too: a place stays while it exists.
    """
    shared = path.resolve().parent != project_root()
    first = ("experiments", "artifact_location")
    rest = (("runs", "artifact_uri"), ("logged_models", "artifact_location"))
    with closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as store, store:
        tables = {name for (name,) in store.execute("select name from sqlite_master")}
        if not tables.issuperset(table for table, _ in (first, *rest)):
            return  # MLflow makes them
        known = store.execute("select experiment_id, name, artifact_location from experiments")
        for number, name, former in known.fetchall():
            now, place = _artifacts(name), Path(unquote(urlsplit(former).path))
            ours = former.startswith("file:") and place.parts[-2:] == now.parts[-2:]
            if not ours or place == now or (shared and place.exists()):
                continue
            for table, column in (first, *(rest if now.is_dir() else ())):
                change = f"update {table} set {column} = replace({column}, ?, ?)"
                store.execute(f"{change} where experiment_id = ?", (former, now.as_uri(), number))


def _artifacts(name: str) -> Path:
    """Where an experiment's files lie. Its name is a user's text and never becomes a path."""
    return project_root() / "mlartifacts" / hashlib.sha256(name.encode()).hexdigest()[:12]


def _log_once(uri: str, name: str, digest: str, log: Callable[[MlflowClient, str], str]) -> str:
    """The id of the finished run with this digest, logged if there is none.

    Runs that killed processes of this project left unfinished are deleted.
    """
    import mlflow
    from mlflow import MlflowClient

    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    experiment_id = _experiment_id(client, name)
    unfinished = f"tags.`{WRITER_TAG}` = '{_writer()}' and attributes.status = 'RUNNING'"
    same = f"tags.`{DIGEST_TAG}` = '{digest}'"
    for condition in (unfinished, same):
        for run in client.search_runs([experiment_id], condition, max_results=1_000):
            if run.info.status == "FINISHED":
                return run.info.run_id
            _delete_family(client, experiment_id, run.info.run_id)
    return log(client, experiment_id)


def _writer() -> str:
    """This project on this machine: whoever logs for it holds its lock, see `_taking`."""
    place = f"{socket.gethostname()}:{project_root()}"
    return hashlib.sha256(place.encode()).hexdigest()[:32]


def _delete_family(client: MlflowClient, experiment_id: str, run_id: str) -> None:
    """Delete a run, those nested in it, and the models that it logged."""
    nested = f"tags.`mlflow.parentRunId` = '{run_id}'"
    children = client.search_runs([experiment_id], nested, max_results=1_000)
    for run in (*(child.info.run_id for child in children), run_id):
        client.set_terminated(run, "KILLED")  # a deleted run could be restored
        client.delete_run(run)
    logged = f"source_run_id = '{run_id}'"
    for model in client.search_logged_models([experiment_id], logged):
        client.delete_logged_model(model.model_id)


def _experiment_id(client: MlflowClient, name: str) -> str:
    known = client.get_experiment_by_name(name)
    if known is not None:
        if known.lifecycle_stage == "deleted":
            client.restore_experiment(known.experiment_id)
        return known.experiment_id
    return client.create_experiment(name, artifact_location=_artifacts(name).as_uri())


def _log_run(experiment: Experiment, client: MlflowClient, experiment_id: str) -> str:
    from mlflow.entities import LoggedModelInput, LoggedModelOutput

    metrics = read_json(METRICS_FILE)
    model = ModelFiles.model_validate(read_json(MODEL_FILE))
    name = f"{model.id.split('/')[-1]}-{metrics['edit']['count']}-{experiment.digest[:6]}"
    run = client.create_run(
        experiment_id, tags=_known_by(experiment.digest, experiment.tags), run_name=name
    )
    run_id = run.info.run_id
    points = _points(metrics, experiment.timings)
    client.log_batch(run_id, points, _parameters(experiment.parameters))
    _log_files(client, run_id)
    base = _base_model(experiment_id, model)
    edited = _edited_model(experiment_id, run_id, experiment, metrics)
    client.log_inputs(run_id, datasets=_datasets(), models=[LoggedModelInput(base)])
    client.log_outputs(run_id, [LoggedModelOutput(edited, 0)])
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _known_by(digest: str, tags: Mapping[str, str]) -> dict[str, str]:
    """Tags of a run that may be found again, finished or not."""
    return {**tags, DIGEST_TAG: digest, WRITER_TAG: _writer()}


@dataclass(frozen=True)
class Family:
    """A run with one nested run for each method."""

    experiment: str
    """The name of the MLflow experiment."""
    step: str
    """The step that made the results."""
    digest: str
    """Of the step's parameters and results; equal for a repetition."""
    parameters: Mapping[str, Any]
    tags: Mapping[str, str]
    files: Sequence[Path]
    """What the parent holds."""
    methods: Mapping[str, Sequence[tuple[str, float, int]]]
    """Metric, value and step (number of edits) of each method."""


def log_family(family: Family, uri: str) -> str:
    """Log a parent run and its nested ones unless they are there; gives the parent's id.

    Raises:
        UnreachableError: the store cannot be reached or does not take the runs.
    """
    with _taking(uri, f"python -m flows.{family.step}"):
        return _log_once(uri, family.experiment, family.digest, partial(_log_family, family))


def _log_family(family: Family, client: MlflowClient, experiment_id: str) -> str:
    from mlflow.entities import Metric, Param
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    parent = client.create_run(
        experiment_id,
        tags=_known_by(family.digest, family.tags),
        run_name=f"{family.step}-{family.digest[:6]}",
    ).info.run_id
    client.log_batch(parent, params=_parameters(family.parameters))
    for path in family.files:
        client.log_artifact(parent, str(path), path.parent.name)
    now = int(time.time() * 1000)
    for method, points in family.methods.items():
        child = client.create_run(
            experiment_id,
            tags={**family.tags, MLFLOW_PARENT_RUN_ID: parent},
            run_name=method,
        ).info.run_id
        metrics = [Metric(key, float(value), now, step) for key, value, step in points]
        client.log_batch(child, metrics, [Param("method", method)])
        client.set_terminated(child, "FINISHED")
    client.set_terminated(parent, "FINISHED")
    return parent


def _points(metrics: Mapping[str, Any], timings: Mapping[str, Cost]) -> list[Metric]:
    """Everything that is a number, curves included."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    values = [
        (f"{state}/{name}", value, 0)
        for state in ("before", "after")
        for name, value in metrics[state].items()
    ]
    edit = read_json(EDIT_FILE)
    single = ("count", "target_shift", "residual_left")
    values += [(f"edit/{name}", edit[name], 0) for name in single]
    for name in ("update_ratio", "residuals"):
        values += [(f"edit/{name}", value, int(layer)) for layer, value in edit[name].items()]
    steps, middle, low, high = figures.loss_curve(read_losses(TARGETS_FILE))
    for name, curve in (("median", middle), ("low", low), ("high", high)):
        values += [
            (f"targets/loss_{name}", float(value), int(step))
            for step, value in zip(steps, curve, strict=True)
        ]
    for step, cost in timings.items():
        values += [
            (f"seconds/{step}", cost.seconds, 0),
            (f"peak_memory_mib/{step}", cost.peak_memory / 2**20, 0),
        ]
        if cost.peak_device_memory:
            values.append((f"peak_device_memory_mib/{step}", cost.peak_device_memory / 2**20, 0))
    return [Metric(name, float(value), now, step) for name, value, step in values]


def _log_files(client: MlflowClient, run_id: str) -> None:
    for path in REPORT_FILES:
        client.log_artifact(run_id, str(path), "report")
    for path in (PROMPTS_FILE, FACTS_FILE):
        client.log_artifact(run_id, str(path), "evaluation")
    for path in (METRICS_FILE, TIMINGS_FILE, EDIT_FILE, PREFIXES_FILE, STATISTICS_FILE):
        client.log_artifact(run_id, str(path), "results")


def _datasets() -> list[DatasetInput]:
    statistics = read_json(STATISTICS_FILE)
    requests = hashlib.sha256(REQUESTS_FILE.read_bytes()).hexdigest()
    records = {"records": len(json.loads(REQUESTS_FILE.read_text(encoding="utf-8")))}
    read = {name: statistics[name] for name in ("documents", "tokens")}
    return [
        _dataset("requests", "edit", REQUESTS_FILE, requests, records),
        _dataset("corpus", "statistics", STATISTICS_FILE, statistics["corpus"], read),
    ]


def _dataset(
    name: str, context: str, path: Path, digest: str, profile: Mapping[str, Any]
) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"path": str(path), "sha256": digest})
    known = Dataset(name, digest[:36], "dvc", source, profile=json.dumps(profile))
    return DatasetInput(known, [InputTag("mlflow.data.context", context)])


def _base_model(experiment_id: str, model: ModelFiles) -> str:
    """The logged model that stands for the unedited one, the same for all runs on it."""
    import mlflow

    same = f"tags.digest = '{model.digest}'"
    found = mlflow.MlflowClient().search_logged_models([experiment_id], same, max_results=1)
    if found:
        return found[0].model_id
    return mlflow.create_external_model(
        name="unedited",
        tags={"digest": model.digest, "id": model.id, "revision": str(model.revision)},
        model_type="unedited",
        experiment_id=experiment_id,
    ).model_id


def _edited_model(
    experiment_id: str, run_id: str, experiment: Experiment, metrics: Mapping[str, Any]
) -> str:
    """The logged model that stands for the edited one; its weights stay with DVC."""
    import mlflow

    files = experiment.manifests["edit"].files
    return mlflow.create_external_model(
        name="edited",
        source_run_id=run_id,
        tags={
            "dvc.path": str(EDITED_WEIGHTS_FILE),
            "sha256": files[str(EDITED_WEIGHTS_FILE)],
            "delta.path": str(DELTA_FILE),
            "delta.sha256": files[str(DELTA_FILE)],
            **{key: value for key, value in experiment.tags.items() if key.startswith("dvc")},
        },
        params={
            "count": str(metrics["edit"]["count"]),
            "layers": str(metrics["edit"]["layers"]),
        },
        model_type="edited",
        experiment_id=experiment_id,
    ).model_id


def origin_tags(flow_runs: Mapping[str, str]) -> dict[str, str]:
    """Where an experiment comes from: git commit, ``dvc.lock``, DVC experiment, Prefect runs."""
    tags = {"git.commit": _git("rev-parse", "HEAD")}
    if tags["git.commit"]:
        tags["git.dirty"] = str(bool(_git("status", "--porcelain", "-uno"))).lower()
    tags["dvc.lock"] = _lock_digest(Path("dvc.lock"))
    tags["dvc.experiment"] = os.environ.get("DVC_EXP_NAME", "")
    tags |= {f"prefect.{step}": run for step, run in flow_runs.items()}
    return {name: value for name, value in tags.items() if value}


def _git(*words: str) -> str:
    try:
        result = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _lock_digest(path: Path) -> str:
    """SHA-256 of ``dvc.lock`` without the stage ``report``, which is locked after it has run."""
    import yaml

    try:
        lock = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return ""
    stages = {name: stage for name, stage in lock.get("stages", {}).items() if name != "report"}
    return hashlib.sha256(json.dumps(stages, sort_keys=True).encode()).hexdigest()


def _parameters(tree: Mapping[str, Any]) -> list[Param]:
    """Parameters as MLflow takes them: flat, short, and without secrets."""
    from mlflow.entities import Param

    return [Param(key, redacted(str(value))[:LONGEST]) for key, value in _flat(tree)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
