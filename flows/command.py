"""How a flow is run as a command: parameters first, then slow imports; errors as one sentence."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import NoReturn, TypeVar

from rich.console import Console

from flows.parameters import Parameters, read_parameters
from memit.errors import MemitError

BAD_INPUT = 2
"""Exit status when the user can put it right."""
INTERRUPTED = 130
"""Exit status after Ctrl-C."""
TERMINATED = 143
"""Exit status after SIGTERM."""

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
    if check is not None:
        reporting(lambda: check(parameters))
    reporting(lambda: flow(parameters))


def reporting(work: Callable[[], Result]) -> Result:
    """Do the work; print the project's own errors as a sentence and exit."""
    try:
        return work()
    except MemitError as error:
        fail(error)
    except KeyboardInterrupt:
        _stop(INTERRUPTED)
    except BaseException as error:
        # Prefect turns SIGTERM into an exception of its own, which is not worth its import here.
        if type(error).__name__ == "TerminationSignal":
            _stop(TERMINATED)
        raise


def _stop(status: int) -> NoReturn:
    """Exit at once: pieces in the making are lost whole, and their threads are not waited for."""
    console.print("[yellow]stopped:[/] finished pieces are kept; run it again to go on.")
    atexit._run_exitfuncs()  # a temporary Prefect server is stopped here
    os._exit(status)


def fail(error: MemitError) -> NoReturn:
    """Print an error's sentence and exit."""
    console.print("[bold red]error:[/] ", end="")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)
    sys.exit(BAD_INPUT)
