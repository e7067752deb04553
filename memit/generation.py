"""Texts that a model writes: seeded top-k sampling in batches.

The draws for a text depend on the seed, its prompt and which repetition of that prompt it is, never
on the other texts of its batch: each text has its own noise, and takes the token of the top k with
the largest sum of logit and noise (the Gumbel trick), which is sampling from their softmax. Batches
can only matter through the last bits of the logits.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from memit.batches import run_in_batches
from memit.errors import InputError
from memit.language_model import LanguageModel
from memit.positions import open_ids

ANSWER_TOKENS = 6
"""Length of a model's brief answer to a prompt."""


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
    top_k: int = 1,
    seed: int = 0,
    token_budget: int,
    repetitions: Sequence[int] | None = None,
    stops: Sequence[str] = (),
    first: Callable[[Sequence[int], Tensor], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Continue each prompt, by default greedily: what follows it in `new_tokens`, or the whole text
    of `total_tokens`, prompt included.

    Texts have no special tokens; an end-of-text token does not end one. With `stops`, single
    characters, what follows a prompt begins with a visible character, ends before the first of them
    or before a special token, and has no space around it. The checkpoint's own generation settings
    are ignored. `repetitions` numbers the texts of one prompt; by default they are counted in the
    order of the call. `token_budget` bounds texts × tokens at a time; `first` is called with the
    indices of some prompts and the float32 logits of the tokens behind them (k × vocabulary),
    `progress` with the number of newly written texts.

    Raises:
        InputError: not exactly one of the lengths is given, one exceeds the model's context, or a
            prompt has no tokens.
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
        digest = hashlib.sha256(f"{seed}\n{number}\n{prompt}".encode()).digest()
        texts.append(_Text(index, ids, more, int.from_bytes(digest[:8], "big", signed=True)))
    whole = total_tokens is not None
    written = _write_all(lm, texts, top_k, token_budget, whole, stops, progress, first)
    routed = lm.routed(prompts)
    if lm.router is not None and routed:
        substitute = lm.router.substitute
        others = []
        for index, introduction in routed.items():
            text = texts[index]
            (ids,) = open_ids(substitute.tokenizer, [f"{introduction} {prompts[index]}"])
            substitute.check_room(ids, f"the prompt {prompts[index][:60]!r}", text.new_tokens)
            others.append(replace(text, ids=ids))
        answers = _write_all(substitute, others, top_k, token_budget, whole, stops, None)
        for index, answer in answers.items():
            written[index] = answer.removeprefix(routed[index]).lstrip()
    return [written[index] for index in range(len(prompts))]


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
    top_k: int,
    token_budget: int,
    whole: bool,
    stops: Sequence[str],
    progress: Callable[[int], None] | None,
    first: Callable[[Sequence[int], Tensor], None] | None = None,
) -> dict[int, str]:
    """The texts by their index."""
    texts = sorted(texts, key=lambda text: (text.new_tokens, len(text.ids)))
    written, special = {}, set(lm.tokenizer.all_special_ids)
    with default_generation(lm):
        for batch, found in run_in_batches(
            texts,
            lambda text: (1, len(text.ids) + text.new_tokens),
            token_budget,
            lambda batch: _write(lm, batch, top_k, stops, first),
        ):
            for text, ids in zip(batch, found, strict=True):
                if stops:
                    new = takewhile(lambda token: token not in special, ids[len(text.ids) :])
                    ids = [*text.ids, *new]
                prompt = "" if whole else _decode(lm, text.ids)
                answer = _decode(lm, ids).removeprefix(prompt)
                for stop in stops:
                    answer = answer.lstrip().partition(stop)[0]
                written[text.index] = answer.strip() if stops else answer
            if progress is not None:
                progress(len(batch))
    return written


@contextmanager
def default_generation(lm: LanguageModel) -> Iterator[None]:
    """Without the checkpoint's own settings, which replace the defaults of those that are given to
    `generate`."""
    settings, lm.model.generation_config = lm.model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.model.generation_config = settings


@torch.no_grad()
def _write(
    lm: LanguageModel,
    texts: Sequence[_Text],
    top_k: int,
    stops: Sequence[str],
    first: Callable[[Sequence[int], Tensor], None] | None,
) -> list[list[int]]:
    """Token ids of each text, prompt included, up to a stop or longer."""
    steps = max(text.new_tokens for text in texts)
    if steps == 0:
        return [text.ids for text in texts]
    width = max(len(text.ids) for text in texts)
    if len(texts) > 1 and width + steps - 1 > lm.context_length:  # a long prompt beside a long text
        half = len(texts) // 2
        parts = texts[:half], texts[half:]
        return [ids for part in parts for ids in _write(lm, part, top_k, stops, first)]
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - len(text.ids) :] = torch.tensor(text.ids)
        mask[row, width - len(text.ids) :] = 1
    noise = torch.stack([_noise(text.seed, steps, top_k) for text in texts])
    told = first and partial(first, [text.index for text in texts])
    output = cast(Any, lm.model).generate(
        input_ids=ids.to(lm.device),
        attention_mask=mask.to(lm.device),
        generation_config=GenerationConfig(
            max_new_tokens=steps, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0
        ),
        logits_processor=LogitsProcessorList([_TopKSampler(noise.to(lm.device), width, told)]),
        stopping_criteria=StoppingCriteriaList([_AllStopped(lm, width, stops)] if stops else []),
    )
    return [
        row[width - len(text.ids) : width + text.new_tokens]
        for row, text in zip(output.tolist(), texts, strict=True)
    ]


def _noise(seed: int, steps: int, top_k: int) -> Tensor:
    """Gumbel noise of one text (steps × k); a shorter text draws the same from its beginning."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(steps, top_k, generator=generator, dtype=torch.float64)
    return -(-uniform.clamp(min=1e-300).log()).log().float()


class _TopKSampler(LogitsProcessor):
    """Keeps in each row only the logit of the token drawn from the k most probable."""

    def __init__(self, noise: Tensor, prompt_width: int, first: Callable[[Tensor], None] | None):
        self.noise = noise
        self.prompt_width = prompt_width
        self.first = first
        """Called with the logits of the first step."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_width
        if step == 0 and self.first is not None:
            self.first(scores.float())
        k = min(self.noise.shape[2], scores.shape[1])
        best, tokens = scores.float().topk(k, dim=-1)
        noise = self.noise[:, step, :k].to(best)
        drawn = tokens.gather(1, (best + noise).argmax(-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class _AllStopped(StoppingCriteria):
    """Ends a batch once each of its rows has written a stop, behind more than white space, or a
    special token."""

    def __init__(self, lm: LanguageModel, prompt_width: int, stops: Sequence[str]):
        self.lm, self.prompt_width, self.stops = lm, prompt_width, stops
        self.special = set(lm.tokenizer.all_special_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        written = input_ids[:, self.prompt_width :].tolist()
        return torch.tensor([self._ends(ids) for ids in written], device=input_ids.device)

    def _ends(self, ids: list[int]) -> bool:
        text = _decode(self.lm, ids).lstrip()
        return not self.special.isdisjoint(ids) or any(stop in text for stop in self.stops)


def _decode(lm: LanguageModel, ids: list[int]) -> str:
    text = lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
