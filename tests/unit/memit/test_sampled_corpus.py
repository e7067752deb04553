"""Texts that the model writes, against a loop without batches or caches, and their moments."""

from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as parquet
import pytest
import torch

import memit
from memit import reference as oracle
from memit import sampled_corpus
from memit.errors import InputError
from memit.sampled_corpus import (
    missing_batches,
    sample_batch,
    sample_ids,
    sample_texts,
    start_token,
    wanted_tokens,
)
from memit.second_moment import collect_second_moments
from tests.families import CITIES, LAYERS, SUBJECTS
from tests.reference import FAMILIES, HYPERPARAMETERS, build, relative


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_corpus, "TEXTS_AT_ONCE", 4)
    monkeypatch.setattr(sampled_corpus, "TOKENS_PER_TEXT", 24)


@torch.no_grad()
def literal(lm, numbers: list[float]) -> list[int]:
    """One full forward a token; each token by its own uniform number."""
    ids = [start_token(lm)]
    for number in numbers:
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1]
        reached = accumulate(logits.double().softmax(0).tolist())
        ids.append(next(token for token, sum in enumerate(reached) if sum > number))
        if ids[-1] in lm.tokenizer.all_special_ids:
            return ids[1:-1]
    return ids[1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_a_loop_whatever_their_batch(family: str):
    lm, draws = build(family), torch.rand(4, 12, dtype=torch.float64)
    draws[1, 5] = 0.0  # draws the first token, which ends a text
    expected = [literal(lm, numbers) for numbers in draws.tolist()]
    assert len(expected[1]) == 5
    assert sample_ids(lm, draws) == expected
    assert sample_ids(lm, draws[2:3]) == expected[2:3]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_moments_are_those_of_the_reference_on_the_same_ids(family: str):
    lm = build(family)
    rows = sample_batch(lm, 0, 3)
    for layer, moment in collect_second_moments(lm, rows, LAYERS, token_budget=60).items():
        mean = oracle.covariance(lm.model, lambda ids, **_: {"input_ids": ids}, rows, layer)
        assert moment.count == sum(map(len, rows))
        assert relative(moment.mean, mean) < 1e-6


def test_more_tokens_only_add_batches():
    lm, told = build("gpt2"), []
    few, many = (sample_texts(lm, tokens, 0, told.append) for tokens in (50, 400))
    assert many[: len(few)] == few != sample_texts(lm, 50, 1, id)
    assert sum(told) == sum(map(len, few + many)) >= 450
    assert missing_batches(200, []) == range(3)
    assert missing_batches(200, [60, 60, 20]) == range(3, 5)
    assert not missing_batches(200, [96, 104])


def test_what_cannot_be_sampled_is_refused(monkeypatch: pytest.MonkeyPatch):
    assert (wanted_tokens("auto", 128), wanted_tokens(128, 128)) == (2048, 128)
    with pytest.raises(InputError, match="singular"):
        wanted_tokens(127, 128)
    with pytest.raises(InputError, match="tokens on average"):
        missing_batches(200, [2, 2, 2])
    lm = build("gpt2")
    for eos, complaint in ((None, "begins"), (9999, "9999")):
        monkeypatch.setattr(lm, "tokenizer", SimpleNamespace(bos_token_id=None, eos_token_id=eos))
        with pytest.raises(InputError, match=complaint):
            start_token(lm)


def test_an_edit_without_a_corpus_keeps_what_it_sampled(tmp_path: Path, monkeypatch):
    requests = [memit.EditRequest(name, "{} was born in", CITIES[0]) for name in SUBJECTS[:3]]
    records = [memit.Record(number, request) for number, request in enumerate(requests)]
    path = tmp_path / "texts.parquet"

    def edited(**given) -> list[torch.Tensor]:
        lm = build("gpt2")
        delta = memit.edit(lm, records, hyperparameters=HYPERPARAMETERS, sampled=path, **given)
        return [change.dense() for change in delta.changes.values()]

    first = edited()
    kept = parquet.read_table(path)
    assert sum(map(len, kept["ids"].to_pylist())) >= 16 * build("gpt2").inner_width
    texts = build("gpt2").tokenizer.batch_decode(kept["ids"].to_pylist(), skip_special_tokens=True)
    assert kept["text"].to_pylist() == texts
    monkeypatch.setattr("memit.editing.sample_texts", None)
    assert all(map(torch.equal, first, edited()))
    retrained = build("gpt2")
    retrained.set_weight(3, 2 * retrained.weight(3))
    with pytest.raises(InputError, match="present weights"):
        memit.edit(retrained, records, hyperparameters=HYPERPARAMETERS, sampled=path)
    for spoil in (lambda: None, lambda: path.write_bytes(path.read_bytes()[:-9])):
        spoil()
        with pytest.raises(InputError, match=r"texts\.parquet"):
            edited(seed=1)
