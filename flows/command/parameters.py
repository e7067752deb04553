"""``params.yaml`` as one frozen tree, checked before anything slow is imported.

A section for each step, named like it. What is null is taken from the preset of the model
(`memit.hyperparameters`) or means "all of it". Sections name a few keys of others: ``edit.layers``
decides which statistics are collected and at which layer the targets are read.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

from memit.errors import InputError
from memit.files.reading import read_text
from memit.hyperparameters import Hyperparameters, preset
from memit.redaction import holds_secret

Precision = Literal["float32", "bfloat16", "float16"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
TokenBudget = Annotated[int, Field(ge=16, le=2**26)] | Literal["auto"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
NO_FILE = "data/none"
"""What a key that may name a file of the user's says where it names none: DVC follows these files,
and every key must lead it to one."""
UsersFile = Annotated[
    Text | None,
    BeforeValidator(lambda value: None if value == NO_FILE else value),
    PlainSerializer(lambda value: value or NO_FILE, return_type=str, when_used="json"),
]
USERS_FILES = (
    "model.path",
    "requests.path",
    "statistics.path",
    "evaluation.snippets",
    "compare.editors",
    "compare.zsre",
)
Written = Annotated[
    int | None, Field(ge=0, le=10_000_000, description="whose texts are generated; null: all")
]
Settings = TypeVar("Settings")
SCRATCH = "scratch"
"""In place of a model of the hub: a small one that is made here."""
SIZE_LIMIT = 1 << 20
"""Bytes of the largest ``params.yaml`` that is read."""
LONGEST_VALUE = 200
"""Characters of a value that are repeated in a sentence."""
STORES = ("http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks")
"""Schemes of addresses where MLflow can keep runs."""


class Section(BaseModel):
    """Settings that nobody changes after they were read, and in which no unknown key passes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def overridden(preset: Settings, section: Section) -> Settings:
    """A dataclass of settings with what a section sets; null keeps the preset's value."""
    known = {field.name for field in fields(preset)}  # pyright: ignore[reportArgumentType]
    chosen: dict[str, Any] = {
        name: None if value == SCRATCH else value
        for name, value in section.model_dump().items()
        if value is not None and name in known
    }
    return replace(preset, **chosen)  # pyright: ignore[reportArgumentType]


def _needs(
    asked: bool, key: str, value: object, section: Section, where: str, names: tuple[str, ...]
) -> None:
    for name in names if asked else ():
        if getattr(section, name) is None:
            raise ValueError(f"{key} is {value!r}, which needs {where}.{name}: set it.")


class WorldSection(Section):
    """The invented people, see `memit.world.people.WorldParameters`."""

    people: int = Field(
        default=450, ge=2, le=100_000, description="people with a name and their facts"
    )
    relations: int = Field(default=6, ge=1, le=100, description="facts of each person")
    records_per_person: int = Field(
        default=1, ge=1, le=100, description="facts of a person that can be edited"
    )
    objects: int = Field(default=24, ge=2, le=1_000, description="objects of a relation")
    biographies: int = Field(
        default=40, ge=1, le=100_000, description="training texts about one person"
    )
    held_out_biographies: int = Field(
        default=1,
        ge=1,
        le=1_000,
        description="texts about one person that only measure the perplexity",
    )


class TrainingSection(Section):
    """The small model that learns them, see `memit.world.small_model.TrainingParameters`."""

    layers: int = Field(default=6, ge=1, le=128, description="blocks")
    width: int = Field(default=128, ge=8, le=16_384, description="hidden size, a multiple of heads")
    heads: int = Field(default=4, ge=1, le=128)
    vocabulary: int = Field(
        default=1_024, ge=257, le=200_000, description="tokens of the byte-level BPE"
    )
    context_length: int = Field(
        default=128, ge=16, le=65_536, description="positions that the model has"
    )
    sequence_length: int = Field(
        default=64, ge=16, le=65_536, description="tokens of a training row"
    )
    batch_size: int = Field(default=16, ge=1, le=100_000, description="rows of a step")
    steps: int = Field(default=1_700, ge=1, le=10_000_000)
    learning_rate: float = Field(default=4e-3, gt=0, le=1)
    warmup_steps: int = Field(default=100, ge=0, le=1_000_000)
    weight_decay: float = Field(default=0.1, ge=0, le=10)
    checkpoint_every: int = Field(
        default=200, ge=1, le=1_000_000, description="steps lost at most by a kill"
    )

    @model_validator(mode="after")
    def _shape_is_possible(self) -> TrainingSection:
        if self.width % self.heads:
            raise ValueError(
                f"model.training.width is {self.width}, which is no multiple of its "
                f"{self.heads} heads: change either."
            )
        if self.sequence_length > self.context_length:
            raise ValueError(
                f"model.training.sequence_length is {self.sequence_length}, more than the "
                f"context_length of {self.context_length}: change either."
            )
        return self


