"""Editors that share the closed form: two batches against their formulas, written out densely."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memit import reference as oracle
from memit.editors.alphaedit import AlphaEdit, quiet_directions
from memit.editors.base import Resources
from memit.editors.encore import Encore
from memit.editors.memit import Memit
from memit.editors.memit_forgetting import MemitForgetting
from memit.editors.memit_sequence import MemitSequence
from memit.errors import InputError
from memit.sequence import edit_in_batches
from memit.targets import Targets
from tests.families import LAYERS, PREFIXES
from tests.reference import HYPERPARAMETERS, REQUESTS, build, reference, relative

BATCHES = (REQUESTS[:1], REQUESTS[1:])
WEIGHT = float(HYPERPARAMETERS.covariance_weight)
THRESHOLD = 0.1

Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Δ of K, R, C, C_p and Δ_tot."""


def _memit(K, R, C, past, total):
    return R @ K.T @ torch.linalg.inv(WEIGHT * C + K @ K.T)


def _sequence(K, R, C, past, total):
    return R @ K.T @ torch.linalg.inv(WEIGHT * C + past + K @ K.T)


def _forgetting(K, R, C, past, total):
    B = -WEIGHT * total @ C - total @ past
    return (R @ K.T + B) @ torch.linalg.inv(WEIGHT * C + past + K @ K.T)


def _encore(K, R, C, past, total):
    return R @ K.T @ torch.linalg.inv(WEIGHT * C + 0.3 * torch.eye(len(K)) + past + K @ K.T)


def _alphaedit(K, R, C, past, total):
    """In the published arrangement."""
    U, values, _ = torch.linalg.svd(C)
    P = U[:, values < THRESHOLD] @ U[:, values < THRESHOLD].T
    return R @ K.T @ P @ torch.linalg.inv(past @ P + K @ K.T @ P + 0.5 * torch.eye(len(K)))


EDITORS: list[tuple[Memit, Formula]] = [
    (Memit(HYPERPARAMETERS), _memit),
    (MemitSequence(HYPERPARAMETERS), _sequence),
    (MemitForgetting(HYPERPARAMETERS), _forgetting),
    (Encore(HYPERPARAMETERS, ridge=0.3), _encore),
    (AlphaEdit(HYPERPARAMETERS, ridge=0.5, threshold=THRESHOLD), _alphaedit),
]


def _resources(family: str) -> Resources:
    expected = reference(family)
    count = len(REQUESTS)
    targets = Targets(expected.z, expected.z, torch.zeros(count, 1), torch.ones(count).bool())
    return Resources(1 << 20, PREFIXES, moments=expected.moments, targets=targets)


def _keys_and_hidden(lm, requests, layer: int) -> tuple[Tensor, Tensor]:
    pairs = [
        oracle.key_and_hidden(lm.model, lm.tokenizer, request, PREFIXES, layer, HYPERPARAMETERS)
        for request in requests
    ]
    keys, hidden = (torch.stack(part, 1).double() for part in zip(*pairs, strict=True))
    return keys, hidden


@torch.no_grad()
def _literal(lm, family: str, formula: Formula) -> list[dict[int, Tensor]]:
    """Algorithm 1, lines 5-15, for each batch; C_p is taken from the keys after each batch."""
    C, z, f = reference(family).covariances, reference(family).z.double(), len(lm.weight(1).T)
    past = {layer: torch.zeros(f, f, dtype=torch.float64) for layer in LAYERS}
    total = {layer: torch.zeros(lm.width, f, dtype=torch.float64) for layer in LAYERS}
    updates = []
    for batch in BATCHES:
        rows = [REQUESTS.index(request) for request in batch]
        update = {}
        for done, layer in enumerate(LAYERS):
            K, hidden = _keys_and_hidden(lm, batch, layer)
            R = (z[rows].T - hidden) / (len(LAYERS) - done)
            update[layer] = formula(K, R, C[layer].double(), past[layer], total[layer])
            oracle.weight(lm.model, layer).add_(update[layer])
        for layer in LAYERS:
            K, _ = _keys_and_hidden(lm, batch, layer)
            past[layer] += K @ K.T
            total[layer] += update[layer]
        updates.append(update)
    return updates


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("editor", "formula"), EDITORS, ids=lambda one: getattr(one, "name", ""))
def test_two_batches_are_those_of_the_formula(family, editor, formula):
    lm = build(family)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    edits = list(edit_in_batches(lm, editor, BATCHES, _resources(family)))
    for edit, expected in zip(edits, _literal(build(family), family, formula), strict=True):
        for layer in LAYERS:
            delta = edit.changes[lm.weight_name(layer)].dense()  # type: ignore[attr-defined]
            delta = delta.T if lm.is_transposed(layer) else delta
            assert relative(delta, expected[layer]) < 2e-4
    for edit in reversed(edits):
        edit.revert(lm)
    assert all(torch.equal(value, before[n]) for n, value in lm.model.state_dict().items())


def test_targets_that_are_not_given_are_those_of_the_edited_model():
    lm = build("gpt2")
    given = _resources("gpt2")
    resources = Resources(1 << 20, prefixes=PREFIXES, moments=given.moments)
    editor = Memit(HYPERPARAMETERS)
    edits = edit_in_batches(lm, editor, BATCHES, resources)
    next(edits)
    expected = editor.edit(lm, BATCHES[1], resources)
    found = next(edits)
    assert all(
        torch.equal(found.changes[name].dense(), change.dense())  # type: ignore[attr-defined]
        for name, change in expected.changes.items()
    )


def test_alphaedit_tells_its_ranks_and_refuses_to_change_nothing():
    lm, resources = build("gpt2"), _resources("gpt2")
    edit = AlphaEdit(HYPERPARAMETERS, threshold=THRESHOLD).edit(lm, REQUESTS, resources)
    C = reference("gpt2").covariances
    ranks = {str(la): int((torch.linalg.svdvals(C[la]) < THRESHOLD).sum()) for la in LAYERS}
    assert edit.provenance["ranks"] == ranks
    assert 0 < ranks["1"] < len(C[1])
    with pytest.raises(InputError, match=r"layer 1 .*threshold.*energy"):
        AlphaEdit(HYPERPARAMETERS, threshold=0.0).edit(lm, REQUESTS, resources)


@pytest.mark.parametrize("energy", [0.0, 0.1, 0.5, 1.0])
def test_directions_by_energy_do_not_depend_on_the_scale(energy):
    C = reference("gpt2").covariances[1].double()
    basis = quiet_directions(C, 0.0, energy)
    held = float((basis.T @ C @ basis).trace() / C.trace())
    assert held <= energy + 1e-9
    assert quiet_directions(1e3 * C, 0.0, energy).shape == basis.shape
    if energy in (0.1, 0.5):  # one more direction would hold too much
        values = torch.linalg.eigvalsh(C)
        assert values[: basis.shape[1] + 1].sum() > energy * values.sum()
