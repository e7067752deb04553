"""Drift: how far an edit moves a model's next-token distributions on text about anything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memit.editors.base import Edit
from memit.errors import InputError
from memit.evaluation.perplexity import document_sums
from memit.forward.passes import Padded, logits_at
from memit.language_model import LanguageModel


@torch.no_grad()
def drift(
    lm: LanguageModel,
    edit: Edit,
    documents: Sequence[str],
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> float:
    """Mean over all predicted tokens of KL(unedited ‖ edited), in nats.

    `lm` is unedited, and is so again afterwards: the edit is applied for half of each batch.

    Raises:
        InputError: no document has two tokens.
    """

    def divergence(padded: Padded, rows: Tensor, columns: Tensor, _wanted: Tensor) -> Tensor:
        log_p = logits_at(lm, padded, rows, columns).log_softmax(-1)
        edit.apply(lm)
        try:
            log_q = logits_at(lm, padded, rows, columns).log_softmax(-1)
        finally:
            edit.revert(lm)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    sums, tokens = document_sums(
        lm, documents, divergence, token_budget=token_budget, progress=progress
    )
    if not tokens.sum():
        raise InputError("no document has two tokens: drift needs held-out text.")
    return float(sums.sum() / tokens.sum())
