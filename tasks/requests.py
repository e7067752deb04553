"""The tasks of the step `requests`: choose, sample, check and split the records."""

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from http.client import HTTPException, InvalidURL
from pathlib import Path
from random import Random
from typing import Literal
from urllib.request import Request

from torch.hub import download_url_to_file

from memit.errors import InputError, IntegrityError, UnreachableError
from memit.evaluation.zsre import as_records, read_zsre
from memit.facts.neighbors import without_edited_neighbors
from memit.facts.records import Part, embedded_records
from memit.files.digests import file_sha256, verify_sha256
from memit.files.reading import check_file
from memit.known_facts import known_facts
from memit.language_model import LanguageModel
from memit.requests import (
    Record,
    drawn_order,
    drop_conflicts,
    in_content_order,
    read_counterfact,
    read_facts,
    sample_records,
    write_records,
)
from memit.room import check_records
from memit.targets import plain_rows, weak_keys
from memit.true_objects import with_true_objects
from tasks.engine.artifacts import Artifact, Value, cache_directory, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import progress_bar
from tasks.engine.retry import retry_unreachable

SILENT_SECONDS = 60.0
"""How long an address may say nothing."""
BUSY = (408, 425, 429)
"""Answers that say "later"."""
TOKEN_BUDGET = 2_048
"""Tokens in a batch while the model is asked for true objects."""

Source = Literal["synthetic", "embedded", "counterfact", "facts", "zsre"]


class ChosenRequests(Value):
    """The records of the experiment."""

    records: Artifact
    count: int
    available: int
    """Records that they were chosen from."""
    dropped: int
    """Records left out because they contradict an earlier one."""
    weak: str | None
    """What `weak_keys` says of them."""
    known_share: float | None
    """Percent of the records asked that the unedited model knows; None if it was not asked."""
    neighbors_dropped: int
    """Neighbourhood prompts of embedded records left out because they are edited themselves."""


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


@retry_unreachable
def fetch(url: str, sha256: str, to: Path) -> Path:
    """Download an address to a file that appears only when it is whole and right.

    Raises:
        InputError, IntegrityError, UnreachableError: it is no address, sends something else, or
            does not answer.
    """
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


def read_source(source: Source, path: Path) -> tuple[list[Record], list[Record]]:
    """All records of a file, and apart from them those that contradict an earlier one.

    A user's own facts come in the order of their contents.

    Raises:
        ConflictError: a user's own facts contradict each other.
    """
    if source == "facts":
        return in_content_order(read_facts(path)), []
    if source == "zsre":
        return drop_conflicts(as_records(read_zsre(path)))
    return drop_conflicts(read_counterfact(path))


def write_embedded(part: Part = "reported") -> Artifact:
    """A file with the facts of this project that are in one part."""
    return keep_records(embedded_records(part))


def keep_records(records: Sequence[Record]) -> Artifact:
    """A file with some records."""
    return store_piece("requests", ".json", lambda path: write_records(records, path))


@cached_task("requests")
def choose_requests(
    source: Source,
    file: Artifact,
    count: int | None,
    seed: int,
    model: ModelReference,
    known: bool = False,
) -> ChosenRequests:
    """Read, filter, sample and tokenise the records.

    A record without a true object gets the unedited model's answer as its true object.

    Raises:
        InputError: the model knows fewer facts than are wanted.
    """
    records, dropped = read_source(source, file.checked())
    chosen, share, edited = sample_records(records, None if known else count, seed), None, 0
    with loaded(model) as lm:
        chosen = with_true_objects(lm, chosen, token_budget=TOKEN_BUDGET)
        if known:
            chosen, share = sample_known(lm, chosen, count, seed)
        if source == "embedded":
            chosen, edited = without_edited_neighbors(chosen)
        requests = [record.request for record in chosen]
        weak = weak_keys(requests, plain_rows(lm, requests))
        check_records(lm, chosen)
    return ChosenRequests(
        records=keep_records(chosen),
        count=len(chosen),
        available=len(records),
        dropped=len(dropped),
        weak=weak,
        known_share=share,
        neighbors_dropped=edited,
    )


def sample_known(
    lm: LanguageModel, records: Sequence[Record], count: int | None, seed: int
) -> tuple[list[Record], float]:
    """The first `count` records, or all, that the model knows, in the order in which they are
    drawn; returned in the given order, with the share that it knows (`known_facts`)."""
    order = drawn_order(records, seed)
    given = {records[index].case_id: index for index in order}
    with progress_bar("requests", len(records), "facts asked") as bar:
        known, share = known_facts(
            lm,
            [records[index] for index in order],
            count,
            token_budget=TOKEN_BUDGET,
            progress=bar.advance,
        )
    if len(known) < (count or 1):
        raise InputError(
            f"the model knows {len(known)} of {len(records)} facts, and {count or 1} are to be "
            "edited: ask for fewer, or set requests.known to false."
        )
    return sorted(known, key=lambda record: given[record.case_id]), share


class Split(Value):
    """All records without contradictions, in two parts that share no subject."""

    edited: Artifact
    """Those that are sampled for editing."""
    training: Artifact
    """Those that editors may learn from."""
    count: int
    """How many can be edited."""
    training_count: int
    dropped: int
    """Records left out because they contradict an earlier one."""
    prompts_dropped: int
    """Neighbourhood prompts of edited records that ask what training tells."""


@cached_task("split")
def split_records(source: Source, file: Artifact, training: int, seed: int) -> Split:
    """Set aside `training` records, at most half of all, whole subjects at a time."""
    records, dropped = read_source(source, file.checked())
    edited, learnt = split_by_subject(records, training, seed)
    purged = without_prompts(edited, learnt)
    before, after = (sum(len(r.neighborhood_prompts) for r in part) for part in (edited, purged))
    return Split(
        edited=keep_records(purged),
        training=keep_records(learnt),
        count=len(purged),
        training_count=len(learnt),
        dropped=len(dropped),
        prompts_dropped=before - after,
    )


def split_by_subject(
    records: Sequence[Record], training: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """Records to edit and records to learn from, which have no subject in common."""
    counts = Counter(record.request.subject for record in records)
    subjects = list(counts)
    Random(seed).shuffle(subjects)
    learnt: set[str] = set()
    wanted = min(training, len(records) // 2)
    while sum(counts[subject] for subject in learnt) < wanted:
        learnt.add(subjects.pop())
    return (
        [record for record in records if record.request.subject not in learnt],
        [record for record in records if record.request.subject in learnt],
    )


def without_prompts(edited: Sequence[Record], learnt: Sequence[Record]) -> list[Record]:
    """The edited records without neighbourhood prompts that a record to learn from contains."""
    known = {
        prompt for record in learnt for prompt in (record.request.text, *record.paraphrase_prompts)
    }
    return [
        replace(
            record,
            neighborhood_prompts=tuple(p for p in record.neighborhood_prompts if p not in known),
        )
        for record in edited
    ]


@cached_task("questions")
def sample_questions(edited: Artifact, count: int | None, seed: int) -> Artifact:
    """Some of zsRE's records, or all of them.

    Raises:
        InputError: there are fewer.
    """
    return keep_records(sample_records(read_counterfact(edited.checked()), count, seed))
