"""MEND: the identity before training, disjoint training, checkpoints, and a sum over edits."""

import json
from dataclasses import replace

import pytest
import torch

from memit import reference as oracle
from memit.editors import known_editors
from memit.editors.base import Resources
from memit.editors.mend import (
    EditExample,
    Mend,
    MendSettings,
    edited_matrices,
    examples_from_records,
    examples_from_texts,
    mend_changes,
    train_mend,
)
from memit.editors.mend_network import MendNetwork
from memit.errors import InputError, IntegrityError
from memit.language_model import LanguageModel
from memit.requests import EditRequest, Record
from memit.weight_delta import Dense, LowRank
from tests import Stopped, stop_after
from tests.families import CITIES, SUBJECTS
from tests.reference import build

SETTINGS = MendSettings(
    blocks=2,
    rank=8,
    edits_at_once=2,
    steps=6,
    learning_rate=1e-3,
    rate_learning_rate=1e-2,
    edit_learning_rate=0.25,
    examples_for_statistics=4,
)
REQUESTS = [
    EditRequest("Paul Smith", "{} was born in", "New York City", "Rome", "birthplace"),
    EditRequest("Zoë Müller", "The home town of {} is", "Rome", "Paris", "home"),
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build("gpt2")


def make_records() -> list[Record]:
    return [
        Record(
            index,
            EditRequest(subject, "{} lives in", CITIES[index % 6], CITIES[(index + 1) % 6], "city"),
            paraphrase_prompts=(f"The home of {subject} is",),
            neighborhood_prompts=(f"{SUBJECTS[(index + 1) % 8]} works in",),
        )
        for index, subject in enumerate(SUBJECTS)
    ]


def untrained(lm: LanguageModel) -> MendNetwork:
    settings = replace(SETTINGS, steps=0)
    return train_mend(lm, examples_from_records(make_records()), settings, directory=None)[0]


def gradients(lm: LanguageModel, names, requests) -> dict[str, torch.Tensor]:
    """Autograd's own gradient of the summed mean nll, in the model's orientation."""
    rows = [oracle.continuation(lm.tokenizer, r.text, r.target_new) for r in requests]
    weights = [lm.parameter(name).requires_grad_() for name in names]
    try:
        logits = (lm.model(input_ids=torch.tensor([row.ids])).logits[0] for row in rows)
        losses = [oracle.nll(found, row) for found, row in zip(logits, rows, strict=True)]
        return dict(
            zip(names, torch.autograd.grad(torch.stack(losses).sum(), weights), strict=True)
        )
    finally:
        for weight in weights:
            weight.requires_grad_(False)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_untrained_network_makes_a_plain_gradient_step(family: str) -> None:
    lm = build(family)
    network = untrained(lm)
    changes = mend_changes(lm, REQUESTS, network, token_budget=64)
    assert len(changes) == (6 if family == "llama" else 4)
    for name, gradient in gradients(lm, list(changes), REQUESTS).items():
        torch.testing.assert_close(
            changes[name].dense(), -0.25 * gradient, rtol=1e-4, atol=1e-6 * float(gradient.norm())
        )


def test_training_changes_the_update_and_lowers_the_loss(lm: LanguageModel) -> None:
    settings = replace(SETTINGS, steps=40, learning_rate=3e-3, rate_learning_rate=3e-2)
    network, losses = train_mend(
        lm, examples_from_records(make_records()), settings, directory=None
    )
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    plain = mend_changes(lm, REQUESTS, untrained(lm), token_budget=64)
    trained = mend_changes(lm, REQUESTS, network, token_budget=64)
    for name, change in trained.items():
        turned = torch.cosine_similarity(
            change.dense().flatten(), plain[name].dense().flatten(), dim=0
        )
        assert turned < 0.999


def test_updates_of_all_edits_are_summed_whatever_the_batches(lm: LanguageModel) -> None:
    network = untrained(lm)
    together = mend_changes(lm, REQUESTS, network, token_budget=1000)
    apart = mend_changes(lm, REQUESTS, network, token_budget=1)
    alone = [mend_changes(lm, [request], network, token_budget=64) for request in REQUESTS]
    for name, change in together.items():
        torch.testing.assert_close(change.dense(), apart[name].dense(), rtol=1e-4, atol=1e-6)
        summed = alone[0][name].dense() + alone[1][name].dense()
        torch.testing.assert_close(change.dense(), summed, rtol=1e-4, atol=1e-6)


def test_factors_are_kept_while_they_are_smaller_than_the_matrix(lm: LanguageModel) -> None:
    network = untrained(lm)
    few = mend_changes(lm, REQUESTS[:1], network, token_budget=64)
    many = mend_changes(lm, REQUESTS * 10, network, token_budget=64)
    assert all(isinstance(change, LowRank) for change in few.values())
    assert all(isinstance(change, Dense) for change in many.values())
    for name, change in many.items():
        once = mend_changes(lm, REQUESTS, network, token_budget=64)[name].dense()
        torch.testing.assert_close(change.dense(), 10 * once, rtol=1e-3, atol=1e-5)


def test_matrices_of_the_last_blocks_are_found_by_structure() -> None:
    assert list(edited_matrices(build("llama"), 1)) == [
        "model.layers.3.mlp.gate_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
    ]
    with pytest.raises(InputError, match="blocks is 5"):
        edited_matrices(build("gpt2"), 5)


def test_edit_changes_the_model_and_leaves_it_as_it_was(lm: LanguageModel, tmp_path) -> None:
    network = untrained(lm)
    path = tmp_path / "network.safetensors"
    network.save(path)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    assert known_editors()["mend"] is Mend
    edit = Mend(SETTINGS, path).edit(lm, REQUESTS, Resources(token_budget=64))
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())
    json.dumps(edit.provenance)
    edit.apply(lm)
    changed = {n for n, p in lm.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(network.matrices)
    edit.revert(lm)
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


def test_saved_network_gives_the_same_update(lm: LanguageModel, tmp_path) -> None:
    network, _ = train_mend(lm, examples_from_records(make_records()), SETTINGS, directory=None)
    network.save(tmp_path / "network.safetensors")
    loaded = MendNetwork.load(tmp_path / "network.safetensors")
    first = mend_changes(lm, REQUESTS, network, token_budget=64)
    second = mend_changes(lm, REQUESTS, loaded.requires_grad_(False), token_budget=64)
    assert all(torch.equal(first[name].dense(), second[name].dense()) for name in first)
    assert loaded.origin == network.origin


def test_damaged_or_foreign_networks_are_refused(lm: LanguageModel, tmp_path) -> None:
    path = tmp_path / "network.safetensors"
    untrained(lm).save(path)
    with pytest.raises(InputError, match="another model"):
        Mend(SETTINGS, path).edit(build("llama"), REQUESTS, Resources(token_budget=64))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(IntegrityError, match="network of MEND"):
        MendNetwork.load(path)


def test_a_request_that_was_trained_on_is_refused(lm: LanguageModel, tmp_path) -> None:
    records = make_records()
    untrained(lm).save(tmp_path / "network.safetensors")
    editor = Mend(SETTINGS, tmp_path / "network.safetensors")
    with pytest.raises(InputError, match="trained on"):
        editor.edit(lm, [*REQUESTS, records[5].request], Resources(token_budget=64))


def test_too_few_examples_are_counted(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="has 3 edits to learn from and needs 4"):
        train_mend(lm, examples_from_records(make_records()[:3]), SETTINGS, directory=None)


def test_texts_become_examples_without_records() -> None:
    first, _ = examples_from_texts([("one two three four", "seven"), ("five six", "eight")])
    assert first == EditExample(
        ("one two three four", "seven"),
        (("one two three four", "seven"), ("three four", "seven")),
        (),
    )


# --- long trainings ------------------------------------------------------------------------------


def test_an_interrupted_training_ends_with_the_same_weights(
    lm: LanguageModel, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("memit.training.CHECKPOINT_EVERY", 2)
    examples = examples_from_records(make_records())
    whole, losses = train_mend(lm, examples, SETTINGS, directory=tmp_path / "whole")
    with pytest.raises(Stopped):
        train_mend(lm, examples, SETTINGS, directory=tmp_path / "parts", progress=stop_after(5))
    resumed: list[int] = []
    again, more = train_mend(
        lm, examples, SETTINGS, directory=tmp_path / "parts", progress=resumed.append
    )
    assert resumed == [4, 1, 1]
    assert more == losses
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )
