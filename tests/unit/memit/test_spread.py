"""The walk and its three solves against full forward passes and one LU solve a layer."""

import logging
from dataclasses import replace

import pytest
import torch

from memit import layer_walk as walk
from memit import reference as oracle
from memit.errors import NumericsError, ResourceError
from memit.quadratic import solve, solve_in_parts
from memit.second_moment import SecondMoment
from memit.spread import Spread, spread
from tests.families import LAYERS, PREFIXES
from tests.reference import (
    FAMILIES,
    HYPERPARAMETERS,
    REQUESTS,
    build,
    memit_form,
    reference,
    relative,
    short_of_memory,
)

TOLERANCE = 1e-4
LARGE = 1 << 20
FACTORS = {"granite": 0.7}
"""With which a block multiplies the output of its MLP."""
PAIRS = [(request.text, request.target_new) for request in REQUESTS]


def _spread(lm, family: str, hp=HYPERPARAMETERS, token_budget: int = LARGE, **options) -> Spread:
    expected = reference(family)
    form, given = memit_form(expected.moments), {"token_budget": token_budget, **options}
    return spread(lm, REQUESTS, PREFIXES, expected.z, form, hp, **given)


def _delta(lm, result: Spread, layer: int) -> torch.Tensor:
    """Δ of a layer (d × f)."""
    dense = result.delta.changes[lm.weight_name(layer)].dense()
    return dense.T if lm.is_transposed(layer) else dense


def _agrees(lm, result: Spread, updates: dict[int, oracle.LayerUpdate]) -> None:
    assert len(result.delta.changes) == len(updates)
    for layer, expected in updates.items():
        assert relative(_delta(lm, result, layer), expected.delta) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_residuals_and_deltas_are_those_of_the_oracle(family, monkeypatch):
    lm, expected = build(family), reference(family)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    seen = []
    monkeypatch.setattr("memit.spread.solve", lambda *given: seen.append(given) or solve(*given))
    result = _spread(lm, family)
    _agrees(lm, result, expected.updates)
    for (layer, update), (K, R, *_) in zip(expected.updates.items(), seen, strict=True):
        assert relative(K, update.K) < TOLERANCE
        assert relative(R, update.R) < TOLERANCE
        left = len(LAYERS) - LAYERS.index(layer)
        norm = float(update.R.norm(dim=0).mean()) * left * FACTORS.get(family, 1.0)
        assert result.residuals[layer] == pytest.approx(norm, rel=TOLERANCE)
        ratio = float(update.delta.norm() / oracle.weight(lm.model, layer).norm())
        assert result.update_ratios[layer] == pytest.approx(ratio, rel=TOLERANCE)
    assert all(torch.equal(value, before[n]) for n, value in lm.model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_edit_lands(family):
    """Most of the residual is gone, and the model says the new objects more readily."""
    lm, expected = build(family), reference(family)
    before = [score.nll for score in oracle.scores(lm.model, lm.tokenizer, PAIRS)]
    result = _spread(lm, family)
    result.delta.apply(lm)
    hp = HYPERPARAMETERS
    given = ((lm.model, lm.tokenizer, request, PREFIXES, hp.layers[-1], hp) for request in REQUESTS)
    hidden = torch.stack([oracle.key_and_hidden(*each)[1] for each in given])
    left = (expected.z - hidden).norm(dim=1).mean()
    assert result.residual_left == pytest.approx(float(left), rel=1e-3)
    assert left < 0.6 * result.residuals[LAYERS[0]]  # a norm after the MLP takes some back
    after = [score.nll for score in oracle.scores(lm.model, lm.tokenizer, PAIRS)]
    assert sum(after) < sum(before)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "falcon", "mistral"])
@pytest.mark.parametrize("token_budget", [1, 200, 600])
def test_budgets_do_not_matter(family, token_budget):
    lm = build(family)
    told = []
    result = _spread(lm, family, token_budget=token_budget, progress=told.append)
    _agrees(lm, result, reference(family).updates)
    assert sum(told) == len(LAYERS)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_products_alone_give_the_same_where_memory_does_not_hold_all_keys(family, monkeypatch):
    lm, batches = build(family), []

    def counted(parts, *given):
        parts = list(parts)
        batches.append(len(parts))
        return solve_in_parts(parts, *given)

    whole = _spread(lm, family)
    monkeypatch.setattr("memit.spread.COLUMNS_IN_MEMORY", 0)
    monkeypatch.setattr("memit.spread.solve_in_parts", counted)
    result = _spread(lm, family, token_budget=1)
    assert batches == [len(REQUESTS)] * len(LAYERS)
    _agrees(lm, result, reference(family).updates)
    assert result.residuals == pytest.approx(whole.residuals, rel=1e-5)
    assert result.residual_left == pytest.approx(whole.residual_left, rel=1e-4)


def test_states_that_wait_on_disk_give_the_same():
    lm = build("llama")
    results = [_spread(lm, "llama", token_budget=200, held_bytes=size) for size in (0, 9000, LARGE)]
    for result in results[1:]:
        for layer in LAYERS:
            assert torch.equal(_delta(lm, result, layer), _delta(lm, results[0], layer))


def test_a_disk_that_cannot_hold_them_is_named(tmp_path):
    with pytest.raises(ResourceError, match="TMPDIR"):
        walk.HeldStates(0, tmp_path / "gone").put(0, torch.zeros(1))


