"""Facts that the model knows, against asking for one after the other."""

import itertools
from dataclasses import replace

import pytest

from memit.evaluation.counterfact import prompts_of, score_prompts
from memit.generation import generate_texts
from memit.known_facts import known_facts
from memit.requests import EditRequest, Record
from tests.reference import build

OBJECTS = ("Rome", "Paris", "Bonn", "Oslo")
RECORDS = [
    Record(10 * n + m, EditRequest(f"Person {n}", "{} lives in", new, true))
    for n in range(20)
    for m, (new, true) in enumerate(itertools.pairwise(OBJECTS))
] + [Record(999, EditRequest("Ada", "{} lives in", "Rome", None))]


def test_it_finds_the_first_records_that_the_model_knows() -> None:
    lm, expected = build("gpt2"), []
    for record in RECORDS[:-1]:
        (row,) = score_prompts(lm, prompts_of([record]), token_budget=512).to_pylist()
        expected += [record] if row["nll_true"] < row["nll_new"] else []
    assert 4 < len(expected) < len(RECORDS) - 5
    known, share = known_facts(lm, RECORDS, None, token_budget=512)
    assert known == expected
    assert share == pytest.approx(100 * len(expected) / len(RECORDS))
    known, share = known_facts(lm, RECORDS, 3, token_budget=512)
    assert known == expected[:3]
    assert 0 < share < 100
    assert known_facts(lm, [], 3, token_budget=512) == ([], 0.0)


def test_answered_facts_are_those_whose_object_the_model_gives() -> None:
    lm, requests = build("gpt2"), [record.request for record in RECORDS[:9]]
    texts = [request.text for request in requests]
    said = generate_texts(lm, texts, new_tokens=1, token_budget=64)
    records = [
        Record(index, replace(request, target_true=text if index % 3 else "Oslo", between=""))
        for index, (request, text) in enumerate(zip(requests, said, strict=True))
    ]
    known, share = known_facts(lm, records, None, token_budget=512, answered=True)
    assert [record.case_id for record in known] == [1, 2, 4, 5, 7, 8]
    assert share == pytest.approx(100 * 6 / 9)
