"""A corpus without a file: texts that the model itself writes, for its second moments.

Texts are drawn at temperature 1 from the whole vocabulary after the model's first token, which is
no part of them, and end at a special token. They come in numbered batches of always the same texts,
so that more tokens only add batches, and interrupted work goes on after the last one. Like the
documents of any corpus, their ids are then read without special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import pyarrow as pa

from memit.errors import InputError
from memit.generation import decode, sample_ids, text_seed
from memit.language_model import LanguageModel

TOKENS_PER_DIMENSION = 16
"""Tokens for each dimension of a key, unless a number of tokens is asked for."""
TOKENS_PER_TEXT = 128
"""The length of a text, if nothing ends it earlier."""
TEXTS_AT_ONCE = 64
"""Texts of a batch. Fewer are slower: a step reads all weights once, whatever their number."""
LEAST_SHARE = 1 / 32
"""Share of `TOKENS_PER_TEXT` that texts must have on average: below it, sampling would take long
and tell little."""


def wanted_tokens(tokens: int | None, width: int) -> int:
    """How many tokens are sampled for keys of `width` dimensions; None leaves it to the rule.

    Raises:
        InputError: they are fewer than the dimensions.
    """
    if tokens is not None and tokens < width:
        raise InputError(
            f"{tokens} sampled tokens leave the second moment of keys with {width} dimensions "
            f"singular: ask for at least {2 * width}, or leave the number to the rule "
            f"({TOKENS_PER_DIMENSION} × {width})."
        )
    return TOKENS_PER_DIMENSION * width if tokens is None else tokens


def texts_of(tokens: int) -> int:
    """How many texts of full length have `tokens` tokens; whole batches are written."""
    return TEXTS_AT_ONCE * ceil(tokens / (TEXTS_AT_ONCE * TOKENS_PER_TEXT))


def start_token(lm: LanguageModel) -> int:
    """The token that texts are written after: the one that begins texts, or else the one that ends
    them, which trained models have seen between two texts.

    Raises:
        InputError: the tokenizer has neither, or the model does not know it.
    """
    for token in (lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id):
        if isinstance(token, int):
            lm.check_room([token], "a sampled text")
            return token
    raise InputError(
        f"the tokenizer of {lm.name} has no token that begins or ends a text, so that the model "
        "cannot write texts of its own: give statistics a corpus."
    )


def missing_batches(wanted: int, found: Sequence[int]) -> range:
    """The numbers of the batches to sample next, given the tokens of those that were sampled; empty
    if these have as many as are wanted.

    Raises:
        InputError: the model ends its texts almost at once.
    """
    missing = wanted - sum(found)
    full = TEXTS_AT_ONCE * TOKENS_PER_TEXT
    mean = sum(found) / len(found) if found else full
    if mean < LEAST_SHARE * full:
        raise InputError(
            f"the model's own texts have {mean / TEXTS_AT_ONCE:.1f} tokens on average, too few for "
            "second moments: give statistics a corpus."
        )
    return range(len(found), len(found) + ceil(max(0, missing) / mean))


def sample_batch(lm: LanguageModel, number: int, seed: int) -> list[list[int]]:
    """Token ids of the texts of batch `number`, without those that end before their first token."""
    length = min(TOKENS_PER_TEXT, lm.context_length)
    numbers = range(number * TEXTS_AT_ONCE, (number + 1) * TEXTS_AT_ONCE)
    seeds = [text_seed(seed, text) for text in numbers]
    return [ids for ids in sample_ids(lm, start_token(lm), seeds, length) if ids]


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


def texts_table(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> pa.Table:
    """Texts with their token ids: a corpus's Parquet file with a column more. Statistics are taken
    of the ids: tokenising the text might give others."""
    texts = [decode(lm, ids) for ids in rows]
    return pa.table(
        {"ids": pa.array(rows, pa.list_(pa.int32())), "text": pa.array(texts, pa.string())}
    )
