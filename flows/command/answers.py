"""The answers of a model before and after an edit."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from memit.editing import ask
from memit.generation import generate_texts
from memit.language_model import LanguageModel
from memit.weight_delta import WeightDelta


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
