"""How probable a model finds given answers after prompts: what all teacher-forced metrics need.

A prompt's tokens are run once for all of its answers and for all questions that share it, and the
head is asked only where an answer's token is due. An answer of one token needs nothing more; longer
ones stand one behind the other in the prompt's row, where none sees another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor

from memit.batches import in_batches
from memit.errors import InputError
from memit.forward import branch, can_branch, logits_at, pad
from memit.language_model import LanguageModel
from memit.positions import continuation_rows
from memit.routing import taken_over

LOGITS_AT_ONCE = 1 << 28
"""Most logits that one pass may give: 1 GiB in float32."""

Item = TypeVar("Item")
Tokens = tuple[int, ...]
Place = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """A prompt and the texts that may follow it, each as it stands."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """What the model makes of one answer under teacher forcing."""

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
class _Stem:
    """The tokens that stand before some answers."""

    ids: Tokens
    answers: dict[Tokens, list[Place]] = field(default_factory=dict)
    """Tokens of each answer, and the (question, answer) places that want its score."""
    questions: int = 0
    """How many questions are finished with this stem."""

    @property
    def tails(self) -> list[Tokens]:
        """What is run of the answers; the last token of one is never an input."""
        return [answer[:-1] for answer in self.answers]

    @property
    def length(self) -> int:
        """Tokens that are run."""
        return len(self.ids) + sum(map(len, self.tails))

    @property
    def scored(self) -> int:
        """Positions that the head is asked at."""
        return 1 + sum(map(len, self.tails))

    def apart(self) -> list[_Stem]:
        """The same as stems of which none has two answers of several tokens."""
        long = [answer for answer in self.answers if len(answer) > 1]
        others = [_Stem(self.ids, {answer: self.answers[answer]}) for answer in long[1:]]
        kept = {a: places for a, places in self.answers.items() if a not in long[1:]}
        return [_Stem(self.ids, kept, self.questions), *others]


@torch.no_grad()
def score_continuations(
    lm: LanguageModel,
    questions: Sequence[Question],
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[Score]]:
    """Score every answer of every question, in the order given.

    `token_budget` bounds the padded tokens on the device at a time; `progress` is told how many
    questions are newly finished. Raises `InputError` for a text longer than the model's context.
    """
    scores = _own_scores(lm, questions, token_budget, progress)
    introduced = taken_over(lm, [question.prompt for question in questions])
    if lm.router is not None and introduced:
        others = [
            Question(f"{text} {questions[place].prompt}", questions[place].answers)
            for place, text in introduced.items()
        ]
        found = _own_scores(lm.router.substitute, others, token_budget, None)
        for place, score in zip(introduced, found, strict=True):
            scores[place] = score
    return scores


def _own_scores(
    lm: LanguageModel,
    questions: Sequence[Question],
    token_budget: int,
    progress: Callable[[int], None] | None,
) -> list[list[Score]]:
    """What this very model makes of the answers."""
    stems = _stems(lm, questions)
    if not can_branch(lm, max((stem.length for stem in stems), default=0)):
        stems = [part for stem in stems for part in stem.apart()]
    cost = head_cost(lm, token_budget)

    def shape(stem: _Stem) -> tuple[int, int]:
        return 1, max(stem.length, ceil(cost * stem.scored))

    def measure(batch: Sequence[_Stem]) -> list[Score]:
        return _measure(lm, batch)

    found: dict[Place, Score] = {}
    for band in _bands(stems, lambda stem: stem.length, token_budget // 4):
        for batch, scores in in_batches(band, shape, token_budget, measure):
            places = [places for stem in batch for places in stem.answers.values()]
            for owners, score in zip(places, scores, strict=True):
                found |= dict.fromkeys(owners, score)
            if progress is not None:
                progress(sum(stem.questions for stem in batch))
    return [[found[q, a] for a in range(len(each.answers))] for q, each in enumerate(questions)]


def _bands(
    items: Iterable[Item], length: Callable[[Item], int], least: int
) -> Iterator[list[Item]]:
    """Runs of items in order of length, cut where the length grows once they have `least` tokens:
    padding costs more than a batch that is not full."""
    band: list[Item] = []
    tokens = 0
    for item in sorted(items, key=length):
        if tokens >= least and length(item) > length(band[-1]):
            yield band
            band, tokens = [], 0
        band.append(item)
        tokens += length(item)
    if band:
        yield band


def head_cost(lm: LanguageModel, token_budget: int) -> float:
    """How many tokens of the budget one position's logits count for."""
    return token_budget * lm.model.config.get_text_config().vocab_size / LOGITS_AT_ONCE


