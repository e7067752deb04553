"""Counted costs: as the code computes, and as docs/scaling.md has them."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.projection import tables
from flows.command import costs
from flows.command.costs import Lengths
from memit.forward.probes import can_resume
from memit.language_model import LanguageModel
from memit.model_shape import ModelShape
from memit.quadratic import Quadratic, solve
from memit.second_moment import SecondMoment, collect_second_moments
from memit.spread import spread
from memit.targets import compute_targets, edit_rows
from memit.weight_delta import Dense, LowRank
from tests import ROOT
from tests.families import PREFIXES, families
from tests.reference import HYPERPARAMETERS, REQUESTS, memit_form

SCALING = ROOT / "docs" / "scaling.md"
LARGE = 1 << 20
SHAPE = ModelShape(depth=10, width=8, inner_width=32, parameters=1_000)


@pytest.mark.parametrize("n", [3, 6, 7, 100])
def test_the_kept_form_and_its_size_are_those_of_the_code(n: int) -> None:
    K, R = torch.randn(32, n), torch.randn(8, n)
    keys = torch.randn(200, 32)
    moment = SecondMoment((keys.T @ keys).double(), 200)
    change = solve(K, R, Quadratic(moment, 1.0), "here")
    assert isinstance(change, LowRank if costs.is_low_rank(SHAPE, n) else Dense)
    held = sum(part.nbytes for part in vars(change).values() if isinstance(part, torch.Tensor))
    assert held == costs.delta_bytes(SHAPE, n)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A model whose blocks, not its head and its attention, are what costs."""
    tokenizer = families()["llama"]()[1]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LanguageModel(LlamaForCausalLM(config).eval(), tokenizer, name="counted")
    assert can_resume(model)  # found out once, which is not to be counted
    return model


def test_products_are_counted_as_torch_counts_them(lm: LanguageModel) -> None:
    """Up to attention, the head, padding and rows of the divergence term, all left out."""
    blocks = lm.model.get_submodule("model.layers")
    shape = ModelShape(10, 64, 256, sum(p.numel() for p in blocks.parameters()))
    rows = [row for edit in edit_rows(lm, REQUESTS, PREFIXES) for row in edit.rows]
    before = sum(row.subject_last + 1 for row in rows) / len(rows)
    lengths = Lengths(before, sum(len(row.ids) for row in rows) / len(rows) - before)
    hp = replace(HYPERPARAMETERS, layers=(2, 3), loss_threshold=0.0)
    n = len(REQUESTS)

    with FlopCounterMode(display=False) as counter:
        moments = collect_second_moments(
            lm, ["A text of some words."] * 40, (2, 3), token_budget=LARGE
        )
    counted = costs.statistics_operations(shape, (2, 3), moments[2].count)
    in_place = moments[2].count * 2 * 256**2  # torch does not see these products
    assert 0.9 < counter.get_total_flops() / (counted - in_place) < 1.1

    with FlopCounterMode(display=False) as counter:
        targets = compute_targets(lm, REQUESTS, PREFIXES, hp, token_budget=LARGE)
    counted = costs.targets_operations(shape, 3, hp.evaluations, n, lengths)
    assert 1.0 < counter.get_total_flops() / counted < 2.0

    definite = {
        layer: SecondMoment(each.sum + torch.eye(256), each.count)
        for layer, each in moments.items()
    }
    with FlopCounterMode(display=False) as counter:
        form = memit_form(definite)
        spread(lm, REQUESTS, PREFIXES, targets.z, form, hp, token_budget=LARGE)
    counted = costs.walk_operations(shape, (2, 3), n, lengths)
    assert 0.8 < counter.get_total_flops() / counted < 1.2


def test_the_page_has_the_tables_that_are_printed() -> None:
    page = SCALING.read_text(encoding="utf-8")
    for name, table in tables().items():
        shown = re.search(rf"<!-- {name} -->\n\n(.*?)\n\n", page, re.S)
        assert shown is not None, name
        assert shown[1] == table, f"python -m benchmarks.projection prints another table {name}"
