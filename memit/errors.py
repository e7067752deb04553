"""User-facing errors: one sentence with the cause and the fix."""

from __future__ import annotations

from collections.abc import Sequence

from memit.redaction import one_line


class MemitError(Exception):
    """Base of every error that this project raises for its user: one printable line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


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


class LimitError(MemitError):
    """Results that are beyond a limit that the user has set."""


class EditError(NumericsError):
    """Some of the edits cannot be written; the others may be."""

    def __init__(self, message: str, edits: Sequence[int]):
        super().__init__(message)
        self.edits = tuple(edits)
        """Their indices among the requests."""

    def __reduce__(self) -> tuple[type[EditError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.edits)
