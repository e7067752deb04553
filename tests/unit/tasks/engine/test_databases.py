"""Databases of Prefect and MLflow that cannot be used are refused at once."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from memit.errors import ResourceError
from tasks.engine import databases
from tasks.engine.databases import check_database


@pytest.fixture
def migrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(databases, "LOCK_SECONDS", 0.2)
    folder = tmp_path / "versions"
    folder.mkdir()
    (folder / "0001_first.py").write_text('revision = "abc123"\n')
    return folder


def base_of_version(path: Path, version: str) -> Path:
    with closing(sqlite3.connect(path)) as base, base:
        base.execute("create table alembic_version (version_num)")
        base.execute("insert into alembic_version values (?)", (version,))
    return path


def refused(path: Path, migrations: Path, owner: str = "Prefect") -> str:
    started = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        check_database(path, owner, migrations)
    assert time.monotonic() - started < 5
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_one_of_a_known_version_is_left_as_it_is(tmp_path: Path, migrations: Path) -> None:
    path = base_of_version(tmp_path / "a.db", "abc123")
    before = path.read_bytes()
    check_database(path, "Prefect", migrations)
    assert path.read_bytes() == before


def test_one_that_is_absent_or_in_the_making(tmp_path: Path, migrations: Path) -> None:
    check_database(tmp_path / "absent.db", "Prefect", migrations)
    assert not (tmp_path / "absent.db").exists()
    (tmp_path / "empty.db").touch()
    check_database(tmp_path / "empty.db", "Prefect", migrations)


def test_one_of_a_newer_version(tmp_path: Path, migrations: Path) -> None:
    path = base_of_version(tmp_path / "a.db", "ffffffffffff")
    assert "newer Prefect" in refused(path, migrations)
    assert "keep it: it holds the record of earlier runs" in refused(path, migrations, "MLflow")


def test_one_that_is_damaged_or_none(tmp_path: Path, migrations: Path) -> None:
    (tmp_path / "text.db").write_bytes(b"no data base at all" * 100)
    assert "move it away" in refused(tmp_path / "text.db", migrations)
    (tmp_path / "folder.db").mkdir()
    assert "move it away" in refused(tmp_path / "folder.db", migrations)
    torn = base_of_version(tmp_path / "torn.db", "abc123")
    torn.write_bytes(torn.read_bytes()[:4096])
    assert "move it away" in refused(torn, migrations)


def test_one_that_another_process_holds(tmp_path: Path, migrations: Path) -> None:
    path = base_of_version(tmp_path / "a.db", "abc123")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("begin exclusive")
        said = refused(path, migrations)
    assert "end the program" in said
    assert "away" not in said
