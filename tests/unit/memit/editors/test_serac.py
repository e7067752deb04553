"""SERAC: nothing changes outside the scope, the memory answers inside, all of it can be kept."""

from dataclasses import replace
from random import Random

import pytest
import torch

from memit.editors import known_editors
from memit.editors.base import Resources
from memit.editors.saved_edit import load_edit
from memit.editors.serac import (
    Serac,
    SeracEdit,
    SeracModels,
    SeracSettings,
    _new_counterfactual,
    scope_loss,
    statement,
    train_serac,
)
from memit.errors import InputError, IntegrityError, UnreachableError
from memit.evaluation.continuations import Question, score_continuations
from memit.files.tensors import save_tensors, tensor_digest
from memit.generation import generate_texts
from memit.language_model import LanguageModel
from memit.requests import EditRequest, Record
from memit.weight_delta import WeightDelta
from tests import GOLDEN, Stopped, stop_after
from tests.reference import build

NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hanna", "Ivan", "Julia")
FAMILIES = ("Smith", "Miller", "Arc", "Moor", "Bell", "Ortiz")
PLACES = ("Rome", "Paris", "York", "Kiel")
SETTINGS = SeracSettings(
    encoder=None,
    counterfactual=None,
    width=32,
    layers=2,
    classifier_steps=120,
    counterfactual_steps=4,
    batch_size=12,
    learning_rate=3e-3,
    warmup_steps=5,
)


def make_records() -> list[Record]:
    people = [f"{name} {family}" for name in NAMES for family in FAMILIES]
    return [
        Record(
            index,
            EditRequest(
                name, "{} was born in", PLACES[index % 4], PLACES[(index + 1) % 4], "birth"
            ),
            paraphrase_prompts=(f"{name} came to the world in",),
            neighborhood_prompts=(f"{people[(index + 7) % 60]} was born in",),
        )
        for index, name in enumerate(people)
    ]


