"""Drift: how far an edit moves a model's next-token distributions on text about anything else.

The unedited model reads the text once, for all edits: what leaves its last block is kept, from
which its distributions follow without another pass through the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from memit.editors.base import Edit
from memit.evaluation.perplexity import Predictions, document_sums, token_losses
from memit.files.tensors import load_tensors, save_tensors
from memit.forward.passes import final_states, logits_at, logits_of
from memit.language_model import LanguageModel


@dataclass(frozen=True)
class Reading:
    """What a model makes of documents."""

    nll: Tensor
    """Sum of −log p over the predicted tokens of each document (float64, documents)."""
    tokens: Tensor
    """Number of these tokens (documents)."""
    states: Tensor
    """What leaves the last block where they are predicted, document by document (tokens × d)."""

    @property
    def perplexity(self) -> float:
        """exp of the mean of −log p over all tokens."""
        return exp(float(self.nll.sum() / self.tokens.sum()))

    def save(self, path: Path) -> None:
        """Write it to a safetensors file."""
        save_tensors(vars(self), path, {})

    @staticmethod
    def load(path: Path) -> Reading:
        """What `save` wrote.

        Raises:
            IntegrityError: the file is damaged.
        """
        return Reading(**load_tensors(path)[0])


class Change(NamedTuple):
    """What an edit does to the predictions of text."""

    perplexity: float
    """That of the edited model."""
    drift: float
    """Mean over all predicted tokens of KL(unedited ‖ edited), in nats."""


@torch.no_grad()
def read_text(
    lm: LanguageModel,
    documents: Sequence[str],
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> Reading:
    """Read documents with a model as it is.

    Raises:
        InputError: no document has two tokens.
    """
    states = [torch.empty(0, lm.width, dtype=lm.dtype)] * len(documents)

    def losses(batch: Predictions) -> Tensor:
        found = final_states(lm, batch.padded, batch.rows, batch.columns)
        lengths = batch.padded.mask.sum(1).tolist()
        for document, part in zip(batch.documents, found.cpu().split(lengths), strict=True):
            states[document] = part
        return token_losses(logits_of(lm, found), batch.wanted)

    nll, tokens = document_sums(lm, documents, losses, token_budget=token_budget, progress=progress)
    return Reading(nll, tokens, torch.cat(states))


@torch.no_grad()
def drift(
    lm: LanguageModel,
    edit: Edit,
    documents: Sequence[str],
    reading: Reading,
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> Change:
    """How an edit changes the predictions of documents, of which `reading` is the unedited model's.

    `lm` is unedited, and is so again afterwards: the edit is applied for half of each batch.

    Raises:
        InputError: no document has two tokens.
    """
    states = reading.states.split(reading.tokens.tolist())

    def divergence(batch: Predictions) -> Tensor:
        unedited = torch.cat([states[document] for document in batch.documents])
        log_p = logits_of(lm, unedited).log_softmax(-1)
        edit.apply(lm)
        try:
            logits = logits_at(lm, batch.padded, batch.rows, batch.columns)
        finally:
            edit.revert(lm)
        lost = token_losses(logits, batch.wanted)
        log_q = logits.log_softmax(-1)
        return torch.stack([lost, (log_p.exp() * (log_p - log_q)).sum(-1)], 1)

    sums, tokens = document_sums(
        lm, documents, divergence, token_budget=token_budget, progress=progress
    )
    lost, moved = (sums.sum(0) / tokens.sum()).tolist()
    return Change(exp(lost), moved)
