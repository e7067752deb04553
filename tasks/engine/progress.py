"""How far a step has come: a bar in the terminal and a progress artifact in Prefect's UI."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

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
from tasks.engine.signals import INTERRUPTED, TERMINATED, leave_soon

console = Console(stderr=True)
"""Where all output for people goes; results go to standard output."""

SECONDS_BETWEEN_UPDATES = 2.0
"""Prefect's server hears of progress no more often."""

WORKER_DEATHS = (
    "distributed.scheduler.KilledWorker",
    "ray.exceptions.NodeDiedError",
    "ray.exceptions.OutOfMemoryError",
    "ray.exceptions.WorkerCrashedError",
)
"""What Dask and Ray raise when a piece was tried often enough."""

_bars: dict[str, Bar] = {}


class Bar:
    """The progress of one step: units of finished pieces and of those in the making."""

    def __init__(self, name: str, total: int, show: Callable[[int], object]) -> None:
        self.name = name
        self.total = total
        self._show = show
        self._finished = 0
        self._begun: dict[int, int] = {}
        self._shown = 0
        self._artifact: UUID | None = None
        self._told = 0.0
        self._lock = threading.Lock()
        if FlowRunContext.get() is not None:
            self._artifact = create_progress_artifact(  # pyright: ignore[reportAttributeAccessIssue]
                progress=0.0, key=name.replace("_", "-"), description=f"progress of {name}"
            )

    def finish_piece(self, units: int) -> None:
        """Count a finished piece, computed or found."""
        with self._lock:
            self._finished += units
            self._update()

    def advance(self, piece: int, units: int) -> None:
        """Count ``units`` of a piece that is in the making."""
        with self._lock:
            self._begun[piece] = self._begun.get(piece, 0) + units
            self._update()

    def leave_piece(self, piece: int) -> None:
        """Forget what was counted of a piece; `finish_piece` counts it whole."""
        with self._lock:
            self._begun.pop(piece, None)

    def _update(self) -> None:
        done = min(self.total, self._finished + sum(self._begun.values()))
        self._shown = max(self._shown, done)
        self._show(self._shown)
        now = time.monotonic()
        if self._artifact and (now - self._told > SECONDS_BETWEEN_UPDATES or done == self.total):
            self._told = now
            update_progress_artifact(self._artifact, 100.0 * self._shown / max(1, self.total))


@contextmanager
def progress_bar(name: str, total: int, unit: str) -> Iterator[Bar]:
    """Show a bar for the step ``name`` that is full at ``total`` units."""
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
        line = display.add_task(name, total=total)
        bar = Bar(name, total, lambda done: display.update(line, completed=done))
        _bars[name] = bar
        try:
            yield bar
        finally:
            _bars.pop(name, None)


@contextmanager
def piece_progress(name: str) -> Iterator[Callable[[int], None]]:
    """A callback for the piece that this thread computes; silent where no bar is shown."""
    bar = _bars.get(name)
    piece = threading.get_ident()
    try:
        yield (lambda units: bar.advance(piece, units)) if bar else (lambda units: None)
    finally:
        if bar:
            bar.leave_piece(piece)


def _result(future: PrefectFuture[Any], name: str) -> Any:
    """A piece's result; `ResourceError` where workers died of it."""
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
    """Wait for mapped pieces under a bar and give their results back in order.

    Raises:
        The first piece's error, as soon as it fails.
    """
    size = {future.task_run_id: units for future, units in zip(futures, sizes, strict=True)}
    with progress_bar(name, sum(sizes), unit) as bar:
        try:
            for future in as_completed(list(futures)):
                _result(future, name)
                bar.finish_piece(size[future.task_run_id])
        except (KeyboardInterrupt, TerminationSignal) as asked:
            leave_soon(INTERRUPTED if isinstance(asked, KeyboardInterrupt) else TERMINATED)
            raise
    return [future.result() for future in futures]
