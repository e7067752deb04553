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
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.cache_utils import Cache, DynamicLayer

from memit.language_model import LanguageModel


@dataclass(frozen=True)
class Padded:
    """Token rows padded on the right to a rectangle."""

    ids: Tensor
    """Token ids (rows × tokens)."""
    mask: Tensor
    """1 for a token, 0 for padding (rows × tokens)."""

    def __getitem__(self, rows: Tensor | slice) -> Padded:
        return Padded(self.ids[rows], self.mask[rows])


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> Padded:
    """Put token rows into a rectangle; the padding's ids do not matter since they are masked."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *([0] * (width - len(row)))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    places = torch.arange(width, device=device)
    return Padded(ids, (places[None] < lengths[:, None]).long())


@dataclass(frozen=True)
class Branched:
    """Rows of tokens in which several continuations stand one behind the other, each as if it alone
    followed what they share."""

    ids: Tensor
    """Token ids (rows × tokens)."""
    positions: Tensor
    """Each token's place in its own text (rows × tokens)."""
    visible: Tensor
    """Whether a token (second axis) may look at another (third) (rows × tokens × tokens)."""

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to attention scores (rows × 1 × tokens × keys, see `_AlignedLayer`)."""
        visible = functional.pad(self.visible, (0, _AlignedLayer.missing(self.ids.shape[1])))
        zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return zeros.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def branch(
    stems: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]], device: torch.device
) -> Branched:
    """Put each stem and its tails into a row of a rectangle."""
    rows = []
    for stem, own in zip(stems, tails, strict=True):
        places = [(token, place, 0) for place, token in enumerate(stem)]
        places += [
            (token, place, number)
            for number, tail in enumerate(own, start=1)
            for place, token in enumerate(tail, start=len(stem))
        ]
        rows.append(places)
    width = max(len(row) for row in rows)
    table = torch.tensor([row + [(0, 0, -1)] * (width - len(row)) for row in rows], device=device)
    ids, positions, branches = table.unbind(2)
    before = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    of_key, of_query = branches[:, None, :], branches[:, :, None]
    return Branched(ids, positions, before & ((of_key == 0) | (of_key == of_query)))


# --- what stands before the computed positions -----------------------------------------------


class _RecordedLayer(DynamicLayer):
    """Keys and values of one attention layer as they were computed."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0  # nothing stands before what is recorded


