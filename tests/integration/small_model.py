"""A model directory of a small random model, as tasks are given it."""

from pathlib import Path

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
