"""Step 4: what the edited layers are used to. Second moments of their keys over a corpus,
collected here or published by others.

Results: ``artifacts/statistics/`` with one Parquet file a layer, the held-out text (of a corpus),
and ``statistics.json`` saying how much text was read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.command.parameters import Parameters
from flows.command.script import given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from flows.service.gpu_slot import taking_turns
from flows.service.workers import with_runner
from memit.files.reading import check_file
from tasks.corpus import Corpus, CorpusSource, collect_corpus
from tasks.engine.artifacts import Artifact, copy_file, describe, write_json
from tasks.engine.cost import Cost
from tasks.engine.loaded_model import ModelReference, token_budget
from tasks.engine.progress import gather
from tasks.engine.results import (
    HELD_OUT_FILE,
    STATISTICS,
    STATISTICS_FILE,
    WORLD,
    finish_step,
    upstream,
)
from tasks.engine.workers import scatter, thread_runner
from tasks.model import model_without_weights, open_model, resolve_commit
from tasks.statistics import (
    Shard,
    collect_shard,
    describe_moment,
    find_published,
    import_moment,
    merge_shards,
)


@dataclass(frozen=True)
class Collected:
    """Sums of the keys of some layers, before they are added up."""

    shards: Mapping[int, Sequence[Shard]]
    """Of each layer."""
    provenance: Mapping[int, dict[str, Any]]
    """What each layer's file says of itself."""
    described: dict[str, Any]
    """What ``statistics.json`` says of their origin."""
    held_out: Artifact | None
    """Text that was not read; None where there is no text."""
    costs: Sequence[Cost]

    def write(self, folder: Path) -> tuple[dict[int, Path], int]:
        """Add up and write a file for each layer; gives them and the tokens of the least one."""
        paths = {layer: folder / f"layer-{layer:02}.parquet" for layer in self.shards}
        tokens = [
            merge_shards(self.shards[layer], self.provenance[layer], path)
            for layer, path in paths.items()
        ]
        return paths, min(tokens)


@flow(
    name="statistics",
    validate_parameters=False,
    task_runner=thread_runner(),
)
@taking_turns
@with_runner
def statistics(parameters: Parameters) -> None:
    """Collect the shards that are missing and add all of them up."""
    given = upstream("model")
    model = open_model(**parameters.model.placement())
    layers = parameters.hyperparameters(model.model.id, model.model.layers).layers
    found = collect_layers(parameters, model, layers)
    paths, tokens = found.write(STATISTICS)
    origin = {"layers": list(layers), "model": model.model.digest, "tokens": tokens}
    write_json(STATISTICS_FILE, found.described | origin)
    files = [*paths.values(), STATISTICS_FILE]
    if found.held_out is not None:
        copy_file(found.held_out.checked(), HELD_OUT_FILE)
        files.append(HELD_OUT_FILE)
    finish_step("statistics", files, given, found.costs)


def collect_layers(
    parameters: Parameters, model: ModelReference, layers: Sequence[int]
) -> Collected:
    """The sums of some layers over the text that ``statistics`` names, or those of others."""
    section = parameters.statistics
    if section.source == "published":
        return _import_layers(Path(str(section.path)), model, layers)
    corpus = corpus_of(parameters)
    shards: list[Shard] = gather(
        "statistics",
        "documents",
        scatter(
            collect_shard,
            [part.texts for part in corpus.ranges],
            model=model,
            layers=tuple(layers),
            token_budget=token_budget(section.token_budget, model),
        ),
        [part.count for part in corpus.ranges],
    )
    return Collected(
        shards=dict.fromkeys(layers, shards),
        provenance={layer: describe_moment(model, corpus.digest, layer) for layer in layers},
        described={
            "corpus": corpus.digest,
            "documents": sum(part.count for part in corpus.ranges),
            "held_out_documents": corpus.held_out.count,
        },
        held_out=corpus.held_out.texts,
        costs=[corpus.cost, *(shard.cost for shard in shards)],
    )


def _import_layers(directory: Path, model: ModelReference, layers: Sequence[int]) -> Collected:
    lm = model_without_weights(model.model.id, model.model.revision, Path(model.directory))
    files = {n: describe(path) for n, path in find_published(directory, lm, layers).items()}
    names = {layer: Path(file.path).name for layer, file in files.items()}
    provenance = {
        layer: describe_moment(model, file.sha256, layer) | {"published": names[layer]}
        for layer, file in files.items()
    }
    shards: dict[int, list[Shard]] = {
        layer: [import_moment(file, provenance[layer], model.model.inner_width)]
        for layer, file in files.items()
    }
    together = "".join(file.sha256 for file in files.values())
    return Collected(
        shards=shards,
        provenance=provenance,
        described={
            "corpus": hashlib.sha256(together.encode()).hexdigest(),
            "documents": None,
            "held_out_documents": 0,
            "published": {names[layer]: file.sha256 for layer, file in files.items()},
        },
        held_out=None,
        costs=[shard.cost for (shard,) in shards.values()],
    )


def corpus_of(parameters: Parameters) -> Corpus:
    """The documents that the section ``statistics`` names, written down once."""
    section = parameters.statistics
    return collect_corpus(
        corpus_source(parameters),
        section.documents,
        section.documents_per_shard,
        section.held_out_documents,
    )


def corpus_source(parameters: Parameters) -> CorpusSource:
    """Where the section ``statistics`` finds its documents."""
    section = parameters.statistics
    if section.source == "synthetic":
        return CorpusSource(
            file=describe(WORLD / "corpus.txt"), held_out=describe(WORLD / "held_out.txt")
        )
    if section.source == "dataset":
        name = str(section.dataset)
        return CorpusSource(
            dataset=name,
            configuration=section.configuration,
            revision=resolve_commit(name, str(section.revision), "dataset"),
            column=section.column,
        )
    path = Path(str(section.path))
    check_file(path, "the corpus", size_limit=None)
    return CorpusSource(file=describe(path), column=section.column)


if __name__ == "__main__":
    run_flow(statistics)
