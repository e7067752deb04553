"""The errors that a user can meet: one sentence each, with the cause and the way out."""

from memit.redaction import one_line, redacted


class MemitError(Exception):
    """Base of every error that this project raises for its user.

    Whatever a sentence quotes, it stays on one line and tells no password or token.
    """

    def __init__(self, sentence: str):
        super().__init__(one_line(redacted(sentence)))


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
