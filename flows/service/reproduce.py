"""DVC under one Prefect server for all stages: ``python -m flows.service.reproduce [options]``.

DVC decides which stages run; a bare stage starts a server of its own, which costs it half a minute.
As a flow the same is a deployment: ``dvc repro``, or ``dvc exp run`` with settings of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence

from flows.command.parameters import complete_parameters
from flows.command.script import console, given_parameters, reporting

if __name__ == "__main__":
    given_parameters()

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from prefect import flow
from prefect.logging import get_run_logger

from flows.command.checks import check_inputs
from flows.service.server import end_without, prefect_server
from flows.service.watched import watched
from memit.errors import InputError, MemitError

NAME = re.compile(r"[A-Za-z0-9][\w-]{0,99}")


@flow(name="reproduce", validate_parameters=False)
def reproduce(settings: Sequence[str] = (), name: str | None = None) -> None:
    """Run the stages that are not up to date; with settings or a name, as an experiment.

    Args:
        settings: put into params.yaml by `dvc exp run -S`, e.g. requests.count=128
        name: of the experiment, under which DVC keeps its results; None lets DVC find one
    """
    _run_dvc(dvc_words(settings, name))


def dvc_words(settings: Sequence[str], name: str | None) -> list[str]:
    """What DVC is asked for; nothing that is handed over becomes another option.

    Raises:
        InputError: a setting or the name is none, or ``params.yaml``, into which DVC writes before
            anything is checked, cannot take it.
    """
    if not isinstance(settings, list | tuple) or not all(isinstance(one, str) for one in settings):
        raise InputError(f"settings is {settings!r}: write a list, such as ['requests.count=128'].")
    if name is not None and not (isinstance(name, str) and NAME.fullmatch(name)):
        raise InputError(f"name is {name!r}: use letters, digits, _ and -, at most 100.")
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"the settings {settings!r} cannot be read ({error}).") from None
    complete_parameters(tree)
    if not settings and name is None:
        return ["repro"]
    named = [] if name is None else [f"--name={name}"]
    return ["exp", "run", *named, *(f"--set-param={setting}" for setting in settings)]


def _run_dvc(words: Sequence[str]) -> None:
    """Run DVC; what it and the stages print goes to Prefect's log and to the terminal.

    Raises:
        MemitError: it ended with an error; the sentence is its own, or that of the stage.
    """
    logger = get_run_logger()
    # The stages are flows of their own, not parts of this process's run.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT__")}
    process = subprocess.Popen(
        watched("dvc", *words),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # it ends after this run, however that ends
    )
    said: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            logger.info(line.rstrip())
            console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
            said.append(line.strip())
    if process.wait():
        raise MemitError(f"dvc {words[0]}: {reason(said)}")


def reason(said: Sequence[str]) -> str:
    """The first error, the stage's own or DVC's, else the last thing that was said."""
    errors = [line[len("error: ") :] for line in said if line.lower().startswith("error: ")]
    return (errors or [*said[-1:]] or ["it ended with an error."])[0]


def reproduce_here(options: Sequence[str]) -> int:
    """Run ``dvc repro`` with these options in the terminal; gives its exit status."""
    with prefect_server() as address:
        end_without(address)
        return subprocess.run(watched("dvc", "repro", *options), check=False).returncode


if __name__ == "__main__":
    given = given_parameters()
    reporting(lambda: check_inputs(given))
    sys.exit(reporting(lambda: reproduce_here(sys.argv[1:])))
