"""Drift against one whole forward pass a document on either model."""

from pathlib import Path

import pytest
import torch

from memit.errors import InputError
from memit.evaluation.drift import Reading, drift, read_text
from memit.language_model import LanguageModel
from memit.weight_delta import Dense, WeightDelta, base_digests
from tests.families import DOCUMENTS
from tests.reference import build


@torch.no_grad()
def literal(lm: LanguageModel, edited: LanguageModel) -> float:
    found = []
    for document in DOCUMENTS[:6]:
        ids = torch.tensor([lm.tokenizer(document)["input_ids"]])
        log_p, log_q = (each.model(ids).logits[0, :-1].log_softmax(-1) for each in (lm, edited))
        found += [torch.sum(p.exp() * (p - q)) for p, q in zip(log_p, log_q, strict=True)]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("token_budget", [100, 2048])
def test_agrees_with_two_models(token_budget: int, tmp_path: Path):
    lm, edited = build("llama"), build("llama")
    name = lm.weight_name(1)
    change = torch.randn(lm.parameter(name).shape, generator=torch.Generator().manual_seed(0)) / 20
    delta = WeightDelta({name: Dense(change)}, {"base": base_digests(lm, [name])})
    delta.apply(edited)
    before = lm.parameter(name).clone()
    reading = read_text(lm, DOCUMENTS[:6], token_budget=token_budget)
    reading.save(tmp_path / "reading")
    reading = Reading.load(tmp_path / "reading")
    ppl, found = drift(lm, delta, DOCUMENTS[:6], reading, token_budget=token_budget)
    expected = read_text(edited, DOCUMENTS[:6], token_budget=64).perplexity
    assert ppl == pytest.approx(expected, rel=1e-6)
    assert torch.equal(lm.parameter(name), before)
    assert found == pytest.approx(literal(lm, edited), rel=1e-4)
    assert found > 0.01
    with pytest.raises(InputError, match="held-out text"):
        drift(lm, delta, [""], reading, token_budget=token_budget)
