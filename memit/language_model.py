"""A causal language model with its tokenizer, its blocks and their down-projections.

Blocks and down-projections are found by structure: no table of module names per family.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from memit.errors import (
    InputError,
    IntegrityError,
    MemitError,
    ModelStructureError,
    NumericsError,
    UnreachableError,
)
from memit.gguf_file import opened
from memit.model_shape import ModelShape
from memit.placement import device_map, device_of, offloading_hook, read_weight, write_weight

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Number formats of a forward pass; tf32 is float32 with TF32 products on the GPU."""

ROW = 4
"""Tokens of a row whose content does not matter."""


class Router(Protocol):
    """Decides for each prompt whether another model answers it: an edit without changed weights."""

    @property
    def substitute(self) -> LanguageModel:
        """The model that answers routed prompts."""
        ...

    def introductions(self, prompts: Sequence[str]) -> list[str | None]:
        """For each prompt the text that the substitute must read before it, or None where the model
        answers itself."""
        ...


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

        Raises:
            ModelStructureError: it is not a decoder-only stack of blocks with a head.
        """
        model.eval().requires_grad_(False)
        _fuse_activations(model)
        _share_keys_and_values(model)
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
        self.applied: list[Any] = []
        """Edits that are in the weights now, oldest first (`memit.weight_delta.AppliedEdit`)."""
        self.router: Router | None = None
        """Routes some prompts to another model, if an edit set it."""
        head = model.get_output_embeddings()
        if head is None:
            raise ModelStructureError(
                f"{type(model).__name__} has no language-model head; load a causal language model."
            )
        self.head: nn.Module = head
        """The module that turns final hidden states into logits."""

    def __repr__(self) -> str:
        edits = f", {len(self.applied)} edits" if self.applied else ""
        size = f"{self.depth} blocks of width {self.width}"
        return f"LanguageModel({self.name}: {size}, {self.dtype} on {self.device}{edits})"

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
        """Input size f of the first down-projection."""
        return _sizes(self.down_projection(next(iter(self.editable_layers), 0)))[0]

    @property
    def shape(self) -> ModelShape:
        """Its dimensions."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        kind, widths = type(self.model).__name__, (self.width, self.inner_width)
        return ModelShape(self.depth, *widths, parameters, kind, self.has_output_norm)

    @property
    def device(self) -> torch.device:
        """The device of token ids."""
        return device_of(cast(nn.Module, self.model.get_input_embeddings()))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the forward pass runs in."""
        return self.model.dtype

    @property
    def context_length(self) -> int:
        """The longest sequence that the model takes, in tokens."""
        config = self.model.config.get_text_config()
        names = ("max_position_embeddings", "max_seq_len")
        return int(next((length for n in names if (length := getattr(config, n, None))), 2048))

    def check_room(self, ids: Sequence[int], what: str, more: int = 0) -> None:
        """Check that a row of tokens fits the context and the vocabulary.

        The last token is never an input; `more` tokens will be added.

        Raises:
            InputError: the row is too long, or has a token that the model does not know.
        """
        known = cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings
        length = len(ids) - 1 + more
        if length > self.context_length:
            raise InputError(
                f"{what} needs {length} tokens, and {self.name} takes {self.context_length}: "
                "shorten or remove it."
            )
        if max(ids) >= known:
            raise InputError(
                f"the tokenizer gives {what} the token {max(ids)}, and {self.name} knows {known}: "
                "it belongs to another model."
            )

    def routed(self, prompts: Sequence[str]) -> dict[int, str]:
        """Indices of the prompts that the router takes, with the text to put before each.

        This model still answers all prompts, in its usual batches, and the substitute's answers
        replace those of routed ones: so an edit leaves other answers equal to the last bit.
        """
        if self.router is None or not prompts:
            return {}
        found = enumerate(self.router.introductions(prompts))
        return {index: text for index, text in found if text is not None}

    def check_layers(self, layers: tuple[int, ...]) -> None:
        """Check that layers can be edited.

        Raises:
            InputError: a layer does not exist.
            ModelStructureError: a layer has no down-projection.
        """
        for layer in layers:
            self.down_projection(layer)

    def down_projection(self, layer: int) -> nn.Module:
        """The linear module W_out of block `layer` (Eqn. 18)."""
        if not 0 <= layer < self.depth:
            raise InputError(
                f"layer {layer} does not exist: {self.name} has layers 0 to {self.depth - 1}."
            )
        found = self._down_projections[layer]
        if isinstance(found, str):
            others = ", ".join(map(str, self.editable_layers))
            raise ModelStructureError(
                f"layer {layer} ({type(self.blocks[layer]).__name__}) must have exactly one "
                f"down-projection from its MLP to the hidden size {self.width}, but {found} found; "
                "mixtures of experts and blocks without an MLP cannot be edited: choose "
                f"{f'among the layers {others}' if others else 'another model'}."
            )
        return found

    @cached_property
    def _down_projections(self) -> list[nn.Module | str]:
        return [_find_down_projection(block, self.width) for block in self.blocks]

    @cached_property
    def has_output_norm(self) -> bool:
        """Whether a norm follows the down-projection in its block, as in Gemma 2 and 3, OLMo 2 and
        GLM-4. The weights do not matter, which a model without any has none of."""
        layer = next(iter(self.editable_layers), None)
        if layer is None:
            return False
        behind = _run_after(self, self.blocks[layer], self.down_projection(layer))
        return any(_is_norm(module, self.width) for module in behind)

    @property
    def editable_layers(self) -> tuple[int, ...]:
        """The blocks that have one down-projection and no experts."""
        found = enumerate(self._down_projections)
        return tuple(layer for layer, one in found if not isinstance(one, str))

    def mlp_projections(self, layer: int) -> dict[str, nn.Module]:
        """All linear modules of block `layer`'s MLP by the names of their weights: the projections
        up, one or more, then W_out."""
        down = self.down_projection(layer)
        up, _ = _projections(self.blocks[layer], self.width)
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        return {names[id(module.weight)]: module for module in (*up, down)}

    @cached_property
    def mlps(self) -> list[nn.Module | None]:
        """The module of each block that maps hidden states to its MLP's output, if there is one
        that does nothing else."""
        return [
            None if isinstance(down, str) else _find_mlp(block, down)
            for block, down in zip(self.blocks, self._down_projections, strict=True)
        ]

    def weight(self, layer: int) -> Tensor:
        """W_out as d × f, whichever way it is stored; only for reading, see `set_weight`."""
        weight = read_weight(self.down_projection(layer), "weight")
        return weight.T if self.is_transposed(layer) else weight

    def set_weight(self, layer: int, value: Tensor) -> None:
        """Write a d × f tensor into W_out, rounded to the dtype that the model runs in."""
        kept = value.T if self.is_transposed(layer) else value
        write_weight(self.down_projection(layer), "weight", kept)

    def block_device(self, layer: int) -> torch.device:
        """The device that block `layer` computes on."""
        return device_of(self.down_projection(layer))

    @cached_property
    def is_offloaded(self) -> bool:
        """Whether some weights are in memory or on disk until their block runs."""
        return any(offloading_hook(module) is not None for module in self.model.modules())

    def weight_name(self, layer: int) -> str:
        """The name under which the model keeps W_out of block `layer`."""
        wanted = self.down_projection(layer).weight
        return next(name for name, found in self.model.named_parameters() if found is wanted)

    def is_transposed(self, layer: int) -> bool:
        """Whether W_out is kept as f × d."""
        return isinstance(self.down_projection(layer), Conv1D)

    def parameter(self, name: str) -> Tensor:
        """A parameter in the model's orientation.

        Raises:
            InputError: the model has no parameter of that name.
        """
        return read_weight(*self._owner(name))

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Write a parameter, rounded to its dtype.

        Raises:
            InputError: the model has no parameter of that name.
        """
        write_weight(*self._owner(name), value)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
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
    """Load a model and its tokenizer from the hub, a directory or a GGUF file.

    `dtype` is one of `DTYPES`, never the checkpoint's own choice. `device` is a torch device,
    `auto` (a GPU if there is one) or `sharded` (spread over devices by accelerate), where `room`
    limits the bytes of weights on each GPU and on the `cpu`; None measures the free memory. Only
    safetensors and GGUF weights are read and no code from the repository is run.

    Raises:
        InputError: the source is no causal language model, or a setting is not known.
        IntegrityError: weights are missing or damaged.
        NumericsError: a weight or a logit is not finite.
        UnreachableError: the hub does not give the model.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype '{dtype}' is not known; use one of {', '.join(DTYPES)}.")
    name = os.path.expanduser(source)
    is_local = os.path.exists(name)
    if not is_local and (isinstance(source, Path) or name != source or name.endswith(".gguf")):
        raise InputError(f"{name} is not a directory with a model or a GGUF file; give one.")
    placement = device_map(device, room)
    config, tokenizer = read_description(name, revision)
    with reading("weights", name), opened(name) as (place, file):
        load: Any = AutoModelForCausalLM.from_pretrained
        if file:
            placement["quantization_config"] = GgufConfig(dequantize=True)
        model, found = load(
            place,
            config=config,
            revision=revision,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **placement,
            **file,
        )
    if found["missing_keys"]:
        raise IntegrityError(
            f"the weights in {name} lack {min(found['missing_keys'])}, which would be filled at "
            "random: fetch or export them again."
        )
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    commit = getattr(model.config, "_commit_hash", None) or revision
    lm = LanguageModel(model, tokenizer, name=name, revision=None if is_local else commit)
    _check_finite(lm)
    return lm


def read_description(
    source: str | Path, revision: str | None = None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The configuration and the tokenizer of a model; no code from its repository is run.

    Raises:
        InputError: the source is no model, or a quantised one.
        ModelStructureError: it is an encoder-decoder.
        UnreachableError: the hub does not give it.
    """
    if os.path.isdir(source):
        _check_directory(Path(source))
    with reading("configuration", source), opened(source) as (place, file):
        load: Any = AutoConfig.from_pretrained
        config = load(place, revision=revision, trust_remote_code=False, **file)
        _check_config(config, str(source))
        if config._attn_implementation not in ("eager", "sdpa"):
            config._attn_implementation = None  # the library's own choice, which is always here
    with reading("tokenizer", source), opened(source) as (place, file):
        load = AutoTokenizer.from_pretrained
        tokenizer = load(place, revision=revision, trust_remote_code=False, **file)
        if not tokenizer("a b", add_special_tokens=False)["input_ids"]:
            raise ValueError("its files are missing")
    return config, tokenizer


