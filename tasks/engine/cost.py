"""What a piece of work costs: seconds and the memory that it needed at its peak."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tasks.engine.artifacts import Value


class Cost(Value):
    """Seconds and bytes of one piece, or of a step when pieces are put together."""

    seconds: float = 0.0
    peak_memory: int = 0
    """Largest resident size of the process, in bytes."""
    peak_device_memory: int = 0
    """Most memory that torch had allocated on the accelerator, in bytes."""


def total_cost(costs: Iterable[Cost]) -> Cost:
    """Seconds add up, peaks do not."""
    costs = list(costs)
    return Cost(
        seconds=round(sum(cost.seconds for cost in costs), 3),
        peak_memory=max((cost.peak_memory for cost in costs), default=0),
        peak_device_memory=max((cost.peak_device_memory for cost in costs), default=0),
    )


class Meter:
    """Measures what happens inside ``with Meter() as meter:``; then ``meter.cost`` is known."""

    cost = Cost()

    def __enter__(self) -> Meter:
        _forget_peaks()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *raised: object) -> None:
        self.cost = Cost(
            seconds=round(time.perf_counter() - self._start, 3),
            peak_memory=_peak_memory(),
            peak_device_memory=_peak_device_memory(),
        )


def _forget_peaks() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_device_memory() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
