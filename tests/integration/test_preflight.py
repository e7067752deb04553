"""What would stop an experiment later is found before it starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.command import checks as preflight
from flows.command.checks import check_inputs
from flows.command.parameters import Parameters, check_parameters
from memit.errors import (
    ConflictError,
    InputError,
    IntegrityError,
    MemitError,
    ModelStructureError,
    ResourceError,
    UnreachableError,
)
from memit.files.digests import file_sha256
from tasks.engine import workers as runners
from tests.families import families

FACT = {"subject": "Ada", "prompt": "{} lives in", "target": "Rome"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model, a corpus and facts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    model, tokenizer = families()["gpt2"]()
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("corpus.txt").write_text("Some text.\n" * 9)
    write_facts(FACT)
    return tmp_path


def write_facts(*facts: dict[str, Any]) -> None:
    Path("facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))


def parameters(**sections: dict[str, Any]) -> Parameters:
    tree: dict[str, dict[str, Any]] = {
        "model": {"source": "local", "path": "model"},
        "requests": {"source": "facts", "path": "facts.jsonl", "count": None},
        "statistics": {"source": "file", "path": "corpus.txt"},
        "edit": {"layers": [1, 2]},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return check_parameters(tree)


def test_good_input_passes(place: Path) -> None:
    check_inputs(parameters())
    check_inputs(Parameters())
    assert not (place / ".cache").exists()


@pytest.mark.parametrize(
    ("facts", "kind", "sentence"),
    [
        ([FACT, {**FACT, "target": "Oslo"}], ConflictError, "contradict each other"),
        ([{**FACT, "target": " "}], InputError, "new object is empty"),
        ([{**FACT, "subject": ""}], InputError, "subject is empty"),
        ([{**FACT, "prompt": "she lives in"}], InputError, "needs exactly one"),
        ([{**FACT, "prompt": "{} and {}"}], InputError, "has 2 '{}'"),
        ([{**FACT, "targte": "x"}], InputError, "'targte' is not known"),
        ([{"subject": "Ada", "prompt": "{} is"}], InputError, "'target' is missing"),
        ([], InputError, "no records"),
    ],
)
def test_facts_that_cannot_be_used(
    place: Path, facts: list[dict[str, Any]], kind: type[MemitError], sentence: str
) -> None:
    write_facts(*facts)
    with pytest.raises(kind) as caught:
        check_inputs(parameters())
    assert sentence in str(caught.value)
    assert "facts.jsonl" in str(caught.value)


def test_a_file_that_is_missing_truncated_or_another(place: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl does not exist"):
        check_inputs(parameters(requests={"path": "gone.jsonl"}))
    digest = file_sha256("facts.jsonl")
    check_inputs(parameters(requests={"sha256": digest}))
    with open("facts.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(IntegrityError, match=r"facts\.jsonl has the sha256"):
        check_inputs(parameters(requests={"sha256": digest}))
    Path("facts.jsonl").write_text(json.dumps(FACT)[:30])
    with pytest.raises(InputError, match="not whole JSON"):
        check_inputs(parameters())


def test_more_records_than_there_are(place: Path) -> None:
    with pytest.raises(InputError, match="count is 5"):
        check_inputs(parameters(requests={"count": 5}))


def test_a_corpus_that_is_not_there(place: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt does not exist"):
        check_inputs(parameters(statistics={"path": "gone.txt"}))


def test_a_layer_that_the_model_does_not_have(place: Path) -> None:
    with pytest.raises(InputError, match=r"edit\.layers names layer 4, but model has 4 blocks"):
        check_inputs(parameters(edit={"layers": [3, 4]}))


def test_a_directory_that_holds_no_model(place: Path) -> None:
    with pytest.raises(InputError, match="gone is no directory"):
        check_inputs(parameters(model={"path": "gone"}))
    (place / "empty").mkdir()
    with pytest.raises(InputError, match="does not hold a causal language model"):
        check_inputs(parameters(model={"path": "empty"}))
    shutil.copytree("model", "encoder")
    config = json.loads(Path("encoder/config.json").read_text())
    Path("encoder/config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises((InputError, ModelStructureError)):
        check_inputs(parameters(model={"path": "encoder"}))


def test_a_device_that_is_not_there(place: Path) -> None:
    with pytest.raises(InputError, match="'cuda:63', which torch does not find"):
        check_inputs(parameters(model={"device": "cuda:63"}))


def test_a_sharded_model_needs_no_gpu_and_may_exceed_the_memory(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_inputs(parameters(model={"device": "sharded"}))
    monkeypatch.setattr(preflight, "_memory", lambda _: (500_000, "this machine's memory"))
    with pytest.raises(ResourceError, match=r"model\.device: sharded"):
        check_inputs(parameters())
    check_inputs(parameters(model={"device": "sharded"}))


def test_workers_that_are_not_installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_inputs(parameters(runner={"kind": "ray"}))
    monkeypatch.setattr(runners, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"runner\.kind is ray, .* pip install .*\[ray\]"):
        check_inputs(parameters(runner={"kind": "ray"}))


def test_a_hub_that_does_not_answer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = {"source": "hub", "id": "nobody/nothing", "path": None}
    with pytest.raises(UnreachableError, match="hub cannot be reached for nobody/nothing"):
        check_inputs(parameters(model={**hub, "revision": "main"}))
    with pytest.raises(UnreachableError, match="hub cannot be reached for nobody/nothing"):
        check_inputs(parameters(model={**hub, "revision": "0" * 40}))


def test_a_job_that_does_not_fit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
        check_inputs(parameters(statistics={"documents": 500}))
        with pytest.raises(ResourceError, match=r"raise statistics\.documents_per_shard"):
            check_inputs(parameters(statistics={"documents": 50_000}))
        patch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
        with pytest.raises(ResourceError, match="make room, or edit fewer layers"):
            check_inputs(parameters(statistics={"documents": 500}))
    monkeypatch.setattr(preflight, "_memory", lambda _: (100_000, "this machine's memory"))
    with pytest.raises(ResourceError, match="use a smaller dtype"):
        check_inputs(parameters())
