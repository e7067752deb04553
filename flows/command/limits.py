"""The limits of `params.yaml`, held against the results in this directory."""

from __future__ import annotations

from pathlib import Path

from pyarrow.csv import read_csv

from flows.command.export import is_of_last_run
from flows.command.parameters import LimitsSection
from memit.errors import LimitError
from tasks.engine.results import DELTA_FILE, FACTS_FILE, METRICS_FILE
from tasks.reporting.formats import read_json
from tasks.reporting.limits import beyond_limits, worst_facts


def check_limits(limits: LimitsSection, delta_file: Path = DELTA_FILE) -> None:
    """Check that the run which made a delta is within the limits; of others nothing is known.

    Raises:
        LimitError: it is not.
    """
    if not limits.given or not is_of_last_run(delta_file):
        return
    beyond = beyond_limits(limits.given, read_json(METRICS_FILE))
    if beyond:
        named = worst_facts(read_csv(FACTS_FILE).to_pylist())
        raise LimitError(
            f"the edit is beyond the limits of params.yaml: {'; '.join(beyond)}. {named} Results "
            "are kept; `memit apply` and `memit export` take this edit with --force only."
        )
