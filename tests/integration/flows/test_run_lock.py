"""One run at a time in a working directory."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from select import select

import pytest

from flows.service.run_lock import HELD, alone, lock_name
from tests import ROOT

HOLDER = """
import sys, time
from flows.service.run_lock import HELD, alone, lock_name
with alone():
    print("in", flush=True)
    sys.stdin.readline()
    print("out", flush=True)
"""


@pytest.fixture(autouse=True)
def directory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def hold(**environment: str) -> subprocess.Popen[str]:
    """A process that is in the body until it is sent a line."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_another_process_waits_for_the_end() -> None:
    with alone(), hold() as other:
        assert other.stdout is not None
        assert other.stderr is not None
        with alone():  # a flow inside of the command that runs it
            pass
        assert select([other.stderr], [], [], 60)[0]
        assert "waiting for its end" in other.stderr.readline()
        assert not select([other.stdout], [], [], 0.5)[0]
        other.kill()


def test_a_stage_of_dvc_does_not_wait_for_the_command_that_holds_the_lock_for_it() -> None:
    with alone(), hold(**{HELD: lock_name()}) as stage:
        assert stage.communicate("\n")[0] == "in\nout\n"


def test_it_comes_in_when_the_body_has_ended() -> None:
    with ExitStack() as stack:
        with alone():
            other = stack.enter_context(hold())
            assert other.stdout is not None
            assert other.stderr is not None
            other.stderr.readline()
        assert other.stdout.readline() == "in\n"
        other.communicate("\n")
        assert other.returncode == 0


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
