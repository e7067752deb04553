"""Batches of facts through the steps: each is edited upon what the ones before it have left."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.command.parameters import Parameters, check_parameters
from flows.edit import edit
from flows.history import history
from flows.model import model
from flows.prefixes import prefixes
from flows.requests import requests
from flows.statistics import statistics
from flows.targets import targets
from memit.editors.base import Resources
from memit.editors.memit_sequence import MemitSequence
from memit.errors import InputError, IntegrityError, LimitError
from memit.hyperparameters import Hyperparameters
from memit.language_model import load_model
from memit.requests import EditRequest, Record, read_counterfact, write_records
from memit.second_moment import read_moment
from memit.sequence import edit_in_batches
from memit.targets import Targets
from memit.weight_delta import WeightDelta
from tasks.engine.results import (
    DELTA_FILE,
    PREFIXES_FILE,
    REQUESTS_FILE,
    STATISTICS,
    TARGETS_FILE,
    WEIGHTS,
)
from tasks.reporting.formats import read_json
from tests import contents
from tests.reference import relative

pytestmark = [pytest.mark.server, pytest.mark.slow]

BATCH = (requests, targets, edit, history)
COUNT = 4
LAYERS = (0, 1)
TINY: dict[str, dict[str, Any]] = {
    "model": {
        "source": "synthetic",
        "threads": 1,
        "world": {"people": 24, "relations": 2, "objects": 4, "biographies": 4},
        "training": {"layers": 3, "width": 32, "heads": 2, "vocabulary": 400, "steps": 30},
    },
    "requests": {"source": "synthetic", "count": COUNT},
    "statistics": {"source": "synthetic", "documents": 80, "held_out_documents": 0},
    "targets": {"evaluations": 6},
    "edit": {"history": "history", "covariance_weight": 50, "layers": list(LAYERS)},
}


def run(steps: Sequence[Callable[[Parameters], None]], **changes: Mapping[str, Any]) -> None:
    """Run steps with a history and some changes of `TINY`."""
    sections = {*TINY, *changes}
    tree = {name: {**TINY.get(name, {}), **changes.get(name, {})} for name in sections}
    parameters = check_parameters(tree)
    for step in steps:
        step(parameters)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory, api: str) -> Iterator[None]:
    """A directory with a model and its statistics."""
    place = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("DVC_ROOT", str(place))
        run((model, prefixes, statistics))
        yield


@pytest.fixture(scope="module")
def batches(place: None) -> list[tuple[list[EditRequest], Targets]]:
    """Two batches with their targets, which have been edited one after the other."""
    found = []
    for seed in (0, 1):
        run(BATCH, requests={"seed": seed})
        requests = [record.request for record in read_counterfact(REQUESTS_FILE)]
        found.append((requests, Targets.load(TARGETS_FILE)))
    return found


def test_records_that_contradict_others_are_said_to_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asking = [EditRequest("Ada", "{} lives in", name, "Paris") for name in ("Rome", "Oslo")]
    write_records([Record(*each) for each in enumerate(asking)], tmp_path / "records.json")
    source = {"source": "counterfact", "path": str(tmp_path / "records.json"), "count": None}
    run([requests], requests=source, edit={"history": None})
    assert len(read_counterfact(REQUESTS_FILE)) == 1
    assert "left out: 1 of the records, which contradict" in capsys.readouterr().err


def test_batches_are_those_of_the_library(batches: list[tuple[list[EditRequest], Targets]]) -> None:
    delta, lm = WeightDelta.load(DELTA_FILE), load_model(WEIGHTS)
    said = [fact["target"] for fact in delta.provenance["facts"]]
    assert said == [request.target_new for requests, _ in batches for request in requests]
    settings = dict(delta.provenance["settings"]["hyperparameters"])
    editor = MemitSequence(Hyperparameters(**{**settings, "layers": LAYERS}))
    moments = {n: read_moment(STATISTICS / f"layer-{n:02}.parquet")[0] for n in LAYERS}
    goals = Targets.concatenate([goals for _, goals in batches])
    resources = Resources(4096, read_json(PREFIXES_FILE)["prefixes"], moments, targets=goals)
    edits = list(edit_in_batches(lm, editor, [requests for requests, _ in batches], resources))
    for name, change in delta.changes.items():
        parts = [edit.changes[name].dense() for edit in edits]  # type: ignore[attr-defined]
        assert relative(change.dense(), torch.stack(parts).sum(0)) < 1e-5
    delta.apply(load_model(WEIGHTS))


def test_the_last_batch_can_be_run_again_also_with_targets_of_the_edited_model(
    batches: list[tuple[list[EditRequest], Targets]],
) -> None:
    made, states = DELTA_FILE.read_bytes(), contents(Path("history"))
    run(BATCH, requests={"seed": 1})
    assert (DELTA_FILE.read_bytes(), contents(Path("history"))) == (made, states)
    run(BATCH, requests={"seed": 1}, targets={"upon": "edited"})
    assert (Targets.load(TARGETS_FILE).hidden - batches[1][1].hidden).abs().max() > 1e-3
    assert len(WeightDelta.load(DELTA_FILE).provenance["facts"]) == 2 * COUNT


@pytest.mark.usefixtures("batches")
def test_a_batch_beyond_the_limits_is_not_handed_on() -> None:
    states = contents(Path("history"))
    with pytest.raises(LimitError, match="not measured"):
        run([history], requests={"seed": 1}, limits={"update_ratio": 5})
    assert contents(Path("history")) == states


@pytest.mark.usefixtures("batches")
def test_an_edit_upon_a_state_that_is_gone_is_not_handed_on() -> None:
    Path("history").rename("elsewhere")
    with pytest.raises(IntegrityError, match="another state"):
        run([history], requests={"seed": 1})
    assert not Path("history").exists()
    Path("elsewhere").rename("history")


@pytest.mark.usefixtures("batches")
def test_a_history_of_other_layers_is_refused_before_anything_long() -> None:
    states = contents(Path("history"))
    with pytest.raises(InputError, match="other layers"):
        run([requests], edit={"layers": [1]})
    assert contents(Path("history")) == states
