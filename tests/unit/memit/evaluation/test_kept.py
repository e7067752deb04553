"""Kept prompts against one prompt at a time in float64, and their means over records."""

import copy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from memit.evaluation.kept import (
    SCHEMA,
    Unedited,
    answers_to,
    kept_by_record,
    kept_record_means,
    kept_table,
    unedited_answers,
)
from memit.generation import ANSWER_TOKENS
from memit.language_model import LanguageModel
from memit.requests import EditRequest, Record
from tests.families import families

REQUEST = EditRequest("Ann", "{} lives in", "Rome")
RECORDS = [
    Record(2, REQUEST, kept_prompts=("Zoë Müller lives in", "The home town of Paul Smith is")),
    Record(5, REQUEST),
    Record(7, REQUEST, kept_prompts=("In the summer of 1998,", "Zoë Müller lives in")),
]
PROMPTS = ["Zoë Müller lives in", "The home town of Paul Smith is", "In the summer of 1998,"]


@torch.no_grad()
def literal(lm: LanguageModel, prompt: str) -> tuple[torch.Tensor, str]:
    """Probabilities of the next token (float64), and the greedy continuation."""
    ids = lm.tokenizer(prompt)["input_ids"]
    first, row = None, list(ids)
    for _ in range(ANSWER_TOKENS):
        logits = lm.model(torch.tensor([row])).logits[0, -1].double()
        first = logits.softmax(-1) if first is None else first
        row.append(int(logits.argmax()))
    assert first is not None
    whole, start = (str(lm.tokenizer.decode(r, skip_special_tokens=True)) for r in (row, ids))
    return first, whole.removeprefix(start)


@pytest.mark.parametrize("token_budget", [1, 4096])
def test_agrees_with_one_prompt_at_a_time(token_budget: int, tmp_path: Path):
    network, tokenizer = families()["gpt2"]()
    changed = copy.deepcopy(network)
    torch.manual_seed(3)
    for parameter in changed.parameters():
        parameter.data += 0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    models = [LanguageModel(model, tokenizer, name="small") for model in (network, changed)]
    unedited = unedited_answers(models[0], PROMPTS, token_budget=token_budget)
    unedited.save(tmp_path / "answers")
    before = Unedited.load(tmp_path / "answers").answers(models[0])
    after = answers_to(models[1], PROMPTS, token_budget=token_budget)
    rows = kept_by_record(RECORDS, kept_table(PROMPTS, before, after)).to_pylist()
    assert [row["case_id"] for row in rows] == [2, 2, 7, 7]
    for row in rows:
        (p, was), (q, now) = (literal(lm, row["prompt"]) for lm in models)
        assert (row["answer_before"], row["answer_after"]) == (was, now)
        assert row["same_answer"] == (was == now)
        assert row["same_token"] == bool(p.argmax() == q.argmax())
        assert row["divergence"] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)
    same = kept_table(PROMPTS, before, before)
    assert same["divergence"].to_pylist() == [0.0] * 3
    assert all(same["same_answer"].to_pylist())


def test_metrics_are_means_over_records_of_means_over_prompts():
    rows = [
        {"case_id": case, "same_token": token, "same_answer": False, "divergence": divergence}
        | dict.fromkeys(("prompt", "answer_before", "answer_after"), "")
        for case, token, divergence in ((7, True, 0.5), (2, True, 1.0), (2, False, 2.0))
    ]
    means = kept_record_means(pa.Table.from_pylist(rows, schema=SCHEMA), RECORDS)
    np.testing.assert_equal(means["kept"], [50.0, np.nan, 100.0])
    np.testing.assert_equal(means["kept_accuracy"], [0.0, np.nan, 0.0])
    np.testing.assert_equal(means["kept_divergence"], [1.5, np.nan, 0.5])
    assert kept_record_means(SCHEMA.empty_table(), RECORDS) == {}
