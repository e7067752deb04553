"""What ``mend`` and ``serac`` share: the records that they learn from, and their settings."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from flows.parameters import Parameters, Section
from flows.systems import records_source
from memit.errors import InputError
from tasks.artifacts import Artifact
from tasks.systems import split_records

Settings = TypeVar("Settings")

SCRATCH = "scratch"
"""In place of a model of the hub: a small one that is made here."""


def training_records(parameters: Parameters) -> Artifact:
    """The records that are set aside for editors that learn; none of them is ever edited.

    Raises:
        InputError: none are set aside.
    """
    source, file = records_source(parameters)
    split = split_records(
        source, file, parameters.compare.training_records, parameters.requests.seed
    )
    if split.training_count == 0:
        raise InputError(
            "compare.training_records is 0, so that editors have nothing to learn from: set some "
            "aside, or take mend and serac out of compare.systems."
        )
    return split.training


def settings_from(section: Section, preset: Settings) -> Settings:
    """A preset with what a section of ``params.yaml`` sets."""
    known = {field.name for field in fields(preset)}  # pyright: ignore[reportArgumentType]
    chosen: dict[str, Any] = {
        name: None if value == SCRATCH else value
        for name, value in section.model_dump().items()
        if value is not None and name in known
    }
    return replace(preset, **chosen)  # pyright: ignore[reportArgumentType]
