"""A causal language model together with the places where MEMIT reads and writes it.

The blocks and their down-projections are found by structure: no table of module names per family.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from memit.costs import Shape
from memit.errors import InputError, IntegrityError, ModelStructureError, UnreachableError
from memit.placement import device_map, device_of, is_offloaded, read_weight, write_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memit.routing import Router
    from memit.weight_delta import AppliedDelta

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Numbers that a forward pass runs in; tf32 is float32 with TF32 products on the GPU."""


class LanguageModel:
    """A decoder-only Hugging Face model, its tokenizer, its blocks and their down-projections."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        revision: str | None = None,
    ):
        """Freeze `model` and locate its parts.

        Raises `ModelStructureError` if it is not a decoder-only stack of blocks with a head.
        """
        model.eval().requires_grad_(False)
        _fuse_activations(model)
        self.model = model
        """The Hugging Face model, in evaluation mode, without gradients for its parameters."""
        self.tokenizer = tokenizer
        """Its tokenizer."""
        self.name = name
        """The hub id or the directory that it was loaded from."""
        self.revision = revision
        """The commit of the hub repository, if it came from there."""
        self.blocks = _find_blocks(model)
        """The decoder blocks, in order."""
        self.applied: list[AppliedDelta] = []
        """Deltas that stand in the weights now, oldest first."""
        self.router: Router | None = None
        """What answers some prompts in its place, if an edit put something there."""
        self._down_projections: dict[int, nn.Module] = {}
        self._mlps: dict[int, nn.Module | None] = {}
        self.head = _find_head(model)
        """The module that turns final hidden states into logits."""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Hidden size d."""
        return self.model.config.get_text_config().hidden_size

    @property
    def inner_width(self) -> int:
        """Input size f of the first block's down-projection."""
        return _fan_in(self.down_projection(0))

    @property
    def shape(self) -> Shape:
        """What its costs follow from."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return Shape(self.depth, self.width, self.inner_width, parameters)

    @property
    def device(self) -> torch.device:
        """Where token ids must be put."""
        return device_of(cast(nn.Module, self.model.get_input_embeddings()))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the forward pass runs in."""
        return self.model.dtype

    @property
    def context_length(self) -> int:
        """The longest sequence that the model takes, in tokens."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2048)

    def check_layers(self, layers: tuple[int, ...]) -> None:
        """Raise `InputError` for a layer that does not exist and `ModelStructureError` for one
        without a down-projection."""
        for layer in layers:
            self.down_projection(layer)

    def down_projection(self, layer: int) -> nn.Module:
        """The linear module W_out of block `layer` (Eqn. 18)."""
        if layer in self._down_projections:
            return self._down_projections[layer]
        if not 0 <= layer < self.depth:
            raise InputError(
                f"layer {layer} does not exist: {self.name} has layers 0 to {self.depth - 1}."
            )
        found = _find_down_projection(self.blocks[layer], self.width, f"layer {layer}")
        self._down_projections[layer] = found
        return found

    def mlp_projections(self, layer: int) -> dict[str, nn.Module]:
        """All linear modules of block `layer`'s MLP by the names of their weights: the one or more
        that lead into the wider space, then W_out."""
        down = self.down_projection(layer)
        up = [
            module
            for module in _linears_outside_attention(self.blocks[layer])
            if _fan_in(module) == self.width and _fan_out(module) != self.width
        ]
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        return {names[id(module.weight)]: module for module in (*up, down)}

    def mlp(self, layer: int) -> nn.Module | None:
        """The module of a block that maps hidden states to its MLP's output, if there is one that
        does nothing else."""
        if layer not in self._mlps:
            self._mlps[layer] = self._find_mlp(layer)
        return self._mlps[layer]

    def _find_mlp(self, layer: int) -> nn.Module | None:
        block = self.blocks[layer]
        try:
            down = self.down_projection(layer)
        except ModelStructureError:
            return None
        path = next(name for name, module in block.named_modules() if module is down)
        parent = block.get_submodule(path.rpartition(".")[0])
        takes_hidden_alone = len(inspect.signature(parent.forward).parameters) == 1
        return parent if parent is not block and takes_hidden_alone else None

    def weight(self, layer: int) -> Tensor:
        """W_out as d × f, whichever way it is stored; read it, and write with `set_weight`."""
        weight = read_weight(self.down_projection(layer), "weight")
        return weight.T if self.is_transposed(layer) else weight

    def set_weight(self, layer: int, value: Tensor) -> None:
        """Write a d × f tensor into W_out, rounded to the dtype that the model runs in."""
        kept = value.T if self.is_transposed(layer) else value
        write_weight(self.down_projection(layer), "weight", kept)

    def block_device(self, layer: int) -> torch.device:
        """Where block `layer` computes."""
        return device_of(self.down_projection(layer))

    @cached_property
    def is_offloaded(self) -> bool:
        """Whether some weights wait in memory or on disk until their block runs."""
        return is_offloaded(self.model)

    def weight_name(self, layer: int) -> str:
        """The name under which the model keeps W_out of block `layer`."""
        wanted = self.down_projection(layer).weight
        return next(name for name, found in self.model.named_parameters() if found is wanted)

    def is_transposed(self, layer: int) -> bool:
        """Whether W_out is kept as f × d."""
        return isinstance(self.down_projection(layer), Conv1D)

    def parameter(self, name: str) -> Tensor:
        """A parameter as it is kept; raises `InputError` if the model has none of that name."""
        return read_weight(*self._place(name))

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Write a parameter, rounded to its dtype; raises `InputError` if there is none."""
        write_weight(*self._place(name), value)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module that a parameter belongs to, and its name there."""
        path, _, part = name.rpartition(".")
        try:
            self.model.get_parameter(name)
        except AttributeError as error:
            raise InputError(f"{self.name} has no parameter {name}; use another model.") from error
        return self.model.get_submodule(path), part


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    room: Mapping[int | str, int] | None = None,
) -> LanguageModel:
    """Load a model and its tokenizer from the hub or from a directory.

    `dtype` is one of `DTYPES`, never the checkpoint's own choice. `device` is a torch
    device, `auto` (a GPU if there is one) or `sharded` (spread over devices by accelerate), where
    `room` limits the bytes of weights on each GPU and on the `cpu`; None measures what is free.
    Only safetensors weights are read and no code from the repository is run. Raises `InputError`,
    `IntegrityError` or `UnreachableError`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}' is not known; use one of {', '.join(DTYPES)}.")
    is_local = Path(source).is_dir()
    if not is_local and isinstance(source, Path):
        raise InputError(f"{source} is not a directory with a model; give one that holds it.")
    placement = device_map(device if device == "sharded" else str(_device(device)), room)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
        load: Any = AutoModelForCausalLM.from_pretrained
        model, found = load(
            source,
            revision=revision,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **placement,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _load_error(str(source), is_local, error) from error
    except Exception as error:  # safetensors raises a type of its own for a damaged file
        if type(error).__module__.startswith("safetensors"):
            raise IntegrityError(
                f"the weights in {source} are damaged ({error}); fetch or export them again."
            ) from error
        raise
    if found["missing_keys"]:
        raise IntegrityError(
            f"the weights in {source} lack {min(found['missing_keys'])}, which would be filled at "
            "random: fetch or export them again."
        )
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    commit = getattr(model.config, "_commit_hash", None) or revision
    return LanguageModel(model, tokenizer, name=str(source), revision=None if is_local else commit)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device '{name}' is not known; use auto, cpu, cuda or cuda:N.") from error


def _load_error(source: str, is_local: bool, error: Exception) -> Exception:
    reason = str(error).strip().split("\n")[0]
    if is_local:
        return IntegrityError(
            f"{source} does not hold a model that can be loaded ({reason}); "
            "it needs config.json, a tokenizer and safetensors weights."
        )
    return UnreachableError(
        f"{source} could not be loaded from the hub ({reason}); check the name, the revision and "
        "the network, or download it and give its directory."
    )


def _fuse_activations(model: PreTrainedModel) -> None:
    """Compute GPT-2's and GPT-J's activation at once: the library spells it as eight operations,
    which cost as much as the matrix products around them."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, _TanhGELU())


class _TanhGELU(nn.Module):
    """x · σ(2 √(2/π) (x + 0.044715 x³)), which is GELU in its tanh form."""

    slope = 2 * math.sqrt(2 / math.pi)

    def forward(self, x: Tensor) -> Tensor:
        """One kernel, or on a CPU four that take half its time, which is its tanh's."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
            return nn.functional.gelu(x, approximate="tanh")
        gate = torch.addcmul(x.new_tensor(self.slope), x, x, value=0.044715 * self.slope)
        return gate.mul_(x).sigmoid_().mul_(x)


def _find_head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    if head is None:
        raise ModelStructureError(
            f"{type(model).__name__} has no language-model head; load a causal language model."
        )
    return head


def _find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ModelStructureError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models are edited."
        )
    depth = getattr(config, "num_hidden_layers", None)
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not stacks:
        raise ModelStructureError(
            f"{type(model).__name__} has no list of {depth} blocks; only stacks of decoder blocks "
            "are edited."
        )
    return stacks[0]


