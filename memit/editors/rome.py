"""ROME: one rank-one update after another at one layer (Meng et al., 2022).

Each edit is computed on the model that the edits before it left. Its value v* is optimised at the
output of the layer's down-projection, as MEMIT's targets are at the output of a block.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memit.editors.base import Editor, Resources, provenance, register
from memit.errors import InputError, NumericsError
from memit.forward import block_output, pad, reading_keys
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.positions import TokenRow
from memit.requests import EditRequest
from memit.second_moment import cholesky
from memit.targets import MlpOutput, compute_targets, edit_rows
from memit.weight_delta import Dense, LowRank, WeightDelta, base_digests

PREFIX_LENGTHS = (5, 10)
"""Tokens of the sampled prefixes, the token that they begin from included."""
PREFIXES_OF_EACH_LENGTH = 10
TOP_K = 5
"""Among how many tokens the next one of a prefix is drawn."""


@register("rome")
@dataclass(frozen=True)
class Rome(Editor):
    """Rank-one model editing, sequentially; the defaults are those published for GPT-J."""

    layer: int
    """The block whose down-projection is edited."""
    update: Literal["published", "consistent"] = "published"
    """`published`: the direction comes from the key averaged over all rows, and v* is reached at
    the plain prompt's key; `consistent`: the averaged key in both places."""
    evaluations: int = 20
    """Most evaluations of the loss for a value; one fewer updates."""
    learning_rate: float = 0.5
    clamp_factor: float = 4.0
    """δ is kept within this multiple of the norm of what the down-projection said."""
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    loss_threshold: float = 0.05

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

        Needs the second moment of its layer in `resources.moments`. Raises `NumericsError` for an
        edit whose update is not finite.
        """
        lm.check_layers((self.layer,))
        prefixes = sample_rome_prefixes(lm, resources.seed)
        factor = cholesky(
            resources.moments[self.layer].mean.to(lm.weight(self.layer).device),
            f"layer {self.layer}",
        )
        name = lm.weight_name(self.layer)
        origin = {**provenance(self, lm, requests), "base": base_digests(lm, [name])}
        updates: list[LowRank] = []
        with _restoring(lm, self.layer) as master:
            for number, request in enumerate(requests):
                update = self._update(lm, request, prefixes, factor, resources.token_budget)
                if not bool(torch.isfinite(update.left).all() & torch.isfinite(update.right).all()):
                    raise NumericsError(
                        f"the update of edit {number + 1} of {len(requests)} ({request.text!r}) is "
                        "not finite: the edits before it broke the model; edit fewer facts."
                    )
                updates.append(update)
                master += (update.left @ update.right.T).to(master)
                lm.set_weight(self.layer, master)
                if resources.progress is not None:
                    resources.progress(1)
        change = joined(updates)
        return WeightDelta(
            {name: change.transposed() if lm.is_transposed(self.layer) else change},
            {**origin, "prefixes": list(prefixes)},
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
        direction = torch.cholesky_solve(average.double()[:, None], factor)[:, 0]
        right = direction / (direction @ reached.double())
        return LowRank(residual.double()[:, None], right[:, None])


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
    return module(key.to(lm.weight(layer).dtype)[None])[0].float()


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
    return tuple(_plain(text) + ". " for text in texts)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")
