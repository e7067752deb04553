"""What editing a file of requests would take, without doing it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from flows.command.parameters import Parameters
from flows.command.script import console
from memit import costs
from memit.costs import Lengths
from memit.errors import MemitError
from memit.hyperparameters import Hyperparameters
from memit.positions import TokenRow
from memit.requests import Record, conflict_groups, read_records
from tasks.engine.artifacts import project_root
from tasks.engine.hub import open_model
from tasks.engine.loaded_model import BYTES, ModelFiles, ModelReference
from tasks.engine.results import MODEL_FILE
from tasks.model import model_without_weights


@dataclass(frozen=True)
class Estimate:
    """What an edit of some requests takes."""

    seconds: float
    memory: int
    """Bytes, weights included."""
    disk: int
    """Bytes, statistics and the edit."""


def check_requests(parameters: Parameters, file: Path) -> None:
    """Read the file, look for contradictions, count tokens, and print what editing would take.

    Raises:
        MemitError: the first thing that is wrong with the file.
    """
    records = read_records(file)
    table = Table(title=str(file), title_justify="left", show_header=False)
    groups = conflict_groups(records)
    table.add_row("records", f"{len(records)}")
    table.add_row(
        "with a true object", f"{sum(r.request.target_true is not None for r in records)}"
    )
    table.add_row("with paraphrases", f"{sum(bool(r.paraphrase_prompts) for r in records)}")
    table.add_row("with neighbours", f"{sum(bool(r.neighborhood_prompts) for r in records)}")
    table.add_row("contradictions", Text(_conflicts(groups)))
    if MODEL_FILE.exists():
        from memit.targets import plain_rows, weak_keys

        model = open_model(**parameters.model.placement())
        requests = [record.request for record in records]
        lm = model_without_weights(model.model.id, model.model.revision, Path(model.directory))
        rows = plain_rows(lm, requests)
        lengths, longest = count_tokens(rows)
        tokens = round(len(records) * (lengths.before + lengths.after))
        table.add_row("model", model.model.id)
        table.add_row("tokens of all prompts", f"{tokens} (longest prompt {longest})")
        table.add_row("weak edits", Text(weak_keys(requests, rows) or "none"))
        _add_estimate(table, parameters, model, len(records), lengths)
    else:
        table.add_row("model", "not here yet (memit run), so no tokens and no estimate")
    console.print(table)


def _conflicts(groups: Sequence[Sequence[Record]]) -> str:
    if not groups:
        return "none"
    first = groups[0][0].request
    return (
        f"{len(groups)} subjects with several objects for one relation, the first is "
        f"{first.text!r}; only the first record of each would be kept"
    )


def count_tokens(rows: Sequence[TokenRow]) -> tuple[Lengths, int]:
    """Tokens of a prompt with its new object, on average, and of the longest one."""
    before = sum(row.subject_last + 1 for row in rows) / len(rows)
    mean = sum(len(row.ids) for row in rows) / len(rows)
    return Lengths(before, mean - before), max(len(row.ids) for row in rows)


def _add_estimate(
    table: Table, parameters: Parameters, model: ModelReference, count: int, lengths: Lengths
) -> None:
    try:
        hyperparameters = parameters.hyperparameters(model.model.id, model.model.layers)
    except MemitError as error:
        table.add_row("estimate", str(error))
        return
    estimate = estimate_edit(model.model, hyperparameters, count, lengths, model)
    table.add_row("time for targets and edit", f"about {_duration(estimate.seconds)} here")
    table.add_row("memory", f"about {_size(estimate.memory)}")
    table.add_row("disk", f"about {_size(estimate.disk)} in {project_root()}")


def estimate_edit(
    files: ModelFiles,
    hyperparameters: Hyperparameters,
    count: int,
    lengths: Lengths,
    model: ModelReference,
) -> Estimate:
    """Time from the number of operations and the device's speed; memory and disk from shapes."""
    from memit.layer_walk import HELD_IN_MEMORY

    shape = files.shape
    layers, last = hyperparameters.layers, hyperparameters.layers[-1]
    size = BYTES[model.dtype]
    passes = costs.targets_operations(shape, last, hyperparameters.evaluations, count, lengths)
    passes += costs.walk_operations(shape, layers, count, lengths)
    solves = len(layers) * costs.solve_operations(shape, count)
    held = costs.held_bytes(shape, count, lengths, size)
    layer = 2 * costs.moment_bytes(shape) + costs.delta_bytes(shape, count)
    return Estimate(
        seconds=passes / _speed(model.dtype, model) + solves / _speed("float64", model),
        memory=round(
            files.parameters * size
            + costs.solve_bytes(shape)
            + costs.keys_bytes(shape, count)
            + min(held, HELD_IN_MEMORY)
        ),
        disk=round(
            len(layers) * (layer + size * shape.inner_width * shape.width)
            + max(0, held - HELD_IN_MEMORY)
            + costs.targets_bytes(shape, count, hyperparameters.evaluations)
        ),
    )


def _speed(dtype: str, model: ModelReference) -> float:
    """Multiplications and additions a second, measured with one matrix product."""
    import torch

    name = model.device if model.device not in ("auto", "sharded") else "cuda"
    device = name if name == "cpu" or torch.cuda.is_available() else "cpu"
    torch.set_num_threads(model.threads)
    size = 512 if device == "cpu" else 4_096
    matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    torch.mm(matrix, matrix)  # the first one also sets things up
    started = time.perf_counter()
    for _ in range(4):
        total = (matrix @ matrix).sum()
    total.item()
    return 4 * 2 * size**3 / (time.perf_counter() - started)


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
