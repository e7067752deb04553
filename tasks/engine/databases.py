"""Check the SQLite databases of Prefect and MLflow before they are used."""

import sqlite3
from contextlib import closing
from pathlib import Path

from memit.errors import ResourceError

LOCK_SECONDS = 10.0
"""How long another process may hold one."""
HELD = {
    "Prefect": "away: it holds no results",
    "MLflow": "away and keep it: it holds the record of earlier runs",
}
"""Where a database that cannot be used may be moved, and what goes with it, by its owner."""


def check_database(path: Path, owner: str, migrations: Path) -> None:
    """Check that a database, if it exists, can be written and has a schema that `owner` knows.

    Raises:
        ResourceError: it is locked, damaged, read-only, or of a version not among `migrations`.
    """
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as base:
            base.execute("begin immediate")
            base.execute("create table written (here text)")  # rolled back below
            tables = {name for (name,) in base.execute("select name from sqlite_master")}
            schema = "select version_num from alembic_version"
            found = base.execute(schema).fetchall() if "alembic_version" in tables else []
            base.rollback()
    except sqlite3.Error as error:
        cure = f"make it readable and writable, or move it {HELD[owner]}"
        if "locked" in str(error):
            cure = "end the program that holds it"
        raise ResourceError(f"{path} cannot be used ({error}): {cure}.") from error
    known = "".join(file.read_text(encoding="utf-8") for file in migrations.glob("*.py"))
    if any(str(version) not in known for (version,) in found):
        raise ResourceError(
            f"{path} was written by a newer {owner} than the one here: install that, or move the "
            f"file {HELD[owner]}."
        )
