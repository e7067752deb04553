"""The console script ``memit``. Slow imports wait until a command has checked its input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number
from cyclopts.validators import Path as PathRule

from flows.command.script import BAD_INPUT, console, given_parameters, reporting, run_flow
from memit.errors import InputError

Directory = Annotated[Path, Parameter(validator=PathRule(exists=True, file_okay=False))]
File = Annotated[Path, Parameter(validator=PathRule(exists=True, dir_okay=False))]
Precision = Literal["float32", "bfloat16", "float16"]

DELTA = Path("artifacts/edit/delta.safetensors")

app = App(
    name="memit",
    help="""Rewrite thousands of facts in a language model, and measure what that did.

    `memit run` carries out the experiment that params.yaml describes: it finds or makes the model,
    collects statistics, computes the edit, and compares the model before and after. The other
    commands look at requests before a run, or use its edit afterwards.""",
    help_format="markdown",
    version_flags=["--version"],
)


@app.command
def run() -> None:
    """Carry out the experiment that params.yaml describes.

    Run it again and everything that has not changed comes from caches; stop it at any time and the
    next run goes on from the pieces that are finished.
    """
    given_parameters()
    from flows.experiment import check_inputs, experiment

    run_flow(experiment, check_inputs)


@app.command
def check(file: Path) -> None:
    """Check a file of requests, and estimate what editing them takes. Nothing is run.

    Looks for malformed and contradicting records, counts tokens where the model of params.yaml is
    on this machine, and estimates time, memory and disk.

    Parameters
    ----------
    file
        CounterFact JSON, or facts as JSON lines or CSV (subject, prompt, target, ...).
    """
    parameters = given_parameters()
    from flows.command.estimate import check_requests

    reporting(lambda: check_requests(parameters, file))


@app.command
def ask(
    prompt: str,
    *,
    model: Directory | None = None,
    delta: File | None = None,
    top: Annotated[int, Parameter(validator=Number(gte=1, lte=50))] = 5,
    tokens: Annotated[int, Parameter(validator=Number(gte=1, lte=500))] = 8,
) -> None:
    """Show what the unedited and the edited model say to a prompt, side by side.

    Parameters
    ----------
    prompt
        The beginning of a sentence.
    model
        A model directory; by default the model of params.yaml.
    delta
        The edit; by default that of the last run (artifacts/edit/delta.safetensors).
    top
        How many next tokens to show.
    tokens
        How far to continue the most likely answer.
    """

    def show() -> None:
        if not prompt.strip():
            raise InputError("the prompt is empty: write the beginning of a sentence.")
        from flows.command.answers import answers_side_by_side

        lm = _open_model(model, None)
        console.print(answers_side_by_side(lm, _delta_file(delta), prompt, top, tokens))

    reporting(show)


@app.command
def apply(directory: Directory, *, delta: File | None = None) -> None:
    """Put an edit into a model directory. `memit revert` takes it out again, to the last bit.

    What stood there before is kept in DIRECTORY/memit-edits/. Several edits stack.

    Parameters
    ----------
    directory
        A directory with safetensors weights, such as save_pretrained writes.
    delta
        The edit; by default that of the last run (artifacts/edit/delta.safetensors).
    """

    def put_in() -> None:
        from memit.model_directory import apply_edit

        folder = apply_edit(directory, _delta_file(delta))
        console.print(f"edited {directory}; what undoes it lies in {folder}")

    reporting(put_in)


@app.command
def revert(directory: Directory) -> None:
    """Take the last edit out of a model directory: the very bits that stood there before return.

    Parameters
    ----------
    directory
        A directory that `memit apply` edited.
    """

    def take_out() -> None:
        from memit.model_directory import applied_edits, revert_edit

        revert_edit(directory)
        left = len(applied_edits(directory))
        console.print(f"reverted the last edit of {directory}; {left} still stand in it")

    reporting(take_out)


@app.command
def export(
    directory: Path,
    *,
    dtype: Precision = "float32",
    model: Directory | None = None,
    delta: File | None = None,
) -> None:
    """Write the edited model as an ordinary directory that any program can load.

    Parameters
    ----------
    directory
        Where to write; it must not exist yet or be empty.
    dtype
        Of the written weights. They are edited first and rounded once.
    model
        A model directory; by default the model of params.yaml.
    delta
        The edit; by default that of the last run (artifacts/edit/delta.safetensors).
    """

    def write() -> None:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory} exists and is not empty: name another directory.")
        from flows.command.answers import save_edited

        save_edited(_open_model(model, None), _delta_file(delta), directory, dtype)
        console.print(f"wrote {directory} in {dtype}")

    reporting(write)


def _delta_file(given: Path | None) -> Path:
    path = given or DELTA
    if not path.is_file():
        raise InputError(f"{path} is not here: run `memit run` first, or name one with --delta.")
    return path


def _open_model(directory: Path | None, dtype: str | None):
    """The model in a directory, or that of the experiment here."""
    from tasks.engine.hub import open_model
    from tasks.engine.loaded_model import load_reference
    from tasks.engine.results import MODEL_FILE, upstream

    if directory is not None:
        from memit.language_model import load_model

        return load_model(directory, dtype=dtype or "float32", device="auto")
    if not MODEL_FILE.exists():
        raise InputError("there is no model here: run `memit run` first, or name one with --model.")
    upstream("model")
    return load_reference(open_model(**given_parameters().model.placement()))


def main() -> None:
    """Entry point of the console script."""
    if len(sys.argv) == 1:
        app.help_print()
        sys.exit(BAD_INPUT)
    app()
