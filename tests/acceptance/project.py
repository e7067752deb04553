"""A checkout of the project with small parameters, and its commands as a user types them."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from copy import copy
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from filelock import FileLock

import tests
from flows.command.parameters import read_parameters
from flows.experiment import experiment
from flows.service.server import prefect_server
from tasks.engine.artifacts import PARTIAL
from tasks.reporting.tracking import open_store
from tests import ROOT
from tests.acceptance.forked import Forked

TINY: dict[str, dict[str, Any]] = {
    "model": {
        "threads": 1,
        "world": {"people": 24, "relations": 3, "objects": 6, "biographies": 12}
        | {"held_out_biographies": 1, "records_per_person": 2},
        "training": {"layers": 3, "width": 32, "heads": 2, "vocabulary": 400, "steps": 80}
        | {"warmup_steps": 10, "checkpoint_every": 10},
    },
    "requests": {"count": 8},
    "statistics": {"documents": 200, "documents_per_shard": 20},
    "targets": {"requests_per_piece": 1},
    "evaluation": {"prompts_per_piece": 16, "generation_records": 2},
    "mend": {"steps": 4, "edits_at_once": 4, "rank": 4},
    "serac": {"width": 16, "layers": 1, "classifier_steps": 4, "counterfactual_steps": 4}
    | {"batch_size": 4},
    "compare": {
        "count": 8,
        "at_most": {"rome": 5},
        "training_records": 24,
        "generation_records": 2,
    },
    "scaling": {"counts": [1, 6], "least_records": 1, "generation_records": 1},
}

WORLD = ROOT / "params" / "world.yaml"
"""The parameters of the synthetic world, of which `TINY` is a smaller one."""

DVCS_OWN = shutil.ignore_patterns("cache", "tmp", "config.local")
NOT_INHERITED = ("DVC_ROOT", "MLFLOW_TRACKING_URI")
"""Variables that other tests of the same process may have set."""


class Project:
    """A checkout of the project with small parameters, and its commands."""

    def __init__(
        self, path: Path, api: str, changes: Mapping[str, Mapping[str, Any]] = TINY
    ) -> None:
        self.path = path
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in NOT_INHERITED},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_API_URL": api,
            "PYTHONPATH": "",
        }
        if not path.exists():
            self._create(changes)

    def _create(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        for name in ("flows", "tasks", "memit", "methods", "data", ".dvc"):
            shutil.copytree(ROOT / name, self.path / name, ignore=DVCS_OWN)
        for name in ("dvc.yaml", "constraints.txt", ".dvcignore", ".gitignore"):
            shutil.copy(ROOT / name, self.path / name)
        parameters = read_parameters(WORLD).model_dump(mode="json")
        for section, values in changes.items():
            _update(parameters[section], values)
        (self.path / "params.yaml").write_text(yaml.safe_dump(parameters, sort_keys=False))
        self.do("git", "init", "-q")
        self.do("git", "config", "user.name", "a tester")
        self.do("git", "config", "user.email", "tester@example.org")
        self.do("git", "add", "-A")
        self.do("git", "commit", "-q", "-m", "start")

    def copy(self, path: Path) -> Project:
        """A copy in another directory, whose MLflow store knows no runs."""
        shutil.copytree(self.path, path, symlinks=True)
        shutil.copy(empty_store(), path)
        other = copy(self)
        other.path = path
        return other

    def do(self, *words: str, popen: Any = subprocess.Popen) -> str:
        """Run a command that must succeed; gives its output."""
        popen = Forked if words[0] == "dvc" else popen
        with NamedTemporaryFile() as file:
            process = popen(words, cwd=self.path, env=self.environment, stdout=file, stderr=file)
            status, output = process.wait(), Path(file.name).read_text()
        assert status == 0, output
        return output

    def run(self, popen: Any = subprocess.Popen) -> str:
        """`memit run`."""
        return self.do(sys.executable, "-m", "flows", "experiment", popen=popen)

    def run_here(self, chain: Callable[[Any], object] = experiment) -> None:
        """A chain of steps in this process, as a deployment runs it: nothing has to be imported.

        The code is that of `ROOT`, which must be the project's.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.path)
            patch.setenv("DVC_ROOT", str(self.path))
            for name in NOT_INHERITED[1:]:
                patch.delenv(name, raising=False)
            chain({})

    def outdated(self) -> set[str]:
        """The stages that DVC would run again."""
        with chdir(self.path), Repo() as repo:
            return set(repo.status())

    def results(self) -> dict[str, bytes]:
        """The files that a repetition must reproduce to the byte."""
        files = [
            path for name in ("artifacts", "evaluation") for path in self.path.glob(f"{name}/**/*")
        ]
        files.append(self.path / "metrics.json")
        found = {str(path.relative_to(self.path)): path for path in files if path.is_file()}
        return {name: p.read_bytes() for name, p in found.items() if "steps" not in name}

    def mlflow_runs(self) -> list[tuple[str, str]]:
        """Status and lifecycle stage of every MLflow run."""
        with sqlite3.connect(self.path / "mlflow.db") as store:
            return store.execute("select status, lifecycle_stage from runs").fetchall()

    def registered(self) -> list[tuple[str, int]]:
        """Name and version of every model in MLflow's registry."""
        with sqlite3.connect(self.path / "mlflow.db") as store:
            return store.execute("select name, version from model_versions").fetchall()

    def pieces(self, step: str) -> int:
        """The number of finished pieces of a step; of the model, of checkpoints."""
        folder = self.path / ".cache" / ("unfinished" if step == "model" else f"pieces/{step}")
        return sum(not path.name.endswith(PARTIAL) for path in folder.rglob("*.*"))


def hear_interrupts() -> None:
    """In a child: react to Ctrl-C also where a shell runs the tests in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def server(home: Path) -> Iterator[str]:
    """One Prefect server for all runs, whatever this process has set; gives its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.delenv("PREFECT_API_URL", raising=False)
        with prefect_server() as address:
            yield address


def empty_store() -> Path:
    """An MLflow store without runs, made once in a session, since that takes seconds."""
    path = tests.session / "store" / "mlflow.db"
    with FileLock(tests.session / "store.lock"):
        if not path.exists():
            path.parent.mkdir()
            open_store(f"sqlite:///{path}")
    return path


def _update(tree: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        assert name in tree
        if isinstance(value, dict) and tree[name]:
            _update(tree[name], value)
        else:
            tree[name] = value
