"""The small model of the synthetic world: tokenizer, training, checkpoints."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memit.errors import InputError
from memit.world.people import WorldParameters, make_world
from memit.world.small_model import (
    TrainingParameters,
    learning_rate_at,
    make_model,
    train,
    training_rows,
)
from memit.world.tokenizer import train_tokenizer
from tests import Stopped, contents, stop_after

PARAMETERS = TrainingParameters(
    layers=2,
    width=16,
    heads=2,
    vocabulary=300,
    context_length=32,
    sequence_length=32,
    batch_size=2,
    steps=12,
    warmup_steps=3,
    checkpoint_every=5,
)


@pytest.fixture(scope="module")
def world():
    return make_world(WorldParameters(people=6, relations=2, objects=3, biographies=4))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    return train(world, PARAMETERS, checkpoint_dir=tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("stops", "resumed"),
    [((7,), [5] + [1] * 7), ((3,), [1] * 12), ((6, 11), [10, 1, 1]), ((12,), [12])],
)
def test_a_training_that_was_stopped_goes_on_to_the_same_bytes(
    world, trained, tmp_path, stops, resumed
):
    for steps in stops:
        with pytest.raises(Stopped):
            train(world, PARAMETERS, checkpoint_dir=tmp_path, progress=stop_after(steps))
    for steps in (resumed, [12]):  # the last time there is nothing left to do
        told: list[int] = []
        again = train(world, PARAMETERS, checkpoint_dir=tmp_path, progress=told.append)
        assert told == steps
        assert contents(again) == contents(trained)


def test_a_damaged_checkpoint_is_not_used(world, trained, tmp_path):
    with pytest.raises(Stopped):
        train(world, PARAMETERS, checkpoint_dir=tmp_path, progress=stop_after(7))
    (checkpoint,) = tmp_path.iterdir()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    steps: list[int] = []
    again = train(world, PARAMETERS, checkpoint_dir=tmp_path, progress=steps.append)
    assert steps == [1] * 12
    assert contents(again) == contents(trained)


def test_a_checkpoint_of_another_training_is_not_used(world, trained, tmp_path):
    for parameters in (replace(PARAMETERS, seed=1), PARAMETERS):
        with pytest.raises(Stopped):
            train(world, parameters, checkpoint_dir=tmp_path, progress=stop_after(7))
    one, other = sorted(tmp_path.iterdir())
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    again = train(world, PARAMETERS, checkpoint_dir=tmp_path)
    assert contents(again) == contents(trained)


def test_the_model_learns(world, tmp_path):
    saved = train(world, replace(PARAMETERS, steps=60, learning_rate=1e-2), checkpoint_dir=tmp_path)
    losses = json.loads((saved / "training.json").read_text())["losses"]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


def test_the_global_generator_is_left_alone(world, tmp_path):
    before = torch.get_rng_state()
    train(world, PARAMETERS, checkpoint_dir=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_saved_directory_loads_as_any_model(world, trained):
    assert {path.suffix for path in trained.iterdir()} == {".safetensors", ".json"}  # no pickles
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.dtype == torch.float32
    assert model.config.model_type == "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(trained)
    encoded = tokenizer(world.documents[0], return_tensors="pt")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert model(**encoded).logits.shape == (1, *encoded["input_ids"].shape[1:], len(tokenizer))


def test_the_initial_weights_follow_the_seed():
    first, again, other = (
        make_model(300, replace(PARAMETERS, seed=seed)).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "transformer.wte.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    "text", ["Zoë O'Brandu {} plays", " São Paulo\n", "漢字 and \U0001f3bb", "a  b"]
)
def test_any_text_survives_the_tokenizer_with_true_offsets(world, text):
    tokenizer = train_tokenizer(world.documents, 300)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    assert max(end for _, end in encoded["offset_mapping"]) == len(text)


def test_rows_begin_with_a_document_and_are_full():
    documents = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    rows = training_rows(documents, 6, seed=0)
    for row in (next(rows) for _ in range(50)):
        assert len(row) == 6
        first = next(d for d in documents if d[0] == row[0])
        assert row == [*first, 0, *row[len(first) + 1 :]][:6]


def test_all_documents_are_trained_on():
    documents = [[i] for i in range(1, 20)]
    rows = training_rows(documents, 2, seed=0)
    assert sorted(next(rows)[0] for _ in range(19)) == list(range(1, 20))


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    parameters = replace(PARAMETERS, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(step, parameters) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(
    "bad", [{"heads": 3}, {"sequence_length": 64}, {"steps": 0}, {"vocabulary": 256}]
)
def test_impossible_shapes_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        replace(PARAMETERS, **bad)
