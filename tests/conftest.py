"""What all tests share: few threads, no network, one Prefect server for a process."""

from __future__ import annotations

import os
from collections.abc import Iterator

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


LONGEST_FIRST = ("test_chaos", "test_runners", "test_deploy", "test_compare", "test_changes")
"""Files that take minutes: where several processes share the work, none is left for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; those that make what others wait for lead."""
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server, which flows in this process use, too."""
    from tests.acceptance.project import server  # here, since unit tests do without Prefect

    with server(tmp_path_factory.mktemp("prefect")) as address:
        yield address
