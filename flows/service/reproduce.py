"""DVC under one Prefect server for all stages: as a flow, and as `memit repro`.

A stage that DVC runs without one starts a server of its own, which takes half a minute.
"""

import os
import subprocess
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from prefect import flow

from flows.command.checks import check_list
from flows.command.parameters import complete_parameters
from flows.service.run_lock import HELD, alone, lock_name
from flows.service.server import exit_without_server, prefect_server
from flows.service.watched import watched
from memit.errors import InputError, MemitError


@flow(
    name="reproduce",
    flow_run_name=lambda: f"reproduce {datetime.now():%d %b %H:%M}",
    log_prints=True,
)
def reproduce(settings: Sequence[str] = (), name: str | None = None) -> None:
    """Run the stages that are not up to date; with settings or a name, as a DVC experiment.

    Args:
        settings: of params.yaml, as for `dvc exp run -S`, e.g. requests.count=128
        name: of the experiment; null: DVC chooses one

    Raises:
        MemitError: DVC or a stage failed; the message is theirs.
    """
    arguments = dvc_arguments(settings, name)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT__")}
    lines = []
    with alone():
        process = subprocess.Popen(
            watched("dvc", *arguments),
            # Stages are flow runs of their own, not part of this one.
            env=environment | {HELD: lock_name()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # it ends after this run, however that ends
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line.rstrip())
            lines.append(line.strip())
        status = process.wait()
    if status:
        raise MemitError(f"DVC: {failure(lines)}")


def dvc_arguments(settings: Sequence[str], name: str | None) -> list[str]:
    """Arguments of `dvc`, with checked settings, which DVC writes into `params.yaml` unchecked, and
    a checked list of facts.

    Raises:
        MemitError: `params.yaml` cannot take a setting, or what `check_list` finds.
    """
    try:
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)))
        check_list(complete_parameters(given))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"settings {list(settings)} cannot be read: {error}.") from None
    if not settings and name is None:
        return ["repro"]
    # One argument each, so that no value can pass for another option.
    named = [] if name is None else [f"--name={name}"]
    return ["exp", "run", *named, *(f"--set-param={setting}" for setting in settings)]


def failure(lines: Sequence[str]) -> str:
    """The first error in the output, from a stage or from DVC, or else its last line."""
    errors = [line.partition(" ")[2] for line in lines if line.lower().startswith("error: ")]
    return [*errors, *lines[-1:], "it failed without a message."][0]


def reproduce_here(arguments: Sequence[str]) -> int:
    """Run `dvc repro` in the terminal; returns its exit status."""
    with alone(), prefect_server() as address:
        exit_without_server(address)
        environment = {**os.environ, HELD: lock_name()}
        dvc = watched("dvc", "repro", *arguments)
        return subprocess.run(dvc, env=environment, check=False).returncode
