"""What is longer than the model's context is found before anything is computed, to the token."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from memit.errors import InputError
from memit.evaluation.counterfact import prompts_of, score_prompts
from memit.evaluation.zsre import ZsreRecord
from memit.generation import generate_texts
from memit.language_model import LanguageModel
from memit.positions import continuation_rows
from memit.prefixes import sample_prefixes
from memit.requests import EditRequest, Record
from memit.room import check_records
from memit.targets import edit_rows
from tests.reference import build

REQUEST = EditRequest("Paul Smith", "{} lives in", "Rome", "Oslo")
FAMILIES = ("gpt2", "llama", "opt", "mistral", "gpt_neo")
"""Learned positions, one of them with an offset; rotary ones; sliding windows."""


def longest(lm: LanguageModel, target: str | None) -> str:
    """A prompt that fills the context; another "q" would be too much."""

    def tokens(text: str) -> int:
        if target is None:
            return len(lm.tokenizer(text)["input_ids"])
        return len(continuation_rows(lm.tokenizer, [(text, f" {target}")])[0].ids) - 1

    text = "q"
    while tokens(f"{text}q") <= lm.context_length:
        text += "q"
    assert tokens(text) == lm.context_length
    return text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["paraphrase", "neighborhood"])
def test_a_prompt_that_just_fits_is_scored_and_one_token_more_is_refused(family, kind) -> None:
    lm = build(family)
    request = replace(REQUEST, target_true=None, target_new="a")
    fits = replace(Record(7, request), **{f"{kind}_prompts": (longest(lm, "a"),)})
    check_records(lm, [fits])
    score_prompts(lm, prompts_of([fits]), token_budget=1000)
    over = replace(Record(7, request), **{f"{kind}_prompts": (longest(lm, "a") + "q",)})
    with pytest.raises(InputError, match=f"the {kind} prompt of record 7"):
        check_records(lm, [over])
    with pytest.raises(InputError, match="shorten or remove it"):
        score_prompts(lm, prompts_of([over]), token_budget=1000)


def test_a_generation_prompt_that_just_fits() -> None:
    lm = build("gpt2")
    fits = Record(3, REQUEST, generation_prompts=(longest(lm, None),))
    check_records(lm, [fits], written=None)
    generate_texts(lm, fits.generation_prompts, total_tokens=100, token_budget=1000)
    over = Record(3, REQUEST, generation_prompts=(longest(lm, None) + "q",))
    with pytest.raises(InputError, match="the generation prompt of record 3"):
        check_records(lm, [fits, over], written=2)
    check_records(lm, [fits, over], written=1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama2", "opt"])
def test_a_prompt_that_passes_fits_behind_every_prefix(family: str) -> None:
    lm = build(family)
    prompt = "{} lives in"
    while _passes(lambda text=prompt: check_records(lm, [_of(f"q{text}")])):
        prompt = f"q{prompt}"
    request = _of(prompt).request
    for seed in range(4):
        edit_rows(lm, [request], sample_prefixes(lm, seed))
    edit_rows(lm, [_of(f"q{prompt}").request], ())
    with pytest.raises(InputError, match="the prefixed prompt of record 1"):
        check_records(lm, [_of(f"q{prompt}")])


def _of(prompt: str) -> Record:
    return Record(1, replace(REQUEST, prompt=prompt))


def _passes(check: Callable[[], None]) -> bool:
    try:
        check()
    except InputError:
        return False
    return True


def test_room_is_kept_for_a_true_object_that_is_to_be_found() -> None:
    lm = build("gpt2")
    prompt = "q" * 150 + "{} lives in"
    check_records(lm, [Record(0, replace(REQUEST, prompt=prompt, target_new="a b c d e f g"))])
    wanting = replace(REQUEST, prompt=prompt, target_new="a b c d e f g", target_true=None)
    with pytest.raises(InputError, match="the rewrite prompt of record 0"):
        check_records(lm, [Record(0, wanting)])


def test_the_fact_in_front_counts_in_counterfact_plus_alone() -> None:
    lm = build("gpt2")
    record = Record(5, REQUEST, neighborhood_prompts=(longest(lm, "Oslo"),))
    check_records(lm, [record])
    with pytest.raises(InputError, match="the neighborhood_plus prompt of record 5"):
        check_records(lm, [record], plus=True)


@pytest.mark.parametrize("part", ["paraphrase", "locality_prompt"])
def test_questions_of_zsre(part: str) -> None:
    lm = build("gpt2")
    question = ZsreRecord(2, REQUEST, "Where is Paul?", "What is a?", "Rome")
    check_records(lm, (), [question])
    too_long = replace(question, **{part: longest(lm, "Rome") + "q"})
    with pytest.raises(InputError, match="prompt of record 2"):
        check_records(lm, (), [too_long])


def test_a_token_that_the_model_does_not_know_is_found_in_a_paraphrase() -> None:
    lm = build("gpt2")
    lm.model.resize_token_embeddings(300)
    text = "Port-au-Prince"
    with pytest.raises(InputError, match="belongs to another model"):
        check_records(lm, [Record(0, REQUEST, paraphrase_prompts=(text,))])
