"""How probable a model finds given answers after prompts: the basis of all teacher-forced metrics.

The tokens of a prompt are run once for all of its answers and for all questions that share it, and
give the scores of the answers' first tokens. Later tokens of long answers are run against the
prompt's keys and values.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from memit.batches import run_in_batches
from memit.errors import InputError
from memit.forward.key_values import KeyValues, recorded
from memit.forward.passes import logits_at, pad
from memit.forward.probes import can_resume
from memit.language_model import LanguageModel
from memit.positions import continuation_rows

LOGITS_AT_ONCE = 1 << 28
"""Most logits that one pass may give: 1 GiB in float32."""

Tokens = tuple[int, ...]
Index = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """A prompt and the texts that may follow it, leading spaces included."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """The model's score of one answer under teacher forcing."""

    nll: float
    """Mean over the answer's tokens of −log p, in nats."""
    right: int
    """How many of the answer's tokens the model would have chosen itself (argmax)."""
    tokens: int
    """How many tokens the answer has."""

    @property
    def hit(self) -> bool:
        """Whether the model would have given the whole answer."""
        return self.right == self.tokens


@dataclass
class _Prompt:
    """The tokens of a prompt and the answers that follow it."""

    ids: Tokens
    answers: dict[Tokens, list[Index]] = field(default_factory=dict)
    """Tokens of each answer, and the (question, answer) indices that want its score."""

    @property
    def length(self) -> int:
        """Tokens that are run; the last token of an answer is never an input."""
        return len(self.ids) + self.scored - 1

    @property
    def scored(self) -> int:
        """Positions that the head is asked at: the answers share that of their first tokens."""
        return 1 + sum(len(answer) - 1 for answer in self.answers)


@torch.no_grad()
def score_continuations(
    lm: LanguageModel,
    questions: Sequence[Question],
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[Score]]:
    """Score every answer of every question, in the order given.

    `token_budget` bounds the padded tokens on the device at a time; `progress` is called with the
    number of newly finished questions.

    Raises:
        InputError: a text is longer than the model's context.
    """
    scores = _own_scores(lm, questions, token_budget, progress)
    routed = lm.routed([question.prompt for question in questions])
    if lm.router is not None and routed:
        others = [
            Question(f"{text} {questions[index].prompt}", questions[index].answers)
            for index, text in routed.items()
        ]
        found = _own_scores(lm.router.substitute, others, token_budget, None)
        for index, score in zip(routed, found, strict=True):
            scores[index] = score
    return scores