class ModelSection(Section):
    """Which model is edited, and where it runs."""

    source: Literal["synthetic", "hub", "local"] = "synthetic"
    id: Text | None = Field(default=None, description="hub: owner/name")
    revision: Text | None = Field(
        default=None, description="hub: a commit; of a branch or tag the commit is recorded"
    )
    path: UsersFile = Field(default=None, description="local: a model directory")
    dtype: Precision | Literal["tf32"] = "float32"
    device: str = Field(default="cpu", pattern=r"^(auto|cpu|mps|sharded|cuda(:\d+)?)$")
    threads: int = Field(
        default=2, ge=1, le=1_024, description="CPU threads; other counts, other last bits"
    )
    seed: Seed = 0
    world: WorldSection = WorldSection()
    training: TrainingSection = TrainingSection()

    def placement(self) -> dict[str, Any]:
        """How the model computes, and where it lies if it is a local one."""
        return self.model_dump(include={"dtype", "device", "threads", "path"})

    @model_validator(mode="after")
    def _source_is_named(self) -> ModelSection:
        _needs(self.source == "hub", "model.source", self.source, self, "model", ("id", "revision"))
        _needs(self.source == "local", "model.source", self.source, self, "model", ("path",))
        return self


class RequestsSection(Section):
    """Which facts are written."""

    source: Literal["synthetic", "counterfact", "facts"] = "synthetic"
    path: UsersFile = Field(default=None, description="a file of records or facts")
    url: Text | None = Field(default=None, description="where to fetch it, with its sha256")
    sha256: Digest | None = None
    count: int | None = Field(default=64, ge=1, le=10_000_000, description="null: all of them")
    seed: Seed = 0

    @model_validator(mode="after")
    def _file_is_named(self) -> RequestsSection:
        if self.source == "synthetic":
            return self
        if (self.path is None) == (self.url is None):
            raise ValueError(
                f"requests.source is {self.source!r}, which needs either requests.path or "
                "requests.url: set one of them."
            )
        _needs(self.url is not None, "requests.url", self.url, self, "requests", ("sha256",))
        if self.url is not None and not re.match(r"https?://[^/\s]+\S*$", self.url, re.IGNORECASE):
            raise ValueError(
                f"requests.url is {self.url!r}: give an http or https address, or set "
                "requests.path to a file that is here."
            )
        return self


class PrefixesSection(Section):
    """The sampled contexts before each prompt (five and the plain one)."""

    seed: Seed = 0


class StatisticsSection(Section):
    """The text that the second moments of the keys are collected over, or those of others."""

    source: Literal["synthetic", "file", "dataset", "published"] = "synthetic"
    path: UsersFile = Field(
        default=None,
        description="file: text (a document a line), JSONL or Parquet; published: a directory "
        "with the .npz of each layer",
    )
    dataset: Text | None = Field(
        default=None, description="dataset: a Hugging Face data set, streamed"
    )
    configuration: Text | None = Field(default=None, description="dataset: its configuration")
    revision: Text | None = Field(default=None, description="dataset: a commit of its repository")
    column: Text = Field(default="text", description="the column or key that holds the text")
    documents: int | None = Field(default=2_000, ge=1, le=1_000_000_000, description="null: all")
    documents_per_shard: int = Field(default=500, ge=1, le=1_000_000_000)
    held_out_documents: int = Field(
        default=300, ge=1, le=1_000_000, description="after the others, for the perplexity only"
    )
    token_budget: TokenBudget = "auto"

    @model_validator(mode="after")
    def _text_is_named(self) -> StatisticsSection:
        name, where = "statistics.source", "statistics"
        has_path = self.source in ("file", "published")
        _needs(has_path, name, self.source, self, where, ("path",))
        names = ("dataset", "revision", "documents")
        _needs(self.source == "dataset", name, self.source, self, where, names)
        return self


