"""Target vectors z: the hidden state that block L should output at the subject's last token.

Eqn. 16, Algorithm 1 lines 1-4. All edits of a batch are optimised side by side, each as if it were
alone. What cannot change is computed once: everything up to block L, and the keys and values of
blocks above L at positions before the subject's last token. Each evaluation then runs only the
positions from there on through the blocks above L, and the head only at positions in the loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from memit.batches import release_memory, run_in_batches
from memit.errors import EditError, InputError
from memit.files.reading import holding
from memit.files.tensors import load_tensors, save_tensors
from memit.forward.key_values import KeyValues, recorded
from memit.forward.passes import (
    Padded,
    attending_in_steps,
    block_output,
    changing_module,
    logits_at,
    pad,
    reading_module,
    recomputing,
    target_positions,
)
from memit.forward.probes import can_resume
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.positions import MarkedText, TokenRow, locate, mark
from memit.requests import EditRequest

logger = logging.getLogger(__name__)

KL_TEMPLATE = "{} is a"
"""The row whose next-token distribution at the subject must not drift."""


@dataclass(frozen=True)
class Targets:
    """Optimised targets of n edits."""

    z: Tensor
    """z_i = h_i + δ_i (n × d, float32)."""
    hidden: Tensor
    """h_i, output of block L at the subject's last token of the plain prompt (n × d, float32)."""
    losses: Tensor
    """Total loss at each evaluation, NaN after the stop (n × evaluations, float32)."""
    finite: Tensor
    """Whether every loss of the edit was a finite number (n, bool)."""

    @property
    def delta_ratios(self) -> Tensor:
        """‖δ_i‖ / ‖h_i‖ (n)."""
        return (self.z - self.hidden).norm(dim=1) / self.hidden.norm(dim=1)

    def chosen(self, rows: Sequence[int]) -> Targets:
        """The targets of some of the requests."""
        return Targets(**{name: part[list(rows)] for name, part in self.__dict__.items()})

    @staticmethod
    def concatenate(parts: Sequence[Targets]) -> Targets:
        """Targets of consecutive chunks of requests as one."""
        names = Targets.__dataclass_fields__
        return Targets(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})

    def save(self, path: Path) -> None:
        """Write them as safetensors."""
        save_tensors(self.__dict__, path, {})

    @staticmethod
    def load(path: Path) -> Targets:
        """Read a file of `save`.

        Raises:
            IntegrityError: the file is no such file, or damaged.
        """
        with holding(path, "target vectors", "delete it and run `targets` again"):
            return Targets(**load_tensors(path)[0])


def check_targets(requests: Sequence[EditRequest], targets: Targets) -> None:
    """Check that all targets are finite.

    Raises:
        EditError: some are not; it names their requests.
    """
    lost = torch.nonzero(~targets.finite)[:, 0].tolist()
    if lost:
        more = f", and those of {len(lost) - 1} more" if len(lost) > 1 else ""
        raise EditError(
            f"the target of {requests[lost[0]].text!r} is not finite{more}: lower "
            "targets.learning_rate, or run the model in float32 or bfloat16.",
            lost,
        )


@dataclass(frozen=True)
class Site:
    """Where δ is added: the output of a block (MEMIT), or those of the down-projections of one
    layer (ROME) or several, each of which has a part of δ of its own."""

    layers: tuple[int, ...]
    """Ascending; one alone unless `in_mlp`."""
    in_mlp: bool = False

    @property
    def first(self) -> int:
        """The first block that depends on δ."""
        return self.layers[0] + (not self.in_mlp)

    def modules(self, lm: LanguageModel) -> list[nn.Module]:
        """The modules whose outputs δ is added to."""
        return [lm.down_projection(n) if self.in_mlp else lm.blocks[n] for n in self.layers]


