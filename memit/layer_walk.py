"""Keys and residuals layer by layer, from stored hidden states (Algorithm 1, lines 6-10).

The hidden states that enter the current block are stored for every row, so that a layer costs one
run of its block before the update (for the keys), one after it, and for the plain rows the blocks
between it and L; never a forward pass from the start. Tokens that all edits begin with (the sampled
prefixes, a beginning-of-sequence token) are run once for all of them.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.cache_utils import DynamicCache

from memit.batches import split_into_batches
from memit.errors import ResourceError
from memit.forward.key_values import KeyValues, recorded
from memit.forward.passes import Padded, block_output, mlp_at, pad, reading_keys
from memit.forward.probes import can_resume
from memit.language_model import LanguageModel
from memit.placement import solving_device
from memit.positions import TokenRow
from memit.targets import EditRows

HELD_IN_MEMORY = 1 << 32
"""Bytes of hidden states that are kept in memory between layers; the rest is written to disk."""
COLUMNS_IN_MEMORY = 1 << 32
"""Bytes of a layer's keys and residuals, beyond which only the sums of their products are kept."""


class HeldStates:
    """Hidden states of batches between layers: in memory up to a limit, the rest on disk."""

    def __init__(self, limit: int, directory: Path):
        """Keep at most `limit` bytes in memory and the rest in files of `directory`."""
        self.limit = limit
        self.directory = directory
        self.in_memory: dict[int, Tensor] = {}

    def put(self, index: int, hidden: Tensor) -> None:
        """Store the states of a batch, replacing its earlier ones.

        Raises:
            ResourceError: the disk is full.
        """
        hidden = hidden.cpu()
        self.in_memory.pop(index, None)
        used = sum(part.nbytes for part in self.in_memory.values())
        if used + hidden.nbytes <= self.limit:
            self.in_memory[index] = hidden
        else:
            self._write(index, hidden.contiguous())

    def _write(self, index: int, hidden: Tensor) -> None:
        try:
            save_file({"hidden": hidden}, self.directory / str(index))
        except (OSError, SafetensorError) as error:
            raise ResourceError(
                f"{self.directory} cannot hold the hidden states of all edits ({error}): make room "
                "there, or name another disk in TMPDIR."
            ) from error

    def get(self, index: int) -> Tensor:
        """The stored states of a batch."""
        if index in self.in_memory:
            return self.in_memory[index]
        return load_file(self.directory / str(index))["hidden"]


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch of edits, from the end of their shared beginning to the subject's last
    token."""

    edits: Tensor
    """Indices of the edits (b)."""
    padded: Padded
    """b plain rows, then the prefixed rows edit by edit."""
    last: Tensor
    """Column of the subject's last token (rows)."""
    kind: Tensor
    """Which shared beginning precedes a row: 0 for plain, then one for each prefix (rows)."""


