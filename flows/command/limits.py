"""The limits of `params.yaml`, held against the results in this directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.command.parameters import LimitsSection
from memit.errors import LimitError
from memit.evaluation.counterfact import FACTS
from tasks.engine.results import (
    DELTA_FILE,
    FACTS_FILE,
    METRICS_FILE,
    is_edit_here,
    is_measured,
)
from tasks.engine.tables import read_csv_table
from tasks.reporting.formats import read_json

LEAST = ("score", "efficacy", "paraphrase", "neighborhood", "kept_accuracy")
"""Limits that are the smallest values allowed; all others are the largest."""
NAMED = 3
"""Facts that a sentence names."""


def check_limits(limits: LimitsSection, delta_file: Path = DELTA_FILE) -> None:
    """Check that the run which made a delta is within the limits; of a delta that was made
    elsewhere nothing is known.

    Raises:
        LimitError: it is not, or it was not measured.
    """
    if not limits.model_dump(exclude_none=True) or not is_edit_here(delta_file):
        return
    if not is_measured(delta_file):
        raise LimitError(
            "params.yaml has limits, and this edit was not measured: go on with `memit run`."
        )
    if beyond := beyond_limits(limits):
        raise LimitError(
            f"the edit is beyond the limits of params.yaml: {'; '.join(beyond)}. {_worst_facts()} "
            "Results are kept; `memit apply` and `memit export` take this edit with --force only."
        )


def beyond_limits(limits: LimitsSection) -> list[str]:
    """A phrase for each limit that the last run is beyond, also if it did not measure that."""
    found, phrases = _values(read_json(METRICS_FILE)), []
    for name, limit in limits.model_dump(exclude_none=True).items():
        value, is_least = found.get(name), name in LEAST
        if value is None:
            phrases.append(f"{name} was not measured")
        elif value < limit if is_least else value > limit:
            phrases.append(f"{name} is {value:.4g}, {'below' if is_least else 'above'} {limit:g}")
    return phrases


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    before, after = metrics["before"], metrics["after"]
    values = {name: after[name] for name in LEAST if name in after}
    if "perplexity" in after:
        values["perplexity_ratio"] = after["perplexity"] / before["perplexity"]
    return values | {"update_ratio": max(metrics["edit"]["update_ratio"].values())}


def _worst_facts() -> str:
    """The facts that did not take and those that hurt most neighbours, as sentences."""
    facts = read_csv_table(FACTS_FILE, FACTS).to_pylist()
    hurting = sorted((fact for fact in facts if fact["hurt"]), key=lambda fact: -fact["hurt"])
    named = {"did not take": [fact for fact in facts if not fact["took"]], "hurt others": hurting}
    return " ".join(
        f"{len(of)} facts {what}, such as {', '.join(repr(fact['prompt']) for fact in of[:NAMED])}."
        for what, of in named.items()
        if of
    )
