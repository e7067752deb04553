"""The texts of the step ``statistics``, written down once.

A shard of the statistics is then a range of a local file, whatever the text was streamed from, and
the digest of that file says exactly which text it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from memit.errors import InputError
from tasks.engine.artifacts import Artifact, Value, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.cost import Cost, Meter
from tasks.engine.retry import patient


class CorpusSource(Value):
    """Where documents come from; streamed, never held in memory as a whole."""

    file: Artifact | None = None
    """A text file (a document a line), JSONL or Parquet."""
    dataset: str | None = None
    """A Hugging Face data set, where there is no file."""
    configuration: str | None = None
    revision: str | None = None
    column: str = "text"
    held_out: Artifact | None = None
    """A file with the held-out documents, where they do not follow the others."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return str(self.file.file if self.file else self.dataset)

    def read(self) -> Iterator[str]:
        """The documents, in order."""
        return _read(self.file, self)

    def read_held_out(self) -> Iterator[str]:
        """The documents of the held-out file."""
        return _read(self.held_out, self)


class Range(Value):
    """Consecutive documents, in a file of their own (Parquet with one column, ``text``)."""

    texts: Artifact
    count: int


class Corpus(Value):
    """The documents that statistics are collected over, and those kept for the perplexity."""

    ranges: tuple[Range, ...]
    held_out: Range
    cost: Cost

    @property
    def digest(self) -> str:
        """SHA-256 over the contents of all ranges."""
        return hashlib.sha256("".join(r.texts.sha256 for r in self.ranges).encode()).hexdigest()


@cached_task("corpus")
def collect_corpus(
    source: CorpusSource,
    documents: int | None,
    documents_per_shard: int,
    held_out_documents: int,
) -> Corpus:
    """Write down the first documents of a source, and as held-out text those that follow."""
    with Meter() as meter:
        ranges, held_out = _write_down(source, documents, documents_per_shard, held_out_documents)
    if not ranges:
        raise InputError(f"{source.name} holds no documents: give statistics another corpus.")
    return Corpus(ranges=tuple(ranges), held_out=held_out, cost=meter.cost)


@patient
def _write_down(
    source: CorpusSource, documents: int | None, documents_per_shard: int, held_out_documents: int
) -> tuple[list[Range], Range]:
    texts = source.read()
    first = texts if documents is None else islice(texts, documents)
    ranges = []
    while group := list(islice(first, documents_per_shard)):
        ranges.append(_keep(group))
    rest = source.read_held_out() if source.held_out else texts
    return ranges, _keep(list(islice(rest, held_out_documents)))


def read_texts(path: Path) -> list[str]:
    """The documents of a range's file."""
    import pyarrow.parquet as parquet

    return parquet.read_table(path)["text"].to_pylist()


def _keep(texts: list[str]) -> Range:
    import pyarrow
    import pyarrow.parquet as parquet

    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
    piece = store_piece("corpus", ".parquet", lambda path: parquet.write_table(table, path))
    return Range(texts=piece, count=len(texts))


def _read(file: Artifact | None, source: CorpusSource) -> Iterator[str]:
    from memit.corpus import read_documents

    if file is not None:
        return read_documents(file.checked(), column=source.column)
    return read_documents(
        str(source.dataset),
        column=source.column,
        config=source.configuration,
        revision=source.revision,
    )
