"""Checks of the user's files, the model and the machine, before anything long starts."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil
import torch
from rich.text import Text

from flows.command.changes import check_losses
from flows.command.comparison_time import comparison_time
from flows.command.costs import delta_bytes, moment_bytes, solve_bytes
from flows.command.parameters import ModelSection, Parameters, StatisticsSection
from flows.command.script import console
from flows.service.workers import workers_of
from memit.corpus import read_documents
from memit.editors.__init__ import known_editors
from memit.editors.joint import editor_for
from memit.editors.mend import Mend
from memit.editors.serac import Serac
from memit.errors import InputError, ResourceError
from memit.evaluation.own_metrics import own_metrics
from memit.evaluation.reference import read_snippets
from memit.evaluation.zsre import as_records, read_zsre
from memit.facts.records import embedded_records
from memit.files.reading import check_file
from memit.language_model import LanguageModel
from memit.model_shape import ModelShape
from memit.requests import Record, drop_conflicts
from memit.room import check_records
from memit.sampled_corpus import TOKENS_PER_TEXT, start_token, wanted_tokens
from memit.targets import edit_rows
from memit.world.people import make_world
from tasks.compare import make_methods
from tasks.edit import Method
from tasks.engine.artifacts import project_root
from tasks.engine.hub import resolve_commit
from tasks.engine.loaded_model import BYTES, ModelFiles
from tasks.engine.results import is_model_here
from tasks.engine.workers import check_workers
from tasks.model import find_model, model_without_weights
from tasks.reporting.labels import LABELS
from tasks.requests import locate_records, read_source, sample, split_by_subject
from tasks.statistics import find_published, held_out_file

CHECKED_DOCUMENTS = 10_000
"""Documents of a corpus that are read before the run; all of a large one would take too long."""


def check_inputs(parameters: Parameters) -> None:
    """Read the user's files, inspect the model, and compare costs with the machine.

    Raises:
        MemitError: the first thing that would stop the experiment later.
    """
    _check(parameters)


def check_list(parameters: Parameters) -> None:
    """`check_inputs`, and that a list of facts was not truncated since the last run; batches of a
    history replace one another.

    Raises:
        MemitError: the first thing that is wrong.
    """
    check_inputs(parameters)
    if parameters.edit.history is None:
        check_losses(parameters.requests)


def check_comparison(parameters: Parameters) -> None:
    """`check_inputs` for a comparison, which edits records of its own choice.

    Raises:
        MemitError: the first thing that would stop the comparison later.
    """
    (available, methods), section = _check_compared(parameters), parameters.compare
    count = section.count
    if count is not None and count > available:
        raise InputError(
            f"compare.count is {count}, but only {available} records can be edited besides those "
            "of compare.training_records: ask for fewer."
        )
    sizes = [[min(count or available, section.at_most.get(m.name, available))] for m in methods]
    held_out = parameters.statistics
    documents = held_out.held_out_documents
    if held_out.source == "sampled" or held_out.held_out:
        file = held_out_file(held_out.held_out)
        documents = sum(1 for _ in read_documents(file, stop=documents, column=held_out.column))
    _say_time(parameters, methods, sizes, section.generation_records, documents)


def check_scaling(parameters: Parameters) -> None:
    """`check_inputs` for scaling, which skips sizes that are too large but needs one.

    Raises:
        MemitError: the first thing that would stop it later.
    """
    (available, methods), section = _check_compared(parameters), parameters.scaling
    counts, at_most = section.counts, parameters.compare.at_most
    if all(count is not None and count > available for count in counts):
        raise InputError(
            f"scaling.counts is {list(counts)}, but only {available} records can be edited besides "
            "those of compare.training_records: add a smaller size."
        )
    present = {size for count in counts if (size := count or available) <= available}
    drawn = [size for size in present for _ in range(section.repeated(size, available))]
    sizes = [[size for size in drawn if size <= at_most.get(m.name, size)] for m in methods]
    _say_time(parameters, methods, sizes, section.generation_records, 0)


def _say_time(
    parameters: Parameters,
    methods: Sequence[Method],
    sizes: Sequence[Sequence[int]],
    texts: int | None,
    documents: int,
) -> None:
    """Print the estimated time, if there is a model already."""
    model = parameters.model
    if model.source != "synthetic" or is_model_here(model.source, model.name):
        time = comparison_time(parameters, methods, sizes, texts, documents)
        console.print(f"[bold]estimated:[/] {time}", soft_wrap=True)


def _check(parameters: Parameters) -> tuple[list[Record], LanguageModel | None]:
    """The records of the user's file, and the model without weights unless it is trained here."""
    section = parameters.requests
    _check_surroundings()
    check_workers(workers_of(parameters))
    _check_device(parameters.model.device)
    records: list[Record] = []
    if section.source == "embedded":
        records = embedded_records("reported")
    elif section.source != "synthetic":
        file = locate_records(section.path, section.url, section.sha256)
        records = read_source(section.source, file)[0]
    chosen = sample(records, section.wanted, section.seed) if records else []
    _check_corpus(parameters.statistics)
    if parameters.evaluation.metrics is not None:
        own_metrics(parameters.evaluation.metrics)
    if parameters.evaluation.snippets is not None:
        read_snippets(parameters.evaluation.snippets)
    if parameters.model.source == "synthetic":
        if parameters.statistics.source == "sampled":
            wanted_tokens(parameters.statistics.tokens, 4 * parameters.model.training.width)
        return records, None
    described, place = find_model(**parameters.model.identity())
    _check_disk(parameters, described)
    _check_memory(parameters.model, described)
    lm = model_without_weights(described.id, described.revision, place)
    _check_layers(parameters, lm, ())
    check_records(lm, chosen, written=parameters.evaluation.generation_records)
    edit_rows(lm, [record.request for record in chosen], ())
    return records, lm


