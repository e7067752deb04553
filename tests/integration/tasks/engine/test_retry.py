"""Transient errors of hubs and addresses are retried, and no others."""

import http.client
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import tenacity.nap
import torch.hub
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from memit.errors import InputError, MemitError, UnreachableError
from tasks.engine.hub import _check_room, fetch_description, resolve_commit
from tasks.engine.retry import ATTEMPTS
from tasks.requests import locate_records

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def slept(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, without waiting."""
    waits: list[float] = []
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return waits


def answer(status: int) -> Any:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


class Hub:
    """Gives or raises one thing after another, the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked = 0
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: self.next())
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: self.next())

    def next(self) -> Any:
        """The next answer."""
        self.asked += 1
        given = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(given, Exception):
            raise given
        return given


def test_a_hub_that_comes_back_is_asked_until_it_does(monkeypatch, slept: list[float]) -> None:
    away = httpx.ConnectError("no route")
    busy = HfHubHTTPError("busy", response=answer(503))
    hub = Hub(monkeypatch, away, busy, SimpleNamespace(sha=COMMIT))
    assert resolve_commit("owner/name", "main") == COMMIT
    assert hub.asked == 3
    assert len(slept) == 2
    assert 1 <= slept[0] < slept[1] < 3


def test_a_hub_that_comes_back_says_how_large_a_model_is(monkeypatch) -> None:
    hub = Hub(monkeypatch, httpx.ConnectError("no route"), SimpleNamespace(siblings=[]))
    _check_room("owner/name", COMMIT)
    assert hub.asked == 2


def test_a_hub_that_stays_away_is_left_after_some_tries(monkeypatch, slept: list[float]) -> None:
    hub = Hub(monkeypatch, httpx.ConnectError("no route"))
    with pytest.raises(UnreachableError, match="owner/name"):
        resolve_commit("owner/name", "main")
    assert hub.asked == ATTEMPTS == len(slept) + 1
    with pytest.raises(UnreachableError):
        fetch_description("owner/name", COMMIT)
    assert hub.asked == 2 * ATTEMPTS


@pytest.mark.parametrize(
    "wrong",
    [
        RepositoryNotFoundError("none", response=answer(404)),
        RevisionNotFoundError("none", response=answer(404)),
        HfHubHTTPError("forbidden", response=answer(403)),
        HfHubHTTPError("bad request", response=answer(400)),
    ],
)
def test_what_the_hub_refuses_is_not_asked_again(
    monkeypatch, slept: list[float], wrong: Exception
) -> None:
    hub = Hub(monkeypatch, wrong)
    with pytest.raises(InputError, match="owner/name"):
        resolve_commit("owner/name", "main")
    assert (hub.asked, slept) == (1, [])


def test_a_bad_name_is_not_asked_for_again(slept: list[float]) -> None:
    with pytest.raises(InputError, match=r"\.\./\.\./etc"):
        resolve_commit("../../etc", "main")
    assert slept == []


def test_offline_is_believed_at_once(monkeypatch, slept: list[float]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = Hub(monkeypatch, ConnectionError("offline"))
    with pytest.raises(UnreachableError):
        resolve_commit("owner/name", "main")
    assert (hub.asked, slept) == (1, [])


@pytest.mark.parametrize(
    ("failure", "kind", "tries"),
    [
        (urllib.error.URLError("refused"), UnreachableError, ATTEMPTS),
        (urllib.error.HTTPError("u", 503, "busy", Message(), None), UnreachableError, ATTEMPTS),
        (urllib.error.HTTPError("u", 429, "slower", Message(), None), UnreachableError, ATTEMPTS),
        (urllib.error.HTTPError("u", 404, "none", Message(), None), InputError, 1),
        (urllib.error.HTTPError("u", 401, "who?", Message(), None), InputError, 1),
        (http.client.InvalidURL("no port"), InputError, 1),
        (http.client.IncompleteRead(b""), UnreachableError, ATTEMPTS),
    ],
)
def test_addresses_are_asked_again_where_waiting_can_help(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slept: list[float],
    failure: Exception,
    kind: type[MemitError],
    tries: int,
) -> None:
    asked: list[str] = []

    def open_address(request: urllib.request.Request) -> None:
        asked.append(request.full_url)
        raise failure

    monkeypatch.setattr(torch.hub, "urlopen", open_address)
    with pytest.raises(kind):
        locate_records(None, "https://127.0.0.1/facts", "0" * 64)
    assert len(asked) == tries == len(slept) + 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
