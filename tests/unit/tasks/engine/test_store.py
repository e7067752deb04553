"""What machines share: found by content, whole or not there, checked when it is read."""

import secrets
from pathlib import Path

import fsspec
import pytest

from memit.errors import IntegrityError, UnreachableError
from tasks.engine import artifacts
from tasks.engine.artifacts import Artifact, store_piece, write_text
from tasks.engine.loaded_model import ModelFiles, ModelReference
from tasks.engine.store import VARIABLE, Store, shared_store


@pytest.fixture(params=["memory", "file", "path"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of each kind."""
    place = tmp_path / "store"
    kinds = {"memory": f"memory://{secrets.token_hex(4)}/s", "file": f"file://{place}"}
    return kinds.get(request.param, str(place))


@pytest.fixture
def machine(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Go to a machine by its name: each has a ``.cache/`` of its own."""

    def go(name: str) -> Path:
        monkeypatch.setenv(VARIABLE, address)
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / name))
        return tmp_path / name

    return go


def piece(text: str) -> Artifact:
    return store_piece("targets", ".txt", lambda path: path.write_text(text))


def test_a_piece_of_one_machine_is_read_on_another(machine) -> None:
    machine("one")
    made = piece("some text")
    other = machine("two")
    assert made.intact()
    assert not other.exists()
    found = made.checked()
    assert found.is_relative_to(other)
    assert found.read_text() == "some text"


def test_a_named_file_is_shared_when_asked(machine) -> None:
    named = write_text(machine("one") / "delta.txt", "some text")
    Path(named.path).rename(Path(named.path).with_name("moved"))
    assert not named.intact()
    named = named.model_copy(update={"path": str(machine("one") / "moved")})
    named.share()
    elsewhere = named.model_copy(update={"path": "/not/on/this/machine"})
    machine("two")
    assert elsewhere.checked().read_text() == "some text"


def test_a_model_that_is_shared_already_is_not_read_again(
    machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = machine("one") / "model"
    files = {"config.json": write_text(place / "config.json", "{}").sha256}
    described = ModelFiles.model_construct(files=files)
    model = ModelReference.model_construct(directory=str(place), model=described)
    model.share()
    monkeypatch.setattr(artifacts, "file_sha256", None)
    model.share()


def test_the_store_is_written_once_and_leaves_nothing_half_done(machine, address: str) -> None:
    machine("one")
    made = piece("some text")
    system, root = fsspec.core.url_to_fs(address)
    files = [name for name in system.find(root) if not system.isdir(name)]
    assert [name.rpartition("/")[2] for name in files] == [made.sha256]
    assert system.cat_file(files[0]) == b"some text"
    made_again = piece("some text")
    assert made_again == made
    assert system.find(root) == files


@pytest.mark.parametrize("damage", [b"some texu", b"some tex"])
def test_what_is_damaged_in_the_store_is_not_used(machine, address: str, damage: bytes) -> None:
    machine("one")
    made = piece("some text")
    system, root = fsspec.core.url_to_fs(address)
    system.pipe_file(next(iter(system.find(root))), damage)
    other = machine("two")
    with pytest.raises(IntegrityError, match=r"in the store .* is damaged"):
        made.checked()
    assert not list(other.rglob("*.partial"))
    machine("one")
    made.share()
    assert made.checked().read_text() == "some text"


def test_without_a_store_nothing_is_shared(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("one")
    monkeypatch.delenv(VARIABLE)
    made = piece("some text")
    assert shared_store() is None
    machine("two")
    assert not made.intact()
    with pytest.raises(IntegrityError, match="missing"):
        made.checked()


def test_a_store_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"nonsense://x cannot be opened .*runner\.store"):
        Store("nonsense://x")
    (tmp_path / "file").touch()
    with pytest.raises(UnreachableError, match="cannot be written"):
        Store(str(tmp_path / "file")).put(tmp_path / "file", "files/x")
