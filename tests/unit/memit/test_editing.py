"""The whole way, in every family: statistics, targets, spread, evaluation, against the oracle."""

from dataclasses import replace

import pytest
import torch

from memit import reference as oracle
from memit.editors.base import Resources
from memit.editors.memit import Memit
from memit.evaluation.counterfact import prompts_of, score_prompts
from memit.requests import Record
from memit.second_moment import collect_second_moments
from memit.weight_delta import WeightDelta
from tests.families import CITIES, DOCUMENTS, LAYERS, PREFIXES, SUBJECTS
from tests.reference import FAMILIES, HYPERPARAMETERS, REQUESTS, build, reference, relative

TOLERANCE = 1e-4
NLL_TOLERANCE = 1e-3
BUDGET = 900

RECORDS = tuple(
    Record(
        case_id=number,
        request=replace(request, target_true=CITIES[number]),
        paraphrase_prompts=(f"{request.subject} lives in", f"The town of {request.subject} is"),
        neighborhood_prompts=tuple(f"{name} was born in" for name in SUBJECTS[number::3]),
    )
    for number, request in enumerate(REQUESTS)
)


def _edit(lm) -> WeightDelta:
    moments = collect_second_moments(lm, DOCUMENTS, LAYERS, token_budget=BUDGET)
    resources = Resources(token_budget=BUDGET, prefixes=PREFIXES, moments=moments)
    return Memit(HYPERPARAMETERS).edit(lm, REQUESTS, resources)


def _scores_agree(lm, model, tokenizer) -> None:
    """Every prompt, and every summary, of `lm` and of the oracle on `model`."""
    table = score_prompts(lm, prompts_of(RECORDS), token_budget=BUDGET)
    expected = [oracle.evaluate(model, tokenizer, record) for record in RECORDS]
    found = table.to_pylist()
    flat = [scored for record in expected for scored in record]
    for row, (kind, new, true) in zip(found, flat, strict=True):
        assert row["kind"] == kind
        assert row["nll_new"] == pytest.approx(new.nll, abs=NLL_TOLERANCE)
        assert row["nll_true"] == pytest.approx(true.nll, abs=NLL_TOLERANCE)
        assert (row["hit_new"], row["hit_true"]) == (new.hit, true.hit)


@pytest.mark.parametrize("family", FAMILIES)
def test_edit_and_its_evaluation_are_those_of_the_oracle(family, tmp_path):
    lm, expected = build(family), reference(family)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    delta = _edit(lm)
    for layer, update in expected.updates.items():
        dense = delta.changes[lm.weight_name(layer)].dense()
        assert relative(dense.T if lm.is_transposed(layer) else dense, update.delta) < TOLERANCE
    _scores_agree(lm, expected.model, expected.tokenizer)
    delta.save(tmp_path / "delta.safetensors")
    WeightDelta.load(tmp_path / "delta.safetensors").apply(lm)
    with oracle.edited(expected.model, expected.updates):
        _scores_agree(lm, expected.model, expected.tokenizer)
    lm.applied[-1].delta.revert(lm)
    after = lm.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
