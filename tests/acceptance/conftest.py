"""One finished experiment for all acceptance tests."""

from pathlib import Path

import pytest
from filelock import FileLock

from tests.acceptance.project import Project


@pytest.fixture(scope="session")
def finished(session: Path, api: str) -> Project:
    """A project in which the experiment has run once; tests that change it take a copy.

    The first process that asks for it makes it, for all of them.
    """
    with FileLock(session / "finished.lock"):
        exists = (session / "finished").exists()
        project = Project(session / "finished", api)
        if not exists:
            output = project.run()
            assert "Score S" in output
            assert "Where to look next" in output
            assert "Traceback" not in output
            assert "warning" not in output
    return project