def _own_scores(
    lm: LanguageModel,
    questions: Sequence[Question],
    token_budget: int,
    progress: Callable[[int], None] | None,
) -> list[list[Score]]:
    """Scores by this very model, without its router."""
    cost = head_cost(lm, token_budget)

    def shape(prompt: _Prompt) -> tuple[int, int]:
        return 1, max(prompt.length, ceil(cost * prompt.scored))

    found: dict[Index, Score] = {}
    for band in _bands(_prompts(lm, questions), token_budget // 4):
        for batch, scores in run_in_batches(band, shape, token_budget, partial(_measure, lm)):
            wanted = [indices for prompt in batch for indices in prompt.answers.values()]
            for indices, score in zip(wanted, scores, strict=True):
                found |= dict.fromkeys(indices, score)
            if progress is not None:
                progress(sum(answer == 0 for indices in wanted for _, answer in indices))
    return [[found[q, a] for a in range(len(each.answers))] for q, each in enumerate(questions)]


def _bands(prompts: Iterable[_Prompt], least: int) -> Iterator[list[_Prompt]]:
    """Runs of prompts in order of length, cut where it grows once they have `least` tokens: padding
    costs more than a batch that is not full."""
    band: list[_Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: prompt.length):
        if band and prompt.length > band[-1].length and sum(p.length for p in band) >= least:
            yield band
            band = []
        band.append(prompt)
    if band:
        yield band


def head_cost(lm: LanguageModel, token_budget: int) -> float:
    """How many tokens of the budget one position's logits count for."""
    return token_budget * lm.model.config.get_text_config().vocab_size / LOGITS_AT_ONCE


def _prompts(lm: LanguageModel, questions: Sequence[Question]) -> list[_Prompt]:
    """Every different run of tokens before an answer, with the answers that follow it."""
    wanted: dict[tuple[str, str], list[Index]] = {}
    for q, question in enumerate(questions):
        for a, answer in enumerate(question.answers):
            wanted.setdefault((question.prompt, answer), []).append((q, a))
    if not wanted:
        return []
    prompts: dict[Tokens, _Prompt] = {}
    for row, indices in zip(continuation_rows(lm.tokenizer, wanted), wanted.values(), strict=True):
        text = questions[indices[0][0]].prompt
        if row.target[0] == 0:
            raise InputError(f"no token precedes the answer to {text!r}: give a longer prompt.")
        lm.check_room(row.ids, f"the prompt {text[:60]!r}")
        ids = row.ids[: row.target[0]]
        prompt = prompts.setdefault(ids, _Prompt(ids))
        prompt.answers.setdefault(row.ids[row.target[0] :], []).extend(indices)
    return list(prompts.values())


def _measure(lm: LanguageModel, prompts: Sequence[_Prompt]) -> list[Score]:
    """Scores of all answers of some prompts, prompt by prompt."""
    answers = [(row, answer) for row, prompt in enumerate(prompts) for answer in prompt.answers]
    later = [(i, step) for i, (_, answer) in enumerate(answers) for step in range(1, len(answer))]
    cache = DynamicCache() if later and can_resume(lm) else None
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
    padded = pad([prompt.ids for prompt in prompts], lm.device)
    logits = logits_at(lm, padded, torch.arange(len(prompts)), lengths - 1, record=cache)
    # −log p and hits (2 × answers × tokens), summed over tokens at the end: not by index_add, whose
    # order of additions changes from run to run on a GPU.
    table = logits.new_zeros(2, len(answers), max(len(answer) for _, answer in answers))
    # A prompt's last position gives the first token of all of its answers.
    rows, first = zip(*((row, answer[0]) for row, answer in answers), strict=True)
    table[:, :, 0] = _token_scores(logits, torch.tensor(rows), torch.tensor(first))
    if later:
        which, steps = torch.tensor(later).unbind(1)
        before = None if cache is None else recorded(cache, 0, lengths.to(lm.device))
        table[:, which, steps] = _later_scores(lm, prompts, answers, which, steps, before)
    sums = zip(answers, *table.sum(2).tolist(), strict=True)
    return [Score(nll / len(a), int(right), len(a)) for (_, a), nll, right in sums]


def _later_scores(
    lm: LanguageModel,
    prompts: Sequence[_Prompt],
    answers: Sequence[tuple[int, Tokens]],
    which: Tensor,
    steps: Tensor,
    before: KeyValues | None,
) -> Tensor:
    """Scores (2 × k) of tokens `steps` of answers `which` (k each), first tokens excluded.

    The answers continue the keys and values of their prompts' rows; without these, as the model
    cannot be resumed, the prompts are run again before them.
    """
    chosen, rows = which.unique(return_inverse=True)
    long = [answers[index] for index in chosen.tolist()]
    if before is not None:
        before = before.select(torch.tensor([row for row, _ in long], device=lm.device))
    stems = [prompts[row].ids if before is None else () for row, _ in long]
    tails = [stem + answer[:-1] for stem, (_, answer) in zip(stems, long, strict=True)]
    columns = torch.tensor([len(stem) for stem in stems])[rows] + steps - 1
    logits = logits_at(lm, pad(tails, lm.device), rows, columns, before=before)
    tokens = torch.tensor([token for _, answer in long for token in answer[1:]])
    return _token_scores(logits, torch.arange(len(tokens)), tokens)


def _token_scores(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """−log p of tokens at rows of the logits, and 1 where one is the most probable (2 × k)."""
    rows, tokens = rows.to(logits.device), tokens.to(logits.device)
    nll = logits.logsumexp(-1)[rows] - logits[rows, tokens]
    return torch.stack((nll, (logits.argmax(-1)[rows] == tokens).to(nll.dtype)))