@pytest.mark.parametrize("family", ["gpt2", "mistral", "opt_projected", "bloom"])
def test_whole_rows_give_the_same(family, monkeypatch):
    """The way of a family that cannot be resumed."""
    monkeypatch.setattr(walk, "can_resume", lambda lm: False)
    lm = build(family)
    _agrees(lm, _spread(lm, family, token_budget=700), reference(family).updates)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "bloom"])
@pytest.mark.parametrize(
    "requests",
    [
        REQUESTS[1:2],
        (REQUESTS[0], replace(REQUESTS[0], target_new="Rome")),
        (REQUESTS[1], replace(REQUESTS[1], subject="北京")),
    ],
    ids=["one", "same subject", "one subject begins the other"],
)
def test_requests_that_begin_alike(family, requests):
    lm = build(family)
    z = reference(family).z[: len(requests)]
    covariances, hp = reference(family).covariances, HYPERPARAMETERS
    updates = oracle.spread(lm.model, lm.tokenizer, requests, PREFIXES, z, covariances, hp)
    form = memit_form(reference(family).moments)
    result = spread(lm, requests, PREFIXES, z, form, hp, token_budget=LARGE)
    _agrees(lm, result, updates)


def test_order_of_requests_does_not_matter():
    lm, expected = build("qwen2"), reference("qwen2")
    form, z = memit_form(expected.moments), expected.z.flip(0)
    result = spread(lm, REQUESTS[::-1], PREFIXES, z, form, HYPERPARAMETERS, token_budget=250)
    _agrees(lm, result, expected.updates)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama3"])
@pytest.mark.parametrize(
    ("change", "prefixes"),
    [
        ({"key_average": "uniform"}, PREFIXES),
        ({"key_average": "uniform"}, ()),
        ({"layers": (2,)}, PREFIXES),
        ({"layers": (0, 2, 3)}, PREFIXES[:2]),
        ({"covariance_weight": 500.0}, ()),
    ],
    ids=str,
)
def test_settings(family, change, prefixes):
    lm = build(family)
    hp = replace(HYPERPARAMETERS, **change)
    covariance = reference(family).covariances[1]
    covariances = dict.fromkeys(hp.layers, covariance)
    z = reference(family).z
    updates = oracle.spread(lm.model, lm.tokenizer, REQUESTS, prefixes, z, covariances, hp)
    moments = {layer: SecondMoment(covariance * 10, 10) for layer in hp.layers}
    form = memit_form(moments, float(hp.covariance_weight))
    result = spread(lm, REQUESTS, prefixes, z, form, hp, token_budget=LARGE)
    _agrees(lm, result, updates)


def test_averages_differ():
    """Else the option would have no test."""
    lm = build("gpt2")
    uniform = _spread(lm, "gpt2", replace(HYPERPARAMETERS, key_average="uniform"))
    nested = reference("gpt2").updates[1].delta
    assert relative(_delta(lm, uniform, 1), nested) > 100 * TOLERANCE


def test_model_is_given_back_after_an_error():
    lm = build("phi")
    before, expected = (lm.weight(1).clone(), lm.weight(2).clone()), reference("phi")

    def interrupt(layer):
        if layer == 2:
            assert not torch.equal(lm.weight(1), before[0])
            raise KeyboardInterrupt
        return memit_form(expected.moments)(layer)

    with pytest.raises(KeyboardInterrupt):
        spread(lm, REQUESTS, PREFIXES, expected.z, interrupt, HYPERPARAMETERS, token_budget=LARGE)
    assert torch.equal(lm.weight(1), before[0])
    assert torch.equal(lm.weight(2), before[1])


def test_memory_that_runs_out_starts_over_with_less(caplog):
    lm = build("llama")
    with caplog.at_level(logging.WARNING), short_of_memory(lm.blocks[2], rows=12):
        result = _spread(lm, "llama", token_budget=4096)
    _agrees(lm, result, reference("llama").updates)
    assert "out of memory" in caplog.text


def test_edit_that_never_fits_is_an_error():
    lm = build("llama")
    before = lm.weight(1).clone()
    with short_of_memory(lm.blocks[2], rows=0), pytest.raises(ResourceError, match="memory"):
        _spread(lm, "llama")
    assert torch.equal(lm.weight(1), before)


def test_an_edit_that_moves_away_from_its_targets_is_not_kept():
    """Blocks that turn their MLP's output round take the update in the wrong direction."""
    lm = build("llama")
    before = lm.weight(1).clone()
    for layer in LAYERS:
        lm.down_projection(layer).register_forward_hook(lambda _module, _args, output: -output)
    with pytest.raises(NumericsError, match=r"edit\.layers"):
        _spread(lm, "llama")
    assert torch.equal(lm.weight(1), before)


def test_bfloat16_weights_are_given_back_to_the_bit():
    lm = build("llama")
    lm.model.bfloat16()
    before = lm.weight(1).clone(), lm.weight(2).clone()
    result = _spread(lm, "llama")
    assert torch.equal(lm.weight(1), before[0])
    assert torch.equal(lm.weight(2), before[1])
    assert relative(_delta(lm, result, 1), reference("llama").updates[1].delta) < 0.1
