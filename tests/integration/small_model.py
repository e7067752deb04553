"""A small random model as tasks and commands are given it: its directory, an edit, a step's run."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from flows.command.parameters import Parameters, check_parameters
from flows.service.step import Run
from memit.language_model import LanguageModel
from memit.weight_delta import LowRank, WeightDelta, base_digests
from tasks.engine.loaded_model import ModelReference
from tasks.model import describe_model
from tests.families import save_model


def small_model(directory: Path, family: str = "gpt2") -> ModelReference:
    """Make the directory; gives what names it."""
    save_model(family, directory)
    described = describe_model("local", "small", None, directory)
    return ModelReference(
        directory=str(directory), model=described, dtype="float32", device="cpu", threads=1
    )


def make_delta(
    lm: LanguageModel, path: Path, seed: int = 0, layers: Sequence[int] = (1, 2)
) -> Path:
    """A random change of some layers, made for the weights that stand in `lm`."""
    generator = torch.Generator().manual_seed(seed)
    names = [lm.weight_name(layer) for layer in layers]
    changes = {}
    for name in names:
        rows, columns = lm.parameter(name).shape
        left = torch.randn(rows, 3, generator=generator) * 0.1
        changes[name] = LowRank(left, torch.randn(columns, 3, generator=generator) * 0.1)
    WeightDelta(changes, {"base": base_digests(lm, names), "model": lm.name}).save(path)
    return path


def parameters(**sections: Mapping[str, Any]) -> Parameters:
    """Those of an experiment with a model and facts of one's own."""
    model, facts = {"source": "local", "path": "model"}, {"source": "facts", "path": "facts.jsonl"}
    return check_parameters({"model": model, "requests": facts, **sections})


def statistics_run(
    model: ModelReference, resources: ExitStack, statistics: Mapping[str, Any]
) -> Run:
    """The step `statistics` with this model."""
    run = Run("statistics", parameters(statistics=statistics), resources)
    run.model = model
    return run
