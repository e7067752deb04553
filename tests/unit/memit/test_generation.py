"""Sampling against a loop without batches or caches, and what the texts may depend on."""

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from memit.editing import ask
from memit.errors import InputError
from memit.evaluation.drift import read_text
from memit.generation import generate_texts
from memit.language_model import LanguageModel
from memit.prefixes import sample_prefixes
from memit.requests import EditRequest, Record
from memit.true_objects import with_true_objects
from tests.families import DOCUMENTS, closed
from tests.reference import shared

PROMPTS = ("Paul Smith lives in", "The", "Zoë Müller was born in the city of São Paulo, and")
MISSING = Record(1, EditRequest("Paul Smith", "{} has an office in", "New York"))


@torch.no_grad()
def greedy(lm: LanguageModel, prompt: str, count: int) -> str:
    """What follows a prompt, by one full forward a token."""
    ids = list(lm.tokenizer(prompt)["input_ids"])
    for _ in range(count):
        ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    whole = lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(whole).removeprefix(prompt)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama", "mistral", "opt"])
def test_batches_with_padding_write_what_a_loop_writes(family: str):
    lm = shared(family)
    texts = generate_texts(lm, PROMPTS, new_tokens=12, token_budget=400)
    assert texts == [greedy(lm, prompt, 12) for prompt in PROMPTS]


def test_texts_do_not_depend_on_their_batch_or_place():
    lm = shared("llama")
    write = functools.partial(generate_texts, lm, total_tokens=24, top_k=5, seed=3)
    together = write(PROMPTS, token_budget=1000)
    assert together == [text for p in PROMPTS for text in write([p], token_budget=1000)]
    assert together == write(PROMPTS, token_budget=1)
    assert together == write(PROMPTS[::-1], token_budget=1000)[::-1]


def test_texts_depend_on_the_seed_and_repeated_prompts_differ():
    lm = shared("gpt2")
    one, other = (
        generate_texts(
            lm, ["Paul Smith lives in"] * 2, new_tokens=20, top_k=5, seed=seed, token_budget=400
        )
        for seed in (0, 1)
    )
    assert len({*one, *other}) == 4


def test_draws_follow_the_softmax_of_the_best_k():
    lm = shared("gpt2")
    prompt = "Paul Smith lives in the city of"
    draws = 4000
    texts = generate_texts(
        lm, [prompt] * draws, new_tokens=1, top_k=3, seed=0, token_budget=1 << 16
    )
    with torch.no_grad():
        logits = lm.model(lm.tokenizer(prompt, return_tensors="pt")["input_ids"]).logits[0, -1]
    best, tokens = logits.topk(3)
    counts = Counter(texts)
    assert sum(counts.values()) == draws
    assert len(counts) == 3
    for probability, token in zip(best.softmax(0).tolist(), tokens, strict=True):
        expected = draws * probability
        found = counts[str(lm.tokenizer.decode(token))]
        assert abs(found - expected) < 5 * (expected * (1 - probability)) ** 0.5


def test_lengths_count_the_prompt_or_do_not():
    lm = shared("gpt2")
    finished: list[int] = []
    texts = generate_texts(lm, PROMPTS, total_tokens=30, token_budget=60, progress=finished.append)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text == prompt + greedy(lm, prompt, 30 - len(lm.tokenizer(prompt)["input_ids"]))
    assert sum(finished) == len(PROMPTS)
    short = generate_texts(lm, PROMPTS[2:], total_tokens=3, token_budget=60)
    assert short == list(PROMPTS[2:])


def test_a_long_prompt_beside_a_long_text_stays_within_the_context():
    lm = shared("gpt2")
    prompts = ("The", " ".join(["Paul Smith lives in"] * 6))
    most = lm.context_length
    texts = generate_texts(lm, prompts, total_tokens=most, token_budget=1 << 20)
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == prompt + greedy(lm, prompt, most - len(lm.tokenizer(prompt)["input_ids"]))


