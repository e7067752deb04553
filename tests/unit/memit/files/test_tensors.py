"""Tensors in a file: read back as written, and never when a bit of it is another."""

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from memit.errors import IntegrityError, ResourceError
from memit.files.atomic import write_whole
from memit.files.tensors import load_metadata, load_tensors, save_tensors

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
    "number": torch.tensor(0.5),
    "nothing": torch.zeros(0, 4),
}
METADATA = {"said": "Zoë", "and": "more", "of": "it", "than": "one"}


def written(folder: Path) -> Path:
    path = folder / "some.safetensors"
    save_tensors(TENSORS, path, METADATA)
    return path


def test_tensors_come_back(tmp_path: Path) -> None:
    tensors, metadata = load_tensors(written(tmp_path))
    assert load_metadata(tmp_path / "some.safetensors") == METADATA
    assert metadata == METADATA
    assert set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_or_a_cut_is_refused_by_name(tmp_path: Path, data: st.DataObject) -> None:
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"some\.safetensors"):
        load_tensors(path)


def test_a_file_without_a_checksum_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", METADATA)
    with pytest.raises(IntegrityError, match=r"a\.safetensors"):
        load_tensors(tmp_path / "a.safetensors")


def test_equal_content_has_equal_bytes(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    for _ in range(8):
        assert written(tmp_path).read_bytes() == written(tmp_path / "again").read_bytes()


def test_a_disk_that_is_full_is_told_whatever_writes(tmp_path: Path) -> None:
    """The limit of a file's size stands for the end of the disk, for compiled writers too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(ResourceError, match=r"some\.safetensors cannot be written"):
            write_whole(tmp_path / "some.safetensors", lambda path: save_tensors(TENSORS, path, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
