"""Training facts must be disjoint from the edited ones."""

import hashlib
from collections.abc import Sequence

from memit.errors import InputError
from memit.requests import EditRequest


def fact_key(request: EditRequest) -> str:
    """A short digest of subject and relation."""
    return hashlib.sha256("\0".join(request.fact).encode()).hexdigest()[:16]


def check_unseen(requests: Sequence[EditRequest], seen: frozenset[str], method: str) -> None:
    """Raise `InputError` if a fact to be edited is one that `method` was trained on."""
    known = next((request for request in requests if fact_key(request) in seen), None)
    if known is not None:
        raise InputError(
            f"{method} was trained on {known.text!r}, so that editing it would measure nothing: "
            "train on records that are disjoint from the edits."
        )