def _check_compared(parameters: Parameters) -> tuple[int, list[Method]]:
    """`check_inputs` and what a comparison needs besides; the number of records to edit, and the
    methods."""
    section = parameters.compare
    questions = () if section.zsre is None else read_zsre(section.zsre)
    records, lm = _check(parameters)
    if lm is None:
        methods = compared_methods(parameters, "synthetic", parameters.model.synthetic_shape)
    else:
        methods = compared_methods(parameters, lm.name, lm.shape)
        _check_layers(parameters, lm, methods)
        asked = () if questions else records
        check_records(lm, asked, questions, plus=True, written=section.generation_records)
    if questions:
        records = drop_conflicts(as_records(questions))[0]
    elif parameters.requests.source == "synthetic":
        records = list(make_world(parameters.model.world_parameters()).records)
    edited, learnt = split_by_subject(records, section.training_records, parameters.requests.seed)
    learning = {"serac", "mend"} if parameters.mend.learn_from == "records" else {"serac"}
    for name in section.methods if not learnt else ():
        if name in learning:
            raise InputError(
                f"{name} learns from records, but compare.training_records sets aside "
                f"{section.training_records} of {len(records)}: set more aside, or remove it from "
                "compare.methods."
            )
    return len(edited), methods


def _check_surroundings() -> None:
    if set("?%") & set(str(project_root())):
        raise InputError(
            f"{project_root()}: database URLs cannot contain ? or %: rename the directory."
        )
    try:
        httpx.Client().close()
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise InputError(
            f"the environment's proxy cannot be used ({error}): correct HTTP_PROXY, HTTPS_PROXY or "
            "ALL_PROXY."
        ) from error


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind == "mps":
        is_available = torch.backends.mps.is_available()
    else:
        is_available = kind != "cuda" or int(index or 0) < torch.cuda.device_count()
    if not is_available:
        raise InputError(
            f"model.device is {device!r}, which torch does not find on this machine: use cpu, or "
            "install torch for the device (make TORCH_INDEX=...)."
        )


def _check_corpus(section: StatisticsSection) -> None:
    if section.source == "dataset":
        resolve_commit(str(section.dataset), str(section.revision), "dataset")
    if section.held_out_documents and (section.source == "sampled" or section.held_out):
        _check_documents(held_out_file(section.held_out), section, 0)
    if section.source == "file":
        path = Path(str(section.path))
        check_file(path, "the corpus", size_limit=None)
        _check_documents(path, section, section.documents or CHECKED_DOCUMENTS)


