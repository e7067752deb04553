"""What all tests share: few threads, no network, and the families of models."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

# Small matrices gain nothing from threads, and two many-threaded processes starve each other.
torch.set_num_threads(1)

settings.register_profile("memit", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("memit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share expensive fixtures stay in one process: a file, or those of one server."""
    for item in items:
        shares = "api" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("one server" if shares else str(item.path)))


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)
