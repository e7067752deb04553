"""Batches keep to the budget, leave nothing out, and shrink when memory runs out."""

import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memit import batches
from memit.batches import auto_token_budget, run_in_batches, split_into_batches
from memit.errors import ResourceError
from memit.model_shape import ModelShape
from tests import python
from tests.reference import build

Shape = tuple[int, int]
shapes = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 50)), max_size=30)


def _shape(item: Shape) -> Shape:
    return item


def _cost(batch) -> int:
    return sum(rows for rows, _ in batch) * max(length for _, length in batch)


@given(items=shapes, budget=st.integers(1, 900))
def test_every_item_once_in_order_within_the_budget(items, budget):
    batches = split_into_batches(items, _shape, budget)
    assert [item for batch in batches for item in batch] == items
    assert all(len(batch) == 1 or _cost(batch) <= budget for batch in batches)


@given(items=shapes.filter(bool), budget=st.integers(1, 900))
def test_a_batch_is_closed_only_when_the_next_item_does_not_fit(items, budget):
    batches = split_into_batches(items, _shape, budget)
    for batch, following in pairwise(batches):
        assert _cost([*batch, following[0]]) > budget


@given(items=shapes, budget=st.integers(1, 900), memory=st.integers(350, 900))
def test_batches_that_do_not_fit_are_made_smaller(items, budget, memory):
    def run(batch):
        if _cost(batch) > memory:
            raise torch.OutOfMemoryError("pretended")
        return len(batch)

    done = list(run_in_batches(items, _shape, budget, run))
    assert [item for batch, _ in done for item in batch] == items
    assert all(result == len(batch) for batch, result in done)


def test_one_item_that_does_not_fit_is_an_error():
    def run(batch):
        if (7, 50) in batch:
            raise torch.OutOfMemoryError("pretended")
        return True

    with pytest.raises(ResourceError, match="memory"):
        list(run_in_batches([(1, 5), (7, 50), (1, 5)], _shape, 10_000, run))


def test_other_errors_are_not_taken_for_lack_of_memory():
    def run(batch):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(run_in_batches([(1, 5)], _shape, 10, run))


GPTJ = ModelShape(depth=28, width=4096, inner_width=16_384, parameters=6_050_882_784)
SMOLLM2 = ModelShape(depth=30, width=576, inner_width=1_536, parameters=134_515_008)


def _cards(monkeypatch, *cards: tuple[float, float, float]) -> None:
    """Pretend GPUs with so many bytes in all, free, and held by this process."""
    batches._measured_room.cache_clear()
    cuda = batches.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(cuda, "mem_get_info", lambda n: (int(cards[n][1]), int(cards[n][0])))
    monkeypatch.setattr(cuda, "memory_reserved", lambda n: int(cards[n][2]))


@pytest.fixture(autouse=True)
def _forget_pretended_cards():
    yield
    batches._measured_room.cache_clear()


def test_on_a_cpu_the_automatic_budget_is_what_was_measured_to_be_fastest():
    shape = build("gpt2").shape
    for device in ("cpu", "mps"):
        assert auto_token_budget(shape, 4, device) == 1024
        assert auto_token_budget(shape, 4, device, trained_blocks=0) == 4096
        # Activations of large models are kept within what the weights take, or a gigabyte.
        assert auto_token_budget(GPTJ, 2, device, trained_blocks=19) == 1024
        assert auto_token_budget(SMOLLM2, 4, device, trained_blocks=24) == 512


def test_on_a_gpu_it_follows_from_the_free_memory(monkeypatch):
    found = []
    for total in (16e9, 24e9, 40e9, 80e9):
        _cards(monkeypatch, (total, total, 0))
        found += [auto_token_budget(GPTJ, 2, "cuda"), auto_token_budget(GPTJ, 2, "cuda:0")]
        edits = auto_token_budget(GPTJ, 2, "auto", trained_blocks=19)
        assert 256 <= edits < found[-1]
        assert edits & (edits - 1) == found[-1] & (found[-1] - 1) == 0
    assert found == sorted(found)
    assert found[0] == found[1] < found[-1]
    _cards(monkeypatch, (80e9, 20e9, 0))  # somebody else is on it
    assert auto_token_budget(GPTJ, 2, "cuda") < found[-1]


def test_it_is_the_same_before_and_after_the_model_is_loaded(monkeypatch):
    _cards(monkeypatch, (80e9, 79.4e9, 0))
    before = auto_token_budget(GPTJ, 2, "cuda", trained_blocks=19)
    _cards(monkeypatch, (80e9, 66.2e9, 12.6e9))
    assert auto_token_budget(GPTJ, 2, "cuda", trained_blocks=19) == before


def test_workers_on_the_card_do_not_change_it(monkeypatch):
    _cards(monkeypatch, (80e9, 79e9, 0))
    first = auto_token_budget(GPTJ, 2, "cuda")
    monkeypatch.setattr(batches.torch.cuda, "mem_get_info", lambda n: (10**9, 8 * 10**10))
    assert auto_token_budget(GPTJ, 2, "cuda") == first


def test_what_is_sharded_has_the_room_that_weights_leave_on_the_smallest_card(monkeypatch):
    _cards(monkeypatch, (80e9, 80e9, 0), (8e9, 8e9, 0))
    sharded = auto_token_budget(GPTJ, 2, "sharded")
    assert 256 <= sharded < auto_token_budget(GPTJ, 2, "cuda:0")
    assert sharded == auto_token_budget(replace(GPTJ, parameters=10**12), 2, "sharded")


HOLES = """
import os
from pathlib import Path
import torch
from memit.batches import release_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

large, small = [], []
for _ in range(2_000):
    large.append(torch.ones(25_000))  # 100 kB, below what glibc maps by itself
    small.append(torch.ones(100))
large.clear()
before = resident()
release_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_memory_goes_back_to_the_system_from_between_blocks_in_use():
    """In a process of its own, whose heap has no other holes."""
    assert int(python("-c", HOLES, check=True).stdout) > 100e6
