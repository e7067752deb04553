"""Joint values against a literal optimisation and a dense closed form, in float64."""

import copy
from contextlib import ExitStack
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
from tests.reference import HYPERPARAMETERS, REQUESTS, build, reference, relative

SETTINGS = replace(
    HYPERPARAMETERS, evaluations=6, learning_rate=0.2, rate_unit="relative", clamp_factor=1.0
)
LARGE = 1 << 20
PAIRS = [(request.text, request.target_new) for request in REQUESTS]
FAMILIES = ["gemma3", "olmo2", "opt_projected", "llama", "gpt2"]


def _literal_changes(model, tokenizer, fact, prefixes, settings) -> Tensor:
    """D of each layer (layers × d): one fact, whole rows, one step of Adam for each layer."""
    rows = [oracle.row(tokenizer, x, fact.prompt, fact.subject, fact.target_new) for x in prefixes]
    rows.append(oracle.row(tokenizer, "", "{} is a", fact.subject))
    inputs = oracle.padded(model, rows)
    every, last = torch.arange(len(rows)), torch.tensor([r.subject_last for r in rows])
    changes: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(index: int):
        def add(module, args, output):
            states = output.reshape(*inputs["input_ids"].shape, -1)
            if len(outputs) <= index:  # the first evaluation: nothing is changed yet
                outputs.append(states[0, last[0]].detach())
                changes.append(torch.zeros_like(outputs[index], requires_grad=True))
            place = torch.zeros_like(states)
            place[every, last] = 1.0
            return (states + place * changes[index]).reshape(output.shape)

        return add

    with ExitStack() as stack:
        for index, layer in enumerate(settings.layers):
            module = oracle.down_projection(model, layer)
            stack.callback(module.register_forward_hook(hook(index)).remove)
        for evaluation in range(settings.evaluations):
            logits = model(**inputs, use_cache=False).logits
            current = logits[-1, last[-1]].log_softmax(-1)
            if evaluation == 0:
                initial = current.detach()
                rates = [settings.learning_rate * oracle.rms(m) for m in outputs]
                groups = [{"params": [c], "lr": r} for c, r in zip(changes, rates, strict=True)]
                optimizer = torch.optim.Adam(groups)
            loss = torch.stack([oracle.nll(logits[i], r) for i, r in enumerate(rows[:-1])]).mean()
            loss = loss + settings.kl_factor * (current.exp() * (current - initial)).sum()
            shares = [(c.norm() / m.norm()) ** 2 for c, m in zip(changes, outputs, strict=True)]
            loss = loss + settings.weight_decay * torch.stack(shares).mean()
            if loss < settings.loss_threshold or evaluation == settings.evaluations - 1:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for change, m in zip(changes, outputs, strict=True):
                    change.mul_((settings.clamp_factor * m.norm() / change.norm()).clamp(max=1))
    return torch.stack([change.detach() for change in changes])


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
            _literal_changes(precise, lm.tokenizer, fact, ("", *PREFIXES), SETTINGS)
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
    share = told["residual_left"] / fmean(
        told["residuals"].values()
    )  # of all layers, not the first
    assert told["share_left"] == pytest.approx(share, abs=1e-5)
    after = [score.nll for score in oracle.scores(lm.model, lm.tokenizer, PAIRS)]
    assert sum(after) < sum(before)
