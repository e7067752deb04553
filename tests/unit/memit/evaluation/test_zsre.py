"""zsRE: the published definition, one forward a question."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from memit.errors import InputError
from memit.evaluation.counterfact import score_prompts
from memit.evaluation.zsre import as_records, questions_of, read_zsre, zsre_record_means
from memit.language_model import LanguageModel
from tests import SHARED
from tests.reference import build

ZSRE = SHARED / "data/zsre-1k.json"


def question(**changes: object) -> dict:
    return {
        "subject": "Paul Smith",
        "src": "Where does Paul Smith live?",
        "pred": "x",
        "rephrase": "Paul Smith lives where?",
        "alt": "Oslo",
        "answers": ["New York City", "Rome"],
        "loc": "nq question: who was born in Kraków",
        "loc_ans": "Tor",
        "cond": "",
    } | changes


def saved(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_record_asks_three_questions(tmp_path: Path):
    (record,) = read_zsre(saved(tmp_path, [question()]))
    assert record.request.prompt == "Where does {} live?"
    assert record.request.target_new == "New York City"
    assert record.request.target_true is None
    assert record.locality_prompt == "nq question: who was born in Kraków?"
    (edit,) = as_records([record])
    assert edit.request == record.request
    assert edit.paraphrase_prompts == ("Paul Smith lives where?",)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([question(), question(src="Where?")], "record 2: .*'Where\\?' does not name its subject"),
        ([question(answers=[])], "record 1: 'answers' is no list"),
        ([question(loc=None)], "record 1: .*'loc'"),
        ([question(answers=[" "])], "record 1: the new object is empty"),
        (["x"], "record 1: it is no JSON object"),
        ({}, "holds no questions"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, content: object, complaint: str):
    with pytest.raises(InputError, match=complaint):
        read_zsre(saved(tmp_path, content))


@torch.no_grad()
def share(lm: LanguageModel, prompt: str, answer: str) -> float:
    """Share of the answer's tokens that are argmax: a forward for each token."""
    wanted = lm.tokenizer(" " + answer)["input_ids"]
    prompt_ids = lm.tokenizer(prompt)["input_ids"]
    right = 0
    for index, token in enumerate(wanted):
        ids = torch.tensor([[*prompt_ids, *wanted[:index]]])
        right += int(lm.model(ids).logits[0, -1].argmax()) == token
    return right / len(wanted)


def test_shares_agree_with_one_forward_a_token(tmp_path: Path):
    lm = build("gpt2")
    prompt = "Paul Smith lives in the city of"
    with torch.no_grad():
        best = lm.model(torch.tensor([lm.tokenizer(prompt)["input_ids"]])).logits[0, -1].argmax()
    said = str(lm.tokenizer.decode(best)).strip()
    rows = [
        question(),
        question(rephrase=prompt, answers=[f"{said} or São Paulo"], loc_ans="São Paulo"),
    ]
    records = read_zsre(saved(tmp_path, rows))
    table = score_prompts(lm, questions_of(records), token_budget=64)
    assert len(table) == 6
    shares = [
        share(lm, prompt, answer)
        for record in records
        for prompt, answer in (
            (record.request.text, record.request.target_new),
            (record.paraphrase, record.request.target_new),
            (record.locality_prompt, record.locality_answer),
        )
    ]
    assert table["share_new"].to_pylist() == pytest.approx(shares)
    assert 0 < max(shares) < 1
    assert zsre_record_means(table)["paraphrase"].tolist() == pytest.approx(
        [100 * shares[1], 100 * shares[4]]
    )
    failed = zsre_record_means(table, [records[1].case_id])
    assert failed["paraphrase"].tolist() == pytest.approx([100 * shares[1], 0.0])


@pytest.mark.skipif(not ZSRE.exists(), reason="no zsRE here")
def test_the_whole_data_set_is_read():
    records = read_zsre(ZSRE)
    assert len(records) == 1000
    assert np.unique([record.case_id for record in records]).size == 1000
    assert records[0].request.text == "What is the product made by UniFirst?"
    assert records[0].locality_prompt.endswith("?")
