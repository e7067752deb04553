"""`docs/adding-a-method.md`, followed to the letter."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flows.command.parameters import Parameters
from memit import editors
from memit.editors import base, known_editors
from memit.editors.base import Resources
from memit.errors import InputError
from memit.evaluation.counterfact import prompts_of, score_prompts
from memit.hyperparameters import Hyperparameters
from memit.requests import Record
from memit.second_moment import SecondMoment
from tasks.compare import make_methods
from tasks.edit import Method
from tests import ROOT
from tests.reference import PREFIXES, REQUESTS, build, reference

PAGE = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")


@pytest.fixture
def more_editors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files count as files of `memit/editors/`."""
    monkeypatch.setattr(editors, "__path__", [*editors.__path__, str(tmp_path)])
    monkeypatch.setattr(base, "EDITORS", dict(known_editors()))
    return tmp_path


def _settings(name: str) -> dict[str, Any]:
    """A method's settings in the page's examples of `params.yaml`."""
    for example in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        compare = Parameters.model_validate_json(json.dumps(yaml.safe_load(example))).compare
        if name in compare.settings:
            assert name in compare.methods
            return dict(compare.settings[name])
    raise AssertionError(f"the page has no settings of {name}")


def _method(name: str) -> Method:
    (method,) = make_methods([name], {name: _settings(name)}, Hyperparameters((1,), 1.0), "gpt2", 4)
    return method


@pytest.mark.parametrize("name", ["alphaedit", "hebb"])
def test_an_example_is_one_file_that_edits_and_is_compared(more_editors: Path, name: str) -> None:
    found = re.search(rf"`(memit/editors/{name}\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found
    if (ROOT / found[1]).exists():
        assert (ROOT / found[1]).read_text(encoding="utf-8") == found[2]
    else:
        with pytest.raises(InputError, match=f"{name}, which is unknown: there are unedited"):
            _method(name)
        (more_editors / f"{name}.py").write_text(found[2], encoding="utf-8")
    editor = _method(name).editor
    assert type(editor) is known_editors()[name]
    assert vars(editor).items() >= _settings(name).items()

    lm, requests, edited = build("gpt2"), REQUESTS[:3], list[int]()
    records = [Record(number, request) for number, request in enumerate(requests)]
    moments = {1: SecondMoment(reference("gpt2").covariances[1] * 100, 100)}
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}

    def is_unedited() -> bool:
        return all(torch.equal(lm.model.state_dict()[key], before[key]) for key in before)

    def loss() -> float:
        return sum(score_prompts(lm, prompts_of(records), token_budget=1024)["nll_new"].to_pylist())

    given = Resources(1024, prefixes=PREFIXES, moments=moments, progress=edited.append)
    unedited, edit = loss(), editor.edit(lm, requests, given)
    assert sum(edited) == 3
    assert is_unedited()
    edit.apply(lm)
    assert loss() < unedited
    edit.revert(lm)
    assert is_unedited()
    assert edit.provenance["method"] == name
