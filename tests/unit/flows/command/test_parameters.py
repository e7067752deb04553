"""``params.yaml``: what is right passes, what is wrong is named in one sentence, and soon."""

import re
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from flows.command.parameters import (
    NO_FILE,
    USERS_FILES,
    Parameters,
    check_parameters,
    read_parameters,
)
from memit.errors import InputError
from memit.hyperparameters import preset
from memit.model_shape import ModelShape
from tests import ROOT, imported, python

SYNTHETIC = {"model": {"source": "synthetic"}}
BAD: list[tuple[object, str]] = [
    ([], "sections"),
    (None, "sections"),
    ("model", "sections"),
    ({"modle": {}}, "modle; did you mean model?"),
    ({"edit": {"layrs": [1]}}, "edit.layrs; did you mean edit.layers?"),
    ({"requests": {"layers": [1]}}, "requests.layers; did you mean edit.layers?"),
    ({"edit": {"zzz": 1}}, "edit.zzz"),
    ({"model": {"world": {"peopel": 3}}}, "did you mean model.world.people?"),
    ({"requests": None}, "requests is null"),
    ({"requests": [1]}, "requests is [1]"),
    ({"model": {"source": "web"}}, 'model.source is "web"'),
    ({"model": {"source": "hub"}}, "model.id"),
    ({"model": {"source": "hub", "id": "a/b"}}, "model.revision"),
    ({"model": {"source": "local"}}, "model.path"),
    ({"model": {"dtype": "fp16"}}, 'model.dtype is "fp16"'),
    ({"model": {"device": "gpu"}}, 'model.device is "gpu"'),
    ({"model": {"threads": 0}}, "model.threads is 0"),
    ({"model": {"seed": -1}}, "model.seed is -1"),
    ({"model": {"seed": 2**32}}, "model.seed is 4294967296"),
    ({"model": {"seed": 10**400}}, "model.seed is 1000"),
    ({"model": {"path": ""}}, 'model.path is ""'),
    ({"model": {"revision": "hf_secretwordsecretwordsecret"}}, "model.revision"),
    ({"model": {"world": {"people": 1}}}, "model.world.people is 1"),
    ({"model": {"world": {"records_per_person": 7}}}, "model.world.records_per_person is 7"),
    ({"model": {"training": {"width": 130}}}, "model.training.width is 130"),
    ({"model": {"training": {"sequence_length": 256}}}, "model.training.sequence_length is 256"),
    ({"model": {"training": {"learning_rate": 0}}}, "model.training.learning_rate is 0"),
    ({"model": {"training": {"steps": True}}}, "model.training.steps is true"),
    ({"requests": {"count": 0}}, "requests.count is 0"),
    ({"requests": {"count": 6.5}}, "requests.count is 6.5"),
    ({"requests": {"count": "64"}}, 'requests.count is "64"'),
    ({**SYNTHETIC, "requests": {"source": "synthetic", "count": 451}}, "requests.count is 451"),
    ({"requests": {"source": "counterfact"}}, "requests.path"),
    ({"requests": {"source": "facts", "path": "a", "url": "http://x"}}, "requests.path"),
    ({"requests": {"source": "facts", "url": "http://x"}}, "requests.sha256"),
    ({"requests": {"sha256": "12"}}, 'requests.sha256 is "12"'),
    *(
        ({"requests": {"source": "facts", "url": url, "sha256": "0" * 64}}, "requests.url")
        for url in ("file:///a", "ftp://a/b", "data:text/plain,x", "http:///x", "http://a b/c")
    ),
    ({"requests": {"url": "http://me:secret-word@host/x"}}, "requests.url"),
    ({"requests": {"url": "http://host/x?token=secret-word"}}, "requests.url"),
    ({"statistics": {"source": "file"}}, "statistics.path"),
    ({"statistics": {"source": "published"}}, "statistics.path"),
    ({**SYNTHETIC, "statistics": {"source": "published", "path": "moments"}}, "statistics.source"),
    ({"statistics": {"source": "dataset"}}, "statistics.dataset"),
    ({"statistics": {"source": "dataset", "dataset": "a/b"}}, "statistics.revision"),
    ({"statistics": {"documents": 0}}, "statistics.documents is 0"),
    ({"statistics": {"tokens": 0}}, "statistics.tokens"),
    ({"statistics": {"source": "sampled"}, "mend": {"learn_from": "texts"}}, "statistics.source"),
    ({"statistics": {"column": ""}}, 'statistics.column is ""'),
    ({"targets": {"token_budget": "all"}}, "targets.token_budget is"),
    ({"targets": {"token_budget": 3}}, "targets.token_budget is 3"),
    ({"targets": {"evaluations": 0}}, "targets.evaluations is 0"),
    ({"targets": {"clamp_factor": -0.5}}, "targets.clamp_factor is -0.5"),
    ({"targets": {"learning_rate": float("nan")}}, "targets.learning_rate is NaN"),
    ({"edit": {"layers": []}}, "edit.layers"),
    ({"edit": {"layers": [2, 1]}}, "edit.layers"),
    ({"edit": {"layers": [1, 1]}}, "edit.layers"),
    ({"edit": {"layers": [-1]}}, "edit.layers"),
    ({"edit": {"layers": "3"}}, 'edit.layers is "3"'),
    ({"edit": {"layers": ["last"]}}, 'edit.layers[0] is "last"'),
    ({**SYNTHETIC, "edit": {"layers": [6]}}, "edit.layers"),
    ({"edit": {"covariance_weight": "1.5e4"}}, 'edit.covariance_weight is "1.5e4"'),
    ({"edit": {"covariance_weight": 0}}, "edit.covariance_weight is 0"),
    ({"edit": {"covariance_weight": float("inf")}}, "edit.covariance_weight is Infinity"),
    ({"edit": {"key_average": "mean"}}, 'edit.key_average is "mean"'),
    ({"edit": {"on_failure": "skip"}}, 'edit.on_failure is "skip"'),
    ({"evaluation": {"dtype": "int8"}}, 'evaluation.dtype is "int8"'),
    ({"runner": {"kind": "spark"}}, 'runner.kind is "spark"'),
    ({"runner": {"address": "tcp://host:8786"}}, "runner.address"),
    ({"report": {"experiment": ""}}, 'report.experiment is ""'),
    ({"report": {"tracking_uri": "htp://x"}}, "report.tracking_uri"),
    ({"report": {"tracking_uri": "postgresql://me:secret-word@db/x"}}, "report.tracking_uri"),
    ({"mend": {"rank": 0}}, "mend.rank is 0"),
    ({"serac": {"width": 1}}, "serac.width is 1"),
    ({"compare": {"methods": []}}, "compare.methods is []"),
    ({"compare": {"methods": ["memit", "memit"]}}, "compare.methods"),
    ({"compare": {"methods": ["../x"]}}, "compare.methods[0] is"),
    ({"scaling": {"counts": []}}, "scaling.counts is []"),
    ({"scaling": {"counts": [None, -5]}}, "scaling.counts[1] is -5"),
    ({"requests": {"source": "synthetic"}}, "requests.source"),
    ({"statistics": {"source": "synthetic"}}, "statistics.source"),
]