class Walk:
    """A position between two blocks, with the hidden states of every row of every edit there."""

    def __init__(
        self,
        lm: LanguageModel,
        edits: Sequence[EditRows],
        top: int,
        token_budget: int,
        held: HeldStates,
    ):
        """Start at the input of block 0 with the rows of `edits`; residuals are measured at the
        output of block `top`."""
        self.lm = lm
        self.top = top
        self.held = held
        self.block = 0
        """The current block, which the stored states enter; block 0 takes the tokens themselves."""
        self.resumes = can_resume(lm)
        kinds = list(zip(*((edit.plain, *edit.prefixed) for edit in edits), strict=True))
        shared = [_common_beginning(rows) if self.resumes else () for rows in kinds]
        self.lengths = torch.tensor([len(ids) for ids in shared], device=lm.device)
        self.shared = pad([ids or (0,) for ids in shared], lm.device)
        self.shared_states: Tensor | None = None
        self.batches = _batches(lm, edits, shared, token_budget)

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Continue to the input of `block`, through the blocks' current weights."""
        if self.resumes and block != self.block:
            shared, before = self._run_shared(block - 1)
            for index in range(len(self.batches)):
                self.held.put(index, self._run(index, block - 1, before))
            self.shared_states = shared
        self.block = block

    @torch.no_grad()
    def read(
        self, key_average: str, *, whole: bool = True
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Indices of some edits at a time (b), K of the current block, one averaged key an edit
        (f × b), and h_i at block L (d × b), in float64; of all edits in their order if `whole`."""
        _, before = self._run_shared(self.top)
        held = []
        for index, rows in enumerate(self.batches):
            at_subject, output = self._read_batch(index, before)
            keys = _averaged(at_subject, len(rows.edits), key_average)
            hidden = self._hidden(rows, output, before)
            if whole:
                held.append((rows.edits, keys, hidden))
            else:
                yield rows.edits, self._columns(keys), self._columns(hidden)
        if whole:
            edits, keys, hidden = (torch.cat(part) for part in zip(*held, strict=True))
            order = edits.argsort()
            yield edits.sort().values, self._columns(keys[order]), self._columns(hidden[order])

    def _read_batch(self, index: int, before: KeyValues | None) -> tuple[Tensor, Tensor]:
        """Keys of a batch at the subjects' last tokens (rows × f), and the current block's output,
        of which only the plain rows are valid (rows × tokens × d)."""
        rows = self.batches[index]
        count, length = rows.padded.ids.shape
        # Where the MLP runs, ascending and counted over rows × tokens: the subjects' last tokens,
        # for the keys; of plain rows also the others, unless this block is L, since blocks up to L
        # attend to them.
        read = at_subject = torch.arange(count, device=rows.last.device) * length + rows.last
        if self.block < self.top:
            plain = torch.arange(len(rows.edits) * length, device=read.device)
            read = torch.cat([plain, at_subject[len(rows.edits) :]])
        with (
            mlp_at(self.lm, self.block, read // length, read % length) as chosen,
            reading_keys(self.lm, [self.block]) as found,
        ):
            output = self._run(index, self.block, before)
        keys = found[self.block]
        # Keys come for the chosen positions only, or for all where the MLP had to run whole.
        if chosen:
            at_subject = torch.searchsorted(read, at_subject)
        return keys[at_subject.to(keys.device)], output

    @torch.no_grad()
    def read_hidden(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices of some edits at a time (b), and their h at block L (d × b, float64)."""
        _, before = self._run_shared(self.top)
        for index, rows in enumerate(self.batches):
            output = self._run(index, self.block, before, len(rows.edits))
            yield rows.edits, self._columns(self._hidden(rows, output, before))

    def _run_shared(self, stop: int) -> tuple[Tensor | None, KeyValues | None]:
        """The shared beginnings' output of block `stop`, and their keys and values up to there."""
        if not self.resumes:
            return None, None
        start, hidden = self.block, self.shared_states
        cache = DynamicCache()
        output = block_output(self.lm, self.shared, stop, start=start, hidden=hidden, record=cache)
        return output, recorded(cache, start, self.lengths)

    def _run(
        self, index: int, stop: int, before: KeyValues | None, count: int | None = None
    ) -> Tensor:
        """Output of block `stop` for a batch, or its first `count` rows (rows × tokens × d)."""
        rows = self.batches[index]
        padded = rows.padded[:count]
        if before is None:
            return block_output(self.lm, padded, stop)
        hidden = None if self.block == 0 else self.held.get(index)[:count].to(self.lm.device)
        kept = before.between(self.block, stop).select(rows.kind[:count])
        return block_output(self.lm, padded, stop, start=self.block, hidden=hidden, before=kept)

    def _hidden(self, rows: _Rows, output: Tensor, before: KeyValues | None) -> Tensor:
        """h_i of a batch (b × d) from the current block's output, by its plain rows alone."""
        plain = slice(0, len(rows.edits))
        last = rows.last[plain]
        length = int(last.max()) + 1  # prefixed rows may be longer
        padded = rows.padded[plain, :length]
        top = output[plain, :length]
        if self.block < self.top and before is None:
            top = block_output(self.lm, padded, self.top)
        elif self.block < self.top and before is not None:
            start = self.block + 1
            kept = before.between(start, self.top).select(rows.kind[plain])
            top = block_output(self.lm, padded, self.top, start=start, hidden=top, before=kept)
        return top[torch.arange(len(last), device=top.device), last.to(top.device)]

    def _columns(self, rows: Tensor) -> Tensor:
        """Rows as columns in float64, where systems are solved."""
        return rows.to(solving_device(self.lm.device)).double().T


def layer_keys(
    lm: LanguageModel,
    edits: Sequence[EditRows],
    layers: Sequence[int],
    key_average: str,
    *,
    token_budget: int,
) -> dict[int, Tensor]:
    """K of each layer (f × n, float64) in the model as it is.

    A layer's key depends on the weights below it alone: after an edit these are the keys that the
    edit was computed with, which were read with the updates of the lower layers in place.
    """
    keys = {}
    with tempfile.TemporaryDirectory() as directory:
        held = HeldStates(HELD_IN_MEMORY, Path(directory))
        walk = Walk(lm, edits, layers[-1], token_budget, held)
        for layer in layers:
            walk.advance(layer)
            ((_, keys[layer], _),) = walk.read(key_average)
    return keys


def _common_beginning(rows: Sequence[TokenRow]) -> tuple[int, ...]:
    """The longest common beginning of the rows, without their subjects' last tokens."""
    ids = [row.ids[: row.subject_last] for row in rows]
    first, last = min(ids), max(ids)  # in lexical order: what these two share, all share
    return first[: sum(takewhile(bool, map(eq, first, last)))]


def _batches(
    lm: LanguageModel,
    edits: Sequence[EditRows],
    shared: Sequence[tuple[int, ...]],
    token_budget: int,
) -> list[_Rows]:
    """Edits of about one length together, each row without its shared beginning."""

    def shape(index: int) -> tuple[int, int]:
        rows = (edits[index].plain, *edits[index].prefixed)
        return len(rows), max(row.subject_last for row in rows) + 1

    order = sorted(range(len(edits)), key=lambda index: shape(index)[::-1])
    batches = []
    for indices in split_into_batches(order, shape, token_budget):
        rows = [(0, edits[index].plain) for index in indices]
        rows += [pair for index in indices for pair in enumerate(edits[index].prefixed, start=1)]
        cut = [row.ids[len(shared[kind]) : row.subject_last + 1] for kind, row in rows]
        last = torch.tensor([len(ids) - 1 for ids in cut], device=lm.device)
        kinds = torch.tensor([kind for kind, _ in rows], device=lm.device)
        batches.append(_Rows(torch.tensor(indices), pad(cut, lm.device), last, kinds))
    return batches


def _averaged(keys: Tensor, count: int, key_average: str) -> Tensor:
    """k_i of each edit (count × f, Eqn. 19) from keys of `count` plain rows and then their prefixed
    ones (rows × f)."""
    plain = keys[:count].float()
    prefixed = keys[count:].float().reshape(count, -1, keys.shape[1])
    if prefixed.shape[1] == 0:
        return plain
    if key_average == "uniform":
        return torch.cat([plain[:, None], prefixed], dim=1).mean(1)
    return (plain + prefixed.mean(1)) / 2
