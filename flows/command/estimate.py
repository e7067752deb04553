"""The cost of editing a file of requests, estimated without running anything."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch.utils.benchmark import Timer

from flows.command import costs
from flows.command.costs import Lengths
from flows.command.parameters import ModelSection, Parameters
from memit.covariance_weight import TRIALS
from memit.hyperparameters import AUTO, Hyperparameters, summary
from memit.language_model import DTYPES
from memit.layer_walk import COLUMNS_IN_MEMORY, HELD_IN_MEMORY
from memit.positions import TokenRow
from memit.requests import Record
from memit.sampled_corpus import EXPECTED_SHARE, TEXTS_AT_ONCE, wanted_tokens
from memit.targets import plain_rows, weak_keys
from tasks.engine.artifacts import project_root
from tasks.engine.hub import open_model
from tasks.engine.loaded_model import ModelFiles, ModelReference
from tasks.engine.results import is_model_here
from tasks.model import find_model, model_without_weights

LENGTHS = Lengths(8, 3)
"""Tokens of a prompt and of an object, where the facts are not known yet."""
STEP_ROWS = 32
"""Texts whose next tokens take as long as reading all weights, which each step of writing does."""


@dataclass(frozen=True)
class Estimate:
    """What an edit of some requests costs."""

    seconds: float
    memory: int
    """Bytes, weights included."""
    disk: int
    """Bytes, statistics and the edit."""


def add_costs(table: Table, parameters: Parameters, records: Sequence[Record]) -> None:
    """Add the rows that need the model's tokenizer and shape."""
    model = reference(parameters.model)
    files, requests = model.model, [record.request for record in records]
    lm = model_without_weights(files.id, files.revision, files.within(Path(model.directory)))
    rows = plain_rows(lm, requests)
    lengths = mean_lengths(rows)
    longest = max(len(row.ids) for row in rows)
    table.add_row("model", files.id)
    table.add_row(
        "tokens of all prompts", f"{sum(len(row.ids) for row in rows)} (longest prompt {longest})"
    )
    table.add_row("weak edits", Text(weak_keys(requests, rows) or "none"))
    hyperparameters = parameters.hyperparameters(files.id, files.shape)
    note = parameters.settings_note(files.id, files.shape)
    table.add_row("settings", Text(note or summary(hyperparameters)))
    if seconds := statistics_seconds(parameters, model):
        duration = timedelta(seconds=max(1, round(seconds)))
        tokens = wanted_tokens(parameters.statistics.tokens, files.inner_width)
        table.add_row("time for statistics", f"about {duration}, {tokens} sampled tokens")
    estimate = estimate_edit(files, hyperparameters, len(records), lengths, model)
    duration = timedelta(seconds=max(1, round(estimate.seconds)))
    table.add_row("time for targets and edit", f"about {duration} on this machine")
    table.add_row("memory", f"about {decimal(estimate.memory)}")
    table.add_row("disk", f"about {decimal(estimate.disk)} in {project_root()}")


def statistics_seconds(parameters: Parameters, model: ModelReference) -> float:
    """Time for texts that the model writes and their second moments; 0 for those of a corpus."""
    section, files = parameters.statistics, model.model
    if section.source != "sampled":
        return 0.0
    layers = parameters.hyperparameters(files.id, files.shape).layers
    tokens = wanted_tokens(section.tokens, files.inner_width)
    steps = tokens / (EXPECTED_SHARE * TEXTS_AT_ONCE)
    reading = 2 * files.shape.parameters * steps * STEP_ROWS
    return (costs.sampling_operations(files.shape, layers, tokens) + reading) / speed(model)


def reference(section: ModelSection) -> ModelReference:
    """The model of the section, if it is that of the last run as it was then."""
    if is_model_here(section.source, section.name):
        return open_model(**section.placement())
    described, place = find_model(**section.identity())
    return ModelReference(
        directory=str(place.parent if place.is_file() else place),
        model=described,
        dtype=section.dtype,
        device=section.device,
        threads=section.threads,
    )


def mean_lengths(rows: Sequence[TokenRow]) -> Lengths:
    """Tokens of a prompt with its new object, on average."""
    before = sum(row.subject_last + 1 for row in rows) / len(rows)
    return Lengths(before, sum(len(row.ids) for row in rows) / len(rows) - before)


def estimate_edit(
    files: ModelFiles,
    hyperparameters: Hyperparameters,
    count: int,
    lengths: Lengths,
    model: ModelReference,
) -> Estimate:
    """Time from the number of operations and the device's speed; memory and disk from shapes."""
    shape, layers, size = files.shape, hyperparameters.layers, DTYPES[model.dtype].itemsize
    walks = TRIALS if hyperparameters.covariance_weight == AUTO else 1
    passes = costs.targets_operations(
        shape, layers[-1], hyperparameters.evaluations, count, lengths
    ) + walks * costs.walk_operations(shape, layers, count, lengths)
    solves = walks * len(layers) * costs.solve_operations(shape, count)
    held = costs.held_bytes(shape, count, lengths, size)
    weights = size * shape.inner_width * shape.width
    layer = 2 * costs.moment_bytes(shape) + costs.delta_bytes(shape, count) + weights
    keys = min(costs.keys_bytes(shape, count), COLUMNS_IN_MEMORY)
    memory = costs.solve_bytes(shape) + keys + min(held, HELD_IN_MEMORY)
    targets = costs.targets_bytes(shape, count, hyperparameters.evaluations)
    return Estimate(
        seconds=passes / speed(model) + solves / speed(model, "float64"),
        memory=round(files.parameters * size + memory),
        disk=round(len(layers) * layer + max(0, held - HELD_IN_MEMORY) + targets),
    )


def speed(model: ModelReference, dtype: str | None = None) -> float:
    """Multiplications and additions per second of a model's device, measured with a matrix product,
    by default in the model's dtype."""
    name = model.device if model.device not in ("auto", "sharded") else "cuda"
    device = name if name == "cpu" or torch.cuda.is_available() else "cpu"
    return _measured(dtype or model.dtype, device, model.threads)


@cache
def _measured(dtype: str, device: str, threads: int) -> float:
    size = 512 if device == "cpu" else 4_096
    kind = DTYPES.get(dtype, torch.float64)
    matrix = torch.ones(size, size, dtype=kind, device=device)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=threads)
    best, end = timer.timeit(1).mean, time.monotonic() + 0.3
    while time.monotonic() < end:  # others may be using the device, but not all of the time
        best = min(best, timer.timeit(1).mean)
    return 2 * size**3 / best
