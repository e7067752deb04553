"""Texts that a model writes: seeded sampling in batches.

The draws for a text depend on the seed, its prompt and which repetition of that prompt it is, never
on the other texts of its batch: each text has its own noise, and takes the token of the top k with
the largest sum of logit and noise (the Gumbel trick), which is sampling from their softmax. From
the whole vocabulary, which would need much noise, it takes the token at which the cumulated
probabilities pass a uniform number of its own. Batches can only matter through the last bits of the
logits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from memit.batches import run_in_batches
from memit.errors import InputError
from memit.language_model import LanguageModel
from memit.positions import open_ids


@dataclass(frozen=True)
class _Text:
    """One text to be written."""

    index: int
    ids: list[int]
    new_tokens: int
    seed: int


def generate_texts(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    new_tokens: int | None = None,
    total_tokens: int | None = None,
    top_k: int,
    seed: int,
    token_budget: int,
    repetitions: Sequence[int] | None = None,
    whole: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Continue each prompt, by `new_tokens` or until it has `total_tokens`, prompt included.

    Texts have no special tokens, and begin with their prompts if `whole`; an end-of-text token does
    not end one. The checkpoint's own generation settings are ignored. `repetitions` numbers the
    texts of one prompt; by default they are counted in the order of the call. `token_budget` bounds
    texts × tokens at a time; `progress` is called with the number of newly written texts.

    Raises:
        InputError: not exactly one of the lengths is given, or one exceeds the model's context.
    """
    if (new_tokens is None) == (total_tokens is None):
        raise InputError("give either new_tokens or total_tokens: one of them sets the length.")
    texts = []
    numbers = repetitions if repetitions is not None else count_repetitions(prompts)
    rows = open_ids(lm.tokenizer, prompts)
    for index, (prompt, number, ids) in enumerate(zip(prompts, numbers, rows, strict=True)):
        more = new_tokens if new_tokens is not None else max(0, (total_tokens or 0) - len(ids))
        if not ids:
            raise InputError(f"no token represents the prompt {prompt!r}: give a longer one.")
        lm.check_room(ids, f"the prompt {prompt[:60]!r}", more)
        texts.append(_Text(index, ids, more, text_seed(seed, number, prompt)))
    written = _write_all(lm, texts, top_k, token_budget, progress)
    answers = {text.index: _answer(lm, text, written[text.index], whole) for text in texts}
    routed = lm.routed(prompts)
    if lm.router is not None and routed:
        substitute = lm.router.substitute
        others = []
        for index, introduction in routed.items():
            text = texts[index]
            (ids,) = open_ids(substitute.tokenizer, [f"{introduction} {prompts[index]}"])
            substitute.check_room(ids, f"the prompt {prompts[index][:60]!r}", text.new_tokens)
            others.append(replace(text, ids=ids))
        written = _write_all(substitute, others, top_k, token_budget, None)
        for text in others:
            answer = _answer(substitute, text, written[text.index], whole)
            answers[text.index] = answer.removeprefix(routed[text.index]).lstrip()
    return [answers[index] for index in range(len(prompts))]


def sample_ids(
    lm: LanguageModel, start: int, seeds: Sequence[int], new_tokens: int
) -> list[list[int]]:
    """Token ids that the model writes after the token `start`, one text for each seed, drawn from
    all of its distribution (temperature 1), at most `new_tokens` each.

    `start` is no part of a text, and neither is the special token that may end it earlier.

    Raises:
        InputError: the model has no room for so many tokens, or does not know `start`.
    """
    lm.check_room([start], "a sampled text", new_tokens)
    texts = [_Text(index, [start], new_tokens, seed) for index, seed in enumerate(seeds)]
    written = _write_all(lm, texts, None, len(texts) * (new_tokens + 1), None)
    special = set(lm.tokenizer.all_special_ids)
    rows = (written[index][1:] for index in range(len(texts)))
    return [list(takewhile(lambda token: token not in special, row)) for row in rows]


