"""An edit that is computed and served in bfloat16 does what the float32 one does."""

import dataclasses

from memit.editors.base import Resources
from memit.editors.memit import Memit
from memit.evaluation.counterfact import prompts_of, score_prompts, summarise
from memit.language_model import load_model
from memit.second_moment import SecondMoment
from tests import GOLDEN
from tests.acceptance.golden import Golden, read_golden

TOKEN_BUDGET = 4096
ONE_RECORD = 100 / 24 + 1e-6
"""Points that one of the 24 recorded edits counts for; on hundreds two points are the limit."""


def _summary(golden: Golden, dtype: str) -> dict[str, float]:
    lm = load_model(golden.directory / "model", dtype=dtype, device="cpu")
    hp = dataclasses.replace(golden.hyperparameters, covariance_weight=20.0)
    resources = Resources(
        token_budget=TOKEN_BUDGET,
        prefixes=golden.prefixes,
        moments={layer: SecondMoment(golden.covariance[layer], 1) for layer in hp.layers},
    )
    requests = [record.request for record in golden.records]
    Memit(hp).edit(lm, requests, resources).apply(lm)
    return summarise(score_prompts(lm, prompts_of(golden.records), token_budget=TOKEN_BUDGET))


def test_bfloat16_costs_no_more_than_a_record() -> None:
    golden = read_golden(GOLDEN)
    reference, rounded = _summary(golden, "float32"), _summary(golden, "bfloat16")
    for name in ("efficacy", "paraphrase", "neighborhood"):
        assert abs(reference[name] - rounded[name]) <= ONE_RECORD, (name, reference, rounded)
    assert rounded["efficacy"] > 50
