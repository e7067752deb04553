"""The whole experiment as a user runs it, on a world of a few people: run and repeat."""

import csv
import json
import shutil

import pytest

from tasks.engine.results import STEPS
from tests.acceptance.chaos import records
from tests.acceptance.forked import Forked
from tests.acceptance.project import Project

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]

FOLDERS = (".", "artifacts", "artifacts/edit", "artifacts/model", "artifacts/model/weights")
FOLDERS += ("artifacts/statistics", "evaluation", "report")
NAMES = ("notes.md", "a.partial", ".x.json.99999-0a1b2c3d.partial", "mine/a.ipynb")
NOTES = tuple(f"{folder}/{name}" for folder in FOLDERS for name in NAMES)
"""Files of a user's own beside the results."""


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the finished experiment with a user's notes in it."""
    project = finished.copy(tmp_path_factory.mktemp("run") / "project")
    for name in NOTES:
        path = project.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    return project


def assert_notes_are_left(project: Project) -> None:
    assert [name for name in NOTES if not (project.path / name).exists()] == []


def test_it_leaves_results_that_belong_together(finished: Project) -> None:
    metrics = json.loads((finished.path / "metrics.json").read_text())
    details = json.loads((finished.path / "evaluation" / "intervals.json").read_text())
    assert set(metrics) == {"before", "after", "edit"}
    for state in ("before", "after"):
        assert metrics[state]["records"] == 8
        for name in ("efficacy", "paraphrase", "neighborhood"):
            assert all(-100 <= metrics[state][name + kind] <= 100 for kind in ("", "_accuracy"))
            assert -100 <= details[state][f"{name}_magnitude"] <= 100
        assert metrics[state]["perplexity"] > 1
        assert details[state]["entropy_low"] <= metrics[state]["entropy"]
    assert metrics["edit"]["count"] == 8
    timings = json.loads((finished.path / "timings.json").read_text())
    assert set(timings) == set(STEPS) - {"report"}
    assert all(t["seconds"] >= 0 and t["peak_memory"] > 1 << 20 for t in timings.values())
    assert "8 edited facts" in (finished.path / "report" / "index.html").read_text()
    assert "| Efficacy ES |" in (finished.path / "report" / "results.md").read_text()
    facts = (finished.path / "evaluation" / "facts.csv").read_text().splitlines()
    assert len(facts) == 9
    with open(finished.path / "evaluation" / "answers.csv", newline="") as file:
        answers = list(csv.DictReader(file))
    assert len([row for row in answers if row["kind"] == "rewrite"]) == 5
    assert all(row["prompt"] and row["answer_before"] and row["answer_after"] for row in answers)


def test_dvc_and_git_have_nothing_to_do_after_it(finished: Project) -> None:
    assert "up to date" in finished.do("dvc", "status")
    assert "Running stage" not in finished.do("dvc", "repro", "--dry")
    changed = finished.do("git", "status", "--porcelain").split()
    assert set(changed) <= {"??", "dvc.lock", "metrics.json"}


def test_a_repetition_comes_from_caches_and_changes_no_byte(project: Project) -> None:
    before, kept = project.results(), records(project)
    page = (project.path / "report" / "index.html").read_bytes()
    timings = json.loads((project.path / "timings.json").read_text())
    project.run(Forked)
    assert project.results() == before
    assert (project.path / "report" / "index.html").read_bytes() == page
    assert records(project) == kept
    again = json.loads((project.path / "timings.json").read_text())
    longest = max(timings, key=lambda step: timings[step]["seconds"])
    # Those of the pieces: looking them up takes much less.
    assert again[longest]["seconds"] > timings[longest]["seconds"] / 2
    assert project.mlflow_runs() == [("FINISHED", "active")]
    assert project.registered() == [("synthetic-edited", 1)]
    assert "up to date" in project.do("dvc", "status")
    assert_notes_are_left(project)


def test_what_dvc_runs_anew_leaves_a_users_notes(project: Project) -> None:
    """A stage with outs of both kinds: a file with a name of its own, and a folder."""
    before = project.results()
    project.do("dvc", "repro", "--force", "--single-item", "model")
    assert project.results() == before
    assert_notes_are_left(project)


def test_an_unreachable_store_does_not_cost_the_results(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.path / "mlflow.db").unlink()
    (project.path / "mlflow.db").mkdir()
    shutil.rmtree(project.path / "report")
    project.run_here()
    (project.path / "mlflow.db").rmdir()
    assert "warning: MLflow at" in " ".join(capsys.readouterr().err.split())
    assert (project.path / "report" / "results.md").exists()