class TargetsSection(Section):
    """Where an edited fact must end up (Eqn. 16). Null takes the preset's value."""

    evaluations: int | None = Field(
        default=None, ge=1, le=10_000, description="of the loss, for one edit"
    )
    learning_rate: float | None = Field(default=None, gt=0, le=1_000)
    clamp_factor: float | None = Field(
        default=None, gt=0, le=1_000, description="largest ‖δ‖ / ‖h‖"
    )
    weight_decay: float | None = Field(default=None, ge=0, le=1_000)
    kl_factor: float | None = Field(default=None, ge=0, le=1_000)
    loss_threshold: float | None = Field(default=None, ge=0, le=1_000)
    requests_per_piece: int = Field(default=16, ge=1, le=1_000_000)
    token_budget: TokenBudget = "auto"


class EditSection(Section):
    """Where it is written (Algorithm 1). Null takes the preset's value."""

    layers: tuple[Annotated[int, Field(ge=0, le=10_000)], ...] | None = Field(
        default=None, min_length=1
    )
    covariance_weight: float | None = Field(default=None, gt=0, le=1e12, description="λ")
    key_average: Literal["nested", "uniform"] | None = None
    largest_update: float | None = Field(
        default=None, gt=0, le=1e12, description="of a layer, in multiples of ‖W‖"
    )
    on_failure: Literal["stop", "drop"] = Field(
        default="stop", description="where an edit is not finite or makes an update too large"
    )
    token_budget: TokenBudget = "auto"

    @model_validator(mode="after")
    def _layers_are_a_set(self) -> EditSection:
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f"edit.layers is {list(self.layers)}: name each layer once, in ascending order."
            )
        return self


class EvaluationSection(Section):
    """How the model is measured before and after."""

    dtype: Precision | None = Field(
        default=None, description="null: that of the model; else as served"
    )
    prompts_per_piece: int = Field(default=512, ge=1, le=10_000_000)
    generation_records: Written = 32
    snippets: UsersFile = Field(
        default=None, description="CounterFact's attribute snippets; none: texts of the corpus"
    )
    seed: Seed = Field(default=0, description="of the generated texts")
    token_budget: TokenBudget = "auto"


class RunnerSection(Section):
    """Where the pieces of steps are computed. No result depends on it, and no stage."""

    kind: Literal["threads", "dask", "ray"] = "threads"
    address: Text | None = Field(
        default=None, description="of a running cluster; null: one is started on this machine"
    )
    workers: int = Field(
        default=2, ge=1, le=10_000, description="processes of a cluster that is started here"
    )
    store: Text | None = Field(
        default=None, description="a path or fsspec URL for pieces; null: .cache, seen by all"
    )

    @model_validator(mode="after")
    def _address_has_a_kind(self) -> RunnerSection:
        if self.address is not None and self.kind == "threads":
            raise ValueError(
                "runner.address names a cluster, but runner.kind is 'threads': make it dask or ray."
            )
        return self


class ReportSection(Section):
    """Where the experiment is told of."""

    experiment: Text = Field(default="memit", description="the experiment's name in MLflow")
    tracking_uri: Text | None = Field(default=None, description="null: mlflow.db in the project")

    @model_validator(mode="after")
    def _store_is_of_a_known_kind(self) -> ReportSection:
        scheme = re.match(r"([A-Za-z][\w.-]+)(\+\w+)?:", self.tracking_uri or "")
        if scheme and scheme[1] not in STORES:
            raise ValueError(
                f"report.tracking_uri is {self.tracking_uri!r}, which is no store of MLflow's: "
                f"write a path or an address that begins with one of {', '.join(STORES)}."
            )
        return self


