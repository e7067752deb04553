"""Bad input ends in one clear sentence, before any model is loaded, and leaves everything alone."""

import json
import os
import shutil
from pathlib import Path

import pytest
import transformers
import yaml

from flows.command.checks import check_comparison
from flows.command.parameters import read_parameters
from tests import python
from tests.families import save_model
from tests.integration.bad_input import FACT, GOOD, KINDS, Kind, check, digests, only_a_pickle


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a good experiment in it."""
    place = tmp_path_factory.mktemp("good")
    save_model("gpt2", place / "my-net")
    (place / "empty").mkdir()
    (place / "corpus.txt").write_text("Some text.\n" * 9)
    (place / "facts.jsonl").write_text(json.dumps(FACT) + "\n")
    (place / "params.yaml").write_text(yaml.safe_dump(GOOD))
    return place


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be spoilt; loading a model there fails."""
    shutil.copytree(good, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "place"))
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", _no_model)
    return tmp_path / "place"


def _no_model(*_: object, **__: object) -> None:
    raise AssertionError("a model was loaded")


def test_the_good_experiment_is_good(place: Path) -> None:
    before = digests(place)
    check_comparison(read_parameters())
    assert digests(place) == before


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_bad_input_ends_in_one_sentence(place: Path, kind: Kind) -> None:
    kind.spoil()
    before = digests(place)
    with pytest.raises(kind.error) as caught:
        kind.read()
    message = str(caught.value)
    assert kind.named in message
    assert message.isprintable()
    assert message.endswith((".", "?"))
    assert digests(place) == before
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a byte order mark", b"\xef\xbb\xbf" + json.dumps(FACT).encode()),
        ("Windows' line ends", json.dumps(FACT).encode() + b"\r\n\r\n"),
        ("a list", json.dumps([FACT]).encode()),
        ("CSV", b"subject,prompt,target\r\nAda,{} lives in,Rome\r\n"),
        ("CSV of an old Mac", b"subject,prompt,target\rAda,{} lives in,Rome\r"),
        ("CSV with a mark", "\ufeffsubject,prompt,target\nAda,{} lives in,Rome".encode()),
        ("CSV with quotes", b'subject,prompt,target\n"Ada, Lady","{} said ""yes"" in",Rome\n'),
        ("Arabic", json.dumps({**FACT, "subject": "ابن سينا"}, ensure_ascii=False).encode()),
        ("Hebrew with marks", json.dumps({**FACT, "target": "שָׁלוֹם"}).encode()),
        ("combining characters", json.dumps({**FACT, "subject": "Zoe\u0308"}).encode()),
        ("Chinese", json.dumps({**FACT, "subject": "李白"}, ensure_ascii=False).encode()),
        ("emoji", json.dumps({**FACT, "target": "👩‍👩‍👧"}).encode()),
        ("a subject with braces", json.dumps({**FACT, "subject": "{x} {}"}).encode()),
        ("a name that climbs", json.dumps({**FACT, "subject": "../../x"}).encode()),
        ("markup", json.dumps({**FACT, "subject": "<script>alert(1)</script>"}).encode()),
        ("a long prompt", json.dumps({**FACT, "prompt": "{} " + "and " * 20}).encode()),
    ],
)  # fmt: skip
def test_unusual_input_that_is_right_passes(place: Path, name: str, content: bytes) -> None:
    Path("facts.jsonl").write_bytes(content)
    before = digests(place)
    check()
    assert digests(place) == before


@pytest.mark.slow
def test_as_a_process(place: Path) -> None:
    only_a_pickle()
    before = digests(place)
    program = "from flows.command.cli import main; main()"
    result = python("-c", program, "run", cwd=place, env={**os.environ, "COLUMNS": "80"})
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: my-net")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert digests(place) == before
