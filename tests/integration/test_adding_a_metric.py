"""`docs/adding-metrics-and-data.md`, followed to the letter."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import yaml

from flows.command.parameters import Parameters
from memit.errors import InputError
from memit.evaluation.own_metrics import own_metrics
from memit.requests import read_counterfact
from tasks.engine.loaded_model import loaded
from tasks.evaluation import OwnMetric, measure_piece
from tests import ROOT
from tests.integration.small_model import small_model

PAGE = (ROOT / "docs" / "adding-metrics-and-data.md").read_text(encoding="utf-8")
METRIC, DATA = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def place(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the page asks for."""
    names = re.findall(r"Write this to `([^`]+)`", PAGE)
    for name, text in zip(names, (METRIC, DATA), strict=True):
        (project / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(project))
    return project


def test_the_examples_are_one_file_each(place: Path) -> None:
    subprocess.run(
        [sys.executable, "my_data.py"], check=True, cwd=place, env={"PYTHONPATH": str(ROOT)}
    )
    settings: dict = {}
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        settings |= yaml.safe_load(block)
    parameters = Parameters.model_validate_json(json.dumps(settings))
    records = read_counterfact(str(parameters.requests.path))
    assert [record.request.target_true for record in records] == ["Paris", "Rome", "Oslo"]
    reference = small_model(place / "model")
    path = str(parameters.evaluation.metrics)
    (name,) = own_metrics(path)
    metric = OwnMetric(path, name)
    made = measure_piece.uncached(records, metric, reference, None, 256)
    with loaded(reference) as lm:
        values = parquet.read_table(made.checked())["value"].to_pylist()
        assert values == metric.measure(lm, records, 256)
    key = metric.cache_key
    (place / path).write_text(METRIC + "\n# another content\n", encoding="utf-8")
    with pytest.raises(Exception, match="was changed"):
        assert metric.cache_key != key


def test_files_without_metrics_are_refused(tmp_path: Path) -> None:
    for name, text in (
        ("empty_metrics.py", "x = 1"),
        ("broken_metrics.py", "def"),
        ("low_metrics.py", "def heavily_low(lm, records, budget): return [0.0]"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=name):
            own_metrics(str(tmp_path / name))
    with pytest.raises(InputError, match=r"absent\.py"):
        own_metrics(str(tmp_path / "absent.py"))
