"""What editors that learn may learn from: nothing that evaluation will ask."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from memit.errors import InputError
from memit.requests import EditRequest, Record


def disjoint_records(pool: Iterable[Record], evaluated: Iterable[Record]) -> list[Record]:
    """The records of `pool` from which an editor may learn when `evaluated` is what it is tried on.

    A record goes if it is about the same subject and relation as an evaluated one or if its prompt
    is one that evaluation scores; of the others, the paraphrases and neighbourhood prompts that
    evaluation scores are left out.
    """
    evaluated = list(evaluated)
    facts = {fact_key(record.request) for record in evaluated}
    scored = {prompt for record in evaluated for prompt in _prompts(record)}

    def unseen(prompts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(prompt for prompt in prompts if prompt not in scored)

    return [
        replace(
            record,
            paraphrase_prompts=unseen(record.paraphrase_prompts),
            neighborhood_prompts=unseen(record.neighborhood_prompts),
        )
        for record in pool
        if fact_key(record.request) not in facts and record.request.text not in scored
    ]


def fact_key(request: EditRequest) -> str:
    """A short digest of subject and relation; the prompt stands for a relation without a name."""
    relation = request.relation_id or request.prompt
    return hashlib.sha256(f"{request.subject}\0{relation}".encode()).hexdigest()[:16]


def check_unseen(requests: Sequence[EditRequest], seen: frozenset[str], method: str) -> None:
    """Raise `InputError` if a fact to be edited is one that `method` was trained on."""
    known = next((request for request in requests if fact_key(request) in seen), None)
    if known is not None:
        raise InputError(
            f"{method} was trained on {known.text!r}, so that editing it would measure nothing: "
            "train on records that are disjoint from the edits."
        )


def _prompts(record: Record) -> tuple[str, ...]:
    return (record.request.text, *record.paraphrase_prompts, *record.neighborhood_prompts)
