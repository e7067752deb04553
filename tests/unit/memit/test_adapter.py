"""LoRA adapters: the edited model's logits on every way in which weights are stored."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from memit.adapter import LARGEST_RANK, make_adapter
from memit.errors import InputError
from memit.language_model import LanguageModel
from memit.weight_delta import Dense, LowRank, WeightDelta
from tests.families import families

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2")
CONFIG = {"r", "lora_alpha", "target_modules", "bias", "peft_type", "task_type", "fan_in_fan_out"}
CONFIG |= {"base_model_name_or_path", "revision", "inference_mode"}


def build(family: str) -> tuple[LanguageModel, WeightDelta]:
    """A model, and changes of two layers: of rank 3 in factors, of rank 2 as a whole matrix."""
    lm = LanguageModel(*families()[family](), name="base")
    generator = torch.Generator().manual_seed(0)
    changes: dict[str, LowRank | Dense] = {}
    for layer, rank in ((1, 3), (2, 2)):
        rows, columns = lm.parameter(lm.weight_name(layer)).shape
        left = torch.randn(rows, rank, generator=generator) * 10
        change = LowRank(left, torch.randn(columns, rank, generator=generator) * 0.01)
        changes[lm.weight_name(layer)] = change if rank == 3 else Dense(change.dense())
    return lm, WeightDelta(changes)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits


def edited_logits(lm: LanguageModel, delta: WeightDelta) -> Tensor:
    """The logits with the delta in the weights, which are restored."""
    kept = {name: lm.parameter(name).clone() for name in delta.changes}
    for name, change in delta.changes.items():
        lm.set_parameter(name, kept[name] + change.dense())
    found = logits(lm.model)
    for name, weight in kept.items():
        lm.set_parameter(name, weight)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_factors_are_the_change(family: str, tmp_path: Path) -> None:
    lm, delta = build(family)
    adapter = make_adapter(lm, delta)
    adapter.save(tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config) == CONFIG
    assert config["r"] == config["lora_alpha"] == adapter.rank == 3 <= LARGEST_RANK
    assert adapter.error < 1e-6
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(config["target_modules"]) == 4
    for module in config["target_modules"]:
        A, B = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        assert A.shape[0] == B.shape[1] == 3
        assert 0.1 < A.norm() / B.norm() < 10
        change = (B @ A).T if config["fan_in_fan_out"] else B @ A
        wanted = delta.changes[f"{module}.weight"].dense()
        assert (change - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_it(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm, delta = build(family)
    make_adapter(lm, delta).save(tmp_path, "base")
    before, wanted = logits(lm.model), edited_logits(lm, delta)
    loaded = peft.PeftModel.from_pretrained(lm.model, tmp_path)
    assert (logits(loaded) - wanted).abs().max() < 1e-4
    assert (wanted - before).abs().max() > 1e-2
    assert torch.equal(logits(loaded.unload()), before)


def test_a_smaller_rank_keeps_the_largest_singular_values() -> None:
    lm, delta = build("llama")
    name = lm.weight_name(1)
    adapter = make_adapter(lm, delta, rank=1)
    module = name.removesuffix(".weight")
    found = adapter.tensors[f"{module}.lora_B"] @ adapter.tensors[f"{module}.lora_A"]
    wanted = delta.changes[name].dense()
    values = torch.linalg.svdvals(wanted.double())
    assert float((found - wanted).norm()) == pytest.approx(float(values[1:].norm()), rel=1e-4)
    assert adapter.error == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-4)


def test_a_change_of_something_else_has_no_adapter() -> None:
    lm, _ = build("llama")
    other = "model.embed_tokens.weight"
    delta = WeightDelta({other: Dense(torch.zeros_like(lm.parameter(other)))})
    with pytest.raises(InputError, match="embed_tokens"):
        make_adapter(lm, delta)
