"""Partial forward passes: start above a block, stop after a block, ask the head at few positions.

Everything goes through the model's own forward method, with hooks on its blocks and its head, so
that masks, positions, scales and caps stay the model's own. Rows are padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.cache_utils import Cache

from memit.forward.key_values import KeyValues
from memit.language_model import LanguageModel
from memit.positions import TokenRow

WORTH_PACKING = 0.9
"""Above this share of real positions, leaving out the others costs as much as it saves."""


@dataclass(frozen=True)
class Padded:
    """Token rows padded on the right to a rectangle."""

    ids: Tensor
    """Token ids (rows × tokens)."""
    mask: Tensor
    """1 for a token, 0 for padding (rows × tokens)."""

    def __getitem__(self, index: Tensor | slice | tuple[slice, slice]) -> Padded:
        return Padded(self.ids[index], self.mask[index])


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> Padded:
    """Pad token rows on the right; the padding's ids are masked, so they do not matter."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *([0] * (width - len(row)))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    columns = torch.arange(width, device=device)
    return Padded(ids, (columns[None] < lengths[:, None]).long())


def target_positions(
    rows: Sequence[TokenRow], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and next token of every position that predicts a target's token (k each)."""
    # The logits at a position predict the token after it; a row's first token has none before it.
    found = [(i, at - 1, row.ids[at]) for i, row in enumerate(rows) for at in row.target if at]
    owner, columns, wanted = torch.tensor(found, device=device).T
    return owner, columns, wanted


# --- hooks -----------------------------------------------------------------------------------


class _Stopped(Exception):
    """Leaves the model's forward method after the last wanted module."""


def _stop(*_args: Any) -> None:
    raise _Stopped


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _starting_at(lm: LanguageModel, start: int, hidden: Tensor) -> Iterator[None]:
    """Skip the blocks below `start`, and let `hidden` enter block `start`."""

    def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    with (
        _with_forward(lm.blocks[:start], lambda block: _pass_through),
        lm.blocks[start].register_forward_pre_hook(enter, with_kwargs=True),
    ):
        yield


@contextmanager
def recomputing(lm: LanguageModel, start: int) -> Iterator[None]:
    """Recompute blocks from `start` on in the backward pass if weights are offloaded: otherwise the
    graph would keep the weights of all blocks on the device at once."""
    if not lm.is_offloaded:
        yield
        return

    def checkpointed(block: nn.Module) -> Callable[..., Any]:
        return partial(checkpoint, block.forward, use_reentrant=False)

    # The hooks that send weights away again must see the end of each module.
    with set_checkpoint_early_stop(False), _with_forward(lm.blocks[start:], checkpointed):
        yield


@contextmanager
def attending_in_steps(lm: LanguageModel) -> Iterator[None]:
    """Compute attention by matrix products and a softmax on CPUs in bf16, where the backward pass
    of torch's one kernel takes nine times as long."""
    before = lm.model.config._attn_implementation
    if lm.device.type != "cpu" or lm.dtype != torch.bfloat16 or before != "sdpa":
        yield
        return
    lm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(before)


@contextmanager
def _with_forward(
    blocks: Iterable[nn.Module], forward: Callable[[nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the forward method of some blocks inside the context."""
    kept = [(block, block.__dict__.get("forward")) for block in blocks]
    for block, _ in kept:
        block.forward = forward(block)
    try:
        yield
    finally:
        for block, own in kept:
            del block.forward
            if own is not None:  # accelerate keeps a forward of its own on the instance
                block.forward = own


def _pass_through(*args: Any, **kwargs: Any) -> tuple:
    # A tuple serves blocks that return tensors, too: block `start` replaces what it is given.
    return (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],)


@contextmanager
def reading_keys(lm: LanguageModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the inputs of some blocks' down-projections (rows·tokens × f) during a forward."""
    found: dict[int, Tensor] = {}

    def read(layer: int, _module: nn.Module, args: tuple) -> None:
        found[layer] = args[0].reshape(-1, args[0].shape[-1])

    with ExitStack() as stack:
        for layer in layers:
            module = lm.down_projection(layer)
            stack.enter_context(module.register_forward_pre_hook(partial(read, layer)))
        yield found


@contextmanager
def changing_module(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the hidden states that leave a module by `change` of them."""

    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        hidden = change(_hidden_of(output))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with module.register_forward_hook(hook):
        yield


@contextmanager
def reading_module(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the hidden states that leave a module, one tensor for each run of it."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
        found.append(_hidden_of(output))

    with module.register_forward_hook(hook):
        yield found


@contextmanager
def entering_block(lm: LanguageModel, layer: int) -> Iterator[list[Tensor]]:
    """Collect the hidden states that enter a block, one tensor for each run of it."""
    found: list[Tensor] = []

    def read(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    with lm.blocks[layer].register_forward_pre_hook(read, with_kwargs=True):
        yield found


@contextmanager
def mlp_at(lm: LanguageModel, layer: int, rows: Tensor, columns: Tensor) -> Iterator[list[Tensor]]:
    """Run a block's MLP at chosen positions only, where nothing reads the others.

    Yields a list that gets the chosen flat positions, ascending and without repetition, each time
    the MLP runs so; keys read meanwhile have one row for each of them. The MLP runs on all
    positions, and the list stays empty, if the block has other hooks, may be recomputed, or gives
    its MLP anything but rows × tokens × d.
    """
    chosen: list[Tensor] = []
    mlp = lm.mlps[layer]
    if (
        mlp is None
        or lm.is_offloaded
        or any(m._forward_hooks or m._forward_pre_hooks for m in (lm.blocks[layer], *mlp.modules()))
    ):
        yield chosen
        return
    shape: list[torch.Size] = []

    def choose(_module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        if hidden.ndim != 3:
            return args
        flat = rows.to(hidden.device) * hidden.shape[1] + columns.to(hidden.device)
        shape.append(hidden.shape)
        chosen.append(torch.unique(flat))
        return (hidden.reshape(-1, hidden.shape[-1])[chosen[-1]][None], *args[1:])

    def put_back(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        if not chosen:
            return output
        whole = output.new_zeros(shape[-1]).reshape(-1, output.shape[-1])
        return whole.index_copy(0, chosen[-1], output[0]).reshape(shape[-1])

    with mlp.register_forward_pre_hook(choose), mlp.register_forward_hook(put_back):
        yield chosen


@contextmanager
def _without_padding(lm: LanguageModel, padded: Padded, layers: Iterable[int]) -> Iterator[None]:
    """Run the MLPs of some blocks at real positions only, if enough positions are padding: most of
    the work is there, and no position reads another one's MLP."""
    rows, columns = padded.mask.nonzero(as_tuple=True)
    with ExitStack() as stack:
        if len(rows) < WORTH_PACKING * padded.mask.numel():
            for layer in layers:
                stack.enter_context(mlp_at(lm, layer, rows, columns))
        yield


# --- passes ----------------------------------------------------------------------------------


def _inputs(
    lm: LanguageModel,
    padded: Padded,
    hidden: Tensor | None,
    before: KeyValues | None,
    record: Cache | None,
) -> dict[str, Any]:
    """Arguments of the model's forward method."""
    inputs: dict[str, Any] = {"attention_mask": padded.mask, "use_cache": False}
    if hidden is None:
        inputs["input_ids"] = padded.ids
    else:
        # Never read, since `hidden` replaces them, but the model checks their shape.
        width = cast(nn.Embedding, lm.model.get_input_embeddings()).embedding_dim
        device = padded.ids.device
        inputs["inputs_embeds"] = hidden.new_zeros(*padded.ids.shape, width, device=device)
    if before is not None:
        # Column c of a row that continues n positions is position n + c of its text.
        columns = torch.arange(padded.ids.shape[1], device=padded.ids.device)
        lengths = before.lengths.to(columns.device)
        positions = lengths[:, None] + columns[None]
        # Only padding is beyond the context.
        inputs["position_ids"] = positions.clamp(max=lm.context_length - 1)
        inputs["attention_mask"] = torch.cat([before.mask().to(columns.device), padded.mask], 1)
        inputs |= {"past_key_values": before.cache(), "use_cache": True}
    if record is not None:
        inputs |= {"past_key_values": record, "use_cache": True}
    return inputs


def block_output(
    lm: LanguageModel,
    padded: Padded,
    stop: int,
    *,
    start: int = 0,
    hidden: Tensor | None = None,
    before: KeyValues | None = None,
    record: Cache | None = None,
) -> Tensor:
    """Hidden states that leave block `stop` (rows × tokens × d); no block above it runs.

    `hidden` (rows × tokens × d), if given, enters block `start`, and no block below it runs.
    """
    with ExitStack() as stack:
        if hidden is not None:
            stack.enter_context(_starting_at(lm, start, hidden))
        result = stack.enter_context(reading_module(lm.blocks[stop]))
        stack.enter_context(lm.blocks[stop].register_forward_hook(_stop))
        stack.enter_context(suppress(_Stopped))
        lm.model.base_model(**_inputs(lm, padded, hidden, before, record))
    return result[0]


def keys_of(lm: LanguageModel, padded: Padded, layers: Sequence[int]) -> dict[int, Tensor]:
    """Inputs of some blocks' down-projections (rows·tokens × f); nothing after the last runs."""
    with ExitStack() as stack:
        found = stack.enter_context(reading_keys(lm, layers))
        last = lm.down_projection(max(layers))
        stack.enter_context(last.register_forward_pre_hook(_stop))
        stack.enter_context(suppress(_Stopped))
        lm.model.base_model(**_inputs(lm, padded, None, None, None))
    return found


def logits_at(
    lm: LanguageModel,
    padded: Padded,
    rows: Tensor,
    columns: Tensor,
    *,
    start: int = 0,
    hidden: Tensor | None = None,
    before: KeyValues | None = None,
    record: Cache | None = None,
) -> Tensor:
    """Float32 logits at chosen positions (k × vocabulary), given by row and column (k each).

    `hidden`, if given, enters block `start`; the rows continue the positions of `before`;
    `record`, an empty cache, gets the keys and values of this pass.
    """

    def choose(_module: nn.Module, args: tuple) -> tuple:
        # The head sees the chosen positions only, as one row (1 × k × d).
        return (args[0][rows.to(args[0].device), columns.to(args[0].device)][None],)

    with ExitStack() as stack:
        if hidden is not None:
            stack.enter_context(_starting_at(lm, start, hidden))
        stack.enter_context(lm.head.register_forward_pre_hook(choose))
        stack.enter_context(_without_padding(lm, padded, range(start, lm.depth - 1)))
        stack.enter_context(mlp_at(lm, lm.depth - 1, rows, columns))
        output = lm.model(**_inputs(lm, padded, hidden, before, record))
    return output.logits[0].float()


def final_states(lm: LanguageModel, padded: Padded, rows: Tensor, columns: Tensor) -> Tensor:
    """Hidden states that leave the last block at chosen positions (k × d), given by row and column
    (k each)."""
    hidden = block_output(lm, padded, lm.depth - 1)
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]


def logits_of(lm: LanguageModel, states: Tensor) -> Tensor:
    """Float32 logits (k × vocabulary) of states that have left the last block (k × d)."""
    states, rows = states[:, None].to(lm.device), torch.arange(len(states))
    padded, columns = pad([[0]] * len(rows), lm.device), torch.zeros_like(rows)
    # The last block alone is run, since families differ in what a block returns.
    with changing_module(lm.blocks[-1], lambda _hidden: states):
        return logits_at(lm, padded, rows, columns, start=lm.depth - 1, hidden=states)
