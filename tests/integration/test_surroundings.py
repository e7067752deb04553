"""What the machine around a command may be like: its system, its proxies, its directories."""

import os
import subprocess
from pathlib import Path

import pytest

from flows.command.checks import check_inputs
from flows.command.parameters import Parameters
from flows.service.dvc_lock import commit_stages
from memit.errors import InputError
from tests import ROOT, python

PROXY = "http://127.0.0.1:9"
ASK = """
import flows, httpx, requests
from urllib.request import proxy_bypass
from requests.utils import should_bypass_proxies
def goes_direct(host):
    with httpx.Client() as client:
        transport = client._transport_for_url(httpx.URL(f"http://{host}/"))
        straight = transport is client._transport
    return {bool(proxy_bypass(host)), should_bypass_proxies(f"http://{host}/", None), straight}
for host in ("127.0.0.1:8000", "localhost:5000", "example.com", "example.org"):
    print(host.split(":")[0], *goes_direct(host))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return python("-c", code, env={**kept, **environment})


@pytest.mark.parametrize(
    ("name", "excepted"), [("HTTP_PROXY", "no_proxy"), ("all_proxy", "NO_PROXY")]
)
def test_no_proxy_stands_before_loopback(name: str, excepted: str) -> None:
    said = run(ASK, **{name: PROXY, excepted: "example.com"})
    assert said.stdout.splitlines() == [
        "127.0.0.1 True",
        "localhost True",
        "example.com True",
        "example.org False",
    ], said.stderr


def test_without_a_proxy_and_where_all_is_excepted_nothing_is_set() -> None:
    show = "import flows, os; print(os.environ.get('NO_PROXY'), os.environ.get('no_proxy'))"
    assert run(show).stdout == "None None\n"
    assert run(show, HTTP_PROXY=PROXY, NO_PROXY="*").stdout == "* None\n"


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "ftp://127.0.0.1:9", "http://a:b"])
def test_a_proxy_that_cannot_be_used_is_told_at_the_start(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(InputError, match="ALL_PROXY"):
        check_inputs(Parameters())


@pytest.mark.parametrize("name", ["a%20b", "why?"])
def test_a_directory_that_no_address_can_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / name))
    with pytest.raises(InputError, match=name.replace("?", r"\?")):
        check_inputs(Parameters())


def test_windows_is_told_in_a_sentence() -> None:
    ended = run("import sys; sys.platform = 'win32'; import flows.__main__")
    assert ended.returncode != 0
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1


def test_a_user_without_a_name_has_one_and_a_home() -> None:
    unnamed = "import os, pwd; pwd.getpwuid = lambda number: {}[number]\n"
    unnamed += "for name in ('HOME', 'USER', 'LOGNAME'): os.environ.pop(name, None)\n"
    ask = "import flows, getpass; print(getpass.getuser(), os.path.expanduser('~'))"
    assert run(unnamed + ask).stdout.split() == [str(os.getuid()), f"{os.getcwd()}/.cache"]


@pytest.mark.parametrize(("cause", "cure"), [("no git", "git init"), ("a link", "dvc cache dir")])
def test_what_helps_where_dvc_cannot_take_the_results(
    cause: str,
    cure: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "project"
    (place / ".dvc").mkdir(parents=True)
    (place / ".dvc" / "config").write_bytes((ROOT / ".dvc" / "config").read_bytes())
    (place / "dvc.yaml").write_text("stages: {model: {cmd: 'true', outs: [artifacts/a]}}\n")
    (place / "params.yaml").write_text("{}\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").touch()
    (place / "artifacts").symlink_to(tmp_path / "elsewhere")
    if cause == "a link":
        subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    monkeypatch.chdir(place)
    assert not commit_stages(Parameters(), ["model"], {})  # nor is it tried once more
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("warning: DVC")
    assert cure in said


def made(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What make says in a directory that an installed environment lies in."""
    (place / ".venv").mkdir(parents=True)
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "requirements-model.txt"):
        (place / name).write_bytes((ROOT / name).read_bytes())
    (place / ".venv" / ".installed").touch()
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of the make that runs these tests
    alone = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        ["make", *words], cwd=place, capture_output=True, text=True, check=False, env=alone
    )


@pytest.mark.parametrize("name", ["a b#c", "a$HOME", "it's 'a \"b", "a(b)&;c", "ä ö "])
def test_make_runs_in_any_directory(tmp_path: Path, name: str) -> None:
    said = made(tmp_path / name, "-n", "run")
    assert said.returncode == 0, said.stderr
    assert said.stdout == ".venv/bin/python -m flows.command.cli run\n"


def test_stages_find_the_environments_python(tmp_path: Path) -> None:
    place = tmp_path / "a b"
    said = made(place, "--eval", 'path:; @echo "$$PATH"', "path")
    assert said.stdout.startswith(f"{place}/.venv/bin:")


def test_make_refuses_a_directory_with_a_colon(tmp_path: Path) -> None:
    said = made(tmp_path / "a:b", "-n", "run")
    assert said.returncode != 0
    assert "colon" in said.stderr
