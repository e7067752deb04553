"""What a model predicts of held-out text, summed up: the basis of perplexity and drift."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from memit.batches import run_in_batches
from memit.errors import InputError
from memit.evaluation.continuations import head_cost
from memit.forward.passes import Padded, pad
from memit.language_model import LanguageModel
from memit.placement import solving_device
from memit.positions import open_ids


@dataclass(frozen=True)
class Predictions:
    """The k tokens of some documents that are predicted, document by document."""

    documents: Sequence[int]
    """Numbers of the documents, one for each row."""
    padded: Padded
    """The documents without their last tokens."""
    rows: Tensor
    """Row of the position that predicts a token (k), ascending."""
    columns: Tensor
    """Its column (k)."""
    wanted: Tensor
    """The token (k)."""


def token_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """−log p (k) of tokens (k) by their logits (k × vocabulary)."""
    wanted = wanted.to(logits.device)
    return logits.logsumexp(-1) - logits.gather(1, wanted[:, None])[:, 0]


def document_sums(
    lm: LanguageModel,
    documents: Sequence[str],
    measure: Callable[[Predictions], Tensor],
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over each document's tokens of what is measured (float64, documents × m), and number of
    these tokens (documents).

    Each document is a sequence of its own, truncated to the model's context; its first token is
    not predicted. `measure` gives a number (m = 1), or m of them, for each prediction (k, or
    k × m). `progress` is called with the number of newly predicted tokens.

    Raises:
        InputError: no document has two tokens.
    """
    ids = [row[: lm.context_length] for row in open_ids(lm.tokenizer, documents)]
    sums: Tensor | None = None
    tokens = torch.tensor([max(len(row) - 1, 0) for row in ids])
    order = sorted((i for i, row in enumerate(ids) if len(row) > 1), key=lambda i: len(ids[i]))
    cost = max(1.0, head_cost(lm, token_budget))
    for indices, found in run_in_batches(
        order,
        lambda index: (1, ceil(len(ids[index]) * cost)),
        token_budget,
        lambda indices: _sums(lm, indices, [ids[index] for index in indices], measure),
    ):
        if sums is None:
            sums = found.new_zeros(len(ids), *found.shape[1:])
        sums[torch.tensor(indices)] = found
        if progress is not None:
            progress(int(tokens[torch.tensor(indices)].sum()))
    if sums is None:
        raise InputError("no document has two tokens: this measure needs held-out text.")
    return sums, tokens


def _sums(
    lm: LanguageModel,
    documents: Sequence[int],
    rows: Sequence[Sequence[int]],
    measure: Callable[[Predictions], Tensor],
) -> Tensor:
    """Each row's sum over its tokens after the first (float64, rows or rows × m)."""
    # Every position that is not padding predicts the token after it.
    padded = pad([row[:-1] for row in rows], lm.device)
    owner, column = padded.mask.nonzero(as_tuple=True)
    wanted = torch.tensor([token for row in rows for token in row[1:]], device=lm.device)
    found = measure(Predictions(documents, padded, owner, column, wanted))
    found = found.to(solving_device(found.device))
    # Back into rows × tokens, so that each row's sum has one order whatever the batch.
    table = found.new_zeros((*padded.ids.shape, *found.shape[1:]), dtype=torch.float64)
    table[owner.to(found.device), column.to(found.device)] = found.double()
    return table.sum(1).cpu()
