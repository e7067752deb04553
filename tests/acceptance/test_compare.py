"""Comparison and scaling as a user runs them, through DVC."""

import csv
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from flows.compare import Setup, try_method
from flows.experiment import comparison, scaling_run
from memit.evaluation.counterfact import harmonic_mean
from tasks.edit import Method
from tests import contents
from tests.acceptance.chaos import records
from tests.acceptance.project import Project

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]

METHODS = ("unedited", "ft_w", "mend", "rome", "memit", "serac")
LABELS = ("unedited", "FT-W", "MEND", "ROME (5 edits)", "MEMIT", "SERAC")


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished experiment, to which the stages of the comparison were added."""
    project = finished.copy(tmp_path_factory.mktemp("compare") / "project")
    shutil.copy(project.path / "methods/stages.yaml", project.path / "methods/dvc.yaml")
    return project


@pytest.fixture(scope="module")
def compared(project: Project) -> Path:
    """The comparison's results."""
    output = project.do("memit", "repro", "methods/dvc.yaml:compare")
    assert "Traceback" not in output
    return project.path / "comparison"


def _success(rows: list[dict], kind: str, wanted: str, other: str) -> float:
    """Mean over records of the share of prompts that prefer the wanted object, in percent."""
    cases: dict[int, list[bool]] = {}
    for row in rows:
        if row["kind"] == kind:
            cases.setdefault(row["case_id"], []).append(row[f"nll_{wanted}"] < row[f"nll_{other}"])
    return 100 * float(np.mean([np.mean(hits) for hits in cases.values()]))


def test_the_table_follows_from_the_stored_prompts(compared: Path) -> None:
    metrics = json.loads((compared / "metrics.json").read_text())
    assert tuple(metrics) == tuple(sorted(METHODS))
    rows = parquet.read_table(compared / "prompts.parquet").to_pylist()
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        parts = [
            _success(own, "rewrite", "new", "true"),
            _success(own, "paraphrase", "new", "true"),
            _success(own, "neighborhood", "true", "new"),
        ]
        found = metrics[method]
        names = ("efficacy", "paraphrase", "neighborhood")
        assert [found[name] for name in names] == pytest.approx(parts, abs=1e-5)
        assert found["score"] == pytest.approx(harmonic_mean(parts), abs=1e-5)
        for name in (*names, "neighborhood_plus", "entropy"):
            assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    page = (compared / "table.md").read_text()
    assert all(f"| {label} |" in page for label in LABELS)
    with open(compared / "table.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == list(METHODS)
    texts = parquet.read_table(compared / "generations.parquet").to_pylist()
    assert {text["method"] for text in texts} == set(METHODS)


def test_it_is_one_run_with_a_nested_one_for_each_method(project: Project, compared: Path) -> None:
    with sqlite3.connect(project.path / "mlflow.db") as store:
        names = "select run_uuid, value from tags where key = 'mlflow.parentRunId'"
        nested = store.execute(names).fetchall()
        status = store.execute("select run_uuid, status from runs").fetchall()
    assert len(nested) == len(METHODS)
    assert len({parent for _, parent in nested}) == 1
    assert {state for _, state in status} == {"FINISHED"}
    assert len(status) == len(METHODS) + 1


def test_a_repetition_has_nothing_to_do(project: Project, compared: Path) -> None:
    before = contents(compared)
    output = project.do("dvc", "repro", "methods/dvc.yaml:compare")
    assert "Running stage" not in output
    assert contents(compared) == before


def test_deployments_give_the_same_and_scaling_goes_on_where_it_was_stopped(
    project: Project, compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def try_only_one(setup: Setup, method: Method, *given: Any, **options: Any) -> Any:
        if tried:
            raise SystemExit("stopped")
        tried.append(method.name)
        return try_method(setup, method, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr("flows.scaling.try_method", try_only_one)
        with pytest.raises(SystemExit, match="stopped"):
            project.run_here(scaling_run)
    kept = records(project)

    def results() -> dict[str, bytes]:
        """Everything but the record of the step, which names its cost."""
        return {p.name: p.read_bytes() for p in compared.glob("*.*") if p.name != "step.json"}

    before = results()
    shutil.rmtree(compared)
    project.run_here(comparison)
    project.run_here(scaling_run)
    assert records(project).items() >= kept.items()
    assert results() == before
    folder = project.path / "scaling"
    with open(folder / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["method"], row["edits"]) for row in rows} == {
        (method, count) for method in METHODS for count in ("1", "6")
    } - {("rome", "6")}
    assert all(float(row["efficacy"]) >= 0 for row in rows)
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
