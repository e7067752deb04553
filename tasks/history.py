"""The task of the step `history`: sum up the keys of a batch of facts."""

from collections.abc import Mapping, Sequence
from functools import partial

from memit.editors.base import Resources
from memit.hyperparameters import Hyperparameters
from memit.quadratic import Past
from memit.requests import EditRequest
from memit.second_moment import write_moment
from memit.sequence import key_sums
from tasks.edit import StoredMoments
from tasks.engine.artifacts import Artifact, Value, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.loaded_model import ModelReference, loaded


class KeySums(Value):
    """C_p of each layer after an edit (Parquet)."""

    files: dict[int, Artifact]


@cached_task("key_sums")
def sum_keys(
    requests: Sequence[EditRequest],
    model: ModelReference,
    edit: Artifact,
    *,
    prefixes: Sequence[str],
    settings: Hyperparameters,
    sums: Mapping[int, Artifact],
    token_budget: int,
) -> KeySums:
    """Add the keys of some requests, whose edit is in the model, to the `sums` of earlier ones."""
    digest = model.model.digest
    with loaded(model, edit) as lm:
        resources = Resources(token_budget, prefixes, past=Past(StoredMoments(sums, digest)))
        found = key_sums(lm, requests, settings.layers, settings.key_average, resources)
    files = {}
    for layer, moment in found.items():
        write = partial(write_moment, moment, provenance={"model": digest, "layer": layer})
        files[layer] = store_piece("history", ".parquet", write)
    return KeySums(files=files)
