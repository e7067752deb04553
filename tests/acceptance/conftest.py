"""One Prefect server and one finished experiment for all acceptance tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.acceptance.project import Project, server


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for all runs of this file."""
    with server(tmp_path_factory.mktemp("prefect")) as address:
        yield address


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, api: str) -> Project:
    """A project in which the experiment has run once, undisturbed."""
    project = Project(tmp_path_factory.mktemp("finished") / "project", api)
    said = project.run()
    assert "Score S" in said
    assert "Where to look next" in said
    assert "Traceback" not in said
    assert "warning" not in said
    return project
