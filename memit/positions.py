"""From text to token positions: whole strings are tokenised once, positions come from characters.

Lengths of separately tokenised pieces are never added: a beginning-of-sequence token or a
SentencePiece leading space would shift them.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from operator import eq
from typing import TYPE_CHECKING

from memit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TEXTS_AT_ONCE = 2048
"""Texts that are tokenised together: encodings take several times the memory of their ids."""


@dataclass(frozen=True)
class MarkedText:
    """A text with the characters that matter."""

    text: str
    """The whole string."""
    subject_end: int
    """Index just after the subject's last character."""
    prompt_end: int
    """Index just after the prompt's last character; the target follows."""


@dataclass(frozen=True)
class TokenRow:
    """A tokenised text with the positions that matter."""

    ids: tuple[int, ...]
    """Token ids up to the end of the target, special tokens at the front included."""
    subject_last: int
    """Position of the last token that covers the subject's last character."""
    target: tuple[int, ...]
    """Positions of the target's tokens; empty for a prompt alone."""


def mark(template: str, subject: str, *, prefix: str = "", target: str | None = None) -> MarkedText:
    """Put `subject` in the template's `{}`, `prefix` before and `target`, unchanged, after it."""
    before, after = template.split("{}")
    subject_end = len(prefix) + len(before) + len(subject)
    prompt = f"{prefix}{before}{subject}{after}"
    return MarkedText(prompt + (target or ""), subject_end, len(prompt))


def locate(tokenizer: PreTrainedTokenizerBase, marked: Sequence[MarkedText]) -> list[TokenRow]:
    """Tokenise marked texts.

    Raises:
        InputError: a subject or a target has no tokens.
    """
    rows = []
    for start in range(0, len(marked), TEXTS_AT_ONCE):
        part = marked[start : start + TEXTS_AT_ONCE]
        tokenized = tokenize(tokenizer, [text.text for text in part])
        rows += [_row(text, ids, ends) for text, (ids, ends) in zip(part, tokenized, strict=True)]
    return rows


def continuation_rows(
    tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]]
) -> list[TokenRow]:
    """Token rows of prompts, each followed by its target as given; no subject is located."""
    marked = [MarkedText(prompt + target, len(prompt), len(prompt)) for prompt, target in pairs]
    return locate(tokenizer, marked)


def _row(marked: MarkedText, ids: list[int], ends: list[int]) -> TokenRow:
    # The token that completes the first m characters is the first one whose end reaches m.
    subject_last = bisect_left(ends, marked.subject_end)
    if subject_last == len(ends) or marked.subject_end == 0:
        raise InputError(f"no token represents the subject in {marked.text!r}; give another name.")
    target = _target_positions(marked, ends)
    if len(marked.text) > marked.prompt_end and not target:
        raise InputError(f"no token represents the object in {marked.text!r}; give another object.")
    length = target[-1] + 1 if target else len(ids)
    return TokenRow(tuple(ids[:length]), subject_last, tuple(target))


def _target_positions(marked: MarkedText, ends: list[int]) -> range:
    """Positions after the prompt, up to the text's end; a special token after it is left out."""
    # A token for a line break ends the prompt; a space may be part of the token after it.
    prompt_end = len(marked.text[: marked.prompt_end].rstrip(" "))
    text_end = len(marked.text.rstrip())
    first, last = bisect_left(ends, prompt_end), bisect_left(ends, text_end)
    if text_end <= marked.prompt_end or len(ends) in (first, last):
        return range(0)
    return range(first + (ends[first] <= marked.prompt_end), last + 1)


def open_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts to be continued: as the tokenizer makes them by default, without special
    tokens after the last character (`</s>`, `[SEP]`)."""
    if not texts:
        return []
    batch = tokenizer(list(texts), return_special_tokens_mask=True, return_attention_mask=False)
    return [
        ids[: max((end for end, added in enumerate(mask, start=1) if not added), default=0)]
        for ids, mask in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True)
    ]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each text as the tokenizer makes them by default, and for each token the number
    of the text's characters that are complete with it (ascending)."""
    if not tokenizer.is_fast:
        return [_by_decoding(tokenizer, text) for text in texts]
    batch = tokenizer(list(texts), return_offsets_mapping=True, return_attention_mask=False)
    tokenized = []
    for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        ends = _ends_from_offsets(text, offsets)
        tokenized.append(_by_decoding(tokenizer, text) if ends is None else (ids, ends))
    return tokenized


def _ends_from_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> list[int] | None:
    """Completed characters after each token, or None if the offsets cannot be right: they must
    ascend and cover everything but white space."""
    ends: list[int] = []
    reached = 0
    for index, (start, end) in enumerate(offsets):
        if start == end:  # a special token
            ends.append(reached)
            continue
        later = next((s for s, e in offsets[index + 1 :] if s != e), len(text))
        while end < later and unicodedata.combining(text[end]):
            end += 1  # tokenizers that compose characters leave combining marks out
        if end < reached or end > len(text) or text[reached:start].strip():
            return None
        # A character that continues in the next token is not complete.
        ends.append(max(ends[-1] if ends else 0, min(end, later)))
        reached = max(reached, end)
    return None if text[reached:].strip() else ends


def _by_decoding(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The same for a tokenizer without usable offsets: decode ever longer prefixes and compare."""
    ids: list[int] = tokenizer(text, return_attention_mask=False)["input_ids"]
    leading = len(text) - len(text.lstrip())
    ends = []
    for length in range(1, len(ids) + 1):
        decoded = tokenizer.decode(
            ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        ends.append(sum(takewhile(bool, map(eq, str(decoded).lstrip(), text.lstrip()))))
    # Inside a character of several bytes the decoded text may be shorter than it was before.
    ends = list(accumulate((leading + end if end else 0 for end in ends), max))
    if not ends or ends[-1] < len(text.rstrip()):
        raise InputError(
            f"the tokenizer does not give {text!r} back when it decodes its tokens, so that the "
            "subject cannot be located; use a tokenizer that does (a fast one has offsets)."
        )
    return ids, ends
