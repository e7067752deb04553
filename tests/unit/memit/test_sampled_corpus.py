"""Texts that the model writes, against a loop without batches or caches, and their moments."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import cast

import pyarrow.parquet as parquet
import pytest
import torch

import memit
from memit import reference as oracle
from memit import sampled_corpus
from memit.errors import InputError
from memit.generation import decode, sample_ids, text_seed
from memit.sampled_corpus import (
    TOKENS_PER_DIMENSION,
    missing_batches,
    sample_batch,
    sample_texts,
    start_token,
    texts_of,
    texts_table,
    wanted_tokens,
)
from memit.second_moment import collect_second_moments, read_moment
from tests.families import CITIES, LAYERS, SUBJECTS
from tests.reference import FAMILIES, HYPERPARAMETERS, build, relative

SEEDS = [text_seed(7, number) for number in range(6)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_corpus, "TEXTS_AT_ONCE", 4)
    monkeypatch.setattr(sampled_corpus, "TOKENS_PER_TEXT", 24)


@torch.no_grad()
def literal(lm, start: int, seed: int, count: int) -> list[int]:
    """One full forward a token; each token by its own uniform number."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = [start]
    for number in uniform.tolist():
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1]
        reached = list(accumulate(logits.double().softmax(0).tolist()))
        token = next(token for token, sum in enumerate(reached) if sum > number)
        if token in lm.tokenizer.all_special_ids:
            break
        ids.append(token)
    return ids[1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_a_loop_and_do_not_depend_on_their_batch(family: str):
    lm = build(family)
    start = start_token(lm)
    expected = [literal(lm, start, seed, 20) for seed in SEEDS]
    assert sample_ids(lm, start, SEEDS, 20) == expected
    assert sample_ids(lm, start, SEEDS[2:3], 20) == expected[2:3]
    assert sample_ids(lm, start, SEEDS[::-1], 20) == expected[::-1]
    assert sample_ids(lm, start, SEEDS, 9) == [ids[:9] for ids in expected]
    assert len(set(map(tuple, expected))) == len(SEEDS)


def test_a_special_token_ends_a_text():
    lm = build("llama")
    head = lm.head.get_parameter("weight")
    with torch.no_grad():
        head[cast(int, lm.tokenizer.eos_token_id)] = head[300]  # as probable as a frequent token
    rows = sample_ids(lm, start_token(lm), range(40), 30)
    assert {len(ids) for ids in rows} > {30}
    assert rows == [literal(lm, start_token(lm), seed, 30) for seed in range(40)]


def test_draws_follow_the_whole_softmax():
    lm, draws = build("gpt2"), 4000
    start = start_token(lm)
    rows = sample_ids(lm, start, range(draws), 1)
    with torch.no_grad():
        expected = draws * lm.model(torch.tensor([[start]])).logits[0, -1].softmax(0)
    found = torch.bincount(torch.tensor([ids[0] for ids in rows if ids]), minlength=len(expected))
    expected[lm.tokenizer.all_special_ids] = 0  # these texts are empty
    assert bool(((found - expected).abs() < 5 * expected.sqrt() + 3).all())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_moments_are_those_of_the_reference_on_the_same_ids(family: str, tmp_path: Path):
    lm = build(family)
    rows = sample_batch(lm, 0, 3) + sample_batch(lm, 1, 3)
    parquet.write_table(texts_table(lm, rows), tmp_path / "texts.parquet")
    kept = parquet.read_table(tmp_path / "texts.parquet")
    assert kept["ids"].to_pylist() == rows
    assert kept["text"].to_pylist() == [decode(lm, ids) for ids in rows]

    def given(ids: list[int], **_: bool) -> dict[str, list[int]]:
        return {"input_ids": ids}

    moments = collect_second_moments(lm, rows, LAYERS, token_budget=300)
    for layer, moment in moments.items():
        assert moment.count == sum(map(len, rows))
        assert relative(moment.mean, oracle.covariance(lm.model, given, rows, layer)) < 1e-6


def test_more_tokens_only_add_batches():
    lm, told = build("gpt2"), []
    few, many = (sample_texts(lm, tokens, 0, told.append) for tokens in (50, 400))
    assert many[: len(few)] == few
    assert sum(map(len, few)) >= 50
    assert sum(told) == sum(map(len, few + many)) >= 450
    assert sample_texts(lm, 50, 1, told.append) != few


def test_batches_follow_what_earlier_ones_gave():
    assert missing_batches(200, []) == range(3)
    assert missing_batches(200, [60, 60, 60]) == range(3, 4)
    assert missing_batches(200, [60, 60, 20]) == range(3, 5)
    assert not missing_batches(200, [96, 104])
    assert texts_of(200) == 12
    with pytest.raises(InputError, match="tokens on average"):
        missing_batches(200, [2, 2, 2])


@dataclass
class _Tokenizer:
    bos_token_id: int | None
    eos_token_id: int | None


def test_what_cannot_be_sampled_is_refused(monkeypatch: pytest.MonkeyPatch):
    assert wanted_tokens(None, 128) == TOKENS_PER_DIMENSION * 128
    assert wanted_tokens(128, 128) == 128
    with pytest.raises(InputError, match="singular"):
        wanted_tokens(127, 128)
    lm = build("gpt2")
    for tokenizer, complaint in (
        (_Tokenizer(None, None), "begins"),
        (_Tokenizer(None, 9999), "9999"),
    ):
        monkeypatch.setattr(lm, "tokenizer", tokenizer)
        with pytest.raises(InputError, match=complaint):
            start_token(lm)
    monkeypatch.setattr(lm, "tokenizer", _Tokenizer(None, 5))
    assert start_token(lm) == 5


def test_an_edit_without_a_corpus_keeps_what_it_sampled(tmp_path: Path, monkeypatch):
    records = [
        memit.Record(n, memit.EditRequest(name, "{} was born in", CITIES[0]))
        for n, name in enumerate(SUBJECTS[:3])
    ]

    def edited(**given) -> dict:
        delta = memit.edit(build("gpt2"), records, hyperparameters=HYPERPARAMETERS, **given)
        return {name: change.dense() for name, change in delta.changes.items()}

    first = edited(statistics=tmp_path)
    count = read_moment(tmp_path / "layer-01.parquet")[0].count
    ids = parquet.read_table(tmp_path / "texts.parquet")["ids"].to_pylist()
    assert count == sum(map(len, ids)) >= TOKENS_PER_DIMENSION * build("gpt2").inner_width
    for name, change in edited().items():
        assert relative(first[name], change) < 1e-4
    monkeypatch.setattr("memit.editing.sample_texts", None)
    again = edited(statistics=tmp_path)
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(TypeError):  # it would sample again
        edited(statistics=tmp_path, seed=1)
