"""The oracle itself against what an independent run of the published method recorded."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import GOLDEN, oracle

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
            clamp_factor=hparams["clamp_factor"],
            weight_decay=hparams["weight_decay"],
            kl_factor=hparams["kl_factor"],
            loss_threshold=0.05,
            key_average="nested",
        ),
    )


@pytest.fixture(scope="module")
def targets(golden) -> torch.Tensor:
    return torch.stack(
        [
            oracle.target(
                golden.model, golden.tokenizer, record.request, golden.prefixes, golden.hp
            ).z
            for record in golden.records
        ]
    )


@pytest.fixture(scope="module")
def updates(golden, targets) -> dict[int, oracle.LayerUpdate]:
    return oracle.spread(
        golden.model,
        golden.tokenizer,
        [record.request for record in golden.records],
        golden.prefixes,
        targets,
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


def test_targets(golden, targets):
    error = relative(targets, golden.tensors["targets"])
    print(f"targets: {error:.1e}")
    assert error < TENSOR_TOLERANCE


def test_keys_and_deltas(golden, updates):
    for layer in golden.hp.layers:
        keys = relative(updates[layer].keys, golden.tensors[f"keys.{layer}"])
        stored = golden.tensors[f"delta.{layer}"]
        width = golden.model.config.hidden_size
        delta = relative(updates[layer].delta, stored if stored.shape[0] == width else stored.T)
        print(f"layer {layer}: keys {keys:.1e}, delta {delta:.1e}")
        assert keys < TENSOR_TOLERANCE
        assert delta < TENSOR_TOLERANCE


@pytest.mark.parametrize("evaluate", [oracle.evaluate, oracle.evaluate_singly])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_evaluation(golden, updates, when, evaluate):
    with oracle.edited(golden.model, updates if when == "post" else {}):
        measured = [evaluate(golden.model, golden.tokenizer, record) for record in golden.records]
    worst = 0.0
    for scores, expected in zip(measured, golden.expected[when], strict=True):
        for kind in ("rewrite", "paraphrase", "neighborhood"):
            mine = [scored for scored in scores if scored.kind == kind]
            theirs = expected[f"{kind}_prompts_probs"]
            for scored, nll in zip(mine, theirs, strict=True):
                worst = max(worst, abs(scored.new.nll - nll["target_new"]))
                worst = max(worst, abs(scored.true.nll - nll["target_true"]))
            assert [oracle.correct(scored) for scored in mine] == expected[
                f"{kind}_prompts_correct"
            ]
    print(f"{when} {evaluate.__name__}: nll {worst:.1e}")
    assert worst < NLL_TOLERANCE
    summary = oracle.summary(measured)
    expected_summary = golden.expected["summary"][when]
    assert summary["efficacy"] == pytest.approx(expected_summary["ES"])
    assert summary["paraphrase"] == pytest.approx(expected_summary["PS"])
    assert summary["neighborhood"] == pytest.approx(expected_summary["NS"])