@contextmanager
def reading(part: str, source: str | Path) -> Iterator[None]:
    """Turn any error of loading `part` of a model into one of this project's."""
    try:
        yield
    except (MemitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if type(error).__module__.startswith("safetensors"):
            raise IntegrityError(
                f"the weights in {source} are damaged ({reason}); fetch or export them again."
            ) from error
        message = (
            f"{source} does not hold a causal language model that can be loaded: its {part} cannot "
            f"be used ({reason}); code of its own is not run"
        )
        if os.path.isfile(source):
            raise InputError(f"{message}: use the model's safetensors weights.") from error
        if os.path.isdir(source):
            raise InputError(f"{message}.") from error
        raise UnreachableError(f"{message}; check name, revision and network.") from error


def _check_directory(directory: Path) -> None:
    if (directory / "adapter_config.json").is_file():
        raise InputError(
            f"{directory} is an adapter: merge it into its base first (peft: merge_and_unload)."
        )
    if not (directory / "config.json").is_file():
        below = [*directory.glob("*/config.json"), *directory.glob("*/*/config.json")]
        found = f"{max(below).parent} has one" if below else "it is no model directory"
        for file in directory.glob("*.gguf"):
            found = f"name {file} itself"
        raise InputError(f"{directory} has no config.json: {found}.")


def _check_config(config: PreTrainedConfig, name: str) -> None:
    parts = config, config.get_text_config()
    if any(getattr(part, "quantization_config", None) is not None for part in parts):
        raise InputError(
            f"{name} is quantised (quantization_config in config.json): only floating-point "
            "weights can be edited."
        )
    if config.is_encoder_decoder:
        raise ModelStructureError(
            f"{name} is an encoder-decoder; only decoder-only models are edited."
        )


@torch.no_grad()
def _check_finite(lm: LanguageModel) -> None:
    """Raise `NumericsError` if a weight, or a logit for a short text, is not finite."""
    held = {name: w for name, w in lm.model.named_parameters() if w.numel() and not w.is_meta}
    broken = next((name for name, weight in held.items() if not _is_finite(weight)), None)
    if broken is None:
        vocabulary = lm.model.config.get_text_config().vocab_size
        ids = [token % vocabulary for token in lm.tokenizer("The city of Paris is")["input_ids"]]
        logits = lm.model(input_ids=torch.tensor([ids], device=lm.device), use_cache=False).logits
        if _is_finite(logits.float().logsumexp(-1)):
            return
    is_short = lm.dtype == torch.float16
    way_out = "load it in bfloat16 or float32" if is_short else "fetch or export its weights again"
    what = broken or "its output for a short text"
    raise NumericsError(f"{lm.name} cannot be used: {what} is not finite; {way_out}.")


def _is_finite(tensor: Tensor) -> bool:
    """Only the extremes are tested, which NaN would be: many times as fast as every number."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _fuse_activations(model: PreTrainedModel) -> None:
    """Compute GPT-2's and GPT-J's activation in one kernel: the library's eight operations cost as
    much as the matrix products around them."""
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


def _share_keys_and_values(model: PreTrainedModel) -> None:
    """Let the query heads of a group attend to the same keys and values, of which transformers
    makes a copy for each head where there is a mask: only some GPU kernels need that."""
    if model.device.type == "cpu" and not torch.cuda.is_available():
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


def _find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    config = model.config.get_text_config()
    decoder = cast(nn.Module, model.get_decoder())  # a vision tower may be as deep
    _check_config(model.config, type(model).__name__)
    depth = getattr(config, "num_hidden_layers", None)
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelStructureError(
        f"{type(model).__name__} has no list of {depth} blocks; only stacks of decoder blocks are "
        "edited."
    )


def _find_down_projection(block: nn.Module, width: int) -> nn.Module | str:
    """The only linear module outside attention that maps another width to the hidden size, in a
    block that also has the way up; or the words for the error that tells what was found."""
    names = " ".join(f"{name} {type(part).__name__}" for name, part in block.named_modules())
    if re.search("expert|router", names, re.IGNORECASE):
        return "experts were"
    up, down = _projections(block, width)
    if len(down) != 1:
        return f"{len(down) or 'none'} were"
    return down[0] if up else "one without an input was"


@torch.no_grad()
def _run_after(lm: LanguageModel, block: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The innermost modules of a block that run after one of them, from a run of the model."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, _args: tuple, _output: Any) -> None:
        ran.append(module)

    ids = torch.zeros(1, ROW, dtype=torch.long, device=lm.device)
    # Most families take a mask of four dimensions as it is, and look into one of two, which a model
    # without weights cannot show; the others need none.
    for mask in (torch.zeros(1, 1, ROW, ROW, device=lm.device), None):
        ran.clear()
        with ExitStack() as stack, suppress(Exception):
            for part in block.modules():
                if not any(part.children()):
                    stack.callback(part.register_forward_hook(note).remove)
            lm.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            break
    return ran[ran.index(module) + 1 :] if module in ran else []


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether all weights are vectors of the hidden size."""
    shapes = {weight.shape for weight in module.parameters()}
    return shapes == {torch.Size([width])}


def _find_mlp(block: nn.Module, down: nn.Module) -> nn.Module | None:
    path = next(name for name, module in block.named_modules() if module is down)
    parent = block.get_submodule(path.rpartition(".")[0])
    takes_hidden_alone = len(inspect.signature(parent.forward).parameters) == 1
    return parent if parent is not block and takes_hidden_alone else None


def _projections(block: nn.Module, width: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """The linear modules outside attention that map the hidden size to another, and back."""
    sizes = [(module, *_sizes(module)) for module in _linears_outside_attention(block)]
    up = [module for module, fan_in, fan_out in sizes if fan_in == width != fan_out]
    return up, [module for module, fan_in, fan_out in sizes if fan_out == width != fan_in]


def _linears_outside_attention(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, (nn.Linear, Conv1D)):
        return [module]
    return [
        linear
        for child in module.children()
        if "attention_mask" not in inspect.signature(child.forward).parameters
        for linear in _linears_outside_attention(child)
    ]


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Input and output size."""
    rows, columns = cast(Tensor, linear.weight).shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)
