"""The step ``requests``: choose, sample and check the facts; one file that all later steps read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from memit.download import fetch, verify_sha256
from memit.reading import SIZE_LIMIT, check_file
from memit.requests import (
    Record,
    drop_conflicts,
    read_counterfact,
    read_facts,
    sample_records,
    write_records,
)
from tasks.artifacts import Artifact, cache_directory, cached_task, store_piece
from tasks.loading import ModelReference, loaded
from tasks.measure import Cost, Meter
from tasks.retrying import patient

TOKEN_BUDGET = 2_048
"""Tokens in a batch while the model is asked for true objects."""

Source = Literal["synthetic", "counterfact", "facts"]


class ChosenRequests(BaseModel):
    """The records of the experiment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    records: Artifact
    dropped: int
    """Records left out because they contradict an earlier one."""
    cost: Cost


def locate_records(path: str | None, url: str | None, sha256: str | None) -> Path:
    """The file of records on this disk, fetched if need be, with its checksum compared.

    Raises:
        InputError, IntegrityError, UnreachableError: it cannot be had as described.
    """
    if url is not None and sha256 is not None:
        place = cache_directory() / "downloads" / f"{sha256.lower()}.json"
        return patient(fetch)(url, sha256, place, size_limit=SIZE_LIMIT)
    found = Path(path or "")
    check_file(found, "the records")
    if sha256 is not None:
        verify_sha256(found, sha256)
    return found


def read_source(source: Source, path: Path) -> tuple[list[Record], int]:
    """All records of a file, and how many were dropped because they contradict an earlier one.

    Raises:
        ConflictError: a user's own facts contradict each other.
    """
    if source == "facts":
        return read_facts(path), 0
    return drop_conflicts(read_counterfact(path))


def sample(records: list[Record], count: int | None, seed: int) -> list[Record]:
    """``count`` of the records, or all of them."""
    return records if count is None else sample_records(records, count, seed)


@cached_task(
    "requests",
    version=1,
    code=("memit.generation", "memit.reading", "memit.requests", "memit.true_objects"),
)
def choose_requests(
    source: Source, file: Artifact, count: int | None, seed: int, model: ModelReference
) -> ChosenRequests:
    """Read, filter, sample and tokenise the records.

    Where a record names no true object, what the unedited model says stands for it.
    """
    from memit.targets import edit_rows
    from memit.true_objects import with_true_objects

    records, dropped = read_source(source, file.checked())
    chosen = sample(records, count, seed)
    with loaded(model) as lm, Meter() as meter:
        edit_rows(lm, [record.request for record in chosen], ())
        chosen = with_true_objects(lm, chosen, token_budget=TOKEN_BUDGET)
    piece = store_piece("requests", ".json", lambda path: write_records(chosen, path))
    return ChosenRequests(records=piece, dropped=dropped, cost=meter.cost)
