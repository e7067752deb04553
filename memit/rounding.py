"""Weights as they are after storage in eight bits."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from memit.language_model import LanguageModel

LEVELS = 127
"""The largest integer; the smallest is its negative."""


@torch.no_grad()
def round_to_int8(lm: LanguageModel) -> None:
    """Round the matrices of all blocks to integers times one scale for each output, which makes
    its largest weight `LEVELS`; computation stays in the model's dtype, as in quantised serving of
    weights alone."""
    for module in lm.blocks.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            inputs = 0 if isinstance(module, Conv1D) else 1
            weight = module.weight
            scale = weight.abs().amax(inputs, keepdim=True).clamp(min=1e-12) / LEVELS
            weight.copy_((weight / scale).round() * scale)