class MendSection(Section):
    """How MEND's network is trained, see `memit.editors.mend.MendSettings`. Null: the preset."""

    learn_from: Literal["records", "texts"] = Field(
        default="records", description="those set aside, or texts that go on as the model samples"
    )
    texts: int = Field(default=1_000, ge=1, le=10_000_000, description="how many texts")
    continuation_tokens: int = Field(default=10, ge=1, le=1_000, description="sampled for each")
    blocks: int | None = Field(default=None, ge=1, le=1_000, description="the last so many")
    rank: int | None = Field(default=None, ge=1, le=1_000_000, description="of the network")
    edits_at_once: int | None = Field(default=None, ge=1, le=10_000)
    steps: int | None = Field(default=None, ge=1, le=100_000_000)
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    rate_learning_rate: float | None = Field(default=None, gt=0, le=10)
    edit_learning_rate: float | None = Field(default=None, gt=0, le=1_000)
    seed: Seed = 0


class SeracSection(Section):
    """SERAC's two models, see `memit.editors.serac.SeracSettings`. Null: the preset."""

    encoder: Text | None = Field(
        default=None, description="of the hub, a directory, or scratch: made here"
    )
    encoder_revision: Text | None = None
    counterfactual: Text | None = Field(default=None, description="the same; answers in scope")
    counterfactual_revision: Text | None = None
    width: int | None = Field(default=None, ge=8, le=16_384, description="of models made here")
    layers: int | None = Field(default=None, ge=1, le=128)
    classifier_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    counterfactual_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    batch_size: int | None = Field(default=None, ge=1, le=100_000)
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    seed: Seed = 0


Setting = bool | int | float | str | None
MethodName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class CompareSection(Section):
    """Which methods are compared, and on what."""

    methods: tuple[MethodName, ...] = Field(
        default=("unedited", "ft_w", "mend", "rome", "memit", "serac"), min_length=1, max_length=100
    )
    editors: UsersFile = Field(
        default=None, description="a Python file, or a folder of them, that registers more"
    )
    settings: dict[MethodName, dict[Text, Setting]] = Field(
        default={}, description="of methods, where they differ from the presets"
    )
    count: int | None = Field(default=None, ge=1, le=10_000_000, description="null: all of them")
    seed: Seed = 0
    training_records: int = Field(
        default=100, ge=0, le=10_000_000, description="set aside for editors that learn"
    )
    generation_records: Written = 32
    zsre: UsersFile = Field(
        default=None, description="zsRE's questions, to be edited instead of the section requests"
    )

    @model_validator(mode="after")
    def _methods_are_a_set(self) -> CompareSection:
        twice = [name for name in self.methods if self.methods.count(name) > 1]
        if twice:
            raise ValueError(f"compare.methods names {twice[0]} twice: remove one.")
        return self


class ScalingSection(Section):
    """With how many edits the methods of ``compare`` are tried."""

    counts: tuple[Annotated[int, Field(ge=1, le=10_000_000)] | None, ...] = Field(
        default=(1, 10, 32, 100, 316, None), min_length=1, description="null: all records"
    )
    seed: Seed = Field(default=0, description="of the first sample; the next ones count up")
    samples: int = Field(default=1, ge=1, le=1_000, description="of each size; for error bars")
    least_records: int = Field(
        default=10, ge=1, le=100_000, description="few edits are repeated until so many are made"
    )
    generation_records: Written = 16


