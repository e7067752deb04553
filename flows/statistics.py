"""Step 4: collect the second moments of the edited layers' keys, over a corpus or over texts that
the model writes, or import published ones.

Results: `artifacts/statistics/` with one Parquet file a layer, the held-out text (of a corpus), and
`statistics.json` with the amount of text that was read.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from flows.command.parameters import Parameters, StatisticsSection
from flows.requests import records_to_keep
from flows.service.step import Run, step
from memit.corpus import read_documents
from memit.facts.subjects import default_share
from memit.files.reading import check_file
from memit.sampled_corpus import TEXTS_AT_ONCE, missing_batches, wanted_tokens
from tasks.engine.artifacts import Artifact, describe
from tasks.engine.hub import resolve_commit
from tasks.engine.results import HELD_OUT_FILE, STATISTICS, STATISTICS_FILE, WORLD
from tasks.model import model_without_weights
from tasks.statistics import (
    Corpus,
    CorpusSource,
    Range,
    Shard,
    collect_corpus,
    collect_shard,
    collect_subjects,
    describe_moment,
    find_published,
    held_out_file,
    import_moment,
    keep_texts,
    merge_shards,
    sampled_corpus,
    write_texts,
)


@dataclass(frozen=True)
class Collected:
    """Sums of the keys of some layers, before they are added up."""

    shards: Mapping[int, Sequence[Shard]]
    """Of each layer."""
    provenance: Mapping[int, dict[str, Any]]
    """What each layer's file says of its origin."""
    described: dict[str, Any]
    """What `statistics.json` says of their origin."""
    held_out: Artifact | None
    """Text that was not read; None where there is no text."""
    subjects: Shard | None = None
    """Sums over subjects that have a share in C."""
    share: float = 0.0

    def write(self, folder: Path) -> tuple[dict[int, Path], int]:
        """Add up and write a file for each layer; return them and the fewest tokens of a layer."""
        paths = {layer: folder / f"layer-{layer:02}.parquet" for layer in self.shards}
        tokens = [
            merge_shards(
                self.shards[layer], self.provenance[layer], path, self.subjects, self.share
            )
            for layer, path in paths.items()
        ]
        return paths, min(tokens)


@step("statistics", reads=("model",))
def statistics(run: Run) -> None:
    """Collect the shards that are missing and add all of them up."""
    layers = run.hyperparameters.layers
    found = collect_layers(run, layers)
    paths, tokens = found.write(STATISTICS)
    run.files += paths.values()
    origin = {"layers": list(layers), "model": run.model.model.digest, "tokens": tokens}
    run.write_json(STATISTICS_FILE, found.described | origin)
    if found.held_out is not None:
        run.copy(found.held_out, HELD_OUT_FILE)


def collect_layers(run: Run, layers: Sequence[int], *, tuning: bool = False) -> Collected:
    """The sums of some layers over the text that `statistics` names, or published ones, and over
    subjects that have a share in C."""
    found, section = _collect(run, layers), run.parameters.statistics
    share = default_share(run.model.model.shape) if section.subjects == "auto" else section.subjects
    if not share:
        return found
    records = records_to_keep(run.parameters, tuning=tuning)
    budget = run.token_budget(section.token_budget)
    subjects = run.compute(collect_subjects, records, run.model, tuple(layers), budget)
    origin = {"subjects": records.sha256, "subjects_share": share}
    return replace(
        found,
        provenance={layer: origin | each for layer, each in found.provenance.items()},
        described=found.described | origin,
        subjects=subjects,
        share=share,
    )


