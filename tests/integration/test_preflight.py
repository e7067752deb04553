"""The machine, the hub and the workers are checked before an experiment starts."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from flows.command.checks import check_comparison, check_inputs
from flows.command.parameters import Parameters, check_parameters
from memit.errors import InputError, ResourceError, UnreachableError
from tasks.engine import workers as runners
from tests.families import save_model
from tests.integration.bad_input import FACT, GOOD


@pytest.fixture
def place(project: Path) -> Path:
    """A directory with a model, a corpus and facts."""
    save_model("gpt2", "my-net")
    Path("corpus.txt").write_text("Some text.\n" * 9)
    Path("facts.jsonl").write_text(json.dumps(FACT))
    return project


def parameters(**sections: dict[str, Any]) -> Parameters:
    tree = {name: dict(values) for name, values in GOOD.items()}
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return check_parameters(tree)


def test_good_input_passes(place: Path) -> None:
    check_inputs(parameters())
    check_inputs(Parameters())
    assert not (place / ".cache").exists()


def test_settings_that_nobody_has_checked_are_told_once(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for check in (check_inputs, check_comparison):
        check(parameters())
        assert capsys.readouterr().err.count("settings:") == 1


def test_a_sharded_model_needs_no_gpu_and_may_exceed_the_memory(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_inputs(parameters(model={"device": "sharded"}))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=500_000))
    with pytest.raises(ResourceError, match=r"model\.device: sharded"):
        check_inputs(parameters())
    check_inputs(parameters(model={"device": "sharded"}))


def test_workers_that_are_not_installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_inputs(parameters(runner={"kind": "ray"}))
    monkeypatch.setattr(runners, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"runner\.kind"):
        check_inputs(parameters(runner={"kind": "ray"}))


def test_a_hub_that_does_not_answer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = {"source": "hub", "id": "nobody/nothing", "path": None}
    for revision in ("main", "0" * 40):
        with pytest.raises(UnreachableError, match="nobody/nothing"):
            check_inputs(parameters(model={**hub, "revision": revision}))


def test_a_job_that_does_not_fit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    check_inputs(parameters(statistics={"documents": 500}))
    with pytest.raises(ResourceError, match=r"statistics\.documents_per_shard"):
        check_inputs(parameters(statistics={"documents": 50_000}))


def test_texts_that_the_model_cannot_write(place: Path) -> None:
    sampled = {"source": "sampled", "path": None}
    check_inputs(parameters(statistics=sampled))
    for wrong, named in (({"tokens": 100}, "singular"), ({"held_out": "no.txt"}, "held_out")):
        with pytest.raises(InputError, match=named):
            check_inputs(parameters(statistics=sampled | wrong))
        with pytest.raises(InputError, match=named):
            check_inputs(check_parameters({"statistics": {"source": "sampled"} | wrong}))
    Path("no.txt").write_text("\n\n")
    with pytest.raises(InputError, match="no text"):
        check_inputs(parameters(statistics=sampled | {"held_out": "no.txt"}))
    settings = json.loads(Path("my-net/tokenizer_config.json").read_text())
    special = {"bos_token": None, "eos_token": None}
    Path("my-net/tokenizer_config.json").write_text(json.dumps(settings | special))
    Path("my-net/special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="begins or ends"):
        check_inputs(parameters(statistics=sampled))
