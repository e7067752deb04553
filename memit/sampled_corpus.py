"""A corpus without a file: texts that the model itself writes, for its second moments.

Texts are drawn at temperature 1 from the whole vocabulary after the model's first token, which is
no part of them, and end before a special token. A text takes, at each step, the token at which the
cumulated probabilities pass a uniform number of its own: its batch only matters through the last
bits of the logits. Texts come in numbered batches, so that more tokens only add batches. Like the
documents of any corpus, their ids are then read without special tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from math import ceil
from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor

from memit.batches import run_in_batches
from memit.errors import InputError
from memit.language_model import LanguageModel

TOKENS_PER_DIMENSION = 16
"""Tokens for each dimension of a key, unless a number of tokens is asked for."""
TOKENS_PER_TEXT = 128
"""The length of a text, if nothing ends it earlier."""
EXPECTED_SHARE = 0.8
"""Share of `TOKENS_PER_TEXT` that texts are expected to have before any was sampled."""
TEXTS_AT_ONCE = 64
"""Texts of a batch. Fewer are slower: a step reads all weights once, whatever their number."""
LEAST_TOKENS = 4
"""Tokens that texts must have on average: below it, sampling would take long and tell little."""


def wanted_tokens(tokens: int | Literal["auto"], width: int) -> int:
    """How many tokens are sampled for keys of `width` dimensions.

    Raises:
        InputError: they are fewer than the dimensions.
    """
    if tokens == "auto":
        return TOKENS_PER_DIMENSION * width
    if tokens < width:
        raise InputError(
            f"{tokens} sampled tokens leave the second moment of keys with {width} dimensions "
            f"singular: ask for at least {2 * width}, or for 'auto', {TOKENS_PER_DIMENSION} times "
            "the dimensions."
        )
    return tokens


def start_token(lm: LanguageModel) -> int:
    """The token that begins texts, or else the one that ends them, which models have seen between
    two texts.

    Raises:
        InputError: the tokenizer has neither, or the model does not know it.
    """
    for token in (lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id):
        if isinstance(token, int):
            lm.check_room([token], "a sampled text")
            return token
    raise InputError(
        f"the tokenizer of {lm.name} has no token that begins or ends a text, so that the model "
        "cannot write texts of its own: set bos_token in the tokenizer, or give statistics a "
        "corpus."
    )


def missing_batches(wanted: int, found: Sequence[int]) -> range:
    """The numbers of the batches to sample next, given the tokens of those that were sampled.

    Raises:
        InputError: the model ends its texts almost at once.
    """
    mean = sum(found) / len(found) if found else EXPECTED_SHARE * TEXTS_AT_ONCE * TOKENS_PER_TEXT
    if mean < LEAST_TOKENS * TEXTS_AT_ONCE:
        raise InputError(
            f"the model's own texts have {mean / TEXTS_AT_ONCE:.1f} tokens on average, too few for "
            "second moments: give statistics a corpus."
        )
    return range(len(found), len(found) + ceil(max(0, wanted - sum(found)) / mean))


def sample_batch(lm: LanguageModel, number: int, seed: int) -> list[list[int]]:
    """Token ids of the texts of batch `number`, without those that end before their first token."""
    length = min(TOKENS_PER_TEXT, lm.context_length)
    texts = range(number * TEXTS_AT_ONCE, (number + 1) * TEXTS_AT_ONCE)
    parts = run_in_batches(
        [_draws(f"{seed}\n{text}", length) for text in texts],
        lambda _: (1, length),
        TEXTS_AT_ONCE * length,
        lambda draws: sample_ids(lm, torch.stack(list(draws))),
    )
    return [ids for _, rows in parts for ids in rows if ids]


def sample_texts(
    lm: LanguageModel, tokens: int, seed: int, progress: Callable[[int], object]
) -> list[list[int]]:
    """Token ids of texts with at least `tokens` tokens in all; `progress` is called with the number
    of newly sampled ones."""
    rows: list[list[int]] = []
    found: list[int] = []
    while batches := missing_batches(tokens, found):
        for number in batches:
            batch = sample_batch(lm, number, seed)
            rows += batch
            found.append(sum(map(len, batch)))
            progress(found[-1])
    return rows


@torch.no_grad()
def sample_ids(lm: LanguageModel, draws: Tensor) -> list[list[int]]:
    """Token ids of one text for each row of uniform numbers (texts × tokens, float64)."""
    rows: list[list[int]] = [[] for _ in draws]
    special = torch.tensor(lm.tokenizer.all_special_ids)
    running = torch.arange(len(draws))  # the texts that have not ended
    tokens = torch.full((len(draws), 1), start_token(lm))
    cache = None
    for uniform in draws.T:
        output = lm.model(input_ids=tokens.to(lm.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        # In float64 on the CPU, where sums have one order.
        passed = output.logits[:, -1].float().softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(passed, uniform[running, None] * passed[:, -1:], right=True)
        goes_on = torch.nonzero(~torch.isin(tokens[:, 0], special))[:, 0]
        if len(goes_on) < len(running):
            running, tokens = running[goes_on], tokens[goes_on]
            cache.batch_select_indices(goes_on.to(lm.device))
        for text, token in zip(running.tolist(), tokens[:, 0].tolist(), strict=True):
            rows[text].append(token)
        if not len(running):
            break
    return rows


def _draws(text: str, length: int) -> Tensor:
    """A text's own uniform numbers."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
    return torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def texts_table(lm: LanguageModel, rows: list[list[int]]) -> pa.Table:
    """Texts and their token ids (columns `text`, `ids`). Statistics are taken of the ids:
    tokenising the text might give others."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = lm.tokenizer.batch_decode(rows, **options)
    return pa.table(
        {"ids": pa.array(rows, pa.list_(pa.int32())), "text": pa.array(texts, pa.string())}
    )
