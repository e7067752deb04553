"""What estimates rest on: the model of the last run, and the speed of the device."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.command.estimate import speed
from flows.command.parameters import ModelSection
from memit.language_model import DTYPES
from tasks.engine.loaded_model import ModelFiles, ModelReference
from tasks.engine.results import MODEL_FILE, is_model_here

SIZES: dict[str, Any] = {"layers": 1, "width": 1, "inner_width": 1, "parameters": 1}


def test_the_model_of_the_last_run_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = ModelSection(source="local", path="models/mine/")
    others = (
        ModelSection(source="local", path="models/other"),
        ModelSection(source="hub", id="somebody/mine"),
        ModelSection(source="synthetic"),
    )
    assert not is_model_here(here.source, here.name)
    MODEL_FILE.parent.mkdir(parents=True)
    MODEL_FILE.write_text(json.dumps({"source": "local", "id": "mine"}))
    assert is_model_here(here.source, here.name)
    assert not any(is_model_here(other.source, other.name) for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_speed_of_every_dtype_is_measured(dtype: str) -> None:
    files = ModelFiles(source="hub", id="", revision=None, files={}, architecture="", **SIZES)
    model = ModelReference(directory="", model=files, dtype=dtype, device="cpu", threads=1)
    assert speed(model) > 0
