"""What is measured of generated texts: entropy and reference score, each in its own arithmetic."""

import json
import math
from collections import Counter
from pathlib import Path

import nltk
import numpy as np
import pyarrow as pa
import pytest

from memit.errors import InputError
from memit.evaluation import generations, reference
from memit.evaluation.entropy import record_entropies, text_entropy, word_tokenizer
from memit.evaluation.generations import generation_record_means, write_about
from memit.evaluation.reference import (
    read_snippets,
    reference_scores,
    references_from_corpus,
    references_of,
)
from memit.requests import EditRequest, Record
from tests.reference import build


class TestEntropy:
    def test_agrees_with_the_published_formula(self):
        text = "The cat sat on the mat and the cat sat on the hat, the cat sat."
        tokens = nltk.tokenize.NLTKWordTokenizer().tokenize(text)
        entropies = []
        for n in (2, 3):
            counts = np.array(list(nltk.FreqDist(nltk.ngrams(tokens, n)).values()), dtype=float)
            frequencies = counts / counts.sum()
            entropies.append(np.sum(-frequencies * np.log(frequencies) / np.log(2)))
        expected = 100 * np.mean(np.array(entropies) * np.array([2 / 3, 4 / 3]))
        words = nltk.tokenize.NLTKWordTokenizer().tokenize
        assert text_entropy(text, words) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("text", ["", "one", "two words", "la la la la la la"])
    def test_short_and_repeated_texts_have_none(self, text: str):
        assert text_entropy(text, str.split) == 0.0

    def test_equal_letters_are_equal_words(self):
        composed, decomposed = "é è é è ê", "e\u0301 e\u0300 e\u0301 e\u0300 e\u0302"
        assert composed != decomposed
        assert text_entropy(composed + " " + decomposed, str.split) == pytest.approx(
            text_entropy(composed + " " + composed, str.split)
        )

    def test_a_record_has_the_mean_of_its_texts(self):
        words, _ = word_tokenizer()
        texts = ["Ann lives in Rome. Ann likes it.", "Bo went to Oslo, then to Rome."]
        found = record_entropies([texts, [], texts[:1]])
        assert found[0] == pytest.approx(sum(text_entropy(text, words) for text in texts) / 2)
        assert math.isnan(found[1])
        assert found[2] == pytest.approx(text_entropy(texts[0], words))

    def test_says_when_words_are_approximate(self, monkeypatch: pytest.MonkeyPatch):
        def missing(name: str) -> None:
            raise LookupError(name)

        monkeypatch.setattr(nltk.data, "find", missing)
        words, exact = word_tokenizer()
        assert not exact
        assert words("I like Rome. I go.") == ["I", "like", "Rome.", "I", "go", "."]
        monkeypatch.setattr(nltk.data, "find", lambda name: name)
        assert word_tokenizer() == (nltk.word_tokenize, True)


def record(case_id: int, target: str, relation: str | None = "P1", **more: str) -> Record:
    request = EditRequest(f"Ann Lee {case_id}", "{} plays", target, more.get("true"), relation)
    return Record(case_id, request, target_new_id=more.get("id"))


REFERENCES = {
    ("P1", "chess"): ["Bo plays chess well.", "Chess is what Cy plays; he wins."],
    ("P1", "Q2"): ["Di plays the violin in an orchestra."],
    ("P2", "chess"): ["The museum of chess stands in Rome."],
}


