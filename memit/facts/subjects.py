"""Subjects whose facts an edit should leave alone, for their share in C.

C stands for the keys of all that a model stores, and a corpus counts each of its tokens alike.
Facts are read at the last token of a subject, where the neighbours of edited facts have their keys.
See `docs/decisions/0014-keys-of-subjects.md`.
"""

from collections.abc import Collection

from memit.facts.records import Part, embedded_records
from memit.model_shape import ModelShape
from memit.requests import Record

BEHIND_NORMS = 0.9
"""The share of subjects' keys in C for models with a norm behind their MLPs, by default."""


def default_share(shape: ModelShape) -> float:
    """The share of C that is taken at subjects where nothing else is asked for."""
    return BEHIND_NORMS if shape.output_norm else 0.0


def subjects_to_keep(edited: Collection[str], part: Part | None = None) -> list[Record]:
    """Facts of one part, or both, of this project's, about none of the `edited` subjects."""
    left_out = {subject.casefold() for subject in edited}
    found = embedded_records(part)
    return [record for record in found if record.request.subject.casefold() not in left_out]
