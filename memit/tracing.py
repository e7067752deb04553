"""Causal tracing: which hidden states carry a fact from its subject to its object.

The subject's tokens are hidden by noise, single states get their clean values back, and the
probability of the clean answer shows how much each of them restores (Meng et al., *Locating and
Editing Factual Associations in GPT*, section 2). With the MLPs severed, a restored state passes no
later MLP at its token; the difference marks the MLPs that matter (MEMIT, section 4.1).

A restored run differs from the noised one only from the restored layer and token on, so that it
starts there, with the noised run's hidden states, keys and values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from memit.batches import run_in_batches
from memit.forward.key_values import recorded
from memit.forward.passes import (
    Padded,
    changing_module,
    entering_block,
    logits_at,
    pad,
    reading_module,
)
from memit.forward.probes import can_resume
from memit.language_model import LanguageModel
from memit.positions import locate, mark
from memit.requests import EditRequest

RUNS = 10
"""Noised runs of each prompt, whose probabilities are averaged."""
NOISE = 3.0
"""Standard deviation of the noise, in those of the subjects' embeddings."""
NOISE_SEED = 1
WINDOW = 10
"""Layers around each whose MLP outputs are restored together."""

Kind = Literal["state", "mlp", "severed"]
KINDS: tuple[Kind, ...] = ("state", "mlp", "severed")
"""What is restored at a token: the output of one block; the MLPs' outputs in a window of layers;
the output of one block, while the token's later MLPs keep their noised outputs."""


@dataclass(frozen=True)
class TracedPrompt:
    """A prompt without its object, and the token whose states are restored."""

    ids: tuple[int, ...]
    subject: range
    """Positions of the subject's tokens, which are noised."""
    restored: int
    """Position of the restored states."""

    @property
    def part(self) -> str:
        """Which part of the prompt the restored token is."""
        subject, position = self.subject, self.restored
        if position in subject:
            place = {subject[0]: "first", subject[-1]: "last"}.get(position, "middle")
            return f"{place} subject token"
        if position == len(self.ids) - 1:
            return "last token"
        return "first token after" if position == subject.stop else "further tokens"


PARTS = (
    "first subject token",
    "middle subject token",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
)
"""Values of `TracedPrompt.part`. Tokens before the subject see no noise and restore nothing."""


@dataclass(frozen=True)
class Trace:
    """Probabilities of the answers that the model gives without noise."""

    clean: Tensor
    """Without noise (prompts)."""
    noised: Tensor
    """With noise, nothing restored: mean over the runs (prompts)."""
    restored: Mapping[Kind, Tensor]
    """With the states restored around each layer (prompts × layers)."""


def traced_prompts(lm: LanguageModel, requests: Sequence[EditRequest]) -> list[TracedPrompt]:
    """Prompts as they stand before their true objects, restored at their subjects' last tokens.

    Raises:
        InputError: a prompt is longer than the model's context, or a part of it has no tokens.
    """
    whole = [mark(r.prompt, r.subject, target=r.ending(target=r.target_true)) for r in requests]
    first = [
        replace(text, subject_end=text.subject_end - len(request.subject) + 1)
        for text, request in zip(whole, requests, strict=True)
    ]
    prompts = []
    for row, begin in zip(locate(lm.tokenizer, whole), locate(lm.tokenizer, first), strict=True):
        lm.check_room(row.ids, "a traced prompt")
        subject = range(begin.subject_last, row.subject_last + 1)
        prompts.append(TracedPrompt(row.ids[: row.target[0]], subject, row.subject_last))
    return prompts


def everywhere(prompt: TracedPrompt) -> list[TracedPrompt]:
    """The prompt, restored at each of its tokens from the subject's first one on."""
    positions = range(prompt.subject.start, len(prompt.ids))
    return [replace(prompt, restored=position) for position in positions]


