"""The step ``model``: which model is edited, fetched, found, or trained here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memit.errors import InputError, IntegrityError, ResourceError, UnreachableError
from tasks.engine.artifacts import Artifact, Value, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.checkpoints import work_directory
from tasks.engine.cost import Cost, Meter
from tasks.engine.loaded_model import (
    WEIGHT_FILES,
    ModelFiles,
    ModelReference,
    directory_digests,
    loaded,
    weight_files,
)
from tasks.engine.progress import progress_bar
from tasks.engine.results import MODEL_FILE, WEIGHTS
from tasks.engine.retry import patient

if TYPE_CHECKING:
    from memit.language_model import LanguageModel

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
DESCRIPTION_PATTERNS = ("*.json", "*.txt", "*.model")
FLOATS = {"F64", "F32", "F16", "BF16"}
"""Numbers in safetensors files that weights can be read from."""
MOST_BLOCKS = 1_000
"""Making the blocks of a model takes time even without weights."""


class SmallModel(Value):
    """A model trained here, and the world that it knows."""

    weights: dict[str, Artifact]
    """The files of its directory."""
    world: dict[str, Artifact]
    """``records.json``, ``corpus.txt`` and ``held_out.txt``."""
    cost: Cost


class Recall(Value):
    """How many of its facts a model knows."""

    percent: float
    cost: Cost


@cached_task("model")
def train_small_model(
    world: Mapping[str, Any], training: Mapping[str, Any], threads: int
) -> SmallModel:
    """Invent a world and train a small model on it, going on from the last checkpoint.

    ``world`` and ``training`` hold the fields of `WorldParameters` and `TrainingParameters`.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from memit.requests import write_records
    from memit.world.people import WorldParameters, make_world
    from memit.world.small_model import TrainingParameters, train

    disable_progress_bar()
    torch.set_num_threads(threads)
    made = make_world(WorldParameters(**world))
    parameters = TrainingParameters(**training)
    with Meter() as meter, progress_bar("model", parameters.steps, "training steps") as bar:
        directory = train(
            made,
            parameters,
            checkpoint_dir=work_directory("model", world, training, threads),
            progress=lambda steps: bar.advance(0, steps),
        )
    return SmallModel(
        weights={path.name: _keep(path) for path in sorted(directory.iterdir())},
        world={
            "records.json": store_piece("model", ".json", lambda p: write_records(made.records, p)),
            "corpus.txt": _keep_lines(made.documents),
            "held_out.txt": _keep_lines(made.held_out),
        },
        cost=meter.cost,
    )


@cached_task("recall")
def measure_recall(model: ModelReference, records: Artifact, token_budget: int) -> Recall:
    """Ask a model trained here for every one of its facts (argmax of the true object's tokens)."""
    from memit.evaluation.counterfact import prompts_of, score_prompts
    from memit.requests import read_counterfact

    prompts = [p for p in prompts_of(read_counterfact(records.checked())) if p.kind == "rewrite"]
    with (
        loaded(model) as lm,
        Meter() as meter,
        progress_bar("recall", len(prompts), "facts") as bar,
    ):
        table = score_prompts(
            lm, prompts, token_budget=token_budget, progress=lambda n: bar.advance(0, n)
        )
    hits = table["hit_true"].to_pylist()
    return Recall(percent=round(100 * sum(hits) / len(hits), 4), cost=meter.cost)


def _keep(path: Path) -> Artifact:
    return store_piece("model", path.suffix, lambda partial: shutil.copyfile(path, partial))


def _keep_lines(lines: tuple[str, ...]) -> Artifact:
    text = "".join(line + "\n" for line in lines)
    return store_piece("model", ".txt", lambda path: path.write_text(text, encoding="utf-8"))


@patient
def resolve_commit(name: str, revision: str, kind: Literal["model", "dataset"] = "model") -> str:
    """The commit that a branch, tag or commit of a hub repository stands for.

    Raises:
        InputError: there is no such repository or revision.
        UnreachableError: the hub does not answer.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    with _asking_hub(name, revision):
        commit = ask(name, revision=revision, timeout=30).sha
    if commit is None:
        raise UnreachableError(f"the hub names no commit for {name} at {revision}: give a commit.")
    return commit


def fetch_description(name: str, commit: str) -> Path:
    """Configuration and tokenizer of a hub model, without its weights."""
    return _snapshot(name, commit)


def fetch_model(name: str, commit: str) -> Path:
    """The snapshot of a hub model with its safetensors weights, fetched unless it is here.

    Raises:
        InputError: the revision has no safetensors weights.
        ResourceError: the weights do not fit on the disk.
        UnreachableError: the hub does not answer.
    """
    directory = fetch_description(name, commit)
    if not _has_weights(directory):
        _check_room(name, commit)
        directory = _snapshot(name, commit, *WEIGHT_PATTERNS)
    if not _has_weights(directory):
        raise InputError(
            f"{name} at {commit} has no safetensors weights, and no others are loaded: name a "
            "revision that has them (often refs/pr/N), or convert them and use model.source: local."
        )
    return directory


def _has_weights(directory: Path) -> bool:
    names = weight_files(directory)
    return bool(names) and all((directory / name).is_file() for name in names)


def model_without_weights(name: str, revision: str | None, directory: Path) -> LanguageModel:
    """A model directory's structure and tokenizer, with no numbers in the weights.

    Raises:
        InputError: the directory does not hold a model.
        ModelStructureError: the method does not fit the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from memit.language_model import LanguageModel, read_description, reading

    config, tokenizer = read_description(directory)
    with reading("config.json", directory), torch.device("meta"):
        if config.get_text_config().num_hidden_layers > MOST_BLOCKS:
            raise ValueError(f"it asks for more than {MOST_BLOCKS} blocks")
        load: Any = AutoModelForCausalLM.from_config
        model = load(config, dtype=torch.float32, trust_remote_code=False)
    return LanguageModel(model, tokenizer, name=name, revision=revision)


