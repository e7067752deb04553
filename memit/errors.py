"""The errors that a user can meet: one sentence each, with the cause and the way out."""

from __future__ import annotations

from collections.abc import Sequence

from memit.redaction import one_line, redacted

LONGEST_QUOTE = 100_000
"""Characters of a sentence that are looked at."""


class MemitError(Exception):
    """Base of every error that this project raises for its user.

    Whatever a sentence quotes, it stays on one line and tells no password or token.
    """

    def __init__(self, sentence: str):
        super().__init__(one_line(redacted(sentence[:LONGEST_QUOTE])))


class InputError(MemitError):
    """A parameter, a file or a record that cannot be used as it is."""


class ConflictError(InputError):
    """Two requests that contradict each other."""


class ModelStructureError(MemitError):
    """The model lacks something that the method needs."""


class IntegrityError(MemitError):
    """An artifact that is truncated, damaged, or belongs to something else."""


class ResourceError(MemitError):
    """Not enough memory or disk for the job."""


class UnreachableError(MemitError):
    """A hub or an address that does not answer."""


class NumericsError(MemitError):
    """A number that must be finite or a matrix that must be definite, and is not."""


class EditError(NumericsError):
    """Some edits among others cannot be written; without them the rest may be."""

    def __init__(self, sentence: str, edits: Sequence[int]):
        super().__init__(sentence)
        self.edits = tuple(edits)
        """Their places among the requests."""

    def __reduce__(self) -> tuple[type[EditError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.edits)
