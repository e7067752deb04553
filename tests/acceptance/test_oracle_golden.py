"""The reference implementation against what an independent run of the published method recorded."""

from __future__ import annotations

import json
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memit import reference as oracle
from tests import GOLDEN

TENSOR_TOLERANCE = 1e-4
NLL_TOLERANCE = 1e-3

pytestmark = pytest.mark.slow


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖ of the whole tensors."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def _record(entry: dict) -> SimpleNamespace:
    rewrite = entry["requested_rewrite"]
    return SimpleNamespace(
        request=SimpleNamespace(
            subject=rewrite["subject"],
            prompt=rewrite["prompt"],
            target_new=rewrite["target_new"]["str"],
            target_true=rewrite["target_true"]["str"],
        ),
        paraphrase_prompts=entry["paraphrase_prompts"],
        neighborhood_prompts=entry["neighborhood_prompts"],
    )


@pytest.fixture(scope="module")
def golden() -> SimpleNamespace:
    expected = json.loads((GOLDEN / "expected.json").read_text())
    hparams = expected["hparams"]
    _, (*templates,) = json.loads((GOLDEN / "contexts.json").read_text())
    return SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(GOLDEN / "model"),
        records=[_record(entry) for entry in json.loads((GOLDEN / "requests.json").read_text())],
        prefixes=[template.removesuffix("{}") for template in templates],
        documents=(GOLDEN / "corpus.txt").read_text().splitlines(),
        covariance={
            int(layer): value
            for layer, value in load_file(GOLDEN / "covariance.safetensors").items()
        },
        expected=expected,
        tensors=load_file(GOLDEN / "expected.safetensors"),
        hp=SimpleNamespace(
            layers=hparams["layers"],
            covariance_weight=hparams["covariance_weight"],
            evaluations=hparams["steps"],
            learning_rate=hparams["learning_rate"],
            rate_unit="absolute",
            clamp_factor=hparams["clamp_factor"],
            weight_decay=hparams["weight_decay"],
            kl_factor=hparams["kl_factor"],
            loss_threshold=0.05,
            key_average="nested",
        ),
    )


@pytest.fixture(scope="module")
def updates(golden) -> dict[int, oracle.LayerUpdate]:
    """Made of the recorded targets, so that it takes seconds."""
    return oracle.spread(
        golden.model,
        golden.tokenizer,
        [record.request for record in golden.records],
        golden.prefixes,
        golden.tensors["targets"],
        golden.covariance,
        golden.hp,
    )


def test_covariance(golden):
    for layer, expected in golden.covariance.items():
        measured = oracle.covariance(
            golden.model, golden.tokenizer, golden.documents, layer, batch=32
        )
        error = relative(measured, expected)
        print(f"covariance {layer}: {error:.1e}")
        assert error < TENSOR_TOLERANCE


@pytest.mark.parametrize("number", [0, 7, 15, 23])
def test_targets(golden, number):
    request = golden.records[number].request
    z = oracle.target(golden.model, golden.tokenizer, request, golden.prefixes, golden.hp).z
    error = relative(z, golden.tensors["targets"][number])
    print(f"target {number}: {error:.1e}")
    assert error < TENSOR_TOLERANCE


def test_keys_and_deltas(golden, updates):
    for layer in golden.hp.layers:
        keys = relative(updates[layer].K.T, golden.tensors[f"keys.{layer}"])
        stored = golden.tensors[f"delta.{layer}"]
        width = golden.model.config.hidden_size
        delta = relative(updates[layer].delta, stored if stored.shape[0] == width else stored.T)
        print(f"layer {layer}: keys {keys:.1e}, delta {delta:.1e}")
        assert keys < TENSOR_TOLERANCE
        assert delta < TENSOR_TOLERANCE


@pytest.mark.parametrize("when", ["pre", "post"])
def test_evaluation(golden, updates, when):
    with oracle.edited(golden.model, updates if when == "post" else {}):
        measured = [
            oracle.evaluate(golden.model, golden.tokenizer, record) for record in golden.records
        ]
    shares = {}
    for name, kind in (("ES", "rewrite"), ("PS", "paraphrase"), ("NS", "neighborhood")):
        means = []
        for scores, expected in zip(measured, golden.expected[when], strict=True):
            mine = [(new, true) for scored, new, true in scores if scored == kind]
            for (new, true), nll in zip(mine, expected[f"{kind}_prompts_probs"], strict=True):
                assert new.nll == pytest.approx(nll["target_new"], abs=NLL_TOLERANCE)
                assert true.nll == pytest.approx(nll["target_true"], abs=NLL_TOLERANCE)
            wanted = [(true, new) if kind == "neighborhood" else (new, true) for new, true in mine]
            assert [one.hit for one, _ in wanted] == expected[f"{kind}_prompts_correct"]
            means.append(fmean(one.nll < other.nll for one, other in wanted))
        shares[name] = 100 * fmean(means)
    for name, share in shares.items():
        assert share == pytest.approx(golden.expected["summary"][when][name])
