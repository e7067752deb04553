"""Joint values against a literal optimisation and a dense closed form, in float64."""

import copy
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor

import memit
from memit import reference as oracle
from memit.editors.base import Resources
from memit.editors.joint import Joint
from memit.editors.memit import Memit
from memit.errors import InputError
from memit.second_moment import SecondMoment
from memit.targets import compute_targets
from tests.families import DOCUMENTS, LAYERS, PREFIXES
from tests.reference import HYPERPARAMETERS, REQUESTS, build, literal_changes, reference, relative

SETTINGS = replace(
    HYPERPARAMETERS, evaluations=6, learning_rate=0.2, rate_unit="relative", clamp_factor=1.0
)
LARGE = 1 << 20
PAIRS = [(request.text, request.target_new) for request in REQUESTS]
FAMILIES = ["gemma3", "olmo2", "opt_projected", "llama", "gpt2"]


def _mean_share(changes: Tensor, outputs: Tensor) -> Tensor:
    return (changes.norm(dim=1) / outputs.norm(dim=1)).square().mean()


def _literal_updates(model, tokenizer, changes: Tensor, C) -> dict[int, oracle.LayerUpdate]:
    """Δ of each layer for changes (n × layers × d), with the lower updates in place."""

    def keys(layer: int) -> Tensor:
        pairs = [
            oracle.key_and_hidden(model, tokenizer, fact, PREFIXES, layer, SETTINGS)
            for fact in REQUESTS
        ]
        return torch.stack([key for key, _ in pairs], 1)

    updates: dict[int, oracle.LayerUpdate] = {}
    for index, layer in enumerate(LAYERS):
        with oracle.edited(model, updates):
            K = keys(layer)
        R = changes[:, index].T
        updates[layer] = oracle.LayerUpdate(K, R, oracle.update(K, R, C[layer], SETTINGS))
    return updates


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_and_updates_are_those_of_the_oracle(family):
    lm, covariances = build(family), reference(family).covariances
    precise = copy.deepcopy(lm.model).double()
    expected = torch.stack(
        [
            literal_changes(precise, lm.tokenizer, fact, PREFIXES, SETTINGS, _mean_share)[0]
            for fact in REQUESTS
        ]
    )
    editor = Joint(SETTINGS)
    settings = editor.target_hyperparameters
    targets = compute_targets(lm, REQUESTS, PREFIXES, settings, token_budget=LARGE)
    found = (targets.z - targets.hidden).reshape(expected.shape)
    assert relative(found, expected) < 1e-3
    moments = {layer: SecondMoment(C * 100, 100) for layer, C in covariances.items()}
    resources = Resources(LARGE, prefixes=PREFIXES, moments=moments)
    delta = editor.edit(lm, REQUESTS, resources)
    updates = _literal_updates(precise, lm.tokenizer, expected, covariances)
    for layer, update in updates.items():
        change = delta.changes[lm.weight_name(layer)].dense()
        change = change.T if lm.is_transposed(layer) else change
        assert relative(change, update.delta) < 1e-3


def test_a_model_with_a_norm_behind_its_mlps_is_edited_so_and_by_no_spreading(monkeypatch):
    lm = build("olmo2")
    records = [memit.Record(i, request) for i, request in enumerate(REQUESTS)]
    monkeypatch.setattr("memit.editing.sample_prefixes", None)  # nothing may be computed before
    with pytest.raises(InputError, match="use joint"):
        memit.edit(lm, records, DOCUMENTS, hyperparameters=HYPERPARAMETERS)
    monkeypatch.undo()
    at_mlps = replace(HYPERPARAMETERS, layers=(1,), site="down_projections")
    with pytest.raises(InputError, match=r"targets\.site.*use joint"):
        Memit(at_mlps).edit(build("llama"), REQUESTS, Resources(LARGE))
    before = [score.nll for score in oracle.scores(lm.model, lm.tokenizer, PAIRS)]
    delta = memit.edit(lm, records, DOCUMENTS * 8)
    assert delta.provenance["method"] == "joint"
    told = delta.provenance
    assert told["residual_left"] < max(told["residuals"].values())
    before_it = fmean(told["residuals"].values())  # of all layers, not the first
    assert told["share_left"] == pytest.approx(told["residual_left"] / before_it, abs=1e-5)
    after = [score.nll for score in oracle.scores(lm.model, lm.tokenizer, PAIRS)]
    assert sum(after) < sum(before)
