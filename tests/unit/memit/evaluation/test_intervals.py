"""Intervals: against scipy's bootstrap, and their behaviour where values are missing."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from memit.evaluation.intervals import bootstrap_intervals

RANDOM = np.random.default_rng(7)
VALUES = {
    "efficacy": 100.0 * (RANDOM.random(150) < 0.9),
    "paraphrase": 100.0 * RANDOM.random(150),
    "neighborhood": 50.0 + 10.0 * RANDOM.standard_normal(150),
}
SCORE = {"score": ("efficacy", "paraphrase", "neighborhood")}


def test_agree_with_scipy():
    found = bootstrap_intervals(VALUES, harmonic=SCORE, seed=0)

    def harmonic(*parts: np.ndarray) -> float:
        return 3 / sum(1 / part.mean() for part in parts)

    cases: dict[str, Any] = {name: ((values,), np.mean) for name, values in VALUES.items()}
    cases["score"] = (tuple(VALUES.values()), harmonic)
    for name, (data, statistic) in cases.items():
        expected = bootstrap(
            data,
            statistic,
            method="percentile",
            n_resamples=4000,
            paired=True,
            vectorized=False,
            rng=np.random.default_rng(1),
        ).confidence_interval
        width = expected.high - expected.low
        assert found[f"{name}_low"] == pytest.approx(expected.low, abs=0.08 * width)
        assert found[f"{name}_high"] == pytest.approx(expected.high, abs=0.08 * width)


def test_are_repeatable_and_depend_on_the_seed():
    first, again, other = (
        bootstrap_intervals(VALUES, harmonic=SCORE, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert len(first) == 8


def test_records_without_a_value_do_not_count():
    some = np.where(np.arange(150) % 3 == 0, VALUES["paraphrase"], np.nan)
    none = np.full(150, np.nan)
    found = bootstrap_intervals({"a": some, "c": none}, harmonic={"b": ("a", "c")}, seed=0)
    alone = bootstrap_intervals({"a": some[::3]}, harmonic={}, seed=0)
    width = alone["a_high"] - alone["a_low"]
    assert set(found) == {"a_low", "a_high"}
    assert found["a_low"] == pytest.approx(alone["a_low"], abs=0.15 * width)
    assert found["a_high"] == pytest.approx(alone["a_high"], abs=0.15 * width)


def test_one_record_and_constant_values_have_no_width():
    assert bootstrap_intervals({"a": np.array([40.0])}, harmonic={"s": ("a",)}, seed=0) == {
        "a_low": 40.0,
        "a_high": 40.0,
        "s_low": 40.0,
        "s_high": 40.0,
    }
    zero = bootstrap_intervals({"a": np.zeros(9)}, harmonic={"s": ("a",)}, seed=0)
    assert zero["s_high"] == 0.0
