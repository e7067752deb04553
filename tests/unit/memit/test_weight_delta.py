"""Deltas are applied once, taken back to the bit, kept in files, and refused by other models."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from memit.errors import InputError, IntegrityError, NumericsError
from memit.files.tensors import save_tensors
from memit.language_model import LanguageModel
from memit.weight_delta import Dense, LowRank, WeightDelta, base_digests
from tests.reference import build

LAYERS = (1, 2)


def _delta(lm: LanguageModel, seed: int = 0, layers: tuple[int, ...] = LAYERS) -> WeightDelta:
    """A low-rank change of all but the last layer, and a dense one of that."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, LowRank | Dense] = {}
    for layer in layers:
        name = lm.weight_name(layer)
        rows, columns = lm.parameter(name).shape
        left = torch.randn(rows, 3, generator=generator) / 10
        right = torch.randn(columns, 3, generator=generator) / 10
        low = LowRank(left, right)
        changes[name] = Dense(low.dense()) if layer == layers[-1] else low
    base = base_digests(lm, list(changes))
    return WeightDelta(changes, {"base": base, "model": lm.name, "note": "Zoë"})


def _state(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lm.model.state_dict().items()}


def _same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    as_bits = {4: torch.int32, 2: torch.int16}
    return all(
        torch.equal(a[n].view(as_bits[a[n].itemsize]), b[n].view(as_bits[b[n].itemsize]))
        for n in a
        if a[n].is_floating_point()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_apply_adds_and_revert_gives_the_bits_back(family, dtype):
    lm = build(family)
    lm.model.to(dtype)
    before = _state(lm)
    delta = _delta(lm)
    delta.apply(lm)
    for name, change in delta.changes.items():
        expected = (before[name].float() + change.dense()).to(dtype)
        assert torch.equal(lm.parameter(name), expected)
    untouched = before.keys() - delta.changes.keys()
    after = _state(lm)
    assert all(torch.equal(after[name], before[name]) for name in untouched)
    assert len(lm.applied) == 1
    delta.revert(lm)
    assert _same_bits(_state(lm), before)
    assert lm.applied == []


def test_revert_does_not_subtract():
    """A weight that the delta swamps could not be had back by arithmetic."""
    lm = build("llama")
    name = lm.weight_name(1)
    weight = lm.parameter(name)
    with torch.no_grad():
        weight[0, 0], weight[0, 1] = 1e-12, -0.0
    before = _state(lm)
    delta = WeightDelta(
        {name: Dense(torch.full_like(weight, 1e6))}, {"base": base_digests(lm, [name])}
    )
    delta.apply(lm)
    delta.revert(lm)
    assert _same_bits(_state(lm), before)


def test_edits_come_off_last_in_first_out():
    lm = build("qwen2")
    states, deltas = [_state(lm)], []
    for seed in range(3):
        deltas.append(_delta(lm, seed, layers=(seed, 3)))
        deltas[-1].apply(lm)
        states.append(_state(lm))
    with pytest.raises(InputError, match="later"):
        deltas[0].revert(lm)
    assert _same_bits(_state(lm), states[3])
    for seed in (2, 1, 0):
        deltas[seed].revert(lm)
        assert _same_bits(_state(lm), states[seed])
    with pytest.raises(InputError, match="nothing to revert"):
        deltas[0].revert(lm)


def test_same_edit_twice_is_refused():
    """The second time the weights are no longer those that it was made for."""
    lm = build("llama")
    delta = _delta(lm)
    delta.apply(lm)
    after = _state(lm)
    with pytest.raises(IntegrityError, match="other weights"):
        delta.apply(lm)
    assert _same_bits(_state(lm), after)
    assert len(lm.applied) == 1


def test_model_behaves_as_edited_and_as_before():
    lm = build("gptj")
    delta = _delta(lm)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = lm.model(input_ids=ids).logits
        delta.apply(lm)
        during = lm.model(input_ids=ids).logits
        delta.revert(lm)
        after = lm.model(input_ids=ids).logits
    assert not torch.allclose(before, during, atol=1e-2)
    assert torch.equal(before, after)


def test_delta_of_another_model_is_refused():
    lm, delta = build("llama"), _delta(build("qwen2"))
    before = _state(lm)
    with pytest.raises(IntegrityError, match="qwen2"):
        delta.apply(lm)
    assert _same_bits(_state(lm), before)
    gpt2 = build("gpt2")
    with pytest.raises(IntegrityError, match="does not have"):
        delta.apply(gpt2)
    assert lm.applied == gpt2.applied == []


def test_one_changed_bit_of_the_model_is_noticed():
    lm = build("llama")
    delta = _delta(lm)
    with torch.no_grad():
        lm.weight(2)[3, 3] += 1e-6
    before = _state(lm)
    with pytest.raises(IntegrityError, match=r"layers\.2"):
        delta.apply(lm)
    assert _same_bits(_state(lm), before)


def test_delta_made_in_bfloat16_fits_the_same_model_in_float32():
    lm = build("llama")
    half = build("llama")
    half.model.bfloat16()
    delta = _delta(half)
    before = _state(lm)
    delta.apply(lm)
    name = lm.weight_name(1)
    assert torch.equal(lm.parameter(name), before[name] + delta.changes[name].dense())
    delta.revert(lm)
    assert _same_bits(_state(lm), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_delta_made_in_float32_fits_the_rounded_weights_of_the_same_model(dtype):
    delta = _delta(build("llama"))
    rounded = build("llama")
    rounded.model.to(dtype)
    before = _state(rounded)
    delta.apply(rounded)
    for name, change in delta.changes.items():
        expected = (before[name].float() + change.dense()).to(dtype)
        assert torch.equal(rounded.parameter(name), expected)
    delta.revert(rounded)
    rounded.parameter(next(iter(delta.changes))).data[0, 0] += 1
    with pytest.raises(IntegrityError, match="other weights"):
        delta.apply(rounded)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_delta_that_is_not_finite_changes_nothing(value):
    lm = build("llama")
    delta = _delta(lm)
    dense = delta.changes[lm.weight_name(2)].dense().clone()
    dense[0, 0] = value
    spoilt = replace(delta, changes={**delta.changes, lm.weight_name(2): Dense(dense)})
    before = _state(lm)
    with pytest.raises(NumericsError, match="finite"):
        spoilt.apply(lm)
    assert _same_bits(_state(lm), before)
    assert lm.applied == []


def test_delta_of_another_shape_changes_nothing():
    lm = build("llama")
    delta = _delta(lm)
    name = lm.weight_name(2)
    turned = replace(delta, changes={**delta.changes, name: delta.changes[name].transposed()})
    before = _state(lm)
    with pytest.raises(IntegrityError, match="shape"):
        turned.apply(lm)
    assert _same_bits(_state(lm), before)


def test_delta_that_names_no_base_is_refused():
    lm = build("llama")
    with pytest.raises(IntegrityError, match="made for"):
        replace(_delta(lm), provenance={}).apply(lm)


# --- files -------------------------------------------------------------------------------------


def test_a_file_without_a_delta_is_refused_by_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_tensors({"a": torch.zeros(2)}, path, {"provenance": "{}"})
    with pytest.raises(IntegrityError, match=r"weights\.safetensors does not hold"):
        WeightDelta.load(path)


def test_file_gives_the_delta_back(tmp_path):
    lm = build("gpt2")
    delta = _delta(lm)
    delta.save(tmp_path / "a.safetensors")
    delta.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = WeightDelta.load(tmp_path / "a.safetensors")
    assert found.provenance == delta.provenance
    assert found.changes.keys() == delta.changes.keys()
    for name, change in delta.changes.items():
        assert type(found.changes[name]) is type(change)
        assert torch.equal(found.changes[name].dense(), change.dense())
    before = _state(lm)
    found.apply(lm)
    assert not _same_bits(_state(lm), before)
    found.revert(lm)
    assert _same_bits(_state(lm), before)


def test_file_holds_factors_and_provenance_only(tmp_path):
    lm = build("llama")
    path = tmp_path / "delta.safetensors"
    _delta(lm).save(path)
    shapes = sorted(tuple(tensor.shape) for tensor in load_file(path).values())
    assert shapes == sorted([(32, 3), (56, 3), (32, 56)])
    assert WeightDelta.load(path).provenance["note"] == "Zoë"
