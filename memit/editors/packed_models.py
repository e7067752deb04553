"""Hugging Face models and their tokenizers as tensors and metadata of a safetensors file."""

import base64
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def pack(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights (`name/…`) and metadata (`name`) from which `unpack` makes model and tokenizer."""
    weights = {
        f"{name}/{key}": weight.detach().cpu().contiguous()
        for key, weight in model.named_parameters()
    }
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        files = {
            path.name: base64.b64encode(path.read_bytes()).decode()
            for path in sorted(Path(folder).iterdir())
        }
    return weights, {name: json.dumps(files, sort_keys=True)}


def unpack(
    name: str, model_class: Any, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32) and tokenizer from the output of `pack`; `model_class` as AutoModel.

    Raises:
        KeyError, ValueError: something is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        for file, content in json.loads(metadata[name]).items():
            if Path(file).name != file:
                raise ValueError(f"{file!r} is no file name")
            Path(folder, file).write_bytes(base64.b64decode(content))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = model_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(weights[f"{name}/{key}"])
    return model.eval(), tokenizer
