"""What may never be done with what others wrote, and what may never be told."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.command.parameters import check_parameters
from flows.command.script import fail
from flows.service.server import server_options
from memit.errors import InputError, MemitError
from memit.redaction import LONGEST, holds_secret, one_line, redacted
from memit.requests import read_facts
from tasks.report import markdown
from tasks.reporting import tracking
from tasks.reporting.card import make_card
from tasks.reporting.formats import escaped
from tests import ROOT

OURS = [path for floor in ("memit", "tasks", "flows", "benchmarks") for path in
        sorted((ROOT / floor).rglob("*.py"))]  # fmt: skip


def test_every_load_of_a_pretrained_thing_refuses_code_and_pickles() -> None:
    """All calls that could run a repository's code say that they do not."""
    calls = 0
    for path in OURS:
        text = path.read_text(encoding="utf-8")
        for call in re.finditer(r"\.from_pretrained\b|\.from_config\(", text):
            calls += 1
            before, rest = text[max(0, call.start() - 25) : call.start()], text[call.start() :]
            assert "trust_remote_code=False" in rest[:400], path
            if "Model" in before and "pretrained" in call[0]:
                assert "use_safetensors=True" in rest[:400], path
    assert calls >= 8


def test_servers_stay_on_loopback() -> None:
    assert server_options(1)[2:4] == ["--host", "127.0.0.1"]
    assert "--host 127.0.0.1" in (ROOT / "flows/service/pages.py").read_text()


def test_a_name_with_nul_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"subject": "a\\u0000b", "prompt": "{} is", "target": "x"}')
    with pytest.raises(InputError, match="control character"):
        read_facts(path)


# --- what is told -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pw@host/x", "https://***@host/x"),
        (
            "postgresql+psycopg2://u:p@db/mlflow failed",
            "postgresql+psycopg2://***@db/mlflow failed",
        ),
        ("https://host/x?token=abc&y=1", "https://host/x?***"),
        ("no address? none", "no address? none"),
        ("with hf_abcdefghijklmnopqrstuvwxyz inside", "with *** inside"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: ***"),
        ("shf_aaaaaaaaaaaaaaaaaaaa", "shf_aaaaaaaaaaaaaaaaaaaa"),
    ],
)
def test_secrets_are_not_told(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_secrets_of_the_environment_are_not_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    monkeypatch.setenv("MY_TOKEN", "battery-staple")
    error = MemitError("a correct horse, a battery-staple and http://a:correct@b/c?d=e.")
    with pytest.raises(SystemExit):
        fail(error)
    assert "a ***, a *** and http://***@b/c?***" in capsys.readouterr().err
    params = tracking._parameters({"report": {"x": "battery-staple"}, "y": "z" * 9_000})
    assert {param.key: param.value for param in params} == {"report.x": "***", "y": "z" * 6_000}


@pytest.mark.parametrize(
    "text",
    ["http://me:pw@host", "postgresql://me:pw@host/db", "https://h/x?api_key=1", "http://h?sig=x",
     "hf_abcdefghijklmnopqrstuvwxyz", "ghp_abcdefghijklmnopqrst"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["requests.url", "report.tracking_uri", "statistics.path"])
def test_parameters_hold_no_secrets(text: str, place: str) -> None:
    section, key = place.split(".")
    assert holds_secret(text)
    with pytest.raises(InputError, match=f"{section}.{key}") as caught:
        check_parameters({section: {key: text}})
    assert text not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["http://me@host", "sqlite:///a:b.db", "https://h/x?y=1", "a@b:c", "./mlruns", ""]
)
def test_what_is_no_secret_may_stand_there(text: str) -> None:
    assert not holds_secret(text)


@given(st.text(max_size=300))
def test_sentences_stay_on_one_line_and_steer_no_terminal(text: str) -> None:
    said = str(MemitError(f"the {text} is wrong."))
    assert said.isprintable()
    assert one_line(said) == said
    assert str(MemitError(said)) == said


def test_sentences_are_of_bearable_length() -> None:
    assert len(str(MemitError("x" * 10**6))) == LONGEST


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("[x](javascript:y) | `z`", r"\[x\](javascript:y) \| \`z\`"),
        ("two\nlines", "two\\\\nlines"),
        ("Zoë's & co", "Zoë's &amp; co"),
    ],
)
def test_texts_of_a_data_set_are_no_markup_in_a_report(text: str, shown: str) -> None:
    assert escaped(text) == shown
    edit = {"count": 1, "layers": [1], "hyperparameters": {"site": "block"}}
    edit["dropped"] = [{"prompt": text, "case_id": 4, "reason": text}]
    page = markdown({"before": {}, "after": {}}, edit, {})
    assert page.startswith("# 1 edits by MEMIT in layers 1\n")
    assert f"- {shown} (case 4): {shown}" in page
    assert "<script>" not in page
    facts = {"facts": [{"prompt": text, "target": text}], "model": "m", "method": "memit"}
    assert f"- {shown} → {shown}\n" in str(make_card("delta", facts, None, None))
