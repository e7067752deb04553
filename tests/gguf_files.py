"""Small random models in GGUF files, as llama.cpp would write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.families import tokenizers

TOKENIZER: Any = tokenizers()["byte_level"]
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
GATED = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
CONFIGS = {"llama": GATED, "qwen2": GATED | {"tie_word_embeddings": True}, "gpt2": SIZES}


def build(architecture: str) -> PreTrainedModel:
    """A model whose matrices can be quantised in blocks of 32."""
    sizes = {"vocab_size": len(TOKENIZER), "eos_token_id": 0, "bos_token_id": 0}
    config = AutoConfig.for_model(architecture, **sizes, **CONFIGS[architecture])
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def write_gguf(
    model: PreTrainedModel, path: Path, kind: str = "F32", without: str = "", **numbers: int
) -> Path:
    """Write a model; its own matrices become what the quantised ones stand for."""
    config: Any = model.config
    name = config.model_type
    writer = GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if name == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, number in numbers.items():
        writer.add_uint32(key.replace("_", "."), number)
    _add_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config.num_hidden_layers)
    for key, parameter in model.named_parameters():
        stem, _, suffix = key.rpartition(".")
        is_transposed = isinstance(model.get_submodule(stem), Conv1D) and parameter.ndim == 2
        values = parameter.T if is_transposed else parameter.data
        if name == "llama" and stem.endswith(("q_proj", "k_proj")):  # rotated pairs lie together
            pairs = values.unflatten(0, (-1, 2, config.head_dim // 2)).swapaxes(1, 2)
            values = pairs.flatten(0, 2)
        stored = GGMLQuantizationType[kind if parameter.ndim == 2 else "F32"]
        written = gguf.quantize(values.contiguous().numpy(), stored)
        if key != without:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", written, raw_dtype=stored)
        if kind != "F32" and parameter.ndim == 2:
            own = gguf.quantize(parameter.numpy(), stored)  # rows in another order
            parameter.copy_(torch.tensor(gguf.dequantize(own, stored)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter) -> None:
    state = json.loads(TOKENIZER.backend_tokenizer.to_str())
    tokens = TOKENIZER.convert_ids_to_tokens(range(len(TOKENIZER)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in TOKENIZER.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(0)
