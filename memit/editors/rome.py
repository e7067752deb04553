"""ROME: one rank-one update after another at one layer (Meng et al., 2022).

Each edit is computed on the model as edited so far. Its value v* is optimised at the output of the
layer's down-projection, as MEMIT's targets are at the output of a block.
"""

import logging
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor

from memit.editors.base import Editor, Resources, provenance, register
from memit.errors import IntegrityError, NumericsError
from memit.files.digests import content_digest
from memit.files.tensors import tensor_digest
from memit.generation import default_generation
from memit.hyperparameters import Hyperparameters, published_layer
from memit.language_model import LanguageModel
from memit.placement import solving_device
from memit.prefixes import bounded
from memit.ranges import Range, check_settings
from memit.requests import EditRequest
from memit.sampled_corpus import start_token
from memit.second_moment import cholesky, keys_at_subjects
from memit.targets import Site, compute_targets, edit_rows
from memit.weight_delta import LowRank, WeightDelta, base_digests

logger = logging.getLogger(__name__)

PUBLISHED_LAYERS = {"gpt2-xl": 17, "gpt-j-6b": 5, "gpt-neox-20b": 15, "synthetic": 0}
"""The edited layer by `short_name` of the model."""
EDITS_BETWEEN_CHECKPOINTS = 50
PREFIX_LENGTHS = (5, 10)
"""Tokens of the sampled prefixes, the start token included."""
PREFIXES_OF_EACH_LENGTH = 10
TOP_K = 5
"""The next token of a prefix is drawn among the most probable k."""


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
        finite, because earlier edits broke the model, is left out and named in the provenance.

        Raises:
            NumericsError: no edit has a finite update.
        """
        lm.check_layers((self.layer,))
        prefixes = sample_rome_prefixes(lm, resources.seed)
        moment = resources.moments[self.layer]
        mean = moment.mean.to(solving_device(lm.block_device(self.layer)))
        factor = cholesky(mean, f"layer {self.layer}")
        name = lm.weight_name(self.layer)
        origin = {
            **provenance(self, lm, requests),
            "base": base_digests(lm, [name]),
            "prefixes": list(prefixes),
        }
        progress = resources.progress or (lambda edits: None)
        done = _Done(resources.checkpoints, {**origin, "moment": tensor_digest(moment.mean)})
        if done.count:
            progress(done.count)
        with _restoring(lm, self.layer) as master:
            for update in done.updates:
                _add(lm, self.layer, master, update)
            for request in requests[done.count :]:
                update = self._update(lm, request, prefixes, factor, resources.token_budget)
                if done.take(update):
                    _add(lm, self.layer, master, update)
                progress(1)
        if not done.updates:
            raise NumericsError(
                f"no edit of {len(requests)} has a finite update; run the model in float32 or "
                "bfloat16."
            )
        done.save()
        change = LowRank.concatenated(done.updates).compact()
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
        """The update of one fact for the present weights: (v* − W k) (C⁻¹k)ᵀ / kᵀC⁻¹k."""
        site, settings = Site((self.layer,), in_mlp=True), self.optimisation
        found = compute_targets(
            lm, [request], prefixes, settings, token_budget=token_budget, site=site
        )
        # k*: the key of the plain prompt is row 0, those behind the prefixes follow (rows × f).
        rows = edit_rows(lm, [request], prefixes)[0]
        keys = keys_at_subjects(lm, [rows.plain, *rows.prefixed], [self.layer])[self.layer]
        average = keys.mean(0)
        reached = keys[0] if self.update == "published" else average
        # v* − (W k + b): what the output at the key still lacks (d).
        with torch.no_grad():
            output = lm.down_projection(self.layer)(reached.to(lm.dtype)[None])[0].float()
        # A search that met a loss that is not finite has found no value.
        value = found.z[0].where(found.finite, torch.nan)
        residual = value.to(reached.device) - output
        average, reached, residual = (
            part.to(factor.device).double() for part in (average, reached, residual)
        )
        # C⁻¹k by C's Cholesky factor, scaled so that Δ k is the whole residual.
        direction = torch.cholesky_solve(average[:, None], factor)[:, 0]
        right = direction / (direction @ reached)
        return LowRank(residual[:, None], right[:, None])


def rome_preset(model_name: str, depth: int) -> Rome:
    """Settings for a model of `depth` blocks; see `published_layer`."""
    return Rome(published_layer(PUBLISHED_LAYERS, model_name, depth))


class _Done:
    """The finished updates, with a checkpoint every so many."""

    def __init__(self, directory: Path | None, origin: Mapping[str, Any]):
        """Resume from an intact checkpoint in `directory` with the same `origin`: a description of
        everything that the updates depend on."""
        self.path = directory and directory / f"rome-{content_digest(origin)[:32]}.safetensors"
        self.updates: list[LowRank] = []
        self.left_out: list[int] = []
        """Indices of the requests without a finite update."""
        with suppress(IntegrityError):
            if self.path is not None and self.path.exists():
                kept = WeightDelta.load(self.path)
                self.left_out += kept.provenance["left_out"]
                whole = cast(LowRank, kept.changes["updates"])
                columns = zip(whole.left.split(1, 1), whole.right.split(1, 1), strict=True)
                self.updates += [LowRank(left, right) for left, right in columns]

    @property
    def count(self) -> int:
        """Finished requests, those left out included."""
        return len(self.updates) + len(self.left_out)

    def take(self, update: LowRank) -> bool:
        """Add the update of one more request; whether it is finite."""
        finite = bool(update.left.isfinite().all() and update.right.isfinite().all())
        if finite:
            self.updates.append(LowRank(update.left.cpu(), update.right.cpu()))
        else:
            self.left_out.append(self.count)
            logger.warning("edit %d has no finite update and is left out", self.count)
        if self.count % EDITS_BETWEEN_CHECKPOINTS == 0:
            self.save()
        return finite

    def save(self) -> None:
        """Write the checkpoint."""
        if self.path is not None and self.updates:
            changes = {"updates": LowRank.concatenated(self.updates)}
            WeightDelta(changes, {"left_out": self.left_out}).save(self.path)


@contextmanager
def _restoring(lm: LanguageModel, layer: int) -> Iterator[Tensor]:
    """A float32 copy of W_out (d × f) to work on; the model's weights are restored at the end."""
    base = lm.weight(layer).clone()
    try:
        yield base.float().clone()
    finally:
        lm.set_weight(layer, base)


def _add(lm: LanguageModel, layer: int, master: Tensor, update: LowRank) -> None:
    master += (update.left @ update.right.T).to(master)
    lm.set_weight(layer, master)


@torch.no_grad()
def sample_rome_prefixes(lm: LanguageModel, seed: int) -> tuple[str, ...]:
    """Ten texts of five tokens and ten of ten, sampled from the model, each made to end in ". ".

    Raises:
        InputError: see `start_token`.
    """
    tokenizer, start = lm.tokenizer, start_token(lm)
    prompt = torch.tensor([[start]] * PREFIXES_OF_EACH_LENGTH, device=lm.device)
    texts: list[str] = []
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for length in PREFIX_LENGTHS:
            with default_generation(lm):
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
    plain = (unicodedata.normalize("NFKD", text).replace("\n\n", " ") for text in texts)
    return tuple(bounded(lm, text) + ". " for text in plain)
