"""What can be said about the people: relations, their sentence templates, and their objects.

They are tables in `relations.toml`. A template ends where its object begins, and `"{} was born in"
+ " " + object + "."` is a sentence of the corpus. Five of six templates begin with the subject, as
four of five do in CounterFact; the sixth has it in the middle.
"""

import tomllib
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Relation:
    """One attribute that every person has exactly once."""

    name: str
    """The `relation_id` of its records."""
    templates: tuple[str, ...]
    """Prompts with exactly one `{}`, all of which the same object completes."""
    objects: tuple[str, ...]
    """Everything that can complete a template; a world draws some of them."""


def _relations() -> tuple[Relation, ...]:
    tables = tomllib.loads((files("memit.world") / "relations.toml").read_text("utf-8"))
    return tuple(
        Relation(
            name, tuple(table["templates"]), tuple(" ".join(table["objects"].split()).split(", "))
        )
        for name, table in tables.items()
    )


RELATIONS = _relations()
"""The relations in the order in which a world takes them."""
