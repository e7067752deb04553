"""What can be found wrong before the long work starts."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from flows.command.parameters import Parameters
from flows.service.workers import workers_of
from memit.corpus import read_documents
from memit.costs import moment_bytes, solve_bytes
from memit.errors import InputError, ResourceError
from memit.evaluation.reference import read_snippets
from memit.evaluation.zsre import as_records, read_zsre
from memit.files.reading import check_file
from memit.requests import Record, drop_conflicts
from memit.world.people import WorldParameters, make_world
from tasks.compare import make_methods
from tasks.edit import Method
from tasks.engine.artifacts import project_root
from tasks.engine.hub import fetch_description, resolve_commit
from tasks.engine.loaded_model import BYTES, ModelFiles
from tasks.engine.workers import check_workers
from tasks.model import (
    check_weights,
    describe_model,
    model_without_weights,
)
from tasks.requests import locate_records, read_source, sample, split_by_subject
from tasks.statistics import find_published

if TYPE_CHECKING:
    from memit.language_model import LanguageModel

CHECKED_DOCUMENTS = 10_000
"""Documents of a corpus that are read before the run; the rest of a large one would take long."""


def check_inputs(parameters: Parameters, *, compares: bool = False) -> None:
    """Read the user's files, look at the model's structure, and compare needs with the machine.

    What ``compares`` also needs statistics of the layers that other methods edit.

    Raises:
        MemitError: the first thing that would stop the experiment later.
    """
    _check_surroundings()
    check_workers(workers_of(parameters))
    _check_device(parameters.model.device)
    records = _read_requests(parameters)
    _check_corpus(parameters)
    _check_evaluation_files(parameters)
    described, directory = _describe_model(parameters)
    methods = _check_methods(parameters, described)
    if described is not None:
        _check_disk(parameters, described)
        _check_memory(parameters, described)
        lm = model_without_weights(described.id, described.revision, directory)
        _check_layers(parameters, lm, methods if compares else ())
        _check_tokens(parameters, lm, records)
        if compares:
            _check_compared(parameters, lm)


def check_comparison(parameters: Parameters) -> None:
    """The same for a comparison, which edits records of its own choice.

    Raises:
        MemitError: the first thing that would stop the comparison later.
    """
    check_inputs(parameters, compares=True)
    count, there_are = parameters.compare.count, _editable(parameters)
    if count is not None and count > there_are:
        raise InputError(
            f"compare.count is {count}, and {there_are} records can be edited besides those of "
            "compare.training_records: ask for fewer."
        )


def check_scaling(parameters: Parameters) -> None:
    """The same for scaling, which leaves out sizes that are too large but needs one.

    Raises:
        MemitError: the first thing that would stop it later.
    """
    check_inputs(parameters, compares=True)
    smallest = min(count or math.inf for count in parameters.scaling.counts)
    there_are = _editable(parameters)
    if there_are < smallest < math.inf:
        raise InputError(
            f"scaling.counts begins with {smallest}, and {there_are} records can be edited besides "
            "those of compare.training_records: name a smaller size."
        )


def _editable(parameters: Parameters) -> int:
    """How many records a comparison can edit; some must be left to learn from where one learns."""
    section, records = parameters.compare, _all_records(parameters)
    edited, learnt = split_by_subject(records, section.training_records, parameters.requests.seed)
    learning = [name for name in ("mend", "serac") if name in section.methods]
    if parameters.mend.learn_from == "texts":
        learning = [name for name in learning if name != "mend"]
    if learning and not learnt:
        raise InputError(
            f"{learning[0]} learns from records, and compare.training_records sets "
            f"{section.training_records} of {len(records)} aside: set more aside, or leave it out "
            "of compare.methods."
        )
    return len(edited)


def _check_surroundings() -> None:
    if set("?%") & set(str(project_root())):
        raise InputError(
            f"{project_root()}: an address of a data base cannot have ? or %: rename the directory."
        )
    try:
        httpx.Client().close()
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise InputError(
            f"the proxy of the environment cannot be used ({error}): correct HTTP_PROXY, "
            "HTTPS_PROXY or ALL_PROXY."
        ) from error


def _check_device(device: str) -> None:
    if device in ("cpu", "auto", "sharded"):
        return
    import torch

    if device == "mps":
        present = torch.backends.mps.is_available()
    else:
        number = int(device.partition(":")[2] or 0)
        present = torch.cuda.is_available() and number < torch.cuda.device_count()
    if not present:
        raise InputError(
            f"model.device is {device!r}, which torch does not find on this machine: use cpu, or "
            "install torch for the device (make TORCH_INDEX=...)."
        )


def _read_requests(parameters: Parameters) -> list[Record]:
    """The records that will be edited, as far as they are known before the model is."""
    section = parameters.requests
    if section.source == "synthetic":
        return []
    return sample(_read_file(parameters), section.count, section.seed)


def _read_file(parameters: Parameters) -> list[Record]:
    section = parameters.requests
    return read_source(section.source, locate_records(section.path, section.url, section.sha256))[0]


def _check_corpus(parameters: Parameters) -> None:
    section = parameters.statistics
    if section.source == "dataset":
        resolve_commit(str(section.dataset), str(section.revision), "dataset")
    if section.source != "file":
        return
    path = Path(str(section.path))
    check_file(path, "the corpus", size_limit=None)
    wanted = (section.documents or CHECKED_DOCUMENTS) + section.held_out_documents
    found = read_documents(path, stop=min(wanted, CHECKED_DOCUMENTS), column=section.column)
    if sum(1 for _ in found) == 0:
        raise InputError(f"{path} holds no text: give statistics.path a file that does.")


def _check_evaluation_files(parameters: Parameters) -> None:
    if parameters.compare.zsre is not None:
        read_zsre(parameters.compare.zsre)
    if parameters.evaluation.snippets is not None:
        read_snippets(parameters.evaluation.snippets)


def _check_methods(parameters: Parameters, model: ModelFiles | None) -> list[Method]:
    """Make the methods of the comparison, and see that no layer lies beyond the model."""
    name = "synthetic" if model is None else model.id
    depth = parameters.model.training.layers if model is None else model.layers
    section = parameters.compare
    hyperparameters = parameters.hyperparameters(name, depth)
    methods = make_methods(
        section.methods, section.settings, hyperparameters, name, depth, section.editors
    )
    if (parameters.mend.blocks or 0) > depth:
        raise InputError(
            f"mend.blocks is {parameters.mend.blocks}, but {name} has {depth} blocks: ask for "
            "fewer."
        )
    return list(methods)


def _all_records(parameters: Parameters) -> list[Record]:
    """The records of a comparison, without contradictions."""
    section = parameters.requests
    if parameters.compare.zsre is not None:
        return drop_conflicts(as_records(read_zsre(parameters.compare.zsre)))[0]
    if section.source == "synthetic":
        model = parameters.model
        return list(make_world(WorldParameters(model.seed, **model.world.model_dump())).records)
    return _read_file(parameters)


def _describe_model(parameters: Parameters) -> tuple[ModelFiles | None, Path]:
    """The structure of a model that is not made here, without its weights, and where it lies."""
    section = parameters.model
    directory = Path(str(section.path))
    if section.source == "hub":
        name = str(section.id)
        commit = resolve_commit(name, str(section.revision))
        directory = fetch_description(name, commit)
        return describe_model("hub", name, commit, directory), directory
    if section.source == "local":
        if not os.path.isdir(directory):
            raise InputError(f"{directory} is no directory: correct model.path in params.yaml.")
        described = describe_model("local", directory.resolve().name, None, directory)
        check_weights(directory)
        return described, directory
    return None, directory


def _check_tokens(parameters: Parameters, lm: LanguageModel, records: list[Record]) -> None:
    """See that the model's tokenizer has tokens for every subject and object, and room for all."""
    from memit.room import check_records
    from memit.targets import edit_rows

    check_records(lm, records, written=parameters.evaluation.generation_records)
    edit_rows(lm, [record.request for record in records], ())


