"""The search of `memit tune`: which trials it makes, and when it ends."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flows import tune
from flows.tune import search_settings
from memit.errors import InputError, NumericsError
from memit.hyperparameters import AUTO, Hyperparameters
from memit.requests import EditRequest, Record
from tasks.requests import keep_records
from tasks.tune import Trial

START = Hyperparameters((4, 5, 6), AUTO)
BEFORE = {"neighborhood": 90.0}
MOMENTS: dict[int, Any] = dict.fromkeys(range(21))


def _facts(tried: list[Hyperparameters]) -> Any:
    """Facts that are edited best in layers 9 to 11, with a clamp of 1.125."""

    def trial(settings: Hyperparameters, _moments: object) -> Trial:
        tried.append(settings)
        score = 90 - abs(settings.layers[-1] - 11) - abs(len(settings.layers) - 3)
        score -= 10 * abs(settings.clamp_factor - 1.125)
        weight = 490.0 if settings.covariance_weight == AUTO else settings.covariance_weight
        return Trial(settings, float(weight), {"score": score, "neighborhood": 88.0})

    return SimpleNamespace(
        run=SimpleNamespace(model=SimpleNamespace(model=SimpleNamespace(layers=30))), trial=trial
    )


def _search(minutes: float, moments: dict[int, Any] = MOMENTS) -> list[Trial]:
    tried: list[Hyperparameters] = []
    deadline = time.monotonic() + 60 * minutes
    trials = list(search_settings(_facts(tried), START, moments, BEFORE, deadline))
    assert [trial.settings for trial in trials] == tried
    assert len(set(tried)) == len(tried)
    return trials


def test_an_edit_that_leaves_no_finite_perplexity_is_a_failed_trial(monkeypatch: Any) -> None:
    def diverged(*_: object) -> None:
        raise NumericsError("the perplexity is not a finite number")

    monkeypatch.setattr(tune, "shared_targets", lambda *_: None)
    monkeypatch.setattr(tune, "edit_sample", lambda *_: (SimpleNamespace(edit=None), 0.0))
    monkeypatch.setattr(tune.Facts, "metrics", diverged)
    facts = object.__new__(tune.Facts)
    facts.run, facts.sample = cast("Any", None), cast("Any", SimpleNamespace(records=()))
    assert "finite" in facts.trial(START, MOMENTS).failure


def test_each_stage_starts_from_the_best_trial_so_far() -> None:
    trials = _search(minutes=10)
    best = max(trials, key=lambda trial: trial.rank(BEFORE))
    assert best.settings.layers == (9, 10, 11)
    assert best.settings.clamp_factor == 1.125
    given = [t.settings.covariance_weight for t in trials if t.settings.covariance_weight != AUTO]
    assert given == [160, 1_500]


def test_a_model_that_cannot_be_edited_is_tried_to_the_end() -> None:
    facts = _facts([])
    facts.trial = lambda settings, _moments: Trial(settings, failure="it moves away")
    trials = list(search_settings(facts, START, MOMENTS, BEFORE, time.monotonic() + 600))
    assert len(trials) > 5
    assert all(trial.failure for trial in trials)


def test_one_trial_is_made_in_any_case_and_none_after_the_time() -> None:
    assert len(_search(minutes=-1)) == 1


def test_layers_without_second_moments_are_not_tried() -> None:
    for trial in _search(10, dict.fromkeys(range(10))):
        assert trial.settings.layers[-1] < 10


@pytest.mark.parametrize("subjects", [1, 40])
def test_facts_that_leave_nothing_to_be_spared_are_refused(
    subjects: int, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are all of one subject, or their neighbors are edited themselves."""
    known = [
        Record(n, EditRequest(f"Ann {n % subjects}", "{} is", f"in town {n}"), ("x",), ("x",))
        for n in range(40)
    ]
    chosen = SimpleNamespace(records=keep_records(known))
    parameters = SimpleNamespace(
        tune=SimpleNamespace(facts=None, seed=0, count=20), model=SimpleNamespace(source="hub")
    )
    model = SimpleNamespace(model=SimpleNamespace(id="a model"))
    run: Any = SimpleNamespace(parameters=parameters, model=model, compute=lambda *_: chosen)
    monkeypatch.setattr(tune, "write_embedded", lambda _: None)
    with pytest.raises(InputError, match=r"a model knows .*tune\.count"):
        tune._known_facts(run)
