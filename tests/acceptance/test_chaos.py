"""A few of the faults that `make chaos` makes many of."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.acceptance.chaos import PHASES, Chaos
from tests.acceptance.project import Project

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def chaos(finished: Project, tmp_path: Path) -> Chaos:
    return Chaos(tmp_path, Random(0), finished, dict.fromkeys(PHASES, 2.0))


def test_killed_at_random_it_ends_with_the_same_bytes(chaos: Chaos) -> None:
    chaos.kill_until_done(2)
    assert len(chaos.kills) == 2
    assert chaos.faults == []


def test_a_full_disk_is_one_error_and_leaves_no_partial_files(chaos: Chaos) -> None:
    chaos.fail_writing("ENOSPC", 1, chaos.project("full", finished=False))
    assert chaos.faults == []


def test_damaged_files_are_replaced(chaos: Chaos) -> None:
    chaos.damage(1, 20)
    assert chaos.faults == []


def test_two_runs_share_a_cache(chaos: Chaos) -> None:
    chaos.share_store()
    assert chaos.faults == []
