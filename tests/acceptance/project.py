"""A checkout of the project with small parameters, and its commands as a user types them."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import yaml

from flows.command.parameters import Parameters
from tasks.engine.artifacts import PARTIAL
from tests import ROOT

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
    "compare": {"count": 8, "training_records": 24, "generation_records": 2},
    "scaling": {"counts": [1, 6], "least_records": 2, "generation_records": 1},
}

NOT_INHERITED = ("DVC_ROOT", "MLFLOW_TRACKING_URI")
"""What other tests of the same process may have set: MLflow sets it for whoever is started."""


class Project:
    """A checkout of the project with small parameters, and its commands."""

    def __init__(
        self,
        place: Path,
        api: str,
        source: Path = ROOT,
        changes: Mapping[str, Mapping[str, Any]] = TINY,
    ) -> None:
        self.place = place
        place.mkdir()
        for name in ("flows", "tasks", "memit", "methods", "data", ".dvc"):
            shutil.copytree(source / name, place / name, ignore=_not_ours)
        for name in ("dvc.yaml", "constraints.txt", ".dvcignore", ".gitignore"):
            shutil.copy(source / name, place / name)
        parameters = Parameters().model_dump(mode="json")
        for section, values in changes.items():
            _update(parameters[section], values)
        (place / "params.yaml").write_text(yaml.safe_dump(parameters, sort_keys=False))
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in NOT_INHERITED},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_API_URL": api,
            "PYTHONPATH": "",
        }
        self.do("git", "init", "-q")
        self.do("git", "config", "user.name", "a tester")
        self.do("git", "config", "user.email", "tester@example.org")
        self.do("git", "add", "-A")
        self.do("git", "commit", "-q", "-m", "start")

    def copy(self, place: Path) -> Project:
        """Everything that lies here, in another place, with an MLflow store of its own."""
        shutil.copytree(self.place, place, symlinks=True)
        (place / "mlflow.db").unlink()
        other = copy(self)
        other.place = place
        return other

    def do(self, *words: str) -> str:
        """Run a command that must succeed; gives what it printed."""
        result = subprocess.run(
            words, cwd=self.place, env=self.environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    def run(self) -> str:
        """`memit run`."""
        return self.do(sys.executable, "-m", "flows", "experiment")

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A module as a command, `memit run` by default, not waited for."""
        return subprocess.Popen(
            [sys.executable, "-m", *(words or ("flows", "experiment"))],
            cwd=self.place,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=hear_interrupts,
        )

    def results(self) -> dict[str, bytes]:
        """Everything that a repetition must reproduce to the byte: not what it cost."""
        files = [
            path for name in ("artifacts", "evaluation") for path in self.place.glob(f"{name}/**/*")
        ]
        files.append(self.place / "metrics.json")
        found = {str(path.relative_to(self.place)): path for path in files if path.is_file()}
        return {name: p.read_bytes() for name, p in found.items() if "steps" not in name}

    def mlflow_runs(self) -> list[tuple[str, str]]:
        """Status and life of every MLflow run."""
        with sqlite3.connect(self.place / "mlflow.db") as store:
            return store.execute("select status, lifecycle_stage from runs").fetchall()

    def pieces(self, step: str) -> int:
        """How many finished pieces of a step there are; of the model, checkpoints."""
        folder = self.place / ".cache" / ("unfinished" if step == "model" else f"pieces/{step}")
        return sum(not path.name.endswith(PARTIAL) for path in folder.rglob("*.*"))


def hear_interrupts() -> None:
    """For a child: it would ignore Ctrl-C where the tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def server(home: Path) -> Iterator[str]:
    """One Prefect server for all runs, whatever this process has set; gives its address."""
    from flows.service.server import prefect_server

    kept = {name: os.environ.get(name) for name in ("PREFECT_HOME", "PREFECT_API_URL")}
    os.environ["PREFECT_HOME"] = str(home)
    os.environ.pop("PREFECT_API_URL", None)
    try:
        with prefect_server() as address:
            yield address
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _not_ours(folder: str, names: list[str]) -> set[str]:
    skipped = {"__pycache__", "cache", "tmp", "config.local"}
    return skipped if Path(folder).name == ".dvc" else {"__pycache__"}


def _update(tree: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _update(tree[name], value)
        else:
            assert name in tree
            tree[name] = value
