"""The reference implementation against what an independent run of the published method recorded."""

from statistics import fmean

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from memit import reference as oracle
from tests import GOLDEN
from tests.acceptance.golden import (
    NLL_TOLERANCE,
    SUMMARY,
    TENSOR_TOLERANCE,
    Golden,
    read_golden,
)
from tests.reference import relative

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden(GOLDEN)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(GOLDEN / "model")


@pytest.fixture(scope="module")
def updates(golden, model, tokenizer) -> dict[int, oracle.LayerUpdate]:
    """Made of the recorded targets, so that it takes seconds."""
    requests = [record.request for record in golden.records]
    targets, settings = golden.tensors["targets"], golden.hyperparameters
    return oracle.spread(
        model, tokenizer, requests, golden.prefixes, targets, golden.covariance, settings
    )


def test_covariance(golden, model, tokenizer):
    documents = (GOLDEN / "corpus.txt").read_text().splitlines()
    for layer, expected in golden.covariance.items():
        measured = oracle.covariance(model, tokenizer, documents, layer, batch=32)
        assert relative(measured, expected) < TENSOR_TOLERANCE


@pytest.mark.parametrize("number", [0, 7, 15, 23])
def test_targets(golden, model, tokenizer, number):
    request, settings = golden.records[number].request, golden.hyperparameters
    z = oracle.target(model, tokenizer, request, golden.prefixes, settings).z
    assert relative(z, golden.tensors["targets"][number]) < TENSOR_TOLERANCE


def test_keys_and_deltas(golden, model, updates):
    for layer in golden.hyperparameters.layers:
        keys, stored = golden.tensors[f"keys.{layer}"], golden.tensors[f"delta.{layer}"]
        stored = stored if len(stored) == model.config.hidden_size else stored.T
        assert relative(updates[layer].K.T, keys) < TENSOR_TOLERANCE
        assert relative(updates[layer].delta, stored) < TENSOR_TOLERANCE


@pytest.mark.parametrize("when", ["pre", "post"])
def test_evaluation(golden, model, tokenizer, updates, when):
    with oracle.edited(model, updates if when == "post" else {}):
        measured = [oracle.evaluate(model, tokenizer, record) for record in golden.records]
    summary = golden.expected["summary"][when]
    for name, kind in zip(SUMMARY, ("rewrite", "paraphrase", "neighborhood"), strict=True):
        means = []
        for scores, expected in zip(measured, golden.expected[when], strict=True):
            mine = [(new, true) for scored, new, true in scores if scored == kind]
            for (new, true), nll in zip(mine, expected[f"{kind}_prompts_probs"], strict=True):
                assert new.nll == pytest.approx(nll["target_new"], abs=NLL_TOLERANCE)
                assert true.nll == pytest.approx(nll["target_true"], abs=NLL_TOLERANCE)
            wanted = [(true, new) if kind == "neighborhood" else (new, true) for new, true in mine]
            assert [one.hit for one, _ in wanted] == expected[f"{kind}_prompts_correct"]
            means.append(fmean(one.nll < other.nll for one, other in wanted))
        assert 100 * fmean(means) == pytest.approx(summary[name])
