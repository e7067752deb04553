"""The task of the step `prefixes`: sample once the contexts that are put before every prompt."""

from memit.prefixes import sample_prefixes
from tasks.engine.cache import cached_task
from tasks.engine.loaded_model import ModelReference, loaded


@cached_task("prefixes")
def draw_prefixes(model: ModelReference, seed: int) -> list[str]:
    """The five prefixes x_j: how the unedited model continues five words, from a seeded generator;
    the plain prompt is the sixth context."""
    with loaded(model) as lm:
        return list(sample_prefixes(lm, seed))