class _IgnoredLayer(DynamicLayer):
    """A layer of which nothing is kept."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        return key_states, value_states


class _AlignedLayer(_IgnoredLayer):
    """A layer whose keys and values are filled up, behind a mask, to a number that processors take
    in whole steps: attention with a mask is twice as fast then."""

    keys_at_once = 16

    @classmethod
    def missing(cls, length: int) -> int:
        """How many are filled up."""
        return -length % cls.keys_at_once

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        more = (0, 0, 0, self.missing(key_states.shape[-2]))
        return functional.pad(key_states, more), functional.pad(value_states, more)


class _FrozenLayer(DynamicLayer):
    """Constant keys and values of earlier positions; what is computed after them is not kept."""

    def __init__(self, keys: Tensor | None, values: Tensor | None, length: int):
        super().__init__()
        self.keys, self.values = keys, values
        self.length = length
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        assert self.keys is not None
        assert self.values is not None
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers before 5.2 hands over the positions themselves
        queries = query_length if isinstance(query_length, int) else len(query_length)
        return self.length + queries, 0


@dataclass(frozen=True)
class KeyValues:
    """Attention keys and values of positions before the computed ones, for blocks from `start` on.

    They are aligned to the right, so that distances between positions are those of the text and a
    model's sliding window keeps its meaning.
    """

    start: int
    """The first block that they are held for."""
    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each block from `start` on (rows × heads × positions × head size)."""
    lengths: Tensor
    """How many of the positions are real in each row (rows)."""

    @property
    def positions(self) -> int:
        """Number of positions, alignment included."""
        return self.layers[0][0].shape[2]

    def select(self, rows: Tensor) -> KeyValues:
        """Those of some rows, in the given order; a row may be taken several times."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        cut = self.positions - longest
        layers = tuple(
            (k[rows.to(k.device), :, cut:], v[rows.to(v.device), :, cut:]) for k, v in self.layers
        )
        return KeyValues(self.start, layers, lengths)

    def between(self, start: int, stop: int) -> KeyValues:
        """Those for blocks from `start` to `stop`."""
        layers = self.layers[start - self.start : stop + 1 - self.start]
        return KeyValues(start, layers, self.lengths)

    def cache(self) -> Cache:
        """A cache that puts them in front of whatever is computed."""
        length = self.positions
        below = [_FrozenLayer(None, None, length) for _ in range(self.start)]
        held = [_FrozenLayer(keys, values, length) for keys, values in self.layers]
        layers: list[Any] = [*below, *held]
        return Cache(layers=layers)

    def mask(self) -> Tensor:
        """1 where a position is real (rows × positions)."""
        places = torch.arange(self.positions, device=self.lengths.device)
        return (places[None] >= self.positions - self.lengths[:, None]).long()


class Recorder:
    """Records the attention keys and values of blocks from `start` on during a forward pass."""

    def __init__(self, lm: LanguageModel, start: int):
        self.start = start
        self.layers: list[Any] = [_IgnoredLayer() for _ in range(start)]
        self.layers += [_RecordedLayer() for _ in range(start, lm.depth)]

    def cache(self) -> Cache:
        """The cache to hand to the forward pass."""
        return Cache(layers=self.layers)

    def before(self, lengths: Tensor) -> KeyValues:
        """Keys and values of each row's first `lengths` positions (rows), for the blocks that were
        run."""
        longest, shortest = int(lengths.max()), int(lengths.min())
        if longest == shortest:
            return KeyValues(self.start, self._cut(longest), lengths)
        places = torch.arange(longest, device=lengths.device)
        source = (places[None] - (longest - lengths[:, None])).clamp(min=0)
        held = tuple(
            (_gather(layer.keys, source), _gather(layer.values, source))
            for layer in self.layers[self.start :]
            if layer.is_initialized
        )
        return KeyValues(self.start, held, lengths)

    def _cut(self, length: int) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple(
            (layer.keys[:, :, :length], layer.values[:, :, :length])
            for layer in self.layers[self.start :]
            if layer.is_initialized
        )


def _gather(states: Tensor | None, source: Tensor) -> Tensor:
    assert states is not None
    rows = torch.arange(len(source), device=states.device)[:, None]
    return states.transpose(1, 2)[rows, source.to(states.device)].transpose(1, 2).contiguous()


# --- hooks -----------------------------------------------------------------------------------


class _Stopped(Exception):
    """Leaves the model's forward method once the last wanted block has run."""


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _starting_at(lm: LanguageModel, start: int, hidden: Tensor) -> Iterator[None]:
    """Skip the blocks below `start`, and let `hidden` enter block `start`."""

    def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    with (
        _with_forward(lm.blocks[:start], lambda block: _pass_through),
        _hook(lm.blocks[start].register_forward_pre_hook(enter, with_kwargs=True)),
    ):
        yield


@contextmanager
def recomputing(lm: LanguageModel, start: int) -> Iterator[None]:
    """Run blocks from `start` on again in the backward pass where weights wait outside the device:
    otherwise the graph would hold those of all of them at once."""
    if not lm.is_offloaded:
        yield
        return

    def checkpointed(block: nn.Module) -> Callable[..., Any]:
        return partial(checkpoint, block.forward, use_reentrant=False)

    # The hooks that send weights away again must see the end of each module.
    with set_checkpoint_early_stop(False), _with_forward(lm.blocks[start:], checkpointed):
        yield