def _check_compared(parameters: Parameters, lm: LanguageModel) -> None:
    """See that there is room for what a comparison asks, whichever records it draws."""
    from memit.room import check_records

    section = parameters.compare
    questions = () if section.zsre is None else read_zsre(section.zsre)
    records = () if questions else _all_records(parameters)
    check_records(lm, records, questions, plus=True, written=section.generation_records)


def _check_layers(parameters: Parameters, lm: LanguageModel, methods: Sequence[Method]) -> None:
    """See that all layers can be edited that are, also by ``methods``, and that others' statistics
    of them are here."""
    section = parameters.statistics
    layers = set(parameters.hyperparameters(lm.name, lm.depth).layers)
    for method in methods:
        layers |= set(method.editor.moment_layers)
    others = {getattr(method.editor, "layer", min(layers)) for method in methods}
    lm.check_layers(tuple(sorted(layers | others)))
    if section.source == "published":
        find_published(Path(str(section.path)), lm, sorted(layers))


def _check_disk(parameters: Parameters, model: ModelFiles) -> None:
    """Compare the space that the statistics and the edit take with what is free."""
    layers = len(parameters.hyperparameters(model.id, model.layers).layers)
    section = parameters.statistics
    moment = moment_bytes(model.shape)
    documents = 1 if section.source == "published" else section.documents or 1
    shards = -(-documents // section.documents_per_shard)
    changed = 3 * 4 * model.inner_width * model.width
    needed = layers * (moment * (shards + 1) + changed)
    free = shutil.disk_usage(project_root()).free
    if needed > free:
        fitting = int((free / layers - changed) / moment - 1)
        advice = "make room, or edit fewer layers"
        if fitting > 0:
            advice = f"at most {fitting} shards fit: raise statistics.documents_per_shard"
        raise ResourceError(
            f"the statistics of {layers} layers in {shards} shards and the edit take "
            f"{needed / 1e9:.1f} GB, and {project_root()} has {free / 1e9:.1f} GB free: {advice}."
        )


def _check_memory(parameters: Parameters, model: ModelFiles) -> None:
    """Compare the weights and one layer's equations with the memory of the device."""
    section = parameters.model
    is_sharded = section.device == "sharded"  # then weights without room wait on the disk
    weights = 0 if is_sharded else model.parameters * BYTES[section.dtype]
    solve = solve_bytes(model.shape)
    room, where = _memory(section.device)
    if weights + solve > room:
        raise ResourceError(
            f"{model.id} takes {weights / 1e9:.1f} GB in {section.dtype} and a layer's equations "
            f"{solve / 1e9:.1f} GB, and {where} has {room / 1e9:.1f} GB: use a smaller dtype, or "
            "model.device: sharded, which takes what room there is."
        )


def _memory(device: str) -> tuple[int, str]:
    """Bytes that the weights may take, and the name of what has them."""
    import psutil
    import torch

    if device not in ("cpu", "mps") and torch.cuda.is_available():
        card = device if device.startswith("cuda:") else "cuda:0"
        return torch.cuda.get_device_properties(card).total_memory, "the GPU"
    return psutil.virtual_memory().available, "this machine's memory"