def describe_model(source: str, name: str, revision: str | None, directory: Path) -> ModelFiles:
    """Read a model directory's structure and digests; the weights are hashed, not loaded.

    Raises:
        InputError: the directory does not hold a model.
        ModelStructureError: the method does not fit the model.
    """
    lm = model_without_weights(name, revision, directory)
    return ModelFiles(
        source=source,
        id=name,
        revision=revision,
        files=directory_digests(directory),
        architecture=type(lm.model).__name__,
        layers=lm.depth,
        width=lm.width,
        inner_width=lm.inner_width,
        parameters=sum(parameter.numel() for parameter in lm.model.parameters()),
    )


def check_weights(directory: Path) -> None:
    """Look at a model's safetensors files without loading them.

    Raises:
        InputError: there are none, or they hold whole numbers.
        IntegrityError: one is damaged or missing.
    """
    from safetensors import SafetensorError, safe_open

    files = [directory / name for name in weight_files(directory)]
    if not files:
        raise InputError(
            f"{directory} has no safetensors weights ({' or '.join(WEIGHT_FILES)}), and no others "
            "are loaded: a pickle (pytorch_model.bin) can run code, so convert it with a tool that "
            "you trust."
        )
    for path in files:
        if not path.is_file():
            raise IntegrityError(
                f"{directory} names {path.name}, which is not there: fetch it again."
            )
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                kinds = {name: file.get_slice(name).get_dtype() for name in names}
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{path} is damaged ({error}): fetch it again.") from None
        for name, kind in kinds.items():
            if re.search("weight|blocks", name.rpartition(".")[2]) and kind not in FLOATS:
                raise InputError(
                    f"{path} holds {name} as {kind}: give a model with weights in one of "
                    f"{', '.join(sorted(FLOATS))}."
                )


@patient
def _snapshot(name: str, commit: str, *more: str) -> Path:
    """The description of a hub model, from here if it is here; with ``more``, from the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*more, *DESCRIPTION_PATTERNS]
    fetch = partial(snapshot_download, name, revision=commit, allow_patterns=patterns)
    with _asking_hub(name, commit):
        if not more:
            with suppress(LocalEntryNotFoundError):
                found = Path(fetch(local_files_only=True))
                if (found / "config.json").exists():
                    return found
        return Path(fetch())


@contextmanager
def _asking_hub(name: str, revision: str) -> Iterator[None]:
    """What the hub refuses is the user's to correct; anything else may be better later."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise InputError(
            f"the hub has no {name} at revision {revision}: check both in params.yaml (a private "
            "repository needs a login: hf auth login)."
        ) from None
    except HFValidationError:
        raise InputError(f"{name!r} is no name on the hub: write owner/name.") from None
    except Exception as error:  # the clients beneath raise errors of many libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        status = getattr(getattr(error, "response", None), "status_code", 503)
        if isinstance(error, HfHubHTTPError) and status < 500 and status not in (408, 425, 429):
            raise InputError(f"the hub refuses {name} ({reason}): check it.") from None
        raise UnreachableError(
            f"the hub cannot be reached for {name} ({reason}): check the network, or "
            "download it elsewhere and name a local path."
        ) from error


def _check_room(name: str, commit: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    with _asking_hub(name, commit):
        info = HfApi().model_info(name, revision=commit, files_metadata=True)
    needed = sum(f.size or 0 for f in info.siblings or () if f.rfilename.endswith(".safetensors"))
    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(
            f"the weights of {name} take {needed / 1e9:.1f} GB, and {place} has "
            f"{free / 1e9:.1f} GB free: make room or set HF_HOME to another disk."
        )


def open_model(dtype: str, device: str, threads: int, path: str | None) -> ModelReference:
    """The model that the step ``model`` described, wherever its weights lie on this machine.

    ``path`` is the directory of a local model.
    """
    try:
        model = ModelFiles.model_validate_json(MODEL_FILE.read_text(encoding="utf-8"))
    except ValueError:
        raise IntegrityError(f"{MODEL_FILE} is damaged: run the step model again.") from None
    directory = WEIGHTS
    if model.source == "hub":
        directory = fetch_model(model.id, str(model.revision))
    elif model.source == "local":
        directory = Path(path or "")
    return ModelReference(
        directory=str(directory.resolve()),
        model=model,
        dtype=dtype,
        device=device,
        threads=threads,
    )
