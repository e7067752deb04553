"""Models with random weights and requests of exact token counts; nothing is downloaded.

Every word is one token, so that a request's rows have the lengths that the benchmark states.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from memit.requests import EditRequest, Record

SUBJECT_TOKENS, PROMPT_TOKENS, OBJECT_TOKENS = 4, 5, 2
PREFIX_TOKENS, PREFIXES = 10, 5


@dataclass(frozen=True)
class Shape:
    """The size of a model."""

    name: str
    depth: int
    width: int
    heads: int
    vocabulary: int
    context: int
    layers: tuple[int, ...]
    """Edited layers."""
    covariance_weight: float


SMALL = Shape("small", 6, 128, 4, 1024, 128, (1, 2, 3), 20.0)
"""GPT-2-shaped, 1.3M parameters."""
GPTJ = Shape("gpt-j-6b", 28, 4096, 16, 50400, 2048, (3, 4, 5, 6, 7, 8), 15000.0)
"""GPT-J's shape."""
GPTJ_TINY = Shape("gpt-j-tiny", 12, 64, 4, 1024, 256, (3, 4, 5, 6, 7, 8), 20.0)
"""GPT-J's kind at a size that tries the script on a CPU."""


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token for each of the words w0, w1, …"""
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="w0",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(shape: Shape, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, made on its device in its dtype, as the library has it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "n_layer": shape.depth,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "n_positions": shape.context,
        "vocab_size": shape.vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    dropout: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if shape is SMALL:
                return GPT2LMHeadModel(GPT2Config(**sizes, **dropout)).eval()
            rotary = min(64, shape.width // shape.heads)
            return GPTJForCausalLM(GPTJConfig(**sizes, **dropout, rotary_dim=rotary)).eval()
    finally:
        torch.set_default_dtype(before)


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
