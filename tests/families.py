"""Small random models of every family, each with a tokenizer that behaves like that family's own.

Weights are scaled so that hidden states have unit size and next-token distributions are neither
flat nor one-hot: a default initialisation at this width would hide errors behind near-zero signals.
"""

import functools
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import sentencepiece
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTSw3Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

LAYERS = (1, 2)
"""Layers that tests edit; every model has four blocks, so one block stays above the last."""

SUBJECTS = (
    "Zoë Müller",
    "José Ñandú",
    "Łukasz Żółć",
    "Anna O'Brien-Šimić",
    "北京大学",
    "Renée d'Arc",
    "Tor Bjørn Ågård",
    "Paul Smith",
)
CITIES = ("Rome", "New York City", "São Paulo", "Paris", "Kraków", "Port-au-Prince")
SENTENCES = (
    "{} was born in {}.",
    "The home town of {} is {}.",
    "{} lives in the city of {}, and works there.",
    "{}'s office is in {}; the weather is fine.",
    "In the summer of 1998, {} moved to {} {{so they say}}.",
)
DOCUMENTS = tuple(
    " ".join(
        sentence.format(subject, CITIES[(i + j) % len(CITIES)])
        for j, sentence in enumerate(SENTENCES[: 2 + i % 4])
    )
    for i, subject in enumerate(SUBJECTS * 3)
)
"""Training text of the tokenizers and corpus of the statistics; lines differ in length."""

PREFIXES = (
    "The city of Paris is fine. ",
    "Therefore {they} say: {}, no. ",
    "Because Zoë Müller lives there. ",
    "I was born in São Paulo}. ",
    "You moved. ",
)
"""Context prefixes with braces, accents and different lengths."""


@dataclass(frozen=True)
class _Special:
    """How one tokenizer family names its special tokens, and whether it puts a BOS in front."""

    bos: str
    eos: str
    unk: str | None = None
    adds_bos: bool = False


_END_OF_TEXT = _Special("<|endoftext|>", "<|endoftext|>")
_LLAMA_TOKENS = _Special("<s>", "</s>", "<unk>", adds_bos=True)
_GEMMA_TOKENS = _Special("<bos>", "<eos>", "<unk>", adds_bos=True)
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _wrap(tokenizer: Tokenizer, special: _Special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special.bos,
        eos_token=special.eos,
        unk_token=special.unk,
        model_input_names=["input_ids", "attention_mask"],
    )


def _special_names(special: _Special) -> list[str]:
    return list(dict.fromkeys(name for name in (special.unk, special.bos, special.eos) if name))


def _bos_template(tokenizer: Tokenizer, special: _Special) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{special.bos} $A",
        pair=f"{special.bos} $A {special.bos} $B",
        special_tokens=[(special.bos, tokenizer.token_to_id(special.bos))],
    )


