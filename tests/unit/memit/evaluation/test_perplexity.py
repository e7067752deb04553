"""Perplexity against one forward a document."""

from math import exp

import pytest
import torch

from memit.errors import InputError
from memit.evaluation import continuations, drift
from memit.evaluation.drift import read_text
from memit.language_model import LanguageModel
from tests.families import DOCUMENTS
from tests.reference import shared


@torch.no_grad()
def literal(lm: LanguageModel, document: str) -> tuple[float, int]:
    """Sum of −log p and number of predicted tokens of one document, truncated to the context."""
    ids = torch.tensor([lm.tokenizer(document)["input_ids"][: lm.context_length]])
    log_p = lm.model(ids).logits[0, :-1].log_softmax(-1)
    picked = log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    return -float(picked.sum()), ids.shape[1] - 1


DOCS = [*DOCUMENTS[:6], "Paul " * 300, "a", "P"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("token_budget", [1, 200, 4096])
def test_agrees_with_one_forward_a_document(family: str, token_budget: int):
    lm = shared(family)
    finished: list[int] = []
    found = read_text(lm, DOCS, token_budget=token_budget, progress=finished.append)
    expected = [literal(lm, document) for document in DOCS]
    assert found.nll.tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert found.tokens.tolist() == [count for _, count in expected]
    assert sum(finished) == found.tokens.sum()
    assert found.perplexity == pytest.approx(
        exp(sum(loss for loss, _ in expected) / sum(count for _, count in expected)), rel=1e-5
    )


def test_a_large_vocabulary_makes_small_batches(monkeypatch: pytest.MonkeyPatch):
    lm = shared("gpt2")
    expected = read_text(lm, DOCS, token_budget=4096).perplexity
    most = 200 * lm.model.config.vocab_size
    monkeypatch.setattr(continuations, "LOGITS_AT_ONCE", most)
    seen: list[int] = []
    plain = drift.logits_of

    def watch(*args, **kwargs):
        logits = plain(*args, **kwargs)
        seen.append(logits.numel())
        return logits

    monkeypatch.setattr(drift, "logits_of", watch)
    found = read_text(lm, DOCS, token_budget=4096).perplexity
    assert found == pytest.approx(expected, rel=1e-6)
    assert max(seen) <= most
    assert len(seen) > 2


def test_text_without_two_tokens_has_none():
    with pytest.raises(InputError, match="held-out text"):
        read_text(shared("gpt2"), ["", "a"], token_budget=100)
