"""A real model with real facts: seconds of each step, and how good the edit is."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from benchmarks.floor import timed
from benchmarks.memory import PeakMemory
from memit.batches import auto_token_budget
from memit.editors.base import Resources
from memit.editors.memit import Memit
from memit.evaluation.counterfact import prompts_of, score_prompts, summarise
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.prefixes import sample_prefixes
from memit.requests import Record, sample_records
from memit.sampled_corpus import sample_texts, wanted_tokens
from memit.second_moment import collect_second_moments
from memit.targets import compute_targets

METRICS = {"score": "S", "efficacy": "ES", "paraphrase": "PS", "neighborhood": "NS"}
Result = TypeVar("Result")


def edited_rows(
    lm: LanguageModel,
    settings: Hyperparameters,
    records: Sequence[Record],
    counts: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """Statistics of a model, then targets, edit and evaluation of so many of the records at a time;
    each row comes as soon as it is measured."""
    size, device = lm.dtype.itemsize, str(lm.device)
    blocks = settings.trained_blocks(lm.depth)
    budget = auto_token_budget(lm.shape, size, device)
    trained = auto_token_budget(lm.shape, size, device, trained_blocks=blocks)
    prefixes = sample_prefixes(lm, 0)
    wanted = wanted_tokens("auto", lm.inner_width)
    sample = partial(sample_texts, lm, wanted, 0, _untold)
    texts, row = _measured(lm, "texts", wanted, sample)
    yield row
    collect = partial(collect_second_moments, lm, texts, settings.layers, token_budget=budget)
    moments, row = _measured(lm, "covariance", wanted, collect)
    yield row
    for count in counts:
        chosen = sample_records(records, count, 0)
        requests = [record.request for record in chosen]
        optimise = partial(compute_targets, lm, requests, prefixes, settings, token_budget=trained)
        targets, row = _measured(lm, "targets", count, optimise)
        yield row
        resources = Resources(trained, prefixes=prefixes, moments=moments, targets=targets)
        edit = partial(Memit(settings).edit, lm, requests, resources)
        delta, row = _measured(lm, "edit", count, edit)
        yield row
        delta.apply(lm)
        score = partial(score_prompts, lm, prompts_of(chosen), token_budget=budget)
        table, row = _measured(lm, "evaluation", count, score)
        delta.revert(lm)
        summary = summarise(table)
        yield {**row, **{short: summary[name] for name, short in METRICS.items()}}


def _untold(_tokens: int) -> None:
    """No progress is shown."""


def _measured(
    lm: LanguageModel, step: str, count: int, run: Callable[[], Result]
) -> tuple[Result, dict[str, Any]]:
    """What `run` gives, and a row of the table."""
    found: list[Result] = []
    device = lm.device.type
    with PeakMemory(device) as peak:
        time = timed(lambda: found.append(run()), device)
    row = {"step": f"{step}, {lm.name}", "count": count, **time._asdict(), "peak_bytes": peak.bytes}
    return found[0], row
