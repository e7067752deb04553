"""What all tests share: few threads, no network, one Prefect server for a process."""

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from sqlite3 import connect

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Also in the processes that tests start: threads that wait for each other take turns spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

import tests

# Small matrices gain nothing from threads, and two many-threaded processes starve each other.
torch.set_num_threads(1)
gc.disable()  # until all tests are imported: it would find nothing

settings.register_profile("memit", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("memit")


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project of a test's own, the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


LONGEST_FIRST = ("test_chaos", "test_runners", "test_deploy", "test_compare", "test_changes")
"""Files that take minutes: where several processes share the work, none is left for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; those that make what others wait for lead."""
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later collection of garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this session share."""
    folder = tmp_path_factory.getbasetemp()
    tests.session = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return tests.session


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory, session: Path) -> Iterator[str]:
    """The address of a Prefect server, which flows in this process use, too.

    The first process has its database made, which takes seconds; others start from a copy. What
    happens in task runs is not written down, which would be half of its work.
    """
    from tests.acceptance.project import server  # here, since unit tests do without Prefect

    home, made = tmp_path_factory.mktemp("prefect"), session / "prefect.db"
    with ExitStack() as stack:
        with FileLock(session / "prefect.lock"), pytest.MonkeyPatch.context() as patch:
            for name in ("TASK_RUN_RECORDER", "EVENT_PERSISTER", "TRIGGERS"):
                patch.setenv(f"PREFECT_SERVER_SERVICES_{name}_ENABLED", "false")
            if made.exists():
                shutil.copy(made, home)
            address = stack.enter_context(server(home))
            if not made.exists():
                with closing(connect(home / "prefect.db")) as base, closing(connect(made)) as copy:
                    base.backup(copy)
        yield address
