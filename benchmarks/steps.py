"""One function a step: our code and the oracle on the same work, and the floor of that work."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.floor import (
    Machine,
    Timing,
    Work,
    covariance_work,
    evaluation_work,
    generation_work,
    median_time,
    spread_work,
    targets_work,
    timed,
)
from benchmarks.memory import PeakMemory
from benchmarks.workload import (
    OBJECT_TOKENS,
    PREFIX_TOKENS,
    PREFIXES,
    PROMPT_TOKENS,
    SUBJECT_TOKENS,
    Shape,
    make_documents,
    make_prefixes,
    make_records,
    make_requests,
)
from memit import reference as oracle
from memit.batches import auto_token_budget
from memit.evaluation.counterfact import prompts_of, score_prompts
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.positions import continuation_rows
from memit.quadratic import Quadratic, solve
from memit.requests import EditRequest, Record
from memit.sampled_corpus import sample_ids, start_token
from memit.second_moment import SecondMoment, collect_second_moments
from memit.spread import spread
from memit.targets import compute_targets

ROWS = PREFIXES + 1
BEFORE = SUBJECT_TOKENS - 1
"""Tokens of the plain row in front of the subject's last one."""
AFTER = 1 + PROMPT_TOKENS + OBJECT_TOKENS - 1
"""Tokens that are run from the subject's last one on; the last object token is never an input."""

# The oracle looks positions up by decoding; that is done once and not timed. Ours are timed, but
# for the evaluation, where its tokenising is told by itself.
oracle.row = functools.cache(oracle.row)
oracle.continuation = functools.cache(oracle.continuation)


@dataclass(frozen=True)
class Bench:
    """What all steps share."""

    shape: Shape
    lm: LanguageModel
    device: str
    machine: Machine
    token_budget: int
    literal: PreTrainedModel
    """The same model for the oracle, untouched."""

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The method's settings; no edit stops early, so that the work is the same everywhere."""
        return Hyperparameters(
            self.shape.layers, self.shape.covariance_weight, evaluations=25, loss_threshold=0.0
        )


def _row(bench: Bench, time: Timing, work: Work, peak: PeakMemory, **more: Any) -> dict:
    floor, seconds = work.seconds(bench.machine), time.seconds
    return {
        **more,
        "seconds": seconds,
        "cpu_seconds": time.cpu_seconds,
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
        "peak_bytes": peak.bytes,
    }


def random_moments(bench: Bench) -> dict[int, SecondMoment]:
    """A well-conditioned second moment for each edited layer, on the CPU."""
    width = bench.lm.inner_width
    generator = torch.Generator().manual_seed(5)
    half = torch.randn(width, 2 * width if width < 2048 else 256, generator=generator)
    moment = SecondMoment(half @ half.T / half.shape[1] + 0.1 * torch.eye(width), 1)
    return dict.fromkeys(bench.shape.layers, moment)


# --- targets ---------------------------------------------------------------------------------


def run_targets(bench: Bench, requests: Sequence[EditRequest]) -> Tensor:
    """Our targets."""
    budget, hp = bench.token_budget, bench.hyperparameters
    return compute_targets(
        bench.lm, requests, make_prefixes(bench.shape), hp, token_budget=budget
    ).z


