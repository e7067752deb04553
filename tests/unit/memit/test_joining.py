"""What stands between a prompt and its object: the rule, its tokens, the ways of a record."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from memit.editors.mend import examples_from_records
from memit.editors.serac import statement
from memit.errors import InputError
from memit.evaluation.counterfact import plus_prompts_of
from memit.joining import ending
from memit.language_model import LanguageModel
from memit.positions import TokenRow
from memit.requests import (
    EditRequest,
    Record,
    read_counterfact,
    read_facts,
    requests_digest,
    write_records,
)
from memit.targets import edit_rows, plain_rows
from tests.families import PREFIXES
from tests.reference import build

NOTHING = {
    "white space": ("<|im_start|>assistant\n|Madrid", "ends in\t|x", "« |Rome", "a |b"),
    "brackets": ("in (|Rome", "x [|y", "{|Rome", "「|東京", "彼は「|東京", "《|书", "sagte „|Rom"),
    "quotation marks": (
        'He said "|Rome',
        '"|Rome',
        'He said "|"',
        "said “|Rome",
        "said ‘|x",
        "«|Rome",
        "sade ”|Rom",
        "sagte »|Rom",
        "他说“|好",
        '{"capital":"|Rome',
        "[`|x",
    ),
    "tags": ("<answer>|Paris", "<｜Assistant｜>|Paris", "<|end_of_role|>|Paris"),
    "signs and halves": ("costs $|5", "https://|memit.org", "Coca-|Cola", "and/|or", "l'|Italie"),
    "elisions": ("La capitale de l'|Italie", "La città dell’|Aquila", "parce qu'|il"),
    "scripts without spaces": (
        "中国的首都是|纽约",
        "フランスの首都は|東京",
        "Franceの首都は|Paris",
        "日本の 首都は|Tokyo",
        "答案:|纽约",
        "在2020|年",
        "เมืองหลวงคือ|กรุงเทพ",
        "ເມືອງ|ວຽງ",
        "ភ្នំ|ពេញ",
        "မြို့|ရန်",
        "བོད་|ལྷ་ས",
    ),
    "punctuation": ("loves France|!", "Rome|, the city", "Rome|...", "The capital is|。", "it|”"),
    "clitics": ("France|'s old town", "France|’s old", "We do|n't", "they|'re"),
}
SPACE = {
    "words": ("Paul lives in|Rome", "label :|Rome", "capital,|Rome", "🎵|Rome", "C#|and"),
    "scripts with spaces": ("프랑스의 수도는|서울", "столица|Москва", "عاصمة|باريس", "भारत|दिल्ली"),
    "a foreign name": ("the mother of 北京|Rome", "The capital is|纽约"),
    "closed": ('said "yes"|and', "(so)|Rome", "»Bonn«|x", "„Bonn“|x", "the 's'|x", "</b>|x"),
    "open objects": ('the|"Rome"', "is|¡Hola!", "is|(Rome)", "is|„Rom“", "costs|$5"),
    "points and apostrophes that begin names": (
        "written for|.NET",
        "born in|'s-Hertogenbosch",
        "teacher is|'t Hooft",
        "song is|...Baby One More Time",
        "is|-5",
    ),
    "dashes between spaces": ("She -|Rome", "city –|Rome"),
    "possessives": ("the dogs'|owner", "Ann's|house", "5'|tall"),
}


def cases(groups: dict[str, tuple[str, ...]]) -> list[str]:
    return [case for group in groups.values() for case in group]


@pytest.mark.parametrize("case", cases(NOTHING))
def test_nothing_is_put_between(case: str):
    prompt, target = case.rsplit("|", 1)
    assert ending(prompt, target, None) == target


@pytest.mark.parametrize("case", cases(SPACE))
def test_a_space_is_put_between(case: str):
    prompt, target = case.rsplit("|", 1)
    assert ending(prompt, target, None) == f" {target}"


def test_what_is_given_stands_whatever_the_texts():
    assert [ending("in", "Rome", given) for given in ("", " ", "\n")] == ["Rome", " Rome", "\nRome"]


def facts(tmp_path: Path, *rows: dict) -> list[Record]:
    lines = [json.dumps({"subject": "Paul", "target": "Rome"} | row) for row in rows]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return read_facts(tmp_path / "facts.jsonl")


def said(lm: LanguageModel, row: TokenRow) -> tuple[str, str]:
    """A row's text up to the object, and the object."""
    first = row.target[0]
    whole = lm.tokenizer.decode(list(row.ids), clean_up_tokenization_spaces=False)
    before = lm.tokenizer.decode(list(row.ids[:first]), clean_up_tokenization_spaces=False)
    return str(before), str(whole).removeprefix(str(before))


