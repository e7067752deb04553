"""The sentences about a run: what failed, what is alarming, what to change."""

from typing import Any

import pyarrow

from tasks.reporting.verdict import verdict

GOOD = {"score": 90.0, "neighborhood_accuracy": 60.0, "perplexity": 20.0}


def told(
    answered: list[bool],
    left: float = 0.1,
    after: dict[str, Any] | None = None,
    ratio: float = 0.1,
    stop: int = 0,
    dropped: int = 0,
) -> list[str]:
    facts = [
        {"prompt": f"Person {n} lives in", "target_new": "Rome", "answered": each}
        for n, each in enumerate(answered)
    ]
    settings = {"covariance_weight": 15000.0, "evaluations": 20, "clamp_factor": 0.75}
    settings["argmax_stop"] = stop
    edit = {"layers": [3, 4], "share_left": left}
    described = {"update_ratio": {"3": ratio}, "count": 3, "dropped": dropped}
    metrics = {"before": GOOD, "after": after or GOOD, "edit": described}
    return verdict(pyarrow.Table.from_pylist(facts), edit | {"hyperparameters": settings}, metrics)


def test_what_worked_is_one_sentence() -> None:
    assert told([True, True]) == ["2 of 2 facts are said."]


def test_facts_that_are_not_said_are_named_with_what_to_change() -> None:
    first, second = told([True, False, False], left=0.7)
    assert first.startswith("1 of 3 facts are said. Not said: Person 1 lives in → Rome; Person 2")
    assert "70% of the way" in second
    assert "1500 for example" in second
    near = told([False] * 12, left=0.1)
    assert "and 4 more" in near[0]
    assert "targets.evaluations (now 20)" in near[1]
    assert "targets.argmax_stop (now 2" in told([False], left=0.1, stop=2)[1]


def test_damage_is_called_damage() -> None:
    after = {"neighborhood_accuracy": 40.0, "perplexity": 25.0}
    _, *alarms = told([True], after=after, ratio=25.5)
    assert [alarm.startswith("Damage") for alarm in alarms] == [True, True, True, False]
    for alarm, words in zip(
        alarms, ("40 %, ", "20.0 to 25.0", "25.5 times", "No score"), strict=True
    ):
        assert words.strip(", ") in alarm
    mild = {**GOOD, "neighborhood_accuracy": 55.0, "perplexity": 21.0}
    assert len(told([True], after=mild)) == 1
    half = {**GOOD, "neighborhood_accuracy": 29.0}  # the neighbours of dropped edits count as lost
    assert len(told([True], after=half)) == 2
    assert len(told([True], after=half, dropped=3)) == 1
