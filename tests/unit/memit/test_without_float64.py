"""A device that has no float64 leaves equations to the CPU: acted out, as there is none here."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from memit import layer_walk as walk
from memit.editors import rome
from memit.editors.alphaedit import AlphaEdit
from memit.editors.base import Resources
from memit.editors.encore import Encore
from memit.editors.memit import Memit
from memit.editors.rome import Rome
from memit.evaluation import perplexity
from memit.evaluation.drift import read_text
from memit.hyperparameters import AUTO
from memit.placement import solving_device
from memit.second_moment import SecondMoment
from memit.spread import spread
from memit.targets import compute_targets
from tests.families import DOCUMENTS, PREFIXES
from tests.reference import HYPERPARAMETERS, REQUESTS, build, memit_form, reference

ELSEWHERE = torch.device("cpu", 1)
"""Stands for the CPU; all other tensors of this process stand for the device's."""


class WithoutFloat64(TorchFunctionMode):
    """Lets numbers become float64 only if they were moved, or come from some that were."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, see what it made, and mark what lies elsewhere now."""
        kwargs = kwargs or {}
        if func == Tensor.device.__get__ and is_moved(args[0]):  # type: ignore[attr-defined]
            return ELSEWHERE
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        numbers = [one for one in given if one.is_floating_point()]
        to = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
        moves = func is Tensor.cpu or ELSEWHERE in to
        if (moves or to) and any(result is one for one in given):
            result = result.view_as(result)  # what did not move stays what it was
        made_there = not given and kwargs.get("device") is None
        came_along = bool(numbers) and all(map(is_moved, numbers)) and not to
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            is_there = moves or made_there or came_along
            if tensor.dtype == torch.float64 and not is_there:
                raise TypeError("the device has no float64")
            if is_there:
                tensor.moved = True  # type: ignore[attr-defined]
        return result


def is_moved(tensor: Tensor) -> bool:
    return getattr(tensor, "moved", False)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> WithoutFloat64:
    for module in (walk, perplexity, rome):
        monkeypatch.setattr(module, "solving_device", lambda _: ELSEWHERE)
    return WithoutFloat64()


def moments() -> dict[int, SecondMoment]:
    found = reference("gpt2").moments
    for moment in found.values():
        moment.sum.moved = True  # type: ignore[attr-defined]
    return found


def test_the_device_that_is_acted_has_none(device: WithoutFloat64) -> None:
    with device:
        ones = torch.ones(2, device="cpu")
        assert ones.cpu().double().sum() == 2
        with pytest.raises(TypeError, match="no float64"):
            ones.double()
        with pytest.raises(TypeError, match="no float64"):
            ones.new_zeros(2, dtype=torch.float64)


def test_an_edit(device: WithoutFloat64) -> None:
    lm, given = build("gpt2"), moments()
    z = compute_targets(lm, REQUESTS, PREFIXES, HYPERPARAMETERS, token_budget=1 << 20).z
    expected = spread(
        lm, REQUESTS, PREFIXES, z, memit_form(given), HYPERPARAMETERS, token_budget=1 << 20
    )
    with device:
        found = spread(
            lm, REQUESTS, PREFIXES, z, memit_form(given), HYPERPARAMETERS, token_budget=1 << 20
        )
    assert found.residual_left == expected.residual_left


@pytest.mark.parametrize(
    "editor",
    [
        Memit(replace(HYPERPARAMETERS, covariance_weight=AUTO)),
        AlphaEdit(HYPERPARAMETERS),
        Encore(HYPERPARAMETERS),
    ],
    ids=lambda editor: editor.name,
)
def test_an_editor(device: WithoutFloat64, editor: Memit) -> None:
    """One of them chooses λ among several."""
    lm, resources = build("gpt2"), Resources(2000, prefixes=PREFIXES, moments=moments())
    expected = editor.edit(lm, REQUESTS, resources)
    with device:
        found = editor.edit(lm, REQUESTS, resources)
    assert found.provenance == expected.provenance


def test_perplexity(device: WithoutFloat64) -> None:
    lm = build("gpt2")
    expected = read_text(lm, DOCUMENTS, token_budget=2000).perplexity
    with device:
        assert read_text(lm, DOCUMENTS, token_budget=2000).perplexity == expected


def test_rome(device: WithoutFloat64) -> None:
    lm, resources = build("gpt2"), Resources(2000, moments=moments())
    with device:
        edit = Rome(1).edit(lm, REQUESTS[:1], resources)
    assert list(edit.changes) == ["transformer.h.1.mlp.c_proj.weight"]


def test_other_devices_solve_for_themselves() -> None:
    assert solving_device(torch.device("mps")) == torch.device("cpu")
    for name in ("cpu", "cuda:1"):
        assert solving_device(torch.device(name)) == torch.device(name)
