"""Edits on ordinary model directories: in, out, in layers, and back to the very bytes."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from memit import model_directory
from memit.errors import InputError, IntegrityError
from memit.language_model import load_model
from memit.model_directory import applied_edits, apply_edit, edit_status, revert_edit
from memit.model_files import directory_digests, weight_files
from memit.weight_delta import WeightDelta
from tasks.model import check_weights
from tests.families import families
from tests.integration.small_model import make_delta

FAMILIES = ("gpt2", "llama", "gptj", "gpt_neox")


def build(place: Path, family: str = "gpt2", dtype: torch.dtype = torch.float32) -> Path:
    model, tokenizer = families()[family]()
    model.to(dtype).save_pretrained(place, max_shard_size="60KB")  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory."""
    return build(tmp_path / "model")


@pytest.fixture
def delta(directory: Path, tmp_path: Path) -> Path:
    """An edit of it."""
    return make_delta(load_model(directory, device="cpu"), tmp_path / "delta.safetensors")


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


def test_the_same_edit_is_not_applied_twice(directory: Path, delta: Path) -> None:
    folder = apply_edit(directory, delta)
    edited = content(directory)
    assert apply_edit(directory, delta) == folder
    assert content(directory) == edited
    assert applied_edits(directory) == [folder]


def test_what_is_written_is_as_readable_as_the_umask_lets_it(
    tmp_path: Path, directory: Path, delta: Path
) -> None:
    apply_edit(directory, delta)
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    kept = directory / "memit-edits" / "0001"
    edited = json.loads((kept / "edit.json").read_text())["files"]
    written = [delta, *kept.iterdir(), *(directory / name for name in edited)]
    assert {path.stat().st_mode for path in written} == {wanted}


def test_edits_come_off_last_in_first_out(tmp_path: Path, directory: Path) -> None:
    states = [content(directory)]
    for seed in range(3):
        lm = load_model(directory, device="cpu")
        apply_edit(directory, make_delta(lm, tmp_path / f"{seed}.safetensors", seed))
        states.append(content(directory))
    assert [folder.name for folder in applied_edits(directory)] == ["0001", "0002", "0003"]
    with pytest.raises(IntegrityError):
        apply_edit(directory, tmp_path / "0.safetensors")
    for state in reversed(states[:-1]):
        revert_edit(directory)
        assert content(directory) == state
    with pytest.raises(InputError):
        revert_edit(directory)