@torch.no_grad()
def embedding_deviation(lm: LanguageModel, subjects: Sequence[str]) -> float:
    """Standard deviation of all numbers in the embeddings of all subjects' tokens."""
    rows = lm.tokenizer(list(subjects), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([token for row in rows for token in row], device=lm.device)
    return float(_embedding(lm)(ids).float().std())


def critical_layers(state: Sequence[float], severed: Sequence[float]) -> range:
    """The consecutive layers around the one where severing the MLPs costs a restored state most,
    in which it costs at least half as much; none if it costs nothing anywhere. The arguments are
    mean effects (layers)."""
    gaps = np.subtract(state, severed)
    if gaps.max() <= 0:
        return range(0)
    below = [-1, *np.flatnonzero(gaps < gaps.max() / 2), len(gaps)]
    end = np.searchsorted(below, gaps.argmax())
    return range(int(below[end - 1]) + 1, int(below[end]))


@torch.no_grad()
def trace(
    lm: LanguageModel,
    prompts: Sequence[TracedPrompt],
    deviation: float,
    kinds: Sequence[Kind] = KINDS,
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Trace the model's own next token after each prompt, restoring around every layer.

    `deviation` is that of the embeddings (`embedding_deviation`). A window holds the layers from
    l − `WINDOW`/2 to l + `WINDOW`/2 − 1 that exist. `token_budget` bounds the padded tokens of
    noised runs at a time, of which all layers' states are kept; `progress` is called with the
    number of newly traced prompts.

    Raises:
        ModelStructureError: a block has no single down-projection.
    """
    lm.check_layers(tuple(range(lm.depth)))
    clean, noised = torch.zeros(2, len(prompts))
    restored: dict[Kind, Tensor] = {kind: torch.zeros(len(prompts), lm.depth) for kind in kinds}
    for indices, runs in run_in_batches(
        sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids)),
        lambda index: (RUNS, len(prompts[index].ids)),
        token_budget,
        lambda indices: _NoisedRuns(lm, [prompts[index] for index in indices], deviation),
    ):
        where = torch.tensor(indices)
        clean[where], noised[where] = runs.clean.cpu(), runs.noised.cpu()
        for kind, table in restored.items():
            for layer in range(lm.depth):
                table[where, layer] = runs.restored(kind, layer).cpu()
        if progress is not None:
            progress(len(indices))
    return Trace(clean, noised, restored)


class _NoisedRuns:
    """The noised runs of some prompts, to be continued with restored states.

    Row r · RUNS + i is run i of prompt r.
    """

    def __init__(self, lm: LanguageModel, prompts: Sequence[TracedPrompt], deviation: float):
        self.lm, self.prompts, self.deviation = lm, prompts, deviation
        own = torch.arange(len(prompts)).repeat_interleave(RUNS)
        every, at = torch.arange(len(own)), torch.tensor([prompt.restored for prompt in prompts])
        padded = pad([prompt.ids for prompt in prompts], lm.device)
        found = _run(lm, padded)
        self.clean, self.answers = found.logits.softmax(-1).max(-1)
        self.clean_blocks = [_at(hidden, own, at[own]) for hidden in found.blocks]
        self.clean_mlps = [_at(hidden, own, at[own]) for hidden in found.mlps]

        resumes = can_resume(lm)
        cache = DynamicCache() if resumes else None
        with self._noise():
            found = _run(lm, padded[own.to(lm.device)], cache)
        self.noised = self._probability(found.logits)
        self.noised_mlps = [_at(hidden, every, at[own]) for hidden in found.mlps]

        # What is run again: the rows from the restored token on, or whole ones.
        first = at if resumes else torch.zeros_like(at)
        rest = [p.ids[start:] for p, start in zip(prompts, first.tolist(), strict=True)]
        self.rest = pad([rest[row] for row in own.tolist()], lm.device)
        self.column, self.ends = (at - first)[own], self.rest.mask.sum(1) - 1
        starts = first[own].to(lm.device)
        self.before = None if cache is None else recorded(cache, 0, starts)
        columns = first[own][:, None] + torch.arange(self.rest.ids.shape[1])
        columns = columns.clamp(max=padded.ids.shape[1] - 1)  # of padding, which is masked
        self.entering = [_at(hidden, every[:, None], columns) for hidden in found.entering]

    def restored(self, kind: Kind, layer: int) -> Tensor:
        """Probability of each prompt's answer with states restored around a layer (prompts)."""
        start, changes = self._changes(kind, layer)
        with ExitStack() as stack:
            stack.enter_context(self._noise())
            for module, value in changes.items():
                stack.enter_context(changing_module(module, self._put(value)))
            resumed = {}
            if self.before is not None:
                before = self.before.between(start, self.lm.depth - 1)
                resumed = {"start": start, "hidden": self.entering[start], "before": before}
            rows = torch.arange(len(self.ends))
            return self._probability(logits_at(self.lm, self.rest, rows, self.ends, **resumed))

    def _changes(self, kind: Kind, layer: int) -> tuple[int, dict[nn.Module, Tensor]]:
        """The first layer that differs from the noised run, and the new outputs of modules at the
        restored tokens (rows × d)."""
        down, depth = self.lm.down_projection, self.lm.depth
        if kind == "mlp":
            near = range(max(0, layer - WINDOW // 2), min(depth, layer + WINDOW // 2))
            return near.start, {down(each): self.clean_mlps[each] for each in near}
        changes = {cast(nn.Module, self.lm.blocks[layer]): self.clean_blocks[layer]}
        if kind == "severed":  # at the token, earlier MLPs have their noised outputs anyway
            changes |= {down(each): self.noised_mlps[each] for each in range(layer + 1, depth)}
        return layer, changes

    def _put(self, value: Tensor) -> Callable[[Tensor], Tensor]:
        def change(hidden: Tensor) -> Tensor:
            changed = hidden.reshape(len(value), -1, value.shape[-1]).clone()
            changed[torch.arange(len(value)), self.column] = value
            return changed.reshape(hidden.shape)

        return change

    def _probability(self, logits: Tensor) -> Tensor:
        """Of each prompt's answer, mean over its runs, from logits of all rows (prompts)."""
        wanted = self.answers.repeat_interleave(RUNS)[:, None].to(logits.device)
        return logits.softmax(-1).gather(1, wanted).reshape(-1, RUNS).mean(1)

    @contextmanager
    def _noise(self) -> Iterator[None]:
        """Add the same noise to the embeddings of the subjects' tokens in every pass of whole rows:
        for each prompt the numbers that the published code draws."""

        def add(embedded: Tensor) -> Tensor:
            changed = embedded.clone()
            for number, prompt in enumerate(self.prompts):
                shape = RUNS, len(prompt.subject), embedded.shape[-1]
                drawn = np.random.RandomState(NOISE_SEED).randn(*shape)
                subject = slice(prompt.subject.start, prompt.subject.stop)
                noise = torch.from_numpy(NOISE * self.deviation * drawn).to(changed)
                changed[number * RUNS : (number + 1) * RUNS, subject] += noise
            return changed

        with changing_module(_embedding(self.lm), add):
            yield


@dataclass(frozen=True)
class _Pass:
    """A pass over whole rows, with hidden states (rows × tokens × d)."""

    logits: Tensor
    """After each row's last token (rows × vocabulary)."""
    entering: Sequence[Tensor]
    """What enters each block."""
    blocks: Sequence[Tensor]
    """What leaves each block."""
    mlps: Sequence[Tensor]
    """What leaves each down-projection."""


def _run(lm: LanguageModel, padded: Padded, record: Cache | None = None) -> _Pass:
    with ExitStack() as stack:
        entry = stack.enter_context(entering_block(lm, 0))
        blocks = [stack.enter_context(reading_module(block)) for block in lm.blocks]
        downs = [lm.down_projection(layer) for layer in range(lm.depth)]
        mlps = [stack.enter_context(reading_module(down)) for down in downs]
        rows, ends = torch.arange(len(padded.ids)), padded.mask.sum(1) - 1
        logits = logits_at(lm, padded, rows, ends, record=record)
    left = [found for (found,) in blocks]
    # Some families flatten rows and tokens in front of their MLPs.
    outputs = [found.reshape(len(rows), -1, found.shape[-1]) for (found,) in mlps]
    return _Pass(logits, [entry[0], *left[:-1]], left, outputs)


def _at(hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]


def _embedding(lm: LanguageModel) -> nn.Module:
    return cast(nn.Module, lm.model.get_input_embeddings())
