"""The reference from end to end; its parts are what the tests of the fast code compare with."""

import torch

from memit import reference
from memit.prefixes import WORDS
from tests.families import DOCUMENTS, families
from tests.reference import HYPERPARAMETERS, REQUESTS


def test_an_edit_from_end_to_end() -> None:
    model, tokenizer = families()["gpt2"]()
    own = [value.clone() for value in model.state_dict().values()]
    updates = reference.edit(model, tokenizer, REQUESTS, DOCUMENTS, HYPERPARAMETERS)
    assert tuple(updates) == HYPERPARAMETERS.layers
    pairs = [(request.text, request.target_new) for request in REQUESTS]
    before = reference.scores(model, tokenizer, pairs)
    with reference.edited(model, updates):
        after = reference.scores(model, tokenizer, pairs)
    assert sum(score.nll for score in after) < sum(score.nll for score in before)
    assert all(map(torch.equal, own, model.state_dict().values()))


def test_prefixes_are_seeded() -> None:
    model, tokenizer = families()["gpt2"]()
    first, again = (reference.sample_prefixes(model, tokenizer, seed=1) for _ in range(2))
    assert first == again != reference.sample_prefixes(model, tokenizer, seed=2)
    for prefix, word in zip(first, WORDS, strict=True):
        assert prefix.startswith(word)
        assert prefix.endswith(". ")
