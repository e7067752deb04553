"""How probable a model finds given answers after prompts: what all teacher-forced metrics need.

A prompt's tokens are run once for all of its answers and for all questions that share it, and the
head is asked only where an answer's token is due. An answer of one token needs nothing more; longer
ones are read on against the prompt's keys and values.
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
from memit.forward import KeyValues, Recorder, can_resume, logits_at, pad
from memit.language_model import LanguageModel
from memit.positions import TokenRow, continuation_rows
from memit.routing import taken_over

LOGITS_AT_ONCE = 1 << 28
"""Most logits that one pass may give: 1 GiB in float32."""

Item = TypeVar("Item")
Tokens = tuple[int, ...]
Place = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """A prompt and the texts that may follow it after a space."""

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
    def lead(self) -> Tokens:
        """The longest answer, which is run in one row with the stem."""
        return max(self.answers, key=len)

    @property
    def row(self) -> Tokens:
        """The tokens that are run; the last one of an answer is never an input."""
        return self.ids + self.lead[:-1]


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
    stems.sort(key=lambda stem: len(stem.ids))
    resumes = any(len(a) > 1 for stem in stems for a in stem.answers) and can_resume(lm)
    row_cost = _head_cost(lm, token_budget)

    def shape(stem: _Stem) -> tuple[int, int]:
        return 1, max(len(stem.row), ceil(row_cost * len(stem.lead)))

    def measure(batch: Sequence[_Stem]) -> list[Score]:
        return _measure(lm, batch, token_budget, resumes)

    found: dict[Place, Score] = {}
    for band in _bands(stems, lambda stem: len(stem.row), token_budget // 4):
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


def _head_cost(lm: LanguageModel, token_budget: int) -> float:
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
    prompts, answers = zip(*wanted, strict=True)
    stems: dict[Tokens, _Stem] = {}
    longest = lm.context_length
    for row, places in zip(
        continuation_rows(lm.tokenizer, prompts, answers), wanted.values(), strict=True
    ):
        if row.target[0] == 0 or len(row.ids) - 1 > longest:
            raise _unanswerable(lm, row, questions[places[0][0]])
        ids = row.ids[: row.target[0]]
        stem = stems.setdefault(ids, _Stem(ids))
        stem.answers.setdefault(row.ids[row.target[0] :], []).extend(places)
        stem.questions += sum(a == 0 for _, a in places)
    return list(stems.values())


def _unanswerable(lm: LanguageModel, row: TokenRow, question: Question) -> InputError:
    if row.target[0] == 0:
        return InputError(
            f"no token stands before the answer to {question.prompt!r}: give a longer prompt."
        )
    return InputError(
        f"the prompt {question.prompt[:60]!r}… has {len(row.ids)} tokens with its answer, and "
        f"{lm.name} takes {lm.context_length}: shorten or remove it."
    )


def _measure(
    lm: LanguageModel, stems: Sequence[_Stem], token_budget: int, resumes: bool
) -> list[Score]:
    """Scores of all answers of some stems, stem by stem."""
    answers = [(row, answer) for row, stem in enumerate(stems) for answer in stem.answers]
    places = {answer: index for index, answer in enumerate(answers)}
    leads = [places[row, stem.lead] for row, stem in enumerate(stems)]
    others = sorted({i for i, (_, answer) in enumerate(answers) if len(answer) > 1} - {*leads})
    recorder = Recorder(lm, 0) if others and resumes else None
    lengths = torch.tensor([len(stem.ids) for stem in stems])
    tails = _Tails.after(lengths.tolist(), [stem.lead for stem in stems])
    logits = logits_at(
        lm,
        pad([stem.row for stem in stems], lm.device),
        torch.cat([torch.arange(len(stems)), tails.rows]),
        torch.cat([lengths - 1, tails.columns]),
        recorder=recorder,
    )
    rows, firsts = zip(*((row, answer[0]) for row, answer in answers), strict=True)
    sums = torch.stack(
        _token_scores(logits[: len(stems)], torch.tensor(rows), torch.tensor(firsts))
    )
    sums[:, leads] += tails.sums(logits[len(stems) :])
    before = recorder.before(lengths) if recorder is not None else None
    head_cost = _head_cost(lm, token_budget)

    def shape(index: int) -> tuple[int, int]:
        row, answer = answers[index]
        tail = len(answer) - 1
        return 1, max(len(stems[row].ids) + tail, ceil(head_cost * tail))

    def read_on(indices: Sequence[int]) -> Tensor:
        return _read_on(lm, stems, [answers[index] for index in indices], before)

    for band in _bands(others, lambda index: len(answers[index][1]) - 1, token_budget // 16):
        for indices, more in in_batches(band, shape, token_budget, read_on):
            sums[:, indices] += more
    return [
        Score(nll / len(answer), int(right), len(answer))
        for nll, right, (_, answer) in zip(*sums.tolist(), answers, strict=True)
    ]


def _read_on(
    lm: LanguageModel,
    stems: Sequence[_Stem],
    answers: Sequence[tuple[int, Tokens]],
    before: KeyValues | None,
) -> Tensor:
    """Sums over each answer's tokens after its first (2 × answers), read against the keys and
    values before it; whole rows are run where there are none."""
    heads = [stems[row].ids if before is None else () for row, _ in answers]
    tokens = [head + answer[:-1] for head, (_, answer) in zip(heads, answers, strict=True)]
    tails = _Tails.after([len(head) for head in heads], [answer for _, answer in answers])
    rows = [row for row, _ in answers]
    if before is not None and rows != list(range(len(stems))):
        before = before.select(torch.tensor(rows))
    logits = logits_at(
        lm,
        pad(tokens, lm.device),
        tails.rows,
        tails.columns,
        before=before,
    )
    return tails.sums(logits)


@dataclass(frozen=True)
class _Tails:
    """The tokens of some answers after their first, k in all."""

    rows: Tensor
    """Which answer each belongs to (k)."""
    steps: Tensor
    """Which of the answer's tokens it is, from 0 for the second (k)."""
    columns: Tensor
    """The column whose logits it is due at (k)."""
    tokens: Tensor
    """Its id (k)."""
    shape: tuple[int, int]
    """Number of answers, and of tokens after the first in the longest."""

    @staticmethod
    def after(starts: Sequence[int], answers: Sequence[Tokens]) -> _Tails:
        """Those of answers whose first tokens stand in the columns `starts`."""
        places = [
            (row, step, start + step, token)
            for row, (start, answer) in enumerate(zip(starts, answers, strict=True))
            for step, token in enumerate(answer[1:])
        ]
        table = torch.tensor(places, dtype=torch.long).reshape(-1, 4)
        rows, steps, columns, tokens = table.unbind(1)
        shape = len(answers), max(map(len, answers)) - 1
        return _Tails(rows, steps, columns, tokens, shape)

    def sums(self, logits: Tensor) -> Tensor:
        """Sums over each answer's tokens of −log p and of argmax hits (2 × answers), out of the
        logits at their columns (k × vocabulary)."""
        scores = torch.stack(_token_scores(logits, torch.arange(len(self.tokens)), self.tokens))
        # Not index_add, whose order of additions changes from run to run on a GPU.
        table = scores.new_zeros(2, *self.shape)
        table[:, self.rows, self.steps] = scores
        return table.sum(2)


def _token_scores(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of tokens at rows of the logits (k), and 1 where one is the most probable (k)."""
    rows, tokens = rows.to(logits.device), tokens.to(logits.device)
    nll = logits.logsumexp(-1)[rows] - logits[rows, tokens]
    return nll, (logits.argmax(-1)[rows] == tokens).to(nll.dtype)
