"""A few of the faults that `make chaos` makes many of."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random

import pytest

from tests.acceptance.chaos import PHASES, Chaos
from tests.acceptance.project import TINY, Project

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def chaos(finished: Project, tmp_path: Path, api: str) -> Chaos:
    return Chaos(tmp_path, api, TINY, Random(0), finished, dict.fromkeys(PHASES, 2.0))


def test_killed_at_random_it_ends_with_the_same_bytes(chaos: Chaos) -> None:
    chaos.kill_until_done(3)
    assert len(chaos.kills) == 3
    assert chaos.faults == []


@pytest.mark.parametrize("fault", ["full", "damaged", "shared", "lost"])
def test_other_faults_cost_no_result_either(chaos: Chaos, fault: str) -> None:
    work = {
        "full": partial(chaos.fail_writing, "ENOSPC", 1),
        "damaged": partial(chaos.damage, 1, 20),
        "shared": chaos.share_store,
        "lost": partial(chaos.lose_server, 1),
    }
    work[fault]()
    assert chaos.faults == []
