"""The numbers that a MEMIT edit depends on, and those published for known models."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Literal

from memit.errors import InputError
from memit.model_shape import ModelShape
from memit.ranges import Range, check_settings

Positive = Annotated[float, Range(0, 1e12, exclusive=True)]
Weight = Annotated[float, Range(0, 1e12)]
AUTO: Literal["auto"] = "auto"
GPT_J_BLOCKS = 28
"""The depth of the model whose layers others without a preset take, at the same relative depth."""
RELATIVE_RATE = 0.1
"""Step size for models without a preset, in units of the rms of h: 0.08 is SmolLM2-135M's 0.5."""


@dataclass(frozen=True)
class Hyperparameters:
    """Settings of one edit; the defaults are the paper's for GPT-J (Appendix B)."""

    layers: tuple[int, ...]
    """Edited layers S, ascending; the last one is L, where targets are optimised."""
    covariance_weight: Positive | Literal["auto"]
    """λ in Δ = R Kᵀ (λC + K Kᵀ)⁻¹; `auto`: by the rule of `memit.covariance_weight`."""
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
    """Weight of ‖δ‖ / ‖h‖² in the loss; at down-projections, of the mean of (‖δ‖ / ‖m‖)²."""
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
    largest_update: Positive = 100.0
    """No layer's Δ may exceed this multiple of the norm of its W. Many edits of a small model take
    tens; a second moment that is nearly singular takes any number."""

    def trained_blocks(self, depth: int) -> int:
        """Blocks of a model that an optimisation of targets goes through."""
        return depth - (self.layers[0] if self.site == "down_projections" else self.layers[-1] + 1)

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
        learning_rate=0.15,
        rate_unit="relative",
        evaluations=16,
        clamp_factor=2.0,
        weight_decay=0.1,
        kl_factor=0.3,
    )


@dataclass(frozen=True)
class Preset:
    """Settings for some models, one file of `memit/presets/` each."""

    models: tuple[str, ...]
    """The last parts of their names, in small letters."""
    source: str
    """Who published them, and where."""
    checked: str
    """With which results this project has tried them; empty if it has not."""
    settings: Hyperparameters
    architecture: str = ""
    """The Hugging Face class of these models; empty if only their names count."""
    size: tuple[int, ...] = ()
    """Their blocks, hidden size d and inner size f."""

    def fits(self, shape: ModelShape) -> bool:
        """Whether a model has the architecture and the size of these."""
        size = (shape.depth, shape.width, shape.inner_width)
        return (self.architecture, self.size) == (shape.architecture, size)


@cache
def presets() -> tuple[Preset, ...]:
    """All presets, by the names of their files."""
    folder = files("memit") / "presets"
    return tuple(read_preset(file) for file in sorted(folder.iterdir(), key=lambda f: f.name))


def read_preset(file: Traversable) -> Preset:
    """The preset in a file.

    Raises:
        InputError: it is none.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        settings = content.pop("settings")
        for lists, name in ((settings, "layers"), (content, "models"), (content, "size")):
            lists[name] = tuple(lists.get(name, ()))
        return Preset(settings=Hyperparameters(**settings), **content)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{file} is no preset ({error}): name a file like those that memit tune writes."
        ) from None


def short_name(model_name: str) -> str:
    """The last part of a model's name, in small letters, by which tables know it."""
    return model_name.rstrip("/").split("/")[-1].lower()


def published_layer(layers: Mapping[str, int], model_name: str, depth: int) -> int:
    """The layer of a model of `depth` blocks in a table by `short_name`; of other models the one at
    the relative depth of GPT-J's, or the last one of very few."""
    known = layers.get(short_name(model_name))
    if known is not None and known < depth:
        return known
    return min(round(layers["gpt-j-6b"] * depth / GPT_J_BLOCKS), depth - 1)


def find_preset(model_name: str, shape: ModelShape) -> Preset | None:
    """The preset that names a model, or else one for its architecture and size."""
    known = [one for one in presets() if one.settings.layers[-1] < shape.depth]
    named = [one for one in known if short_name(model_name) in one.models]
    return next(iter(named or [one for one in known if one.fits(shape)]), None)


def preset(model_name: str, shape: ModelShape) -> Hyperparameters:
    """Settings for a model: those of its preset, or else GPT-J's, in layers at the same relative
    depth, λ chosen by rule unless the preset was checked; for the editor `joint` where a norm
    follows the down-projections."""
    known = find_preset(model_name, shape)
    if known is not None:
        settings = known.settings
    else:
        general = next(one for one in presets() if "gpt-j-6b" in one.models).settings
        layers = _layers_at_depth(general.layers, shape.depth)
        settings = replace(
            general, layers=layers, learning_rate=RELATIVE_RATE, rate_unit="relative"
        )
    if known is None or not known.checked:
        settings = replace(settings, covariance_weight=AUTO)
    return joint_settings(settings) if shape.output_norm else settings


def _layers_at_depth(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Consecutive layers where GPT-J has `layers`, at most as many, and not the last block."""
    first, last = (round(layer * depth / GPT_J_BLOCKS) for layer in (layers[0], layers[-1]))
    last = min(last, depth - 2)
    return tuple(range(max(first, last + 1 - len(layers)), last + 1)) or (0,)


def settings_note(model_name: str, shape: ModelShape, settings: Hyperparameters) -> str | None:
    """What is used for a model and why, in one line; None where a checked preset says it.

    `settings` are the model's preset with all that its user has set.
    """
    known, name = find_preset(model_name, shape), short_name(model_name)
    if known is not None and known.checked:
        return None
    if known is None:
        reason = f"{name} has no preset, so what you leave open is GPT-J's, at the same depth"
        if shape.output_norm:
            reason += ", or what joint values take, since a norm follows the down-projections"
    else:
        reason = f"the preset of {name} is from {known.source}, and this project has not checked it"
    return f"{summary(settings)}: {reason}."


def summary(settings: Hyperparameters) -> str:
    """Layers, λ and clamp in words."""
    layers = ", ".join(map(str, settings.layers))
    given = settings.covariance_weight
    weight = "by rule" if given == AUTO else f"{given:,g}"
    editor = "joint values, " if settings.site == "down_projections" else ""
    return f"{editor}layers {layers}, λ {weight}, clamp {settings.clamp_factor:g}"
