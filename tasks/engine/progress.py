"""Progress of a step: a bar in the terminal and a progress artifact in Prefect's UI."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture, as_completed
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from memit.errors import ResourceError
from tasks.engine.signals import INTERRUPTED, TERMINATED, exit_after_grace

console = Console(stderr=True)
"""For messages; results go to standard output."""

SECONDS_BETWEEN_LINES = 20.0
"""Where no bar can be drawn, in a log for example, a line tells how far a step is."""
SECONDS_BETWEEN_UPDATES = 2.0
"""The shortest interval between updates of Prefect's artifact."""

WORKER_DEATHS = (
    "distributed.scheduler.KilledWorker",
    "ray.exceptions.NodeDiedError",
    "ray.exceptions.OutOfMemoryError",
    "ray.exceptions.WorkerCrashedError",
)
"""What Dask and Ray raise for a piece whose workers died again and again."""

_bars: dict[str, Bar] = {}
"""The bars that are shown, by their task's name."""
_piece = threading.local()
"""The bar of the piece that a thread computes, and the units that the piece has counted there."""


class Bar:
    """The progress of one step, which never goes back."""

    def __init__(self, name: str, total: int, show: Callable[[int], object]) -> None:
        self._total = total
        self._show = show
        self._done = 0
        self._shown = 0
        self._updated = 0.0
        self._lock = threading.Lock()
        self._artifact: Any = None
        if FlowRunContext.get() is not None:
            self._artifact = create_progress_artifact(
                progress=0.0, key=name.replace("_", "-"), description=f"progress of {name}"
            )

    def advance(self, units: int) -> None:
        """Count units of work, or take some back."""
        with self._lock:
            self._done += units
            self._shown = max(self._shown, min(self._done, self._total))
            self._show(self._shown)
            now = time.monotonic()
            is_due = now - self._updated > SECONDS_BETWEEN_UPDATES or self._shown == self._total
            if self._artifact and is_due:
                self._updated = now
                update_progress_artifact(self._artifact, 100.0 * self._shown / max(1, self._total))


@contextmanager
def progress_bar(name: str, total: int, unit: str) -> Iterator[Bar]:
    """Show a bar for the step `name` that is full at `total` units."""
    columns = (
        TextColumn(f"  {name:<12}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as display:
        task = display.add_task(name, total=total)
        lines = _lines(name, total, unit)
        show = lines if display.disable else lambda done: display.update(task, completed=done)
        bar = Bar(name, total, show)
        _bars[name] = bar
        try:
            yield bar
        finally:
            _bars.pop(name, None)


def _lines(name: str, total: int, unit: str) -> Callable[[int], None]:
    """Print a line now and then: what is done, and how long the rest takes at this rate."""
    started = last = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if 0 < done < total and now - last > SECONDS_BETWEEN_LINES:
            last = now
            left = (now - started) / done * (total - done)
            console.print(f"  {name:<12} {done} of {total} {unit}, about {left:.0f} s left")

    return show


@contextmanager
def piece_progress(name: str) -> Iterator[None]:
    """Let `advance` count on the bar of the task `name`, if one is shown."""
    _piece.bar, _piece.units = _bars.get(name), 0
    try:
        yield
    finally:
        advance(-_piece.units)  # `gather` counts the finished piece as a whole
        _piece.bar = None


def advance(units: int) -> None:
    """Count units of the piece that this thread computes."""
    if bar := getattr(_piece, "bar", None):
        _piece.units += units
        bar.advance(units)


def _result(future: PrefectFuture[Any], name: str) -> Any:
    """A piece's result; `ResourceError` if its workers died."""
    try:
        return future.result()
    except Exception as error:
        if f"{type(error).__module__}.{type(error).__name__}" not in WORKER_DEATHS:
            raise
        raise ResourceError(
            f"the workers that computed a piece of {name} died several times ({error}): give them "
            "more memory, fewer of them, or a smaller token_budget."
        ) from error


def gather(
    name: str, unit: str, futures: Sequence[PrefectFuture[Any]], sizes: Sequence[int]
) -> list[Any]:
    """Wait for mapped pieces under a bar and return their results in order.

    Raises:
        The first piece's error, as soon as it fails.
    """
    size = {future.task_run_id: units for future, units in zip(futures, sizes, strict=True)}
    with progress_bar(name, sum(sizes), unit) as bar:
        try:
            for future in as_completed(list(futures)):
                _result(future, name)
                bar.advance(size[future.task_run_id])
        except (KeyboardInterrupt, TerminationSignal) as request:
            exit_after_grace(INTERRUPTED if isinstance(request, KeyboardInterrupt) else TERMINATED)
            raise
    return [future.result() for future in futures]
