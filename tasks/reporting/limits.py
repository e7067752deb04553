"""Limits that a run has to keep: which it is beyond, and by which facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LEAST = ("score", "efficacy", "paraphrase", "neighborhood")
"""Limits that are the smallest values allowed; all others are the largest."""
NAMED = 3
"""Facts that a sentence names."""


def beyond_limits(limits: Mapping[str, float], metrics: Mapping[str, Any]) -> list[str]:
    """A phrase for each limit that the metrics of a run (`metrics.json`) are beyond.

    What was not measured is beyond every limit.
    """
    found = _values(metrics)
    phrases = []
    for name, limit in limits.items():
        value = found.get(name)
        if value is None:
            phrases.append(f"{name} was not measured")
        elif not (value >= limit if name in LEAST else value <= limit):
            phrases.append(
                f"{name} is {value:.4g}, {'below' if name in LEAST else 'above'} {limit:g}"
            )
    return phrases


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    before, after = metrics["before"], metrics["after"]
    values = {name: after[name] for name in LEAST if name in after}
    if "perplexity" in after:
        values["perplexity_ratio"] = after["perplexity"] / before["perplexity"]
    return values | {"update_ratio": max(metrics["edit"]["update_ratio"].values())}


def worst_facts(facts: Sequence[Mapping[str, Any]]) -> str:
    """The facts (rows of `facts.csv`) that did not take and those that hurt most neighbours, as
    sentences; empty if there are none."""
    return " ".join(_sentences(facts))


def _sentences(facts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    failed = [fact["prompt"] for fact in facts if not fact["took"]]
    if failed:
        yield f"{len(failed)} facts did not take: {_named(failed)}."
    hurting = sorted((fact for fact in facts if fact["hurt"]), key=lambda fact: -fact["hurt"])
    if hurting:
        worst = _named([fact["prompt"] for fact in hurting])
        yield f"{len(hurting)} hurt neighbours, most of all: {worst}."


def _named(prompts: Sequence[str]) -> str:
    more = f" and {len(prompts) - NAMED} more" if len(prompts) > NAMED else ""
    return ", ".join(map(repr, prompts[:NAMED])) + more
