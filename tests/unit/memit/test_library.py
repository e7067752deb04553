"""The five lines of the README, on a small model."""

import json
from pathlib import Path

import pytest

import memit
from memit.errors import ConflictError, InputError
from tests.families import CITIES, DOCUMENTS, SUBJECTS, save_model
from tests.reference import HYPERPARAMETERS, build


def _facts(path: Path, *, target: str) -> Path:
    rows = [
        {"subject": name, "prompt": "{} was born in", "target": target} for name in SUBJECTS[:3]
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_five_lines(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n".join([*DOCUMENTS] * 20), encoding="utf-8")
    facts = _facts(tmp_path / "facts.jsonl", target=CITIES[0])

    lm = memit.load_model(str(tmp_path / "model"))
    prompt = f"{SUBJECTS[0]} was born in"
    before = memit.ask(lm, prompt)
    records = memit.read_records(facts)
    delta = memit.edit(lm, records, corpus=tmp_path / "corpus.txt", hyperparameters=HYPERPARAMETERS)
    after = memit.ask(lm, prompt)
    delta.save(tmp_path / "facts.safetensors")

    assert before != after
    said = sum(
        str(lm.tokenizer.decode(lm.tokenizer(f" {CITIES[0]}")["input_ids"][:1])) == words[0].text
        for words in (memit.ask(lm, record.request.text, top=1) for record in records)
    )
    assert 0 <= delta.provenance["outcome"]["said"] <= said <= len(records)
    assert delta.provenance["outcome"]["facts"] == len(records)
    for one, words in ((delta, "facts in 2 matrices"), (lm, "4 blocks"), (after[0], "%")):
        assert words in repr(one)
        assert len(repr(one).splitlines()) == 1
    assert [a.probability for a in after] == sorted((a.probability for a in after), reverse=True)
    delta.revert(lm)
    assert memit.ask(lm, prompt) == before
    memit.WeightDelta.load(tmp_path / "facts.safetensors").apply(lm)
    assert memit.ask(lm, prompt) == after


def test_contradicting_facts_are_refused_before_any_work(tmp_path: Path) -> None:
    lm = build("gpt2")
    records = [
        memit.Record(number, memit.EditRequest(SUBJECTS[0], "{} was born in", city))
        for number, city in enumerate(CITIES[:2])
    ]
    with pytest.raises(ConflictError):
        memit.edit(lm, records, corpus=[], hyperparameters=HYPERPARAMETERS)
    with pytest.raises(InputError, match="nothing to edit"):
        memit.edit(lm, [], corpus=[], hyperparameters=HYPERPARAMETERS)


def test_what_cannot_work_is_refused_before_the_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build("gpt2")

    def edit(prompt: str, corpus: list[str]) -> None:
        records = [memit.Record(0, memit.EditRequest(SUBJECTS[0], prompt, CITIES[0]))]
        memit.edit(lm, records, corpus=corpus, hyperparameters=HYPERPARAMETERS)

    monkeypatch.setattr("memit.editing.Resources", None)
    with pytest.raises(InputError, match="128 dimensions"):
        edit("{} was born in", ["Paris."])
    monkeypatch.setattr("memit.editing.collect_second_moments", None)
    with pytest.raises(InputError, match="shorten"):
        edit("{} " + "q" * 175 + " was born in", [*DOCUMENTS])


def test_a_failure_after_the_edit_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = build("gpt2")
    records = [memit.Record(0, memit.EditRequest(SUBJECTS[0], "{} was born in", CITIES[0]))]
    before = memit.ask(lm, f"{SUBJECTS[0]} was born in")

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("memit.editing._said", interrupt)
    with pytest.raises(KeyboardInterrupt):
        memit.edit(lm, records, corpus=[*DOCUMENTS] * 20, hyperparameters=HYPERPARAMETERS)
    assert lm.applied == []
    assert memit.ask(lm, f"{SUBJECTS[0]} was born in") == before
