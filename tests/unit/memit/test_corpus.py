"""Corpora: the same documents from every kind of file."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memit.corpus import read_documents
from memit.errors import InputError, UnreachableError

DOCUMENTS = ["one", "two  words", "", "Zoë\u2028said {so}", "five", "   ", "seven"]
FULL = [text for text in DOCUMENTS if text.strip()]


@pytest.fixture(scope="module", params=["txt", "jsonl", "parquet"])
def corpus(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / f"corpus.{request.param}"
    if request.param == "txt":
        path.write_text("\n".join(DOCUMENTS) + "\n", encoding="utf-8")
    elif request.param == "jsonl":
        lines = (json.dumps({"id": 1, "text": text}) for text in DOCUMENTS)
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        table = pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
        pq.write_table(table, path, row_group_size=3)
    return path


def test_documents_in_order_without_blank_ones(corpus: Path):
    assert list(read_documents(corpus)) == FULL


@pytest.mark.parametrize("stop", [*range(len(DOCUMENTS) + 1), 100])
def test_the_first_so_many(corpus: Path, stop: int):
    first = [text for text in DOCUMENTS[:stop] if text.strip()]
    assert list(read_documents(corpus, stop=stop)) == first


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2 .*'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 "),
        ("a.txt", "é".encode("latin-1"), "not UTF-8"),
        ("a.parquet", b"PAR1 and then nothing", "no whole Parquet file"),
        ("a.csv", b"text\nx\n", "no corpus that can be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, complaint: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint) as caught:
        list(read_documents(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))


def test_missing_files_and_columns(tmp_path: Path):
    for kind in ("txt", "jsonl", "parquet"):
        with pytest.raises(InputError, match=f"absent.{kind} does not exist"):
            list(read_documents(tmp_path / f"absent.{kind}"))
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column 'text': name one of body"):
        list(read_documents(tmp_path / "a.parquet"))
    assert list(read_documents(tmp_path / "a.parquet", column="body")) == ["x"]


def test_data_sets_are_streamed_and_cut(monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked: dict[str, object] = {}

    def load(name: str, config: str | None, **kwargs: object) -> datasets.IterableDataset:
        asked.update(kwargs, name=name, config=config)
        return datasets.Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_documents("some/corpus", stop=5, config="20231101.en", revision="abc")
    assert list(found) == ["one", "two  words", "Zoë\u2028said {so}", "five"]
    assert asked == {
        "name": "some/corpus",
        "config": "20231101.en",
        "revision": "abc",
        "split": "train",
        "streaming": True,
    }
    with pytest.raises(InputError, match="no text column 'body'"):
        list(read_documents("some/corpus", column="body"))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def load(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nand so on")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UnreachableError, match=r"wikimedia/wikipedia .*reach the hub\).*local"):
        list(read_documents("wikimedia/wikipedia", config="20231101.en"))
