"""A model larger than its device: what has no room waits on disk, and gives the same edits."""

import sys
import weakref
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.offload import OffloadedWeightsLoader
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from memit.editors.base import Resources
from memit.editors.fine_tuning import FineTuning
from memit.editors.memit import Memit
from memit.editors.rome import Rome
from memit.errors import InputError
from memit.evaluation.counterfact import prompts_of, score_prompts
from memit.generation import generate_texts
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel, load_model
from memit.requests import Record
from memit.weight_delta import WeightDelta
from tests import python
from tests.families import PREFIXES, save_model, tokenizers
from tests.reference import REQUESTS, ridged_moments

HYPERPARAMETERS = Hyperparameters(layers=(0, 1, 2), covariance_weight=5.0, evaluations=5)
BUDGET = 512


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LanguageModel, LanguageModel]:
    """A model in memory, and the same with room for a part of it."""
    place = tmp_path_factory.mktemp("model")
    sharded = loaded_in_part(request.param, place, 0.8)
    return load_model(place, device="cpu"), sharded


def loaded_in_part(family: str, place: Path, share: float) -> LanguageModel:
    """A model of a family, kept in `place`, with room for a share of its weights."""
    save_model(family, place)
    size = (place / "model.safetensors").stat().st_size
    return load_model(place, device="sharded", room={"cpu": int(share * size)})


def resources(lm: LanguageModel) -> Resources:
    moments = ridged_moments(lm, [0, 1, 2], BUDGET)
    return Resources(token_budget=BUDGET, prefixes=PREFIXES[:2], moments=moments, seed=3)


def edited(lm: LanguageModel, editor: Any) -> dict[str, Tensor]:
    delta = editor.edit(lm, REQUESTS, resources(lm))
    assert isinstance(delta, WeightDelta)
    return {name: change.dense() for name, change in delta.changes.items()}


def test_a_part_waits_on_disk(pair: tuple[LanguageModel, LanguageModel]) -> None:
    whole, sharded = pair
    assert not whole.is_offloaded
    assert sharded.is_offloaded
    absent = {layer for layer in range(4) if sharded.down_projection(layer).weight.is_meta}
    assert absent
    assert absent != {0, 1, 2, 3}
    for layer in range(4):
        assert torch.equal(sharded.weight(layer), whole.weight(layer))


@pytest.mark.parametrize("editor", [Memit(HYPERPARAMETERS), Rome(2, evaluations=5)])
def test_edits_are_the_same(pair: tuple[LanguageModel, LanguageModel], editor: Any) -> None:
    whole, sharded = pair
    before = [sharded.weight(layer).clone() for layer in range(4)]
    expected, found = edited(whole, editor), edited(sharded, editor)
    assert expected.keys() == found.keys()
    for name, delta in expected.items():
        assert delta.norm() > 0
        assert (found[name] - delta).norm() <= 1e-5 * delta.norm()
    for layer in range(4):
        assert torch.equal(sharded.weight(layer), before[layer])


def test_an_edit_is_felt_measured_and_taken_back(pair: tuple[LanguageModel, LanguageModel]) -> None:
    whole, sharded = pair
    delta = Memit(HYPERPARAMETERS).edit(whole, REQUESTS, resources(whole))
    records = [
        Record(case, request, paraphrase_prompts=(), neighborhood_prompts=("Ada lives in",))
        for case, request in enumerate(REQUESTS)
    ]

    def scores(lm: LanguageModel) -> Tensor:
        table = score_prompts(lm, prompts_of(records), token_budget=BUDGET)
        return torch.tensor(table["nll_new"].to_pylist())

    def texts(lm: LanguageModel) -> list[str]:
        prompts = ["The home"]
        return generate_texts(lm, prompts, total_tokens=9, top_k=5, seed=1, token_budget=BUDGET)

    unedited = scores(sharded)
    for lm in pair:
        delta.apply(lm)
    assert (scores(sharded) - scores(whole)).abs().max() < 1e-4
    assert (scores(sharded) - unedited).abs().max() > 0.1
    assert texts(sharded) == texts(whole)
    for lm in pair:
        delta.revert(lm)
    assert torch.equal(scores(sharded), unedited)


def test_no_more_than_a_block_is_brought_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the backward pass, whose graph would hold every block above the edited one."""
    lm = loaded_in_part("gpt2", tmp_path, 0.6)
    assert all(lm.down_projection(layer).weight.is_meta for layer in range(4))
    held: dict[int, int] = {}
    most = [0]
    read = OffloadedWeightsLoader.__getitem__

    def counted(loader: OffloadedWeightsLoader, key: str) -> Tensor:
        tensor = read(loader, key)
        number = next(numbers)
        held[number] = tensor.nbytes
        weakref.finalize(tensor.untyped_storage(), held.pop, number)
        most[0] = max(most[0], sum(held.values()))
        return tensor

    numbers = count()
    hyperparameters = Hyperparameters(layers=(0,), covariance_weight=5.0, evaluations=3)
    given = resources(lm)
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
    Memit(hyperparameters).edit(lm, REQUESTS, given)
    block = sum(parameter.nbytes for parameter in lm.blocks[3].parameters())
    assert 0.5 * block < most[0] < 1.5 * block


def test_what_cannot_train_there_says_so(pair: tuple[LanguageModel, LanguageModel]) -> None:
    _, sharded = pair
    with pytest.raises(InputError, match="fine-tuning needs its block's weights on a device"):
        FineTuning(3).edit(sharded, REQUESTS, resources(sharded))


PEAK = """
import os, resource, sys
import torch
from memit.language_model import load_model
from transformers import GPT2LMHeadModel

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def print_more(device, room):
    before = peak()  # a fork's own begins with what it has
    lm = load_model(sys.argv[1], device=device, dtype="float32", room=room)
    with torch.no_grad():
        lm.model(torch.ones(1, 2, dtype=torch.long))
    print(peak() - before, flush=True)

for device, room in (("cpu", None), ("sharded", {"cpu": int(sys.argv[2])})):
    if os.fork() == 0:  # each on its own, after imports that both share
        print_more(device, room)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model directory with weights of 200 MB, and their size in bytes."""
    place = tmp_path_factory.mktemp("large")
    tokenizer = tokenizers()["byte_level"]
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=768, n_layer=7, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place, sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count otherwise")
def test_weights_are_in_memory_once_at_most(large: tuple[Path, int]) -> None:
    place, size = large
    done = python("-c", PEAK, str(place), str(size // 3), check=True)
    whole, sharded = map(int, done.stdout.split())
    assert 0.9 * size < whole < 1.3 * size
    assert sharded < 0.7 * size