def test_settings_of_the_checkpoint_do_not_leak():
    lm = shared("llama")
    plain = generate_texts(lm, PROMPTS, new_tokens=10, top_k=5, seed=0, token_budget=400)
    with torch.no_grad():
        ids = lm.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
        first = int(lm.model(ids).logits[0, -1].argmax())
    theirs = lm.model.generation_config
    odd = GenerationConfig(
        eos_token_id=first,
        repetition_penalty=5.0,
        temperature=9.0,
        do_sample=True,
        suppress_tokens=[first],
        min_new_tokens=40,
    )
    lm.model.generation_config = odd
    try:
        assert plain == generate_texts(
            lm, PROMPTS, new_tokens=10, top_k=5, seed=0, token_budget=400
        )
        assert lm.model.generation_config is odd
    finally:
        lm.model.generation_config = theirs


@pytest.mark.parametrize(
    ("lengths", "complaint"),
    [
        ({"new_tokens": 5, "total_tokens": 5}, "one of them"),
        ({}, "one of them"),
        ({"new_tokens": 500}, "takes"),
    ],
)
def test_impossible_lengths_are_refused(lengths: dict[str, Any], complaint: str):
    with pytest.raises(InputError, match=complaint):
        generate_texts(shared("gpt2"), PROMPTS, token_budget=100, **lengths)


def test_what_the_model_says_stands_for_a_missing_true_object():
    lm = shared("gpt_neox")
    prompt = "{} has an office in"
    known = Record(0, EditRequest("Ann", prompt, "Rome", "Oslo"))
    missing = Record(1, EditRequest("Paul Smith", prompt, "New York"))
    first, second = with_true_objects(lm, [known, missing], token_budget=400)
    assert first == known
    said = greedy(lm, missing.request.text, 12).split("\n")[0]
    assert second.request.target_true
    words = second.request.target_true.split()
    assert 1 <= len(words) <= 2
    assert words[0] in said.replace("\ufffd", "")
    (same,) = with_true_objects(
        lm,
        [Record(1, EditRequest("Paul Smith", prompt, second.request.target_true))],
        token_budget=400,
    )
    assert same.request.target_true is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_closing_token_is_not_continued(family: str):
    lm = shared(family)
    closing = LanguageModel(lm.model, closed(lm.tokenizer), name=family)
    assert closing.tokenizer("Paul")["input_ids"] != lm.tokenizer("Paul")["input_ids"]
    for ask_it in (
        lambda lm: generate_texts(lm, PROMPTS, new_tokens=9, top_k=5, seed=0, token_budget=400),
        lambda lm: sample_prefixes(lm, 0),
        lambda lm: [(answer.text, answer.probability) for answer in ask(lm, PROMPTS[0])],
        lambda lm: read_text(lm, DOCUMENTS[:3], token_budget=400).nll.tolist(),
        lambda lm: with_true_objects(lm, [MISSING], token_budget=400),
    ):
        assert ask_it(closing) == ask_it(lm)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt2_slow_tokenizer"])
def test_texts_without_their_prompts_are_what_follows(family: str):
    lm = shared(family)
    write = functools.partial(generate_texts, lm, token_budget=400)
    special = f"{lm.tokenizer.eos_token}Paul lives in"  # which is no part of the decoded text
    for prompt in (*PROMPTS[:2], special):
        length = len(lm.tokenizer(prompt)["input_ids"]) + 9
        (whole,), (rest,) = write([prompt], total_tokens=length), write([prompt], new_tokens=9)
        begun = prompt.removeprefix(str(lm.tokenizer.eos_token))
        assert whole.strip().removeprefix(begun) == rest.rstrip()


def test_a_true_object_is_found_behind_special_tokens():
    lm = shared("gpt_neox")
    eos = str(lm.tokenizer.eos_token)
    request = EditRequest("Paul Smith", f"{eos * 9}{{}} has an office in", "New York")
    (record,) = with_true_objects(lm, [Record(0, request)], token_budget=400)
    (text,) = generate_texts(lm, [request.text], new_tokens=12, token_budget=400)
    assert record.request.target_true
    assert record.request.target_true.split()[0] in text.split("\n")[0]