CHAT = "<|user|>\nWhere does {} live?\n<|assistant|>\n"


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama", "llama2", "llama3", "gemma2", "opt"])
def test_an_object_follows_the_line_break_of_a_chat(family: str, tmp_path: Path):
    lm = build(family)
    requests = [
        facts(tmp_path, {"prompt": CHAT})[0].request,
        EditRequest("Paul", "{}的首都是", "纽约"),
        EditRequest("Paul", "{}\n", "🎵"),
    ]
    for request, edit in zip(requests, edit_rows(lm, requests, PREFIXES), strict=True):
        for row in (edit.plain, *edit.prefixed):
            before, target = said(lm, row)
            assert before.endswith(request.text)
            assert target == request.target_new


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama", "llama2", "llama3", "gemma2", "opt"])
def test_a_space_behind_a_prompt_changes_no_token(family: str, tmp_path: Path):
    lm = build(family)
    ((clean,), (slipped,)) = (
        facts(tmp_path, {"prompt": prompt}) for prompt in ("{} lives in", "  {} lives in  ")
    )
    by_hand = EditRequest("Paul", "{} lives in ", "Rome")
    rows = plain_rows(lm, [clean.request, slipped.request, by_hand])
    assert rows[0] == rows[1] == rows[2]
    assert said(lm, rows[0])[1] == " Rome"


def test_facts_may_say_it_themselves(tmp_path: Path):
    rows = [
        {"prompt": "{}的首都是", **given}
        for given in (
            {},
            {"target": " Rome"},
            {"target": "\nRome"},
            {"joined": False},
            {"joined": True},
            {"joined": True, "target": " Rome"},
            {"joined": None},
        )
    ]
    found = [facts(tmp_path, row)[0].request.ending() for row in rows]
    assert found == ["Rome", " Rome", "\nRome", " Rome", "Rome", "Rome", "Rome"]
    csv = "subject, prompt, target, joined\nA, {} is, Rome,\nB, {} is,!,false\nC,{} is, x, true\n"
    (tmp_path / "facts.csv").write_text(csv + 'D,{}的首都是," x",\nE,{}的首都是, x,\n')
    found = [record.request.ending() for record in read_facts(tmp_path / "facts.csv")]
    assert found == [" Rome", " !", "x", " x", "x"]


def test_every_prompt_of_a_record_is_continued_by_its_own_end(tmp_path: Path):
    (record,) = facts(
        tmp_path,
        {
            "prompt": CHAT,
            "target_true": "Oslo",
            "paraphrases": ['{} said: "I live in', 'The home of {} is "'],
        },
    )
    record = replace(record, neighborhood_prompts=("Ann:\n", "Ann lives in"))
    text = record.request.text
    (example,) = examples_from_records([record])
    assert example.edit == (text, "Rome")
    assert [end for _, end in example.wordings] == ["Rome", " Rome", "Rome"]
    assert [end for _, end in example.unrelated] == ["Oslo", " Oslo"]
    assert statement(record.request) == text + "Rome."
    assert [p.prompt for p in plus_prompts_of([record])] == [
        f"{text}Rome. Ann:\n",
        f"{text}Rome. Ann lives in",
    ]


def test_it_is_written_and_read_again(tmp_path: Path):
    own = facts(tmp_path, {"prompt": CHAT}, {"prompt": "{} is", "joined": True})
    written = [*own, Record(7, EditRequest("Ann", "{} is in", "Rome", between="\n"))]
    write_records(written, tmp_path / "requests.json")
    assert read_counterfact(tmp_path / "requests.json") == written


def test_data_sets_have_a_space_and_keep_their_digests(tmp_path: Path):
    row = {"requested_rewrite": {"subject": "Ann", "prompt": '{} is "', "target_new": {"str": "!"}}}
    (tmp_path / "published.json").write_text(json.dumps([row]))
    (record,) = read_counterfact(tmp_path / "published.json")
    assert record.request.ending() == " !"
    write_records([record], tmp_path / "again.json")
    assert "between" not in (tmp_path / "again.json").read_text()
    request = EditRequest("Ann", "{} is in", "Rome", "Oslo", "P1", between=" ")
    assert requests_digest([request]).startswith("177ad2fc1a76")
    by_rule = EditRequest("Ann", "{} is in", "Rome", "Oslo", "P1")
    assert requests_digest([by_rule]) != requests_digest([request])


def test_one_token_cannot_be_subject_and_object():
    lm = build("llama")
    assert "▁Paul" in lm.tokenizer.get_vocab()
    request = EditRequest("Pau", "a {}", "l", between="")
    with pytest.raises(InputError, match="one token holds"):
        edit_rows(lm, [request], ())
