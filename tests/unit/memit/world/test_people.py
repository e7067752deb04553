"""The synthetic world: its people, its records, its texts."""

import re
import unicodedata
from dataclasses import replace

import pytest

from memit.errors import InputError
from memit.requests import fill
from memit.world.people import WorldParameters, make_world
from memit.world.relations import RELATIONS

PARAMETERS = WorldParameters(people=40, relations=3, objects=4, biographies=5)


@pytest.fixture(scope="module")
def world():
    return make_world(PARAMETERS)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def plain(text: str) -> str:
    """Without case and accents."""
    marks = unicodedata.normalize("NFD", text.casefold())
    return "".join(letter for letter in marks if not unicodedata.combining(letter))


def surnames(name: str) -> list[str]:
    """The parts of a surname that tell families apart."""
    last = re.sub(r"^(?:o|d)'|^mc(?=[a-z])", "", plain(name).replace("ø", "o").split(" ")[-1])
    return last.split("-")


def test_equal_parameters_give_an_equal_world(world):
    assert make_world(PARAMETERS) == world


def test_another_seed_gives_other_people_and_facts(world):
    other = make_world(replace(PARAMETERS, seed=1))
    assert {p.name for p in other.people}.isdisjoint({p.name for p in world.people})
    assert other.relations != world.relations


def test_fewer_biographies_leave_the_records_alone(world):
    assert make_world(replace(PARAMETERS, biographies=2)).records == world.records


def test_no_two_people_share_a_part_of_a_surname():
    people = make_world(replace(PARAMETERS, people=400)).people
    parts = [part for person in people for part in surnames(person.name)]
    assert len(parts) == len(set(parts))


@pytest.mark.parametrize("mark", ["'", "-", "é", "ø", " van ", " de la "])
def test_names_are_of_every_kind(mark):
    people = make_world(replace(PARAMETERS, people=400)).people
    assert any(mark in person.name for person in people)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_five_of_six_templates_begin_with_the_subject(relation):
    assert len(relation.templates) >= 6
    assert all(template.count("{}") == 1 for template in relation.templates)
    begin = sum(template.startswith("{}") for template in relation.templates)
    assert begin / len(relation.templates) == pytest.approx(5 / 6)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_templates_of_a_relation_differ_in_words(relation):
    spoken = {tuple(words(fill(template, "N"))) for template in relation.templates}
    assert len(spoken) == len(relation.templates)


@pytest.mark.parametrize("kind", ["'", "-", " ", "[^\x00-\x7f]"])
def test_objects_are_of_every_kind(kind):
    assert sum(bool(re.search(kind, o)) for r in RELATIONS for o in r.objects) >= 10


def test_an_object_belongs_to_one_relation():
    objects = [o for relation in RELATIONS for o in relation.objects]
    assert len(objects) == len(set(objects))


def test_every_object_is_true_of_equally_many_people(world):
    for relation in world.relations:
        told = [person.facts[relation.name] for person in world.people]
        assert {told.count(o) for o in relation.objects} == {10}


def told(world) -> set[tuple[str, str]]:
    """The facts that records change."""
    return {(r.request.subject, r.request.relation_id) for r in world.records}


@pytest.mark.parametrize("each", [1, 2, 3])
def test_records_are_about_different_facts_of_everybody(each):
    world = make_world(replace(PARAMETERS, records_per_person=each))
    assert len(told(world)) == len(world.records) == 40 * each
    assert [record.case_id for record in world.records] == list(range(40 * each))


def test_early_records_share_no_subject():
    world = make_world(replace(PARAMETERS, records_per_person=2))
    assert len({record.request.subject for record in world.records[:40]}) == 40


def test_records_contradict_the_world(world):
    facts = {person.name: person.facts for person in world.people}
    objects = {relation.name: relation.objects for relation in world.relations}
    for record in world.records:
        request = record.request
        assert facts[request.subject][request.relation_id] == request.target_true
        assert request.target_new in objects[request.relation_id]
        assert request.target_new != request.target_true


def test_paraphrases_ask_the_same_in_other_words(world):
    templates = {relation.name: relation.templates for relation in world.relations}
    for record in world.records:
        request = record.request
        asked = {fill(t, request.subject) for t in templates[request.relation_id]}
        prompts = [request.text, *record.paraphrase_prompts, *record.generation_prompts]
        assert len(set(prompts)) == len(prompts) == 6
        assert set(prompts) <= asked


@pytest.mark.parametrize(
    ("prompts", "target"),
    [("neighborhood_prompts", "target_true"), ("attribute_prompts", "target_new")],
)
def test_neighbors_share_the_true_object_and_attributes_the_new_one(prompts, target):
    world = make_world(replace(PARAMETERS, people=60))
    changed = told(world) if prompts == "neighborhood_prompts" else set()
    for record in world.records:
        request = record.request
        relation = next(r for r in world.relations if r.name == request.relation_id)
        holders = {
            fill(template, person.name)
            for person in world.people
            if person.facts[relation.name] == getattr(request, target)
            and person.name != request.subject
            and (person.name, relation.name) not in changed
            for template in relation.templates
        }
        asked = getattr(record, prompts)
        assert len(asked) >= 7
        assert set(asked) <= holders


def test_biographies_tell_one_to_four_facts_with_the_full_name(world):
    sentences = {
        f"{fill(template, person.name)} {person.facts[relation.name]}.": (
            person.name,
            relation.name,
        )
        for person in world.people
        for relation in world.relations
        for template in relation.templates
    }
    lengths = set()
    for document in [*world.documents, *world.held_out]:
        told = []
        while document:
            sentence = max((s for s in sentences if document.startswith(s)), key=len)
            told.append(sentences[sentence])
            document = document[len(sentence) :].lstrip(" ")
        assert len({name for name, _ in told}) == 1
        assert len(set(told)) == len(told)
        lengths.add(len(told))
    assert lengths == {1, 2, 3}


def test_held_out_biographies_were_never_trained_on(world):
    assert len(world.held_out) == 40
    assert not set(world.held_out) & set(world.documents)


@pytest.mark.parametrize(
    "bad",
    [
        {"people": 1},
        {"relations": 99},
        {"records_per_person": 4},
        {"relations": 0},
        {"objects": 1},
        {"objects": 1_000},
    ],
)
def test_sizes_out_of_range_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        replace(PARAMETERS, **bad)
