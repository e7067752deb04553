"""CounterFact scores against a literal oracle, and what tables say against arithmetic by hand."""

import math

import pyarrow as pa
import pytest
import torch

from memit import reference as oracle
from memit.errors import InputError
from memit.evaluation import continuations
from memit.evaluation.continuations import Question, score_continuations
from memit.evaluation.counterfact import (
    SCHEMA,
    before_and_after,
    facts_table,
    plus_prompts_of,
    prompts_of,
    score_prompts,
    summarise,
)
from memit.requests import EditRequest, Record
from tests.families import CITIES, SENTENCES, SUBJECTS
from tests.reference import shared


def records(true_objects: bool = True) -> list[Record]:
    """Records with objects of one and of several tokens, and neighbours that they share."""
    made = []
    for number, subject in enumerate(SUBJECTS[:5]):
        request = EditRequest(
            subject,
            SENTENCES[number % 3].format("{}", "").strip(" ."),
            CITIES[number],
            CITIES[(number + 2) % 6] if true_objects else None,
        )
        neighbors = tuple(f"{SUBJECTS[k]} lives in the city of" for k in (5, 6, 5 + number % 3))
        made.append(Record(number, request, (f"Well: {subject} stays in",), neighbors))
    return made


FAMILIES = ["gpt2", "gptj", "gpt_neox", "llama", "mistral", "gemma2"]


class TestScores:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("token_budget", [24, 4096])
    def test_agree_with_one_forward_a_prompt_and_object(self, family: str, token_budget: int):
        lm = shared(family)
        prompts = prompts_of(records())
        finished: list[int] = []
        table = score_prompts(
            lm, prompts, token_budget=token_budget, progress=finished.append
        ).to_pylist()
        assert len(table) == len(prompts) == sum(finished)
        for prompt, row in zip(prompts, table, strict=True):
            assert prompt.target_true is not None
            for name, target in (("new", prompt.target_new), ("true", prompt.target_true)):
                (alone,) = oracle.scores(lm.model, lm.tokenizer, [(prompt.prompt, target)])
                assert row[f"nll_{name}"] == pytest.approx(alone.nll, abs=2e-4)
                assert row[f"hit_{name}"] == alone.hit

    def test_hits_are_found(self):
        """Random models miss what is asked of them, so ask for what this one would say."""
        lm = shared("mistral")
        prompt = "Paul Smith lives in the city of"
        ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            best = lm.model(ids).logits[0, -1].argmax()
        said = str(lm.tokenizer.decode(best)).strip()
        answers = (said, f"{said} lies", "Rome")
        question = Question(prompt, tuple(f" {answer}" for answer in answers))
        (scores,) = score_continuations(lm, [question], token_budget=512)
        assert scores[0].hit
        assert 0 < scores[1].right < scores[1].tokens
        for answer, score in zip(answers, scores, strict=True):
            (alone,) = oracle.scores(lm.model, lm.tokenizer, [(prompt, answer)])
            assert score.hit == alone.hit
            assert score.nll == pytest.approx(alone.nll, abs=2e-4)

    def test_models_that_cannot_be_resumed_give_the_same(self, monkeypatch: pytest.MonkeyPatch):
        lm = shared("llama")
        prompts = prompts_of(records())
        fast = score_prompts(lm, prompts, token_budget=4096)
        monkeypatch.setattr(continuations, "can_resume", lambda lm: False)
        whole = score_prompts(lm, prompts, token_budget=4096)
        assert fast["nll_new"].to_pylist() == pytest.approx(whole["nll_new"].to_pylist(), abs=2e-4)

    def test_equal_prompts_are_run_once(self, monkeypatch: pytest.MonkeyPatch):
        lm = shared("gpt2")
        prompts = prompts_of(records())
        run: list[int] = []
        counted = continuations.logits_at

        def count(lm, rows, *args, **kwargs):
            run.append(rows.ids.numel())
            return counted(lm, rows, *args, **kwargs)

        monkeypatch.setattr(continuations, "logits_at", count)
        table = score_prompts(lm, prompts, token_budget=4096)
        once = sum(run)
        run.clear()
        assert score_prompts(lm, [*prompts, *prompts], token_budget=4096) == pa.concat_tables(
            [table, table]
        )
        assert sum(run) == once
        lengths = [len(lm.tokenizer(text)["input_ids"]) for text in {p.prompt for p in prompts}]
        objects = [len(lm.tokenizer(f" {city}")["input_ids"]) for city in CITIES]
        assert once < sum(lengths) + 2 * len(prompts) * max(objects)

    def test_without_a_true_object(self):
        table = score_prompts(shared("gpt2"), prompts_of(records(False)), token_budget=4096)
        assert table["nll_true"].null_count == table["hit_true"].null_count == len(table)
        assert set(summarise(table)) == {"efficacy_accuracy", "paraphrase_accuracy", "records"}


def row(case_id: int, kind: str, nll: float, rival: float | None, **hits: bool) -> dict:
    return {
        "case_id": case_id,
        "kind": kind,
        "prompt": f"{kind} {nll}",
        "target_new": "Rome",
        "target_true": None if rival is None else "Oslo",
        "nll_new": nll,
        "nll_true": rival,
        "hit_new": hits.get("new", False),
        "hit_true": None if rival is None else hits.get("true", False),
        "share_new": float(hits.get("new", False)),
    }


