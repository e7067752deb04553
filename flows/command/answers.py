"""What a model says before and after an edit, and the edited model as a directory of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from memit.editing import ask
from memit.errors import ResourceError
from memit.files.atomic import temporary
from memit.generation import generate_texts
from memit.language_model import DTYPES
from memit.weight_delta import WeightDelta, check_rounded

if TYPE_CHECKING:
    from memit.language_model import LanguageModel


def answers_side_by_side(
    lm: LanguageModel, delta_file: Path, prompt: str, top: int, tokens: int
) -> Table:
    """A table of the most likely next tokens, and the continuation of the first of them.

    Raises:
        IntegrityError: the edit was made for another model.
    """
    delta = WeightDelta.load(delta_file)
    columns = {"unedited": _answers(lm, prompt, top, tokens)}
    delta.apply(lm)
    columns["edited"] = _answers(lm, prompt, top, tokens)
    delta.revert(lm)
    table = Table(title=Text(prompt), title_justify="left")
    for name in columns:
        table.add_column(name, min_width=24)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _answers(lm: LanguageModel, prompt: str, top: int, tokens: int) -> list[str]:
    """Next tokens with their probabilities, then the greedy continuation."""
    lines = [f"{answer.probability:6.1%}  {answer.text!r}" for answer in ask(lm, prompt, top)]
    (said,) = generate_texts(
        lm, [prompt], new_tokens=tokens, top_k=1, seed=0, token_budget=1, whole=False
    )
    return [*lines, f"… {said.strip()}"]


def save_edited(lm: LanguageModel, delta_file: Path, directory: Path, dtype: str) -> None:
    """Write the edited model with `save_pretrained`, whole or not at all.

    Raises:
        NumericsError: the dtype does not hold the edited weights.
        ResourceError: there is no room for it.
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
            f"{free / 1e9:.1f} GB free: choose another place or a smaller dtype."
        )
    with temporary(directory) as partial:
        lm.model.save_pretrained(partial)
        lm.tokenizer.save_pretrained(partial)
        os.replace(partial, directory)  # which takes the place of an empty one, and no other
