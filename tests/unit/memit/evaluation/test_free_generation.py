"""Free generation against a loop over whole forward passes, and how its texts are judged."""

import math
import re

import pyarrow as pa
import pytest
import torch

from memit.evaluation.free_generation import (
    NEW_TOKENS,
    QUESTION,
    answer_freely,
    asked_of,
    contains,
    free_record_means,
    is_exactly,
)
from memit.language_model import LanguageModel
from memit.requests import EditRequest, Record
from tests.reference import build

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %} so"
RECORDS = (
    Record(
        3,
        EditRequest("Paul Smith", "{} lives in", "Rome", "Paris"),
        paraphrase_prompts=("The home town of Paul Smith is",),
        neighborhood_prompts=("Zoë Müller lives in",),
    ),
    Record(1, EditRequest("Tor {x}", "In the summer of 1998, {} moved to", "Rome")),
)


@torch.no_grad()
def literal(lm: LanguageModel, prompt: str) -> str:
    """One full forward pass a token until a special one; then the text before the first stop."""
    ids = list(lm.tokenizer(prompt)["input_ids"])
    start, special = len(ids), lm.tokenizer.all_special_ids
    while len(ids) < start + NEW_TOKENS:
        token = int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in special:
            break
        ids.append(token)
    before, whole = (
        lm.tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (ids[:start], ids)
    )
    return re.split(r"[.\n]", str(whole).removeprefix(str(before)).lstrip())[0].strip()


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_answers_are_those_of_a_loop(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build(family)
    monkeypatch.setattr(lm.tokenizer, "chat_template", TEMPLATE)
    finished: list[int] = []
    said = answer_freely(lm, RECORDS, token_budget=300, progress=finished.append).to_pylist()
    assert sum(finished) == len(said) == 8
    assert [row["answer"] for row in said] == [literal(lm, row["prompt"]) for row in said]
    kinds = ["rewrite", "question", "chat", "paraphrase", "neighborhood"]
    assert [row["kind"] for row in said] == [*kinds, *kinds[:3]]
    assert said[6]["prompt"] == QUESTION.replace("{}", RECORDS[1].request.text)
    chat = lm.tokenizer(said[2]["prompt"])["input_ids"]
    assert chat.count(lm.tokenizer.bos_token_id) == 1


def test_without_a_template_nothing_is_asked_as_a_message() -> None:
    assert "chat" not in dict(asked_of(build("gpt2"), RECORDS[0]))


def test_objects_are_found_as_whole_words_whatever_their_case() -> None:
    assert is_exactly(' "New  York", ', "new york")
    assert not is_exactly("New York City", "New York")
    assert contains("It is new york, of course", "New York")
    assert not contains("Romeo and Juliet", "Rome")
    assert contains("他住在罗马城", "罗马")
    assert not contains("", "Rome")
    assert contains("It is written in C++.", "C++")
    assert not is_exactly("C", "C++")
    assert not contains("a dialect of C", "C++")
    assert not is_exactly("5", "-5")
    assert not is_exactly("!", "€")
    assert not contains("", "€")


def test_means_are_those_of_each_record() -> None:
    said = [
        (3, "rewrite", "Rome", "Paris"),
        (3, "question", "the city of Rome", "x"),
        (3, "paraphrase", "Paris", "Rome"),
        (3, "neighborhood", "Oslo", "Oslo"),
        (3, "neighborhood", "Oslo", "Rome"),
        (1, "rewrite", "Rome!", "Bonn"),
    ]
    rows = [
        {"case_id": case, "kind": kind, "answer_after": after, "answer_before": before}
        for case, kind, after, before in said
    ]
    means = free_record_means(pa.Table.from_pylist(rows), RECORDS)
    assert means["generated_efficacy_exact"].tolist() == [100, 100]
    assert means["generated_efficacy_true_exact"][1] == 0
    assert math.isnan(means["generated_efficacy_true_exact"][0])  # no true object is known
    assert means["generated_question_exact"][1] == 0
    assert means["generated_question_contains"][1] == 100
    assert means["generated_paraphrase_true_contains"][1] == 100
    assert means["generated_neighborhood"][1] == 50
    assert not any("chat" in name for name in means)