@dataclass(frozen=True)
class EditRows:
    """The token rows of one edit."""

    plain: TokenRow
    """The prompt, followed by the target."""
    prefixed: tuple[TokenRow, ...]
    """The same after each prefix."""
    essence: TokenRow
    """ "{subject} is a", up to the subject's last token."""

    @property
    def essence_is_plain(self) -> bool:
        """Whether the plain row begins with the essence row, which then needs no row of its own."""
        is_there = self.plain.subject_last == self.essence.subject_last
        return is_there and self.plain.ids[: len(self.essence.ids)] == self.essence.ids

    @property
    def rows(self) -> list[TokenRow]:
        """Plain row, prefixed rows, and the essence row where it is needed."""
        return [self.plain, *self.prefixed, *([] if self.essence_is_plain else [self.essence])]


def edit_rows(
    lm: LanguageModel, requests: Sequence[EditRequest], prefixes: Sequence[str]
) -> list[EditRows]:
    """Tokenise requests.

    Raises:
        InputError: a subject or an object has no tokens of its own, or a prompt is too long for the
            model's context.
    """
    marked: list[MarkedText] = []
    for request in requests:
        for prefix in ("", *prefixes):
            text = mark(request.prompt, request.subject, prefix=prefix, target=request.ending())
            marked.append(text)
        marked.append(mark(KL_TEMPLATE, request.subject))
    rows = locate(lm.tokenizer, marked)
    for row, text in zip(rows, marked, strict=True):
        lm.check_room(row.ids, f"the prompt {text.text[:80]!r}")
        if row.target and row.target[0] <= row.subject_last:
            raise InputError(
                f"one token holds subject and object in {text.text[:80]!r}: put words between them."
            )
    edits = []
    count = len(prefixes) + 2
    for start in range(0, len(rows), count):
        plain, *prefixed, essence = rows[start : start + count]
        until_subject = essence.ids[: essence.subject_last + 1]  # later tokens change nothing there
        edits.append(EditRows(plain, tuple(prefixed), replace(essence, ids=until_subject)))
    return edits


def plain_rows(lm: LanguageModel, requests: Sequence[EditRequest]) -> list[TokenRow]:
    """Tokenise requests without prefixes; raises the errors of `edit_rows`."""
    return [rows.plain for rows in edit_rows(lm, requests, ())]


def weak_keys(requests: Sequence[EditRequest], rows: Sequence[TokenRow]) -> str | None:
    """A warning about requests whose subject is the row's first token, or None: models treat that
    token as a beginning more than as a name, so that its key is unlike that of any other prompt."""
    first = [r.text for r, row in zip(requests, rows, strict=True) if row.subject_last == 0]
    if not first:
        return None
    return (
        f"{len(first)} of {len(requests)} prompts begin with a subject of one token (the first is "
        f"{first[0]!r}), where an edit has little effect: put words in front of the subject."
    )


def compute_targets(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    hyperparameters: Hyperparameters,
    *,
    token_budget: int,
    site: Site | None = None,
    progress: Callable[[int], None] | None = None,
) -> Targets:
    """Optimise z_i for each request.

    `site` is where δ is added, by default what `hyperparameters` say.
    `token_budget` bounds the padded tokens on the device at a time. An edit whose loss is not
    finite stops there and is marked in `Targets.finite`. `progress` is called with the number of
    edits that have newly stopped.
    """
    edits = edit_rows(lm, requests, prefixes)
    where = site or _site(hyperparameters)
    if not can_resume(lm):
        logger.warning("%s cannot be resumed in the middle: whole rows are run each time", lm.name)
    if site is None and (weak := weak_keys(requests, [edit.plain for edit in edits])):
        logger.warning(weak)
    # Edits that are alike from the subject on share a batch: an evaluation runs these positions.
    order = sorted(range(len(edits)), key=lambda i: (_longest_tail(edits[i]), *_shape(edits[i])))

    def optimise(indices: Sequence[int]) -> Targets:
        chosen = [edits[index] for index in indices]
        return _optimise(lm, chosen, where, hyperparameters, progress)

    parts: list[Targets] = []
    with attending_in_steps(lm):
        for _, part in run_in_batches(order, lambda i: _shape(edits[i]), token_budget, optimise):
            parts.append(part)
            release_memory()
    places = sorted(range(len(order)), key=order.__getitem__)  # where each request's target is
    return Targets.concatenate(parts).chosen(places)


def _site(hyperparameters: Hyperparameters) -> Site:
    layers = hyperparameters.layers
    if hyperparameters.site == "down_projections":
        return Site(layers, in_mlp=True)
    return Site(layers[-1:])


