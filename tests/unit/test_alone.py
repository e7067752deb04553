"""One run at a time in a working directory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.alone import alone

HOLDER = """
import sys, time
from flows.alone import alone
with alone():
    print("in", flush=True)
    sys.stdin.readline()
    print("out", flush=True)
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def hold() -> subprocess.Popen[str]:
    """A process that is in the body until it is sent a line."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_another_process_waits_for_the_end() -> None:
    with hold() as other:
        with alone():
            time.sleep(1.0)  # it starts meanwhile
            with alone():  # a flow inside of the command that runs it
                pass
            assert other.poll() is None
            left = time.monotonic()
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        assert time.monotonic() - left < 20
        other.communicate("\n")


def test_a_process_that_waits_comes_in_when_the_other_is_killed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with hold() as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        killer = subprocess.Popen(
            [sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({other.pid}, 9)"]
        )
        with alone():
            assert other.wait(5) == -9
        killer.wait()
    assert "waiting for its end" in capsys.readouterr().err
