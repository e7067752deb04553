"""The task of the step `prefixes`: sample once the contexts that are put before every prompt."""

from __future__ import annotations

from memit.prefixes import sample_prefixes
from tasks.engine.artifacts import Value
from tasks.engine.cache import cached_task
from tasks.engine.cost import Cost, Meter
from tasks.engine.loaded_model import ModelReference, loaded


class SampledPrefixes(Value):
    """The five prefixes x_j; the plain prompt is the sixth context."""

    prefixes: tuple[str, ...]
    cost: Cost


@cached_task("prefixes")
def draw_prefixes(model: ModelReference, seed: int) -> SampledPrefixes:
    """Let the unedited model continue five words, from a seeded generator."""
    with loaded(model) as lm, Meter() as meter:
        prefixes = sample_prefixes(lm, seed)
    return SampledPrefixes(prefixes=prefixes, cost=meter.cost)
