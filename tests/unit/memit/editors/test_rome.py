"""ROME's value against a literal optimisation, its update against what it promises."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from memit.editors import known_editors, rome
from memit.editors.base import Resources
from memit.editors.rome import Rome, sample_rome_prefixes
from memit.errors import InputError, NumericsError
from memit.language_model import LanguageModel
from memit.second_moment import SecondMoment, collect_second_moments, keys_at_subjects
from memit.targets import Site, compute_targets, edit_rows
from memit.weight_delta import LowRank, WeightDelta
from tests.families import DOCUMENTS, PREFIXES
from tests.reference import REQUESTS, build, prompt_row, relative

LAYER = 1
LARGE = 1 << 20
EDITOR = Rome(LAYER, evaluations=6)


def _moments(lm: LanguageModel) -> dict[int, SecondMoment]:
    found = collect_second_moments(lm, DOCUMENTS, [LAYER], token_budget=LARGE)
    # Few documents leave directions without a key; real corpora do not.
    moment = found[LAYER]
    ridge = 0.1 * moment.count * torch.eye(len(moment.sum), dtype=torch.float64)
    return {LAYER: SecondMoment(moment.sum.double() + ridge, moment.count)}


def _resources(lm: LanguageModel, **others) -> Resources:
    return Resources(token_budget=LARGE, moments=_moments(lm), seed=3, **others)


def _said(lm: LanguageModel, key: Tensor) -> Tensor:
    with torch.no_grad():
        return lm.down_projection(LAYER)(key)


def _literal_value(lm: LanguageModel, request, prefixes, editor: Rome) -> Tensor:
    """v* by full forward passes of one row at a time and Adam written out."""
    module = lm.down_projection(LAYER)
    template, subject, target = request.prompt, request.subject, request.target_new
    rows = [
        prompt_row(lm.tokenizer, template, subject, prefix=prefix, target=target)
        for prefix in ("", *prefixes)
    ]
    essence = prompt_row(lm.tokenizer, "{} is a", request.subject)

    def logits(row, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        said = []

        def hook(_module, _args, output):
            said.append(output[0, row.subject_last].detach().clone())
            if delta is None:
                return None
            place = torch.zeros(output.shape[1], 1)
            place[row.subject_last] = 1.0
            return output + place * delta

        handle = module.register_forward_hook(hook)
        try:
            ids = torch.tensor([row.ids])
            out = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        finally:
            handle.remove()
        return out.logits[0].log_softmax(-1), said[0]

    with torch.no_grad():
        base = logits(rows[0], None)[1]
        initial = logits(essence, None)[0][essence.subject_last]
    delta = torch.zeros_like(base, requires_grad=True)
    first, second = torch.zeros_like(base), torch.zeros_like(base)
    for step in range(1, editor.evaluations + 1):
        nll = torch.stack(
            [
                -torch.stack([out[at - 1, row.ids[at]] for at in row.target]).mean()
                for row in rows
                for out in (logits(row, delta)[0],)
            ]
        ).mean()
        current = logits(essence, delta)[0][essence.subject_last]
        divergence = (current.exp() * (current - initial)).sum()
        size = (delta.square().sum() + 1e-30).sqrt()
        loss = nll + editor.kl_factor * divergence
        loss = loss + editor.weight_decay * size / base.norm() ** 2
        if loss < editor.loss_threshold or step == editor.evaluations:
            break
        (gradient,) = torch.autograd.grad(loss, delta)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        moved = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        with torch.no_grad():
            delta -= editor.learning_rate * moved
            limit = editor.clamp_factor * base.norm()
            delta *= min(1.0, float(limit / delta.norm()))
    return base + delta.detach()


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2", "olmo2", "bloom"])
@pytest.mark.parametrize("request_index", [0, 2])
def test_values_are_those_of_a_literal_optimisation(family, request_index):
    lm = build(family)
    request = REQUESTS[request_index]
    found = compute_targets(
        lm,
        [request],
        PREFIXES[:3],
        EDITOR.optimisation,
        token_budget=LARGE,
        site=Site((LAYER,), in_mlp=True),
    )
    assert relative(found.z[0], _literal_value(lm, request, PREFIXES[:3], EDITOR)) < 1e-4


def test_layer_zero_has_nothing_below_it_to_resume_from(monkeypatch):
    lm = build("gpt2")
    editor, site = replace(EDITOR, layer=0), Site((0,), in_mlp=True)
    found = compute_targets(
        lm, REQUESTS[:1], PREFIXES, editor.optimisation, token_budget=LARGE, site=site
    )
    monkeypatch.setattr("memit.targets.can_resume", lambda lm: False)
    whole = compute_targets(
        lm, REQUESTS[:1], PREFIXES, editor.optimisation, token_budget=LARGE, site=site
    )
    assert relative(found.z, whole.z) < 1e-5
    assert found.delta_ratios[0] > 0.1


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


def test_an_edit_survives_a_file(tmp_path):
    lm = build("gpt2")
    delta = EDITOR.edit(lm, REQUESTS[:1], _resources(lm))
    delta.save(tmp_path / "edit.safetensors")
    again = WeightDelta.load(tmp_path / "edit.safetensors")
    assert again.provenance["method"] == "rome"
    assert again.provenance["count"] == 1
    again.apply(lm)
    assert lm.applied


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


def test_it_is_registered():
    assert known_editors()["rome"] is Rome


def test_an_interrupted_edit_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(rome, "EDITS_BETWEEN_CHECKPOINTS", 1)
    lm = build("gpt2")
    name = lm.weight_name(LAYER)
    whole = EDITOR.edit(lm, REQUESTS, _resources(lm)).changes[name].dense()

    class Killed(Exception):
        pass

    told: list[int] = []

    def count(edits: int) -> None:
        told.append(edits)
        if sum(told) == 2:
            raise Killed

    with pytest.raises(Killed):
        EDITOR.edit(lm, REQUESTS, _resources(lm, checkpoints=tmp_path, progress=count))
    told_again: list[int] = []
    resources = _resources(lm, checkpoints=tmp_path, progress=told_again.append)
    resumed = EDITOR.edit(lm, REQUESTS, resources)
    assert told_again == [2, 1, 1]
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
