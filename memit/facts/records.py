"""Tables of true pairs and the records that are made from them.

They hold common knowledge that a small model has: of a larger collection those pairs were kept
whose object SmolLM2-135M prefers to another of the relation after the main prompt; in relations of
which it knows little, to two of three others.
A table is one relation, a TOML file in `relations/`: a main `prompt`, its `paraphrases` and
`generation` prompts, and all `subjects` under the object that is true of them. Every choice is the
order of SHA-256 digests of relation, subject and candidate, so that it depends neither on the order
of the lines nor on what other tables hold.
"""

import hashlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from memit.requests import EditRequest, Record, fill

Part = Literal["reported", "choosing"]
"""The facts that results are reported for, and those that settings are chosen with."""


@dataclass(frozen=True)
class Relation:
    """A table, named like its file; its templates have one `{}` for the subject."""

    name: str
    """The `relation_id` of its records."""
    prompt: str
    paraphrases: Sequence[str]
    """Templates for the same object as `prompt`, in other words."""
    generation: Sequence[str]
    """Templates that the object does not complete."""
    subjects: Mapping[str, Sequence[str]]
    """Under each object the subjects that it is true of."""


def embedded_records(part: Part | None = None) -> list[Record]:
    """The records of one part, or those of both, one after the other.

    A subject is in one part for good, whatever its relations, and neighbours are from the part of
    their record. A subject that shares its object with none of its part has no record.
    """
    parts = get_args(Part) if part is None else (part,)
    return [record for each in parts for record in records_of(embedded_relations(), each)]


@cache
def embedded_relations() -> tuple[Relation, ...]:
    """The relations of the package's tables, by name."""
    tables = (files("memit.facts") / "relations").iterdir()
    texts = {table.name.removesuffix(".toml"): table.read_text("utf-8") for table in tables}
    return tuple(Relation(name, **tomllib.loads(texts[name])) for name in sorted(texts))


def part_of(subject: str) -> Part:
    """The part that a subject is in: one in three is for choosing."""
    return "reported" if int(_digest("part", subject), 16) % 3 else "choosing"


def records_of(relations: Iterable[Relation], part: Part) -> Iterator[Record]:
    """The records of one part, in the order of the relations, their objects and subjects."""
    for relation in relations:
        for true, subjects in sorted(relation.subjects.items()):
            group = sorted(subject for subject in subjects if part_of(subject) == part)
            if len(group) > 1:
                yield from (_record(relation, true, subject, group) for subject in group)


def _record(relation: Relation, true: str, subject: str, group: list[str]) -> Record:
    key = relation.name, subject
    paraphrases = _ranked(relation.paraphrases, *key)
    others = _ranked((other for other in group if other != subject), *key)
    target_new = _ranked(relation.subjects.keys() - {true}, *key)[0]
    return Record(
        case_id=int(_digest("case", *key)[:12], 16),
        request=EditRequest(subject, relation.prompt, target_new, true, relation.name, between=" "),
        paraphrase_prompts=tuple(fill(template, subject) for template in paraphrases[:2]),
        neighborhood_prompts=tuple(_neighbors([relation.prompt, *paraphrases], others)),
        generation_prompts=tuple(fill(template, subject) for template in relation.generation),
    )


def _neighbors(templates: list[str], others: list[str]) -> Iterator[str]:
    """Up to ten prompts, each about another subject, in the words of the first template, which are
    those of the edit; of fewer than five subjects, five prompts, also with the next templates."""
    for number in range(min(max(len(others), 5), 10)):
        turn, index = divmod(number, len(others))
        yield fill(templates[turn], others[index])


def _ranked(candidates: Iterable[str], *key: str) -> list[str]:
    """Candidates in an order that depends on them and the key alone."""
    return sorted(candidates, key=lambda candidate: _digest(*key, candidate))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()
