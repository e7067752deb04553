"""The numbers that a MEMIT edit depends on, and those published for known models."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

from memit.errors import InputError
from memit.ranges import Range, check_settings

Positive = Annotated[float, Range(0, 1e12, exclusive=True)]
Weight = Annotated[float, Range(0, 1e12)]
RELATIVE_RATE = 0.1
"""Step size for models without a preset, in units of the rms of h: 0.08 is SmolLM2-135M's 0.5."""


@dataclass(frozen=True)
class Hyperparameters:
    """Settings of one edit; the defaults are the paper's for GPT-J (Appendix B)."""

    layers: tuple[int, ...]
    """Edited layers S, ascending; the last one is L, where targets are optimised."""
    covariance_weight: Positive
    """λ in Δ = R Kᵀ (λC + K Kᵀ)⁻¹."""
    evaluations: Annotated[int, Range(1, 10_000)] = 25
    """Most evaluations of the loss for a target; one fewer updates."""
    learning_rate: Positive = 0.5
    """Adam's step size for δ, in units of `rate_unit`."""
    rate_unit: Literal["absolute", "relative"] = "absolute"
    """`absolute`: the units of h; `relative`: the root mean square of h's numbers, of which models
    of different families differ a hundredfold."""
    clamp_factor: Positive = 0.75
    """δ is kept within this multiple of ‖h‖."""
    weight_decay: Weight = 0.5
    """Weight of ‖δ‖ / ‖h‖² in the loss."""
    kl_factor: Weight = 0.0625
    """Weight of the divergence at "{subject} is a" in the loss."""
    loss_threshold: Weight = 0.05
    """An edit stops, before updating, once its total loss is below this."""
    argmax_stop: Annotated[int, Range(0, 10_000)] = 0
    """An edit also stops, before updating, once in so many evaluations each token of its object was
    the most likely one in all of its rows (ENCORE); 0: it does not."""
    site: Literal["block", "down_projections"] = "block"
    """Where targets are: `block`, the output of block L (MEMIT), which must take down-projections'
    outputs as they are; `down_projections`, those of all edited layers at once (`joint`)."""
    key_average: Literal["nested", "uniform"] = "nested"
    """`nested`: plain prompt and mean of prefixed ones count half each (published code); `uniform`:
    all rows count alike (Eqn. 19 as printed)."""
    largest_update: Positive = 1_000.0
    """No layer's Δ may exceed this multiple of the norm of its W. Many edits of a small model take
    tens; a second moment that is nearly singular takes any number."""

    def __post_init__(self) -> None:
        check_settings(self)
        layers = list(self.layers)
        if not layers or layers[0] < 0 or layers != sorted(set(layers)):
            raise InputError(f"layers is {layers}: name each layer once, in ascending order.")


def joint_settings(settings: Hyperparameters) -> Hyperparameters:
    """The same layers and λ for the editor `joint`, which optimises something else; settings that
    are its own already stay."""
    if settings.site == "down_projections":
        return settings
    return replace(
        settings,
        site="down_projections",
        learning_rate=0.3,
        rate_unit="relative",
        evaluations=12,
        clamp_factor=2.0,
        weight_decay=0.1,
    )


@dataclass(frozen=True)
class Preset:
    """Settings for some models, one file of `memit/presets/` each."""

    models: tuple[str, ...]
    """The last parts of their names, in small letters."""
    source: str
    """Who published them, and where."""
    checked: str
    """By whom they were tried, and with which results."""
    settings: Hyperparameters


@cache
def presets() -> dict[str, Preset]:
    """All presets, by the models' names."""
    found: dict[str, Preset] = {}
    for file in sorted((files("memit") / "presets").iterdir(), key=lambda file: file.name):
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        layers = tuple(content["settings"].pop("layers"))
        settings = Hyperparameters(layers, **content.pop("settings"))
        one = Preset(tuple(content.pop("models")), settings=settings, **content)
        found |= dict.fromkeys(one.models, one)
    return found


def short_name(model_name: str) -> str:
    """The last part of a model's name, in small letters, by which tables know it."""
    return model_name.rstrip("/").split("/")[-1].lower()


def published_layer(layers: Mapping[str, int], model_name: str, depth: int) -> int:
    """The layer of a model of `depth` blocks in a table by `short_name`; of other models the one at
    the relative depth of GPT-J's."""
    known = layers.get(short_name(model_name))
    return known if known is not None and known < depth else round(layers["gpt-j-6b"] * depth / 28)


def preset(model_name: str, depth: int) -> Hyperparameters:
    """Settings for a model of `depth` blocks: the published ones where its name is known; else
    GPT-J's with its layers at the same relative depth."""
    known = presets().get(short_name(model_name))
    if known is not None and known.settings.layers[-1] < depth:
        return known.settings
    general = replace(
        presets()["gpt-j-6b"].settings, learning_rate=RELATIVE_RATE, rate_unit="relative"
    )
    layers = sorted({round(layer * depth / 28) for layer in general.layers})
    return replace(general, layers=tuple(layer for layer in layers if layer < depth - 1) or (0,))
