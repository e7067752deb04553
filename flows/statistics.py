"""Step 4: what the edited layers are used to. Second moments of their keys over a corpus.

Results: ``artifacts/statistics/`` with one Parquet file a layer, the held-out text, and
``statistics.json`` saying how much text was read.
"""

from __future__ import annotations

from pathlib import Path

from flows.command import given_parameters, run_flow
from flows.parameters import Parameters

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from flows.gpu import taking_turns
from flows.runner import with_runner
from memit.reading import check_file
from tasks.artifacts import copy_file, describe, keep_only, write_json
from tasks.corpus import Corpus, CorpusSource, collect_corpus
from tasks.loading import ModelReference, token_budget
from tasks.model import open_model, resolve_commit
from tasks.progress import gather
from tasks.results import HELD_OUT_FILE, STATISTICS, STATISTICS_FILE, WORLD, finish_step, upstream
from tasks.runners import scatter, thread_runner
from tasks.statistics import Shard, collect_shard, describe_moment, merge_shards


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
    section = parameters.statistics
    model = open_model(**parameters.model.placement())
    layers = parameters.hyperparameters(model.model.id, model.model.layers).layers
    corpus = corpus_of(parameters)
    shards = gather(
        "statistics",
        "documents",
        scatter(
            collect_shard,
            [part.texts for part in corpus.ranges],
            model=model,
            layers=layers,
            token_budget=token_budget(section.token_budget, model),
        ),
        [part.count for part in corpus.ranges],
    )
    files = _merge(corpus, shards, model, layers)
    finish_step("statistics", files, given, [corpus.cost, *(shard.cost for shard in shards)])


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


def _merge(
    corpus: Corpus, shards: list[Shard], model: ModelReference, layers: tuple[int, ...]
) -> list[Path]:
    """Write the results and give their paths."""
    paths = {layer: STATISTICS / f"layer-{layer:02}.parquet" for layer in layers}
    tokens = {
        merge_shards(shards, describe_moment(model, corpus.digest, layer), path)
        for layer, path in paths.items()
    }
    copy_file(corpus.held_out.texts.checked(), HELD_OUT_FILE)
    said = {
        "corpus": corpus.digest,
        "documents": sum(part.count for part in corpus.ranges),
        "held_out_documents": corpus.held_out.count,
        "layers": list(layers),
        "model": model.model.digest,
        "tokens": tokens.pop(),
    }
    write_json(STATISTICS_FILE, said)
    files = [*paths.values(), HELD_OUT_FILE, STATISTICS_FILE]
    keep_only(STATISTICS, {path.name for path in files})
    return files


if __name__ == "__main__":
    run_flow(statistics)
