"""``params.yaml``: what is right passes, what is wrong is named in one sentence, and soon."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.command.parameters import Parameters, check_parameters, read_parameters
from memit.errors import InputError
from memit.hyperparameters import preset
from tests import ROOT

BAD: list[tuple[dict[str, Any] | object, str]] = [
    ([], "must hold sections"),
    (None, "must hold sections"),
    ("model", "must hold sections"),
    ({"modle": {}}, "no key modle; did you mean model?"),
    ({"edit": {"layrs": [1]}}, "no key edit.layrs; did you mean edit.layers?"),
    ({"requests": {"layers": [1]}}, "no key requests.layers; did you mean edit.layers?"),
    ({"edit": {"zzz": 1}}, "no key edit.zzz: the keys there are layers"),
    ({"model": {"world": {"peopel": 3}}}, "did you mean model.world.people?"),
    ({"requests": None}, "requests is null"),
    ({"model": {"source": "web"}}, 'model.source is "web"'),
    ({"model": {"source": "hub"}}, "which needs model.id"),
    ({"model": {"source": "hub", "id": "a/b"}}, "which needs model.revision"),
    ({"model": {"source": "local"}}, "which needs model.path"),
    ({"model": {"dtype": "fp16"}}, 'model.dtype is "fp16"'),
    ({"model": {"device": "gpu"}}, 'model.device is "gpu"'),
    ({"model": {"threads": 0}}, "model.threads is 0"),
    ({"model": {"seed": -1}}, "model.seed is -1"),
    ({"model": {"seed": 2**32}}, "model.seed is 4294967296"),
    ({"model": {"path": "a\0b"}}, "model.path is"),
    ({"model": {"path": ""}}, 'model.path is ""'),
    ({"model": {"world": {"people": 1}}}, "model.world.people is 1"),
    ({"model": {"world": {"records_per_person": 7}}}, "a person has 6 facts"),
    ({"model": {"training": {"width": 130}}}, "width is 130, which is no multiple of its 4"),
    ({"model": {"training": {"sequence_length": 256}}}, "more than the context_length"),
    ({"model": {"training": {"learning_rate": 0}}}, "model.training.learning_rate is 0"),
    ({"model": {"training": {"steps": True}}}, "model.training.steps is true"),
    ({"requests": {"count": 0}}, "requests.count is 0"),
    ({"requests": {"count": 6.5}}, "requests.count is 6.5"),
    ({"requests": {"count": "64"}}, "is the text '64', not a number: write 64"),
    ({"requests": {"count": 99_999}}, "model.world has 450 records"),
    ({"requests": {"source": "counterfact"}}, "either requests.path or requests.url"),
    (
        {"requests": {"source": "facts", "path": "a", "url": "http://x"}},
        "either requests.path or requests.url",
    ),
    ({"requests": {"source": "facts", "url": "http://x"}}, "which needs requests.sha256"),
    ({"requests": {"sha256": "12"}}, 'requests.sha256 is "12"'),
    ({"statistics": {"source": "file"}}, "which needs statistics.path"),
    ({"statistics": {"source": "dataset"}}, "which needs statistics.dataset"),
    (
        {"statistics": {"source": "dataset", "dataset": "a/b", "documents": 3}},
        "which needs statistics.revision",
    ),
    ({"statistics": {"documents_per_shard": 0}}, "statistics.documents_per_shard is 0"),
    ({"targets": {"token_budget": "aut"}}, "or input should be 'auto'"),
    ({"targets": {"token_budget": 3}}, "targets.token_budget is 3"),
    ({"targets": {"evaluations": 0}}, "targets.evaluations is 0"),
    ({"targets": {"clamp_factor": -0.5}}, "targets.clamp_factor is -0.5"),
    ({"edit": {"layers": []}}, "edit.layers is []"),
    ({"edit": {"layers": [2, 1]}}, "in ascending order"),
    ({"edit": {"layers": [1, 1]}}, "each layer once"),
    ({"edit": {"layers": [-1]}}, "edit.layers[0] is -1"),
    ({"edit": {"layers": "3"}}, 'edit.layers is "3"'),
    ({"edit": {"layers": [6]}}, "the layers are 0 to 5"),
    ({"edit": {"covariance_weight": "1.5e4"}}, "is the text '1.5e4', not a number: write 15000.0"),
    ({"edit": {"covariance_weight": float("nan")}}, "covariance_weight is NaN"),
    ({"edit": {"covariance_weight": float("inf")}}, "covariance_weight is Infinity"),
    ({"edit": {"key_average": "mean"}}, 'edit.key_average is "mean"'),
    ({"evaluation": {"dtype": "int8"}}, 'evaluation.dtype is "int8"'),
    ({"runner": {"kind": "spark"}}, 'runner.kind is "spark"'),
    ({"runner": {"workers": 0}}, "runner.workers is 0"),
    ({"runner": {"address": "tcp://host:8786"}}, "but runner.kind is 'threads'"),
    ({"report": {"experiment": ""}}, 'report.experiment is ""'),
    (
        {"model": {"source": "local", "path": "m"}},
        "requests.source is 'synthetic', but model.source is 'local'",
    ),
    (
        {
            "model": {"source": "local", "path": "m"},
            "requests": {"source": "facts", "path": "f"},
        },
        "statistics.source is 'synthetic'",
    ),
]


@pytest.mark.parametrize(("tree", "sentence"), BAD)
def test_what_is_wrong_is_named_in_one_sentence(tree: object, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        check_parameters(tree)
    message = str(caught.value)
    assert sentence in message
    assert message.startswith("params.yaml")
    assert "\n" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {", "is not YAML: line 1"),
        ("edit:\n\tlayers: null", "is not YAML: line 2"),
        ("edit:\n  layers: null\n  layers: [1]\n", "line 3, found duplicate key"),
        ("model:\n  seed: 1\nmodel:\n  seed: 2\n", "duplicate key"),
        ("model: 2020-13-45", "is not YAML"),
        ("model: !!python/object/apply:os.method ['true']", "is not YAML"),
        ("[" * 1000 + "]" * 1000, "nested too deeply"),
        ("", "must hold sections"),
        ("# " + "x" * (1 << 20), "more than the 1048576 that are read"),
        ("a: &a [x]\nb: *a\n", "repeats another place"),
        ("? [a]\n: 1\n", "holds a value of no use"),
        ("2020-01-01: 1\n", "holds a value of no use"),
        ("model:\n  seed: 0x" + "f" * 9000, "holds a value of no use"),
        ('model:\n  id: "\\ud800"', "holds a value of no use"),
        ("model:\n  seed: " + "9" * 5000, "is not YAML"),
    ],
)
def test_a_file_that_is_no_parameters(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"params\.yaml") as caught:
        read_parameters(path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not here"):
        read_parameters(tmp_path / "params.yaml")
    with pytest.raises(InputError, match="is a directory"):
        read_parameters(tmp_path)
    (tmp_path / "params.yaml").write_bytes(b"model: \xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_parameters(tmp_path / "params.yaml")


def test_the_file_of_the_project_states_every_default() -> None:
    path = ROOT / "params.yaml"
    assert read_parameters(path) == Parameters()
    assert yaml.safe_load(path.read_text()) == Parameters().model_dump(mode="json")


def test_null_takes_the_preset_and_a_value_overrides_it() -> None:
    assert Parameters().hyperparameters("synthetic", 6) == preset("synthetic", 6)
    changed = check_parameters(
        {"targets": {"evaluations": 3}, "edit": {"layers": [1, 2], "covariance_weight": 7}}
    ).hyperparameters("synthetic", 6)
    assert (changed.evaluations, changed.layers, changed.covariance_weight) == (3, (1, 2), 7.0)
    assert changed.clamp_factor == preset("synthetic", 6).clamp_factor


def test_a_layer_that_the_model_does_not_have() -> None:
    files = {"requests": {"source": "facts", "path": "f"}}
    texts = {"statistics": {"source": "file", "path": "t"}}
    parameters = check_parameters(
        {"model": {"source": "local", "path": "m"}, "edit": {"layers": [12]}, **files, **texts}
    )
    with pytest.raises(InputError, match="names layer 12, but m has 12 blocks"):
        parameters.hyperparameters("m", 12)


def test_parameters_are_checked_before_anything_slow_is_imported(tmp_path: Path) -> None:
    """The real commands, on a file with a slip: one sentence, status 2, and no slow import."""
    (tmp_path / "params.yaml").write_text("edit:\n  layrs: [1]\n")
    commands = ("flows model", "flows.command.cli run", "flows.command.cli deploy")
    for command in commands:
        result = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", *command.split()],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2
        lines = [line for line in result.stderr.splitlines() if "import time:" not in line]
        assert " ".join(lines).startswith("error: params.yaml: there is no key edit.layrs")
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
        assert not imported & {"torch", "prefect", "transformers", "mlflow"}
        assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_defaults_are_those_of_the_method() -> None:
    """The tree repeats the world's and the training's defaults, so that they can be set."""
    from memit.world.people import WorldParameters
    from memit.world.small_model import TrainingParameters

    model = Parameters().model
    assert {"seed": model.seed, **model.world.model_dump()} == asdict(WorldParameters())
    assert {"seed": model.seed, **model.training.model_dump()} == asdict(TrainingParameters())
