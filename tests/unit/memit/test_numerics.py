"""Numbers that cannot be right: named by edit and layer, never stored."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from memit.errors import EditError, NumericsError
from memit.second_moment import SecondMoment, write_moment
from memit.spread import Spread, spread
from memit.targets import check_targets, compute_targets
from memit.weight_delta import Dense, LowRank, WeightDelta, base_digests, check_rounded
from tests.families import PREFIXES
from tests.reference import HYPERPARAMETERS, REQUESTS, build, memit_form, reference

FAMILY = "gpt2"


def written(lm, z, given=None, hp=HYPERPARAMETERS, requests=REQUESTS) -> Spread:
    form = memit_form(given or reference(FAMILY).moments)
    return spread(lm, requests, PREFIXES, z, form, hp, token_budget=1 << 20)


def test_a_target_that_is_not_finite_names_its_edit() -> None:
    lm = build(FAMILY)
    nn.init.constant_(lm.model.get_parameter("transformer.ln_f.weight"), torch.nan)
    targets = compute_targets(lm, REQUESTS, PREFIXES, HYPERPARAMETERS, token_budget=1 << 20)
    assert not targets.finite.any()
    with pytest.raises(EditError, match=r"Zoë Müller was born in.* and those of 3 more") as caught:
        check_targets(REQUESTS, targets)
    assert caught.value.edits == (0, 1, 2, 3)


def test_a_residual_that_is_not_finite_names_edit_and_layer() -> None:
    lm, z = build(FAMILY), reference(FAMILY).z.clone()
    before = lm.weight(1).clone()
    z[2, 0] = torch.nan
    with pytest.raises(EditError, match=r"Paul \{Smith\} is' at layer 1 is not finite") as caught:
        written(lm, z)
    assert caught.value.edits == (2,)
    assert torch.equal(lm.weight(1), before)


def test_an_update_that_is_too_large_names_layer_and_edit() -> None:
    lm, z = build(FAMILY), reference(FAMILY).z.clone()
    before = lm.weight(1).clone()
    z[3] += 1e7
    with pytest.raises(EditError, match=r"layer 1 is .* times .*Anna O'Brien.*largest") as caught:
        written(lm, z)
    assert caught.value.edits == (3,)
    assert torch.equal(lm.weight(1), before)
    small = written(lm, reference(FAMILY).z).update_ratios[1]
    tight = replace(HYPERPARAMETERS, largest_update=small * 0.9)
    with pytest.raises(EditError, match=f"layer 1 is {small:.3g} times") as caught:
        written(lm, reference(FAMILY).z, hp=tight)
    assert len(caught.value.edits) == 1


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_second_moment_that_is_singular_or_indefinite_names_its_layer(value: float) -> None:
    lm, given = build(FAMILY), reference(FAMILY).moments
    last = HYPERPARAMETERS.layers[-1]
    eye = torch.eye(len(given[last].sum), dtype=torch.float64)
    eye[0, 0] = value
    given[last] = SecondMoment(eye, 1)
    with pytest.raises(NumericsError, match=f"second moment of layer {last} is not positive"):
        written(lm, reference(FAMILY).z, given)


def test_a_nearly_singular_second_moment_is_told_by_the_size_of_the_update() -> None:
    lm, given = build(FAMILY), reference(FAMILY).moments
    f = len(given[1].sum)
    given[1] = SecondMoment(torch.eye(f, dtype=torch.float64) * 1e-14, 1)
    hp = replace(HYPERPARAMETERS, largest_update=5.0)
    with pytest.raises(EditError, match=r"layer 1 is .* times as large .*more text"):
        written(lm, reference(FAMILY).z * 100, given, hp)


def test_weights_that_a_dtype_cannot_hold_are_not_written() -> None:
    check_rounded(torch.tensor([60_000.0]), torch.float16, "layer 1")
    with pytest.raises(NumericsError, match="layer 1 are larger than float16 holds"):
        check_rounded(torch.tensor([70_000.0]), torch.float16, "layer 1")
    lm = build(FAMILY)
    lm.model.half()
    name = lm.weight_name(1)
    made = WeightDelta({name: Dense(torch.full_like(lm.parameter(name).float(), 1e5))})
    made = replace(made, provenance={"base": base_digests(lm, [name])})
    before = lm.parameter(name).clone()
    with pytest.raises(NumericsError, match=f"{name} are larger than float16"):
        made.apply(lm)
    assert torch.equal(lm.parameter(name), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_never_stored(tmp_path: Path, value: float) -> None:
    path = tmp_path / "delta.safetensors"
    factors = LowRank(torch.ones(3, 1), torch.tensor([[1.0], [value]]))
    with pytest.raises(NumericsError, match=r"update of h\.1 is not finite"):
        WeightDelta({"h.1": factors}).save(path)
    moment = SecondMoment(torch.full((2, 2), value, dtype=torch.float64), 3)
    with pytest.raises(NumericsError, match="second moment of layer 7 is not finite"):
        write_moment(moment, path, {"layer": 7})
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_its_edits_on_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(EditError("no.", [4, 2])))
    assert (str(error), error.edits) == ("no.", (4, 2))
