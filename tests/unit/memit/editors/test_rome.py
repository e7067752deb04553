"""ROME's value against a literal optimisation, its update against what it promises."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from memit.editors import rome
from memit.editors.base import Resources
from memit.editors.rome import Rome, sample_rome_prefixes
from memit.errors import InputError, NumericsError
from memit.language_model import LanguageModel
from memit.second_moment import SecondMoment, keys_at_subjects
from memit.targets import Site, compute_targets, edit_rows
from memit.weight_delta import LowRank
from tests import Stopped, stop_after
from tests.families import PREFIXES
from tests.reference import REQUESTS, build, literal_changes, relative, ridged_moments

LAYER = 1
LARGE = 1 << 20
EDITOR = Rome(LAYER, evaluations=6)


def _resources(lm: LanguageModel, **others) -> Resources:
    moments = ridged_moments(lm, [LAYER])
    return Resources(token_budget=LARGE, moments=moments, seed=3, **others)


def _said(lm: LanguageModel, key: Tensor) -> Tensor:
    with torch.no_grad():
        return lm.down_projection(LAYER)(key)


@pytest.mark.parametrize(
    ("family", "layer"),
    [("gpt2", 0), *((family, LAYER) for family in ("gpt2", "gptj", "gemma2", "olmo2", "bloom"))],
)
@pytest.mark.parametrize("request_index", [0, 2])
def test_values_are_those_of_a_literal_optimisation(family, layer, request_index):
    """At layer 0, too, below which nothing can be computed once."""
    lm, facts, prefixes = build(family), REQUESTS[request_index:][:1], PREFIXES[:3]
    settings, site = replace(EDITOR, layer=layer).optimisation, Site((layer,), in_mlp=True)
    found = compute_targets(lm, facts, prefixes, settings, token_budget=LARGE, site=site)
    change, output = literal_changes(
        lm.model,
        lm.tokenizer,
        facts[0],
        prefixes,
        settings,
        decay=lambda changes, outputs: changes.norm() / outputs.norm() ** 2,
    )
    assert relative(found.z[0], (output + change)[0]) < 1e-4
    assert change.norm() > 0.1 * output.norm()


def _one_edit(family: str, editor: Rome):
    """The delta of one edit, with its keys, its value and the second moment."""
    lm = build(family)
    resources = _resources(lm)
    prefixes = sample_rome_prefixes(lm, resources.seed)
    rows = edit_rows(lm, REQUESTS[:1], prefixes)[0]
    keys = keys_at_subjects(lm, [rows.plain, *rows.prefixed], [LAYER])[LAYER]
    value = compute_targets(
        lm,
        REQUESTS[:1],
        prefixes,
        editor.optimisation,
        token_budget=LARGE,
        site=Site((LAYER,), in_mlp=True),
    ).z[0]
    delta = editor.edit(lm, REQUESTS[:1], resources)
    return lm, delta, keys, value, resources.moments[LAYER].mean


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_the_published_update_reaches_the_value_at_the_plain_key(family):
    lm, delta, keys, value, _ = _one_edit(family, EDITOR)
    assert relative(_said(lm, keys[0]), value) > 0.05
    delta.apply(lm)
    assert relative(_said(lm, keys[0]), value) < 1e-5
    assert relative(_said(lm, keys.mean(0)), value) > 1e-3


def test_the_consistent_update_reaches_it_at_the_averaged_key():
    lm, delta, keys, value, _ = _one_edit("gpt2", replace(EDITOR, update="consistent"))
    delta.apply(lm)
    assert relative(_said(lm, keys.mean(0)), value) < 1e-5
    assert relative(_said(lm, keys[0]), value) > 1e-3


@pytest.mark.parametrize("update", ["published", "consistent"])
def test_keys_orthogonal_under_the_inverse_moment_do_not_move(update):
    lm, delta, keys, _, C = _one_edit("llama", replace(EDITOR, update=update))
    u = torch.linalg.solve(C, keys.mean(0).double())
    others = torch.randn(50, len(u), dtype=torch.float64)
    others -= (others @ u)[:, None] * keys.mean(0).double() / (keys.mean(0).double() @ u)
    change = delta.changes[lm.weight_name(LAYER)].dense()
    moved = others.float() @ change.T
    free = torch.randn(50, len(u)) @ change.T
    assert moved.norm() < 1e-4 * free.norm()


def test_each_edit_is_computed_on_the_model_that_those_before_it_left(monkeypatch):
    monkeypatch.setattr(rome, "sample_rome_prefixes", lambda lm, seed: PREFIXES)
    lm = build("gpt2")
    resources = _resources(lm)
    name = lm.weight_name(LAYER)

    def change(count: slice) -> Tensor:
        return EDITOR.edit(lm, REQUESTS[count], resources).changes[name].dense()

    together, alone = change(slice(0, 2)), change(slice(1, 2))
    first = EDITOR.edit(lm, REQUESTS[:1], resources)
    first.apply(lm)
    after_first = change(slice(1, 2))
    assert relative(together, first.changes[name].dense() + after_first) < 1e-4
    assert relative(together, first.changes[name].dense() + alone) > 1e-3


def test_the_model_is_given_back_and_progress_is_told():
    lm = build("llama")
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    told: list[int] = []
    delta = EDITOR.edit(lm, REQUESTS[:3], _resources(lm, progress=told.append))
    assert told == [1, 1, 1]
    after = lm.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert delta.provenance["method"] == "rome"
    change = delta.changes[lm.weight_name(LAYER)]
    assert isinstance(change, LowRank)
    assert change.left.shape == (32, 3)


def test_a_bfloat16_model_is_edited_and_given_back():
    lm = build("gpt2")
    resources = _resources(lm)
    lm.model.bfloat16()
    base = lm.weight(LAYER).clone()
    delta = EDITOR.edit(lm, REQUESTS[:2], resources)
    assert torch.equal(lm.weight(LAYER), base)
    delta.apply(lm)
    assert not torch.equal(lm.weight(LAYER), base)
    delta.revert(lm)
    assert torch.equal(lm.weight(LAYER), base)


def test_prefixes_are_twenty_and_follow_the_seed():
    lm = build("gpt2")
    prefixes = sample_rome_prefixes(lm, 0)
    assert len(prefixes) == 20
    assert all(prefix.endswith(". ") for prefix in prefixes)
    assert prefixes == sample_rome_prefixes(lm, 0)
    assert prefixes != sample_rome_prefixes(lm, 1)
    theirs = lm.model.generation_config
    lm.model.generation_config = GenerationConfig(max_new_tokens=40, temperature=5.0)
    try:
        assert prefixes == sample_rome_prefixes(lm, 0)  # whatever the checkpoint says
    finally:
        lm.model.generation_config = theirs


def test_a_tokenizer_without_a_beginning_is_refused():
    lm = build("gpt2")
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = None
    try:
        with pytest.raises(InputError, match="bos_token"):
            sample_rome_prefixes(lm, 0)
    finally:
        lm.tokenizer.bos_token = lm.tokenizer.eos_token = "<|endoftext|>"


def test_a_moment_without_full_rank_is_refused():
    lm = build("gpt2")
    keys = torch.randn(3, lm.inner_width, dtype=torch.float64)
    moments = {LAYER: SecondMoment(keys.T @ keys, 3)}
    with pytest.raises(NumericsError, match="positive definite"):
        EDITOR.edit(lm, REQUESTS[:1], Resources(LARGE, moments=moments))


def test_a_layer_that_does_not_exist_is_named():
    lm = build("gpt2")
    with pytest.raises(InputError, match="layer 9"):
        replace(EDITOR, layer=9).edit(lm, REQUESTS[:1], Resources(LARGE))


def test_an_interrupted_edit_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(rome, "EDITS_BETWEEN_CHECKPOINTS", 1)
    lm = build("gpt2")
    name = lm.weight_name(LAYER)
    whole = EDITOR.edit(lm, REQUESTS, _resources(lm)).changes[name].dense()

    with pytest.raises(Stopped):
        EDITOR.edit(lm, REQUESTS, _resources(lm, checkpoints=tmp_path, progress=stop_after(2)))
    told: list[int] = []
    resources = _resources(lm, checkpoints=tmp_path, progress=told.append)
    resumed = EDITOR.edit(lm, REQUESTS, resources)
    assert told == [2, 1, 1]
    assert torch.equal(resumed.changes[name].dense(), whole)


def test_damaged_updates_are_computed_again(tmp_path):
    lm = build("gpt2")
    name = lm.weight_name(LAYER)
    whole = EDITOR.edit(lm, REQUESTS, _resources(lm, checkpoints=tmp_path)).changes[name].dense()
    (kept,) = tmp_path.iterdir()
    content = bytearray(kept.read_bytes())
    content[-5] ^= 1
    kept.write_bytes(content)
    told: list[int] = []
    again = EDITOR.edit(lm, REQUESTS, _resources(lm, checkpoints=tmp_path, progress=told.append))
    assert told == [1] * len(REQUESTS)
    assert torch.equal(again.changes[name].dense(), whole)


def test_edits_without_a_finite_update_are_left_out(monkeypatch):
    lm = build("gpt2")
    literal = Rome._update

    def broken(self, lm, request, *others):
        update = literal(self, lm, request, *others)
        return LowRank(update.left * torch.nan, update.right) if request == REQUESTS[1] else update

    monkeypatch.setattr(Rome, "_update", broken)
    delta = EDITOR.edit(lm, REQUESTS[:3], _resources(lm))
    assert delta.provenance["left_out"] == [1]
    assert delta.changes[lm.weight_name(LAYER)].dense().isfinite().all()
    with pytest.raises(NumericsError, match="finite"):
        EDITOR.edit(lm, REQUESTS[1:2], _resources(lm))


def test_an_edit_whose_search_met_a_loss_that_is_not_finite_is_left_out(monkeypatch):
    def broken(*given, **named):
        return replace(compute_targets(*given, **named), finite=torch.tensor([False]))

    monkeypatch.setattr(rome, "compute_targets", broken)
    lm = build("gpt2")
    with pytest.raises(NumericsError, match="no edit of 1 has a finite update"):
        EDITOR.edit(lm, REQUESTS[:1], _resources(lm))


@pytest.mark.parametrize(
    ("name", "depth", "layer"),
    [("EleutherAI/gpt-j-6b", 28, 5), ("openai-community/gpt2-xl", 48, 17), ("other", 56, 10)],
)
def test_the_layer_is_the_published_one_or_as_deep(name, depth, layer):
    assert rome.rome_preset(name, depth).layer == layer
