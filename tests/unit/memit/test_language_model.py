"""Blocks and down-projections are found by structure; a model that does not fit says why."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2Model,
)

from memit import reference as oracle
from memit.errors import InputError, IntegrityError, ModelStructureError, NumericsError
from memit.files.tensors import tensor_digest
from memit.forward.probes import output_factor
from memit.language_model import LanguageModel, load_model
from tests.families import DOCUMENTS, families, save_model, tokenizers
from tests.reference import FAMILIES, build

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}


def _logits(model, text_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([text_ids])).logits


def _from_config(model_type: str, **config) -> LanguageModel:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL | config))
    return LanguageModel(model, tokenizers()["byte_level"], name=model_type)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found(family):
    lm = build(family)
    assert lm.depth == 4
    for layer in range(lm.depth):
        assert lm.blocks[layer] is oracle.block(lm.model, layer)
        assert lm.down_projection(layer) is oracle.down_projection(lm.model, layer)
        assert lm.weight(layer).data_ptr() == oracle.weight(lm.model, layer).data_ptr()
        assert lm.weight(layer).shape == (lm.width, lm.inner_width)
        assert lm.is_transposed(layer) == family.startswith("gpt2")
        stored = lm.parameter(lm.weight_name(layer))
        assert stored is lm.down_projection(layer).weight
        assert stored.shape == lm.weight(layer).shape[:: -1 if lm.is_transposed(layer) else 1]
    with pytest.raises(InputError, match="nowhere"):
        lm.parameter("nowhere.weight")
    assert lm.width == 32
    assert lm.inner_width in (56, 64, 128)
    assert lm.head is lm.model.get_output_embeddings()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_behind_the_down_projection_is_found_with_and_without_weights(family):
    lm = build(family)
    with torch.device("meta"):
        empty = LanguageModel(type(lm.model)(lm.model.config), lm.tokenizer, name=family)
    normed = family in {"gemma2", "gemma3", "olmo2", "opt_projected"}
    assert lm.has_output_norm == empty.has_output_norm == normed
    factor = None if normed else {"granite": 0.7}.get(family, 1.0)
    assert {output_factor(lm, layer) for layer in range(lm.depth)} == {factor}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_times_weight_are_what_the_projection_gives(family):
    lm = build(family)
    seen = {}

    def keep(module, args, output):
        seen["in"], seen["out"] = args[0].clone(), output.clone()

    with lm.down_projection(1).register_forward_hook(keep):
        _logits(lm.model, [5, 6, 7])
    bias = lm.down_projection(1).bias
    expected = seen["in"] @ lm.weight(1).T + (0 if bias is None else bias)
    torch.testing.assert_close(seen["out"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_set_weight_changes_what_the_model_says(family):
    lm = build(family)
    ids = [5, 6, 7, 8]
    before, original = _logits(lm.model, ids), lm.weight(1).clone()
    lm.set_weight(1, original + 0.1 * torch.randn_like(original))
    assert not torch.allclose(_logits(lm.model, ids), before, atol=1e-3)
    lm.set_weight(1, original)
    assert torch.equal(_logits(lm.model, ids), before)


def test_set_weight_rounds_to_the_dtype_of_the_model():
    lm = build("llama")
    lm.model.bfloat16()
    value = torch.randn(lm.width, lm.inner_width)
    lm.set_weight(0, value)
    assert lm.weight(0).dtype == torch.bfloat16
    assert torch.equal(lm.weight(0), value.to(torch.bfloat16))


def test_digest_depends_on_dtype_shape_and_bytes():
    tensor = torch.arange(6, dtype=torch.float32)
    digests = {
        tensor_digest(t)
        for t in (
            tensor,
            tensor.reshape(2, 3),
            tensor.reshape(3, 2),
            tensor.to(torch.bfloat16),
            tensor.view(torch.int32),
            tensor.flip(0),
        )
    }
    assert len(digests) == 6
    assert tensor_digest(tensor.reshape(3, 2).T) == tensor_digest(
        tensor.reshape(3, 2).T.contiguous()
    )


def test_dropout_is_switched_off_and_no_parameter_wants_a_gradient():
    model, tokenizer = families()["opt"]()
    model.train()
    lm = LanguageModel(model, tokenizer, name="opt")
    assert torch.equal(_logits(lm.model, [5, 6, 7]), _logits(lm.model, [5, 6, 7]))
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_layer_that_does_not_exist():
    lm = build("gpt2")
    for layer in (4, -1):
        with pytest.raises(InputError, match="0 to 3"):
            lm.down_projection(layer)
    with pytest.raises(InputError, match="layer 7"):
        lm.check_layers((1, 7))


def test_dense_layer_beside_mixtures_of_experts_is_found():
    lm = _from_config(
        "qwen3_moe", intermediate_size=48, moe_intermediate_size=24, mlp_only_layers=[0]
    )
    assert lm.weight(0).shape == (32, 48)
    with pytest.raises(ModelStructureError, match="layer 1"):
        lm.down_projection(1)


@pytest.mark.parametrize(
    ("model_type", "config", "dense"),
    [
        ("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 40}, ()),
        ("granitemoeshared", {"num_local_experts": 4, "shared_intermediate_size": 40}, ()),
        ("ernie4_5_moe", {"moe_num_experts": 4, "moe_layer_start_index": 1}, (0,)),
        ("llama4_text", {"num_local_experts": 4, "interleave_moe_layer_step": 2}, (0, 2)),
        ("olmoe", {"num_experts": 4}, ()),
        ("mixtral", {"num_local_experts": 3}, ()),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 8}, ()),
    ],
)
def test_a_shared_expert_is_no_down_projection(model_type, config, dense):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    with torch.device("meta"):
        lm = _from_config(model_type, **heads, **config, num_hidden_layers=4)
    assert lm.editable_layers == dense
    advice = f"layers {', '.join(map(str, dense))}" if dense else "another model"
    with pytest.raises(ModelStructureError, match=f"choose (among the )?{advice}"):
        lm.check_layers((1,))


def test_the_blocks_are_those_of_the_text_where_a_vision_tower_is_as_deep():
    text = SMALL | {"num_attention_heads": 4, "intermediate_size": 48, "head_dim": 8}
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    lm = _from_config("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    assert lm.weight(1).shape == (32, 48)


def test_block_without_mlp_is_refused():
    lm = _from_config("mamba", state_size=4)
    with pytest.raises(ModelStructureError, match="MLP"):
        lm.down_projection(0)


def test_encoder_decoder_is_refused():
    config = AutoConfig.for_model("t5", d_model=32, num_layers=2, vocab_size=64, d_ff=48, d_kv=8)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ModelStructureError, match="encoder-decoder"):
        LanguageModel(model, tokenizers()["byte_level"], name="t5")


def test_model_without_head_is_refused():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    with pytest.raises(ModelStructureError, match="head"):
        LanguageModel(GPT2Model(config), tokenizers()["byte_level"], name="headless")


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_is_loaded_again(family, tmp_path):
    lm = build(family)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert loaded.name == str(tmp_path)
    assert loaded.revision is None
    assert torch.equal(loaded.weight(2), lm.weight(2))
    ids = lm.tokenizer(DOCUMENTS[0])["input_ids"]
    assert loaded.tokenizer(DOCUMENTS[0])["input_ids"] == ids


def test_dtype_is_the_asked_for_one_and_not_the_checkpoints(tmp_path):
    model, tokenizer = families()["llama"]()
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").dtype == torch.float32
    assert load_model(tmp_path, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(InputError, match="float8"):
        load_model(tmp_path, dtype="float8")


def test_what_cannot_be_loaded_says_so(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(tmp_path)
    lm = build("gpt2")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(IntegrityError, match=tmp_path.name):
        load_model(tmp_path, device="cpu")
    weights.unlink()
    with pytest.raises(InputError, match=r"weights .*model\.safetensors"):
        load_model(tmp_path, device="cpu")
    lm.model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        load_model(tmp_path, device="cpu")
    lm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="abacus"):
        load_model(tmp_path, device="abacus")


def _saved(place, family="gpt2", **configuration):
    """A model directory, with other values in its configuration."""
    save_model(family, place)
    path = place / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **configuration}))
    return place


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_another_attention_takes_the_place_of_one_that_is_not_here(tmp_path, family, key):
    lm = load_model(_saved(tmp_path, family, **{key: "flash_attention_2"}), device="cpu")
    torch.testing.assert_close(_logits(lm.model, [5, 6]), _logits(build(family).model, [5, 6]))


def test_an_attention_that_is_here_is_the_configurations(tmp_path):
    lm = load_model(_saved(tmp_path, attn_implementation="eager"), device="cpu")
    assert lm.model.config._attn_implementation == "eager"


def test_what_stands_in_place_of_a_model_is_named(tmp_path, monkeypatch):
    _saved(tmp_path / "hub" / "snapshots" / "abc")
    with pytest.raises(InputError, match="hub/snapshots/abc has one"):
        load_model(tmp_path / "hub")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_model("~/hub/snapshots/abc", device="cpu").depth == 4
    with pytest.raises(InputError, match=f"{tmp_path}/gone is not a directory"):
        load_model("~/gone")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter"):
        load_model(tmp_path)
    quantised = _saved(tmp_path / "q", quantization_config={"load_in_8bit": True})
    with pytest.raises(InputError, match="quantised"):
        load_model(quantised)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    ["transformer.wte.weight", "transformer.h.3.ln_1.weight", "transformer.h.0.mlp.c_proj.bias"],
)
def test_a_weight_that_is_not_finite_is_named(tmp_path, name, value):
    path = _saved(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NumericsError, match=name):
        load_model(tmp_path, device="cpu")


def test_a_model_that_needs_larger_numbers_than_float16_has_is_refused_in_it(tmp_path):
    path = _saved(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.3.mlp.c_proj.weight"] *= 60_000  # each fits, their sums do not
    tensors["transformer.h.3.mlp.c_proj.weight"].clamp_(-60_000, 60_000)
    save_file(tensors, path, {"format": "pt"})
    load_model(tmp_path, device="cpu")
    with pytest.raises(NumericsError, match="bfloat16"):
        load_model(tmp_path, device="cpu", dtype="float16")