def _collect(run: Run, layers: Sequence[int]) -> Collected:
    section = run.parameters.statistics
    if section.source == "published":
        return _import_layers(run, Path(str(section.path)), layers)
    if section.source == "sampled":
        corpus = _sample(run)
    else:
        corpus = run.compute(collect_corpus, *corpus_inputs(run.parameters))
    counts = {part.texts.sha256: part.count for part in corpus.ranges}
    shards: list[Shard] = run.map(
        "documents",
        collect_shard,
        [part.texts for part in corpus.ranges],
        lambda texts: counts[texts.sha256],
        model=run.model,
        layers=tuple(layers),
        token_budget=run.token_budget(section.token_budget),
    )
    return Collected(
        shards=dict.fromkeys(layers, shards),
        provenance={layer: describe_moment(run.model, corpus.digest, layer) for layer in layers},
        described={
            "corpus": corpus.digest,
            "documents": sum(part.count for part in corpus.ranges),
            "held_out_documents": corpus.held_out.count,
        },
        held_out=corpus.held_out.texts,
    )


def _sample(run: Run) -> Corpus:
    """Texts that the model writes until they have the wanted tokens, and held-out text."""
    section, batches = run.parameters.statistics, []
    wanted = wanted_tokens(section.tokens, run.model.model.inner_width)
    held_out = _held_out(section)
    while numbers := missing_batches(wanted, [batch.tokens for batch in batches]):
        batches += run.map(
            "texts",
            write_texts,
            numbers,
            lambda _: TEXTS_AT_ONCE,
            model=run.model,
            seed=section.seed,
        )
    return sampled_corpus(batches, section.documents_per_shard, held_out)


def _held_out(section: StatisticsSection) -> Range:
    """The text for the perplexity that the user names, or that of the package."""
    documents = read_documents(held_out_file(section.held_out), column=section.column)
    return keep_texts(list(islice(documents, section.held_out_documents)))


def _import_layers(run: Run, directory: Path, layers: Sequence[int]) -> Collected:
    model = run.model
    place = model.model.within(Path(model.directory))
    lm = model_without_weights(model.model.id, model.model.revision, place)
    files = {n: describe(path) for n, path in find_published(directory, lm, layers).items()}
    names = {layer: Path(file.path).name for layer, file in files.items()}
    provenance = {
        layer: describe_moment(model, file.sha256, layer) | {"published": names[layer]}
        for layer, file in files.items()
    }
    shards: dict[int, list[Shard]] = {
        layer: [run.compute(import_moment, file, provenance[layer], model.model.inner_width)]
        for layer, file in files.items()
    }
    section = run.parameters.statistics
    held_out = _held_out(section) if section.held_out and section.held_out_documents else None
    together = "".join(file.sha256 for file in files.values())
    return Collected(
        shards=shards,
        provenance=provenance,
        described={
            "corpus": hashlib.sha256(together.encode()).hexdigest(),
            "documents": None,
            "held_out_documents": held_out.count if held_out else 0,
            "published": {names[layer]: file.sha256 for layer, file in files.items()},
        },
        held_out=held_out and held_out.texts,
    )


def corpus_inputs(parameters: Parameters) -> tuple[CorpusSource, int | None, int, int]:
    """What `collect_corpus` needs for the documents that the section `statistics` names."""
    section = parameters.statistics
    counts = section.documents, section.documents_per_shard, section.held_out_documents
    return corpus_source(parameters), *counts


def corpus_source(parameters: Parameters) -> CorpusSource:
    """Where the section `statistics` finds its documents."""
    section = parameters.statistics
    held_out = describe(held_out_file(section.held_out)) if section.held_out is not None else None
    if section.source == "synthetic":
        return CorpusSource(
            file=describe(WORLD / "corpus.txt"),
            held_out=held_out or describe(WORLD / "held_out.txt"),
        )
    if section.source == "dataset":
        name = str(section.dataset)
        return CorpusSource(
            dataset=name,
            configuration=section.configuration,
            revision=resolve_commit(name, str(section.revision), "dataset"),
            column=section.column,
            held_out=held_out,
        )
    path = Path(str(section.path))
    check_file(path, "the corpus", size_limit=None)
    return CorpusSource(file=describe(path), column=section.column, held_out=held_out)
