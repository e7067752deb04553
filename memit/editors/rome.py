"""ROME: one rank-one update after another at one layer (Meng et al., 2022).

Each edit is computed on the model that the edits before it left. Its value v* is optimised at the
output of the layer's down-projection, as MEMIT's targets are at the output of a block.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from memit.editors.base import Editor, Resources, provenance, register
from memit.errors import InputError, IntegrityError, NumericsError
from memit.forward.passes import block_output, pad, reading_keys
from memit.hyperparameters import Hyperparameters, published_layer
from memit.language_model import LanguageModel
from memit.placement import solving_device
from memit.positions import TokenRow
from memit.prefixes import bounded
from memit.ranges import Range, check_settings
from memit.requests import EditRequest
from memit.second_moment import cholesky
from memit.targets import MlpOutput, compute_targets, edit_rows
from memit.weight_delta import Dense, LowRank, WeightDelta, base_digests

logger = logging.getLogger(__name__)

PUBLISHED_LAYERS = {"gpt2-xl": 17, "gpt-j-6b": 5, "gpt-neox-20b": 15, "synthetic": 0}
"""The edited layer by the last part of the model's name, and that of the embedded default."""
EDITS_BETWEEN_CHECKPOINTS = 50
PREFIX_LENGTHS = (5, 10)
"""Tokens of the sampled prefixes, the token that they begin from included."""
PREFIXES_OF_EACH_LENGTH = 10
TOP_K = 5
"""Among how many tokens the next one of a prefix is drawn."""


@register("rome")
@dataclass(frozen=True)
class Rome(Editor):
    """Rank-one model editing, sequentially; the defaults are those published for GPT-J."""

    layer: Annotated[int, Range(0, 10_000)]
    """The block whose down-projection is edited."""
    update: Literal["published", "consistent"] = "published"
    """`published`: the direction comes from the key averaged over all rows, and v* is reached at
    the plain prompt's key; `consistent`: the averaged key is used for both."""
    evaluations: Annotated[int, Range(1, 10_000)] = 20
    """Most evaluations of the loss for a value; one fewer updates."""
    learning_rate: Annotated[float, Range(0, 1_000, exclusive=True)] = 0.5
    clamp_factor: Annotated[float, Range(0, 1_000, exclusive=True)] = 4.0
    """δ is kept within this multiple of the norm of the down-projection's output."""
    weight_decay: Annotated[float, Range(0, 1_000)] = 0.5
    kl_factor: Annotated[float, Range(0, 1_000)] = 0.0625
    loss_threshold: Annotated[float, Range(0, 1_000)] = 0.05

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def moment_layers(self) -> tuple[int, ...]:
        """The edited layer."""
        return (self.layer,)

    @property
    def optimisation(self) -> Hyperparameters:
        """The settings of the search for v*."""
        return Hyperparameters(
            layers=(self.layer,),
            covariance_weight=1.0,
            evaluations=self.evaluations,
            learning_rate=self.learning_rate,
            clamp_factor=self.clamp_factor,
            weight_decay=self.weight_decay,
            kl_factor=self.kl_factor,
            loss_threshold=self.loss_threshold,
        )

    def edit(
        self, lm: LanguageModel, requests: Sequence[EditRequest], resources: Resources
    ) -> WeightDelta:
        """Insert the requests in their order.

        Needs the second moment of its layer in `resources.moments`. An edit whose update is not
        finite, since the edits before it broke the model, is left out and named in the
        provenance. Raises `NumericsError` if none is left.
        """
        lm.check_layers((self.layer,))
        prefixes = sample_rome_prefixes(lm, resources.seed)
        factor = cholesky(
            resources.moments[self.layer].mean.to(solving_device(lm.block_device(self.layer))),
            f"layer {self.layer}",
        )
        name = lm.weight_name(self.layer)
        origin = {
            **provenance(self, lm, requests),
            "base": base_digests(lm, [name]),
            "prefixes": list(prefixes),
        }
        done = _Done.resumed(resources.checkpoints, origin)
        done.tell(resources.progress, done.count)
        with _restoring(lm, self.layer) as master:
            for update in done.updates:
                _add(lm, self.layer, master, update)
            for request in requests[done.count :]:
                update = self._update(lm, request, prefixes, factor, resources.token_budget)
                if done.take(update):
                    _add(lm, self.layer, master, update)
                done.tell(resources.progress, 1)
        if not done.updates:
            raise NumericsError(
                f"no edit of {len(requests)} has a finite update; run the model in float32 or "
                "bfloat16."
            )
        done.keep()
        change = joined(done.updates)
        return WeightDelta(
            {name: change.transposed() if lm.is_transposed(self.layer) else change},
            {**origin, "left_out": done.left_out},
        )

    def _update(
        self,
        lm: LanguageModel,
        request: EditRequest,
        prefixes: Sequence[str],
        factor: Tensor,
        token_budget: int,
    ) -> LowRank:
        """The update of one fact, for the weights as they now stand."""
        found = compute_targets(
            lm,
            [request],
            prefixes,
            self.optimisation,
            token_budget=token_budget,
            site=MlpOutput(self.layer),
        )
        rows = edit_rows(lm, [request], prefixes)[0]
        keys = subject_keys(lm, [rows.plain, *rows.prefixed], self.layer)
        average = keys.mean(0)
        reached = keys[0] if self.update == "published" else average
        residual = found.z[0].to(reached.device) - _said(lm, self.layer, reached)
        average, reached, residual = (
            part.to(factor.device).double() for part in (average, reached, residual)
        )
        direction = torch.cholesky_solve(average[:, None], factor)[:, 0]
        right = direction / (direction @ reached)
        return LowRank(residual[:, None], right[:, None])