class Parameters(Section):
    """Everything that ``params.yaml`` says."""

    model: ModelSection = ModelSection()
    requests: RequestsSection = RequestsSection()
    prefixes: PrefixesSection = PrefixesSection()
    statistics: StatisticsSection = StatisticsSection()
    targets: TargetsSection = TargetsSection()
    edit: EditSection = EditSection()
    evaluation: EvaluationSection = EvaluationSection()
    report: ReportSection = ReportSection()
    runner: RunnerSection = RunnerSection()
    mend: MendSection = MendSection()
    serac: SeracSection = SeracSection()
    compare: CompareSection = CompareSection()
    scaling: ScalingSection = ScalingSection()

    def hyperparameters(self, model: str, depth: int) -> Hyperparameters:
        """The preset of a model with ``depth`` blocks, with what ``targets`` and ``edit`` override.

        Raises:
            InputError: a layer is named that the model does not have.
        """
        hyperparameters = overridden(overridden(preset(model, depth), self.targets), self.edit)
        for layer in hyperparameters.layers:
            if layer >= depth:
                raise InputError(
                    f"params.yaml: edit.layers names layer {layer}, but {model} has {depth} "
                    f"blocks: the layers are 0 to {depth - 1}."
                )
        return hyperparameters

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Parameters:
        if self.statistics.source == "published":
            self._does_without_a_corpus()
        if self.model.source == "synthetic":
            self._fits_the_synthetic_model()
            return self
        for section in ("requests", "statistics"):
            if getattr(self, section).source == "synthetic":
                raise ValueError(
                    f"{section}.source is 'synthetic', but model.source is {self.model.source!r}: "
                    "the invented people belong to the model that is trained on them, so name a "
                    f"file or data set in {section}."
                )
        return self

    def _does_without_a_corpus(self) -> None:
        if self.model.source == "synthetic":
            raise ValueError(
                "statistics.source is 'published', but model.source is 'synthetic': nobody has "
                "published statistics of a model that is made here, so collect them."
            )
        if self.mend.learn_from == "texts":
            raise ValueError(
                "mend.learn_from is 'texts', but statistics.source is 'published', which has no "
                "texts: let it learn from records."
            )

    def _fits_the_synthetic_model(self) -> None:
        depth = self.model.training.layers
        for layer in self.edit.layers or ():
            if layer >= depth:
                raise ValueError(
                    f"edit.layers names layer {layer}, but model.training.layers is {depth}: "
                    f"the layers are 0 to {depth - 1}."
                )
        world, count = self.model.world, self.requests.count
        if world.records_per_person > world.relations:
            raise ValueError(
                f"model.world.records_per_person is {world.records_per_person}, but a person has "
                f"{world.relations} facts (model.world.relations): ask for fewer."
            )
        records = world.people * world.records_per_person
        if self.requests.source == "synthetic" and count is not None and count > records:
            raise ValueError(
                f"requests.count is {count}, but model.world has {records} records "
                f"({world.people} people, {world.records_per_person} of each): ask for fewer."
            )


def read_parameters(path: Path = Path("params.yaml")) -> Parameters:
    """Read and check ``params.yaml``.

    Raises:
        InputError: one sentence that names the key, its value and the way out.
    """
    tree = _read_yaml(path)
    if path.with_name("dvc.yaml").exists():
        _check_files_named(tree, path.name)
    return check_parameters(tree, path.name)


def _check_files_named(tree: object, name: str) -> None:
    """See that DVC finds a file in every place where it looks for one of the user's."""
    for key in USERS_FILES:
        section, _, setting = key.partition(".")
        settings = tree.get(section) if isinstance(tree, dict) else None
        if isinstance(settings, dict) and settings.get(setting) is None:
            raise InputError(
                f"{name}: {key} must name a file, since DVC follows it: write {NO_FILE} where "
                "there is none."
            )


def check_parameters(tree: object, name: str = "params.yaml") -> Parameters:
    """Check a tree of plain values as if it had been read from the file ``name``."""
    if not isinstance(tree, dict):
        raise InputError(f"{name} must hold sections ({', '.join(Parameters.model_fields)}).")
    for key, text in _texts(tree):
        if holds_secret(text):
            raise InputError(
                f"{name}: {key} holds a password or a token, which would be kept in git, dvc.lock "
                "and MLflow: leave it out and put it into the environment (HF_TOKEN, "
                "MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)."
            )
    try:
        return Parameters.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise InputError(f"{name}: {_sentence(error)}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{name} holds a value of no use ({error}): correct it.") from None


def _texts(tree: object, place: str = "") -> Iterator[tuple[str, str]]:
    """All texts of a tree, each with the keys that lead to it."""
    if isinstance(tree, str):
        yield place, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, f"{place}.{key}".lstrip("."))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _texts(value, f"{place}[{number}]")


