"""The tasks of the step `model`: train a small model and its world, or describe another."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from memit.errors import InputError, IntegrityError
from memit.gguf_file import quantisation, read_header
from memit.language_model import LanguageModel, read_description, reading
from memit.model_files import WEIGHT_FILES, directory_digests, weight_files
from memit.requests import write_records
from memit.world.people import WorldParameters, make_world
from memit.world.small_model import TrainingParameters, train
from tasks.engine.artifacts import Artifact, Value, store_piece
from tasks.engine.cache import cached_task
from tasks.engine.checkpoints import work_directory
from tasks.engine.hub import fetch_description, fetch_model, locate_model, resolve_commit
from tasks.engine.loaded_model import ModelFiles
from tasks.engine.progress import progress_bar

FLOATS = {"F64", "F32", "F16", "BF16"}
"""Number types of safetensors files that weights can be read from."""
MOST_BLOCKS = 1_000
"""Making the blocks of a model takes time even without weights."""


class SmallModel(Value):
    """A model trained here, and the world that it knows."""

    weights: dict[str, Artifact]
    """The files of its directory."""
    world: dict[str, Artifact]
    """`records.json`, `corpus.txt` and `held_out.txt`."""


@cached_task("model")
def train_small_model(
    world: Mapping[str, Any], training: Mapping[str, Any], threads: int
) -> SmallModel:
    """Invent a world and train a small model on it, going on from the last checkpoint.

    `world` and `training` hold the fields of `WorldParameters` and `TrainingParameters`.
    """
    checkpoints = work_directory()
    assert checkpoints is not None, "the small model is trained inside of Prefect"
    disable_progress_bar()
    torch.set_num_threads(threads)
    made = make_world(WorldParameters(**world))
    parameters = TrainingParameters(**training)
    with progress_bar("model", parameters.steps, "training steps") as bar:
        directory = train(
            made,
            parameters,
            checkpoint_dir=checkpoints,
            progress=bar.advance,
        )
    return SmallModel(
        weights={path.name: _keep(path) for path in sorted(directory.iterdir())},
        world={
            "records.json": store_piece("model", ".json", lambda p: write_records(made.records, p)),
            "corpus.txt": _keep_lines(made.documents),
            "held_out.txt": _keep_lines(made.held_out),
        },
    )


def _keep(path: Path) -> Artifact:
    return store_piece("model", path.suffix, lambda partial: shutil.copyfile(path, partial))


def _keep_lines(lines: tuple[str, ...]) -> Artifact:
    text = "".join(line + "\n" for line in lines)
    return store_piece("model", ".txt", lambda path: path.write_text(text, encoding="utf-8"))


def model_without_weights(name: str, revision: str | None, place: Path) -> LanguageModel:
    """Structure and tokenizer of a model directory or GGUF file, with no numbers in the weights.

    Raises:
        InputError: the directory or file does not hold a model.
        ModelStructureError: the method does not fit the model.
    """
    config, tokenizer = read_description(place)
    with reading("configuration", place), torch.device("meta"):
        if config.get_text_config().num_hidden_layers > MOST_BLOCKS:
            raise ValueError(f"it asks for more than {MOST_BLOCKS} blocks")
        load: Any = AutoModelForCausalLM.from_config
        model = load(config, dtype=torch.float32, trust_remote_code=False)
    return LanguageModel(model, tokenizer, name=name, revision=revision)


def describe_model(source: str, name: str, revision: str | None, place: Path) -> ModelFiles:
    """Structure and digests of a model directory or GGUF file; the weights are hashed, not loaded.

    Raises:
        InputError: the directory or file does not hold a model.
        ModelStructureError: the method does not fit the model.
    """
    lm = model_without_weights(name, revision, place)
    return ModelFiles(
        source=source,
        id=name,
        revision=revision,
        files=directory_digests(place),
        quantisation=quantisation(place) if place.is_file() else None,
        architecture=type(lm.model).__name__,
        layers=lm.depth,
        width=lm.width,
        inner_width=lm.inner_width,
        parameters=sum(parameter.numel() for parameter in lm.model.parameters()),
        output_norm=lm.has_output_norm,
    )


def find_model(
    source: str,
    id: str | None,
    revision: str | None,
    path: str | None,
    package: str | None,
    *,
    fetched: bool = False,
) -> tuple[ModelFiles, Path]:
    """A model that is not trained here, and its directory or GGUF file. The weights of one from the
    hub are `fetched`, or left there.

    Raises:
        InputError: there is no such model.
        IntegrityError: its weights are damaged.
        ModelStructureError: the method does not fit it.
        ResourceError, UnreachableError: it cannot be fetched.
    """
    if source == "hub":
        name, version = str(id), resolve_commit(str(id), str(revision))
        place = (fetch_model if fetched else fetch_description)(name, version)
        return describe_model(source, name, version, place), place
    place, name, version = locate_model(source, path, package)
    described = describe_model(source, name, version, place)
    check_weights(place)
    return described, place


def check_weights(directory: Path) -> None:
    """Look at a model's safetensors files, or at its GGUF file, without loading them.

    Raises:
        InputError: there are none, or they hold whole numbers.
        IntegrityError: one is damaged or missing.
    """
    if directory.is_file():
        read_header(directory)
        return
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
