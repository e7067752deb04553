"""Records of finished pieces: one that is damaged, or whose files are, is never used."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefect.results import ResultStore

from memit.errors import IntegrityError, ResourceError
from tasks.engine.artifacts import Artifact, store_piece
from tasks.engine.records import Records

pytestmark = pytest.mark.usefixtures("project")


def piece() -> Artifact:
    return store_piece("targets", ".txt", lambda path: path.write_text("some text"))


def written(key: str, artifact: Artifact) -> Path:
    """The file of a record, as Prefect has it written."""
    store = ResultStore(result_storage=Records())
    store.write([artifact], key=key)
    return Path(Records()._resolve_path(key))


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_record_is_never_read(data: st.DataObject) -> None:
    path = written("key", piece())
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 2))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="key"):
        Records().read_path("key")


def test_a_record_under_another_key_is_never_read() -> None:
    written("other", piece()).write_bytes(written("key", piece()).read_bytes())
    with pytest.raises(IntegrityError, match="other"):
        Records().read_path("other")


def test_a_record_that_cannot_be_written_leaves_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    made = piece()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ResourceError, match="key"):
        written("key", made)
    assert list((project / ".cache" / "records").iterdir()) == []
