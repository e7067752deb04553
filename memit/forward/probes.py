"""What a model can do, found by trying: no list of families could be complete."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from memit.forward.key_values import recorded
from memit.forward.passes import (
    Padded,
    block_output,
    changing_module,
    logits_at,
    pad,
    reading_module,
)
from memit.language_model import LanguageModel

_RESUMABLE: WeakKeyDictionary[LanguageModel, bool] = WeakKeyDictionary()


def can_resume(lm: LanguageModel) -> bool:
    """Whether passes that start at a block, or continue recorded keys and values, give the logits
    of whole ones; tried once for each model, on two short rows."""
    if lm not in _RESUMABLE:
        try:
            _RESUMABLE[lm] = all(_resumes(lm, start) for start in {0, lm.depth // 2})
        except Exception:  # whatever an unknown family raises, whole passes still work
            _RESUMABLE[lm] = False
    return _RESUMABLE[lm]


@torch.no_grad()
def output_factor(lm: LanguageModel, layer: int) -> float | None:
    """The c with which a block adds its down-projection's output, as Granite does (4 digits); None
    where a norm or anything else makes the block's output no multiple of it."""
    padded = pad([_ids(lm, 5)], lm.device)
    size: list[Tensor] = []

    def output(moved: bool) -> Tensor:
        def change(states: Tensor) -> Tensor:
            size.append(states.float().square().mean().sqrt())
            direction = torch.linspace(-2, 2, states.shape[-1], device=states.device)
            return states + (moved * size[0] * direction).to(states.dtype)

        with changing_module(lm.down_projection(layer), change):
            return block_output(lm, padded, layer).float()

    difference = output(True) - output(False)
    direction = size[0] * torch.linspace(-2, 2, lm.width, device=difference.device)
    expected = direction.expand_as(difference)
    factor = float((difference * expected).sum() / expected.square().sum())
    tolerance = 1e-3 if lm.dtype == torch.float32 else 0.05
    if (difference - factor * expected).norm() > tolerance * difference.norm():
        return None
    return 1.0 if abs(factor - 1) < tolerance else round(factor, 4)


def _ids(lm: LanguageModel, length: int) -> list[int]:
    vocabulary = lm.model.config.get_text_config().vocab_size
    return [(7 * index + 3) % vocabulary for index in range(length)]


@torch.no_grad()
def _resumes(lm: LanguageModel, start: int) -> bool:
    """Whether the last three positions of each row give the same logits from block `start` on."""
    padded = pad([_ids(lm, 5), _ids(lm, 7)], lm.device)
    first = torch.tensor([2, 4], device=lm.device)
    which, columns = torch.tensor([0, 1]), torch.tensor([4, 6])
    whole = lm.model(input_ids=padded.ids, attention_mask=padded.mask, use_cache=False)
    expected = whole.logits[which, columns].float()
    cache = DynamicCache()
    with reading_module(lm.blocks[max(0, start - 1)]) as entering:
        logits_at(lm, padded, which, columns, record=cache)
    positions = first[:, None] + torch.arange(3, device=lm.device)[None]
    hidden = entering[0][torch.tensor([[0], [1]]), positions.to(entering[0].device)]
    resumed = logits_at(
        lm,
        Padded(padded.ids.gather(1, positions), padded.mask.gather(1, positions)),
        which,
        columns - first.cpu(),
        start=start,
        hidden=hidden if start > 0 else None,
        before=recorded(cache, start, first),
    )
    tolerance = 1e-4 if lm.dtype == torch.float32 else 0.05
    return bool((resumed - expected).norm() <= tolerance * expected.norm())
