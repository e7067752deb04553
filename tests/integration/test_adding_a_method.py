"""`docs/adding-a-method.md`, followed to the letter in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.command.parameters import Parameters
from tests import ROOT

PAGE = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")

TRY = """
import torch
from memit.editors import known_editors
from memit.editors.base import Resources
from memit.evaluation.counterfact import prompts_of, score_prompts, summarise
from memit.hyperparameters import Hyperparameters
from memit.requests import Record
from tasks.compare import make_methods
from tests.reference import REQUESTS, build

torch.set_num_threads(1)
(method,) = make_methods(["hebb"], {"hebb": SETTINGS}, Hyperparameters((1,), 1.0), "gpt2", 4)
assert type(method.editor) is known_editors()["hebb"]
assert method.editor.strength == SETTINGS["strength"], method.editor

lm = build("gpt2")
before = {name: value.clone() for name, value in lm.model.state_dict().items()}
told = []
requests = REQUESTS[:3]
edit = method.editor.edit(lm, requests, Resources(1024, progress=told.append))
assert sum(told) == 3

def same():
    return all(torch.equal(lm.model.state_dict()[name], value) for name, value in before.items())

def nll():
    records = [Record(number, request) for number, request in enumerate(requests)]
    return score_prompts(lm, prompts_of(records), token_budget=1024)["nll_new"].to_pylist()

assert same()
unedited = nll()
edit.apply(lm)
assert all(now < then for now, then in zip(nll(), unedited)), (nll(), unedited)
edit.revert(lm)
assert same()
print("ok", edit.provenance["method"])
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages and the tests' own models, in a directory of their own."""
    for name in ("memit", "tasks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def _python(place: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_example_is_one_file_that_edits_and_is_compared(copy: Path):
    path = re.search(r"Write this to `([^`]+)`", PAGE)
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    settings = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert path
    assert code
    assert settings
    parameters = yaml.safe_load(settings[1])
    compare = Parameters.model_validate_json(json.dumps(parameters)).compare
    assert "hebb" in compare.methods
    (copy / path[1]).write_text(code[1], encoding="utf-8")
    tried = _python(copy, TRY.replace("SETTINGS", repr(compare.settings["hebb"])))
    assert tried.returncode == 0, tried.stderr
    assert tried.stdout.strip() == "ok hebb"


def test_without_the_file_it_is_refused_by_name(copy: Path):
    tried = _python(copy, TRY.replace("SETTINGS", "{}"))
    assert tried.returncode != 0
    assert "compare.methods names hebb, which is unknown: there are unedited" in tried.stderr
