"""What deployments run that no single command does: a comparison with the steps that it needs.

The experiment and "reproduce" are deployed as they are, see ``prefect.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable

from prefect import Flow, flow

from flows.command.checks import check_comparison, check_scaling
from flows.command.parameters import Parameters, deployable
from flows.compare import compare
from flows.experiment import run_step
from flows.mend import mend
from flows.methods import learning_steps
from flows.model import model
from flows.prefixes import prefixes
from flows.scaling import scaling
from flows.serac import serac
from flows.service.run_lock import alone
from flows.service.workers import with_runner
from flows.statistics import statistics

LEARNING = {"mend": mend, "serac": serac}
"""The flows in which methods learn before they edit."""


@flow(name="comparison", validate_parameters=False)
@deployable
@alone()
@with_runner
def comparison(parameters: Parameters) -> None:
    """All methods on the same model and the same records: the table in ``comparison/``."""
    _run_up_to(compare, check_comparison, parameters)


@flow(name="scaling-run", validate_parameters=False)
@deployable
@alone()
@with_runner
def scaling_run(parameters: Parameters) -> None:
    """All methods on ever more edits: table and figure in ``scaling/``."""
    _run_up_to(scaling, check_scaling, parameters)


def _run_up_to(
    last: Flow[[Parameters], None], check: Callable[[Parameters], None], parameters: Parameters
) -> None:
    """Run a flow after the steps whose results it reads; what is done comes from caches."""
    check(parameters)
    learning = [LEARNING[name] for name in learning_steps(parameters)]
    steps = (model, prefixes, statistics, *learning, last)
    for number, step in enumerate(steps, 1):
        run_step(step, parameters, f"{number}/{len(steps)}")
