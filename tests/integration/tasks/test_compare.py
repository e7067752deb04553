"""The comparison of methods: which records are edited, with which settings, and their metrics."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flows import scaling
from flows.command.parameters import check_parameters
from flows.compare import Setup
from memit.editors.alphaedit import AlphaEdit
from memit.editors.fine_tuning import FineTuning
from memit.editors.memit import Memit
from memit.editors.rome import Rome
from memit.errors import InputError
from memit.evaluation.counterfact import SCHEMA, harmonic_mean
from memit.evaluation.kept import SCHEMA as KEPT_SCHEMA
from memit.hyperparameters import Hyperparameters
from memit.requests import EditRequest, Record
from tasks.compare import make_methods
from tasks.edit import Method
from tasks.evaluation import Measured
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
    published, free = _methods(
        ["ft_w", "ft_l"], {"ft_w": {"weight_decay": "power_law"}, "ft_l": {"bound": None}}
    )
    assert published.editor == FineTuning(21, weight_decay="power_law")
    assert free.editor == FineTuning(0, parameters="down_projection", bound=None)


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
        (
            ["ft_w"],
            {"ft_w": {"batch_size": True}},
            "ft_w.batch_size is True, but must be a valid integer",
        ),
        (
            ["ft_w"],
            {"ft_w": {"weight_decay": "power"}},
            "ft_w.weight_decay is 'power', but must be a valid number or 'power_law', such as",
        ),
        (
            ["ft_w"],
            {"ft_w": {"bound": -1}},
            "compare.settings.ft_w: bound is -1, but must be between 0",
        ),
        (
            ["ft_w"],
            {"ft_w": {"loss": "own"}},
            "loss is 'own', but must be 'teacher_forced' or 'published', such as",
        ),
    ],
)
def test_unknown_methods_and_settings_are_refused_by_name(names, settings, key):
    with pytest.raises(InputError, match=key):
        _methods(names, settings)


def _setup(count, counts=(1,), known=None):
    """A comparison of 40 records, of which the model knows some if only these are edited."""
    parameters = check_parameters(
        {
            "requests": {"source": "counterfact", "path": "x.json", "known": known is not None},
            "compare": {"count": count, "at_most": {"rome": 16}},
            "scaling": {"counts": counts, "least_records": 1},
        }
    )
    run: Any = SimpleNamespace(parameters=parameters)
    split: Any = SimpleNamespace(count=40)
    setup, drawn = Setup(run, (), split, {}, {}, None), SimpleNamespace(records=RECORDS[:known])

    def draw(count, seed):
        if count and known and count > known:
            raise InputError("fewer are known")
        return count or drawn

    object.__setattr__(setup, "draw", draw)
    return setup


@pytest.mark.parametrize(
    ("count", "known", "rome", "memit"),
    [(48, None, 16, 48), (12, None, 12, 12), (None, None, 16, None), (None, 9, 9, None)],
)
def test_a_method_edits_what_there_is_up_to_its_limit(count, known, rome, memit):
    setup = _setup(count, known=known)
    assert setup.size(Method("rome", Rome(5))) == rome
    assert setup.size(Method("memit", Memit(HYPERPARAMETERS))) == memit


@pytest.mark.parametrize(
    ("counts", "known", "sizes", "left_out"),
    [
        ((1, 30, 41), None, [1, 30], 1),
        ((1, 30, None), None, [1, 30, 40], 0),
        ((1, 30, 41, None), 9, [1, 9], 2),
        ((1, 30), 9, [1], 1),
    ],
)
def test_sizes_that_the_records_do_not_reach_are_left_out(capsys, counts, known, sizes, left_out):
    drawn = scaling._draw(_setup(None, counts, known))
    assert drawn == [(0, size) for size in sizes]
    assert capsys.readouterr().err.count("is left out") == left_out
    with pytest.raises(InputError, match=r"scaling\.counts"):
        scaling._draw(_setup(None, (41,), known))


def _table(kinds: tuple[str, ...], records: list[Record]) -> pa.Table:
    objects = {"target_new": "Rome", "target_true": "Paris", "hit_new": True, "hit_true": False}
    objects |= {"share_new": 1.0}
    rows = [
        {"case_id": record.case_id, "kind": kind, "prompt": f"{kind} {record.case_id}", **objects}
        | {"nll_new": 1.0 + record.case_id % 2, "nll_true": 1.5}
        for record in records
        for kind in kinds
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


TEXTS = pa.table({"case_id": [1, 0], "prompt": ["a", "b"], "text": ["a red fox d", "a a a a"]})


def _metrics(prompts, texts, records, references=None):
    measured = Measured(prompts, texts, KEPT_SCHEMA.empty_table(), TEXTS[:0], None, None, {})
    return measured.metrics(records, references or {})


def test_metrics_have_intervals_and_are_absent_where_the_records_lack_them():
    records = RECORDS[:4]
    metrics = _metrics(_table(("rewrite", "paraphrase"), records), TEXTS[:0], records)
    assert metrics["efficacy"] == 50.0
    assert metrics["efficacy_low"] < 50.0 < metrics["efficacy_high"]
    missing = {"score", "neighborhood", "neighborhood_plus", "entropy", "reference"}
    assert not missing & metrics.keys()


def test_texts_are_measured_for_the_records_that_have_them():
    records = RECORDS[:4]
    references = {("P1", "Rome"): ["red fox", "in town"], ("P1", "Oslo"): ["blue ox"]}
    table = _table(("rewrite",), records)
    metrics = _metrics(table, TEXTS, records, references)
    a, b = (-sum(p * np.log2(p) for p in np.full(n, 1 / n)) for n in (3, 2))
    assert metrics["entropy"] == pytest.approx(100 * (2 / 3 * a + 4 / 3 * b) / 2 / 2, abs=1e-3)
    assert 0 < metrics["reference"] < 100
    assert "reference" not in _metrics(table, TEXTS, records)


def test_zsre_has_its_own_metrics_under_the_same_names():
    answers = _table(("rewrite", "paraphrase", "specificity"), RECORDS[:3])
    shares = pa.array([1.0, 0.5, 0.5] * 3)
    answers = answers.set_column(answers.schema.get_field_index("share_new"), "share_new", shares)
    metrics = _metrics(answers, TEXTS[:0], RECORDS[:3])
    assert metrics["records"] == 3
    assert "efficacy_accuracy" not in metrics
    assert metrics["score"] == pytest.approx(harmonic_mean([100.0, 50.0, 50.0]))
    assert [metrics[name] for name in ("efficacy", "paraphrase", "neighborhood")] == [100, 50, 50]
    assert metrics["neighborhood_low"] == metrics["neighborhood_high"] == 50.0
