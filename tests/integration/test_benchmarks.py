"""The benchmark runs, and what it calls a floor is one."""

from dataclasses import replace

import pytest
import torch

from benchmarks import steps
from benchmarks.__main__ import gpu_rows, markdown
from benchmarks.edited import METRICS, edited_rows
from benchmarks.floor import Machine, Work, covariance_work, spread_work
from benchmarks.steps import Bench
from benchmarks.workload import GPTJ_TINY, LLAMA_TINY, SMALL, make_model, make_tokenizer
from memit import reference as oracle
from memit.language_model import LanguageModel
from memit.requests import Record
from tests.reference import HYPERPARAMETERS, REQUESTS, build

TINY = replace(GPTJ_TINY, depth=3, width=32, inner=128, vocabulary=64, layers=(0, 1))


@pytest.fixture(scope="module")
def bench() -> Bench:
    tokenizer = make_tokenizer(TINY.vocabulary)
    lm = LanguageModel(make_model(TINY, "cpu", torch.float32), tokenizer, name="tiny")
    literal = make_model(TINY, "cpu", torch.float32)
    return Bench(TINY, lm, "cpu", Machine(1e12, 1e12, 1e12), 2048, literal)


def test_every_step_is_timed_beside_the_oracle(bench: Bench) -> None:
    for row in (
        steps.targets(bench, 2, repeats=1),
        steps.spread_step(bench, 2, repeats=1),
        steps.covariance(bench, 300, [0, 1], repeats=1),
        steps.evaluation(bench, 2, repeats=1),
        steps.generation(bench, 3, 4, repeats=1),
    ):
        assert 0 < row["floor_seconds"] < row["seconds"]
    for literal in (
        steps.oracle_targets(bench, 1),
        steps.oracle_spread(bench, 2),
        steps.oracle_covariance(bench, 300, [0, 1]),
        steps.oracle_evaluation(bench, 1, oracle.evaluate),
        steps.oracle_generation(bench, 1, 4),
    ):
        assert literal.seconds > 0


def test_ours_and_the_oracle_do_the_same_work(bench: Bench) -> None:
    requests = steps.make_requests(TINY, 2)
    prefixes, hp = steps.make_prefixes(TINY), bench.hyperparameters
    ours = steps.run_targets(bench, requests)
    for z, request in zip(ours, requests, strict=True):
        literal = oracle.target(bench.literal, bench.lm.tokenizer, request, prefixes, hp).z
        assert (z - literal).norm() < 2e-2 * literal.norm()  # flat losses, near random weights


def test_the_rows_of_a_gpu_are_measured_and_projected() -> None:
    """At a shape so small that a CPU takes seconds."""
    rows = list(gpu_rows(LLAMA_TINY, quick=True, device="cpu"))
    measured = ["targets", "targets", "covariance", "spread", "evaluation"]
    assert [row["step"] for row in rows[:5]] == [f"{step}, {LLAMA_TINY.name}" for step in measured]
    whole, beside = rows[5:]
    assert whole["count"] == 10_000
    assert set(whole["parts"]) == {"targets", "covariance", "spread", "evaluation"}
    assert whole["parts"]["targets"] == pytest.approx(10_000 * rows[1]["seconds_per_edit"])
    assert beside["oracle_seconds"] == pytest.approx(beside["speedup"] * rows[1]["seconds"])
    assert len(markdown(rows).splitlines()) == 2 + len(rows)


def test_a_model_with_facts_is_edited_and_the_edit_measured() -> None:
    records = [
        Record(case, replace(one, target_true=one.subject), (one.text,), (one.text,))
        for case, one in enumerate(REQUESTS)
    ]
    rows = list(edited_rows(build("llama"), HYPERPARAMETERS, records, [1, 2]))
    names = [row["step"].partition(",")[0] for row in rows]
    assert names == ["texts", "covariance", *["targets", "edit", "evaluation"] * 2]
    assert all(0 <= rows[place][name] <= 100 for place in (4, 7) for name in METRICS.values())


def test_a_block_has_the_parameters_of_its_kind() -> None:
    """Without biases and norms, which floors leave out."""
    tokenizer = make_tokenizer(TINY.vocabulary)
    for shape in (TINY, GPTJ_TINY, LLAMA_TINY):
        lm = LanguageModel(make_model(shape, "cpu", torch.float32), tokenizer, name="x")
        matrices = [p for p in lm.blocks[0].parameters() if p.ndim == 2]
        assert sum(map(torch.numel, matrices)) == shape.block_parameters


def test_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    machine = Machine(flops=10.0, flops64=5.0, bytes=2.0)
    assert Work(flops=20.0, flops64=10.0, bytes=2.0).seconds(machine) == 4.0
    assert Work(flops=20.0, bytes=10.0).seconds(machine) == 5.0


def test_counted_work_grows_as_the_method_does() -> None:
    half = covariance_work(SMALL, 1000, 4, 3, 64.0).flops
    assert covariance_work(SMALL, 2000, 4, 3, 64.0).flops == pytest.approx(2 * half)
    few, many = spread_work(SMALL, 10, 14, 6), spread_work(SMALL, 20, 14, 6)
    assert many.flops == pytest.approx(2 * few.flops)
    assert few.flops64 < many.flops64 < 2 * few.flops64
