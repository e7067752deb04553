"""How a flow is run as a command: parameters first, then slow imports; errors as one sentence."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from functools import cache
from typing import NoReturn, TypeVar

from rich.console import Console

from flows.parameters import Parameters, read_parameters
from memit.errors import MemitError
from tasks.stopping import INTERRUPTED, TERMINATED, leave

BAD_INPUT = 2
"""Exit status when the user can put it right."""

Result = TypeVar("Result")

console = Console(stderr=True)


@cache
def given_parameters() -> Parameters:
    """``params.yaml`` in the working directory; if it is wrong, say so and exit."""
    return reporting(read_parameters)


def run_flow(
    flow: Callable[[Parameters], object], check: Callable[[Parameters], object] | None = None
) -> None:
    """Run a flow with ``params.yaml``; what the user can put right ends in one sentence.

    What ``check`` finds is told before Prefect's server is started.
    """
    parameters = given_parameters()
    # Prefect marks its run as crashed and then calls whoever listened before it.
    signal.signal(signal.SIGTERM, lambda *_: leave(TERMINATED))
    if check is not None:
        reporting(lambda: check(parameters))
    if parameters.runner.kind == "threads":
        reporting(lambda: flow(parameters))
    else:
        reporting(lambda: _with_server(lambda: flow(parameters)))


def _with_server(work: Callable[[], object]) -> object:
    """Do the work with a server that workers in other processes can reach."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.server import prefect_server

    if PREFECT_API_URL.value():
        return work()
    with prefect_server() as address, temporary_settings({PREFECT_API_URL: address}):
        return work()


def reporting(work: Callable[[], Result]) -> Result:
    """Do the work; print the project's own errors as a sentence and exit."""
    try:
        return work()
    except MemitError as error:
        fail(error)
    except KeyboardInterrupt:
        leave(INTERRUPTED)


def fail(error: MemitError) -> NoReturn:
    """Print an error's sentence and exit."""
    console.print("[bold red]error:[/] ", end="")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)
    sys.exit(BAD_INPUT)
