"""Models with random weights and requests of exact token counts; nothing is downloaded.

Every word is one token, so that a request's rows have the lengths that the benchmark states.
"""

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from memit.requests import EditRequest, Record

SUBJECT_TOKENS, PROMPT_TOKENS, OBJECT_TOKENS = 4, 5, 2
PREFIX_TOKENS, PREFIXES = 10, 5


@dataclass(frozen=True)
class Shape:
    """The kind and the size of a model."""

    name: str
    kind: Literal["gpt2", "gptj", "llama"]
    depth: int
    width: int
    inner: int
    """Inputs of the down-projection, f."""
    heads: int
    shared_heads: int
    """Heads of keys and values."""
    vocabulary: int
    context: int
    layers: tuple[int, ...]
    """Edited layers."""
    covariance_weight: float

    @property
    def key_value_parameters(self) -> int:
        """Of a block's keys and values."""
        return 2 * self.width**2 * self.shared_heads // self.heads

    @property
    def block_parameters(self) -> int:
        """Of a block: queries, keys, values and outputs of attention, and the MLP, gated or not."""
        mlp = (3 if self.kind == "llama" else 2) * self.width * self.inner
        return 2 * self.width**2 + self.key_value_parameters + mlp


SMALL = Shape("small", "gpt2", 6, 128, 512, 4, 4, 1024, 128, (1, 2, 3), 20.0)
"""1.3M parameters."""
_GPTJ_LAYERS = (3, 4, 5, 6, 7, 8)
GPTJ = Shape("gpt-j-6b", "gptj", 28, 4096, 16_384, 16, 16, 50_400, 2048, _GPTJ_LAYERS, 15_000.0)
GPTJ_TINY = Shape("gpt-j-tiny", "gptj", 12, 64, 256, 4, 4, 1024, 256, _GPTJ_LAYERS, 20.0)
"""GPT-J's kind at a size that tries the script on a CPU."""
SMOLLM2 = Shape("smollm2-135m", "llama", 30, 576, 1536, 9, 3, 49_152, 128, (1, 2, 3, 4, 5), 500.0)
LLAMA3 = Shape(
    "llama-3-8b", "llama", 32, 4096, 14_336, 32, 8, 128_256, 2048, (4, 5, 6, 7, 8), 15_000.0
)
LLAMA_TINY = Shape("llama-tiny", "llama", 10, 64, 192, 4, 2, 1024, 256, (4, 5, 6, 7, 8), 20.0)
"""Llama's kind at a size that tries the script on a CPU."""


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token for each of the words w0, w1, …"""
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="w0",
        eos_token="w0",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(shape: Shape, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, made on its device in its dtype, as the library has it."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return _random_model(shape).eval()
    finally:
        torch.set_default_dtype(before)


def _random_model(shape: Shape) -> PreTrainedModel:
    tokens: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if shape.kind == "llama":
        config = LlamaConfig(
            **tokens,
            num_hidden_layers=shape.depth,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.shared_heads,
            max_position_embeddings=shape.context,
            tie_word_embeddings=shape is SMOLLM2,
        )
        return LlamaForCausalLM(config)
    sizes: dict[str, Any] = {
        **tokens,
        "n_layer": shape.depth,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "n_inner": shape.inner,
        "n_positions": shape.context,
    }
    dropout: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    if shape.kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**sizes, **dropout))
    rotary = min(64, shape.width // shape.heads)
    return GPTJForCausalLM(GPTJConfig(**sizes, **dropout, rotary_dim=rotary))


def words(random: Random, count: int, vocabulary: int) -> str:
    """Some random words."""
    return " ".join(f"w{random.randrange(1, vocabulary)}" for _ in range(count))


def make_prefixes(shape: Shape) -> list[str]:
    """The sampled prefixes."""
    random = Random(1)
    return [words(random, PREFIX_TOKENS, shape.vocabulary) + " " for _ in range(PREFIXES)]


def make_requests(shape: Shape, count: int) -> list[EditRequest]:
    """Requests with the subject in front."""
    random = Random(2)
    return [
        EditRequest(
            subject=words(random, SUBJECT_TOKENS, shape.vocabulary),
            prompt="{} " + words(random, PROMPT_TOKENS, shape.vocabulary),
            target_new=words(random, OBJECT_TOKENS, shape.vocabulary),
            target_true=words(random, OBJECT_TOKENS, shape.vocabulary),
        )
        for _ in range(count)
    ]


def make_records(shape: Shape, count: int) -> list[Record]:
    """Records of 13 prompts: the rewrite prompt, two paraphrases, ten neighbours."""
    random = Random(3)

    def prompts(number: int) -> tuple[str, ...]:
        length = SUBJECT_TOKENS + PROMPT_TOKENS
        return tuple(words(random, length, shape.vocabulary) for _ in range(number))

    return [
        Record(case, request, paraphrase_prompts=prompts(2), neighborhood_prompts=prompts(10))
        for case, request in enumerate(make_requests(shape, count))
    ]


def make_documents(shape: Shape, tokens: int) -> list[str]:
    """Documents of 16 tokens up to the model's context, about `tokens` in all."""
    random = Random(4)
    documents: list[str] = []
    while tokens > 0:
        length = random.randint(16, shape.context)
        documents.append(words(random, length, shape.vocabulary))
        tokens -= length
    return documents