@pytest.mark.parametrize(("tree", "named"), BAD)
def test_what_is_wrong_is_named_in_one_sentence(tree: object, named: str) -> None:
    with pytest.raises(InputError) as caught:
        check_parameters(tree)
    message = str(caught.value)
    assert named in message
    assert message.startswith("params.yaml")
    assert message.isprintable()
    assert "secret" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    "text",
    [
        "model: {",
        "edit:\n\tlayers: null",
        "edit: {}\n---\nedit: {}\n",
        "edit:\n  layers: null\n  layers: [1]\n",
        "model: 2020-13-45",
        "model: !!python/object/apply:os.mkdir ['pwned']",
        "[" * 400 + "]" * 400,
        "{a: " * 200 + "}" * 200,
        "",
        "# " + "x" * (1 << 20),
        "a: &a [x]\nb: *a\n",
        "a: &a [*a]",
        "? [a]\n: 1\n",
        "2020-01-01: 1\n",
        "model:\n  seed: 0x" + "f" * 9000,
        'model:\n  id: "\\ud800"',
        "model:\n  seed: " + "9" * 5000,
        b"model: \xff",
        b"model: {}\0",
        "model: {}".encode("utf-16"),
    ],
)
def test_a_file_without_parameters(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"params\.yaml") as caught:
        read_parameters(path)
    assert str(caught.value).isprintable()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "params.yaml", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            read_parameters(path)