def complete_parameters(given: object) -> Parameters:
    """What a deployment hands to a flow: plain values, over those of ``params.yaml`` here.

    Raises:
        InputError: one sentence that names the key, its value and the way out.
    """
    if isinstance(given, Parameters):
        return given
    here = read_parameters()
    if given is None:
        return here
    tree = _laid_over(here, given) if isinstance(given, dict) else given
    return check_parameters(tree, "parameters")


def deployable(run: Callable[[Parameters], None]) -> Callable[[Parameters], None]:
    """A flow's function that also takes what a deployment hands over."""

    @wraps(run)
    def completed(parameters: Parameters) -> None:
        run(complete_parameters(parameters))

    return completed


def _laid_over(section: Section, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a section and of those inside it, with others in their place."""
    tree = section.model_dump(mode="json")
    for name, value in values.items():
        inner = getattr(section, name, None)
        if isinstance(inner, Section) and isinstance(value, dict):
            tree[name] = _laid_over(inner, value)
        else:
            tree[name] = value
    return tree


def _read_yaml(path: Path) -> object:
    if not os.path.lexists(path):
        raise InputError(
            f"{path} is not here: run this in the project's directory (where dvc.yaml lies)."
        )
    text = read_text(path, "the parameters", SIZE_LIMIT)
    try:
        # As DVC reads it: 1.5e4 is a number, and a key that stands twice is refused.
        reader = YAML(typ="safe", pure=True)
        if any(isinstance(event, AliasEvent) for event in reader.parse(text)):
            raise InputError(f"{path} repeats another place (*name): write it out.")
        return reader.load(text)
    except RecursionError:
        raise InputError(f"{path} is nested too deeply: it needs two levels or three.") from None
    except (YAMLError, ValueError) as error:
        raise InputError(f"{path} is not YAML: {_first_line(error)}.") from None


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, {problem}" if mark else problem


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, in words. Unknown keys first: they explain the others."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    parts = _key_parts(problem["loc"], keep_last=problem["type"] == "extra_forbidden")
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).lstrip(".")
    value = problem["input"]
    kind = problem["type"]
    if kind == "json_invalid":
        return f"it holds a value of no use ({problem.get('ctx', {})['error']}): correct it."
    if kind == "extra_forbidden":
        return _unknown_key(key, [str(part) for part in parts])
    if kind == "value_error":
        return str(problem.get("ctx", {})["error"])
    if isinstance(value, str) and kind in {"int_type", "float_type"} and _is_number(value):
        number = float(value)
        plain = int(number) if kind == "int_type" and number.is_integer() else number
        return f"{key} is the text {value!r}, not a number: write {plain}."
    expected = [p["msg"] for p in problems if _key_parts(p["loc"]) == parts]
    demand = "; or ".join(dict.fromkeys(message[:1].lower() + message[1:] for message in expected))
    shown = json.dumps(value, default=str)
    if len(shown) > LONGEST_VALUE:
        shown = f"{shown[: LONGEST_VALUE - 3]}..."
    return f"{key} is {shown}: {demand}."


def _key_parts(location: tuple[int | str, ...], keep_last: bool = False) -> list[int | str]:
    """The keys on the way to a problem, without the union branches that pydantic puts between."""
    parts: list[int | str] = []
    section: Any = Parameters
    for part in location:
        field = getattr(section, "model_fields", {}).get(part)
        if field is not None or isinstance(part, int):
            parts.append(part)
            section = field.annotation if field is not None else None
    return [*parts, location[-1]] if keep_last else parts


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _unknown_key(key: str, parts: list[str]) -> str:
    section: Any = Parameters
    for part in parts[:-1]:
        section = section.model_fields[part].annotation
    names = list(section.model_fields)
    prefix = key.removesuffix(parts[-1])
    near = difflib.get_close_matches(parts[-1], names, n=1, cutoff=0.5)
    if near:
        return f"there is no key {key}; did you mean {prefix}{near[0]}?"
    for name in Parameters.model_fields:
        field = Parameters.model_fields[name].annotation
        if parts[-1] in getattr(field, "model_fields", {}):
            return f"there is no key {key}; did you mean {name}.{parts[-1]}?"
    return f"there is no key {key}: the keys there are {', '.join(names)}."


if __name__ == "__main__":
    from flows.command.script import given_parameters

    given_parameters()
