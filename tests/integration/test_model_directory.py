"""Edits on ordinary model directories: in, out, in layers, and back to the very bytes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memit.errors import InputError, IntegrityError
from memit.language_model import LanguageModel, load_model
from memit.weight_delta import LowRank, WeightDelta, base_digests
from tasks import model_directory
from tasks.model_directory import applied_edits, apply_edit, revert_edit
from tests.families import families

FAMILIES = ("gpt2", "llama", "gptj", "gpt_neox")


def build(place: Path, family: str = "gpt2", dtype: torch.dtype = torch.float32) -> Path:
    model, tokenizer = families()[family]()
    model.to(dtype).save_pretrained(place, max_shard_size="60KB")  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(place)
    return place


def make_delta(lm: LanguageModel, path: Path, seed: int = 0) -> Path:
    """A random change of layers 1 and 2, made for the weights that stand in ``lm``."""
    generator = torch.Generator().manual_seed(seed)
    names = [lm.weight_name(layer) for layer in (1, 2)]
    changes = {}
    for name in names:
        rows, columns = lm.parameter(name).shape
        left = torch.randn(rows, 3, generator=generator) * 0.1
        changes[name] = LowRank(left, torch.randn(columns, 3, generator=generator) * 0.1)
    WeightDelta(changes, {"base": base_digests(lm, names), "model": lm.name}).save(path)
    return path


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_goes_in_and_comes_out_to_the_byte(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    directory = build(tmp_path / "model", family, dtype)
    before = content(directory)
    lm = load_model(directory, dtype="float32", device="cpu")
    delta = make_delta(lm, tmp_path / "delta.safetensors")
    apply_edit(directory, delta)
    assert content(directory) != before
    edited = load_model(directory, dtype="float32", device="cpu")
    WeightDelta.load(delta).apply(lm)
    for name in WeightDelta.load(delta).changes:
        assert torch.equal(edited.parameter(name), lm.parameter(name).to(dtype).float())
    assert len(applied_edits(directory)) == 1
    revert_edit(directory)
    assert content(directory) == before
    assert list((directory / "memit-edits").iterdir()) == []


def test_edits_come_off_last_in_first_out(tmp_path: Path) -> None:
    directory = build(tmp_path / "model")
    states = [content(directory)]
    for seed in range(3):
        lm = load_model(directory, device="cpu")
        apply_edit(directory, make_delta(lm, tmp_path / f"{seed}.safetensors", seed))
        states.append(content(directory))
    assert [folder.name for folder in applied_edits(directory)] == ["0001", "0002", "0003"]
    with pytest.raises(IntegrityError, match="made for other weights"):
        apply_edit(directory, tmp_path / "0.safetensors")
    for state in reversed(states[:-1]):
        revert_edit(directory)
        assert content(directory) == state
    with pytest.raises(InputError, match="nothing to revert"):
        revert_edit(directory)


def test_what_links_to_the_weights_keeps_its_content(tmp_path: Path) -> None:
    directory = build(tmp_path / "model")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in directory.glob("*.safetensors"):
        os.link(path, elsewhere / path.name)
    before = content(elsewhere)
    apply_edit(directory, make_delta(load_model(directory, device="cpu"), tmp_path / "d"))
    assert content(elsewhere) == before


def test_an_interrupted_apply_is_refused_and_reverted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = build(tmp_path / "model")
    before = content(directory)
    delta = make_delta(load_model(directory, device="cpu"), tmp_path / "d")
    write, written = model_directory.write_file, []

    def stop_after_one(path: Path, fill):
        if path.parent == directory:
            if written:
                raise KeyboardInterrupt
            written.append(path)
        return write(path, fill)

    monkeypatch.setattr(model_directory, "write_file", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        apply_edit(directory, delta)
    monkeypatch.undo()
    assert content(directory) != before
    with pytest.raises(InputError, match="interrupted"):
        apply_edit(directory, delta)
    revert_edit(directory)
    assert content(directory) == before


def test_weights_that_were_changed_since_are_left_alone(tmp_path: Path) -> None:
    directory = build(tmp_path / "model")
    delta = make_delta(load_model(directory, device="cpu"), tmp_path / "d")
    apply_edit(directory, delta)
    name = next(iter(WeightDelta.load(delta).changes))
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] += 1
            save_file(tensors, path, {"format": "pt"})
    before = content(directory)
    with pytest.raises(IntegrityError, match="changed after the edit"):
        revert_edit(directory)
    assert content(directory) == before


def test_a_damaged_backup_is_not_put_back(tmp_path: Path) -> None:
    directory = build(tmp_path / "model")
    delta = make_delta(load_model(directory, device="cpu"), tmp_path / "d")
    folder = apply_edit(directory, delta)
    kept = folder / "base.safetensors"
    damaged = bytearray(kept.read_bytes())
    damaged[-3] ^= 1
    kept.write_bytes(damaged)
    before = content(directory)
    with pytest.raises(IntegrityError, match="damaged"):
        revert_edit(directory)
    assert content(directory) == before


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    directory = build(tmp_path / "model")
    delta = make_delta(load_model(directory, device="cpu"), tmp_path / "d")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no safetensors weights"):
        apply_edit(tmp_path / "empty", delta)
    other = build(tmp_path / "other", "llama")
    with pytest.raises(InputError, match="belongs to another model"):
        apply_edit(other, delta)
    shard = next(directory.glob("*.safetensors"))
    shutil.copy(shard, tmp_path / "kept")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(IntegrityError, match="no safetensors file"):
        apply_edit(directory, delta)
    assert not (directory / "memit-edits").exists()
