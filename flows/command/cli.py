"""The console script `memit`. Commands import slow modules after checking their input."""

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.types import ExistingFile, ExistingPath
from cyclopts.validators import Number

from flows.command.facts_file import check_requests
from flows.command.parameters import Precision
from flows.command.script import (
    console,
    given_parameters,
    output,
    ready_parameters,
    reporting,
    run_flow,
    slow_imports,
)
from memit.errors import InputError
from memit.files.reading import check_file, read_text
from tasks.engine.results import DELTA_FILE, MODEL_FILE, REQUESTS_FILE, upstream

Delta = Annotated[ExistingFile | None, Parameter(help=f"The edit; by default {DELTA_FILE}.")]
Model = Annotated[
    ExistingPath | None,
    Parameter(help="A model directory or GGUF file; by default the model of params.yaml."),
]
Kind = Literal["merged", "lora", "delta"]
Force = Annotated[bool, Parameter(help="Also take an edit beyond the limits of params.yaml.")]

app = App(
    name="memit",
    help="""Edit thousands of facts in a language model and measure the effects.

    `memit run` runs the experiment that params.yaml describes: it loads or trains the model,
    collects statistics, computes the edit, and evaluates the model before and after. The other
    commands run it through DVC or Prefect, check requests in advance, or use the edit.""",
    help_format="markdown",
    version=lambda: version("memit"),
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # `reporting` says how to go on
)


@app.command
def run(*, yes: bool = False) -> None:
    """Run the experiment that params.yaml describes.

    Results that are up to date come from caches. A run can be stopped at any time; the next one
    continues with the pieces that are not finished.

    Parameters
    ----------
    yes
        Withdraw facts even if the list has lost many of them since the last run.
    """
    ready_parameters()
    with slow_imports():
        from flows.command.checks import check_inputs
        from flows.experiment import experiment

    run_flow(experiment, check_inputs if yes else None)


@app.command
def diff() -> None:
    """Show what the list of facts would change, or what the last run has changed.

    Before a run: the facts that are new in the list, that are missing from it, or that have another
    object than in the last run; nothing is computed. After it: the same against the run before, and
    what the model said and says now to these facts, to their paraphrases and to their neighbours.
    """
    parameters = given_parameters()
    from flows.command.changes import show_changes

    show_changes(parameters, lambda: _open_model(None))


@app.command
def repro(
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True, help="Of `dvc repro`.")],
) -> None:
    """Run the DVC stages that are not up to date (`dvc repro`), with one Prefect server for all."""
    parameters = ready_parameters(only_of_dvc=True)
    from flows.command.checks import check_list
    from flows.command.limits import check_limits
    from flows.report import show_results
    from flows.service.reproduce import reproduce_here

    check_list(parameters)
    status = reproduce_here(arguments)
    if status == 0 and not arguments:  # else other stages may have been asked for
        show_results()
        check_limits(parameters.limits)
    sys.exit(status)


@app.command
def compare() -> None:
    """Edit the same records with every method of `compare.methods`: the table in comparison/."""
    ready_parameters()
    from flows.experiment import comparison

    run_flow(comparison)


@app.command
def scale() -> None:
    """Edit more and more records with every method of `compare.methods`: curves in scaling/."""
    ready_parameters()
    from flows.experiment import scaling_run

    run_flow(scaling_run)


@app.command
def deploy(*, once: bool = False) -> None:
    """Serve the deployments of prefect.yaml, after a first run of the experiment.

    Starts Prefect's server and UI, unless PREFECT_API_URL names a server.

    Parameters
    ----------
    once
        Stop after the first run.
    """
    parameters = ready_parameters(only_of_dvc=True)
    from flows.command.checks import check_list
    from flows.service.deploy import deploy

    check_list(parameters)
    sys.exit(deploy(once))


@app.command
def check(file: Path) -> None:
    """Check a file of requests and estimate what editing them takes, without running anything.

    Finds malformed and contradictory records, counts tokens if the model of params.yaml is on this
    machine, and estimates time, memory and disk space.

    Parameters
    ----------
    file
        CounterFact JSON, or facts as JSON lines or CSV (subject, prompt, target, ...).
    """
    parameters = given_parameters()
    check_requests(parameters, file)


@app.command
def tune() -> None:
    """Find settings for the model of params.yaml, on facts that are not yours.

    Tries layers, λ and the effort for targets, for as long as `tune.minutes` says, and leaves a
    preset and the trials in tuning/. A search that was stopped goes on.
    """
    parameters = ready_parameters()
    if parameters.tune.facts is not None:
        check_file(parameters.tune.facts, "tune.facts")
    from flows.experiment import tuning

    run_flow(tuning)


@app.command
def presets() -> None:
    """List the models that settings are known for, and whether this project has checked them."""
    from flows.command.presets import presets_table

    output.print(presets_table())


