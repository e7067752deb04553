"""Uncentred second moments C = E[k kᵀ] of the inputs of down-projections (Eqn. 14).

One pass over the corpus serves all layers and stops after the last one. Sums and counts are kept,
not means, so that shards add up exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from memit.batches import run_in_batches
from memit.errors import InputError, IntegrityError, NumericsError
from memit.files.atomic import write_whole
from memit.files.reading import holding
from memit.forward.passes import keys_of, pad
from memit.language_model import LanguageModel
from memit.positions import TokenRow, locate, mark
from memit.requests import EditRequest

WINDOW = 256
"""Documents that are tokenised and sorted by length together."""
TILES = 16
"""Tiles a side of the symmetric product; those below the diagonal are left out."""


@dataclass(frozen=True)
class SecondMoment:
    """The sum of k kᵀ over some tokens; two of them add up."""

    sum: Tensor
    """Sum over tokens (f × f, symmetric)."""
    count: int
    """Number of tokens."""

    @property
    def mean(self) -> Tensor:
        """C (f × f, float64)."""
        return self.sum.double() / self.count

    def __add__(self, other: SecondMoment) -> SecondMoment:
        return SecondMoment(self.sum.double() + other.sum.double(), self.count + other.count)


class SecondMomentFitter:
    """Accumulates symmetric products of keys in float32."""

    def __init__(self, width: int, device: torch.device):
        self.size = -(-width // TILES)
        """Rows of a tile."""
        self.upper = torch.zeros(width, width, device=device)
        """The sum's tiles on and above the diagonal; the others are not defined."""
        self.count = 0
        """Tokens so far."""

    def update(self, keys: Tensor) -> None:
        """Add the products of keys (tokens × f): about half the work of the full product."""
        keys = keys.float()
        for start in range(0, len(self.upper), self.size):
            tile = keys[:, start : start + self.size]
            self.upper[start : start + self.size, start:].addmm_(tile.T, keys[:, start:])
        self.count += len(keys)

    def result(self) -> SecondMoment:
        """The whole symmetric sum, on the CPU."""
        whole = self.upper.cpu().clone()
        for start in range(0, len(whole), self.size):
            stop = start + self.size
            whole[stop:, start:stop] = whole[start:stop, stop:].T
            tile = whole[start:stop, start:stop]
            tile.copy_(tile.triu() + tile.triu(1).T)
        return SecondMoment(whole, self.count)


