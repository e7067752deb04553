"""Parameters of deployments, laid over params.yaml and checked; DVC as a flow; the GPU's slots."""

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.command.parameters import Parameters, complete_parameters
from flows.service import step
from flows.service.dvc_lock import matches_params_file
from flows.service.gpu_slot import is_gpu
from flows.service.reproduce import dvc_arguments, failure
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
    assert (given.requests.count, given.requests.seed) == (16, 3)
    assert given.model.world.model_dump()["people"] == 50
    assert given.edit.model_dump()["layers"] == (1, 2)


def test_everything_that_the_form_shows_can_be_handed_over() -> None:
    assert complete_parameters(Parameters().model_dump(mode="json")) == Parameters()
    assert complete_parameters(Parameters()) == Parameters()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"requests": {"count": 0}}, "requests.count"),
        ({"requests": {"conut": 1}}, "requests.conut"),
        ({"requests": None}, "requests"),
        ({"model": {"package": None}}, "model.package"),
        ([1], "parameters"),
    ],
)
def test_a_mistake_is_one_line(given: Any, named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        complete_parameters(given)
    assert "\n" not in str(caught.value)


def test_parameters_that_differ_from_the_file_are_noticed() -> None:
    here = complete_parameters(None)
    assert matches_params_file(here)
    assert matches_params_file(complete_parameters({"runner": {"kind": "dask"}}))
    assert not matches_params_file(complete_parameters({"requests": {"seed": 4}}))
    Path("params.yaml").write_text("requests: 3")
    assert not matches_params_file(here)


def test_arguments_of_dvc() -> None:
    assert dvc_arguments((), None) == ["repro"]
    settings = ["requests.count=16", "edit.layers=[0, 1]"]
    assert dvc_arguments(settings, "--all") == [
        "exp",
        "run",
        "--name=--all",
        "--set-param=requests.count=16",
        "--set-param=edit.layers=[0, 1]",
    ]


@pytest.mark.parametrize(
    "setting",
    ["--force", "requests.seed", "+requests.x=1", "requests.count=0", "edit.layers=[1", "a.b.c=2"],
)
def test_settings_that_params_yaml_cannot_take(setting: str) -> None:
    with pytest.raises(InputError) as caught:
        dvc_arguments([setting], None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["> python -m flows.model", "error: no key a", "ERROR: failed to reproduce"], "no key a"),
        (["Killed"], "Killed"),
        ([], "it failed without a message."),
    ],
)
def test_the_message_of_a_failure(lines: list[str], message: str) -> None:
    assert failure(lines) == message


def test_which_devices_need_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert [is_gpu(device) for device in ("cpu", "mps", "cuda", "cuda:1")] == [False, *[True] * 3]
    for there_is_one in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there_is_one: there)
        assert is_gpu("auto") is is_gpu("sharded") is there_is_one


def test_a_step_waits_for_a_slot_before_it_opens_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(step, "gpu_slot", lambda device: nullcontext(done.append(device)))
    monkeypatch.setattr(step, "open_model", lambda **_: done.append("model"))
    with ExitStack() as resources:
        run = step.Run("edit", complete_parameters({"model": {"device": "cuda"}}), resources)
        assert run.model is run.model
    assert done == ["cuda", "model"]
