"""Second moments against one full product a layer, however the corpus is cut."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memit import reference as oracle
from memit import second_moment
from memit.errors import InputError, IntegrityError, NumericsError
from memit.forward.passes import keys_of, pad
from memit.second_moment import (
    SecondMoment,
    SecondMomentFitter,
    check_moment,
    check_rank,
    collect_second_moments,
    collect_subject_moments,
    import_published,
    read_moment,
    with_subjects,
    write_moment,
)
from memit.targets import plain_rows
from tests.families import DOCUMENTS, LAYERS
from tests.reference import FAMILIES, REQUESTS, build, reference, relative, short_of_memory

SHARD_TOLERANCE = 1e-6


def _count(lm, documents) -> int:
    return sum(len(lm.tokenizer(d, add_special_tokens=False)["input_ids"]) for d in documents)


@pytest.mark.parametrize("family", FAMILIES)
def test_means_are_those_of_the_oracle(family):
    lm = build(family)
    moments = collect_second_moments(lm, DOCUMENTS, LAYERS, token_budget=600)
    assert set(moments) == set(LAYERS)
    for layer, moment in moments.items():
        assert moment.count == _count(lm, DOCUMENTS)
        assert torch.equal(moment.sum, moment.sum.T)
        assert relative(moment.mean, reference(family).covariances[layer]) < SHARD_TOLERANCE


@pytest.fixture(scope="module")
def whole():
    lm = build("mistral")
    return lm, collect_second_moments(lm, DOCUMENTS, LAYERS, token_budget=1)


@settings(max_examples=10)
@given(
    cuts=st.lists(st.integers(1, len(DOCUMENTS) - 1), max_size=4, unique=True),
    token_budget=st.sampled_from((1, 90, 400, 1 << 20)),
)
def test_shards_add_up(whole, cuts, token_budget):
    lm, expected = whole
    edges = [0, *sorted(cuts), len(DOCUMENTS)]
    shards = [
        collect_second_moments(lm, DOCUMENTS[start:stop], LAYERS, token_budget=token_budget)
        for start, stop in pairwise(edges)
    ]
    for layer in LAYERS:
        total = shards[0][layer]
        for shard in shards[1:]:
            total = total + shard[layer]
        assert total.count == expected[layer].count
        assert relative(total.sum, expected[layer].sum) < SHARD_TOLERANCE


def test_the_order_of_layers_and_which_others_are_asked_for_do_not_matter(whole):
    lm, expected = whole
    found = collect_second_moments(lm, DOCUMENTS, (3, 2), token_budget=1)
    assert torch.equal(found[2].sum, expected[2].sum)
    mean = oracle.covariance(lm.model, lm.tokenizer, DOCUMENTS, 3)
    assert relative(found[3].mean, mean) < SHARD_TOLERANCE


def test_long_documents_are_cut_to_the_context():
    lm = build("gpt2")
    long = " ".join(DOCUMENTS)
    assert _count(lm, [long]) > lm.context_length
    moments = collect_second_moments(lm, [long, DOCUMENTS[0]], LAYERS, token_budget=1000)
    assert moments[1].count == lm.context_length + _count(lm, DOCUMENTS[:1])
    mean = oracle.covariance(lm.model, lm.tokenizer, [long, DOCUMENTS[0]], 1)
    assert relative(moments[1].mean, mean) < SHARD_TOLERANCE


def test_windows_of_documents_are_all_read(monkeypatch, whole):
    lm, expected = whole
    monkeypatch.setattr(second_moment, "WINDOW", 5)
    told = []
    documents = [*DOCUMENTS[:7], "", *DOCUMENTS[7:]]
    found = collect_second_moments(lm, documents, LAYERS, token_budget=200, progress=told.append)
    assert sum(told) == len(DOCUMENTS)
    assert found[1].count == expected[1].count
    assert relative(found[1].sum, expected[1].sum) < SHARD_TOLERANCE


@pytest.mark.parametrize("width", [1, 2, 3, 7, 100, 129])
def test_tiles_give_the_full_product(width):
    keys = torch.randn(500, width, dtype=torch.float64)
    fitter = SecondMomentFitter(width, torch.device("cpu"))
    for part in keys.float().split(123):
        fitter.update(part)
    result = fitter.result()
    assert result.count == 500
    assert relative(result.sum, keys.T @ keys) < SHARD_TOLERANCE


def test_memory_that_runs_out_counts_nothing_twice(whole, caplog):
    """It runs out after the keys of the first layer, before those of the second."""
    lm, expected = whole
    with short_of_memory(lm.blocks[1], rows=5):
        found = collect_second_moments(lm, DOCUMENTS, LAYERS, token_budget=1 << 20)
    assert "out of memory" in caplog.text
    assert found[2].count == expected[2].count
    assert relative(found[2].sum, expected[2].sum) < SHARD_TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("token_budget", [1, 900])
def test_subjects_have_the_keys_of_single_passes(family, token_budget):
    lm = build(family)
    expected = {layer: torch.zeros(1) for layer in LAYERS}
    for request in REQUESTS:
        row = plain_rows(lm, [request])[0]
        padded = pad([row.ids], lm.device)
        for layer in LAYERS:
            key = keys_of(lm, padded, [layer])[layer][row.subject_last].double()
            expected[layer] = expected[layer] + torch.outer(key, key)
    found = collect_subject_moments(lm, REQUESTS, LAYERS, token_budget=token_budget)
    for layer, moment in found.items():
        assert moment.count == len(REQUESTS)
        assert relative(moment.sum, expected[layer]) < SHARD_TOLERANCE


def test_subjects_have_their_share_of_the_mean():
    whole, subjects = (SecondMoment(torch.randn(5, 5), count) for count in (1_000, 7))
    mixed = with_subjects(whole, subjects, 0.9)
    assert mixed.count == 1_000
    assert relative(mixed.mean, 0.1 * whole.mean + 0.9 * subjects.mean) < 1e-12
    assert torch.equal(with_subjects(whole, subjects, 0.0).mean, whole.mean)


def test_corpus_without_tokens():
    with pytest.raises(InputError, match="no tokens"):
        collect_second_moments(build("gpt2"), ["", ""], LAYERS, token_budget=100)
    with pytest.raises(InputError, match="no tokens"):
        collect_second_moments(build("gpt2"), [], LAYERS, token_budget=100)


def test_a_sum_over_as_many_tokens_as_it_has_rows_may_do():
    check_rank(SecondMoment(torch.eye(4), 4), "layer 1")
    with pytest.raises(InputError, match="3 tokens, and the keys of layer 1 have 4 dimensions"):
        check_rank(SecondMoment(torch.eye(4), 3), "layer 1")


def test_keys_that_are_not_finite():
    lm = build("gpt2")
    with torch.no_grad():
        lm.blocks[1].get_parameter("mlp.c_fc.weight")[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="layer 1"):
        collect_second_moments(lm, DOCUMENTS[:2], LAYERS, token_budget=100)


# --- files -------------------------------------------------------------------------------------


def _moment(width: int = 12, tokens: int = 40) -> SecondMoment:
    keys = torch.randn(tokens, width)
    return SecondMoment(keys.T @ keys, tokens)


def test_file_gives_the_moment_and_its_provenance_back(tmp_path):
    moment, provenance = _moment(), {"model": "Zoë", "layer": 3}
    write_moment(moment, tmp_path / "a.parquet", provenance)
    write_moment(moment, tmp_path / "b.parquet", provenance)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    found, told = read_moment(tmp_path / "a.parquet")
    assert torch.equal(found.sum, moment.sum)
    assert found.count == moment.count
    assert told == provenance
    found.sum.add_(1)  # what is read can be changed


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_truncated_file(tmp_path, kept):
    path = tmp_path / "layer-03.parquet"
    write_moment(_moment(), path, {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(IntegrityError, match=r"layer-03\.parquet"):
        read_moment(path)


def test_missing_file(tmp_path):
    with pytest.raises(IntegrityError, match=r"none\.parquet"):
        read_moment(tmp_path / "none.parquet")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: replace(m, sum=m.sum + torch.triu(m.sum, 1)), "symmetric"),
        (lambda m: replace(m, count=0), r"finite|token"),
    ],
)
def test_spoilt_moment_is_refused(tmp_path, spoil, match):
    path = tmp_path / "layer-03.parquet"
    write_moment(spoil(_moment()), path, {})
    with pytest.raises(IntegrityError, match=rf"(?s)layer-03\.parquet.*({match})"):
        read_moment(path)


def test_a_moment_that_is_not_finite_is_neither_written_nor_read(tmp_path):
    path = tmp_path / "layer-03.parquet"
    with pytest.raises(NumericsError, match="layer 3 is not finite"):
        write_moment(replace(_moment(), sum=_moment().sum * torch.inf), path, {"layer": 3})
    assert not path.exists()
    write_moment(_moment(), path, {})
    table = parquet.read_table(path)
    spoilt = np.full(table.num_rows * 12, np.inf, np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(spoilt), 12)
    parquet.write_table(table.set_column(0, table.schema.field(0), column), path)
    with pytest.raises(IntegrityError, match=r"(?s)layer-03\.parquet.*finite"):
        read_moment(path)


def test_moment_of_another_width_is_refused():
    with pytest.raises(IntegrityError, match=r"12 × 12.*14 × 14"):
        check_moment(_moment(), "layer 3", 14)


def _published(path: Path, **arrays) -> Path:
    keys = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    content = {"mom2.mom2": keys.T @ keys, "mom2.count": np.array(50), "sample_size": 50}
    np.savez(path, **(content | arrays))
    return path


def test_published_file_is_imported(tmp_path):
    path = _published(tmp_path / "mom2.npz")
    moment = import_published(path, 8)
    assert moment.count == 50
    assert torch.equal(moment.sum, torch.from_numpy(np.load(path)["mom2.mom2"]))


@pytest.mark.parametrize(
    "arrays",
    [
        {"mom2.mom2": np.triu(np.ones((8, 8), np.float32)) + np.eye(8, dtype=np.float32)},
        {"mom2.mom2": -np.eye(8, dtype=np.float32)},
        {"mom2.mom2": np.eye(7, dtype=np.float32)},
        {"mom2.mom2": np.ones((8, 8), np.float32)},
        {"mom2.mom2": np.full((8, 8), np.nan, np.float32)},
        {"mom2.count": np.array(0)},
    ],
    ids=["asymmetric", "negative", "narrow", "singular", "not finite", "no tokens"],
)
def test_spoilt_published_file_is_refused(tmp_path, arrays):
    path = _published(tmp_path / "mom2.npz", **arrays)
    with pytest.raises((IntegrityError, NumericsError), match=r"mom2\.npz"):
        import_published(path, 8)
