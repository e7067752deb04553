"""The fast code against what an independent run of the published method recorded."""

from tests import GOLDEN
from tests.acceptance.golden import compare, within_tolerance


def test_agrees_with_the_recorded_run() -> None:
    errors = compare(GOLDEN)
    assert within_tolerance(errors), errors


def test_an_error_above_its_tolerance_is_not_accepted() -> None:
    good = dict.fromkeys(("covariance", "targets", "keys", "deltas", "nll"), 0.0)
    assert within_tolerance({**good, "summary_equal": True})
    assert not within_tolerance({**good, "summary_equal": False})
    assert not within_tolerance({**good, "deltas": 2e-4, "summary_equal": True})
    assert not within_tolerance({**good, "nll": 2e-3, "summary_equal": True})