def _shape(edit: EditRows) -> tuple[int, int]:
    return len(edit.rows), max(len(row.ids) for row in edit.rows)


def _longest_tail(edit: EditRows) -> int:
    return max(len(row.ids) - row.subject_last for row in edit.rows)


@dataclass(frozen=True)
class _Batch:
    """Rows of several edits, ready to be evaluated for any δ."""

    padded: Padded
    """The tokens that are run (rows × tokens)."""
    edit: Tensor
    """Which edit a row belongs to (rows)."""
    column: Tensor
    """Where δ is added in a row (rows)."""
    hidden: Tensor | None
    """Input of the site's first block for these tokens, or None where token ids are the input."""
    before: KeyValues | None
    """Keys and values, from that block on, of the tokens before these."""
    target_row: Tensor
    """Row of each scored position (k)."""
    target_column: Tensor
    """Column whose logits score it (k)."""
    target_id: Tensor
    """The target token there (k)."""
    target_weight: Tensor
    """Its weight in the mean over an edit's rows of the mean over a row's tokens (k)."""
    essence_row: Tensor
    """The row whose logits at δ's position must not drift (edits)."""
    initial: Tensor | None
    """log p there for δ = 0 (edits × vocabulary), known after the first evaluation."""

    def keep(self, going: Tensor) -> _Batch:
        """The batch of the edits that are `going` (edits, bool)."""
        assert self.initial is not None
        row_stays, scored = going[self.edit], going[self.edit[self.target_row]]
        rows = torch.nonzero(row_stays)[:, 0]
        # The new index of whatever stays is the number of those before it that stay.
        new_edit, new_row = going.cumsum(0) - 1, row_stays.cumsum(0) - 1
        return _Batch(
            padded=self.padded[rows],
            edit=new_edit[self.edit[rows]],
            column=self.column[rows],
            hidden=None if self.hidden is None else self.hidden[rows.to(self.hidden.device)],
            before=None if self.before is None else self.before.select(rows),
            target_row=new_row[self.target_row[scored]],
            target_column=self.target_column[scored],
            target_id=self.target_id[scored],
            target_weight=self.target_weight[scored],
            essence_row=new_row[self.essence_row[going]],
            initial=self.initial[going],
        )


def _optimise(
    lm: LanguageModel,
    edits: Sequence[EditRows],
    site: Site,
    hyperparameters: Hyperparameters,
    progress: Callable[[int], None] | None,
) -> Targets:
    """The targets of one batch."""
    batch, hidden = _prepare(lm, edits, site)
    norm = hidden.norm(dim=2)
    # Adam moves δ in units of 1, or of the rms of what it is added to.
    unit = torch.ones_like(norm)[:, :, None]
    if hyperparameters.rate_unit == "relative":
        unit = norm[:, :, None] / hidden.shape[2] ** 0.5
    # One Adam for all edits: its steps are per element, so that edits do not mix.
    history = torch.full((len(edits), hyperparameters.evaluations), torch.nan, device=hidden.device)
    steps = torch.zeros_like(hidden, requires_grad=True)
    optimizer = torch.optim.Adam([steps], lr=hyperparameters.learning_rate)
    active = torch.arange(len(edits), device=hidden.device)
    broken = torch.zeros(len(edits), dtype=torch.bool, device=hidden.device)
    chosen = torch.zeros(len(edits), dtype=torch.long, device=hidden.device)
    for evaluation in range(hyperparameters.evaluations):
        delta = steps[active] * unit[active]
        logits = _logits(lm, batch, delta, site)
        losses, initial = _losses(batch, logits, delta, norm[active], hyperparameters)
        history[active, evaluation] = losses.detach()
        broken[active] = ~torch.isfinite(losses.detach())
        going = losses.detach() >= hyperparameters.loss_threshold  # False for NaN too
        if hyperparameters.argmax_stop:
            chosen[active] += _is_argmax(batch, logits, len(active))
            going &= chosen[active] < hyperparameters.argmax_stop
        is_last = evaluation == hyperparameters.evaluations - 1
        if progress is not None:
            progress(len(active) if is_last else len(active) - int(going.sum()))
        if is_last or not bool(going.any()):
            break
        optimizer.zero_grad()
        losses[going].sum().backward()
        active = active[going]
        _update(optimizer, steps, active, hyperparameters.clamp_factor * norm / unit[:, :, 0])
        batch = replace(batch, initial=initial)
        if not bool(going.all()):
            batch = batch.keep(going)
    hidden = hidden.flatten(1)
    z = hidden + (steps.detach() * unit).flatten(1)
    finite = torch.isfinite(z).all(1) & ~broken
    return Targets(z.cpu(), hidden.cpu(), history.cpu(), finite.cpu())


