"""Losses of a model under teacher forcing, with gradients, for editors that learn."""

from collections.abc import Sequence

from torch import Tensor

from memit.forward.passes import logits_at, pad, target_positions
from memit.language_model import LanguageModel
from memit.positions import TokenRow

Pair = tuple[str, str]
"""A prompt and the exact text that follows it."""


def mean_nll(lm: LanguageModel, rows: Sequence[TokenRow]) -> Tensor:
    """Mean nll of each row's target tokens (rows)."""
    owner, columns, wanted = target_positions(rows, lm.device)
    logits = logits_at(lm, pad([row.ids[:-1] for row in rows], lm.device), owner, columns)
    log_p = logits.log_softmax(-1).gather(1, wanted.to(logits.device)[:, None])[:, 0]
    return row_means(-log_p, owner, len(rows))


def row_means(values: Tensor, owner: Tensor, rows: int) -> Tensor:
    """Mean of each row's values, given the row of each value."""
    owner = owner.to(values.device)
    sums = values.new_zeros(rows).index_add(0, owner, values)
    return sums / owner.bincount(minlength=rows)