RECORDS = make_records()
EDITED, LEARNED = RECORDS[::10], [r for i, r in enumerate(RECORDS) if i % 10]
REQUESTS = [record.request for record in EDITED]
INSIDE = [record.request.text for record in EDITED]
OUTSIDE = ["The weather in Paris is", "Tomorrow it will be", "I think that"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build("gpt2")


@pytest.fixture(scope="module")
def models(lm: LanguageModel) -> SeracModels:
    return train_serac(lm, LEARNED, SETTINGS, directory=None)[0]


@pytest.fixture(scope="module")
def models_file(models: SeracModels, tmp_path_factory):
    path = tmp_path_factory.mktemp("serac") / "models.safetensors"
    models.save(path)
    return path


@pytest.fixture
def edit(lm: LanguageModel, models_file) -> SeracEdit:
    return Serac(SETTINGS, models_file).edit(lm, REQUESTS, Resources(token_budget=256))


def scores(lm: LanguageModel, prompts):
    questions = [Question(prompt, (" Rome", " New York City")) for prompt in prompts]
    return score_continuations(lm, questions, token_budget=64)


def test_prompts_out_of_scope_have_the_same_bits_in_any_company(
    lm: LanguageModel, edit: SeracEdit
) -> None:
    mixed = [prompt for pair in zip(INSIDE[:3], OUTSIDE, strict=True) for prompt in pair]
    before = scores(lm, mixed)
    weights = {name: tensor_digest(p) for name, p in lm.model.named_parameters()}
    edit.apply(lm)
    try:
        after = scores(lm, mixed)
    finally:
        edit.revert(lm)
    assert after[1::2] == before[1::2]
    assert all(a != b for a, b in zip(after[::2], before[::2], strict=True))
    assert weights == {name: tensor_digest(p) for name, p in lm.model.named_parameters()}
    assert scores(lm, mixed) == before


def test_prompts_in_scope_are_answered_by_the_small_model(
    lm: LanguageModel, edit: SeracEdit
) -> None:
    small = edit.models.counterfactual
    introduced = [f"{statement(request)} {request.text}" for request in REQUESTS]
    edit.apply(lm)
    try:
        assert scores(lm, INSIDE) == scores(small, introduced)
    finally:
        edit.revert(lm)


def test_generated_texts_follow_the_scope(lm: LanguageModel, edit: SeracEdit) -> None:
    def write(prompts):
        return generate_texts(lm, prompts, total_tokens=20, top_k=5, seed=1, token_budget=64)

    prompts = [INSIDE[0], OUTSIDE[0], INSIDE[1], OUTSIDE[1]]
    before = write(prompts)
    edit.apply(lm)
    try:
        after = write(prompts)
    finally:
        edit.revert(lm)
    assert after[1::2] == before[1::2]
    assert after[0] != before[0]
    for prompt, text in zip(prompts, after, strict=True):
        assert text.startswith(prompt)


def test_the_classifier_tells_edits_from_neighbours_it_never_saw(edit: SeracEdit) -> None:
    paraphrases = [prompt for record in EDITED for prompt in record.paraphrase_prompts]
    others = [f"{name} was born in" for name in ("Karl Smith", "Laura Ortiz", "Boris Kahn")]
    taken = edit.introductions([*INSIDE, *paraphrases])
    right = [statement(request) for request in REQUESTS] * 2
    assert sum(a == b for a, b in zip(taken, right, strict=True)) >= len(right) - 1
    assert edit.introductions([*others, *OUTSIDE]) == [None] * 6


def test_each_prompt_gets_its_own_edit_however_often_it_is_asked(edit: SeracEdit) -> None:
    asked = [INSIDE[1], OUTSIDE[0], INSIDE[0], INSIDE[1]]
    assert edit.introductions(asked) == [
        statement(REQUESTS[1]),
        None,
        statement(REQUESTS[0]),
        statement(REQUESTS[1]),
    ]


def test_an_empty_memory_takes_nothing_over(lm: LanguageModel, models_file) -> None:
    edit = Serac(SETTINGS, models_file).edit(lm, [], Resources(token_budget=256))
    assert edit.introductions(INSIDE) == [None] * len(INSIDE)


def test_a_saved_edit_needs_nothing_else(lm: LanguageModel, edit: SeracEdit, tmp_path) -> None:
    edit.save(tmp_path / "edit.safetensors")
    loaded = load_edit(tmp_path / "edit.safetensors")
    assert isinstance(loaded, SeracEdit)
    assert loaded.requests == edit.requests
    assert loaded.provenance == edit.provenance
    results = []
    for one in (edit, loaded):
        one.apply(lm)
        try:
            results.append(scores(lm, [*INSIDE, *OUTSIDE]))
        finally:
            one.revert(lm)
    assert results[0] == results[1]


def test_saved_changes_of_weights_are_read_by_the_same_name(tmp_path) -> None:
    WeightDelta({}, {"method": "none"}).save(tmp_path / "delta.safetensors")
    assert load_edit(tmp_path / "delta.safetensors").provenance == {"method": "none"}
    (tmp_path / "damaged").write_bytes(b"no safetensors")
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_edit(tmp_path / "damaged")


def test_memories_do_not_stand_in_front_of_each_other(lm: LanguageModel, edit: SeracEdit) -> None:
    other = replace(edit, requests=())
    edit.apply(lm)
    try:
        with pytest.raises(InputError, match="another memory"):
            other.apply(lm)
        with pytest.raises(InputError, match="not applied"):
            other.revert(lm)
    finally:
        edit.revert(lm)
    assert lm.router is None


def test_requests_that_were_trained_on_are_refused(lm: LanguageModel, models_file) -> None:
    editor = Serac(SETTINGS, models_file)
    assert known_editors()["serac"] is Serac
    with pytest.raises(InputError, match="trained on"):
        editor.edit(lm, [*REQUESTS, LEARNED[0].request], Resources(token_budget=256))


def test_a_counterfactual_model_that_is_loaded_leaves_tf32_as_it_is(lm: LanguageModel) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        _new_counterfactual(lm, replace(SETTINGS, counterfactual=str(GOLDEN / "model")))
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_damaged_models_and_unknown_encoders_are_named(
    lm: LanguageModel, models_file, tmp_path
) -> None:
    path = tmp_path / "models.safetensors"
    path.write_bytes(models_file.read_bytes()[:-10])
    with pytest.raises(IntegrityError, match=r"models\.safetensors"):
        SeracModels.load(path)
    for save in (WeightDelta({}, {}).save, lambda path: save_tensors({}, path, {"encoder": "[]"})):
        save(path)
        with pytest.raises(IntegrityError, match="models of SERAC"):
            SeracModels.load(path)
    with pytest.raises(UnreachableError, match="no-such-encoder"):
        train_serac(
            lm, LEARNED, replace(SETTINGS, encoder="nobody/no-such-encoder"), directory=None
        )
    with pytest.raises(InputError, match="has 3 records"):
        train_serac(lm, LEARNED[:3], SETTINGS, directory=None)


def test_a_neighbour_that_is_edited_itself_does_not_count_as_outside(models: SeracModels) -> None:
    """Without its neighbourhood prompt's pair the loss of this batch would not change."""
    first, second = RECORDS[0], RECORDS[7]
    assert second.request.subject in first.neighborhood_prompts[0]
    apart = replace(second, request=replace(second.request, relation_id="another relation"))
    elsewhere = [replace(record, neighborhood_prompts=()) for record in (second, apart)]
    right = scope_loss(models.classifier, [first, elsewhere[0]], Random(0))
    wrong = scope_loss(models.classifier, [first, elsewhere[1]], Random(0))
    assert float(wrong) > float(right) + 0.1


def test_an_interrupted_training_ends_with_the_same_models(
    lm: LanguageModel, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("memit.training.CHECKPOINT_EVERY", 2)
    settings = replace(SETTINGS, classifier_steps=5, counterfactual_steps=5)
    whole, losses = train_serac(lm, LEARNED, settings, directory=tmp_path / "whole")
    with pytest.raises(Stopped):
        train_serac(lm, LEARNED, settings, directory=tmp_path / "parts", progress=stop_after(8))
    done: list[int] = []
    again, more = train_serac(
        lm, LEARNED, settings, directory=tmp_path / "parts", progress=done.append
    )
    assert done == [5, 2, 1, 1, 1]
    assert more == losses
    first, second = whole.packed()[0], again.packed()[0]
    assert all(torch.equal(first[name], second[name]) for name in first)