@torch.no_grad()
def _update(optimizer: torch.optim.Adam, steps: Tensor, active: Tensor, limit: Tensor) -> None:
    """One step of Adam and the projection onto ‖δ‖ ≤ limit, for the active edits alone; δ and its
    limit are in units of Adam's."""
    # Momentum moves stopped edits, too, although their gradient is zero: they are put back.
    stopped = torch.ones(len(steps), dtype=torch.bool, device=steps.device)
    stopped[active] = False
    frozen = steps[stopped].clone()
    optimizer.step()
    # δ · min(1, limit / ‖δ‖)
    steps.mul_((limit / steps.norm(dim=2).clamp(min=1e-30)).clamp(max=1.0)[:, :, None])
    steps[stopped] = frozen


@torch.no_grad()
def _is_argmax(batch: _Batch, logits: Tensor, edits: int) -> Tensor:
    """Whether an edit's target tokens are the most likely ones at all scored positions (edits)."""
    missed = logits[: len(batch.target_id)].argmax(-1) != batch.target_id
    misses = torch.zeros(edits, device=logits.device)
    return misses.index_add(0, batch.edit[batch.target_row], missed.float()) == 0


def _losses(
    batch: _Batch, logits: Tensor, delta: Tensor, norm: Tensor, hyperparameters: Hyperparameters
) -> tuple[Tensor, Tensor]:
    """Total loss of each edit (edits), and log p at the essence positions for δ = 0."""
    # Mean over an edit's rows of the mean over a row's target tokens of −log p(token).
    scored = len(batch.target_id)
    log_target = torch.log_softmax(logits[:scored], dim=-1)
    nll = -log_target.gather(1, batch.target_id[:, None])[:, 0] * batch.target_weight
    owner = batch.edit[batch.target_row]
    total = torch.zeros(len(delta), device=logits.device).index_add(0, owner, nll)
    # KL(current ‖ initial) of the next token in "{subject} is a"; δ = 0 in the first evaluation.
    current = torch.log_softmax(logits[scored:], dim=-1)
    initial = current.detach() if batch.initial is None else batch.initial
    divergence = (current.exp() * (current - initial)).sum(-1)
    if hyperparameters.site == "block":
        decay = (delta.norm(dim=2) / norm**2).sum(1)  # ‖δ‖ / ‖h‖²
    else:
        decay = (delta.norm(dim=2) / norm).square().mean(1)  # mean of ‖D_l‖² / ‖m_l‖²
    return (
        total + hyperparameters.kl_factor * divergence + hyperparameters.weight_decay * decay,
        initial,
    )


def _logits(lm: LanguageModel, batch: _Batch, delta: Tensor, site: Site) -> Tensor:
    """Logits at the scored positions, then at the essence positions, with δ added."""
    rows = torch.cat([batch.target_row, batch.essence_row])
    columns = torch.cat([batch.target_column, batch.column[batch.essence_row]])
    # δ of each row (rows × sites × d), and its position when rows × tokens are counted as one.
    moved = delta[batch.edit]
    flat = torch.arange(len(moved), device=lm.device) * batch.padded.ids.shape[1] + batch.column

    def add(states: Tensor, part: int = 0) -> Tensor:
        at = flat.to(states.device)
        rows = states.reshape(-1, states.shape[-1])
        new = (rows[at].float() + moved[:, part].to(states.device)).to(states.dtype)
        return rows.index_put((at,), new).reshape(states.shape)

    hidden = batch.hidden
    with ExitStack() as stack:
        if hidden is not None and not site.in_mlp:
            hidden = add(hidden)  # δ goes into what enters the first block that runs
            stack.enter_context(recomputing(lm, site.first))
        else:
            stack.enter_context(recomputing(lm, site.layers[-1] + 1))
            for part, module in enumerate(site.modules(lm)):
                stack.enter_context(changing_module(module, partial(add, part=part)))
        return logits_at(
            lm, batch.padded, rows, columns, start=site.first, hidden=hidden, before=batch.before
        )


