"""The answers of a model before and after an edit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from flows.command.script import console
from memit.editing import ask
from memit.errors import IntegrityError
from memit.evaluation.free_generation import as_message
from memit.generation import generate_texts
from memit.language_model import LanguageModel
from memit.requests import EditRequest
from memit.weight_delta import WeightDelta

WORD_TOKENS = 4
"""Tokens that may complete a word."""
TOKEN_BUDGET = 2_048


@dataclass(frozen=True)
class Questions:
    """What a model is asked, as it is and with an edit."""

    lm: LanguageModel
    delta: WeightDelta | None
    """None: only the model as it is is asked."""
    facts: Sequence[EditRequest]
    """Edited facts, whose objects are marked."""
    top: int
    """The number of next words."""
    tokens: int
    """Of the continuation."""
    is_chat: bool
    """Whether prompts are a user's messages in the model's chat template."""

    def tables(self, prompts: Sequence[str]) -> Iterator[Table]:
        """For each prompt the most likely next words, and the greedy continuation.

        Raises:
            InputError: the model has no chat template, or no room for a prompt.
        """
        texts = [as_message(self.lm, prompt) for prompt in prompts] if self.is_chat else prompts
        columns = {"unedited" if self.delta else self.lm.name: list(map(self._answers, texts))}
        if self.delta is not None:
            self.delta.apply(self.lm)
            columns["edited"] = list(map(self._answers, texts))
            self.delta.revert(self.lm)
        for prompt, *answers in zip(prompts, *columns.values(), strict=True):
            facts = [fact for fact in self.facts if fact.subject in prompt]
            objects = (f"\n{fact.target_true} → {fact.target_new}" for fact in facts)
            title = Text("".join([prompt, *objects]))
            table = Table(title=_marked(title, facts), title_justify="left", box=SIMPLE)
            for name in columns:
                table.add_column(name, min_width=24)
            for lines in zip(*answers, strict=True):
                table.add_row(*(_marked(Text(line), facts) for line in lines))
            yield table

    def _answers(self, prompt: str) -> list[str]:
        """Next words with their probabilities, then the continuation."""
        answers = ask(self.lm, prompt, self.top)
        write = partial(generate_texts, self.lm, token_budget=TOKEN_BUDGET)
        more = write([prompt + each.text for each in answers], new_tokens=WORD_TOKENS)
        special = self.lm.tokenizer.all_special_tokens
        words = [
            "(end of the text)" if each.text in special else _word(each.text + rest)
            for each, rest in zip(answers, more, strict=True)
        ]
        (text,) = write([prompt], new_tokens=self.tokens)
        pairs = zip(answers, words, strict=True)
        return [*(f"{each.probability:6.1%}  {word}" for each, word in pairs), f"… {text.strip()}"]


def _word(text: str) -> str:
    """The first word of a text; white space in quotes."""
    return (text.split() or [repr(text)])[0]


def _marked(text: Text, facts: Sequence[EditRequest]) -> Text:
    """A text in which the old and the new objects of facts stand out."""
    for fact in facts:
        text.highlight_words([fact.target_true or fact.target_new], "red")
        text.highlight_words([fact.target_new], "bold green")
    return text


def fitting_delta(lm: LanguageModel, file: Path, *, is_given: bool) -> WeightDelta | None:
    """The edit in a file; None if it was made for other weights, which an exported model has.

    Raises:
        IntegrityError: it was made for other weights, though the user has given it for these.
    """
    delta = WeightDelta.load(file)
    try:
        delta.apply(lm)
    except IntegrityError:
        if is_given:
            raise
        console.print(
            f"{lm.name} is edited, or another model than {file} was made for: it is asked as it is",
            soft_wrap=True,
        )
        return None
    delta.revert(lm)
    return delta
