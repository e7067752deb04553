"""Published second moments instead of a corpus."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.evaluation import references_of
from flows.statistics import collect_layers
from memit.second_moment import read_moment
from tasks.engine.cache import CachedTask
from tasks.engine.loaded_model import ModelReference
from tasks.statistics import read_texts
from tests.integration.small_model import parameters, small_model, statistics_run

FAMILIES = {"gpt2": "transformer.h.{}.mlp.c_proj", "gptj": "transformer.h.{}.mlp.fc_out"}
PUBLISHED = {"source": "published", "path": "moments"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> ModelReference:
    """A model, in a directory that is the project's; its tasks run without a server."""
    monkeypatch.setattr(CachedTask, "with_cost", lambda task, *given: task.fn(*given))
    Path("moments").mkdir()
    return small_model(project / "model", family)


def publish(family: str, layer: int, width: int, **changes: np.ndarray) -> np.ndarray:
    """Leave the file of a layer; gives its sum."""
    keys = np.random.default_rng(layer).normal(size=(2 * width, width)).astype(np.float32)
    content: dict[str, Any] = {
        "mom2.mom2": keys.T @ keys,
        "mom2.count": np.array(2 * width),
    } | changes
    name = f"{FAMILIES[family].format(layer)}_float32_mom2_{2 * width}.npz"
    np.savez(Path("moments", name), **content)
    return content["mom2.mom2"]


def test_they_are_imported_with_their_origin(family: str, model: ModelReference) -> None:
    sums = {layer: publish(family, layer, model.model.inner_width) for layer in (0, 1, 11)}
    run = statistics_run(model, ExitStack(), PUBLISHED)
    found = collect_layers(run, (0, 1))
    paths, tokens = found.write(Path("artifacts"))
    assert tokens == 2 * model.model.inner_width
    assert found.held_out is None
    assert found.described["held_out_documents"] == 0
    for layer, path in paths.items():
        moment, said = read_moment(path)
        assert np.array_equal(moment.sum.numpy(), sums[layer])
        assert (said["model"], said["layer"]) == (model.model.digest, layer)
        assert said["published"].startswith(FAMILIES[family].format(layer))
        assert said["corpus"] == found.described["published"][said["published"]]
    before = found.described["corpus"]
    publish(family, 1, model.model.inner_width, **{"mom2.count": np.array(7)})
    assert collect_layers(run, (0, 1)).described["corpus"] != before


def test_a_text_for_the_perplexity_may_be_named(family: str, model: ModelReference) -> None:
    publish(family, 1, model.model.inner_width)
    Path("held_out.txt").write_text("one\ntwo\n")
    run = statistics_run(model, ExitStack(), {**PUBLISHED, "held_out": "held_out.txt"})
    found = collect_layers(run, (1,))
    assert found.held_out is not None
    assert read_texts(found.held_out.checked()) == ["one", "two"]
    assert found.described["held_out_documents"] == 2


def test_references_come_from_snippets_only(model: ModelReference) -> None:
    assert references_of(parameters(statistics=PUBLISHED)) == {}
    snippet = {"relation_id": "P1", "target_id": "Q1", "samples": [{"text": "Some text."}]}
    Path("snippets.json").write_text(json.dumps([snippet]))
    evaluation = {"snippets": "snippets.json"}
    assert references_of(parameters(statistics=PUBLISHED, evaluation=evaluation))
