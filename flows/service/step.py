"""The frame of every flow: `@step` for a single step, `@chain` for several of them in a row."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
from prefect import Flow, flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from pyarrow import csv, parquet

from flows.command.parameters import Parameters, complete_parameters
from flows.service.gpu_slot import gpu_slot
from flows.service.run_lock import alone
from memit.history import State, state_before
from memit.hyperparameters import Hyperparameters
from memit.requests import Record, read_counterfact, requests_digest
from tasks.engine.artifacts import Artifact, copy_file, describe, write_file, write_json, write_text
from tasks.engine.cache import CachedTask
from tasks.engine.cost import Cost
from tasks.engine.hub import open_model
from tasks.engine.loaded_model import ModelReference, pieces_at_once, token_budget
from tasks.engine.progress import gather
from tasks.engine.results import PREFIXES_FILE, REQUESTS_FILE, Manifest, finish_step, upstream
from tasks.engine.signals import resend_swallowed
from tasks.engine.workers import Workers, mapping_over, scatter, thread_runner

Item = TypeVar("Item")
Check = Callable[[Parameters], object]

CHECKS: dict[object, Check] = {}
"""What is checked before a command starts a flow."""

STEADY_PIECES = 8
"""Pieces into which few items are cut, in the mean."""


def workers_of(parameters: Parameters) -> Workers:
    """The workers of the section `runner`, and what a piece of this model occupies."""
    device, threads = parameters.model.device, parameters.model.threads
    threads //= pieces_at_once(device, threads)
    return Workers(**parameters.runner.model_dump(), threads=threads, device=device)


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """`size` consecutive items at a time."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def steady_chunks(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """Consecutive items, at most `most` at a time, cut where an item's own content says so: among
    many of them an item that comes or goes changes the piece that it is in, and no other."""
    mean = min(most, 1 << max(1, len(items) // STEADY_PIECES).bit_length() - 1)
    starts: list[int] = []
    for index, item in enumerate(items):
        number = int.from_bytes(hashlib.sha256(repr(item).encode()).digest()[:8])
        if not starts or number % mean == 0 or index - starts[-1] == most:
            starts.append(index)
    return [items[first:last] for first, last in pairwise([*starts, len(items)])]


@dataclass
class Run:
    """What a step works with: parameters, checked inputs, and where it leaves its results."""

    step: str
    parameters: Parameters
    resources: ExitStack
    """What the step holds until its end: the GPU and the workers."""
    given: Mapping[str, Manifest] = field(default_factory=dict)
    """What the steps that it reads have left, by their names."""
    files: list[Path] = field(default_factory=list)
    """Its results."""
    costs: list[Cost] = field(default_factory=list)
    """Those of all pieces."""
    notes: dict[str, float] = field(default_factory=dict)
    """What is to be known of how they were made."""
    manifest: Manifest | None = None
    """The record of the finished step."""
    has_workers: bool = False
    """Whether workers were started, which the first mapped pieces do."""

    def read(self, *steps: str) -> None:
        """Check the results of steps before they are used.

        Raises:
            IntegrityError: a result is missing, damaged, or belongs to another experiment.
        """
        self.given = upstream(*self.given, *steps)

    def input(self, step: str, path: Path) -> Artifact:
        """A result of another step, as the input of a task."""
        return self.given[step].file(path)

    @cached_property
    def model(self) -> ModelReference:
        """The model that is edited. If it computes on a GPU, the step waits here for its turn."""
        self.resources.enter_context(gpu_slot(self.parameters.model.device))
        return open_model(**self.parameters.model.placement())

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The model's preset with what `params.yaml` overrides."""
        return self.parameters.hyperparameters(self.model.model.id, self.model.model.shape)

    @property
    def records(self) -> list[Record]:
        """The records that the step `requests` has chosen."""
        return read_counterfact(REQUESTS_FILE)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The contexts that the step `prefixes` has sampled."""
        return tuple(json.loads(PREFIXES_FILE.read_text(encoding="utf-8"))["prefixes"])

    @property
    def batch(self) -> str:
        """By what a history knows this batch of facts."""
        return requests_digest(record.request for record in self.records)

    @property
    def history(self) -> State | None:
        """What earlier batches have left in `edit.history`.

        Raises:
            InputError: it is the history of another model or other layers.
        """
        directory = self.parameters.edit.history
        if directory is None:
            return None
        model, layers = self.model.model.digest, self.hyperparameters.layers
        return state_before(Path(directory), model, layers, self.batch)

    @property
    def earlier(self) -> Artifact | None:
        """The delta of earlier batches."""
        return describe(found.delta) if (found := self.history) else None

    @property
    def earlier_sums(self) -> dict[int, Artifact]:
        """The sums of earlier batches' keys."""
        found = self.history
        return {layer: describe(path) for layer, path in found.sums.items()} if found else {}

    def token_budget(self, setting: int | str, trained_blocks: int | None = None) -> int:
        """Padded tokens in a batch, see `tasks.engine.loaded_model.token_budget`."""
        return token_budget(setting, self.model, trained_blocks=trained_blocks)

    def compute(self, task: CachedTask, *arguments: Any, **named: Any) -> Any:
        """The result of a cached task."""
        result, cost = task.with_cost(*arguments, **named)
        self.costs.append(cost)
        return result

    def map(
        self,
        unit: str,
        task: CachedTask,
        pieces: Sequence[Any],
        count: Callable[[Any], int] = len,
        **shared: Any,
    ) -> list[Any]:
        """The results of a cached task on each of the pieces, in order.

        A progress bar shows the units that `count` finds in a piece.
        """
        if not self.has_workers:
            self.resources.enter_context(mapping_over(workers_of(self.parameters)))
            self.has_workers = True
        running = scatter(task, pieces, **shared)
        found = gather(task.name, unit, running, [count(piece) for piece in pieces])
        self.costs += [cost for _, cost in found]
        return [result for result, _ in found]

    def write(self, path: Path, write: Callable[[Path], object]) -> None:
        """Let `write` fill a result."""
        write_file(path, write)
        self.files.append(path)

    def write_table(self, path: Path, table: pyarrow.Table) -> None:
        """Write a result as Parquet."""
        self.write(path, lambda partial: parquet.write_table(table, partial))

    def write_csv(self, path: Path, table: pyarrow.Table) -> None:
        """Write a result as CSV."""
        self.write(path, lambda partial: csv.write_csv(table, partial))

    def write_text(self, path: Path, text: str) -> None:
        """Write a result as text."""
        write_text(path, text)
        self.files.append(path)

    def write_json(self, path: Path, content: object) -> None:
        """Write a result as JSON."""
        write_json(path, content)
        self.files.append(path)

    def copy(self, artifact: Artifact, path: Path) -> None:
        """Copy a file of the cache to a result."""
        copy_file(artifact.checked(), path)
        self.files.append(path)

    def finish(self) -> Manifest:
        """Write down, once, what the step made, from what, and at what cost."""
        if self.manifest is None:
            self.manifest = finish_step(self.step, self.files, self.given, self.costs, self.notes)
        return self.manifest


