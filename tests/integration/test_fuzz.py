"""Anything at all may be fed in: it is read, or refused with an error of the project's own."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.command.parameters import Parameters, check_parameters, read_parameters
from memit.corpus import read_documents
from memit.errors import MemitError
from memit.evaluation.reference import read_snippets
from memit.evaluation.zsre import read_zsre
from memit.requests import FACT_COLUMNS, read_counterfact, read_facts, read_records
from memit.second_moment import SecondMoment, import_published, read_moment, write_moment
from memit.weight_delta import LowRank, WeightDelta
from tests.integration.bad_input import FACT, QUESTION, RECORD

Fuzz = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["{}", "{} is", "{} {}", " ", "\ud800", "\0", "x", "Ada", "1.5e4"])
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(str.encode)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=12,
)


def good_files(place: Path) -> dict[str, bytes]:
    """One good file of every kind that is read."""
    fact, record = json.dumps(FACT), json.dumps([RECORD])
    np.savez(place / "moments.npz", **{"mom2.mom2": np.eye(3), "mom2.count": 9})
    pq.write_table(pa.table({"text": ["some", "text"]}), place / "corpus.parquet")
    moment = SecondMoment(torch.eye(3, dtype=torch.float64), 9)
    write_moment(moment, place / "moment.parquet", {"layer": 1})
    WeightDelta({"w": LowRank(torch.ones(3, 1), torch.ones(2, 1))}).save(place / "d.safetensors")
    snippets = [{"relation_id": "P1", "target_id": "Q1", "samples": [{"text": "so"}]}]
    texts = {
        "facts.jsonl": fact + "\n" + fact.replace("Ada", "Bo"),
        "facts.csv": 'subject,prompt,target\nAda,{} lives in,Rome\n"B, C",{} is,"x"\n',
        "records.json": record,
        "zsre.json": json.dumps([QUESTION]),
        "snippets.json": json.dumps(snippets),
        "corpus.txt": "some\ntext\n",
        "corpus.jsonl": '{"text": "some"}\n{"text": "text"}\n',
        "params.yaml": yaml.safe_dump(Parameters().model_dump(mode="json")),
    }
    for name, text in texts.items():
        (place / name).write_text(text)
    return {path.name: path.read_bytes() for path in place.iterdir()}


READERS: dict[str, Callable[[Path], object]] = {
    "facts.jsonl": read_records,
    "facts.csv": read_facts,
    "records.json": read_counterfact,
    "zsre.json": read_zsre,
    "snippets.json": read_snippets,
    "corpus.txt": lambda path: list(read_documents(path)),
    "corpus.jsonl": lambda path: list(read_documents(path)),
    "corpus.parquet": lambda path: list(read_documents(path)),
    "params.yaml": read_parameters,
    "moments.npz": lambda path: import_published(path, 3),
    "moment.parquet": read_moment,
    "d.safetensors": WeightDelta.load,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return good_files(tmp_path_factory.mktemp("good"))


def read(name: str, folder: Path, content: bytes) -> None:
    """Read a file; only the project's own errors may come of it, and nothing else may be there."""
    path = folder / name.replace(".", "-") / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with suppress(MemitError):
        READERS[name](path)
    assert path.read_bytes() == content
    assert [other.name for other in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read(name: str, good: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(good[name])
    READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@Fuzz
def test_spoilt_files(
    name: str, good: dict[str, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    """Some bytes are cut out, and others put in their place."""
    content = good[name]
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(len(content), start + 40)) | st.just(len(content)))
    put = data.draw(st.binary(max_size=60) | st.sampled_from([b"{", b'"', b"[]", b"\n", b"9" * 30]))
    read(name, tmp_path, content[:start] + put + content[stop:])


def spoilt(tree: Any, data: st.DataObject) -> Any:
    """A copy of a tree of plain values in which one value is another."""
    if isinstance(tree, dict) and tree and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(tree)))
        return {**tree, key: spoilt(tree[key], data)}
    if isinstance(tree, list) and tree and data.draw(st.booleans()):
        return [spoilt(tree[0], data), *tree[1:]]
    return data.draw(JSON)


@given(st.data())
@Fuzz
def test_records_with_a_wrong_value(tmp_path: Path, data: st.DataObject) -> None:
    name, row = data.draw(
        st.sampled_from([("facts.jsonl", FACT), ("records.json", RECORD), ("zsre.json", QUESTION)])
    )
    read(name, tmp_path, json.dumps([spoilt(row, data)]).encode())


@given(st.dictionaries(st.sampled_from(FACT_COLUMNS), JSON))
@Fuzz
def test_facts_of_any_values(tmp_path: Path, row: dict[str, Any]) -> None:
    read("facts.jsonl", tmp_path, json.dumps(row).encode())


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_parameters_with_a_wrong_value(data: st.DataObject) -> None:
    tree = spoilt(Parameters().model_dump(mode="json"), data)
    with suppress(MemitError):
        assert isinstance(check_parameters(tree), Parameters)
