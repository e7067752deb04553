"""Prefixes: how they begin and end, and that braces and other models' settings do no harm."""

import pytest

from memit.prefixes import TOKENS, WORDS, sample_prefixes
from tests.reference import build


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt2_slow_tokenizer"])
def test_five_seeded_beginnings_that_end_a_sentence(family: str):
    lm = build(family)
    prefixes = sample_prefixes(lm, seed=1)
    assert len(set(prefixes)) == 5
    for word, prefix in zip(WORDS, prefixes, strict=True):
        assert prefix.lstrip().startswith(word)
        assert prefix.endswith(". ")
        assert "\ufffd. " not in prefix
        assert len(prefix) > len(word) + 2
        ids = lm.tokenizer(prefix[:-2])["input_ids"]
        assert len(ids) <= 4 * TOKENS
    assert prefixes == sample_prefixes(lm, seed=1)
    assert prefixes != sample_prefixes(lm, seed=2)
