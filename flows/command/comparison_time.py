"""How long a comparison takes if nothing of it is cached, estimated before it starts."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

from flows.command import costs
from flows.command.estimate import (
    LENGTHS,
    STEP_ROWS,
    estimate_edit,
    reference,
    speed,
    statistics_seconds,
)
from flows.command.parameters import Parameters
from memit.editors.fine_tuning import FineTuning
from memit.editors.memit import Memit
from memit.editors.rome import Rome
from memit.editors.unedited import Unedited
from memit.evaluation.generations import TOTAL_TOKENS
from memit.hyperparameters import Hyperparameters
from tasks.edit import Method
from tasks.engine.loaded_model import ModelReference
from tasks.reporting.labels import label
from tasks.targets import target_settings

PROMPTS, TEXTS = 24, 10
"""Prompts of a record that are scored, and texts that are written about it, as in CounterFact."""
DOCUMENT = 100
"""Tokens of a held-out document."""
ROME_ROWS = 21
"""Rows of an edit of ROME: the plain prompt and those with prefixes."""
EDITORS = (Memit, FineTuning, Rome, Unedited)
"""Editors whose operations are known."""


def comparison_time(
    parameters: Parameters,
    methods: Sequence[Method],
    edits: Sequence[Sequence[int]],
    texts: int | None,
    documents: int,
) -> str:
    """The time in words. `edits` are the sizes of each method's samples; `texts` is the number of
    records of each whose texts are generated, and `documents` that of held-out ones."""
    model = reference(parameters.model)
    token = 2 * model.model.parameters / speed(model)  # its seconds
    editing = sum(_editing(model, methods, [sum(sizes) for sizes in edits]))
    measuring = 0.0
    for size in (size for sizes in edits for size in sizes):
        written = size if texts is None else min(size, texts)
        measuring += token * size * PROMPTS * (LENGTHS.before + LENGTHS.after)
        measuring += 3 * token * documents * DOCUMENT
        if written:
            measuring += token * (written * TEXTS + STEP_ROWS) * TOTAL_TOKENS
    parts = {"statistics": statistics_seconds(parameters, model)}
    parts |= {"editing": editing, "measuring": measuring}
    words = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts.items())
    others = [label(one.name) for one in methods if not isinstance(one.editor, EDITORS)]
    more = f", and what {', '.join(others)} takes" if others else ""
    return f"about {_duration(sum(parts.values()))} if nothing is cached: {words}{more}"


def _editing(
    model: ModelReference, methods: Sequence[Method], counts: Sequence[int]
) -> Iterator[float]:
    """Seconds of each method; methods with the same targets share them."""
    shape, known = model.model.shape, set[tuple[Hyperparameters, int]]()
    for method, count in zip(methods, counts, strict=True):
        editor = method.editor
        if isinstance(editor, Memit):
            settings = editor.target_hyperparameters
            key = target_settings(settings), count
            left = replace(settings, evaluations=1) if key in known else settings
            known.add(key)
            yield estimate_edit(model.model, left, count, LENGTHS, model).seconds
        elif isinstance(editor, Rome):
            one = costs.targets_operations(shape, editor.layer, editor.evaluations, count, LENGTHS)
            yield one * ROME_ROWS / costs.ROWS / speed(model)
        elif isinstance(editor, FineTuning):
            tokens = editor.epochs * count * (LENGTHS.before + LENGTHS.after)
            share = (shape.depth - editor.layer) / shape.depth  # forward, and backward twice that
            yield 6 * shape.parameters * share * tokens / speed(model)


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=max(1, round(seconds)))
