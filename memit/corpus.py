"""Text corpora: one document after another from a file or from a streamed data set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from memit.errors import InputError, UnreachableError
from memit.reading import check_file

LONGEST_LINE = 1 << 24
"""Characters of the longest line that is read."""
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")
_FILE_KINDS = (".txt", ".jsonl", ".parquet")


def read_documents(
    source: str | Path,
    *,
    start: int = 0,
    stop: int | None = None,
    column: str = "text",
    config: str | None = None,
    revision: str | None = None,
) -> Iterator[str]:
    """Documents `start` to `stop` (exclusive) of a corpus, in its order; blank ones are left out.

    `source` is a `.txt` file (a document a line), a `.jsonl` or `.parquet` file with a text
    `column`, or the name of a data set on the Hugging Face hub, streamed from its train split, with
    its `config` and `revision`. A document's number is its line or row, so that ranges of any
    size put together give the whole corpus. Raises `InputError` naming the file and the line, or
    `UnreachableError`.
    """
    documents = _documents(source, start, stop, column, config, revision)
    return (document for document in documents if document.strip())


def is_file(source: str | Path) -> bool:
    """Whether a corpus is a file rather than a data set on the hub."""
    path = Path(source)
    return path.suffix in _FILE_KINDS or path.exists()


def _documents(
    source: str | Path,
    start: int,
    stop: int | None,
    column: str,
    config: str | None,
    revision: str | None,
) -> Iterator[str]:
    if not is_file(source):
        return _streamed(str(source), start, stop, column, config, revision)
    path = Path(source)
    if path.suffix == ".parquet":
        return _parquet_rows(path, start, stop, column)
    if path.suffix == ".jsonl":
        return islice(_json_texts(path, start, column), _count(start, stop))
    if path.suffix == ".txt":
        return islice(_lines(path), start, stop)
    raise InputError(
        f"{path} is no corpus that can be read: give a {', '.join(_FILE_KINDS)} file or the name "
        "of a data set on the hub."
    )


def _count(start: int, stop: int | None) -> int | None:
    return None if stop is None else max(0, stop - start)


def _lines(path: Path) -> Iterator[str]:
    check_file(path, "the corpus", size_limit=None)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), start=1):
                if len(line) == LONGEST_LINE or "\0" in line:
                    wrong = "holds a NUL character" if "\0" in line else "has no end"
                    raise InputError(f"{path} is no text: its line {number} {wrong}; convert it.")
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}): convert it.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from None


def _json_texts(path: Path, start: int, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if number <= start:
            continue
        yield _json_text(path, number, line, column) if line.strip() else ""


def _json_text(path: Path, number: int, line: str, column: str) -> str:
    try:
        text = json.loads(line)[column]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise InputError(
            f"{path}, line {number} is no JSON object with a text under {column!r}: "
            "correct the line, or name the column that holds the text."
        )
    if _HALF_CHARACTER.search(text):
        raise InputError(f"{path}, line {number} holds half a character: correct it.")
    return text


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_file(path, "the corpus", size_limit=None)
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is no whole Parquet file ({error}): fetch it again.") from None


def _parquet_rows(path: Path, start: int, stop: int | None, column: str) -> Iterator[str]:
    import pyarrow as pa

    with _parquet(path) as file:
        _check_column(path, file.schema_arrow, column)
        skipped = 0
        try:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if skipped + rows > start and (stop is None or skipped < stop):
                    texts = file.read_row_group(group, columns=[column])[column]
                    end = rows if stop is None else min(rows, stop - skipped)
                    for text in texts.slice(max(0, start - skipped), end - max(0, start - skipped)):
                        yield text.as_py() or ""
                skipped += rows
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is damaged ({error}): fetch it again.") from None


def _check_column(path: Path, schema: Any, column: str) -> None:
    import pyarrow.types as types

    fields = [field for field in schema if field.name == column]
    if len(fields) != 1:
        has = "several columns" if fields else "no column"
        raise InputError(f"{path} has {has} {column!r}: name one of {', '.join(schema.names)}.")
    kind = fields[0].type.value_type if types.is_dictionary(fields[0].type) else fields[0].type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise InputError(f"{path} holds {kind} under {column!r}: name a column of texts.")


def _streamed(
    name: str,
    start: int,
    stop: int | None,
    column: str,
    config: str | None,
    revision: str | None,
) -> Iterator[str]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = datasets.load_dataset(
            name, config, split="train", streaming=True, revision=revision
        ).skip(start)
        for row in rows if stop is None else rows.take(max(0, stop - start)):
            if not isinstance(row.get(column), str):
                raise InputError(
                    f"the data set {name} has no text column {column!r}: "
                    f"name one of {', '.join(row)}."
                )
            yield row[column]
    except InputError:
        raise
    except DatasetNotFoundError:
        raise InputError(
            f"the hub has no data set {name} at revision {revision}: check its name and revision "
            "(a private one needs a login: hf auth login)."
        ) from None
    except Exception as error:  # the hub's clients raise errors of many libraries
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UnreachableError(
            f"the data set {name} cannot be streamed from the hub ({reason}): check its name, "
            "config and revision and the network, or give a local .txt, .jsonl or .parquet file."
        ) from error
