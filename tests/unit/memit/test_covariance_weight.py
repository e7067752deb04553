"""λ by rule: against all candidates on made-up curves, and in an edit of a small model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memit.covariance_weight import MARGIN, Choice, choose_covariance_weight
from memit.editors.base import Resources
from memit.editors.memit import Memit
from memit.errors import InputError, NumericsError
from memit.spread import Spread
from memit.targets import Targets
from memit.weight_delta import WeightDelta
from tests.families import PREFIXES
from tests.reference import HYPERPARAMETERS, REQUESTS, build, reference

WEIGHTS = [1.6, 5.1, 16, 51, 160, 510, 1_600, 5_100]
"""Half decades around a width of 512."""


def _made(left: float) -> Spread:
    return Spread(WeightDelta({}), {3: 10.0, 4: 7.0}, {}, 10 * left, left, {})


def _choose(left: dict[float, float]) -> Choice:
    """The choice where some λ leave so much of the way, and others are not possible."""
    tried = []

    def attempt(weight: float) -> Spread:
        tried.append(weight)
        if weight not in left:
            raise NumericsError(f"the update is too large with {weight:g}")
        return _made(left[weight])

    choice = choose_covariance_weight(512, attempt)
    assert len(set(tried)) == len(tried)
    assert [t.weight for t in choice.trials] == sorted(w for w in tried if w in left)
    assert choice.spread.residual_left == 10 * left[choice.weight]
    assert choice.described()["curve"][0][1] == round(choice.trials[0].left, 4)
    return choice


@given(
    bottom=st.integers(0, 7),
    falls=st.lists(st.floats(0.02, 0.3), min_size=8, max_size=8),
    rises=st.lists(st.floats(0.0, 0.3), min_size=8, max_size=8),
)
def test_the_choice_is_that_among_all_candidates(bottom, falls, rises) -> None:
    """What is left has one minimum; towards it from above it falls by more than `FLAT`."""
    left = {WEIGHTS[i]: 0.05 + sum(falls[bottom:i]) + sum(rises[i:bottom]) for i in range(8)}
    expected = [w for w in WEIGHTS if left[w] <= min(left.values()) + MARGIN]
    assert _choose(left).weight == max(expected)


@pytest.mark.parametrize(
    ("left", "weight", "trials"),
    [
        # Shares that were measured: 16 facts of SmolLM2-135M in layers 1 to 5, and 71 of a small
        # synthetic world, where a smaller λ leaves more.
        ({4_900: 0.31, 1_500: 0.119, 490: 0.082, 150: 0.08}, 490, 3),
        ({260: 0.419, 82: 0.24, 26: 0.179, 8.2: 0.195}, 26, 4),
    ],
)
def test_few_edits_are_tried(left, weight, trials) -> None:
    def attempt(tried: float) -> Spread:
        return _made(left[tried])

    width = 1_536 if weight == 490 else 260
    choice = choose_covariance_weight(width, attempt)
    assert choice.weight == weight
    assert len(choice.trials) == trials


def test_a_weight_that_makes_the_edit_impossible_is_left_out() -> None:
    assert _choose({510: 0.4, 160: 0.2}).weight == 160
    assert _choose({5_100: 0.9}).weight == 5_100


def test_an_edit_that_no_weight_makes_possible_fails_as_with_the_largest() -> None:
    with pytest.raises(NumericsError, match="5100"):
        _choose({})


def test_an_edit_by_rule_is_the_edit_with_the_number_that_it_names() -> None:
    lm, expected = build("llama"), reference("llama")
    targets = Targets(
        z=expected.z,
        hidden=torch.stack([target.hidden for target in expected.targets]),
        losses=torch.zeros(len(REQUESTS), 1),
        finite=torch.ones(len(REQUESTS)).bool(),
    )
    moments = expected.moments
    told: list[int] = []
    resources = Resources(1 << 20, PREFIXES, moments, targets=targets, progress=told.append)
    before = lm.weight(1).clone()
    by_rule = Memit(replace(HYPERPARAMETERS, covariance_weight="auto"))
    chosen = by_rule.edit(lm, REQUESTS, resources)
    assert torch.equal(lm.weight(1), before)
    assert sum(told) == len(REQUESTS)
    rule = chosen.provenance["covariance_weight"]
    settings = replace(HYPERPARAMETERS, covariance_weight=rule["weight"])
    given_number = Memit(settings).edit(lm, REQUESTS, resources)
    assert chosen.provenance["settings"] == given_number.provenance["settings"]
    for name, change in given_number.changes.items():
        assert torch.equal(change.dense(), chosen.changes[name].dense())
    curve = dict(rule["curve"])
    left = chosen.provenance["residual_left"] / chosen.provenance["residuals"]["1"]
    assert curve[rule["weight"]] == pytest.approx(left, abs=1e-3)


def test_a_word_that_is_no_rule_is_refused() -> None:
    with pytest.raises(InputError, match="covariance_weight is 'much'"):
        replace(HYPERPARAMETERS, covariance_weight="much")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="covariance_weight is 0"):
        replace(HYPERPARAMETERS, covariance_weight=0)
