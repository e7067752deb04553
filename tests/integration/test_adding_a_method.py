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
from memit.evaluation.counterfact import prompts_of, score_prompts
from memit.hyperparameters import Hyperparameters
from memit.requests import Record
from memit.second_moment import SecondMoment
from tasks.compare import make_methods
from tests.reference import PREFIXES, REQUESTS, build, reference

torch.set_num_threads(1)
(method,) = make_methods(["NAME"], {"NAME": SETTINGS}, Hyperparameters((1,), 1.0), "gpt2", 4)
assert type(method.editor) is known_editors()["NAME"]
assert vars(method.editor).items() >= SETTINGS.items(), method.editor

lm = build("gpt2")
before = {name: value.clone() for name, value in lm.model.state_dict().items()}
told = []
requests = REQUESTS[:3]
moments = {1: SecondMoment(reference("gpt2").covariances[1] * 100, 100)}
given = Resources(1024, prefixes=PREFIXES, moments=moments, progress=told.append)
edit = method.editor.edit(lm, requests, given)
assert sum(told) == 3

def same():
    return all(torch.equal(lm.model.state_dict()[name], value) for name, value in before.items())

def nll():
    records = [Record(number, request) for number, request in enumerate(requests)]
    return score_prompts(lm, prompts_of(records), token_budget=1024)["nll_new"].to_pylist()

assert same()
unedited = nll()
edit.apply(lm)
assert sum(nll()) < sum(unedited), (nll(), unedited)
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


def _settings(name: str) -> dict[str, object]:
    """A method's settings in the page's examples of `params.yaml`."""
    for example in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        compare = Parameters.model_validate_json(json.dumps(yaml.safe_load(example))).compare
        if name in compare.settings:
            assert name in compare.methods
            return dict(compare.settings[name])
    raise AssertionError(f"the page has no settings of {name}")


@pytest.mark.parametrize("name", ["alphaedit", "hebb"])
def test_an_example_is_one_file_that_edits_and_is_compared(copy: Path, name: str):
    found = re.search(rf"`(memit/editors/{name}\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found
    file, attempt = copy / found[1], TRY.replace("NAME", name)
    attempt = attempt.replace("SETTINGS", repr(_settings(name)))
    if file.exists():
        assert file.read_text(encoding="utf-8") == found[2]
    else:
        tried = _python(copy, attempt)
        assert tried.returncode != 0
        assert f"compare.methods names {name}, which is unknown: there are unedited" in tried.stderr
    file.write_text(found[2], encoding="utf-8")
    tried = _python(copy, attempt)
    assert tried.returncode == 0, tried.stderr
    assert tried.stdout.strip() == f"ok {name}"
