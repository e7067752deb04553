"""What the steps mend and serac make of params.yaml and of a corpus."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet as parquet
import pytest

from flows.command.parameters import Parameters, check_parameters
from flows.compare import learning_steps
from memit.editors.settings import MendSettings, mend_preset, serac_preset
from memit.language_model import LanguageModel
from memit.requests import write_records
from tasks.engine.artifacts import describe
from tasks.mend import Continuations, _examples, beginnings_of
from tests.families import families
from tests.unit.memit.editors.test_mend import make_records


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(*families()["gpt2"](), name="gpt2")


def test_sections_override_presets_where_they_say_something() -> None:
    assert Parameters().mend_settings("synthetic") == mend_preset("synthetic")
    changed = check_parameters({"mend": {"steps": 7, "seed": 3}}).mend_settings("gpt-j-6b")
    assert changed == MendSettings(steps=7, seed=3)
    assert changed.rank == 1_920


def test_scratch_stands_for_a_model_that_is_made_here() -> None:
    preset = serac_preset("EleutherAI/gpt-neox-20b")
    assert preset.counterfactual == "EleutherAI/pythia-160m"
    parameters = check_parameters({"serac": {"counterfactual": "scratch"}})
    changed = parameters.serac_settings("EleutherAI/gpt-neox-20b")
    assert changed.counterfactual is None
    assert changed.encoder == preset.encoder


@pytest.mark.parametrize(
    ("methods", "steps"), [(["memit"], []), (["serac", "memit", "mend"], ["mend", "serac"])]
)
def test_only_methods_that_are_compared_must_have_learnt(methods, steps) -> None:
    parameters = check_parameters({"compare": {"methods": methods}})
    assert learning_steps(parameters) == steps


def test_records_that_are_set_aside_become_examples(lm: LanguageModel, tmp_path) -> None:
    records = make_records()
    write_records(records, tmp_path / "records.json")
    examples = _examples(lm, describe(tmp_path / "records.json"))
    assert [example.edit[0] for example in examples] == [r.request.text for r in records]
    assert all(example.unrelated for example in examples)


def test_texts_go_on_as_the_model_samples(lm: LanguageModel, tmp_path) -> None:
    texts = ["Paul Smith was born in the city of Rome.", "word", "Anna lives in São Paulo now."] * 3
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "texts.parquet")
    source = Continuations(describe(tmp_path / "texts.parquet"), count=6, tokens=4, seed=1)
    examples = _examples(lm, source)
    beginnings = beginnings_of(texts[:6])
    assert {example.edit[0] for example in examples} <= set(beginnings)
    assert len(examples) >= 3
    assert all(example.edit[1] and not example.key for example in examples)
    assert _examples(lm, source) == examples


def test_beginnings_are_half_a_text_and_never_long() -> None:
    assert beginnings_of(["a b c d", "one", "x " * 200]) == ["a b", " ".join(["x"] * 40)]