def rome_preset(model_name: str, depth: int) -> Rome:
    """Settings for a model of `depth` blocks; see `published_layer`."""
    return Rome(published_layer(PUBLISHED_LAYERS, model_name, depth))


class _Done:
    """The updates so far, in a file from time to time."""

    def __init__(self, path: Path | None, origin: str):
        self.path = path
        self.origin = origin
        """A digest of everything that the updates depend on."""
        self.count = 0
        """Requests that were dealt with."""
        self.updates: list[LowRank] = []
        self.left_out: list[int] = []
        """Places of the requests without a finite update."""

    @staticmethod
    def resumed(directory: Path | None, origin: Mapping[str, Any]) -> _Done:
        """What an earlier process with the same model, requests and settings had done; nothing if
        its file is damaged."""
        digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
        done = _Done(directory and directory / f"rome-{digest[:32]}.safetensors", digest)
        if done.path is None or not done.path.exists():
            return done
        try:
            kept = WeightDelta.load(done.path)
        except IntegrityError:
            return done
        whole = kept.changes.get("updates")
        if isinstance(whole, LowRank) and kept.provenance.get("origin") == digest:
            columns = zip(whole.left.T, whole.right.T, strict=True)
            done.updates = [LowRank(left[:, None], right[:, None]) for left, right in columns]
            done.left_out = list(kept.provenance["left_out"])
            done.count = len(done.updates) + len(done.left_out)
        return done

    def take(self, update: LowRank) -> bool:
        """Count one more request; whether its update can be used."""
        finite = bool(update.left.isfinite().all() and update.right.isfinite().all())
        if finite:
            self.updates.append(update)
        else:
            self.left_out.append(self.count)
            logger.warning("edit %d has no finite update and is left out", self.count + 1)
        self.count += 1
        if self.count % EDITS_BETWEEN_CHECKPOINTS == 0:
            self.keep()
        return finite

    def keep(self) -> None:
        """Write the updates down."""
        if self.path is None or not self.updates:
            return
        left = torch.cat([update.left for update in self.updates], 1)
        right = torch.cat([update.right for update in self.updates], 1)
        described = {"left_out": self.left_out, "origin": self.origin}
        WeightDelta({"updates": LowRank(left, right)}, described).save(self.path)

    def tell(self, progress: Callable[[int], None] | None, count: int) -> None:
        """Report newly finished edits."""
        if progress is not None and count:
            progress(count)


def joined(updates: Sequence[LowRank]) -> LowRank | Dense:
    """The sum of rank-one updates, as their columns side by side or where smaller as Δ itself."""
    left = torch.cat([update.left for update in updates], 1)
    right = torch.cat([update.right for update in updates], 1)
    (d, n), f = left.shape, len(right)
    if n * (d + f) < d * f:
        return LowRank(left.float().cpu(), right.float().cpu())
    return Dense((left @ right.T).float().cpu())


@contextmanager
def _restoring(lm: LanguageModel, layer: int) -> Iterator[Tensor]:
    """A float32 copy of W_out (d × f) to work on; the model's own weights come back at the end."""
    base = lm.weight(layer).clone()
    try:
        yield base.float().clone()
    finally:
        lm.set_weight(layer, base)


def _add(lm: LanguageModel, layer: int, master: Tensor, update: LowRank) -> None:
    master += (update.left @ update.right.T).to(master)
    lm.set_weight(layer, master)


@torch.no_grad()
def subject_keys(lm: LanguageModel, rows: Sequence[TokenRow], layer: int) -> Tensor:
    """Inputs of a down-projection at each row's subject's last token (rows × f, float32)."""
    padded = pad([row.ids[: row.subject_last + 1] for row in rows], lm.device)
    with reading_keys(lm, [layer]) as found:
        block_output(lm, padded, layer)
    last = torch.tensor([row.subject_last for row in rows])
    places = torch.arange(len(rows)) * padded.ids.shape[1] + last
    return found[layer][places.to(found[layer].device)].float()


@torch.no_grad()
def _said(lm: LanguageModel, layer: int, key: Tensor) -> Tensor:
    """W k + b for one key (d, float32)."""
    module = lm.down_projection(layer)
    return module(key.to(lm.dtype)[None])[0].float()


@torch.no_grad()
def sample_rome_prefixes(lm: LanguageModel, seed: int) -> tuple[str, ...]:
    """Ten texts of five tokens and ten of ten that the model itself begins, each made to end in
    ". ".

    Raises `InputError` if the tokenizer has no token that a text begins from.
    """
    tokenizer = lm.tokenizer
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise InputError(
            f"the tokenizer of {lm.name} has no token at which a text begins or ends, so that ROME "
            "cannot sample its prefixes; set bos_token in the tokenizer."
        )
    prompt = torch.tensor([[start]] * PREFIXES_OF_EACH_LENGTH, device=lm.device)
    devices = [lm.device] if lm.device.type == "cuda" else []
    texts: list[str] = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for length in PREFIX_LENGTHS:
            rows = lm.model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=TOP_K,
                min_length=length,
                max_length=length,
                pad_token_id=start,
            )
            texts += [str(text) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
    return tuple(bounded(lm, _plain(text)) + ". " for text in texts)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")
