"""The step ``requests``: choose, sample and check the facts; one file that all later steps read."""

from __future__ import annotations

import socket
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Literal
from urllib.request import Request

from memit.errors import InputError, IntegrityError, UnreachableError
from memit.files.reading import check_file, file_sha256, verify_sha256
from memit.requests import (
    Record,
    drop_conflicts,
    read_counterfact,
    read_facts,
    sample_records,
    write_records,
)
from tasks.engine.artifacts import Artifact, Value, cache_directory, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.cost import Cost, Meter
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.retry import patient

SILENT_SECONDS = 60.0
"""How long an address may say nothing."""
BUSY = (408, 425, 429)
"""Answers that say "later"."""
TOKEN_BUDGET = 2_048
"""Tokens in a batch while the model is asked for true objects."""

Source = Literal["synthetic", "counterfact", "facts"]


class ChosenRequests(Value):
    """The records of the experiment."""

    records: Artifact
    dropped: int
    """Records left out because they contradict an earlier one."""
    weak: str | None
    """What `weak_keys` says of them."""
    cost: Cost


def locate_records(path: str | None, url: str | None, sha256: str | None) -> Path:
    """The file of records on this disk, fetched if need be, with its checksum compared.

    Raises:
        InputError, IntegrityError, UnreachableError: it cannot be had as described.
    """
    if url is not None and sha256 is not None:
        return fetch(url, sha256.lower(), cache_directory() / "downloads" / sha256.lower())
    found = Path(path or "")
    check_file(found, "the records")
    if sha256 is not None:
        verify_sha256(found, sha256)
    return found


@patient
def fetch(url: str, sha256: str, to: Path) -> Path:
    """Download an address to a file that appears only when it is whole and right.

    Raises:
        InputError, IntegrityError, UnreachableError: it is no address, sends something else, or
            does not answer.
    """
    from torch.hub import download_url_to_file

    if to.is_file() and file_sha256(to) == sha256:
        return to
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENT_SECONDS)
    try:
        Request(url)  # what is no address leaves nothing here
        to.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(to), hash_prefix=sha256, progress=False)
    except RuntimeError as error:
        raise IntegrityError(f"{url} sent something else ({error}): correct either.") from None
    except (OSError, HTTPException, ValueError) as error:
        status = getattr(error, "code", 503)
        wrong = isinstance(error, ValueError | InvalidURL) or (status < 500 and status not in BUSY)
        raise (InputError if wrong else UnreachableError)(
            f"{url} cannot be fetched ({error}): check the address and the network, or set "
            "requests.path to a file that is here."
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    return to


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


@cached_task("requests")
def choose_requests(
    source: Source, file: Artifact, count: int | None, seed: int, model: ModelReference
) -> ChosenRequests:
    """Read, filter, sample and tokenise the records.

    Where a record names no true object, what the unedited model says stands for it.
    """
    from memit.room import check_records
    from memit.targets import plain_rows, weak_keys
    from memit.true_objects import with_true_objects

    records, dropped = read_source(source, file.checked())
    chosen = sample(records, count, seed)
    with loaded(model) as lm, Meter() as meter:
        requests = [record.request for record in chosen]
        weak = weak_keys(requests, plain_rows(lm, requests))
        chosen = with_true_objects(lm, chosen, token_budget=TOKEN_BUDGET)
        check_records(lm, chosen)
    piece = store_piece("requests", ".json", lambda path: write_records(chosen, path))
    return ChosenRequests(records=piece, dropped=dropped, weak=weak, cost=meter.cost)