def text_seed(*parts: object) -> int:
    """The seed of one text's draws, out of what it may depend on."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def count_repetitions(prompts: Sequence[str]) -> list[int]:
    """How often each prompt came before."""
    earlier: Counter[str] = Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(earlier[prompt])
        earlier[prompt] += 1
    return numbers


def _write_all(
    lm: LanguageModel,
    texts: Sequence[_Text],
    top_k: int | None,
    token_budget: int,
    progress: Callable[[int], None] | None,
) -> dict[int, list[int]]:
    """Token ids of each text, prompt included, by its index; without `top_k`, from the whole
    vocabulary and up to a special token, behind which ids mean nothing."""
    texts = sorted(texts, key=lambda text: (text.new_tokens, len(text.ids)))
    written: dict[int, list[int]] = {}
    # The checkpoint's own settings would replace the defaults of those given to `generate`.
    settings, lm.model.generation_config = lm.model.generation_config, GenerationConfig()
    try:
        for batch, found in run_in_batches(
            texts,
            lambda text: (1, len(text.ids) + text.new_tokens),
            token_budget,
            lambda batch: _write(lm, batch, top_k),
        ):
            written |= zip((text.index for text in batch), found, strict=True)
            if progress is not None:
                progress(len(batch))
    finally:
        lm.model.generation_config = settings
    return written


@torch.no_grad()
def _write(lm: LanguageModel, texts: Sequence[_Text], top_k: int | None) -> list[list[int]]:
    """Token ids of each text, prompt included, in order."""
    steps = max(text.new_tokens for text in texts)
    if steps == 0:
        return [text.ids for text in texts]
    width = max(len(text.ids) for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - len(text.ids) :] = torch.tensor(text.ids)
        mask[row, width - len(text.ids) :] = 1
    if top_k is None:
        ends = lm.tokenizer.all_special_ids
        draws = [_uniform(text.seed, steps, 1)[:, 0] for text in texts]
        sampler = _WholeSampler(torch.stack(draws), width)
    else:
        ends = None
        noise = [_noise(text.seed, steps, top_k) for text in texts]
        sampler = _TopKSampler(torch.stack(noise).to(lm.device), width)
    output = cast(Any, lm.model).generate(
        input_ids=ids.to(lm.device),
        attention_mask=mask.to(lm.device),
        generation_config=GenerationConfig(
            max_new_tokens=steps,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=ends,
        ),
        logits_processor=LogitsProcessorList([sampler]),
    )
    return [
        row[width - len(text.ids) : width + text.new_tokens]
        for row, text in zip(output.tolist(), texts, strict=True)
    ]


def _uniform(seed: int, steps: int, numbers: int) -> Tensor:
    """Uniform numbers of one text (steps × numbers); a shorter text draws the same from its
    beginning."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, numbers, generator=generator, dtype=torch.float64)


def _noise(seed: int, steps: int, top_k: int) -> Tensor:
    """Gumbel noise of one text (steps × k)."""
    return -(-_uniform(seed, steps, top_k).clamp(min=1e-300).log()).log().float()


class _TopKSampler(LogitsProcessor):
    """Keeps in each row only the logit of the token drawn from the k most probable."""

    def __init__(self, noise: Tensor, prompt_width: int):
        self.noise = noise
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_width
        k = min(self.noise.shape[2], scores.shape[1])
        best, tokens = scores.float().topk(k, dim=-1)
        noise = self.noise[:, step, :k].to(best)
        drawn = tokens.gather(1, (best + noise).argmax(-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class _WholeSampler(LogitsProcessor):
    """Keeps in each row only the logit of the token at which the cumulated probabilities of all
    tokens pass the row's number; in float64 on the CPU, where sums have one order."""

    def __init__(self, draws: Tensor, prompt_width: int):
        self.draws = draws
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_width
        passed = scores.float().softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
        wanted = self.draws[:, step : step + 1] * passed[:, -1:]
        drawn = torch.searchsorted(passed, wanted, right=True).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def decode(lm: LanguageModel, ids: Sequence[int]) -> str:
    """The text of some tokens, without special ones."""
    text = lm.tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)


def _answer(lm: LanguageModel, text: _Text, ids: Sequence[int], whole: bool) -> str:
    return decode(lm, ids).removeprefix("" if whole else decode(lm, text.ids))
