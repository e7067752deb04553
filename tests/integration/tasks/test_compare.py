"""The comparison of methods: which records are edited, with which settings, and their metrics."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from memit.editors.alphaedit import AlphaEdit
from memit.editors.fine_tuning import FineTuning
from memit.editors.memit import Memit
from memit.editors.rome import Rome
from memit.errors import InputError
from memit.evaluation import zsre
from memit.evaluation.counterfact import SCHEMA, harmonic_mean
from memit.evaluation.kept import SCHEMA as KEPT_SCHEMA
from memit.hyperparameters import Hyperparameters
from memit.requests import EditRequest, Record
from tasks.compare import make_methods
from tasks.evaluation import metrics_of
from tasks.requests import split_by_subject, without_prompts

HYPERPARAMETERS = Hyperparameters((1, 2), 5.0)


def _record(case: int, subject: str, neighbors: tuple[str, ...] = ()) -> Record:
    request = EditRequest(subject, "{} lives in", "Rome", "Paris", "P1")
    return Record(case, request, (f"The home of {subject} is",), neighbors)


RECORDS = [
    _record(case, f"Person {case % 10}", (f"Person {(case + 1) % 10} lives in", "Ada lives in"))
    for case in range(30)
]


@pytest.mark.parametrize("training", [1, 7, 15])
def test_training_and_edited_records_share_no_subject_and_no_prompt(training):
    edited, learnt = split_by_subject(RECORDS, training, seed=0)
    assert training <= len(learnt) < training + 3
    assert len(edited) + len(learnt) == 30
    assert not {r.request.subject for r in edited} & {r.request.subject for r in learnt}
    learnt_prompts = {p for r in learnt for p in (r.request.text, *r.paraphrase_prompts)}
    purged = without_prompts(edited, learnt)
    for r in purged:
        prompts = {r.request.text, *r.paraphrase_prompts, *r.neighborhood_prompts}
        assert not learnt_prompts & prompts
    assert all("Ada lives in" in record.neighborhood_prompts for record in purged)
    assert any(len(record.neighborhood_prompts) == 1 for record in purged)


def test_the_split_follows_its_seed_and_never_takes_more_than_half():
    first = split_by_subject(RECORDS, 9, seed=0)
    assert first == split_by_subject(RECORDS, 9, seed=0)
    assert first != split_by_subject(RECORDS, 9, seed=1)
    assert split_by_subject(RECORDS, 0, seed=0) == (RECORDS, [])
    edited, learnt = split_by_subject(RECORDS, 1_000, seed=0)
    assert len(edited) == len(learnt) == 15


def _methods(names, settings=None):
    return make_methods(names, settings or {}, HYPERPARAMETERS, "gpt-j-6b", 28)


def test_settings_override_published_ones():
    ft_w, ft_l, rome, memit = (s.editor for s in _methods(["ft_w", "ft_l", "rome", "memit"]))
    assert ft_w == FineTuning(21, learning_rate=5e-4, weight_decay=5e-4)
    assert ft_l == FineTuning(0, parameters="down_projection", bound=5e-5)
    assert rome == Rome(5)
    assert memit == Memit(HYPERPARAMETERS)
    (alphaedit,) = _methods(["alphaedit"], {"alphaedit": {"energy": 0.1}})
    assert alphaedit.editor == AlphaEdit(HYPERPARAMETERS, energy=0.1)
    (rome,) = _methods(["rome"], {"rome": {"update": "consistent", "layer": 3}})
    assert rome.editor == replace(Rome(3), update="consistent")
    (ft_w,) = _methods(["ft_w"], {"ft_w": {"weight_decay": "power_law"}})
    assert ft_w.editor == FineTuning(21, weight_decay="power_law")


@pytest.mark.parametrize(
    ("names", "settings", "key"),
    [
        (["rom"], {}, "compare.methods .*rom"),
        (["memit"], {"rome": {"layer": 1}}, "compare.settings .*rome"),
        (["rome"], {"rome": {"layers": 1}}, "compare.settings.rome .*layers"),
        (["memit"], {"memit": {"layers": 1}}, "targets .*edit"),
        (["encore"], {"encore": {"layers": 1}}, "compare.settings.encore .*ridge, argmax_stop"),
        (["mend"], {"mend": {"steps": 1}}, "compare.settings.mend .*mend"),
        (["unedited"], {"unedited": {"layer": 1}}, "unedited"),
        (["ft_w"], {"ft_w": {"weight_decay": "power"}}, "compare.settings.ft_w.weight_decay is"),
    ],
)
def test_unknown_methods_and_settings_are_refused_by_name(names, settings, key):
    with pytest.raises(InputError, match=key):
        _methods(names, settings)


def _table(kinds: tuple[str, ...], records: list[Record]) -> pa.Table:
    objects = {"target_new": "Rome", "target_true": "Paris", "hit_new": True, "hit_true": False}
    rows = [
        {"case_id": record.case_id, "kind": kind, "prompt": f"{kind} {record.case_id}", **objects}
        | {"nll_new": 1.0 + record.case_id % 2, "nll_true": 1.5}
        for record in records
        for kind in kinds
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


KEPT = KEPT_SCHEMA.empty_table()
TEXTS = pa.table({"case_id": [1, 0], "prompt": ["a", "b"], "text": ["a red fox d", "a a a a"]})


def test_metrics_have_intervals_and_are_absent_where_the_records_lack_them():
    records = RECORDS[:4]
    metrics = metrics_of(_table(("rewrite", "paraphrase"), records), TEXTS[:0], KEPT, records, {})
    assert metrics["efficacy"] == 50.0
    assert metrics["efficacy_low"] < 50.0 < metrics["efficacy_high"]
    missing = {"score", "neighborhood", "neighborhood_plus", "entropy", "reference"}
    assert not missing & metrics.keys()


def test_texts_are_measured_for_the_records_that_have_them():
    records = RECORDS[:4]
    references = {("P1", "Rome"): ["red fox", "in town"], ("P1", "Oslo"): ["blue ox"]}
    table = _table(("rewrite",), records)
    metrics = metrics_of(table, TEXTS, KEPT, records, references)
    a, b = (-sum(p * np.log2(p) for p in np.full(n, 1 / n)) for n in (3, 2))
    assert metrics["entropy"] == pytest.approx(100 * (2 / 3 * a + 4 / 3 * b) / 2 / 2, abs=1e-3)
    assert 0 < metrics["reference"] < 100
    assert "reference" not in metrics_of(table, TEXTS, KEPT, records, {})


def test_zsre_has_its_own_metrics_under_the_same_names():
    kinds = ("efficacy", "paraphrase", "specificity")
    rows = [
        {"case_id": case, "kind": kind, "prompt": "?", "answer": "a b"}
        | {"nll": 1.0, "right": 2 if kind == "efficacy" else 1, "tokens": 2}
        for case in range(3)
        for kind in kinds
    ]
    answers = pa.Table.from_pylist(rows, schema=zsre.SCHEMA)
    metrics = metrics_of(answers, TEXTS[:0], KEPT, RECORDS[:3], {})
    assert metrics["score"] == pytest.approx(harmonic_mean([100.0, 50.0, 50.0]))
    assert [metrics[name] for name in ("efficacy", "paraphrase", "neighborhood")] == [100, 50, 50]
    assert metrics["neighborhood_low"] == metrics["neighborhood_high"] == 50.0