def table_of(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


class TestSummary:
    table = table_of(
        row(3, "rewrite", 1.0, 2.0, new=True),
        row(3, "paraphrase", 1.0, 2.0),
        row(3, "paraphrase", 2.0, 2.0, new=True),
        row(3, "neighborhood", 3.0, 1.0, true=True),
        row(9, "rewrite", 1.0, 3.0),
        row(9, "neighborhood", 1.0, 1.0),
        row(9, "neighborhood", 2.0, 1.0, new=True),
    )

    def test_is_a_mean_over_records_of_a_mean_over_prompts_and_ties_fail(self):
        summary = summarise(self.table)
        assert summary["efficacy"] == 100.0
        assert summary["paraphrase"] == 50.0  # one record has paraphrases, one of two is a tie
        assert summary["neighborhood"] == 75.0  # (1 + ½) / 2
        assert summary["score"] == pytest.approx(3 / (1 / 100 + 1 / 50 + 1 / 75))
        assert summary["efficacy_accuracy"] == 50.0
        assert summary["paraphrase_accuracy"] == 50.0
        assert summary["neighborhood_accuracy"] == 50.0
        p = [math.exp(-nll) for nll in range(4)]
        assert summary["efficacy_magnitude"] == pytest.approx(100 * (p[1] - p[2] + p[1] - p[3]) / 2)
        assert summary["neighborhood_magnitude"] == pytest.approx(
            100 * (p[1] - p[3] + (p[1] - p[2]) / 2) / 2
        )
        assert summary["records"] == 2

    def test_failed_edits_count_as_failures_in_every_metric(self):
        summary, as_measured = summarise(self.table, failed=[9, 77]), summarise(self.table)
        assert summary["efficacy"] == 50.0
        assert summary["neighborhood"] == 50.0  # (1 + 0) / 2
        assert summary["paraphrase"] == as_measured["paraphrase"]  # the failed record has none
        assert summary["records"] == 2

    def test_leaves_out_what_the_table_does_not_have(self):
        summary = summarise(table_of(row(0, "rewrite", 1.0, 2.0)))
        assert set(summary) == {"efficacy", "efficacy_accuracy", "efficacy_magnitude", "records"}

    def test_numbers_that_are_not_finite_fail(self):
        table = table_of(row(0, "rewrite", 1.0, 2.0), row(1, "rewrite", math.nan, 2.0))
        assert summarise(table)["efficacy"] == 50.0

    def test_a_score_with_a_zero_is_zero(self):
        failed = table_of(
            row(0, "rewrite", 2.0, 1.0), row(0, "paraphrase", 1, 2), row(0, "neighborhood", 2, 1)
        )
        assert summarise(failed)["score"] == 0.0

    def test_does_not_depend_on_the_order_of_rows(self):
        backwards = self.table.take(list(range(len(self.table)))[::-1])
        assert summarise(backwards) == pytest.approx(summarise(self.table))


class TestBeforeAndAfter:
    before = table_of(
        row(3, "rewrite", 1.0, 2.0),
        row(3, "paraphrase", 1.0, 2.0),
        row(3, "neighborhood", 4.0, 1.0),
        row(3, "neighborhood", 5.0, 1.0),
        row(9, "rewrite", 6.0, None),
    )
    after = before.drop_columns(["nll_true", "hit_new"])
    after = after.append_column(
        SCHEMA.field("nll_true"), pa.array([3.0, 0.5, 4.5, 1.0, None], pa.float64())
    ).append_column(SCHEMA.field("hit_new"), pa.array([False, True, False, False, True]))
    after = after.select(SCHEMA.names)

    def test_two_states_are_joined(self):
        joined = before_and_after(self.before, self.after)
        assert "nll_true_after" in joined.column_names
        for state, table in (("before", self.before), ("after", self.after)):
            for name in ("nll_new", "nll_true", "hit_new", "hit_true"):
                assert joined[f"{name}_{state}"] == table[name]
        with pytest.raises(InputError, match="different prompts"):
            before_and_after(self.before, self.after.slice(1))

    def test_says_of_each_fact_what_became_of_it(self):
        first, second = facts_table(self.before, self.after).to_pylist()
        assert first["case_id"] == 3
        assert first["took"] is True
        assert first["answered"] is False
        assert first["generalised"] is False
        assert (first["neighbors"], first["neighbors_right_before"], first["hurt"]) == (2, 2, 1)
        assert first["hurt_prompts"] == "neighborhood 4.0"
        assert second["took"] is True  # no true object: the model gives the new one
        assert second["generalised"] is second["hurt"] is None

    def test_kept_prompts_are_the_neighbours_of_own_facts(self):
        kept = [{"case_id": 9, "prompt": name, "same_token": name == "b"} for name in "ab"]
        first, second = facts_table(self.before, self.after, kept).to_pylist()
        assert first["hurt"] == 1
        counted = ("neighbors", "neighbors_right_before", "neighbors_right_after", "hurt")
        assert [second[name] for name in counted] == [2, 2, 1, 1]
        assert second["hurt_prompts"] == "a"


def test_prompts_of_a_record_in_their_order():
    record = Record(
        4, EditRequest("Ann", "{} lives in", "Rome", "Oslo"), ("Ann stays in",), ("Bo is", "Cy is")
    )
    assert [(p.kind, p.prompt) for p in prompts_of([record])] == [
        ("rewrite", "Ann lives in"),
        ("paraphrase", "Ann stays in"),
        ("neighborhood", "Bo is"),
        ("neighborhood", "Cy is"),
    ]
    assert [p.prompt for p in plus_prompts_of([record])] == [
        "Ann lives in Rome. Bo is",
        "Ann lives in Rome. Cy is",
    ]
