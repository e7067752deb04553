"""Settings of the editors that learn, apart from them because they are read before torch is."""

from dataclasses import dataclass
from typing import Annotated

from memit.ranges import LearningRate, Range, Seed, Steps, check_settings


@dataclass(frozen=True)
class MendSettings:
    """What MEND edits and how it is trained; the defaults are for models of billions of weights."""

    blocks: Annotated[int, Range(1, 1_000)] = 3
    """How many blocks are edited, the last ones of the model."""
    rank: Annotated[int, Range(1, 1_000_000)] = 1_920
    """Of the network's matrices; capped by their size."""
    edits_at_once: Annotated[int, Range(1, 10_000)] = 10
    """Edits of a training step; they are put into the model together."""
    steps: Annotated[int, Range(0, 100_000_000)] = 20_000
    """Of training; a network without any makes plain gradient steps."""
    learning_rate: LearningRate = 1e-6
    """Of the network."""
    rate_learning_rate: Annotated[float, Range(0, 10, exclusive=True)] = 1e-4
    """Of the logarithms of the step sizes."""
    edit_learning_rate: Annotated[float, Range(0, 1_000, exclusive=True)] = 1e-1
    """Each matrix's step size before training."""
    edit_weight: Annotated[float, Range(0, 1_000)] = 0.1
    """Of the edits' nll in the loss; the divergence at unrelated prompts has the weight 1."""
    largest_gradient: Annotated[float, Range(0, 1e12, exclusive=True)] = 100.0
    """Gradients of a larger norm are scaled down to it."""
    examples_for_statistics: Annotated[int, Range(1, 10_000_000)] = 256
    """Edits from whose factors the normalisation is taken."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class SeracSettings:
    """The two small models and their training; the defaults are for models of the hub."""

    encoder: str | None = "distilbert/distilbert-base-cased"
    """The classifier's encoder, from the hub or a directory; None makes a small one."""
    encoder_revision: str | None = None
    counterfactual: str | None = "distilbert/distilgpt2"
    """The counterfactual model, a causal language model; None makes a small one."""
    counterfactual_revision: str | None = None
    width: Annotated[int, Range(8, 16_384)] = 128
    """Hidden size of models that are made here."""
    layers: Annotated[int, Range(1, 128)] = 2
    """Blocks of models that are made here."""
    classifier_steps: Steps = 10_000
    counterfactual_steps: Steps = 10_000
    batch_size: Annotated[int, Range(1, 100_000)] = 32
    """Edits of a training step."""
    learning_rate: LearningRate = 1e-5
    """Of both trainings."""
    warmup_steps: Annotated[int, Range(0, 1_000_000)] = 100
    largest_gradient: Annotated[float, Range(0, 1e12, exclusive=True)] = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_settings(self)
