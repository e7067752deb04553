"""What a model can do, found by trying: no list of families could be complete."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from memit.forward.key_values import Recorder
from memit.forward.passes import Padded, logits_at, pad, reading_module
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
def _resumes(lm: LanguageModel, start: int) -> bool:
    """Whether the last three positions of each row give the same logits from block `start` on."""
    vocabulary = lm.model.config.get_text_config().vocab_size
    rows = [[(7 * index + 3) % vocabulary for index in range(length)] for length in (5, 7)]
    padded = pad(rows, lm.device)
    first = torch.tensor([2, 4], device=lm.device)
    which, columns = torch.tensor([0, 1]), torch.tensor([4, 6])
    whole = lm.model(input_ids=padded.ids, attention_mask=padded.mask, use_cache=False)
    expected = whole.logits[which, columns].float()
    recorder = Recorder(lm, start)
    with reading_module(lm.blocks[max(0, start - 1)]) as entering:
        logits_at(lm, padded, which, columns, recorder=recorder)
    positions = first[:, None] + torch.arange(3, device=lm.device)[None]
    hidden = entering[0][torch.tensor([[0], [1]]), positions.to(entering[0].device)]
    resumed = logits_at(
        lm,
        Padded(padded.ids.gather(1, positions), padded.mask.gather(1, positions)),
        which,
        columns - first.cpu(),
        start=start,
        hidden=hidden if start > 0 else None,
        before=recorder.before(first),
    )
    tolerance = 1e-4 if lm.dtype == torch.float32 else 0.05
    return bool((resumed - expected).norm() <= tolerance * expected.norm())