def step(
    name: str, *, reads: Sequence[str] = (), check: Check | None = None
) -> Callable[[Callable[[Run], None]], Flow[[Parameters], None]]:
    """A flow that checks what it reads, does a step's work, and records what that left.

    A step that leaves no files to others (`report`) records nothing. The `check` is made before it
    is run by itself; others only check the results that they read.
    """

    def decorate(work: Callable[[Run], None]) -> Flow[[Parameters], None]:
        # Not typed: a step is never deployed, and Prefect would build its form in every process.
        def body(parameters: Any) -> None:
            with ExitStack() as resources:
                run = Run(name, parameters, resources)
                run.read(*reads)
                work(run)
                if run.files:
                    run.finish()

        return _flow(name, body, work, check)

    return decorate


def chain(
    name: str, check: Check
) -> Callable[[Callable[[Parameters], None]], Flow[[Parameters], None]]:
    """A flow of several steps, the only one at work in its directory.

    A deployment hands over plain values, which are checked here; a command has checked its own.
    """

    def decorate(work: Callable[[Parameters], None]) -> Flow[[Parameters], None]:
        def body(parameters: Parameters) -> None:
            resend_swallowed()
            if not isinstance(parameters, Parameters):
                parameters = complete_parameters(parameters)
                check(parameters)
            # The chain sends heartbeats for all: a step's would hold its end up for a second.
            silent = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
            with alone(), mapping_over(workers_of(parameters)), silent:
                work(parameters)

        return _flow(name, body, work, check)

    return decorate


def _flow(
    name: str,
    body: Callable[[Parameters], None],
    work: Callable[..., None],
    check: Check | None,
) -> Flow[[Parameters], None]:
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(body, attribute, getattr(work, attribute))
    made = flow(
        name=name,
        flow_run_name=lambda: f"{name} {datetime.now():%d %b %H:%M}",
        validate_parameters=False,
        task_runner=thread_runner(),
    )(body)
    if check is not None:
        CHECKS[made] = check
    return made
