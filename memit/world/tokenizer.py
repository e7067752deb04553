"""The byte-level BPE tokenizer of a synthetic world."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memit.errors import InputError

END_OF_TEXT = "<|endoftext|>"
"""Stands between documents; its id is 0."""
SMALLEST_VOCABULARY = 257
"""Every byte and the end of text."""


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer that splits like GPT-2's: any text, no added tokens, true offsets.

    It gives a model `input_ids` and `attention_mask` only, since a GPT-2 that is also given
    `token_type_ids` silently adds them to its embeddings.

    Args:
        documents: training text.
        vocabulary: number of tokens at most; fewer where the text has no more pairs to merge.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise InputError(
            f"A byte-level vocabulary of {vocabulary} is too small: "
            f"take at least {SMALLEST_VOCABULARY}, one for each byte and the end of text."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
