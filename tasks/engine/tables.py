"""Tables of pieces (Parquet)."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow
import pyarrow.parquet as parquet

from tasks.engine.artifacts import Artifact, store_piece


def store_table(step: str, table: pyarrow.Table) -> Artifact:
    """Put a table into the cache."""
    return store_piece(step, ".parquet", lambda path: parquet.write_table(table, path))


def read_tables(files: Iterable[Artifact], schema: pyarrow.Schema | None = None) -> pyarrow.Table:
    """The rows of all files, in order; without files an empty table of the schema."""
    tables = [parquet.read_table(file.checked()) for file in files]
    return pyarrow.concat_tables(tables) if tables or schema is None else schema.empty_table()
