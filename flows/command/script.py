"""Validate params.yaml before slow imports, run a flow, and print known errors on one line."""

import atexit
import errno
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console

from flows.command.parameters import Parameters, check_files, read_parameters
from flows.service.run_lock import alone
from memit.errors import InputError, LimitError, MemitError, ResourceError, UnreachableError
from memit.redaction import redacted
from tasks.engine.signals import (
    GO_ON,
    INTERRUPTED,
    TERMINATED,
    exit_now,
    exit_on_signal,
    resend_swallowed,
)

PARAMETERS = "MEMIT_PARAMS"
"""Environment variable with a file to take instead of `params.yaml`."""
BAD_INPUT = 2
"""Exit status for errors that the user can correct."""
BEYOND_LIMITS = 3
"""Exit status of a run whose results are beyond the limits of params.yaml."""
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

Result = TypeVar("Result")

console = Console(stderr=True)
"""For progress and notes."""
output = Console()
"""For what was asked for."""


@cache
def given_parameters() -> Parameters:
    """The parameters in `params.yaml`, read once.

    Commands call this first: from then on SIGTERM ends them without a traceback.

    Raises:
        InputError: the parameters are wrong.
    """
    # Prefect marks its run as crashed and then calls the handler that was set before its own.
    signal.signal(signal.SIGTERM, lambda *_: exit_now(TERMINATED))
    resend_swallowed()
    return read_parameters(_parameters_file(of_dvc="DVC_STAGE" in os.environ))


def ready_parameters(*, only_of_dvc: bool = False) -> Parameters:
    """`given_parameters` for a run, after a look for the files that they name; those of another
    file than `params.yaml` only if not `only_of_dvc`, which takes no other.

    Raises:
        InputError: the parameters are wrong, or a file is missing.
    """
    parameters = given_parameters()
    check_files(parameters, _parameters_file(of_dvc=only_of_dvc).name)
    return parameters


def _parameters_file(*, of_dvc: bool) -> Path:
    given = os.environ.get(PARAMETERS)
    if given and of_dvc:
        raise InputError(
            f"DVC and deployments take their settings from params.yaml alone: copy {given} over it "
            f"instead of naming it (PARAMS, {PARAMETERS})."
        )
    return Path(given or "params.yaml")


@contextmanager
def slow_imports() -> Iterator[None]:
    """Import without garbage collection, which would take a fifth of the time and find nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_flow(
    flow: Callable[[Parameters], object], check: Callable[[Parameters], object] | None = None
) -> None:
    """Run a flow with `params.yaml`, under a Prefect server, which is started after the flow's own
    check, or another one."""
    from flows.service.server import exit_without_server, prefect_server
    from flows.service.step import CHECKS

    parameters = given_parameters()
    exit_on_signal()
    logging.raiseExceptions = False  # a lost server is reported once, not for each record
    if check := check or CHECKS.get(flow):
        check(parameters)

    with alone():
        server = ExitStack()
        atexit.register(server.close)  # Prefect's threads send what is left before that
        exit_without_server(server.enter_context(prefect_server()))
        flow(parameters)


def reporting(work: Callable[[], Result]) -> Result:
    """Do the work; on Ctrl-C or a known error print one line and exit. Entry points call this."""
    try:
        return work()
    except MemitError as error:
        fail(error)
    except KeyboardInterrupt:
        exit_now(INTERRUPTED)
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        fail(known)


def _known(error: BaseException | None) -> MemitError | None:
    """The error behind a failure of the disk or of Prefect's server, if it is one of these."""
    from httpx import TransportError

    while error is not None:
        if isinstance(error, TransportError):
            return UnreachableError(
                f"Prefect's server does not answer ({type(error).__name__}): start the one that "
                f"PREFECT_API_URL names, or unset that; {GO_ON}"
            )
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            return ResourceError(
                f"{error.filename or 'a file'} cannot be written ({error.strerror}): make room, "
                "change its permissions, or use another disk."
            )
        error = error.__cause__ or error.__context__
    return None


def fail(error: MemitError) -> NoReturn:
    """Print an error on one line, without secrets, and exit."""
    console.print("[bold red]error:[/] ", end="")
    console.print(redacted(str(error)), markup=False, highlight=False, soft_wrap=True)
    sys.exit(BEYOND_LIMITS if isinstance(error, LimitError) else BAD_INPUT)
