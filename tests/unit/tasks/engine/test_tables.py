"""Tables of results are read as they were written."""

from pathlib import Path

import pyarrow as pa
from pyarrow.csv import write_csv

from tasks.engine.tables import read_csv_table

SCHEMA = pa.schema([("case_id", pa.int64()), ("answer", pa.string()), ("took", pa.bool_())])


def test_a_long_csv_with_line_breaks_and_numbers_as_text(tmp_path: Path) -> None:
    """Longer than a block of the reader, with breaks at its borders."""
    rows = [
        {"case_id": n, "answer": f"00{n}\n" + "x" * 90 + "\n", "took": None, "id": f"0{n % 7}"}
        for n in range(12_000)
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA.append(pa.field("id", pa.string())))
    write_csv(table, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").stat().st_size > 1 << 20
    assert read_csv_table(tmp_path / "table.csv", SCHEMA) == table
