"""The settings of MEND and SERAC, and the examples that MEND learns from."""

from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet

from flows.command.parameters import check_parameters
from memit.editors.settings import MendSettings, SeracSettings
from tasks.engine.artifacts import describe
from tasks.mend import Continuations, _examples, beginnings_of
from tests.reference import build


def test_sections_override_defaults() -> None:
    changed = check_parameters({"mend": {"steps": 7, "seed": 3}}).mend_settings
    assert changed == MendSettings(steps=7, seed=3)
    assert changed.rank == 1_920


def test_scratch_means_a_model_that_is_made_here() -> None:
    changed = check_parameters({"serac": {"counterfactual": "scratch"}}).serac_settings
    assert changed == SeracSettings(counterfactual=None)


def test_texts_go_on_as_the_model_samples(tmp_path: Path) -> None:
    lm = build("gpt2")
    texts = ["Paul Smith was born in the city of Rome.", "word", "Anna lives in São Paulo now."] * 3
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "texts.parquet")
    source = Continuations(describe(tmp_path / "texts.parquet"), count=6, tokens=4, seed=1)
    examples = _examples(lm, source)
    beginnings = beginnings_of(texts[:6])
    assert {example.edit[0] for example in examples} <= set(beginnings)
    assert len(examples) >= 3
    assert all(example.edit[1] and not example.key for example in examples)
    assert _examples(lm, source) == examples


def test_beginnings_are_half_a_text_of_at_most_40_words() -> None:
    assert beginnings_of(["a b c d", "one", "x " * 200]) == ["a b", " ".join(["x"] * 40)]
