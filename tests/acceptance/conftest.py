"""One finished experiment for all acceptance tests."""

from __future__ import annotations

import os

import pytest
from filelock import FileLock

from tests.acceptance.project import Project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, api: str) -> Project:
    """A project in which the experiment has run once; tests that change it take a copy.

    The first process that asks for it makes it, for all of them.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with FileLock(folder / "finished.lock"):
        exists = (folder / "finished").exists()
        project = Project(folder / "finished", api)
        if not exists:
            output = project.run()
            assert "Score S" in output
            assert "Where to look next" in output
            assert "Traceback" not in output
            assert "warning" not in output
    return project
