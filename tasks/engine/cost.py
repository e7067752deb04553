"""The cost of a piece of work: seconds and peak memory."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.engine.artifacts import Value


class Cost(Value):
    """Seconds and bytes of one piece, or of a step when pieces are put together."""

    seconds: float = 0.0
    peak_memory: int = 0
    """Largest resident size of the process, in bytes."""
    peak_device_memory: int = 0
    """Most memory that torch had allocated on the accelerator, in bytes."""


def total_cost(costs: Iterable[Cost]) -> Cost:
    """The cost of a step: the sum of its pieces' seconds, the largest of their peaks."""
    costs = list(costs)
    return Cost(
        seconds=round(sum(cost.seconds for cost in costs), 3),
        peak_memory=max((cost.peak_memory for cost in costs), default=0),
        peak_device_memory=max((cost.peak_device_memory for cost in costs), default=0),
    )


class Meter:
    """Measures the body of `with Meter() as meter:`; `meter.cost` is known after it."""

    cost = Cost()

    def __enter__(self) -> Meter:
        _running.meter = self
        _reset_peaks()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *raised: object) -> None:
        _running.meter = None
        self.cost = Cost(
            seconds=round(time.perf_counter() - self.start, 3),
            peak_memory=_peak_memory(),
            peak_device_memory=_peak_device_memory(),
        )


_running = threading.local()
"""The meter of each thread."""


@contextmanager
def unmetered() -> Iterator[None]:
    """Leave the body out of the cost that this thread measures, such as waiting for a model."""
    began = time.perf_counter()
    yield
    if meter := getattr(_running, "meter", None):
        _reset_peaks()
        meter.start += time.perf_counter() - began


def _reset_peaks() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the high-water mark
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()


def _peak_memory() -> int:
    with suppress(OSError, IndexError):  # Linux
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_device_memory() -> int:
    cuda = _cuda()
    return sum(cuda.max_memory_allocated(i) for i in range(cuda.device_count())) if cuda else 0


def _cuda() -> Any:
    """`torch.cuda`, if the piece has loaded torch and there is a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None