def collect_second_moments(
    lm: LanguageModel,
    documents: Sequence[str] | Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> dict[int, SecondMoment]:
    """Sum k kᵀ over all tokens of some documents, for several layers in one pass.

    A document is a text, or the ids of its tokens, and is cut to the model's context. `progress` is
    called with the number of documents of each finished batch.

    Raises:
        InputError: the documents have no token.
        NumericsError: a sum is not finite.
    """
    fitters = _fitters(lm, layers)

    @torch.no_grad()
    def run(rows: Sequence[list[int]]) -> None:
        padded = pad(rows, lm.device)
        real = torch.nonzero(padded.mask.reshape(-1))[:, 0]  # padding does not count
        keys = keys_of(lm, padded, list(fitters))
        # All keys first: a batch that does not fit must not be counted for some layers only.
        chosen = {layer: found[real.to(found.device)] for layer, found in keys.items()}
        for layer, fitter in fitters.items():
            fitter.update(chosen[layer])

    # bf16 and fp16 keys are exact in TF32, so that its products lose nothing.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or lm.dtype != torch.float32
    try:
        for rows in _tokenised_windows(lm, documents):
            for batch, _ in run_in_batches(rows, lambda row: (1, len(row)), token_budget, run):
                if progress is not None:
                    progress(len(batch))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {layer: _checked(fitter.result(), layer) for layer, fitter in fitters.items()}


@torch.no_grad()
def keys_at_subjects(
    lm: LanguageModel, rows: Sequence[TokenRow], layers: Sequence[int]
) -> dict[int, Tensor]:
    """Inputs of down-projections at each row's subject's last token (rows × f, float32)."""
    padded = pad([row.ids[: row.subject_last + 1] for row in rows], lm.device)
    last = torch.tensor([row.subject_last for row in rows])
    flat = torch.arange(len(rows)) * padded.ids.shape[1] + last  # keys are rows · tokens × f
    found = keys_of(lm, padded, layers)
    return {layer: keys[flat.to(keys.device)].float() for layer, keys in found.items()}


def collect_subject_moments(
    lm: LanguageModel, requests: Sequence[EditRequest], layers: Sequence[int], *, token_budget: int
) -> dict[int, SecondMoment]:
    """Sum k kᵀ over the last tokens of the requests' subjects, in their prompts."""
    found = locate(lm.tokenizer, [mark(each.prompt, each.subject) for each in requests])
    rows = [row for row in found if row.subject_last < lm.context_length]
    rows.sort(key=lambda row: row.subject_last)
    fitters = _fitters(lm, layers)
    for _, keys in run_in_batches(
        rows,
        lambda row: (1, row.subject_last + 1),
        token_budget,
        lambda batch: keys_at_subjects(lm, batch, layers),
    ):
        for layer, fitter in fitters.items():
            fitter.update(keys[layer])
    return {layer: fitter.result() for layer, fitter in fitters.items()}


def _fitters(lm: LanguageModel, layers: Sequence[int]) -> dict[int, SecondMomentFitter]:
    return {
        layer: SecondMomentFitter(lm.weight(layer).shape[1], lm.block_device(layer))
        for layer in layers
    }


def with_subjects(moment: SecondMoment, subjects: SecondMoment, share: float) -> SecondMoment:
    """(1 − share) C + share C_subjects, counted as the tokens of C."""
    weight = share * moment.count / subjects.count
    total = (1 - share) * moment.sum.double() + weight * subjects.sum.double()
    return SecondMoment(total, moment.count)


def _tokenised_windows(
    lm: LanguageModel, documents: Sequence[str] | Sequence[Sequence[int]]
) -> Iterator[list[list[int]]]:
    """Token rows of consecutive documents, without special tokens, longest first within a window so
    that rows of a batch have about one length; one window is tokenised while another is run."""

    def rows_of(start: int) -> list[list[int]]:
        ids: Any = list(documents[start : start + WINDOW])
        if ids and isinstance(ids[0], str):
            ids = lm.tokenizer(ids, add_special_tokens=False, verbose=False)["input_ids"]
        return sorted((row[: lm.context_length] for row in ids if row), key=len, reverse=True)

    with ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(rows_of, 0)
        for start in range(0, len(documents), WINDOW):
            rows = waiting.result()
            waiting = ahead.submit(rows_of, start + WINDOW)
            yield rows


def _checked(moment: SecondMoment, layer: int) -> SecondMoment:
    if moment.count == 0:
        raise InputError("the corpus has no tokens; give one that has text in it.")
    if not math.isfinite(moment.sum.sum(dtype=torch.float64)):  # one pass: infinities stay
        raise NumericsError(
            f"the second moment of layer {layer} is not finite; run in float32 or bfloat16."
        )
    return moment


# --- files -----------------------------------------------------------------------------------


def write_moment(moment: SecondMoment, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write one layer's sums and `provenance` as Parquet, a row for each matrix row.

    Raises:
        NumericsError: the sums are not finite in float32; nothing is written.
    """
    matrix = moment.sum.float().contiguous().numpy()
    if not np.isfinite(matrix).all():
        raise NumericsError(
            f"the second moment of layer {provenance.get('layer')} is not finite in float32; "
            "collect it over less text."
        )
    column = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
    metadata = {"count": str(moment.count), "provenance": json.dumps(provenance, sort_keys=True)}
    table = pa.table({"sum": column}).replace_schema_metadata(metadata)
    plain = {"compression": "none", "write_page_checksum": True}
    write_whole(Path(path), lambda partial: pq.write_table(table, partial, **plain))


def read_moment(path: Path) -> tuple[SecondMoment, dict[str, Any]]:
    """Read a file of `write_moment`: the sums and the provenance.

    Raises:
        IntegrityError: the file is no such file, or damaged.
    """
    with holding(path, "a second moment", "delete it and collect it again"):
        table = pq.read_table(path, page_checksum_verification=True)
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        column = table.column("sum").combine_chunks()
        matrix = column.values.to_numpy().reshape(len(column), -1)
        count, provenance = int(metadata["count"]), json.loads(metadata["provenance"])
    moment = SecondMoment(torch.from_numpy(matrix.copy()), count)
    check_moment(moment, str(path), matrix.shape[0])
    return moment, provenance


def import_published(path: Path, width: int) -> SecondMoment:
    """Read a `.npz` of the published code: `mom2.mom2` (sum, f × f) and `mom2.count`.

    Raises:
        IntegrityError: it is not a symmetric `width` × `width` matrix.
        NumericsError: it is not positive definite.
    """
    way_out = "it must be a .npz with 'mom2.mom2' and 'mom2.count'"
    with (
        holding(path, "published second moments", way_out),
        np.load(path, allow_pickle=False) as file,
    ):
        matrix, count = torch.from_numpy(file["mom2.mom2"]), int(file["mom2.count"])
    moment = SecondMoment(matrix, count)
    check_moment(moment, str(path), width)
    cholesky(moment.mean, str(path))
    return moment


def check_rank(moment: SecondMoment, where: str) -> None:
    """Raise `InputError` for a sum over fewer tokens than it has rows."""
    if moment.count < len(moment.sum):
        raise InputError(
            f"the corpus has {moment.count} tokens, and the keys of {where} have {len(moment.sum)} "
            "dimensions: give more text, at least twice as many tokens as that."
        )


def check_moment(moment: SecondMoment, where: str, width: int) -> None:
    """Raise `IntegrityError` unless the sum is finite, symmetric and of the right size."""
    if moment.sum.ndim != 2 or tuple(moment.sum.shape) != (width, width):
        shape = " × ".join(map(str, moment.sum.shape))
        raise IntegrityError(
            f"{where} holds a {shape} matrix where {width} × {width} is needed; "
            "it belongs to another model or layer."
        )
    scale = moment.sum.abs().max()
    if not bool(torch.isfinite(scale)) or moment.count <= 0:
        raise IntegrityError(f"{where} holds sums that are not finite; collect them again.")
    if bool((moment.sum - moment.sum.T).abs().max() > 1e-5 * scale):
        raise IntegrityError(f"{where} holds a matrix that is not symmetric; collect it again.")


def cholesky(matrix: Tensor, where: str) -> Tensor:
    """Lower Cholesky factor of a symmetric float64 matrix.

    Raises:
        NumericsError: the matrix is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise NumericsError(
            f"the second moment of {where} is not positive definite (minor {int(info)} of "
            f"{len(matrix)}); collect it over more text, at least twice as many tokens as it has "
            "rows, or leave the layer out if some of its units are never active."
        )
    return factor
