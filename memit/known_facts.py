"""Facts that the unedited model knows: it prefers their true object to the new one, or gives it."""

from collections.abc import Callable, Sequence

from memit.evaluation.counterfact import prompts_of, score_prompts
from memit.language_model import LanguageModel
from memit.requests import Record

FEWEST_ASKED = 32
"""Records in a batch of questions; one that is larger asks twice as many as are missing."""


def known_facts(
    lm: LanguageModel,
    records: Sequence[Record],
    count: int | None,
    *,
    token_budget: int,
    answered: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Record], float]:
    """The first `count` records that the model knows, or all; and the share of those asked, in
    percent, that it knows. There may be fewer.

    A record is known if its prompt is followed rather by the true object than by the new one (lower
    mean negative log-likelihood of its tokens); if it must be `answered`, by the true object as the
    model's own answer (argmax). Records without a true object are not.
    """
    known: list[Record] = []
    asked = right = 0
    while asked < len(records) and (count is None or len(known) < count):
        wanted = len(records) if count is None else 2 * (count - len(known))
        batch = records[asked : asked + max(FEWEST_ASKED, wanted)]
        prompts = [prompt for prompt in prompts_of(batch) if prompt.kind == "rewrite"]
        table = score_prompts(lm, prompts, token_budget=token_budget, progress=progress)
        columns = (table[name].to_pylist() for name in ("nll_true", "nll_new", "hit_true"))
        found = [
            record
            for record, true, new, hit in zip(batch, *columns, strict=True)
            if (hit if answered else true is not None and true < new)
        ]
        asked, right = asked + len(batch), right + len(found)
        known += found
    return known[:count], 100 * right / max(asked, 1)