def _stems(lm: LanguageModel, questions: Sequence[Question]) -> list[_Stem]:
    """Every different run of tokens before an answer, with the answers that follow it."""
    wanted: dict[tuple[str, str], list[Place]] = {}
    for q, question in enumerate(questions):
        for a, answer in enumerate(question.answers):
            wanted.setdefault((question.prompt, answer), []).append((q, a))
    if not wanted:
        return []
    stems: dict[Tokens, _Stem] = {}
    for row, places in zip(continuation_rows(lm.tokenizer, wanted), wanted.values(), strict=True):
        prompt = questions[places[0][0]].prompt
        if row.target[0] == 0:
            raise InputError(
                f"no token stands before the answer to {prompt!r}: give a longer prompt."
            )
        lm.check_room(row.ids, f"the prompt {prompt[:60]!r}")
        ids = row.ids[: row.target[0]]
        stem = stems.setdefault(ids, _Stem(ids))
        stem.answers.setdefault(row.ids[row.target[0] :], []).extend(places)
        stem.questions += sum(a == 0 for _, a in places)
    return list(stems.values())


def _measure(lm: LanguageModel, stems: Sequence[_Stem]) -> list[Score]:
    """Scores of all answers of some stems, stem by stem."""
    ids, tails = [stem.ids for stem in stems], [stem.tails for stem in stems]
    if any(sum(map(bool, own)) > 1 for own in tails):
        rows = branch(ids, tails, lm.device)
    else:
        rows = pad([sum(own, stem) for stem, own in zip(ids, tails, strict=True)], lm.device)
    due = _due(stems)
    logits = logits_at(lm, rows, due.rows, due.columns)
    scores = torch.stack(_token_scores(logits, due.asked, due.tokens))
    # Not index_add, whose order of additions changes from run to run on a GPU.
    table = scores.new_zeros(2, *due.shape)
    table[:, due.answers, due.steps] = scores
    lengths = [len(answer) for stem in stems for answer in stem.answers]
    return [
        Score(nll / length, int(right), length)
        for nll, right, length in zip(*table.sum(2).tolist(), lengths, strict=True)
    ]


@dataclass(frozen=True)
class _Due:
    """The tokens of the answers of some stems, k in all, and the places whose logits they are due
    at, m in all: the answers of a stem share that of their first tokens."""

    rows: Tensor
    """Row of each place (m)."""
    columns: Tensor
    """Its column (m)."""
    asked: Tensor
    """The place that each token is due at (k)."""
    tokens: Tensor
    """Its id (k)."""
    answers: Tensor
    """The answer that it belongs to (k)."""
    steps: Tensor
    """Which of the answer's tokens it is (k)."""
    shape: tuple[int, int]
    """Number of answers, and of tokens in the longest."""


def _due(stems: Sequence[_Stem]) -> _Due:
    """Where the tokens of all answers are due."""
    places: list[tuple[int, int]] = []
    tokens: list[tuple[int, int, int, int]] = []
    number = longest = 0
    for row, stem in enumerate(stems):
        first, column = len(places), len(stem.ids)
        places.append((row, column - 1))
        for answer in stem.answers:
            tokens.append((first, answer[0], number, 0))
            for step, token in enumerate(answer[1:], start=1):
                tokens.append((len(places), token, number, step))
                places.append((row, column))
                column += 1
            number, longest = number + 1, max(longest, len(answer))
    rows, columns = torch.tensor(places).unbind(1)
    asked, ids, answers, steps = torch.tensor(tokens).unbind(1)
    return _Due(rows, columns, asked, ids, answers, steps, (number, longest))


def _token_scores(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of tokens at rows of the logits (k), and 1 where one is the most probable (k)."""
    rows, tokens = rows.to(logits.device), tokens.to(logits.device)
    nll = logits.logsumexp(-1)[rows] - logits[rows, tokens]
    return nll, (logits.argmax(-1)[rows] == tokens).to(nll.dtype)
