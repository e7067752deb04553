"""Results that are links into DVC's cache, and a user's notes beside them."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.acceptance.project import Project

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]

FOLDERS = (".", "artifacts", "artifacts/edit", "artifacts/model", "artifacts/model/weights")
FOLDERS += ("artifacts/statistics", "evaluation", "report")
NAMES = ("notes.md", "a.partial", ".x.json.99999-0a1b2c3d.partial", "mine/a.ipynb")


def mine(project: Project) -> dict[str, str]:
    """What the user has put beside the results."""
    paths = [Path(folder, name) for folder in FOLDERS for name in NAMES]
    there = {str(path): project.place / path for path in paths}
    return {name: path.read_text() for name, path in there.items() if path.exists()}


def is_whole(stored: Path) -> bool:
    """Whether a file of DVC's cache is what its name says."""
    digest = hashlib.md5(stored.read_bytes()).hexdigest()
    return stored.parent.name + stored.name.removesuffix(".dir") == digest


def test_a_run_harms_neither_dvcs_cache_nor_notes(
    finished: Project, tmp_path: Path, api: str
) -> None:
    project = Project(tmp_path / "project", api, finished.place)
    for name in ("records", "pieces"):
        shutil.copytree(finished.place / ".cache" / name, project.place / ".cache" / name)
    store = tmp_path / "store"
    project.do("dvc", "cache", "dir", "--local", str(store))
    project.do("dvc", "config", "--local", "cache.type", "symlink")
    for folder in FOLDERS:
        for name in NAMES:
            path = project.place / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine")
    notes = mine(project)
    project.run()
    assert (project.place / "artifacts" / "requests.json").is_symlink()
    first, lock = project.results(), (project.place / "dvc.lock").read_bytes()

    path = project.place / "params.yaml"
    parameters = yaml.safe_load(path.read_text())
    parameters["requests"]["count"] = 3
    changed = yaml.safe_dump(parameters)
    unchanged = path.read_text()
    path.write_text(changed)
    project.run()
    assert "up to date" in project.do("dvc", "status")
    assert project.results() != first
    stored = [path for path in store.glob("files/md5/*/*") if path.is_file()]
    assert len(stored) > 20
    assert [path.name for path in stored if not is_whole(path)] == []
    assert mine(project) == notes

    path.write_text(unchanged)
    (project.place / "dvc.lock").write_bytes(lock)
    project.do("dvc", "checkout")
    shutil.copy(finished.place / "metrics.json", project.place)  # which git keeps
    assert project.results() == first
    for stage in ("model", "statistics", "edit", "report"):
        project.do("dvc", "repro", "--force", "--single-item", stage)
    assert "up to date" in project.do("dvc", "status")
    assert project.results() == first
    assert mine(project) == notes
    shutil.rmtree(project.place / "report")
    project.do("dvc", "checkout", "report/results.md", "report/metrics.png")
    assert (project.place / "report" / "results.md").is_symlink()
    project.do(sys.executable, "-m", "flows.report")
    assert not (project.place / "report" / "results.md").is_symlink()
    assert [path.name for path in stored if not is_whole(path)] == []
