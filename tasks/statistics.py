"""The tasks of the step `statistics`: its corpus, and second moments of the keys over it.

The corpus is written down once, in ranges of some documents: a shard of the statistics is then a
range of a local file, whatever the text was streamed from, and the file's digest identifies it.
The shards of a layer hold sums and add up exactly; only the sums over all of them are results.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from memit.corpus import read_documents
from memit.errors import InputError, IntegrityError
from memit.files.reading import check_file
from memit.language_model import LanguageModel
from memit.requests import read_counterfact
from memit.sampled_corpus import sample_batch, texts_table
from memit.second_moment import (
    SecondMoment,
    check_rank,
    collect_second_moments,
    collect_subject_moments,
    import_published,
    read_moment,
    with_subjects,
    write_moment,
)
from tasks.engine.artifacts import Artifact, Value, store_piece, write_file
from tasks.engine.cache import cached_task
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import advance
from tasks.engine.retry import retry_unreachable
from tasks.engine.tables import read_tables, store_table


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
    def cache_key(self) -> dict[str, object]:
        """What it holds, and the suffixes by which its files are read."""
        suffixes = [file and file.file.suffix for file in (self.file, self.held_out)]
        return {**dict(self), "suffixes": suffixes}

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return str(self.file.file if self.file else self.dataset)

    def read(self, file: Artifact | None) -> Iterator[str]:
        """The documents, in order: those of a file, or of the data set where there is none."""
        if file is not None:
            return read_documents(file.checked(), column=self.column)
        return read_documents(
            str(self.dataset),
            column=self.column,
            config=self.configuration,
            revision=self.revision,
        )


class Range(Value):
    """Consecutive documents, in a file of their own (Parquet with a column `text`, and one with
    their `ids` where the model wrote them)."""

    texts: Artifact
    count: int


class Corpus(Value):
    """The documents that statistics are collected over, and those kept for the perplexity."""

    ranges: tuple[Range, ...]
    held_out: Range

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
    ranges, held_out = _write_down(source, documents, documents_per_shard, held_out_documents)
    if not ranges:
        raise InputError(f"{source.name} holds no documents: give statistics another corpus.")
    return Corpus(ranges=tuple(ranges), held_out=held_out)


@retry_unreachable
def _write_down(
    source: CorpusSource, documents: int | None, documents_per_shard: int, held_out_documents: int
) -> tuple[list[Range], Range]:
    texts = source.read(source.file)
    first = texts if documents is None else islice(texts, documents)
    ranges = []
    while group := list(islice(first, documents_per_shard)):
        ranges.append(keep_texts(group))
    rest = source.read(source.held_out) if source.held_out else texts
    return ranges, keep_texts(list(islice(rest, held_out_documents)))


class SampledTexts(Value):
    """A batch of texts that the model wrote (Parquet, see `memit.sampled_corpus.texts_table`)."""

    texts: Artifact
    tokens: int


@cached_task("sampling")
def write_texts(number: int, model: ModelReference, seed: int) -> SampledTexts:
    """Let the unedited model write batch `number` of its texts."""
    with loaded(model, shared=True) as lm:
        rows = sample_batch(lm, number, seed)
        table = texts_table(lm, rows)
    texts = store_table("sampling", table)
    return SampledTexts(texts=texts, tokens=sum(map(len, rows)))


def sampled_corpus(
    batches: Sequence[SampledTexts], texts_per_shard: int, held_out: Range
) -> Corpus:
    """The texts of all batches, in ranges as those of another corpus."""
    texts = read_tables(batch.texts for batch in batches)
    starts = range(0, len(texts), texts_per_shard)
    return Corpus(
        ranges=tuple(_keep_table(texts.slice(start, texts_per_shard)) for start in starts),
        held_out=held_out,
    )


def held_out_file(given: str | None) -> Path:
    """The file with held-out text that the user names, or that of the package.

    Raises:
        InputError: there is no such file.
    """
    path = Path(given or str(files("memit.facts") / "held_out.txt"))
    check_file(path, "the held-out text (statistics.held_out)", size_limit=None)
    return path


def read_texts(path: Path) -> list[str]:
    """The documents of a range's file."""
    return parquet.read_table(path)["text"].to_pylist()


def keep_texts(texts: list[str]) -> Range:
    """The range of some documents."""
    return _keep_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}))


def _keep_table(table: pyarrow.Table) -> Range:
    return Range(texts=store_table("corpus", table), count=len(table))


