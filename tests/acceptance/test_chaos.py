"""A few of the faults that `make chaos` makes many of."""

from pathlib import Path
from random import Random
from signal import SIGINT, SIGTERM

import pytest

from tests.acceptance.chaos import PHASES, Attempt, Chaos, empty
from tests.acceptance.forked import Forked
from tests.acceptance.project import Project

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def chaos(finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chaos:
    monkeypatch.setattr(Attempt, "popen", Forked)
    return Chaos(tmp_path, Random(0), finished, dict.fromkeys(PHASES, 2.0) | {"model": 0.5})


def test_stopped_and_killed_two_runs_go_on_together_to_the_same_bytes(chaos: Chaos) -> None:
    """A full disk, Ctrl-C, SIGTERM and SIGKILL; then two runs that share the cache that is left."""
    project = chaos.project("one", finished=False)
    empty(project, keep_model=False)
    chaos.fail_writing("ENOSPC", 1, project)
    chaos.kill_in(["model"], project)
    for phase, sent, status in (("statistics", SIGINT, 130), ("targets", SIGTERM, 143)):
        stopped = Attempt(project)
        assert stopped.wait_for(phase)
        stopped.process.send_signal(sent)
        assert stopped.end(60) == status
        assert "run it again to go on" in stopped.output
        assert "Traceback" not in stopped.output
    chaos.kill_in(["evaluation"], project)
    chaos.share_store(project)
    chaos.check(project, "after all this")
    assert chaos.faults == []
    assert [kill.phase for kill in chaos.kills] == ["model", "evaluation"]


def test_damaged_files_are_replaced(chaos: Chaos) -> None:
    chaos.damage(1, 20)
    assert chaos.faults == []