@torch.no_grad()
def _prepare(lm: LanguageModel, edits: Sequence[EditRows], site: Site) -> tuple[_Batch, Tensor]:
    """The batch of some edits, and the site's unedited output of each (edits × d, float32)."""
    device = lm.device
    rows = [row for edit in edits for row in edit.rows]
    ends = list(accumulate(len(edit.rows) for edit in edits))
    starts = [0, *ends[:-1]]  # each edit's plain row
    # The last target token is never an input.
    padded = pad([row.ids[: max(row.subject_last + 1, len(row.ids) - 1)] for row in rows], device)
    last = torch.tensor([row.subject_last for row in rows], device=device)
    # One pass over whole rows. Where the model can be resumed, it records the input of the site's
    # first block and that block's and later ones' keys and values.
    resumed = site.first < lm.depth and can_resume(lm)
    cache = DynamicCache() if resumed else None
    below = lm.blocks[max(0, site.first - 1)]
    with reading_module(below) as entering, ExitStack() as stack:
        outputs = [stack.enter_context(reading_module(module)) for module in site.modules(lm)]
        block_output(lm, padded, lm.depth - 1 if resumed else site.layers[-1], record=cache)
    # h_i: the site's output at the subject's last token of the plain row. Some modules flatten
    # rows × tokens, so the position is counted over both.
    plain = torch.tensor(starts, device=device)
    flat = plain * padded.ids.shape[1] + last[plain]
    hidden = torch.stack([_rows_at(found[0], flat).to(device) for found in outputs], 1)
    # Resumed rows begin at the subject's last token: their columns shift by as much.
    offset = last if resumed else torch.zeros_like(last)
    tail, columns = _from(padded, last) if resumed else (padded, None)
    entry = None
    if columns is not None and site.first > 0:
        which = torch.arange(len(rows), device=entering[0].device)[:, None]
        entry = entering[0][which, columns.to(entering[0].device)]
    target_row, target_column, target_id = target_positions(rows, device)
    weights = [
        1 / ((1 + len(edit.prefixed)) * max(1, len(row.target)))
        for edit in edits
        for row in edit.rows
    ]
    # The essence row is an edit's last row, or else the plain row's beginning.
    pairs = zip(edits, starts, ends, strict=True)
    essence = [start if edit.essence_is_plain else end - 1 for edit, start, end in pairs]
    batch = _Batch(
        padded=tail,
        edit=torch.tensor([i for i, edit in enumerate(edits) for _ in edit.rows], device=device),
        column=last - offset,
        hidden=entry,
        before=None if cache is None else recorded(cache, site.first, last),
        target_row=target_row,
        target_column=target_column - offset[target_row],
        target_id=target_id,
        target_weight=torch.tensor(weights, device=device)[target_row],
        essence_row=torch.tensor(essence, device=device),
        initial=None,
    )
    return batch, hidden


def _rows_at(states: Tensor, flat: Tensor) -> Tensor:
    """States at positions that are counted over rows × tokens (positions × d, float32)."""
    return states.reshape(-1, states.shape[-1])[flat.to(states.device)].float()


def _from(padded: Padded, first: Tensor) -> tuple[Padded, Tensor]:
    """Each row from its column `first` on, padded anew, and the columns that were taken."""
    width = int((padded.mask.sum(1) - first).max())
    columns = first[:, None] + torch.arange(width, device=first.device)[None]
    inside = columns < padded.ids.shape[1]
    columns = columns.clamp(max=padded.ids.shape[1] - 1)
    mask = padded.mask.gather(1, columns) * inside
    return Padded(padded.ids.gather(1, columns), mask), columns
