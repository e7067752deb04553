"""What is known of the results in a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.command.parameters import ModelSection
from tasks.engine.results import MODEL_FILE, is_model_here


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
