"""The tables of real facts, the records made of them, and the text beside them."""

import re
from dataclasses import replace
from importlib.resources import files
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memit.facts.neighbors import without_edited_neighbors
from memit.facts.records import (
    Relation,
    embedded_records,
    embedded_relations,
    part_of,
    records_of,
)
from memit.requests import EditRequest, Record, fill, read_counterfact, write_records

RELATIONS = embedded_relations()
NAMES = {each.name: [name for of in each.subjects.values() for name in of] for each in RELATIONS}
TEMPLATES = {each.name: [each.prompt, *each.paraphrases] for each in RELATIONS}
PARTS = ("reported", "choosing")
each_relation = pytest.mark.parametrize("relation", RELATIONS, ids=lambda each: each.name)


def test_there_are_enough_facts_with_names_of_many_kinds():
    names = list(chain.from_iterable(NAMES.values()))
    assert len(RELATIONS) >= 20
    assert len(names) >= 1500
    assert sum(" " in name for name in names) > len(names) / 3
    assert sum(not name.isascii() for name in names) > len(names) / 15
    first = [template.split()[0] for template in chain.from_iterable(TEMPLATES.values())]
    assert first.count("{}") > len(first) / 2


@each_relation
def test_a_subject_has_one_object_and_an_object_six_subjects(relation: Relation):
    names = NAMES[relation.name]
    assert len(names) == len(set(names))
    assert [true for true, of in relation.subjects.items() if len(of) < 6] == []
    assert all(name == " ".join(name.split()) for name in names)
    assert all(true == " ".join(true.split()[:2]) for true in relation.subjects)
    for name in names:  # no other subject is named in it
        named = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
        assert [other for other in names if named.search(other)] == [name]


@each_relation
def test_templates_end_where_each_object_fits(relation: Relation):
    templates = TEMPLATES[relation.name]
    every = [*templates, *relation.generation]
    assert len(templates) >= 6
    assert len(relation.generation) >= 3
    assert len(set(every)) == len(every)
    assert all(text.count("{}") == 1 and text == " ".join(text.split()) for text in every)
    assert all(template[-1].isalpha() for template in templates)
    assert len({true[0].isupper() for true in relation.subjects}) == 1
    vowels = {true[0] in "aeiouAEIOU" for true in relation.subjects}
    articles = {text.split()[-1] for text in templates} & {"a", "an"}
    assert not articles or (len(vowels) == 1 and articles == {"an" if vowels.pop() else "a"})


@pytest.mark.parametrize("part", PARTS)
@each_relation
def test_records_have_the_prompts_that_measure_them(relation: Relation, part):
    true_of = {name: true for true, names in relation.subjects.items() for name in names}
    for record in records_of([relation], part):
        request, prompts = record.request, record.neighborhood_prompts
        assert true_of[request.subject] == request.target_true != request.target_new
        assert request.target_new in relation.subjects
        own = {fill(template, request.subject) for template in TEMPLATES[relation.name]}
        assert {request.text, *record.paraphrase_prompts} <= own
        assert len({request.text, *record.paraphrase_prompts}) >= 3
        same = [n for n in true_of if true_of[n] == request.target_true and part_of(n) == part]
        asked = {fill(template, name) for template in TEMPLATES[relation.name] for name in same}
        assert set(prompts) <= asked - own
        assert 5 <= len(prompts) == len(set(prompts)) <= 10


def test_the_parts_share_no_subject_and_are_the_same_each_time(tmp_path):
    reported, choosing = map(embedded_records, PARTS)
    both = embedded_records()
    assert both == [*reported, *choosing]
    assert {r.request.subject for r in reported}.isdisjoint(r.request.subject for r in choosing)
    assert 0.25 < len(choosing) / len(both) < 0.42
    assert len({record.case_id for record in both}) == len(both) >= 1500
    write_records(both, tmp_path / "one")
    write_records(embedded_records(), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_counterfact(tmp_path / "one") == both


@given(st.sampled_from(RELATIONS), st.randoms(use_true_random=False))
def test_the_order_of_lines_in_a_table_does_not_matter(relation: Relation, random):
    def shuffled(items):
        return sorted(items, key=lambda _: random.random())

    subjects = {true: shuffled(relation.subjects[true]) for true in shuffled(relation.subjects)}
    other = replace(relation, paraphrases=shuffled(relation.paraphrases), subjects=subjects)
    assert list(records_of([other], "reported")) == list(records_of([relation], "reported"))


def asking(subject: str, relation: str | None, *neighbors: str) -> Record:
    request = EditRequest(subject, "{} is in", "Rome", "Oslo", relation)
    return Record(0, request, (f"One finds {subject} in",), neighbors)


@pytest.mark.parametrize("relation", ["city", None])
def test_neighbors_that_are_edited_are_dropped_and_counted(relation: str | None):
    prompts = "Bo's home is", "Bo-Ra is in", "Robo is in", "St. Di is in", "In the end, Bo, is in"
    ada = asking("Ada", relation, *prompts)
    others = asking("Bo", relation, "One finds Ada in"), asking("St. Di", "other", "Bo is named")
    kept, dropped = without_edited_neighbors([ada, *others])
    assert kept[0] == replace(ada, neighborhood_prompts=("Bo-Ra is in", "Robo is in"))
    assert kept[1:] == [replace(others[0], neighborhood_prompts=()), others[1]]
    assert dropped == 4


def test_the_held_out_text_is_long_and_varied():
    documents = (files("memit.facts") / "held_out.txt").read_text("utf-8").splitlines()
    words = " ".join(documents).split()
    assert len(documents) >= 60
    assert len(words) >= 4500
    assert all(60 <= len(document.split()) <= 110 for document in documents)
    runs = list(zip(*(words[start:] for start in range(8)), strict=False))
    assert len(runs) == len(set(runs))