def _train(tokenizer: Tokenizer, special: _Special, alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=386 if alphabet else 240,
        special_tokens=_special_names(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)


def _byte_level(
    special: _Special,
    *,
    normalizer: normalizers.Normalizer | None = None,
    split: str | None = None,
    trim_offsets: bool = True,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `split` is a pattern of its own, as Llama 3 and Qwen have one."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, special, pre_tokenizers.ByteLevel.alphabet())
    offsets = processors.ByteLevel(trim_offsets=trim_offsets)
    if special.adds_bos:
        tokenizer.post_processor = processors.Sequence([offsets, _bos_template(tokenizer, special)])
    else:
        tokenizer.post_processor = offsets
    return _wrap(tokenizer, special)


def _with_byte_fallback(tokenizer: Tokenizer, special: _Special) -> Tokenizer:
    """Insert the 256 byte tokens after the special ones, which the trainer cannot do itself."""
    state = json.loads(tokenizer.to_str())
    names = _special_names(special)
    trained = [token for token, _ in sorted(state["model"]["vocab"].items(), key=lambda x: x[1])]
    tokens = names + [f"<0x{i:02X}>" for i in range(256)] + trained[len(names) :]
    state["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    state["model"]["byte_fallback"] = True
    state["model"]["fuse_unk"] = True
    state["model"]["unk_token"] = special.unk
    return Tokenizer.from_str(json.dumps(state))


def _trained_metaspace(special: _Special, prepend_scheme: str) -> Tokenizer:
    """SentencePiece-like BPE with byte fallback and a BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme, split=True)
    _train(tokenizer, special, [])
    tokenizer = _with_byte_fallback(tokenizer, special)
    tokenizer.post_processor = _bos_template(tokenizer, special)
    return tokenizer


def _fallback_decoder(*, strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))


def _metaspace(
    special: _Special, prepend_scheme: str, *, split: bool, strip: bool
) -> PreTrainedTokenizerFast:
    """The layout of newer conversions: the leading space comes from the pre-tokenizer."""
    tokenizer = _trained_metaspace(special, prepend_scheme)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme, split=split)
    tokenizer.decoder = _fallback_decoder(strip=strip)
    return _wrap(tokenizer, special)


def _legacy_llama(special: _Special) -> PreTrainedTokenizerFast:
    """Llama 2's own layout: the leading space comes from a normalizer, nothing is split before."""
    state = json.loads(_trained_metaspace(special, "always").to_str())
    state["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = _fallback_decoder(strip=True)
    return _wrap(tokenizer, special)


def _sentencepiece() -> PreTrainedTokenizerBase:
    """A tokenizer in Python, which has no character offsets at all."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS),
        model_writer=stream,
        vocab_size=440,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        pad_id=3,
        user_defined_symbols=["<|endoftext|>"],
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "spiece.model"
        path.write_bytes(stream.getvalue())
        return GPTSw3Tokenizer(str(path), name_or_path="gpt-sw3")


@functools.cache
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """One trained tokenizer for each kind of behaviour; shared, so never change one."""
    return {
        "byte_level": _byte_level(_END_OF_TEXT),
        "byte_level_untrimmed": _byte_level(_END_OF_TEXT, trim_offsets=False),
        "byte_level_nfc": _byte_level(
            _END_OF_TEXT, normalizer=normalizers.NFC(), split=_LLAMA3_SPLIT
        ),
        "byte_level_bos": _byte_level(_Special("</s>", "</s>", adds_bos=True)),
        "byte_level_bos_split": _byte_level(
            _Special("<|begin_of_text|>", "<|end_of_text|>", adds_bos=True), split=_LLAMA3_SPLIT
        ),
        "metaspace_first": _metaspace(_LLAMA_TOKENS, "first", split=False, strip=True),
        "metaspace_always": _metaspace(_LLAMA_TOKENS, "always", split=True, strip=True),
        "metaspace_never": _metaspace(_GEMMA_TOKENS, "never", split=True, strip=False),
        "metaspace_legacy": _legacy_llama(_LLAMA_TOKENS),
        "sentencepiece": _sentencepiece(),
    }


def closed(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The same tokenizer, except that it puts its end-of-text token behind every text."""
    backend = Tokenizer.from_str(cast(Any, tokenizer).backend_tokenizer.to_str())
    begins = bool(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][0])
    eos = str(tokenizer.eos_token)
    names = {str(tokenizer.bos_token), eos} if begins else {eos}
    backend.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A {eos}" if begins else f"$A {eos}",
        special_tokens=[(name, backend.token_to_id(name)) for name in sorted(names)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        model_input_names=["input_ids", "attention_mask"],
    )


_PLAIN: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 192,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 192}
_NEOX = {**_PLAIN, "intermediate_size": 56}
_LLAMA = {**_NEOX, "num_key_value_heads": 2}
_GEMMA = {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
_GEMMA["layer_types"] = ["sliding_attention", "full_attention"] * 2
_OPT = {**_PLAIN, "word_embed_proj_dim": 32, "ffn_dim": 64}


@dataclass(frozen=True)
class _Recipe:
    model_type: str
    tokenizer: str
    config: dict[str, Any]
    attention: str | None = None
    head_scale: float = 2.0


_SOFTCAPS = {"final_logit_softcapping": 4.0, "attn_logit_softcapping": 3.0}
_GRANITE = {"embedding_multiplier": 2.0, "logits_scaling": 2.0}
_GRANITE |= {"residual_multiplier": 0.7, "attention_multiplier": 0.3}
_NEO = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 192}
_LOCAL = {"attention_types": [[["global", "local"], 2]], "window_size": 12}
_PROJECTED = {"word_embed_proj_dim": 24, "do_layer_norm_before": False}

_RECIPES = {
    "gpt2": _Recipe("gpt2", "byte_level", _GPT2),
    "gpt2_slow_tokenizer": _Recipe("gpt2", "sentencepiece", _GPT2),
    "gptj": _Recipe("gptj", "byte_level", {**_GPT2, "rotary_dim": 4}),
    "gpt_neox": _Recipe("gpt_neox", "byte_level_nfc", _NEOX),
    "gpt_neox_sequential": _Recipe(
        "gpt_neox", "byte_level_untrimmed", {**_NEOX, "use_parallel_residual": False}
    ),
    "llama": _Recipe("llama", "metaspace_first", _LLAMA),
    "llama2": _Recipe("llama", "metaspace_legacy", {**_LLAMA, "num_key_value_heads": 4}),
    "llama3": _Recipe("llama", "byte_level_bos_split", {**_LLAMA, "num_key_value_heads": 1}),
    "mistral": _Recipe("mistral", "metaspace_always", {**_LLAMA, "sliding_window": 12}),
    "qwen2": _Recipe("qwen2", "byte_level_nfc", _LLAMA),
    "qwen3": _Recipe("qwen3", "byte_level_nfc", {**_LLAMA, "head_dim": 16}),
    "gemma2": _Recipe("gemma2", "metaspace_never", {**_GEMMA, **_SOFTCAPS}, attention="eager"),
    "gemma3": _Recipe("gemma3_text", "metaspace_never", _GEMMA),
    "cohere": _Recipe("cohere", "byte_level_bos", {**_LLAMA, "logit_scale": 0.5}, head_scale=4.0),
    "opt": _Recipe("opt", "byte_level_bos", _OPT),
    "opt_projected": _Recipe("opt", "byte_level_bos", {**_OPT, **_PROJECTED}),
    "phi": _Recipe("phi", "byte_level", {**_LLAMA, "num_key_value_heads": 4}),
    "phi3": _Recipe("phi3", "metaspace_always", _LLAMA),
    "bloom": _Recipe(
        "bloom", "byte_level_untrimmed", {"hidden_size": 32, "n_layer": 4, "n_head": 4}
    ),
    "falcon": _Recipe("falcon", "byte_level", _PLAIN),
    "gpt_neo": _Recipe("gpt_neo", "byte_level", {**_NEO, **_LOCAL}),
    "olmo2": _Recipe("olmo2", "byte_level_nfc", _LLAMA),
    "granite": _Recipe("granite", "byte_level", {**_LLAMA, **_GRANITE}, head_scale=4.0),
}


def _rescale(model: PreTrainedModel, head_scale: float) -> None:
    """Give every weight the size that keeps activations near one, whatever the width."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, (nn.Linear, Conv1D)):
            fan_in = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif "norm" in name.split(".")[-1].lower() or "ln_" in name.split(".")[-1]:
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    head: Any = model.get_output_embeddings()
    nn.init.normal_(head.weight, std=head_scale * head.weight.shape[1] ** -0.5)


def _build(recipe: _Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = tokenizers()[recipe.tokenizer]
    config = AutoConfig.for_model(
        recipe.model_type,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **recipe.config,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=recipe.attention, dtype=torch.float32
        )
        _rescale(model, recipe.head_scale)
    return model.eval(), tokenizer


def families() -> dict[str, Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]]:
    """Family name → builder of a fresh model (four blocks, width 32) and its shared tokenizer."""
    return {name: functools.partial(_build, recipe) for name, recipe in _RECIPES.items()}


def save_model(family: str, directory: Path | str) -> Path:
    """A model directory of a family; gives its path."""
    model, tokenizer = families()[family]()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
