"""A change of weights as a LoRA adapter in the format of PEFT, which vLLM and llama.cpp read too.

For a layer's W (d × f, as a linear map) an adapter holds B (d × r) and A (r × f) and adds
(lora_alpha / r) · B A. With lora_alpha = r the scale is 1 and B A is Δ, whose rank is at most the
number of edits. Servers want one rank for all layers, and vLLM none above 512.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from memit.errors import InputError
from memit.language_model import LanguageModel
from memit.weight_delta import Dense, LowRank, WeightDelta

LARGEST_RANK = 512
"""vLLM's largest `max_lora_rank`."""
SMALLEST_SHARE = 1e-7
"""Singular values below this share of the largest are rounding errors of float32."""


@dataclass(frozen=True)
class Adapter:
    """Factors of the changes of all edited layers, of one rank."""

    tensors: Mapping[str, Tensor]
    """`<module>.lora_A` (r × f) and `<module>.lora_B` (d × r) of each changed module, float32."""
    rank: int
    error: float
    """‖Δ − B A‖ / ‖Δ‖ of the layer where it is largest (Frobenius)."""
    is_transposed: bool
    """Whether the model stores these weights as f × d, like GPT-2."""

    def save(self, directory: Path, base: str, revision: str | None = None) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`; `base` names the model."""
        named = {f"base_model.model.{name}.weight": t for name, t in self.tensors.items()}
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "revision": revision,
            "r": self.rank,
            "lora_alpha": self.rank,
            "bias": "none",
            "target_modules": sorted({name.rpartition(".")[0] for name in self.tensors}),
            "fan_in_fan_out": self.is_transposed,
            "inference_mode": True,
        }
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(named, directory / "adapter_model.safetensors", {"format": "pt"})


def make_adapter(lm: LanguageModel, delta: WeightDelta, rank: int = LARGEST_RANK) -> Adapter:
    """Factor a delta of down-projections, exactly where `rank` allows, or else by truncated SVD.

    Raises:
        InputError: the delta changes something else.
    """
    layers = {lm.weight_name(layer): layer for layer in lm.editable_layers}
    tensors: dict[str, Tensor] = {}
    parts = {}
    for name, change in delta.changes.items():
        if name not in layers:
            raise InputError(f"the delta changes {name}, for which there is no adapter.")
        is_transposed = lm.is_transposed(layers[name])
        parts[name.removesuffix(".weight")] = _svd(change.transposed() if is_transposed else change)
    ranks = [int((S / S[0] > SMALLEST_SHARE).sum()) for _, S, _ in parts.values()]
    chosen, error = min(rank, max(1, *ranks)), 0.0
    for module, (U, S, V) in parts.items():
        # B = U √S and A = √S Vᵀ, so that both are of one size also in half precision.
        root = S[:chosen].sqrt()
        tensors[f"{module}.lora_A"] = _padded(V[:, :chosen] * root, chosen).T.contiguous()
        tensors[f"{module}.lora_B"] = _padded(U[:, :chosen] * root, chosen)
        error = max(error, float(S[chosen:].norm() / S.norm()))
    transposed = any(map(lm.is_transposed, layers.values()))
    return Adapter(tensors, chosen, error, transposed)


def _svd(change: LowRank | Dense) -> tuple[Tensor, Tensor, Tensor]:
    """U (d × k), S (k) and V (f × k) with Δ = U S Vᵀ, in float64."""
    if isinstance(change, Dense):
        U, S, Vh = torch.linalg.svd(change.delta.double(), full_matrices=False)
        return U, S, Vh.T
    # Δ = Q₁ (R₁ R₂ᵀ) Q₂ᵀ needs the SVD of an n × n matrix alone.
    Q1, R1 = torch.linalg.qr(change.left.double())
    Q2, R2 = torch.linalg.qr(change.right.double())
    U, S, Vh = torch.linalg.svd(R1 @ R2.T)
    return Q1 @ U, S, Q2 @ Vh.T


def _padded(columns: Tensor, rank: int) -> Tensor:
    """float32 with zero columns where there are fewer than `rank`."""
    return torch.nn.functional.pad(columns.float(), (0, rank - columns.shape[1])).contiguous()