def one_file(directory: Path) -> None:
    """The weights in one file, as small models have them."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    for path in directory.glob("model*.safetensors*"):
        path.unlink()
    model.save_pretrained(directory)


def backups(directory: Path) -> None:
    """Copies beside the weights, and formats of other programs."""
    (directory / "original").mkdir()
    for path in sorted(directory.glob("*.safetensors")):
        for name in (f"a_{path.name}", f"z_{path.name}", f"original/{path.name}"):
            shutil.copy(path, directory / name)
    for name in ("model.fp16", "consolidated", "adapter_model", "original", "model_backup"):
        shutil.copy(path, directory / f"{name}.safetensors")
    index = {"weight_map": {"a": "gone.safetensors"}}
    (directory / "consolidated.safetensors.index.json").write_text(json.dumps(index))


def backups_of_one_file(directory: Path) -> None:
    """The same beside one file."""
    one_file(directory)
    backups(directory)


def shards_beside_one_file(directory: Path) -> None:
    """Weights in one file and, left from before, in several: the one file is read."""
    kept = {path: path.read_bytes() for path in directory.glob("model*")}
    one_file(directory)
    for path, data in kept.items():
        path.write_bytes(data)


def one_file_of_another_name(directory: Path) -> None:
    """A configuration that names the file."""
    one_file(directory)
    shutil.copy(directory / "model.safetensors", directory / "mine.safetensors")
    config = json.loads((directory / "config.json").read_text())
    named = {**config, "transformers_weights": "mine.safetensors"}
    (directory / "config.json").write_text(json.dumps(named))


LAYOUTS = (one_file, backups, backups_of_one_file, shards_beside_one_file, one_file_of_another_name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_that_are_loaded_are_edited_and_no_others(
    tmp_path: Path, layout: Callable[[Path], None], directory: Path
) -> None:
    layout(directory)
    lm = load_model(directory, device="cpu")
    before = content(directory)
    delta = make_delta(lm, tmp_path / "delta.safetensors")
    folder = apply_edit(directory, delta)
    changed = {name for name, data in content(directory).items() if data != before[name]}
    assert changed == set(json.loads((folder / "edit.json").read_text())["files"])
    assert changed <= set(weight_files(directory))
    edited = load_model(directory, device="cpu")
    WeightDelta.load(delta).apply(lm)
    for name in WeightDelta.load(delta).changes:
        assert torch.equal(edited.parameter(name), lm.parameter(name))
    revert_edit(directory)
    assert content(directory) == before


def test_what_is_not_loaded_is_neither_checked_nor_part_of_the_model(directory: Path) -> None:
    before = directory_digests(directory)
    (directory / "model_backup.safetensors").write_text("no weights at all")
    (directory / "consolidated.safetensors").symlink_to("nowhere")
    check_weights(directory)
    assert directory_digests(directory) == before
    shard = sorted(directory.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes() + b" ")
    assert directory_digests(directory) != before


@pytest.mark.parametrize(
    "index",
    [
        [],
        *(
            {"weight_map": wrong}
            for wrong in (["a"], {"a": "../o.safetensors"}, {"a": "/etc/passwd"}, {})
        ),
    ],
)
def test_an_index_of_something_else_is_refused(index: object, directory: Path, delta: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=str(directory)):
        apply_edit(directory, delta)
    with pytest.raises(InputError, match=str(directory)):
        check_weights(directory)


@pytest.mark.parametrize("prefix", ["", "without its prefix"])
def test_a_name_in_two_places_is_refused(prefix: str, directory: Path, delta: Path) -> None:
    name = next(iter(WeightDelta.load(delta).changes))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    where = directory / index["weight_map"][name]
    other = next(path for path in directory.glob("model-*.safetensors") if path != where)
    twice = name.partition(".")[2] if prefix else name
    save_file({**load_file(other), twice: load_file(where)[name]}, other, {"format": "pt"})
    before = content(directory)
    with pytest.raises(IntegrityError):
        apply_edit(directory, delta)
    assert content(directory) == before
    assert not (directory / "memit-edits").exists()


def test_an_edit_comes_out_of_the_files_that_it_was_put_in(
    tmp_path: Path, directory: Path, delta: Path
) -> None:
    before = content(directory)
    apply_edit(directory, delta)
    edited = load_model(directory, device="cpu").model
    edited.save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", directory)  # now this one is loaded
    revert_edit(directory)
    (directory / "model.safetensors").unlink()
    assert content(directory) == before


@pytest.mark.parametrize("kind", ["hub", "absolute", "hard"])
def test_what_links_lead_to_keeps_its_content(tmp_path: Path, kind: str) -> None:
    directory = build(tmp_path / "hub" / "snapshots" / "abc")
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir()
    for path in directory.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        if kind == "hard":
            os.link(blob, path)
        else:
            path.symlink_to(Path("../../blobs", blob.name) if kind == "hub" else blob)
    before, loaded = content(blobs), content(directory)
    apply_edit(directory, make_delta(load_model(directory, device="cpu"), tmp_path / "d"))
    assert content(directory) != loaded
    assert content(blobs) == before
    revert_edit(directory)
    assert content(directory) == loaded
    assert content(blobs) == before


def test_notes_beside_an_edit_stay(tmp_path: Path, directory: Path) -> None:
    for seed in range(2):
        lm = load_model(directory, device="cpu")
        folder = apply_edit(directory, make_delta(lm, tmp_path / f"{seed}", seed))
        (folder / "why.md").write_text("mine")
    (folder.parent / "all.md").write_text("mine")
    for _ in range(2):
        revert_edit(directory)
    assert applied_edits(directory) == []
    assert len(list(folder.parent.rglob("*.md"))) == 3
    assert [p.name for p in folder.parent.rglob("*.safetensors")] == []
    apply_edit(directory, tmp_path / "0")
    revert_edit(directory)


def apply_until(directory: Path, delta: Path, writes: int) -> bool:
    """Apply a delta, killed before so many files and one more are written; gives whether it was."""
    write, written = model_directory.write_whole, []

    def stop(path: Path, fill):
        if len(written) == writes:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, fill)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_directory, "write_whole", stop)
        with suppress(KeyboardInterrupt):
            apply_edit(directory, delta)
            return False
    return True


def test_a_newer_edit_replaces_the_last_one_whole_or_not_at_all(
    tmp_path: Path, directory: Path
) -> None:
    before, lm = content(directory), load_model(directory, device="cpu")
    older, newer = (make_delta(lm, tmp_path / f"{seed}", seed) for seed in range(2))
    apply_edit(directory, newer)
    wanted = content(directory)
    revert_edit(directory)
    apply_edit(directory, older)
    replaced = content(directory)
    writes = 0
    while apply_until(directory, newer, writes):
        recorded = writes >= 3  # weights, delta and description of the new edit
        *_, (_, state, _, _) = edit_status(directory)
        assert state.startswith("interrupted" if recorded else "in the weights")
        assert recorded or content(directory) == replaced
        shutil.copytree(directory, tmp_path / "copy")
        revert_edit(tmp_path / "copy")
        assert content(tmp_path / "copy") == before
        assert applied_edits(tmp_path / "copy") == []
        shutil.rmtree(tmp_path / "copy")
        apply_edit(directory, older)  # also completes the interrupted one, or takes its place
        assert content(directory) == replaced
        writes += 1
    assert writes > 4
    assert content(directory) == wanted
    assert [state for _, state, _, _ in edit_status(directory)] == ["in the weights"]
    revert_edit(directory)
    assert content(directory) == before


def test_an_edit_of_other_layers_is_not_guessed_to_replace_or_to_follow(
    tmp_path: Path, directory: Path, delta: Path
) -> None:
    other = make_delta(load_model(directory, device="cpu"), tmp_path / "other", layers=(0,))
    apply_edit(directory, delta)
    edited = content(directory)
    with pytest.raises(InputError, match="revert it first"):
        apply_edit(directory, other)
    assert content(directory) == edited
    revert_edit(directory)
    apply_edit(directory, other)


def test_weights_that_were_changed_since_are_left_alone(directory: Path, delta: Path) -> None:
    apply_edit(directory, delta)
    name = next(iter(WeightDelta.load(delta).changes))
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] += 1
            save_file(tensors, path, {"format": "pt"})
    before = content(directory)
    with pytest.raises(IntegrityError):
        revert_edit(directory)
    assert content(directory) == before


def test_a_damaged_backup_is_not_put_back(directory: Path, delta: Path) -> None:
    folder = apply_edit(directory, delta)
    kept = folder / "base.safetensors"
    damaged = bytearray(kept.read_bytes())
    damaged[-3] ^= 1
    kept.write_bytes(damaged)
    before = content(directory)
    with pytest.raises(IntegrityError):
        revert_edit(directory)
    assert content(directory) == before


def test_a_directory_that_is_no_model(tmp_path: Path, directory: Path, delta: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        apply_edit(tmp_path / "empty", delta)
    other = build(tmp_path / "other", "llama")
    with pytest.raises(InputError):
        apply_edit(other, delta)
    shard = next(directory.glob("*.safetensors"))
    shutil.copy(shard, tmp_path / "kept")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(IntegrityError):
        apply_edit(directory, delta)
    assert not (directory / "memit-edits").exists()
