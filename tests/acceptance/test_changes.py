"""What changes is computed again by whichever command is run, and nothing else is."""

import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tasks.engine.results import STORED_TARGETS_FILE
from tests.acceptance.chaos import records
from tests.acceptance.project import Project, empty_store
from tests.families import DOCUMENTS, save_model

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]

OWN: dict[str, dict[str, Any]] = {
    "model": {"source": "local", "path": "small", "threads": 1},
    "requests": {"source": "facts", "path": "facts.jsonl", "count": None},
    "statistics": {"source": "file", "path": "corpus.txt", "documents": 60}
    | {"documents_per_shard": 60, "held_out_documents": 4},
    "targets": {"evaluations": 2},
    "edit": {"layers": [1, 2], "covariance_weight": 1.0},
}


NAMES = ("Paul Smith", "Mary Miller", "Ada Jones")


def write_facts(project: Project, *numbers: int, target: str = "Rome") -> None:
    """A list of the facts with these numbers."""
    fact = {"prompt": "{} lives in the city of", "target": target, "target_true": "Paris"}
    lines = [json.dumps({"subject": NAMES[number], **fact}) for number in numbers]
    (project.path / "facts.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, api: str) -> Project:
    """An experiment on files of the user's own that has been run."""
    made = Project(tmp_path_factory.mktemp("changes") / "project", api, changes=OWN)
    shutil.copy(empty_store(), made.path)
    save_model("gpt2", made.path / "small")
    (made.path / "corpus.txt").write_text("\n".join(DOCUMENTS * 5))
    write_facts(made, 0, 1)
    # As where the cache lies on another disk: results are symbolic links into it.
    made.do("dvc", "config", "--local", "cache.type", "symlink")
    made.run_here()
    assert (made.path / "artifacts" / "requests.json").is_symlink()
    return made


def damaged(project: Project) -> list[str]:
    """The files of DVC's cache whose content does not match their names."""
    stored = [p for p in project.path.glob(".dvc/cache/files/md5/*/*") if p.is_file()]
    assert len(stored) > 15
    digests = {path: hashlib.md5(path.read_bytes()).hexdigest() for path in stored}
    return [p.name for p in stored if digests[p] != p.parent.name + p.name.removesuffix(".dir")]


def tasks_run(project: Project, known: Collection[str]) -> list[str]:
    """The task of each piece that was computed since these records were there."""
    return [name.rpartition("-")[0] for name in records(project).keys() - known]


def append(path: Path, text: str = "\n") -> None:
    with path.open("a") as file:
        file.write(text)


def test_facts_that_come_and_go_leave_no_trace(project: Project) -> None:
    def run_with(*numbers: int) -> tuple[dict[str, bytes], int]:
        """The results with some of the facts, and how many targets were optimised for them."""
        write_facts(project, *numbers)
        known = records(project)
        project.run_here()
        found = project.results()
        del found[str(STORED_TARGETS_FILE)]
        return found, tasks_run(project, known).count("targets")

    before = project.results()
    del before[str(STORED_TARGETS_FILE)]
    with_one_more, optimised = run_with(2, 0, 1)
    assert optimised == 1
    assert with_one_more["metrics.json"] != before["metrics.json"]
    assert run_with(1, 0) == (before, 0)
    assert project.outdated() == set()


def test_facts_and_code_that_change_are_seen_by_a_run(project: Project) -> None:
    known, lock, results = records(project), project.path / "dvc.lock", project.results()
    before = lock.read_bytes()
    write_facts(project, 1, 0, target="Bonn")
    append(project.path / "memit" / "layer_walk.py")
    # Of the statistics, which leave out subjects that are edited, nothing will change.
    assert project.outdated() == {"requests", "statistics", "edit", "evaluation"}
    project.run()
    assert "Bonn" in (project.path / "artifacts" / "requests.json").read_text()
    assert "Bonn" in (project.path / "evaluation" / "facts.csv").read_text()
    edited = {"requests", "targets", "edit", "changed_weights"}
    assert set(tasks_run(project, known)) == edited | {"evaluation", "held_out"}
    assert project.outdated() == set()
    assert damaged(project) == []
    # The results of before come back as they were.
    after, found = lock.read_bytes(), project.results()
    lock.write_bytes(before)
    project.do("dvc", "checkout")
    assert project.results() | {"metrics.json": b""} == results | {"metrics.json": b""}
    lock.write_bytes(after)
    project.do("dvc", "checkout")
    assert project.results() == found


def test_the_module_that_walks_the_layers_recomputes_the_edit_alone(project: Project) -> None:
    known, results = records(project), project.results()
    append(project.path / "memit" / "layer_walk.py")
    assert project.outdated() == {"edit"}
    output = project.do("dvc", "repro", "edit")
    for stage in ("model", "requests", "statistics", "targets"):
        assert f"Stage '{stage}' didn't change" in output
    assert tasks_run(project, known) == ["edit"]
    assert project.results() == results
    assert project.outdated() <= {"report"}  # which shows the seconds of the edit


@pytest.mark.parametrize(
    ("changed", "stages"),
    [
        ("corpus.txt", {"statistics", "evaluation"}),
        ("small/config.json", {"model"}),
        ("memit/corpus.py", {"statistics", "evaluation"}),
        ("constraints.txt", {"model", "requests", "prefixes", "statistics", "targets", "edit"}
        | {"evaluation"}),
        ("memit/language_model.py", {"model", "requests", "prefixes", "statistics", "targets"}
        | {"edit", "evaluation"}),
        ("tasks/engine/progress.py", set()),
    ],
)  # fmt: skip
def test_dvc_sees_what_each_stage_depends_on(
    project: Project, changed: str, stages: set[str]
) -> None:
    path = project.path / changed
    content = path.read_bytes()
    append(path)
    try:
        assert project.outdated() - {"report"} == stages
    finally:
        path.write_bytes(content)
