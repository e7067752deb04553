"""The size of a synthetic world, and the shape and schedule of the small model that learns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from memit.errors import InputError
from memit.ranges import LearningRate, Range, Seed, check_settings
from memit.world.relations import RELATIONS


@dataclass(frozen=True)
class WorldParameters:
    """How large a world is; the defaults are those of `params/world.yaml`."""

    seed: Seed = 0
    """Everything is drawn from it."""
    people: Annotated[int, Range(2, 100_000)] = 450
    """People with a name and one object for each relation."""
    relations: Annotated[int, Range(1, len(RELATIONS))] = 6
    """How many of `RELATIONS`, from the first on."""
    records_per_person: Annotated[int, Range(1, len(RELATIONS))] = 1
    """Facts of a person that records change, each with one of its own. Two of them share a key
    where prompts begin with the subject; few subjects of CounterFact have two."""
    objects: Annotated[int, Range(2, min(len(r.objects) for r in RELATIONS))] = 24
    """Objects of a relation; each is true of about people / objects people."""
    biographies: Annotated[int, Range(1, 100_000)] = 40
    """Training documents about one person."""
    held_out_biographies: Annotated[int, Range(1, 1_000)] = 1
    """Documents about one person that training never sees, for the perplexity."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.records_per_person > self.relations:
            raise InputError(
                f"records_per_person is {self.records_per_person}, more than the "
                f"{self.relations} relations: change either."
            )


@dataclass(frozen=True)
class TrainingParameters:
    """Shape and schedule of the small model; the defaults are those of `params/world.yaml`."""

    seed: Seed = 0
    """Of the initial weights and of the order of the documents."""
    layers: Annotated[int, Range(1, 128)] = 6
    width: Annotated[int, Range(8, 16_384)] = 128
    """The hidden size, a multiple of `heads`."""
    heads: Annotated[int, Range(1, 128)] = 4
    vocabulary: Annotated[int, Range(257, 200_000)] = 1_024
    """Tokens of the byte-level BPE, at least every byte and the end of text."""
    context_length: Annotated[int, Range(16, 65_536)] = 128
    """Positions that the model has."""
    sequence_length: Annotated[int, Range(16, 65_536)] = 64
    """Tokens of a training row."""
    batch_size: Annotated[int, Range(1, 100_000)] = 16
    """Rows of a step."""
    steps: Annotated[int, Range(1, 10_000_000)] = 1_700
    learning_rate: LearningRate = 4e-3
    """At its peak, after the warm-up; decays to zero as a cosine."""
    warmup_steps: Annotated[int, Range(0, 1_000_000)] = 100
    weight_decay: Annotated[float, Range(0, 10)] = 0.1
    """Of the matrices; norms and biases do not decay."""
    checkpoint_every: Annotated[int, Range(1, 1_000_000)] = 200
    """Steps between checkpoints, which are lost at most when the process is killed."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.width % self.heads:
            raise InputError(
                f"width is {self.width}, which is no multiple of its {self.heads} heads: change "
                "either."
            )
        if self.sequence_length > self.context_length:
            raise InputError(
                f"sequence_length is {self.sequence_length}, more than the context_length of "
                f"{self.context_length}: change either."
            )
