"""The answers of a model before and after an edit, and the edited model as a directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.table import Table
from rich.text import Text

from memit.editing import ask
from memit.errors import ResourceError
from memit.files.atomic import temporary
from memit.generation import generate_texts
from memit.language_model import DTYPES, LanguageModel
from memit.weight_delta import WeightDelta, check_rounded


def answers_side_by_side(
    lm: LanguageModel, delta_file: Path, prompt: str, top: int, tokens: int
) -> Table:
    """A table of the most likely next tokens, and the greedy continuation.

    Raises:
        IntegrityError: the edit was made for another model.
    """
    delta = WeightDelta.load(delta_file)
    before = _answers(lm, prompt, top, tokens)
    delta.apply(lm)
    after = _answers(lm, prompt, top, tokens)
    delta.revert(lm)
    table = Table(title=Text(prompt), title_justify="left")
    for name in ("unedited", "edited"):
        table.add_column(name, min_width=24)
    for cells in zip(before, after, strict=True):
        table.add_row(*map(Text, cells))
    return table


def _answers(lm: LanguageModel, prompt: str, top: int, tokens: int) -> list[str]:
    """Next tokens with their probabilities, then the greedy continuation."""
    lines = [f"{answer.probability:6.1%}  {answer.text!r}" for answer in ask(lm, prompt, top)]
    (text,) = generate_texts(
        lm, [prompt], new_tokens=tokens, top_k=1, seed=0, token_budget=1, whole=False
    )
    return [*lines, f"… {text.strip()}"]


def save_edited(lm: LanguageModel, delta_file: Path, directory: Path, dtype: str) -> None:
    """Write the edited model with `save_pretrained`, atomically.

    Raises:
        NumericsError: the dtype cannot represent the edited weights.
        ResourceError: there is not enough disk space.
    """
    delta = WeightDelta.load(delta_file)
    delta.apply(lm)
    for name in delta.changes:
        check_rounded(lm.parameter(name), DTYPES[dtype], name)
    lm.model.to(dtype=DTYPES[dtype])  # pyright: ignore[reportCallIssue]
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    free = shutil.disk_usage(directory.parent).free
    if needed > free:
        raise ResourceError(
            f"the model takes {needed / 1e9:.1f} GB, and {directory.parent} has "
            f"{free / 1e9:.1f} GB free: choose another disk or a smaller dtype."
        )
    with temporary(directory) as partial:
        lm.model.save_pretrained(partial)
        lm.tokenizer.save_pretrained(partial)
        os.replace(partial, directory)  # replaces an empty directory, but no other
