"""A user's notes beside the results, whatever runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

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


def test_what_dvc_runs_anew_leaves_a_users_notes(
    finished: Project, tmp_path: Path, api: str
) -> None:
    project = Project(tmp_path / "project", api, finished.place)
    for name in ("records", "pieces"):
        shutil.copytree(finished.place / ".cache" / name, project.place / ".cache" / name)
    for folder in FOLDERS:
        for name in NAMES:
            path = project.place / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine")
    notes = mine(project)
    project.run()
    first = project.results()
    for stage in ("model", "statistics"):
        project.do("dvc", "repro", "--force", "--single-item", stage)
    assert "up to date" in project.do("dvc", "status")
    assert project.results() == first
    assert mine(project) == notes
