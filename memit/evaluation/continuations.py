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
    def has_long_answers(self) -> bool:
        return any(len(answer) > 1 for answer in self.answers)


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
    resumes = any(stem.has_long_answers for stem in stems) and can_resume(lm)
    row_cost = _head_cost(lm, token_budget)

    def shape(stem: _Stem) -> tuple[int, int]:
        return 1, max(len(stem.ids), ceil(row_cost))

    def measure(batch: Sequence[_Stem]) -> list[Score]:
        return _measure(lm, batch, token_budget, resumes)

    found: dict[Place, Score] = {}
    for band in _bands(stems, lambda stem: len(stem.ids), token_budget // 4):
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
    for row, places in zip(
        continuation_rows(lm.tokenizer, prompts, answers), wanted.values(), strict=True
    ):
        _check(lm, row, questions[places[0][0]])
        ids = row.ids[: row.target[0]]
        stem = stems.setdefault(ids, _Stem(ids))
        stem.answers.setdefault(row.ids[row.target[0] :], []).extend(places)
        stem.questions += sum(a == 0 for _, a in places)
    return list(stems.values())


def _check(lm: LanguageModel, row: TokenRow, question: Question) -> None:
    if row.target[0] == 0:
        raise InputError(
            f"no token stands before the answer to {question.prompt!r}: give a longer prompt."
        )
    if len(row.ids) - 1 > lm.context_length:
        raise InputError(
            f"the prompt {question.prompt[:60]!r}… has {len(row.ids)} tokens with its answer, and "
            f"{lm.name} takes {lm.context_length}: shorten or remove it."
        )


def _measure(
    lm: LanguageModel, stems: Sequence[_Stem], token_budget: int, resumes: bool
) -> list[Score]:
    """Scores of all answers of some stems, stem by stem."""
    answers = [(row, answer) for row, stem in enumerate(stems) for answer in stem.answers]
    long = [index for index, (_, answer) in enumerate(answers) if len(answer) > 1]
    recorder = Recorder(lm, 0) if long and resumes else None
    lengths = torch.tensor([len(stem.ids) for stem in stems])
    logits = logits_at(
        lm,
        pad([stem.ids for stem in stems], lm.device),
        torch.arange(len(stems)),
        lengths - 1,
        recorder=recorder,
    )
    rows, firsts = zip(*((row, answer[0]) for row, answer in answers), strict=True)
    nll, right = _token_scores(logits, torch.tensor(rows), torch.tensor(firsts))
    before = recorder.before(lengths) if recorder is not None else None
    head_cost = _head_cost(lm, token_budget)

    def shape(index: int) -> tuple[int, int]:
        row, answer = answers[index]
        tail = len(answer) - 1
        return 1, max(len(stems[row].ids) + tail, ceil(head_cost * tail))

    def tails(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = [answers[index] for index in indices]
        return _tail_scores(lm, stems, chosen, before)

    for band in _bands(long, lambda index: len(answers[index][1]) - 1, token_budget // 16):
        for indices, (more_nll, more_right) in in_batches(band, shape, token_budget, tails):
            places = torch.tensor(indices, device=nll.device)
            nll[places] += more_nll
            right[places] += more_right
    return [
        Score(total / len(answer), count, len(answer))
        for total, count, (_, answer) in zip(nll.tolist(), right.tolist(), answers, strict=True)
    ]


def _tail_scores(
    lm: LanguageModel,
    stems: Sequence[_Stem],
    answers: Sequence[tuple[int, Tokens]],
    before: KeyValues | None,
) -> tuple[Tensor, Tensor]:
    """Sums over each answer's tokens after its first; whole rows are run where `before` is None."""
    rows, columns, wanted = [], [], []
    for index, (stem, answer) in enumerate(answers):
        start = 0 if before is not None else len(stems[stem].ids)
        rows += [index] * (len(answer) - 1)
        columns += range(start, start + len(answer) - 1)
        wanted += answer[1:]
    heads = [() if before is not None else stems[stem].ids for stem, _ in answers]
    tokens = [head + answer[:-1] for head, (_, answer) in zip(heads, answers, strict=True)]
    chosen = torch.tensor([stem for stem, _ in answers])
    logits = logits_at(
        lm,
        pad(tokens, lm.device),
        torch.tensor(rows),
        torch.tensor(columns),
        before=None if before is None else before.select(chosen),
    )
    nll, right = _token_scores(logits, torch.arange(len(wanted)), torch.tensor(wanted))
    return _sums(nll, rows, columns, len(answers)), _sums(right, rows, columns, len(answers))


def _token_scores(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of each token (k), and 1 where it is the most probable one (k)."""
    rows, tokens = rows.to(logits.device), tokens.to(logits.device)
    nll = logits.logsumexp(-1)[rows] - logits[rows, tokens]
    return nll, (logits.argmax(-1)[rows] == tokens).long()


def _sums(values: Tensor, rows: Sequence[int], columns: Sequence[int], count: int) -> Tensor:
    """Sum of each row's values, in an order that does not change from run to run."""
    table = values.new_zeros(count, max(columns) + 1)
    table[torch.tensor(rows), torch.tensor(columns)] = values
    return table.sum(1)