@contextmanager
def _with_forward(
    blocks: Iterable[nn.Module], forward: Callable[[nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Give blocks another forward method for a while."""
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
    # A tuple serves blocks of either kind: what arrives at `start` is replaced there.
    return (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],)


@contextmanager
def reading_outputs(lm: LanguageModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the hidden states that leave some blocks (rows × tokens × d) during a forward."""
    found: dict[int, Tensor] = {}

    def read(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            found[layer] = _hidden_of(output)

        return hook

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_hook(lm.blocks[layer].register_forward_hook(read(layer))))
        yield found


@contextmanager
def reading_keys(lm: LanguageModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the inputs of some blocks' down-projections (rows·tokens × f) during a forward."""
    found: dict[int, Tensor] = {}

    def read(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple) -> None:
            found[layer] = args[0].reshape(-1, args[0].shape[-1])

        return hook

    with ExitStack() as stack:
        for layer in layers:
            module = lm.down_projection(layer)
            stack.enter_context(_hook(module.register_forward_pre_hook(read(layer))))
        yield found


@contextmanager
def changing_module(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the hidden states that leave a module by `change` of them."""

    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        return _with_hidden(output, change(_hidden_of(output)))

    with _hook(module.register_forward_hook(hook)):
        yield


@contextmanager
def reading_module(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the hidden states that leave a module, one tensor for each time that it runs."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
        found.append(_hidden_of(output))

    with _hook(module.register_forward_hook(hook)):
        yield found


@contextmanager
def _stopping_after(lm: LanguageModel, layer: int) -> Iterator[list[Tensor]]:
    result: list[Tensor] = []

    def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
        result.append(_hidden_of(output))
        raise _Stopped

    with _hook(lm.blocks[layer].register_forward_hook(hook)), suppress(_Stopped):
        yield result


@contextmanager
def _head_at(lm: LanguageModel, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Let the head see the chosen positions only, as one row."""

    def choose(_module: nn.Module, args: tuple) -> tuple:
        return (args[0][rows.to(args[0].device), columns.to(args[0].device)][None],)

    with _hook(lm.head.register_forward_pre_hook(choose)):
        yield


@contextmanager
def mlp_at(lm: LanguageModel, layer: int, rows: Tensor, columns: Tensor) -> Iterator[list[Tensor]]:
    """Run a block's MLP at chosen positions only, where nothing reads the others; gives a list that
    has an entry for each time that it did.

    Keys that are read meanwhile are those of these positions, each once, row by row. Where somebody
    listens inside that block already, or it may be run again, it runs whole, and so does one that
    is handed anything but rows × tokens × d.
    """
    places: list[Tensor] = []
    mlp = lm.mlp(layer)
    if (
        mlp is None
        or lm.is_offloaded
        or any(_is_watched(m) for m in (lm.blocks[layer], *mlp.modules()))
    ):
        yield places
        return
    shape: list[torch.Size] = []

    def choose(_module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        if hidden.ndim != 3:
            return args
        flat = (rows * hidden.shape[1] + columns).to(hidden.device)
        shape.append(hidden.shape)
        places.append(torch.unique(flat))  # a position may be asked for twice
        return (hidden.reshape(-1, hidden.shape[-1])[places[-1]][None], *args[1:])

    def put_back(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        if not places:
            return output
        whole = output.new_zeros(shape[-1]).reshape(-1, output.shape[-1])
        return whole.index_copy(0, places[-1], output[0]).reshape(shape[-1])

    chosen, returned = mlp.register_forward_pre_hook(choose), mlp.register_forward_hook(put_back)
    with _hook(chosen), _hook(returned):
        yield places


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


# --- passes ----------------------------------------------------------------------------------


def _inputs(
    lm: LanguageModel,
    padded: Padded | Branched,
    hidden: Tensor | None,
    before: KeyValues | None,
    recorder: Recorder | None,
) -> dict[str, Any]:
    """Arguments of the model's forward method."""
    if isinstance(padded, Branched):
        return {
            "input_ids": padded.ids,
            "position_ids": padded.positions,
            "attention_mask": padded.mask(lm.dtype),
            "past_key_values": Cache(layers=[_AlignedLayer() for _ in lm.blocks]),
            "use_cache": True,
        }
    inputs: dict[str, Any] = {"attention_mask": padded.mask, "use_cache": False}
    if hidden is None:
        inputs["input_ids"] = padded.ids
    else:
        # Never read, since `hidden` takes their place, but the model wants some of its own width.
        width = cast(nn.Embedding, lm.model.get_input_embeddings()).embedding_dim
        device = padded.ids.device
        inputs["inputs_embeds"] = hidden.new_zeros(*padded.ids.shape, width, device=device)
    if before is not None:
        places = torch.arange(padded.ids.shape[1], device=padded.ids.device)
        lengths = before.lengths.to(places.device)
        inputs["position_ids"] = lengths[:, None] + places[None]
        inputs["attention_mask"] = torch.cat([before.mask().to(places.device), padded.mask], 1)
        inputs |= {"past_key_values": before.cache(), "use_cache": True}
    if recorder is not None:
        inputs |= {"past_key_values": recorder.cache(), "use_cache": True}
    return inputs


def block_output(
    lm: LanguageModel,
    padded: Padded,
    stop: int,
    *,
    start: int = 0,
    hidden: Tensor | None = None,
    before: KeyValues | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """Hidden states that leave block `stop` (rows × tokens × d); nothing above it is run.

    With `hidden` (rows × tokens × d), these enter block `start` and nothing below it is run.
    """
    with ExitStack() as stack:
        if hidden is not None:
            stack.enter_context(_starting_at(lm, start, hidden))
        result = stack.enter_context(_stopping_after(lm, stop))
        lm.model.base_model(**_inputs(lm, padded, hidden, before, recorder))
    return result[0]


def keys_of(lm: LanguageModel, padded: Padded, layers: Sequence[int]) -> dict[int, Tensor]:
    """Inputs of some blocks' down-projections (rows·tokens × f); nothing after the last is run."""

    def stop(_module: nn.Module, _args: tuple) -> None:
        raise _Stopped

    with ExitStack() as stack:
        found = stack.enter_context(reading_keys(lm, layers))
        last = lm.down_projection(max(layers))
        stack.enter_context(_hook(last.register_forward_pre_hook(stop)))
        stack.enter_context(suppress(_Stopped))
        lm.model.base_model(**_inputs(lm, padded, None, None, None))
    return found


def logits_at(
    lm: LanguageModel,
    padded: Padded | Branched,
    rows: Tensor,
    columns: Tensor,
    *,
    start: int = 0,
    hidden: Tensor | None = None,
    before: KeyValues | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """Float32 logits at chosen positions (k × vocabulary), given by row and column (k each).

    With `hidden`, these enter block `start`; with `before`, the rows continue earlier positions;
    `recorder` keeps the keys and values of this pass. Branched rows are run from the start.
    """
    with ExitStack() as stack:
        if hidden is not None:
            stack.enter_context(_starting_at(lm, start, hidden))
        stack.enter_context(_head_at(lm, rows, columns))
        stack.enter_context(mlp_at(lm, lm.depth - 1, rows, columns))
        output = lm.model(**_inputs(lm, padded, hidden, before, recorder))
    return output.logits[0].float()


def can_resume(lm: LanguageModel) -> bool:
    """Whether this model gives the same logits when it is started above block 0 against recorded
    keys and values: tried on a short row, since no list of families could be complete."""
    known = getattr(lm, "_can_resume", None)
    if known is None:
        known = lm._can_resume = _try_to_resume(lm)  # type: ignore[attr-defined]
    return known


@torch.no_grad()
def _try_to_resume(lm: LanguageModel) -> bool:
    vocabulary = lm.model.config.get_text_config().vocab_size
    ids = [[(7 * place + 3) % vocabulary for place in range(length)] for length in (5, 7)]
    padded = pad(ids, lm.device)
    start = lm.depth // 2
    first = torch.tensor([2, 4], device=lm.device)
    rows, columns = torch.tensor([0, 1]), torch.tensor([4, 6])
    try:
        whole = lm.model(**_inputs(lm, padded, None, None, None)).logits
        expected = whole[rows, columns].float()
        recorder = Recorder(lm, start)
        with reading_outputs(lm, [start - 1]) as outputs:
            logits_at(lm, padded, rows, columns, recorder=recorder)
        width = 3
        places = first[:, None] + torch.arange(width, device=lm.device)[None]
        device = outputs[start - 1].device
        hidden = outputs[start - 1][torch.arange(2, device=device)[:, None], places.to(device)]
        tail = Padded(padded.ids.gather(1, places), padded.mask.gather(1, places))
        resumed = logits_at(
            lm,
            tail,
            rows,
            columns - first.cpu(),
            start=start,
            hidden=hidden,
            before=recorder.before(first),
        )
    except Exception:  # whatever an unknown family raises, the full forward still serves
        return False
    return _agree(lm, resumed, expected)


def can_branch(lm: LanguageModel, length: int) -> bool:
    """Whether this model gives the same logits when several continuations share a row of `length`
    tokens: tried on rows of up to about that length, as a model may look back only so far."""
    known: dict[int, bool] = lm.__dict__.setdefault("_can_branch", {})
    tried = min(lm.context_length, 1 << max(4, (length - 1).bit_length()))
    if tried not in known:
        known[tried] = _try_to_branch(lm, tried)
    return known[tried]


@torch.no_grad()
def _try_to_branch(lm: LanguageModel, length: int) -> bool:
    vocabulary = lm.model.config.get_text_config().vocab_size
    ids = [(7 * place + 3) % vocabulary for place in range(length)]
    # The first of two tails is long beside its stem, so that a glance at it would show.
    rows = [(ids[:2], ids[2:10], ids[10:12]), (ids[:-4], ids[-4:-3], ids[-3:])]
    stems, tails = [stem for stem, _, _ in rows], [own for _, *own in rows]
    whole = pad([stem + tail for stem, *own in rows for tail in own], lm.device)
    ends = torch.tensor([len(stem + tail) - 1 for stem, *own in rows for tail in own])
    places = [len(stem) + end - 1 for stem, a, b in rows for end in (len(a), len(a + b))]
    try:
        expected = logits_at(lm, whole, torch.arange(4), ends)
        owners = torch.tensor([0, 0, 1, 1])
        found = logits_at(lm, branch(stems, tails, lm.device), owners, torch.tensor(places))
    except Exception:  # whatever an unknown family raises, rows of their own still serve
        return False
    return _agree(lm, found, expected)


def _agree(lm: LanguageModel, found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-4 if lm.dtype == torch.float32 else 0.05
    return bool((found - expected).norm() <= tolerance * expected.norm())