@app.command
def ask(
    *prompts: str,
    file: ExistingFile | None = None,
    chat: bool = False,
    model: Model = None,
    delta: Delta = None,
    top: Annotated[int, Parameter(validator=Number(gte=1, lte=50))] = 5,
    tokens: Annotated[int, Parameter(validator=Number(gte=1, lte=500))] = 8,
) -> None:
    """Show how the unedited and the edited model continue prompts, side by side.

    Parameters
    ----------
    prompts
        Beginnings of sentences; without any they are read from standard input, a line each.
    file
        A text file with further prompts, a line each.
    chat
        Put each prompt into the model's chat template, as a user's message.
    top
        The number of next words to show.
    tokens
        The number of tokens of the continuation.
    """
    lines = [*prompts, *(read_text(file, "the prompts").splitlines() if file else ())]
    if not all(prompt.strip() for prompt in prompts) or (file and not lines):
        raise InputError("a prompt is empty: write the beginning of a sentence.")
    # An exported model needs no edit beside it.
    path = _delta_file(delta) if delta or not model or DELTA_FILE.is_file() else None
    from flows.command.answers import Questions, fitting_delta
    from memit.requests import read_counterfact

    lm, facts = _open_model(model), []
    if delta is None and REQUESTS_FILE.is_file():
        facts = [record.request for record in read_counterfact(REQUESTS_FILE)]
    fitting = path and fitting_delta(lm, path, is_given=delta is not None)
    asked = Questions(lm, fitting, facts, top, tokens, chat)
    for given in [lines] if lines else _typed():
        for table in asked.tables([line for line in given if line.strip()]):
            output.print(table)


@app.command
def ui(*, port: int = 5000, prefect: bool = False) -> None:
    """Show all runs in MLflow's pages until Ctrl-C.

    Parameters
    ----------
    port
        Preferred; a free one is taken if another program has it.
    prefect
        Show Prefect's pages, too.
    """
    parameters = given_parameters()
    from flows.service.pages import serve_pages

    serve_pages(parameters.report, port, with_prefect=prefect)


@app.command
def apply(directory: ExistingPath, *, delta: Delta = None, force: Force = False) -> None:
    """Apply an edit to the weights in a model directory. `memit revert` restores them exactly.

    The original weights are kept in DIRECTORY/memit-edits/. An edit that was made for the original
    weights takes the place of the one that is there; one that was made for edited weights is added.

    Parameters
    ----------
    directory
        A directory with safetensors weights, as save_pretrained writes it.
    """
    file = _delta_file(delta, force)
    from memit.model_directory import applied_edits, apply_edit
    from tasks.engine.results import run_of

    run = run_of(file)
    origin = {"list": run.origin, "commit": run.commit} if run else {}
    former = applied_edits(directory)
    backup = apply_edit(directory, file, origin)
    done = "this edit is in it already" if backup in former else "edited"
    console.print(f"{directory}: {done}; the original weights are in {backup}")


@app.command
def status(directory: ExistingPath) -> None:
    """Say which facts are in a model directory, and of which list and commit they are.

    Parameters
    ----------
    directory
        A model directory that `memit apply` may have edited.
    """
    from flows.command.status import show_status

    show_status(directory)


@app.command
def revert(directory: ExistingPath) -> None:
    """Undo the last edit of a model directory, bit for bit.

    Parameters
    ----------
    directory
        A directory that `memit apply` edited.
    """
    from memit.model_directory import applied_edits, revert_edit

    revert_edit(directory)
    left = len(applied_edits(directory))
    console.print(f"reverted the last edit of {directory}; edits left: {left}")


@app.command
def export(
    directory: Path,
    *,
    kind: Annotated[Kind, Parameter(name="--as")] = "merged",
    dtype: Precision = "float32",
    model: Model = None,
    delta: Delta = None,
    force: Force = False,
) -> None:
    """Save the edited model, or the edit alone, to a directory with a model card.

    Parameters
    ----------
    directory
        A new or empty directory.
    kind
        merged: a model that transformers can load; lora: an adapter for PEFT, vLLM and llama.cpp;
        delta: what `memit apply` takes.
    dtype
        Of a merged model's weights, which are edited in float32 and then rounded.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not empty: name another directory.")
    file = _delta_file(delta, force)
    from flows.command.export import export_edit, license_of

    license_ = license_of(model, None if model else given_parameters().model)
    lm = _open_model(model, dtype="float32") if kind != "delta" else None
    console.print(export_edit(lm, file, directory, kind, dtype, license_), soft_wrap=True)


def _typed() -> Iterator[list[str]]:
    """One prompt at a time, as it is typed or piped in."""
    if sys.stdin.isatty():
        console.print("type a prompt and Enter; Ctrl-D ends")
    for line in sys.stdin:
        yield [line.rstrip("\n")]


def _delta_file(given: Path | None, force: bool = True) -> Path:
    """The file of an edit, which is within the limits unless it is forced."""
    path = given or DELTA_FILE
    if not path.is_file():
        raise InputError(f"{path} does not exist: use `memit run` first, or name one with --delta.")
    if not force and Path("params.yaml").is_file():
        from flows.command.limits import check_limits

        check_limits(given_parameters().limits, path)
    return path


def _open_model(place: Path | None, dtype: str | None = None):
    """The model in a directory or GGUF file, or by default that of the experiment, in its dtype or
    another one."""
    from tasks.engine.hub import open_model
    from tasks.engine.loaded_model import load_reference

    if place is not None:
        from memit.language_model import load_model

        return load_model(place, dtype="float32", device="auto")
    if not MODEL_FILE.exists():
        raise InputError("there is no model: use `memit run` first, or name one with --model.")
    upstream("model")
    placement = given_parameters().model.placement()
    placement["dtype"] = dtype or placement["dtype"]
    return load_reference(open_model(**placement))


def main() -> None:
    """Entry point of the console script."""
    reporting(app)


if __name__ == "__main__":
    main()
