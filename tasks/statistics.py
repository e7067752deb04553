"""The step ``statistics``: second moments of the keys, in shards of some documents each.

The shards of a layer hold sums and add up exactly; only the sums over all of them are results.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memit.errors import InputError, IntegrityError
from tasks.corpus import read_texts
from tasks.engine.artifacts import Artifact, Value, store_piece, write_file
from tasks.engine.cache import cached_task
from tasks.engine.cost import Cost, Meter
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import piece_progress

if TYPE_CHECKING:
    from memit.language_model import LanguageModel


class Shard(Value):
    """The sums of one range of documents."""

    moments: dict[int, Artifact]
    """The file of each layer (Parquet)."""
    cost: Cost


@cached_task("statistics")
def collect_shard(
    texts: Artifact, model: ModelReference, layers: Sequence[int], token_budget: int
) -> Shard:
    """Sum k kᵀ over the documents of one range, for all layers in one pass."""
    from memit.second_moment import collect_second_moments, write_moment

    documents = read_texts(texts.checked())
    with loaded(model) as lm, Meter() as meter, piece_progress("statistics") as progress:
        moments = collect_second_moments(
            lm, documents, layers, token_budget=token_budget, progress=progress
        )
    files = {}
    for layer, moment in moments.items():
        provenance = describe_moment(model, texts.sha256, layer)
        files[layer] = store_piece(
            "statistics", ".parquet", lambda path, m=moment, p=provenance: write_moment(m, path, p)
        )
    return Shard(moments=files, cost=meter.cost)


@cached_task("import")
def import_moment(file: Artifact, provenance: Mapping[str, Any], width: int) -> Shard:
    """Read one layer's sums (``width`` × ``width``) that others published: a shard that is all.

    Raises:
        IntegrityError: the file does not hold such sums.
        NumericsError: they are not positive definite.
    """
    from memit.second_moment import import_published, write_moment

    with Meter() as meter:
        moment = import_published(file.checked(), width)
        piece = store_piece(
            "statistics", ".parquet", lambda path: write_moment(moment, path, provenance)
        )
    return Shard(moments={provenance["layer"]: piece}, cost=meter.cost)


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
    """What a file of second moments says of itself; ``corpus`` is the digest of the text."""
    return {
        "model": model.model.digest,
        "model_id": model.model.id,
        "revision": model.model.revision,
        "layer": layer,
        "corpus": corpus,
    }


def merge_shards(shards: Sequence[Shard], provenance: dict[str, Any], path: Path) -> int:
    """Add up one layer's shards, in their order, and write the sum; gives the number of tokens.

    Raises:
        InputError: there are fewer tokens than a key has dimensions.
        IntegrityError: a shard belongs to another model or layer.
    """
    from memit.second_moment import check_rank, read_moment, write_moment

    total = None
    for shard in shards:
        file = shard.moments[provenance["layer"]]
        moment, said = read_moment(file.checked())
        if any(said.get(name) != provenance[name] for name in ("model", "layer")):
            raise IntegrityError(
                f"{file.file} is a shard of other statistics: delete .cache/ and run again."
            )
        total = moment if total is None else total + moment
    assert total is not None, "a corpus has at least one range"
    check_rank(total, f"layer {provenance['layer']}")
    write_file(path, lambda partial: write_moment(total, partial, provenance))
    return total.count
