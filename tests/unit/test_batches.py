"""Batches keep to the budget, leave nothing out, and shrink when memory runs out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memit.batches import auto_token_budget, in_batches, planned
from memit.errors import ResourceError
from tests.reference import build

Shape = tuple[int, int]
shapes = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 50)), max_size=30)


def _shape(item: Shape) -> Shape:
    return item


def _cost(batch) -> int:
    return sum(rows for rows, _ in batch) * max(length for _, length in batch)


@given(items=shapes, budget=st.integers(1, 900))
def test_every_item_once_in_order_within_the_budget(items, budget):
    batches = planned(items, _shape, budget)
    assert [item for batch in batches for item in batch] == items
    assert all(len(batch) == 1 or _cost(batch) <= budget for batch in batches)


@given(items=shapes.filter(bool), budget=st.integers(1, 900))
def test_a_batch_is_closed_only_when_the_next_item_does_not_fit(items, budget):
    batches = planned(items, _shape, budget)
    for batch, following in pairwise(batches):
        assert _cost([*batch, following[0]]) > budget


@given(items=shapes, budget=st.integers(1, 900), memory=st.integers(350, 900))
def test_batches_that_do_not_fit_are_made_smaller(items, budget, memory):
    def run(batch):
        if _cost(batch) > memory:
            raise torch.OutOfMemoryError("pretended")
        return len(batch)

    done = list(in_batches(items, _shape, budget, run))
    assert [item for batch, _ in done for item in batch] == items
    assert all(result == len(batch) for batch, result in done)


def test_one_item_that_does_not_fit_is_an_error():
    def run(batch):
        if (7, 50) in batch:
            raise torch.OutOfMemoryError("pretended")
        return True

    with pytest.raises(ResourceError, match="memory"):
        list(in_batches([(1, 5), (7, 50), (1, 5)], _shape, 10_000, run))


def test_other_errors_are_not_taken_for_lack_of_memory():
    def run(batch):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(in_batches([(1, 5)], _shape, 10, run))


def test_automatic_budget_is_a_useful_number():
    lm = build("gpt2")
    for tokens in (auto_token_budget(lm, trained_blocks=3), auto_token_budget(lm)):
        assert tokens >= 256
        assert tokens & (tokens - 1) == 0
