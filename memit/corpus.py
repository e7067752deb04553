"""Text corpora: the documents of a file or of a streamed data set."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from memit.errors import InputError, UnreachableError
from memit.files.reading import check_file

_FILE_KINDS = (".txt", ".jsonl", ".parquet")


def read_documents(
    source: str | Path,
    *,
    stop: int | None = None,
    column: str = "text",
    config: str | None = None,
    revision: str | None = None,
) -> Iterator[str]:
    """The documents of a corpus in its order, blank ones left out.

    `source` is a `.txt` file (a document a line), a `.jsonl` or `.parquet` file with a text
    `column`, or the name of a data set on the Hugging Face hub, streamed from its train split, with
    its `config` and `revision`. `stop` is the number of lines or rows that are read; None: all of
    them. Raises `InputError` naming the file and the line, or `UnreachableError`.
    """
    path = Path(source)
    if path.suffix not in _FILE_KINDS and not path.exists():
        documents = _streamed(str(source), column, config, revision)
    elif path.suffix == ".parquet":
        documents = _parquet_rows(path, column)
    elif path.suffix == ".jsonl":
        documents = _json_texts(path, column)
    elif path.suffix == ".txt":
        documents = _lines(path)
    else:
        raise InputError(
            f"{path} is no corpus that can be read: give a {', '.join(_FILE_KINDS)} file or the "
            "name of a data set on the hub."
        )
    return (document for document in islice(documents, stop) if document.strip())


def _lines(path: Path) -> Iterator[str]:
    check_file(path, "the corpus", size_limit=None)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}): convert it.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from None


def _json_texts(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            text = json.loads(line)[column] if line.strip() else ""
            text.encode()  # half a surrogate pair, which JSON can spell, is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(
                f"{path}, line {number} is no JSON object with a text under {column!r}: "
                "correct the line, or name the column that holds the text."
            ) from None
        yield text


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    check_file(path, "the corpus", size_limit=None)
    with reading_parquet(path), pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if names.count(column) != 1:
            raise InputError(
                f"{path} has no single column {column!r}: name one of {', '.join(names)}."
            )
        for batch in file.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise InputError(
                        f"{path} holds {text!r:.60} under {column!r}: name a column of texts."
                    )
                yield text or ""


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged Parquet file into an `InputError`."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no whole Parquet file ({error}): fetch it again.") from None


def _streamed(name: str, column: str, config: str | None, revision: str | None) -> Iterator[str]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = datasets.load_dataset(name, config, split="train", streaming=True, revision=revision)
        for row in rows:
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
