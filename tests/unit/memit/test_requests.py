"""Records: what is read, what is refused and how it is said, conflicts, samples, bytes."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memit.errors import ConflictError, InputError
from memit.requests import (
    EditRequest,
    Record,
    check_conflicts,
    drop_conflicts,
    fill,
    in_content_order,
    read_counterfact,
    read_facts,
    read_records,
    requests_digest,
    sample_records,
    write_records,
)
from tests import SHARED

COUNTERFACT = SHARED / "data/counterfact-10k.json"
needs_counterfact = pytest.mark.skipif(not COUNTERFACT.exists(), reason="no CounterFact here")


def published_row(**changes) -> dict:
    """A record as the published CounterFact file has them."""
    return {
        "case_id": 7,
        "pararel_idx": 2796,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": "Danielle Darrieux",
        },
        "paraphrase_prompts": ["Danielle Darrieux, a native"],
        "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
        "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
        "generation_prompts": ["Danielle Darrieux's mother tongue is"],
    } | changes


def rewritten(**changes) -> dict:
    """A record whose request is changed; a value of None removes the key."""
    rewrite = published_row()["requested_rewrite"] | changes
    return published_row(requested_rewrite={k: v for k, v in rewrite.items() if v is not None})


def saved(tmp_path: Path, content: object, name: str = "records.json") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def asking(case_id: int, target: str, subject: str = "Ann", relation: str | None = "P1") -> Record:
    return Record(case_id, EditRequest(subject, "{} lives in", target, "Oslo", relation))


class TestFill:
    @given(st.text(), st.text().filter(lambda text: "{}" not in text), st.text())
    def test_braces_survive_on_every_side(self, subject: str, before: str, after: str):
        after = after.replace("{}", "")
        if (before + "{}").count("{}") == 1:
            assert fill(before + "{}" + after, subject) == before + subject + after

    def test_a_subject_that_holds_a_slot_is_put_in_as_it_is(self):
        assert fill("{x} of {} is {0}", "a{}b") == "{x} of a{}b is {0}"


class TestEditRequest:
    def test_strips_objects(self):
        request = EditRequest("Ann", "{} lives in", " Rome ", " Oslo")
        assert (request.target_new, request.target_true) == ("Rome", "Oslo")
        assert request.between == " "
        assert request.text == "Ann lives in"

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (("Ann", "lives in", "Rome"), "has 0 '{}'"),
            (("Ann", "{} and {} live in", "Rome"), "has 2 '{}'"),
            ((" ", "{} lives in", "Rome"), "subject is empty"),
            (("Ann", "{} lives in", " "), "new object is empty"),
            (("Ann", "{} lives in", "Rome", ""), "true object is empty"),
        ],
    )
    def test_refuses_what_cannot_be_edited(self, arguments: tuple, complaint: str):
        with pytest.raises(InputError, match=complaint):
            EditRequest(*arguments)


class TestCounterFact:
    def test_reads_the_published_schema(self, tmp_path: Path):
        (record,) = read_records(saved(tmp_path, [published_row()]))
        assert record == Record(
            7,
            EditRequest(
                "Danielle Darrieux", "The mother tongue of {} is", "English", "French", "P103", " "
            ),
            ("Danielle Darrieux, a native",),
            ("The mother tongue of Léon Blum is",),
            ("Danielle Darrieux's mother tongue is",),
            ("J.R.R. Tolkien is a native speaker of",),
            "Q1860",
        )

    def test_reads_the_reduced_schema(self, tmp_path: Path):
        row = rewritten(target_new={"str": "English"}, target_true={"str": "French"})
        for key in ("attribute_prompts", "pararel_idx"):
            del row[key]
        row["generation_prompts"] = []
        (record,) = read_counterfact(saved(tmp_path, [row]))
        assert record.generation_prompts == record.attribute_prompts == ()

    @pytest.mark.parametrize(
        ("row", "complaint"),
        [
            (rewritten(prompt="no place"), r"record 2 \(case_id 7\): the prompt 'no place' has 0"),
            (rewritten(subject=""), "record 2 .*subject is empty"),
            (rewritten(subject=None), "record 2 .*'subject' is missing"),
            (rewritten(target_new={"str": " "}), "record 2 .*new object is empty"),
            (rewritten(target_new="English"), "record 2 .*'target_new'"),
            (rewritten(target_new={"str": 3}), "record 2 .*'target_new.str'"),
            (rewritten(subject="\ud800"), "record 2 .*'subject'"),
            (published_row(paraphrase_prompts="one"), "record 2 .*'paraphrase_prompts'"),
            (published_row(neighborhood_prompts=[""]), "'neighborhood_prompts' holds an empty"),
            (published_row(case_id="7"), "'case_id' is '7' where a whole number"),
            (["a"], "record 2: the record is"),
            (published_row(case_id=1), "record 1 and record 2 share the case_id 1"),
        ],
    )
    def test_names_file_and_record_of_what_it_refuses(self, tmp_path, row, complaint: str):
        path = saved(tmp_path, [published_row(case_id=1), row])
        with pytest.raises(InputError, match=complaint) as caught:
            read_counterfact(path)
        assert str(caught.value).startswith(str(path))

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            ("[]", "holds no records"),
            (json.dumps([published_row()])[:-30], "not whole JSON"),
            ('{"a": 1}', "no list of records"),
        ],
    )
    def test_refuses_other_files(self, tmp_path: Path, content: str, complaint: str):
        with pytest.raises(InputError, match=complaint):
            read_counterfact(saved(tmp_path, content))

    def test_refuses_missing_files_and_other_encodings(self, tmp_path: Path):
        with pytest.raises(InputError, match=r"absent\.json does not exist"):
            read_records(tmp_path / "absent.json")
        (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
        with pytest.raises(InputError, match=r"latin\.json is not UTF-8"):
            read_records(tmp_path / "latin.json")

    def test_says_how_a_zsre_file_is_read(self, tmp_path: Path):
        rows = [{"subject": "a", "src": "who is a?", "answers": ["b"], "loc": "q", "loc_ans": "c"}]
        with pytest.raises(InputError, match="read_zsre"):
            read_records(saved(tmp_path, rows))

    def test_what_is_written_is_read_again_and_has_the_same_bytes(self, tmp_path: Path):
        rows = [published_row(), rewritten(target_true=None) | {"case_id": 8}]
        records = read_counterfact(saved(tmp_path, rows))
        write_records(records, tmp_path / "one.json")
        again = read_counterfact(tmp_path / "one.json")
        write_records(again, tmp_path / "two.json")
        assert again == records
        assert again[1].request.target_true is None
        assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "one.json",
            "records.json",
            "two.json",
        ]

    @needs_counterfact
    def test_reads_the_whole_data_set_and_finds_its_conflicts(self):
        records = read_records(COUNTERFACT)
        kept, dropped = drop_conflicts(records)
        assert len(records) == 9918
        assert len({record.request.fact for record in dropped}) == 126
        assert drop_conflicts(kept) == (kept, [])
        assert len(kept) + len(dropped) == len(records)


class TestFacts:
    full = (
        '{"subject": " Ann {x}", "prompt": "{} lives in ", "target": " Rome", '
        '"target_true": "Oslo", "paraphrases": ["{} has a home in", "Home is"], '
        '"neighbors": ["Bo lives in"]}\n'
    )

    def test_json_lines(self, tmp_path: Path):
        text = self.full + "\n" + '{"subject": "Bo", "prompt": "{} is", "target": "Ö"}\n'
        first, second = read_records(saved(tmp_path, text, "facts.jsonl"))
        assert first == Record(
            0,
            EditRequest("Ann {x}", "{} lives in", "Rome", "Oslo", between=" "),
            ("Ann {x} has a home in", "Home is"),
            kept_prompts=("Bo lives in",),
        )
        assert second == Record(1, EditRequest("Bo", "{} is", "Ö"))

    def test_csv_says_the_same(self, tmp_path: Path):
        text = (
            "\ufeffsubject,prompt,target,target_true,paraphrases,neighbors\r\n"
            'Ann {x},{} lives in, " Rome",Oslo,{} has a home in|Home is,Bo lives in\r\n'
            "Bo,{} is,Ö,,,\r\n"
        )
        as_lines = self.full + '{"subject": "Bo", "prompt": "{} is", "target": "Ö"}\n'
        assert read_records(saved(tmp_path, text, "facts.csv")) == read_records(
            saved(tmp_path, as_lines, "facts.jsonl")
        )

    def test_csv_cells_may_hold_line_ends_and_separators(self, tmp_path: Path):
        text = 'subject,prompt,target\n"Ann, the\u2028first","{} ""x"" in",Rome\n'
        (record,) = read_facts(saved(tmp_path, text, "facts.csv"))
        assert record.request.text == 'Ann, the\u2028first "x" in'

    def test_a_json_list_of_facts(self, tmp_path: Path):
        text = f"[{self.full}]"
        assert read_records(saved(tmp_path, text)) == read_facts(saved(tmp_path, self.full))

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ('{"subject": "Ann", "prompt": "{} is", "targt": "x"}', "line 1: .*'targt' is not"),
            ('\n{"subject": "Ann", "prompt": "{} is"}', "line 2: the key 'target' is missing"),
            ('{"subject": "Ann", "prompt": "is", "target": "x"}', "line 1: .*exactly one"),
            ('[{"subject": "Ann", "prompt": "is", "target": "x"}]', "record 1: .*exactly one"),
            ("subject,prompt,target,target_true\n\nAnn,{} is,x,x\n", "line 3: .*is the true one"),
            ('{"subject": "Ann", "prom', "line 1 is not whole JSON"),
            ("subject,prompt,target\nAnn,{} is\n", "line 2 has another number of fields"),
            ("subject,prompt,target\nAnn,{} is,a,b\n", "line 2 has another number of fields"),
            ('subject,prompt,target\nAnn,{} is,"a\n', "not CSV"),
            ("subject,prompt,target\nAnn,{} is,\n", "line 2: the key 'target' is missing"),
            ("subject,prompt,target,extra\nAnn,{} is,x,y\n", "the column 'extra'"),
            ("", "holds no records"),
        ],
    )
    def test_names_file_and_place_of_what_it_refuses(self, tmp_path, text: str, complaint: str):
        path = saved(tmp_path, text, "facts")
        with pytest.raises(InputError, match=complaint) as caught:
            read_facts(path)
        assert str(caught.value).startswith(str(path))

    def test_what_stands_twice_names_both_lines_and_their_sources(self, tmp_path: Path):
        head = "subject,prompt,target,id,source\n"
        text = head + "Ann,{} is,good,1,A.\nBo,{} is,bad,,\n"
        (record, _) = read_facts(saved(tmp_path, text, "facts.csv"))
        assert record.origin == {"id": "1", "source": "A."}
        for more, kind in {
            "Ann,{} is,bad,2,B.\n": r"\(source: A.\) and line 4 \(source: B.\) con",
            "Ann,{} is,good,2,\n": r"\(source: A.\) and line 4 hold the same fact",
            "Cy,{} is,good,1,\n": r"\(source: A.\) and line 4 have the same id",
        }.items():
            with pytest.raises(InputError, match=r"facts\.csv: line 2 " + kind):
                read_facts(saved(tmp_path, text + more, "facts.csv"))

    def test_the_order_of_lines_does_not_matter(self, tmp_path: Path):
        facts = [
            {"subject": name, "prompt": "{} is", "target": "good", "id": number, "note": "n"}
            for number, name in enumerate(("Bo", "Ann", "Cy"))
        ]
        one, other = (
            in_content_order(read_facts(saved(tmp_path, order))) for order in (facts, facts[::-1])
        )
        assert one == other
        assert [record.request.subject for record in one] == ["Ann", "Bo", "Cy"]
        assert in_content_order(read_facts(saved(tmp_path, facts[1:]))) == [one[0], one[2]]
        write_records(one, tmp_path / "records.json")
        assert read_counterfact(tmp_path / "records.json") == one

    @pytest.mark.parametrize(
        ("prompt", "template"),
        [
            ("The capital of Rio is", "The capital of {} is"),
            ("Rio: {} is", "Rio: {} is"),
            ("Rio and Rio are", None),
            ("Riot in town is", None),
        ],
    )
    def test_a_prompt_may_name_its_subject(self, tmp_path, prompt: str, template: str | None):
        path = saved(tmp_path, [{"subject": "Rio", "prompt": prompt, "target": "x"}])
        if template is None:
            with pytest.raises(InputError, match="exactly one"):
                read_facts(path)
        else:
            assert read_facts(path)[0].request.prompt == template

    def test_contradictions_name_file_and_both_objects(self, tmp_path: Path):
        text = "subject,prompt,target\nAnn,{} is,good\nBo,{} is,bad\nAnn,{} is,bad\n"
        path = saved(tmp_path, text, "facts.csv")
        with pytest.raises(ConflictError, match=r"line 2 and line 4 .*'good' and 'bad'") as caught:
            read_facts(path)
        assert str(caught.value).startswith(str(path))


class TestConflicts:
    def test_the_first_of_a_subject_and_relation_stays(self):
        records = [
            asking(0, "Rome"),
            asking(1, "Oslo"),
            asking(2, "Rome"),
            asking(3, "Oslo", subject="Bo"),
            asking(4, "Oslo", relation="P2"),
        ]
        kept, dropped = drop_conflicts(records)
        assert [record.case_id for record in kept] == [0, 2, 3, 4]
        assert dropped == [records[1]]

    def test_without_a_relation_the_prompt_stands_for_it(self):
        records = [asking(0, "Rome", relation=None), asking(1, "Oslo", relation=None)]
        assert drop_conflicts(records) == (records[:1], records[1:])

    def test_agreeing_repetitions_are_no_contradiction(self):
        check_conflicts([asking(0, "Rome"), asking(1, "Rome"), asking(2, "Oslo", subject="Bo")])
        with pytest.raises(ConflictError, match="remove one of them"):
            check_conflicts([asking(0, "Rome"), asking(1, "Oslo")])


class TestSamples:
    records = tuple(asking(number, "Rome", subject=f"s{number}") for number in range(50))

    @given(st.integers(1, 50), st.integers(1, 50), st.integers())
    def test_are_nested_ordered_and_repeatable(self, one: int, other: int, seed: int):
        small, large = (
            [record.case_id for record in sample_records(self.records, count, seed)]
            for count in sorted((one, other))
        )
        assert set(small) <= set(large)
        assert large == sorted(set(large))
        assert len(large) == max(one, other)

    def test_depend_on_the_seed(self):
        assert sample_records(self.records, 10, 1) != sample_records(self.records, 10, 2)

    @pytest.mark.parametrize("count", [0, 51])
    def test_say_how_many_there_are(self, count: int):
        with pytest.raises(InputError, match="50"):
            sample_records(self.records, count, 0)


def test_digest_depends_on_requests_and_their_order():
    one, other = (asking(0, target).request for target in ("Rome", "Oslo"))
    assert requests_digest([one, other]) == requests_digest([one, other])
    assert requests_digest([one, other]) != requests_digest([other, one])
    assert requests_digest([one]) != requests_digest([asking(0, "Rom").request])


def test_sample_takes_every_subject_before_any_twice():
    records = [
        Record(number, EditRequest(f"person {number % 5}", "{} likes", f"thing {number}"))
        for number in range(20)
    ]
    for seed in range(5):
        assert len({r.request.subject for r in sample_records(records, 5, seed)}) == 5
        assert len({r.request.subject for r in sample_records(records, 3, seed)}) == 3
        twice = Counter(r.request.subject for r in sample_records(records, 10, seed))
        assert set(twice.values()) == {2}


class TestOtherFiles:
    def test_facts_may_go_on_over_several_lines(self, tmp_path: Path):
        rows = [{"subject": name, "prompt": "{} is", "target": "x"} for name in ("Ann", "Bo")]
        lines = "\n".join(json.dumps(row, indent=2) for row in rows)
        assert read_records(saved(tmp_path, lines)) == read_records(saved(tmp_path, rows, "list"))
        with pytest.raises(InputError, match="line 6 is not whole JSON"):
            read_facts(saved(tmp_path, lines[:-5]))

    def test_keys_of_other_programs_are_translated(self, tmp_path: Path):
        row = {
            "prompt": "{} is",
            "subject": "Ann",
            "target_new": "x",
            "ground_truth": "y",
            "rephrase_prompt": "z",
            "locality": {},
        }
        with pytest.raises(InputError) as caught:
            read_records(saved(tmp_path, [row]))
        for name in ("'target'", "'target_true'", "'paraphrases'", "'neighbors'"):
            assert f"(here {name})" in str(caught.value)

    def test_records_of_easyedit_and_qaedit_are_facts(self, tmp_path: Path):
        easy = {
            "case_id": 7,
            "prompt": "The mother tongue of Ann Lee is",
            "subject": "Ann Lee",
            "target_new": "English",
            "ground_truth": "French",
            "rephrase_prompt": "Ann Lee speaks",
            "portability": {"Reasoning": {"prompt": "Ann Lee's neighbours speak"}},
        }
        nested = {
            "Relation": [{"prompt": "Bo is", "ground_truth": [["a"]]}],
            "b": {"prompt": ["Cy"]},
        }
        qaedit = {
            "id": 3,
            "prompt": "Which game did Ann Lee, that Ann Lee, win?",
            "subject": "Ann Lee",
            "target": "chess",
            "rephrase": "What did Ann Lee win?",
            "locality": [
                {"loc": "who is Bo", "loc_ans": "x"},
                {"loc": "where is Cy", "loc_ans": "y"},
            ],
        }
        rows = [
            easy | {"locality_prompt": "Bo speaks", "locality_ground_truth": "French"},
            easy | {"locality": nested, "ground_truth": ["English"], "subject": "mother tongue"},
            qaedit,
        ]
        one, two, three = read_records(saved(tmp_path, rows))
        assert one.request.prompt == "The mother tongue of {} is"
        assert (one.request.target_new, one.request.target_true) == ("English", "French")
        assert one.paraphrase_prompts == ("Ann Lee speaks",)
        assert one.kept_prompts == ("Bo speaks",)
        assert (two.kept_prompts, two.request.target_true) == (("Bo is", "Cy"), None)
        assert three.request.text == qaedit["prompt"]
        assert three.request.target_new == "chess"
        assert three.kept_prompts == ("who is Bo", "where is Cy")
        inside = {"prompt": "Which Iranian city is the capital of Iran?", "subject": "Iran"}
        (whole,) = read_records(saved(tmp_path, [qaedit | inside]))
        assert whole.request.prompt == "Which Iranian city is the capital of {}?"
        for wrong in ({"subject": "Di"}, {"prompt": None}, {"locality": [{"loc": 3}]}):
            with pytest.raises(InputError, match="record 1"):
                read_records(saved(tmp_path, [qaedit | wrong]))

    def test_each_reader_names_the_other(self, tmp_path: Path):
        fact = {"subject": "Ann", "prompt": "{} is", "target": "x"}
        with pytest.raises(InputError, match="to facts for your own"):
            read_counterfact(saved(tmp_path, [fact]))
        with pytest.raises(InputError, match="source to counterfact"):
            read_facts(saved(tmp_path, [published_row()]))

    def test_a_slot_means_the_subject_everywhere_but_in_neighbours(self, tmp_path: Path):
        fact = {"subject": "Ann", "prompt": "{} is", "target": "x"}
        more = {"paraphrases": ["{} and {} are", "it is"]}
        (record,) = read_facts(saved(tmp_path, [fact | more]))
        assert record.paraphrase_prompts == ("Ann and Ann are", "it is")
        with pytest.raises(InputError, match="'neighbors' has a"):
            read_facts(saved(tmp_path, [fact | {"neighbors": ["Bo is", "{} is"]}]))
        row = published_row(paraphrase_prompts=["{} is"], neighborhood_prompts=["{} was"])
        (record,) = read_counterfact(saved(tmp_path, [row]))
        assert (record.paraphrase_prompts, record.neighborhood_prompts) == (("{} is",), ("{} was",))

    def test_prompts_that_must_stay_survive_the_common_schema(self, tmp_path: Path):
        fact = {"subject": "Ann", "prompt": "{} is", "target": "x", "neighbors": ["Bo is"]}
        records = read_facts(saved(tmp_path, [fact]))
        write_records(records, tmp_path / "written.json")
        assert read_counterfact(tmp_path / "written.json") == records
        write_records([Record(0, records[0].request)], tmp_path / "without.json")
        assert "kept" not in (tmp_path / "without.json").read_text()
