"""One Prefect server and one finished experiment for all acceptance tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.acceptance.project import Project


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for all runs of this file."""
    from flows.server import prefect_server

    kept = {name: os.environ.get(name) for name in ("PREFECT_HOME", "PREFECT_API_URL")}
    os.environ["PREFECT_HOME"] = str(tmp_path_factory.mktemp("prefect"))
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
