"""Tables of pieces (Parquet) and of results (CSV)."""

import csv
from collections.abc import Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
from pyarrow.csv import ConvertOptions, ParseOptions, read_csv

from tasks.engine.artifacts import Artifact, store_piece


def store_table(step: str, table: pyarrow.Table) -> Artifact:
    """Put a table into the cache."""
    return store_piece(step, ".parquet", lambda path: parquet.write_table(table, path))


def read_tables(files: Iterable[Artifact], schema: pyarrow.Schema | None = None) -> pyarrow.Table:
    """The rows of all files, in order; without files an empty table of the schema."""
    tables = [parquet.read_table(file.checked()) for file in files]
    return pyarrow.concat_tables(tables) if tables or schema is None else schema.empty_table()


def read_csv_table(path: Path, schema: pyarrow.Schema) -> pyarrow.Table:
    """A CSV file of results. Columns that the schema does not name are text."""
    with path.open(encoding="utf-8", newline="") as file:
        types = dict.fromkeys(next(csv.reader(file)), pyarrow.string())
    types |= {field.name: field.type for field in schema}
    lines = ParseOptions(newlines_in_values=True)  # prompts and answers may have some
    return read_csv(path, parse_options=lines, convert_options=ConvertOptions(column_types=types))