class Shard(Value):
    """The sums of one range of documents."""

    moments: dict[int, Artifact]
    """The file of each layer (Parquet)."""


@cached_task("statistics")
def collect_shard(
    texts: Artifact, model: ModelReference, layers: Sequence[int], token_budget: int
) -> Shard:
    """Sum k kᵀ over the documents of one range, for all layers in one pass."""
    table = parquet.read_table(texts.checked())
    documents = table["ids" if "ids" in table.column_names else "text"].to_pylist()
    with loaded(model, shared=True) as lm:
        moments = collect_second_moments(
            lm, documents, layers, token_budget=token_budget, progress=advance
        )
    return _stored(moments, model, texts)


@cached_task("subjects")
def collect_subjects(
    records: Artifact, model: ModelReference, layers: Sequence[int], token_budget: int
) -> Shard:
    """Sum k kᵀ over the last tokens of the records' subjects, for all layers in one pass."""
    requests = [record.request for record in read_counterfact(records.checked())]
    with loaded(model, shared=True) as lm:
        moments = collect_subject_moments(lm, requests, layers, token_budget=token_budget)
    return _stored(moments, model, records)


def _stored(moments: Mapping[int, SecondMoment], model: ModelReference, of: Artifact) -> Shard:
    files = {}
    for layer, moment in moments.items():
        provenance = describe_moment(model, of.sha256, layer)
        files[layer] = store_piece(
            "statistics", ".parquet", lambda path, m=moment, p=provenance: write_moment(m, path, p)
        )
    return Shard(moments=files)


@cached_task("import")
def import_moment(file: Artifact, provenance: Mapping[str, Any], width: int) -> Shard:
    """Read one layer's sums (`width` × `width`) that others published: a shard that is all.

    Raises:
        IntegrityError: the file does not hold such sums.
        NumericsError: they are not positive definite.
    """
    moment = import_published(file.checked(), width)
    piece = store_piece(
        "statistics", ".parquet", lambda path: write_moment(moment, path, provenance)
    )
    return Shard(moments={provenance["layer"]: piece})


def find_published(directory: Path, lm: LanguageModel, layers: Sequence[int]) -> dict[int, Path]:
    """Each layer's file, which published code names after the module of the down-projection.

    Raises:
        InputError: there is none for a layer, or there are several.
    """
    if not os.path.isdir(directory):
        raise InputError(
            f"{directory} is no directory: statistics.path must be one with the published .npz of "
            "each layer."
        )
    found = {}
    for layer in layers:
        wanted = f"{lm.weight_name(layer).removesuffix('.weight')}_float32_mom2_*.npz"
        files = sorted(directory.glob(wanted))
        if not files:
            raise InputError(
                f"{directory} holds no {wanted}, the published second moment of layer {layer}: "
                "fetch it, or let statistics.source name a corpus."
            )
        if len(files) > 1:
            raise InputError(
                f"{directory} holds {files[0].name} and {files[1].name}, both for layer {layer}: "
                "leave one of them."
            )
        found[layer] = files[0]
    return found


def describe_moment(model: ModelReference, corpus: str, layer: int) -> dict[str, Any]:
    """What a file of second moments says of itself; `corpus` is the digest of the text."""
    return {
        "model": model.model.digest,
        "model_id": model.model.id,
        "revision": model.model.revision,
        "layer": layer,
        "corpus": corpus,
    }


def merge_shards(
    shards: Sequence[Shard],
    provenance: dict[str, Any],
    path: Path,
    subjects: Shard | None = None,
    share: float = 0.0,
) -> int:
    """Add up one layer's shards, in their order, give the `subjects` their `share`, and write the
    sum; gives the number of tokens.

    Raises:
        InputError: there are fewer tokens than a key has dimensions.
        IntegrityError: a shard belongs to another model or layer.
    """
    total = None
    for shard in shards:
        file = shard.moments[provenance["layer"]]
        moment, provenance_read = read_moment(file.checked())
        if any(provenance_read.get(name) != provenance[name] for name in ("model", "layer")):
            raise IntegrityError(
                f"{file.file} is a shard of other statistics: delete .cache/ and run again."
            )
        total = moment if total is None else total + moment
    assert total is not None, "a corpus has at least one range"
    check_rank(total, f"layer {provenance['layer']}")
    if subjects is not None:
        at_subjects, _ = read_moment(subjects.moments[provenance["layer"]].checked())
        total = with_subjects(total, at_subjects, share)
    write_file(path, lambda partial: write_moment(total, partial, provenance))
    return total.count
