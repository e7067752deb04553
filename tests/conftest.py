"""What all tests share: few threads, no network, and the families of models."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Also in the processes that tests start: threads that wait for each other take turns spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# Small matrices gain nothing from threads, and two many-threaded processes starve each other.
torch.set_num_threads(1)

settings.register_profile("memit", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("memit")


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)
