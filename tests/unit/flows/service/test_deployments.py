"""What a deployment hands to a flow: laid over params.yaml, and checked there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.command.parameters import Parameters, complete_parameters
from flows.service.dvc_lock import stand_in_the_file
from flows.service.gpu_slot import is_gpu
from flows.service.reproduce import dvc_words, reason
from memit.errors import InputError


@pytest.fixture(autouse=True)
def _in_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"requests": {"count": 8, "seed": 3}, "model": {"world": {"people": 50}}}
    Path("params.yaml").write_text(yaml.safe_dump(content))


def test_what_is_left_out_is_that_of_the_file() -> None:
    assert complete_parameters(None) == complete_parameters({})
    given = complete_parameters(
        {"requests": {"count": 16}, "edit": {"layers": [1, 2]}, "compare": {"settings": {}}}
    )
    assert (given.requests.count, given.requests.seed, given.model.world.people) == (16, 3, 50)
    assert given.edit.layers == (1, 2)


def test_everything_that_the_form_shows_can_be_handed_over() -> None:
    shown = Parameters().model_dump(mode="json")
    assert complete_parameters(shown) == Parameters()
    assert complete_parameters(Parameters()) == Parameters()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"requests": {"count": 0}}, "parameters: requests.count is 0"),
        ({"requests": {"conut": 1}}, "no key requests.conut; did you mean requests.count?"),
        ({"requests": None}, "parameters: requests is null"),
        ({"requests": {"count": 99_999}}, "but model.world has 50 records"),
        ([1], "parameters must hold sections"),
        ("model", "parameters must hold sections"),
    ],
)
def test_a_slip_is_one_sentence(given: Any, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        complete_parameters(given)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_parameters_than_the_file_has_are_noticed() -> None:
    assert stand_in_the_file(complete_parameters(None))
    assert not stand_in_the_file(complete_parameters({"requests": {"seed": 4}}))
    here = complete_parameters(None)
    Path("params.yaml").write_text("requests: 3")
    assert not stand_in_the_file(here)


def test_what_dvc_is_asked_for() -> None:
    assert dvc_words((), None) == ["repro"]
    assert dvc_words([], "first") == ["exp", "run", "--name=first"]
    assert dvc_words(["requests.count=16", "edit.layers=[0, 1]"], None) == [
        "exp",
        "run",
        "--set-param=requests.count=16",
        "--set-param=edit.layers=[0, 1]",
    ]


@pytest.mark.parametrize(
    ("settings", "name", "sentence"),
    [
        ("requests.count=16", None, "write a list"),
        ([3], None, "write a list"),
        (["--force"], None, "no key --force"),
        (["requests.seed"], None, "requests.seed"),
        (["+requests.more=1"], None, "+requests"),
        (["requests.count=0"], None, "requests.count is 0"),
        (["requests.count=[1"], None, "cannot be read"),
        (["requests.seed.x=2"], None, "requests.seed"),
        ([], "--all", "name is '--all'"),
        ([], "../x", "name is '../x'"),
        ([], 3, "name is 3"),
    ],
)
def test_what_dvc_is_not_asked_for(settings: Any, name: Any, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        dvc_words(settings, name)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (["> python -m flows.model", "error: no key a", "ERROR: failed to reproduce"], "no key a"),
        (
            ["ERROR: Invalid `--set-param` value", "object_type=dict", "See"],
            "Invalid `--set-param` value",
        ),
        (["Killed"], "Killed"),
        ([], "it ended with an error."),
    ],
)
def test_what_is_told_of_an_error(said: list[str], told: str) -> None:
    assert reason(said) == told


def test_which_devices_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert [is_gpu(device) for device in ("cpu", "mps", "cuda", "cuda:1")] == [False, *[True] * 3]
    for there_is_one in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there_is_one: there)
        assert is_gpu("auto") is is_gpu("sharded") is there_is_one


def test_every_step_that_computes_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All flows of the steps but the report, and the comparisons; none of those that chain them."""
    from contextlib import contextmanager

    from flows import (
        compare,
        edit,
        experiment,
        mend,
        prefixes,
        scaling,
        serac,
        statistics,
    )
    from flows.service import step as frame

    asked: list[str] = []

    @contextmanager
    def turn(device: str) -> Iterator[None]:
        asked.append(device)
        raise InputError("not now")
        yield

    monkeypatch.setattr(frame, "gpu_turn", turn)
    monkeypatch.setattr(frame, "upstream", lambda *_: {})
    parameters = complete_parameters({"model": {"device": "cuda"}})
    for module in (edit, prefixes, statistics, mend, serac, compare, scaling):
        with pytest.raises(InputError, match="not now"):
            getattr(module, module.__name__.rpartition(".")[2]).fn(parameters)
    assert asked == ["cuda"] * 7
    for chain in (experiment.experiment, experiment.comparison, experiment.scaling_run):
        with pytest.raises(InputError, match="parameters must hold sections"):
            chain.fn([1])  # pyright: ignore[reportArgumentType]
    assert asked == ["cuda"] * 7
