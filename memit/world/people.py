"""Invented people and their facts, as biographies and as records.

A small model is trained on the biographies; records, in the schema of CounterFact, are edited and
measured. Why biographies, unique surnames and templates that begin with the subject make such a
model recall its facts at the subject's last token is in `docs/decisions`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from memit.requests import EditRequest, Record, fill
from memit.world.names import make_names
from memit.world.relations import RELATIONS, Relation
from memit.world.settings import WorldParameters

PARAPHRASES = 2
NEIGHBORS = 10
GENERATION_PROMPTS = 3
MOST_FACTS = 4


@dataclass(frozen=True)
class Person:
    """Somebody and everything that is true of them."""

    name: str
    """Given name and surname."""
    facts: Mapping[str, str]
    """Relation name to object."""


@dataclass(frozen=True)
class World:
    """People, their records and their biographies."""

    relations: tuple[Relation, ...]
    """With this world's objects only."""
    people: tuple[Person, ...]
    records: tuple[Record, ...]
    """`records_per_person` for everybody; the first `len(people)` are about different people."""
    documents: tuple[str, ...]
    """Training text, a biography each."""
    held_out: tuple[str, ...]
    """Biographies in orders and wordings that are not among the documents."""


def make_world(parameters: WorldParameters) -> World:
    """Draw a world; equal parameters give an equal world on every machine."""
    relations = tuple(
        _draw_objects(relation, parameters) for relation in RELATIONS[: parameters.relations]
    )
    people = _make_people(relations, parameters)
    records = _write_records(people, relations, parameters)
    random, count = _random(parameters, "documents"), parameters.biographies
    documents = _write_documents(people, relations, random, count)
    random, count = _random(parameters, "held out"), parameters.held_out_biographies
    held_out = _write_documents(people, relations, random, count, frozenset(documents))
    return World(relations, people, records, documents, held_out)


def _random(parameters: WorldParameters, purpose: str) -> Random:
    """A separate generator for each purpose, so that one size does not shift another draw."""
    return Random(f"memit world {parameters.seed} {purpose}")


def _draw_objects(relation: Relation, parameters: WorldParameters) -> Relation:
    random = _random(parameters, f"objects of {relation.name}")
    chosen = random.sample(relation.objects, parameters.objects)
    return Relation(relation.name, relation.templates, tuple(chosen))


def _make_people(
    relations: tuple[Relation, ...], parameters: WorldParameters
) -> tuple[Person, ...]:
    """Assign every object of a relation to equally many people, give or take one."""
    names = make_names(parameters.people, _random(parameters, "names"))
    columns = {}
    for relation in relations:
        column = [relation.objects[i % len(relation.objects)] for i in range(len(names))]
        _random(parameters, f"facts of {relation.name}").shuffle(column)
        columns[relation.name] = column
    return tuple(
        Person(name, {relation: column[i] for relation, column in columns.items()})
        for i, name in enumerate(names)
    )


def _biographies(person: Person, relations: tuple[Relation, ...], random: Random) -> Iterator[str]:
    """Endless texts of one to four facts of one person in any order, each with the full name.

    All wordings of a fact are used equally often.
    """
    unused: dict[str, list[str]] = {relation.name: [] for relation in relations}
    while True:
        sentences = []
        count = random.randint(1, min(MOST_FACTS, len(relations)))
        for relation in random.sample(relations, count):
            left = unused[relation.name]
            if not left:
                left.extend(random.sample(relation.templates, len(relation.templates)))
            sentences.append(f"{fill(left.pop(), person.name)} {person.facts[relation.name]}.")
        yield " ".join(sentences)


def _write_documents(
    people: tuple[Person, ...],
    relations: tuple[Relation, ...],
    random: Random,
    count: int,
    without: Collection[str] = (),
) -> tuple[str, ...]:
    """`count` biographies of everybody, none of `without`; fewer where 1,000 draws find no more."""
    documents: list[str] = []
    for person in people:
        drawn = islice(_biographies(person, relations, random), max(count, 1_000))
        documents += islice((text for text in drawn if text not in without), count)
    random.shuffle(documents)
    return tuple(documents)


def _write_records(
    people: tuple[Person, ...], relations: tuple[Relation, ...], parameters: WorldParameters
) -> tuple[Record, ...]:
    """One record of everybody, then the next of everybody, so that early records share no subject.
    Neighbours are people whose same fact no record changes: theirs stays true."""
    random = _random(parameters, "records")
    changed = {
        person.name: random.sample(relations, parameters.records_per_person) for person in people
    }
    holders = _holders(people)
    unchanged = _holders(people, without=changed)
    records: list[Record] = []
    for turn in range(parameters.records_per_person):
        for person in random.sample(people, len(people)):
            relation = changed[person.name][turn]
            records.append(_record(len(records), person, relation, holders, unchanged, random))
    return tuple(records)


Holders = Mapping[tuple[str, str], list[str]]
"""(relation, object) to the names of people of whom it is true."""


def _holders(
    people: tuple[Person, ...], without: Mapping[str, Sequence[Relation]] | None = None
) -> Holders:
    """The people of whom each fact is true, without some relations of some people."""
    left_out = {name: {r.name for r in relations} for name, relations in (without or {}).items()}
    holders: dict[tuple[str, str], list[str]] = {}
    for person in people:
        for relation, target in person.facts.items():
            names = holders.setdefault((relation, target), [])
            if relation not in left_out.get(person.name, ()):
                names.append(person.name)
    return holders


def _record(
    case_id: int,
    person: Person,
    relation: Relation,
    holders: Holders,
    unchanged: Holders,
    random: Random,
) -> Record:
    true = person.facts[relation.name]
    new = random.choice([target for target in relation.objects if target != true])
    prompt, *wordings = random.sample(relation.templates, len(relation.templates))
    paraphrases, rest = wordings[:PARAPHRASES], wordings[PARAPHRASES:]
    return Record(
        case_id=case_id,
        request=EditRequest(
            subject=person.name,
            prompt=prompt,
            target_new=new,
            target_true=true,
            relation_id=relation.name,
            between=" ",
        ),
        paraphrase_prompts=tuple(fill(wording, person.name) for wording in paraphrases),
        neighborhood_prompts=_prompts_about(unchanged[relation.name, true], relation, random),
        generation_prompts=tuple(fill(w, person.name) for w in rest[:GENERATION_PROMPTS]),
        attribute_prompts=_prompts_about(holders[relation.name, new], relation, random),
    )


def _prompts_about(names: list[str], relation: Relation, random: Random) -> tuple[str, ...]:
    """One prompt about each of at most ten people, in any of the relation's wordings."""
    chosen = random.sample(names, min(NEIGHBORS, len(names)))
    return tuple(fill(random.choice(relation.templates), name) for name in chosen)
