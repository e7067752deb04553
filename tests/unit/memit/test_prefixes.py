"""Prefixes: how they begin and end, and that braces and other models' settings do no harm."""

import pytest

from memit.language_model import LanguageModel
from memit.prefixes import TOKENS, WORDS, sample_prefixes
from tests.families import families
from tests.reference import prompt_row


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt2_slow_tokenizer"])
def test_five_seeded_beginnings_that_end_a_sentence(family: str):
    network, tokenizer = families()[family]()
    lm = LanguageModel(network, tokenizer, name=family)
    prefixes = sample_prefixes(lm, seed=1)
    assert len(set(prefixes)) == 5
    for word, prefix in zip(WORDS, prefixes, strict=True):
        assert prefix.lstrip().startswith(word)
        assert prefix.endswith(". ")
        assert "\ufffd. " not in prefix
        assert len(prefix) > len(word) + 2
        ids = tokenizer(prefix[:-2])["input_ids"]
        assert len(ids) <= 4 * TOKENS
    assert prefixes == sample_prefixes(lm, seed=1)
    assert prefixes != sample_prefixes(lm, seed=2)


def test_rows_can_stand_behind_them():
    network, tokenizer = families()["gpt2"]()
    lm = LanguageModel(network, tokenizer, name="gpt2")
    for prefix in sample_prefixes(lm, seed=0):
        row = prompt_row(tokenizer, "{} lives in", "Paul Smith", prefix=prefix, target="Rome")
        said = str(tokenizer.decode([row.ids[place] for place in row.target]))
        assert said.strip() == "Rome"
