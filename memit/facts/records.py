"""Tables of true pairs and the records that are made from them.

A table is one relation, a TOML file in `relations/` named like it: a main `prompt`, its
`paraphrases` and open-ended `generation` prompts, each with one `{}` for the subject, and all
`subjects` under the object that is true of them. Nothing is drawn from a generator: every choice is
the order of SHA-256 digests of relation, subject and candidate, so that it depends neither on the
order of the lines nor on what other tables hold.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from memit.requests import EditRequest, Record, fill

Part = Literal["reported", "choosing"]
"""The facts that results are reported for, and those that settings are chosen with."""
PARAPHRASES = 2
NEIGHBORS = range(5, 11)
"""How many neighbourhood prompts a record has. Other subjects come once each; if there are fewer
than five, they come again with another template."""


@dataclass(frozen=True)
class Relation:
    """A table: everything that is known about one relation."""

    name: str
    """The `relation_id` of its records."""
    prompt: str
    paraphrases: tuple[str, ...]
    """Templates for the same object as `prompt`, in other words."""
    generation: tuple[str, ...]
    """Templates that the object does not complete."""
    subjects: Mapping[str, tuple[str, ...]]
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
    return tuple(read_relation(name, texts[name]) for name in sorted(texts))


def read_relation(name: str, text: str) -> Relation:
    """A relation from the text of its table."""
    table = tomllib.loads(text)
    subjects = {true: tuple(of) for true, of in table["subjects"].items()}
    templates = tuple(table["paraphrases"]), tuple(table["generation"])
    return Relation(name, table["prompt"], *templates, subjects)


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
    templates = _ranked((relation.prompt, *relation.paraphrases), *key)
    paraphrases = [template for template in templates if template != relation.prompt][:PARAPHRASES]
    others = _ranked((other for other in group if other != subject), *key)
    return Record(
        case_id=int(_digest("case", *key)[:12], 16),
        request=EditRequest(
            subject=subject,
            prompt=relation.prompt,
            target_new=_ranked(relation.subjects.keys() - {true}, *key)[0],
            target_true=true,
            relation_id=relation.name,
            between=" ",
        ),
        paraphrase_prompts=tuple(fill(template, subject) for template in paraphrases),
        neighborhood_prompts=tuple(_neighbors(templates, others)),
        generation_prompts=tuple(fill(template, subject) for template in relation.generation),
    )


def _neighbors(templates: list[str], others: list[str]) -> Iterator[str]:
    """Prompts about the other subjects in turn, each with the next template: no two are equal."""
    count = min(max(len(others), NEIGHBORS[0]), NEIGHBORS[-1])
    for number in range(count):
        turn, index = divmod(number, len(others))
        yield fill(templates[(turn + index) % len(templates)], others[index])


def _ranked(candidates: Iterable[str], *key: str) -> list[str]:
    """Candidates in an order that depends on them and the key alone."""
    return sorted(candidates, key=lambda candidate: _digest(*key, candidate))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()


def held_out_documents() -> list[str]:
    """Plain English prose for the perplexity, a paragraph per document."""
    return (files("memit.facts") / "held_out.txt").read_text("utf-8").splitlines()