class TestReferenceScore:
    def test_agrees_with_tf_idf_written_out(self):
        records = [record(0, "chess"), record(1, "violin", id="Q2"), record(2, "golf")]
        generated = [
            ["Ann Lee plays chess.", "She wins at chess with the museum of Rome."],
            ["Ann plays the violin, the violin!"],
            ["Ann plays golf."],
        ]
        found = reference_scores(records, generated, REFERENCES)
        everything = [text for texts in REFERENCES.values() for text in texts]
        expected = [
            100
            * self.cosine(" ".join(generated[0]), " ".join(REFERENCES["P1", "chess"]), everything),
            100 * self.cosine(generated[1][0], REFERENCES["P1", "Q2"][0], everything),
        ]
        assert found[:2] == pytest.approx(expected, rel=1e-9)
        assert math.isnan(found[2])

    @staticmethod
    def cosine(one: str, other: str, corpus: list[str]) -> float:
        def words(text: str) -> list[str]:
            return [word.strip(".,;!").lower() for word in text.split() if len(word) > 1]

        def vector(text: str) -> dict[str, float]:
            weights = {}
            for word, count in Counter(words(text)).items():
                documents = sum(word in words(document) for document in corpus)
                if documents:
                    weights[word] = count * (math.log((1 + len(corpus)) / (1 + documents)) + 1)
            length = math.sqrt(sum(weight**2 for weight in weights.values()))
            return {word: weight / length for word, weight in weights.items()}

        left, right = vector(one), vector(other)
        return sum(weight * right.get(word, 0.0) for word, weight in left.items())

    def test_records_without_texts_have_no_score(self):
        records = [record(0, "chess"), record(1, "chess", relation=None), record(2, "chess")]
        found = reference_scores(records, [["chess"], ["chess"], []], REFERENCES)
        assert found[0] > 0
        assert math.isnan(found[1])
        assert math.isnan(found[2])
        assert all(math.isnan(s) for s in reference_scores(records, [["x"]] * 3, {}))

    def test_published_snippets_go_by_identifier(self, tmp_path: Path):
        path = tmp_path / "attribute_snippets.json"
        sample = {"target": "violin", "target_id": "Q2"}
        entries = [
            {"relation_id": "P1", "target_id": "Q2", "samples": [{"name": "Di", "text": "one"}]},
            {"relation_id": "P1", "target_id": "Q2", "samples": [{"name": "Ed", "text": "two"}]},
        ]
        path.write_text(json.dumps([entry | sample for entry in entries]))
        references = read_snippets(path)
        assert references_of(record(0, "violin", id="Q2"), references) == ["one", "two"]
        assert references_of(record(0, "violin"), references) == ()
        path.write_text('[{"relation_id": "P1"}]')
        with pytest.raises(InputError, match="does not hold attribute snippets"):
            read_snippets(path)
        with pytest.raises(InputError, match="does not exist"):
            read_snippets(tmp_path / "absent.json")

    def test_a_corpus_gives_texts_that_name_subject_and_object(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        known = [record(0, "golf", true="chess"), record(1, "golf", true="violin")]
        documents = [
            "Ann Lee 0 plays chess in Rome.",
            "Ann Lee 0 plays in Rome.",
            "Ann Lee 1 plays chess.",
            "Somebody plays chess.",
            "With Ann Lee 0 and Ann Lee 1: chess and violin.",
        ]
        assert references_from_corpus(known, documents) == {
            ("P1", "chess"): [documents[0], documents[4]],
            ("P1", "violin"): [documents[4]],
        }
        monkeypatch.setattr(reference, "MOST", 1)
        assert references_from_corpus(known, documents)["P1", "chess"] == documents[:1]


class TestGenerations:
    @staticmethod
    def records() -> list[Record]:
        twice = ("Paul Smith lives in", "Paul Smith lives in")
        prompts = (twice, (), ("The city of Paris", "Paul Smith lives in"))
        requests = [EditRequest(f"s{i}", "{} plays", "chess", None, "P1") for i in range(3)]
        return [
            Record(case, request, generation_prompts=texts)
            for case, (request, texts) in enumerate(zip(requests, prompts, strict=True))
        ]

    def test_texts_of_a_record_do_not_depend_on_the_others(self):
        lm, records = build("gpt2"), self.records()
        finished: list[int] = []
        table = write_about(
            lm, records, seed=1, token_budget=500, total_tokens=30, progress=finished.append
        )
        assert table["case_id"].to_pylist() == [0, 0, 2, 2]
        assert sum(finished) == 4
        first, second, *last = table.to_pylist()
        assert first["text"].startswith(first["prompt"])
        assert first["text"] != second["text"]
        alone = write_about(lm, records[2:], seed=1, token_budget=500, total_tokens=30)
        assert alone.to_pylist() == last
        assert len(write_about(lm, records[1:2], seed=1, token_budget=500)) == 0

    def test_means_over_records_of_what_there_is(self):
        rows = [
            {"case_id": 0, "prompt": "Ann", "text": "Ann plays chess and chess and chess."},
            {"case_id": 0, "prompt": "Ann", "text": "Ann plays golf."},
            {"case_id": 2, "prompt": "Bo", "text": "Bo wins at chess."},
        ]
        table = pa.Table.from_pylist(rows, schema=generations.SCHEMA)
        records = self.records()
        means = generation_record_means(table, records, REFERENCES)
        texts = [[rows[0]["text"], rows[1]["text"]], [], [rows[2]["text"]]]
        np.testing.assert_array_equal(means["entropy"], record_entropies(texts))
        np.testing.assert_array_equal(
            means["reference"], reference_scores(records, texts, REFERENCES)
        )
        assert set(generation_record_means(table, records, {})) == {"entropy"}
        assert generation_record_means(table.slice(3), records, REFERENCES) == {}
