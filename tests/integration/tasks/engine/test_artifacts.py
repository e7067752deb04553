"""Stored files are written atomically, checked when read, and keyed by content."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from memit.errors import IntegrityError, ResourceError
from memit.hyperparameters import Hyperparameters
from tasks.engine.artifacts import (
    Artifact,
    describe,
    store_piece,
    write_file,
    write_json,
    write_text,
)
from tasks.engine.cache import content_key
from tasks.engine.loaded_model import ModelFiles, ModelReference
from tasks.engine.locks import FileLocks

pytestmark = pytest.mark.usefixtures("project")


def test_an_artifact_is_intact_until_a_bit_of_it_changes(project: Path) -> None:
    artifact = write_text(project / "a.txt", "some text")
    assert artifact.checked() == project / "a.txt"
    assert artifact == describe(project / "a.txt")
    for damage in (b"some texu", b"some tex", b"", b"some text "):
        (project / "a.txt").write_bytes(damage)
        assert not artifact.intact()
        with pytest.raises(IntegrityError, match=r"a\.txt"):
            artifact.checked()
    (project / "a.txt").unlink()
    assert not artifact.intact()


def test_a_failed_write_leaves_the_old_content_and_nothing_else(project: Path) -> None:
    path = project / "a.txt"
    write_text(path, "old")

    def run_out(partial: Path) -> None:
        partial.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ResourceError, match=r"a\.txt"):
        write_file(path, run_out)
    with pytest.raises(ZeroDivisionError):
        write_file(path, lambda partial: [partial.write_text("ne"), 1 // 0])
    assert path.read_text() == "old"
    assert [p.name for p in project.iterdir()] == ["a.txt"]


def test_a_read_only_store_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ResourceError, match=r"a\.txt"):
        write_text(project / "a.txt", "new")
    assert list(project.iterdir()) == []


def test_equal_pieces_share_a_file(project: Path) -> None:
    first = store_piece("targets", ".txt", lambda path: path.write_text("same"))
    second = store_piece("targets", ".txt", lambda path: path.write_text("same"))
    assert first == second
    folder = project / ".cache" / "pieces" / "targets"
    assert [p.name for p in folder.iterdir()] == [first.sha256[:40] + ".txt"]
    assert first.checked().read_text() == "same"


def test_a_piece_that_cannot_be_named_leaves_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def refuse(source: object, target: Path) -> None:
        if str(target).endswith(".txt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ResourceError, match="pieces"):
        store_piece("targets", ".txt", lambda path: path.write_text("some"))
    assert list((project / ".cache" / "pieces" / "targets").iterdir()) == []


def test_json_has_one_form_and_no_nan(project: Path) -> None:
    write_json(project / "a.json", {"b": 1, "a": "é"})
    write_json(project / "b.json", {"a": "é", "b": 1})
    assert (project / "a.json").read_bytes() == (project / "b.json").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(project / "a.json", {"a": float("nan")})
    assert json.loads((project / "a.json").read_text()) == {"a": "é", "b": 1}


# --- keys -----------------------------------------------------------------------------------------

MODEL = ModelFiles(
    source="local",
    id="m",
    revision=None,
    files={"model.safetensors": "a"},
    architecture="GPT2LMHeadModel",
    layers=2,
    width=4,
    inner_width=16,
    parameters=100,
)
REFERENCE = ModelReference(
    directory="/somewhere", model=MODEL, dtype="float32", device="cpu", threads=1
)
HYPERPARAMETERS = Hyperparameters(layers=(0, 1), covariance_weight=1.0)


def key(**inputs: object) -> str:
    return content_key("task", {"module": "code"}, inputs)


def test_a_key_sees_content_and_not_places() -> None:
    here = Artifact(path="here", sha256="a" * 64, size=1)
    there = Artifact(path="there", sha256="a" * 64, size=1)
    assert key(file=here) == key(file=there)
    moved = REFERENCE.model_copy(update={"directory": "/elsewhere"})
    assert key(model=REFERENCE) == key(model=moved)
    assert key(prefixes=("a", "b")) == key(prefixes=["a", "b"])


def test_a_key_sees_everything_that_results_depend_on() -> None:
    variants = [
        key(model=REFERENCE),
        key(model=REFERENCE.model_copy(update={"dtype": "bfloat16"})),
        key(model=REFERENCE.model_copy(update={"device": "cuda"})),
        key(model=REFERENCE.model_copy(update={"threads": 2})),
        key(model=REFERENCE.model_copy(update={"served_in": "float16"})),
        key(
            model=REFERENCE.model_copy(
                update={"model": MODEL.model_copy(update={"files": {"model.safetensors": "b"}})}
            )
        ),
        key(hyperparameters=HYPERPARAMETERS),
        key(hyperparameters=Hyperparameters(layers=(0, 1), covariance_weight=2.0)),
        key(other=HYPERPARAMETERS),
        content_key("other", {"module": "code"}, {"model": REFERENCE}),
        content_key("task", {"other": "code"}, {"model": REFERENCE}),
        content_key("task", {"module": "changed"}, {"model": REFERENCE}),
        key(first=1, second=2),
        key(first=2, second=1),
        key(value=None),
        key(value="None"),
        key(value=1),
        key(value=True),
    ]
    assert len(set(variants)) == len(variants)


def test_what_has_no_content_is_no_input() -> None:
    with pytest.raises(TypeError, match="object"):
        key(value=object())


# --- locks ----------------------------------------------------------------------------------------


def test_a_lock_has_one_holder(project: Path) -> None:
    locks = FileLocks()
    assert locks.acquire_lock("k", "me")
    assert locks.acquire_lock("k", "me")
    assert locks.is_lock_holder("k", "me")
    assert not locks.is_lock_holder("k", "you")
    assert locks.is_locked("k")
    assert not locks.acquire_lock("k", "you", acquire_timeout=0.2)
    assert not locks.wait_for_lock("k", timeout=0.2)
    with pytest.raises(ValueError, match="you"):
        locks.release_lock("k", "you")
    locks.release_lock("k", "me")
    assert not locks.is_locked("k")
    assert locks.acquire_lock("k", "you", acquire_timeout=0)
    locks.release_lock("k", "you")
    assert [path for path in project.rglob("*") if path.is_file()] == []


def _hold_for_ever(ready: Path) -> None:
    FileLocks().acquire_lock("k", "child")
    ready.touch()
    time.sleep(600)


def test_a_killed_process_leaves_no_lock(project: Path) -> None:
    ready = project / "ready"
    child = multiprocessing.get_context("fork").Process(target=_hold_for_ever, args=(ready,))
    child.start()
    while not ready.exists():
        assert child.is_alive()
        time.sleep(0.05)
    assert FileLocks().is_locked("k")
    child.kill()
    child.join()
    assert FileLocks().acquire_lock("k", "me", acquire_timeout=5)
    FileLocks().release_lock("k", "me")
