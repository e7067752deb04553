"""Records of finished pieces: they say where a piece comes from, and no damaged one is used."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memit.errors import IntegrityError, ResourceError
from tasks.engine.cache import content_key
from tasks.engine.records import Records, read_record

CODE = {"memit.targets": "ab" * 32}
INPUTS = {"seed": 1, "texts": ["a long text"] * 100}
STORED = b'{"result": "0.5", "metadata": {}}'


def written(folder: Path, **inputs: object) -> Path:
    key = content_key("task", CODE, INPUTS | inputs)
    return Path(Records(basepath=str(folder)).write_path(key, STORED))


def test_a_record_says_where_its_piece_comes_from(tmp_path: Path) -> None:
    path = written(tmp_path)
    stored, origin = read_record(path)
    assert stored == STORED
    assert (origin["task"], origin["code"]) == ("task", CODE)
    assert origin["inputs"]["seed"] == 1
    assert len(origin["inputs"]["texts"]["sha256"]) == 64
    assert Records(basepath=str(tmp_path)).read_path(path.name) == STORED
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_record_is_never_read(tmp_path: Path, data: st.DataObject) -> None:
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 2))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    path.write_bytes(content)
    with suppress(IntegrityError):
        assert read_record(path)[0] == STORED  # another space between two words changes nothing


def test_a_record_in_anothers_place_is_never_read(tmp_path: Path) -> None:
    one, other = written(tmp_path), written(tmp_path, seed=2)
    other.write_bytes(one.read_bytes())
    with pytest.raises(IntegrityError, match="misplaced"):
        read_record(other)


def test_a_record_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ResourceError, match="No space left"):
        written(tmp_path)
    assert list(tmp_path.iterdir()) == []
