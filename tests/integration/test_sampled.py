"""Statistics over texts that the model writes, in pieces that a killed run leaves to the next."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from prefect import flow

import tasks.statistics
from flows.evaluation import references_of
from flows.statistics import Collected, collect_layers
from memit import sampled_corpus
from memit.second_moment import collect_second_moments, read_moment
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.workers import thread_runner
from tasks.statistics import held_out_file, read_texts
from tests.integration.small_model import parameters, small_model, statistics_run

pytestmark = [pytest.mark.server, pytest.mark.timeout(600), pytest.mark.usefixtures("api")]

SAMPLED: dict[str, Any] = {"source": "sampled", "held_out": "held_out.txt", "held_out_documents": 2}
SAMPLED |= {"documents_per_shard": 5}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelReference:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampled_corpus, "TEXTS_AT_ONCE", 8)
    Path("held_out.txt").write_text("one\ntwo\nthree\n")
    return small_model(tmp_path / "model")


@flow(task_runner=thread_runner())
def collect(model: ModelReference, **changes: Any) -> Collected:
    with ExitStack() as resources:
        return collect_layers(statistics_run(model, resources, SAMPLED | changes), (1, 2))


def test_a_killed_run_goes_on_after_its_last_batch(
    model: ModelReference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    sample = tasks.statistics.sample_batch

    def sample_or_die(lm: Any, number: int, seed: int) -> list[list[int]]:
        calls.append(number)
        if number == 1 and calls.count(1) == 1:
            raise SystemExit("killed")
        return sample(lm, number, seed)

    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "killed"))
    monkeypatch.setattr(tasks.statistics, "sample_batch", sample_or_die)
    with pytest.raises(SystemExit):
        collect(model)
    resumed, _ = collect(model).write(tmp_path / "resumed")
    assert calls.count(0) == 1
    once = len(calls)
    collect(model, tokens=5000)
    assert min(calls[once:]) == max(calls[:once]) + 1  # more tokens only add batches

    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "whole"))
    found = collect(model)
    paths, tokens = found.write(tmp_path / "whole")
    assert [p.read_bytes() for p in resumed.values()] == [p.read_bytes() for p in paths.values()]
    pieces = Path("whole/.cache/pieces/sampling").iterdir()
    rows = [ids for piece in pieces for ids in parquet.read_table(piece)["ids"].to_pylist()]
    assert tokens == sum(map(len, rows)) >= 16 * model.model.inner_width
    with loaded(model) as lm:
        expected = collect_second_moments(lm, rows, (1, 2), token_budget=500)
    for layer, path in paths.items():
        moment, _ = read_moment(path)
        assert (moment.mean - expected[layer].mean).norm() < 1e-6 * expected[layer].mean.norm()
    assert found.held_out is not None
    assert read_texts(found.held_out.checked()) == ["one", "two"]
    assert held_out_file(None).read_text().count("\n") >= 3
    assert references_of(parameters(statistics=SAMPLED)) == {}