def test_beside_dvc_yaml_a_path_is_never_null(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("model: {path: null}\n")
    (tmp_path / "dvc.yaml").write_text("")
    with pytest.raises(InputError, match=r"model\.path .* data/none"):
        read_parameters(tmp_path / "params.yaml")


def test_the_file_of_the_project_states_every_default() -> None:
    path = ROOT / "params.yaml"
    assert read_parameters(path) == Parameters()
    tree = yaml.safe_load(path.read_text())
    assert tree == Parameters().model_dump(mode="json")
    # DVC needs a file wherever a user's own may stand.
    for section, name in (key.split(".") for key in USERS_FILES):
        assert tree[section][name] == NO_FILE
    assert (ROOT / NO_FILE).is_file()


@pytest.mark.parametrize("name", ["params.yaml", "params/world.yaml"])
def test_an_experiment_of_dvc_changes_one_line(tmp_path: Path, name: str) -> None:
    before = (ROOT / name).read_text()
    (tmp_path / "params.yaml").write_text(before)
    apply_overrides(str(tmp_path / "params.yaml"), ["requests.seed=7"])
    after = (tmp_path / "params.yaml").read_text()
    pairs = zip(before.splitlines(), after.splitlines(), strict=True)
    assert [new for old, new in pairs if old != new] == ["  seed: 7"]


@pytest.mark.parametrize("path", [*(ROOT / "params").glob("*.yaml")], ids=lambda path: path.name)
def test_files_to_choose_from_can_be_copied_over_it(path: Path, tmp_path: Path) -> None:
    text = re.sub(r"(url: https.*\n *sha256:) null", f"\\1 '{64 * '0'}'", path.read_text())
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "dvc.yaml").touch()
    assert read_parameters(tmp_path / "params.yaml").compare.editors is None
    tree = yaml.safe_load(text)
    for section, name in (key.split(".") for key in USERS_FILES):  # DVC fills them into dvc.yaml
        assert tree[section][name]


def test_null_takes_the_preset_and_a_value_overrides_it() -> None:
    shape = ModelShape(6, 128, 512, 0)
    assert Parameters().hyperparameters("synthetic", shape) == preset("synthetic", shape)
    changed = check_parameters(
        {"targets": {"evaluations": 3}, "edit": {"layers": [1, 2], "covariance_weight": 7}}
    ).hyperparameters("synthetic", shape)
    assert (changed.evaluations, changed.layers, changed.covariance_weight) == (3, (1, 2), 7.0)
    assert changed.clamp_factor == preset("synthetic", shape).clamp_factor


def test_own_facts_are_all_edited_unless_a_number_says_otherwise() -> None:
    own = {"source": "facts", "path": "f"}
    assert Parameters().requests.wanted == 64
    assert check_parameters({"requests": own}).requests.wanted is None
    assert check_parameters({"requests": {**own, "count": 5}}).requests.wanted == 5
    assert check_parameters({"requests": {"count": None}}).requests.wanted is None


def test_a_layer_that_the_model_does_not_have() -> None:
    files = {"requests": {"source": "facts", "path": "f"}}
    texts = {"statistics": {"source": "file", "path": "t"}}
    parameters = check_parameters(
        {"model": {"source": "local", "path": "m"}, "edit": {"layers": [12]}, **files, **texts}
    )
    with pytest.raises(InputError, match=r"edit\.layers"):
        parameters.hyperparameters("m", ModelShape(12, 8, 32, 0))


def test_parameters_are_checked_before_anything_slow_is_imported(tmp_path: Path) -> None:
    """A command on a file with a slip: one line, status 2, and no slow import."""
    (tmp_path / "params.yaml").write_text("edit:\n  layrs: [1]\n")
    result = python("-X", "importtime", "-m", "flows", "targets", cwd=tmp_path, env={"PATH": ""})
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if "import time:" not in line]
    assert " ".join(lines).startswith("error: params.yaml: there is no key edit.layrs")
    assert not imported(result) & {"torch", "prefect", "transformers", "mlflow"}
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
