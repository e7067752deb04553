"""Eight bits: few levels for each output, the nearest ones, and nothing else changes."""

import pytest
import torch

from memit.rounding import LEVELS, round_to_int8
from tests.reference import build


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_output_has_few_levels(family: str):
    lm = build(family)
    lm.set_weight(1, torch.cat([torch.zeros(1, lm.inner_width), lm.weight(1)[1:]]))
    before = lm.weight(1).clone()
    others = {n: w.clone() for n, w in lm.model.named_parameters() if w.ndim == 1 or "emb" in n}
    round_to_int8(lm)
    for row, rounded in zip(before, lm.weight(1), strict=True):
        step = row.abs().max() / LEVELS
        assert (row - rounded).abs().max() <= step / 2 * (1 + 1e-5)
        levels = rounded / step if step else rounded
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert all(torch.equal(lm.model.get_parameter(name), value) for name, value in others.items())