def targets(bench: Bench, count: int, repeats: int = 3) -> dict:
    """Seconds an edit of the optimisation."""
    requests = make_requests(bench.shape, count)
    with PeakMemory(bench.device) as peak:
        time = median_time(
            lambda: run_targets(bench, requests),
            bench.device,
            repeats,
            first=lambda: run_targets(bench, requests[:1]),
        )
    per_batch = bench.token_budget // (ROWS * (AFTER + BEFORE + PREFIX_TOKENS))
    work = targets_work(
        bench.shape,
        count,
        25,
        row_tokens=(BEFORE, AFTER),
        prefix_tokens=PREFIX_TOKENS,
        rows=ROWS,
        element=bench.lm.dtype.itemsize,
        batches=-(-count // max(1, per_batch)),
    )
    each = time.seconds / count
    return _row(bench, time, work, peak, count=count, seconds_per_edit=each)


def oracle_targets(bench: Bench, count: int) -> Timing:
    """The oracle's times for `count` edits."""
    prefixes, hp = make_prefixes(bench.shape), bench.hyperparameters
    model, tokenizer = bench.literal, bench.lm.tokenizer
    requests = make_requests(bench.shape, count + 1)
    oracle.target(model, tokenizer, requests[-1], prefixes, hp)

    def run() -> None:
        for request in requests[:count]:
            oracle.target(model, tokenizer, request, prefixes, hp)

    return timed(run, bench.device)


# --- spread ----------------------------------------------------------------------------------


def spread_step(bench: Bench, count: int, repeats: int = 3) -> dict:
    """Seconds of the whole spread over all layers."""
    requests, prefixes = make_requests(bench.shape, count), make_prefixes(bench.shape)
    z = torch.randn(count, bench.lm.width, generator=torch.Generator().manual_seed(6))
    moments, weight = random_moments(bench), bench.shape.covariance_weight

    def run() -> None:
        spread(
            bench.lm,
            requests,
            prefixes,
            z,
            lambda layer: Quadratic(moments[layer], weight),
            bench.hyperparameters,
            token_budget=bench.token_budget,
            held_bytes=(1 << 25) if bench.device == "cpu" else (1 << 34),
        )

    with PeakMemory(bench.device) as peak:
        time = median_time(run, bench.device, repeats)
    work = spread_work(bench.shape, count, SUBJECT_TOKENS, ROWS)  # the prefixes are shared
    return _row(bench, time, work, peak, count=count)


def oracle_spread(bench: Bench, count: int, repeats: int = 3) -> Timing:
    """The oracle's times for the spread."""
    requests, prefixes = make_requests(bench.shape, count), make_prefixes(bench.shape)
    z = torch.randn(count, bench.lm.width, generator=torch.Generator().manual_seed(6))
    covariances = {layer: moment.mean for layer, moment in random_moments(bench).items()}
    model, tokenizer, hp = bench.literal, bench.lm.tokenizer, bench.hyperparameters

    def run() -> None:
        oracle.spread(model, tokenizer, requests, prefixes, z, covariances, hp)

    return median_time(run, bench.device, repeats)


def solve_step(bench: Bench, count: int) -> float:
    """Seconds of one layer's closed form for `count` edits."""
    moment = random_moments(bench)[bench.shape.layers[0]]
    K = torch.randn(bench.lm.inner_width, count, device=bench.device, dtype=torch.float64)
    R = torch.randn(bench.lm.width, count, device=bench.device, dtype=torch.float64)
    quadratic = Quadratic(moment, bench.shape.covariance_weight)
    return timed(lambda: solve(K, R, quadratic, "x"), bench.device).seconds


# --- covariance ------------------------------------------------------------------------------


def covariance(bench: Bench, tokens: int, layers: Sequence[int], repeats: int = 3) -> dict:
    """Tokens a second of one pass for several layers."""
    documents = make_documents(bench.shape, tokens)
    real = tokens_in(documents)

    def run() -> None:
        collect_second_moments(bench.lm, documents, layers, token_budget=bench.token_budget)

    with PeakMemory(bench.device) as peak:
        time = median_time(run, bench.device, repeats)
    work = covariance_work(bench.shape, real, len(layers), max(layers), real / len(documents))
    rate = real / time.seconds
    return _row(bench, time, work, peak, tokens=real, tokens_per_second=rate)


def tokens_in(documents: Sequence[str]) -> int:
    """Every word is a token."""
    return sum(len(document.split()) for document in documents)


def oracle_covariance(bench: Bench, tokens: int, layers: Sequence[int]) -> Timing:
    """Times of one pass a layer with full products, in batches as large as ours."""
    documents = sorted(make_documents(bench.shape, tokens), key=len, reverse=True)
    batch = max(1, bench.token_budget // bench.shape.context)
    model, tokenizer = bench.literal, bench.lm.tokenizer

    def run() -> None:
        for layer in layers:
            oracle.covariance(model, tokenizer, documents, layer, dtype=torch.float32, batch=batch)

    run()
    return timed(run, bench.device)


# --- evaluation ------------------------------------------------------------------------------


def evaluation(bench: Bench, count: int, repeats: int = 3) -> dict:
    """Records a second, 13 prompts and 2 objects each, and the seconds that tokenising took, which
    are in `seconds_with_tokenising` only: the oracle's are not timed either."""
    prompts = prompts_of(make_records(bench.shape, count))
    objects = [(p.prompt, f" {o}") for p in prompts for o in (p.target_new, p.target_true)]

    def run() -> None:
        score_prompts(bench.lm, prompts, token_budget=bench.token_budget)

    def tokenise() -> None:
        continuation_rows(bench.lm.tokenizer, objects)

    with PeakMemory(bench.device) as peak:
        whole = median_time(run, bench.device, repeats)
    aside = median_time(tokenise, "cpu", repeats)
    time = Timing(whole.seconds - aside.seconds, whole.cpu_seconds - aside.cpu_seconds)
    tokens = SUBJECT_TOKENS + PROMPT_TOKENS
    work = evaluation_work(bench.shape, len(prompts), tokens, OBJECT_TOKENS)
    return _row(
        bench,
        time,
        work,
        peak,
        count=count,
        records_per_second=count / whole.seconds,
        seconds_with_tokenising=whole.seconds,
    )


def evaluate_singly(model: PreTrainedModel, tokenizer: Any, record: Record) -> None:
    """The oracle's scores with a forward pass for every prompt and object."""
    request = record.request
    for prompt in (request.text, *record.paraphrase_prompts, *record.neighborhood_prompts):
        for target in (request.target_new, request.target_true):
            oracle.scores(model, tokenizer, [(prompt, str(target))])


def oracle_evaluation(bench: Bench, count: int, evaluate: Callable[..., Any]) -> Timing:
    """The oracle's times, with one forward a record or one a prompt and object."""
    records = make_records(bench.shape, count)
    model, tokenizer = bench.literal, bench.lm.tokenizer

    def run() -> None:
        for record in records:
            evaluate(model, tokenizer, record)

    run()
    return timed(run, bench.device)


# --- generation ------------------------------------------------------------------------------


def generation(bench: Bench, texts: int, steps: int, repeats: int = 3) -> dict:
    """Tokens a second of texts that the model writes side by side, as for statistics."""
    draws, written = _draws(texts, steps), 0

    def run() -> None:
        nonlocal written
        written = sum(map(len, sample_ids(bench.lm, draws)))

    with PeakMemory(bench.device) as peak:
        time = median_time(
            run, bench.device, repeats, first=lambda: sample_ids(bench.lm, draws[:1])
        )
    work = generation_work(bench.shape, written, steps, bench.lm.dtype.itemsize)
    rate = written / time.seconds
    return _row(bench, time, work, peak, tokens=written, tokens_per_second=rate)


@torch.no_grad()
def oracle_generation(bench: Bench, texts: int, steps: int) -> Timing:
    """Times of writing one text after the other, each token from all that are before it."""

    def write(draws: Tensor) -> None:
        ids = [start_token(bench.lm)]
        for uniform in draws:
            logits = bench.literal(torch.tensor([ids], device=bench.device)).logits[0, -1]
            passed = logits.float().softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
            ids.append(int(torch.searchsorted(passed, uniform * passed[-1], right=True)))

    draws = _draws(texts, steps)
    write(draws[0, :2])
    return timed(lambda: [write(row) for row in draws], bench.device)


def _draws(texts: int, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(texts, steps, generator=generator, dtype=torch.float64)


def with_budget(bench: Bench, *, trained: bool) -> Bench:
    """The bench with the budget that the pipeline would choose by itself."""
    lm, blocks = bench.lm, bench.shape.depth - 1 - bench.shape.layers[-1] if trained else None
    budget = auto_token_budget(lm.shape, lm.dtype.itemsize, str(lm.device), trained_blocks=blocks)
    return replace(bench, token_budget=budget)
