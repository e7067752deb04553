"""The console script on a small model directory: what it says, does and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flows.command import cli, estimate
from flows.command import script as command
from flows.command.costs import Lengths
from memit.hyperparameters import preset
from memit.language_model import load_model
from tasks.engine.loaded_model import ModelFiles, ModelReference
from tasks.model import describe_model
from tests.families import families
from tests.integration.test_model_directory import content, make_delta


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and an edit of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    command.given_parameters.cache_clear()
    model, tokenizer = families()["gpt2"]()
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    make_delta(load_model("model", device="cpu"), tmp_path / "delta.safetensors")
    return tmp_path


def memit(*words: str) -> int:
    """Run a command; gives its exit status."""
    with pytest.raises(SystemExit) as exit_:
        command.reporting(lambda: cli.app(list(words)))
    return int(exit_.value.code or 0)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize(
    "name", ["run", "repro", "deploy", "check", "ask", "apply", "revert", "export"]
)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert memit("--help") == 0
    assert name in said(capsys)
    assert memit(name, "--help") == 0
    assert len(said(capsys)) > 150


def test_ask_shows_both_models(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert memit("ask", "[b]Paris", "--model", "model", "--delta", "delta.safetensors") == 0
    text = said(capsys)
    for part in ("[b]Paris", "unedited", "edited", "%"):
        assert part in text
    assert memit("ask", " ", "--model", "model", "--delta", "delta.safetensors") == 2
    long = "Paris " * 500
    assert memit("ask", long, "--model", "model", "--delta", "delta.safetensors") == 2
    assert "model" in said(capsys)


def test_apply_and_revert(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(place / "model")
    assert memit("apply", "model", "--delta", "delta.safetensors") == 0
    assert "memit-edits/0001" in said(capsys)
    assert content(place / "model") != before
    assert memit("revert", "model") == 0
    assert content(place / "model") == before
    assert memit("revert", "model") == 2
    assert memit("revert", "nowhere") != 0
    assert memit("apply", "model") == 2
    assert "artifacts/edit/delta.safetensors" in said(capsys)


def test_export_writes_a_model_that_anything_loads(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", "model", "--delta", "delta.safetensors")
    assert memit("export", "out/here", "--dtype", "bfloat16", *words) == 0
    memit("apply", "model", "--delta", "delta.safetensors")
    edited = load_model("model", device="cpu").model.state_dict()
    exported = load_model("out/here", dtype="bfloat16", device="cpu").model.state_dict()
    assert edited.keys() == exported.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, edited[name].to(torch.bfloat16))
    before = content(place / "out" / "here")
    capsys.readouterr()
    assert memit("export", "out/here", *words) == 2
    assert "out/here" in said(capsys)
    assert content(place / "out" / "here") == before
    assert [path.name for path in (place / "out").iterdir()] == ["here"]


def test_check_reads_counts_and_runs_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "params.yaml").write_text("edit:\n  layers: [1]\n")
    fact = {"subject": "Ada", "prompt": "{} lives in", "target": "Rome"}
    facts = place / "facts.jsonl"
    facts.write_text(json.dumps(fact))
    assert memit("check", "facts.jsonl") == 0
    text = said(capsys)
    assert "records │ 1" in text
    assert "contradictions │ none" in text
    assert "edited │ all" in text
    facts.write_text(json.dumps(fact) + "\n" + json.dumps({**fact, "target": "Oslo"}))
    assert memit("check", "facts.jsonl") == 2
    assert "facts.jsonl" in said(capsys)
    assert memit("check", "gone.jsonl") == 2
    assert "gone.jsonl" in said(capsys)
    assert not (place / ".cache").exists()


def test_check_says_that_a_sample_is_edited(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f'{{"subject": "{n}", "prompt": "{{}} lives in", "target": "Rome"}}' for n in "abc"]
    (place / "facts.jsonl").write_text("\n".join(lines))
    for count, status, words in ((2, 0, "edited │ 2, a sample"), (4, 2, "the count is 4, but 3")):
        (place / "params.yaml").write_text(f"requests:\n  count: {count}\n")
        command.given_parameters.cache_clear()
        assert memit("check", "facts.jsonl") == status
        assert words in said(capsys)


def test_check_counts_edits_that_will_be_weak(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = "statistics:\n  source: sampled\n"
    (place / "params.yaml").write_text(f"{sampled}edit:\n  layers: [1]\n")
    (place / "facts.jsonl").write_text(
        '{"subject": "a", "prompt": "{} lives in", "target": "Rome"}\n'
        '{"subject": "Ada", "prompt": "The home of {} is", "target": "Rome"}\n'
    )
    monkeypatch.setattr("flows.command.estimate.MODEL_FILE", place / "model" / "config.json")
    reference = ModelReference(
        directory="model",
        model=describe_model("local", "small", None, Path("model")),
        dtype="float32",
        device="cpu",
        threads=1,
    )
    monkeypatch.setattr("flows.command.estimate.open_model", lambda **_: reference)
    assert memit("check", "facts.jsonl") == 0
    text = said(capsys)
    assert "1 of 2 prompts" in text
    assert "2048 sampled tokens" in text
    assert "memory │ about" in text


def test_an_estimate_grows_with_the_job() -> None:
    files = ModelFiles(
        source="hub",
        id="EleutherAI/gpt-j-6b",
        revision="0" * 40,
        files={},
        architecture="GPTJForCausalLM",
        layers=28,
        width=4096,
        inner_width=16384,
        parameters=6_050_882_784,
    )
    reference = ModelReference(
        directory="/", model=files, dtype="bfloat16", device="cpu", threads=1
    )
    hyperparameters = preset(files.id, files.shape)
    small, large = (
        estimate.estimate_edit(files, hyperparameters, count, Lengths(8, 8), reference)
        for count in (10, 10_000)
    )
    assert large.seconds > 10 * small.seconds
    assert small.memory > 12e9
    assert 6 * 4 * 16384**2 < small.disk < large.disk < 40e9
