"""Prompts that something else answers in a model's place.

An edit that is no change of weights stands in front of the model: `LanguageModel.router`. Whatever
asks the model by prompts (scores of continuations, generated texts) lets the model answer all of
them, in the batches in which it always does, and then puts the router's answers in the place of
those that it takes over. So what the router leaves alone is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from memit.language_model import LanguageModel


class Router(Protocol):
    """Decides, prompt by prompt, who answers."""

    @property
    def substitute(self) -> LanguageModel:
        """The model that answers what is taken over."""
        ...

    def introductions(self, prompts: Sequence[str]) -> list[str | None]:
        """For each prompt the text that the substitute must read before it, or None where the model
        answers itself."""
        ...


def taken_over(lm: LanguageModel, prompts: Sequence[str]) -> dict[int, str]:
    """The places of the prompts that the model's router takes over, with their introductions."""
    if lm.router is None or not prompts:
        return {}
    found = enumerate(lm.router.introductions(prompts))
    return {place: text for place, text in found if text is not None}