def _check_documents(path: Path, section: StatisticsSection, documents: int) -> None:
    wanted = min(documents + section.held_out_documents, CHECKED_DOCUMENTS)
    if sum(1 for _ in read_documents(path, stop=wanted, column=section.column)) == 0:
        raise InputError(f"{path} contains no text: name a file with text in statistics.")


def compared_methods(parameters: Parameters, model: str, shape: ModelShape) -> list[Method]:
    """The methods of `compare.methods` with the settings that params.yaml gives them.

    Raises:
        InputError: there is no such method, setting or layer.
    """
    section, depth = parameters.compare, shape.depth
    mend = parameters.mend_settings
    if "mend" in section.methods and mend.blocks > depth:
        raise InputError(
            f"mend.blocks is {mend.blocks}, but {model} has {depth} blocks: use fewer."
        )
    hyperparameters = parameters.hyperparameters(model, shape)
    methods = make_methods(
        section.methods, section.settings, hyperparameters, model, depth, section.editors
    )
    for name in section.at_most:
        if name not in LABELS and name not in known_editors():
            raise InputError(f"compare.at_most names {name}, and there is no such method.")
    learning = {"mend": Mend(mend), "serac": Serac(parameters.serac_settings)}
    return [Method(one.name, learning.get(one.name, one.editor)) for one in methods]


def _check_layers(parameters: Parameters, lm: LanguageModel, methods: Sequence[Method]) -> None:
    """Check that MEMIT and `methods` can edit their layers, and that published statistics exist,
    or that the model can write texts; say which settings nobody has checked."""
    section, hyperparameters = parameters.statistics, parameters.hyperparameters(lm.name, lm.shape)
    if note := parameters.settings_note(lm.name, lm.shape):
        console.print("[yellow]settings:[/]", Text(note), soft_wrap=True)
    layers = set(hyperparameters.layers)
    layers.update(*(method.editor.moment_layers for method in methods))
    others = {getattr(method.editor, "layer", min(layers)) for method in methods}
    lm.check_layers(tuple(sorted(layers | others)))
    for editor in (editor_for(hyperparameters), *(method.editor for method in methods)):
        editor.check(lm)
    if section.source == "published":
        find_published(Path(str(section.path)), lm, sorted(layers))
    if section.source == "sampled":
        start_token(lm)
        wanted_tokens(section.tokens, lm.inner_width)


def _check_disk(parameters: Parameters, model: ModelFiles) -> None:
    """Compare the size of the statistics and the edit with the free space."""
    section = parameters.statistics
    layers = len(parameters.hyperparameters(model.id, model.shape).layers)
    documents = 1 if section.source == "published" else section.documents or 1
    if section.source == "sampled":
        documents = wanted_tokens(section.tokens, model.inner_width) // TOKENS_PER_TEXT
    moments = 1 + math.ceil(documents / section.documents_per_shard)
    whole_matrix = delta_bytes(model.shape, math.inf)
    needed = layers * (moments * moment_bytes(model.shape) + 3 * whole_matrix)
    free = shutil.disk_usage(project_root()).free
    if needed > free:
        raise ResourceError(
            f"the statistics and the edit of {layers} layers take {needed / 1e9:.1f} GB, but "
            f"{project_root()} has {free / 1e9:.1f} GB free: make room, raise "
            "statistics.documents_per_shard, or edit fewer layers."
        )


def _check_memory(section: ModelSection, model: ModelFiles) -> None:
    """Compare the weights and one layer's equations with the memory of the device."""
    is_sharded = section.device == "sharded"  # then weights that do not fit stay on the disk
    weights = 0 if is_sharded else model.parameters * BYTES[section.dtype]
    solve = solve_bytes(model.shape)
    available = psutil.virtual_memory().available
    if section.device not in ("cpu", "mps") and torch.cuda.is_available():
        card = section.device if section.device.startswith("cuda:") else "cuda:0"
        available = torch.cuda.get_device_properties(card).total_memory
    if weights + solve > available:
        raise ResourceError(
            f"{model.id} takes {weights / 1e9:.1f} GB in {section.dtype} and a layer's equations "
            f"{solve / 1e9:.1f} GB, but {section.device} has {available / 1e9:.1f} GB: use a "
            "smaller dtype, or model.device: sharded, which takes the memory that is available."
        )
