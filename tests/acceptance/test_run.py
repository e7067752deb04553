"""The whole experiment as a user runs it, on a world of a few people: run, kill, resume, repeat."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from tasks.engine.results import STEPS
from tests.acceptance.project import Project

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]


def test_it_leaves_results_that_belong_together(finished: Project) -> None:
    metrics = json.loads((finished.place / "metrics.json").read_text())
    assert set(metrics) == {"before", "after", "edit"}
    for state in ("before", "after"):
        assert metrics[state]["records"] == 8
        for name in ("efficacy", "paraphrase", "neighborhood"):
            for kind in ("", "_accuracy", "_magnitude"):
                assert -100 <= metrics[state][name + kind] <= 100
        assert metrics[state]["perplexity"] > 1
        assert metrics[state]["entropy_low"] <= metrics[state]["entropy"]
    assert metrics["edit"]["count"] == 8
    timings = json.loads((finished.place / "timings.json").read_text())
    assert set(timings) == set(STEPS) - {"report"}
    assert all(t["seconds"] >= 0 and t["peak_memory"] > 1 << 20 for t in timings.values())
    for name in ("metrics.png", "updates.png", "losses.png"):
        assert (finished.place / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert "| Efficacy ES |" in (finished.place / "report" / "results.md").read_text()
    facts = (finished.place / "evaluation" / "facts.csv").read_text().splitlines()
    assert len(facts) == 9


def test_dvc_and_git_have_nothing_to_do_after_it(finished: Project) -> None:
    assert "up to date" in finished.do("dvc", "status")
    said = finished.do("dvc", "repro", "--dry")
    assert "Running stage" not in said
    changed = finished.do("git", "status", "--porcelain").split()
    assert set(changed) <= {"??", "dvc.lock", "metrics.json"}


def test_a_repetition_comes_from_caches_and_changes_no_byte(finished: Project) -> None:
    before, pieces = finished.results(), {step: finished.pieces(step) for step in STEPS}
    timings = json.loads((finished.place / "timings.json").read_text())
    finished.run()
    assert finished.results() == before
    assert {step: finished.pieces(step) for step in STEPS} == pieces
    again = json.loads((finished.place / "timings.json").read_text())
    for step, cost in timings.items():  # those of the pieces, not of looking them up
        assert again[step]["seconds"] == pytest.approx(cost["seconds"], rel=0.1, abs=0.1)
    assert finished.mlflow_runs() == [("FINISHED", "active")]


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_says_how_to_go_on(
    finished: Project, tmp_path: Path, api: str, sent: signal.Signals, status: int
) -> None:
    project = Project(tmp_path / "project", api, finished.place)
    for name in ("records", "pieces/model"):
        shutil.copytree(finished.place / ".cache" / name, project.place / ".cache" / name)
    process = project.start()
    while not project.pieces("statistics"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert "run it again to go on" in said
    assert "Traceback" not in said


def test_an_unreachable_store_does_not_cost_the_results(finished: Project) -> None:
    shutil.move(finished.place / "mlflow.db", finished.place / "mlflow.aside")
    (finished.place / "mlflow.db").mkdir()
    said = finished.do(sys.executable, "-m", "flows", "report")
    assert "warning: MLflow at" in said
    assert "results stand" in " ".join(said.split())
    (finished.place / "mlflow.db").rmdir()
    shutil.move(finished.place / "mlflow.aside", finished.place / "mlflow.db")
    finished.do(sys.executable, "-m", "flows", "report")
    assert finished.mlflow_runs() == [("FINISHED", "active")]


def test_bad_input_is_told_before_anything_is_touched(finished: Project) -> None:
    before = finished.results()
    path = finished.place / "params.yaml"
    good = path.read_text()
    changed = yaml.safe_load(good)
    changed["requests"] |= {"source": "facts", "path": "facts.jsonl", "count": None}
    line = '{"subject": "Ada", "prompt": "{} lives in", "target": "%s"}\n'
    (finished.place / "facts.jsonl").write_text(line % "Rome" + line % "Oslo")
    path.write_text(yaml.safe_dump(changed))
    try:
        process = finished.start()
        said, _ = process.communicate(timeout=120)
    finally:
        path.write_text(good)
        (finished.place / "facts.jsonl").unlink()
    assert process.returncode == 2
    assert said.startswith("error: facts.jsonl: records 1 and 2 contradict each other")
    assert len(said.splitlines()) == 1
    assert finished.results() == before
