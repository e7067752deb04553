"""The task that trains MEND before it edits: a network that turns gradients into updates."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from memit.editors.mend import (
    EditExample,
    MendSettings,
    examples_from_records,
    examples_from_texts,
    train_mend,
)
from memit.generation import generate_texts
from memit.language_model import LanguageModel
from memit.requests import read_counterfact
from tasks.engine.artifacts import Artifact, Value, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.checkpoints import work_directory
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import progress_bar
from tasks.statistics import read_texts

TOP_K = 50
"""Of the continuations that are sampled as edits."""
TOKEN_BUDGET = 4_096
"""Tokens in a batch while they are sampled."""


class Trained(Value):
    """What was trained, and how that went."""

    file: Artifact
    """The trained weights (safetensors)."""
    losses: Artifact
    """The loss of each step (JSON)."""


@dataclass(frozen=True)
class Continuations:
    """Texts of a corpus whose beginnings are edited to go on as the model sampled."""

    texts: Artifact
    count: int
    """How many of them are used."""
    tokens: int
    """Length of what is sampled."""
    seed: int


@cached_task("mend")
def train_mend_network(
    model: ModelReference, learnt_from: Artifact | Continuations, settings: MendSettings
) -> Trained:
    """Train a network on records, or on sampled continuations of texts, going on from the last
    checkpoint."""
    with loaded(model) as lm, progress_bar("mend", settings.steps, "training steps") as bar:
        network, losses = train_mend(
            lm,
            _examples(lm, learnt_from),
            settings,
            directory=work_directory(),
            progress=bar.advance,
        )
    return finished("mend", network.save, losses)


def _examples(lm: LanguageModel, learnt_from: Artifact | Continuations) -> list[EditExample]:
    if isinstance(learnt_from, Artifact):
        return examples_from_records(read_counterfact(learnt_from.checked()))
    texts = read_texts(learnt_from.texts.checked())[: learnt_from.count]
    beginnings = beginnings_of(texts)
    written = generate_texts(
        lm,
        beginnings,
        new_tokens=learnt_from.tokens,
        top_k=TOP_K,
        seed=learnt_from.seed,
        token_budget=TOKEN_BUDGET,
    )
    kept = [pair for pair in zip(beginnings, written, strict=True) if pair[1].strip()]
    return examples_from_texts(kept)


def beginnings_of(texts: Sequence[str]) -> list[str]:
    """The first half of each text's words, at most 40; texts of one word are left out."""
    words = [text.split() for text in texts]
    return [" ".join(each[: min(40, len(each) // 2)]) for each in words if len(each) > 1]


def finished(step: str, save: Callable[[Path], None], losses: object) -> Trained:
    """Keep what was trained."""
    text = json.dumps({"losses": losses}) + "\n"
    return Trained(
        file=store_piece(step, ".safetensors", save),
        losses=store_piece(step, ".json", lambda path: path.write_text(text, encoding="utf-8")),
    )