def _find_down_projection(block: nn.Module, width: int, where: str) -> nn.Module:
    """The one linear module outside attention that leads from a wider space back to the hidden
    size, in a block that also has one that leads there."""
    linears = _linears_outside_attention(block)
    down = [m for m in linears if _fan_out(m) == width and _fan_in(m) != width]
    up = [m for m in linears if _fan_in(m) == width and _fan_out(m) != width]
    if len(down) != 1 or not up:
        found = "none" if not down else str(len(down)) if len(down) > 1 else "one without an input"
        raise ModelStructureError(
            f"{where} ({type(block).__name__}) must have exactly one down-projection from its MLP "
            f"to the hidden size {width}, but {found} was found; mixtures of experts and blocks "
            "without an MLP cannot be edited: choose other layers or another model."
        )
    return down[0]


def _linears_outside_attention(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, (nn.Linear, Conv1D)):
        return [module]
    return [
        linear
        for child in module.children()
        if "attention_mask" not in inspect.signature(child.forward).parameters
        for linear in _linears_outside_attention(child)
    ]


def _fan_in(module: nn.Module) -> int:
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]  # type: ignore[union-attr]


def _fan_out(module: nn.Module) -> int:
    return module.weight.shape[1 if isinstance(module, Conv1D) else 0]  # type: ignore[union-attr]
