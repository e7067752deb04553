"""MEND: a hypernetwork that turns the gradient of fine-tuning into an edit (Mitchell et al., 2021).

In training, the network maps the gradients of several edits at once; its loss is what the update
does to other wordings of those edits and to unrelated prompts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import cast

import torch
from torch import Tensor, nn

from memit.batches import run_in_batches
from memit.editors.base import Editor, Resources, provenance, register
from memit.editors.mend_network import Factors, Matrix, MendNetwork
from memit.editors.settings import MendSettings
from memit.editors.teacher_forcing import Pair, mean_nll, row_means
from memit.editors.training_set import check_unseen, fact_key
from memit.errors import InputError
from memit.files.digests import content_digest, file_sha256
from memit.forward.passes import logits_at, pad, target_positions
from memit.language_model import LanguageModel
from memit.positions import TokenRow, continuation_rows
from memit.requests import EditRequest, Record
from memit.training import Training, run_training
from memit.weight_delta import Dense, LowRank, WeightDelta, base_digests


@dataclass(frozen=True)
class EditExample:
    """An edit to learn from, with the prompts that its loss is measured on."""

    edit: Pair
    """The prompt whose gradient is mapped, and what must follow."""
    wordings: tuple[Pair, ...]
    """What must hold afterwards: the edit, and other prompts with the same continuation."""
    unrelated: tuple[Pair, ...]
    """Prompts with a continuation whose probabilities may not change."""
    key: str = ""
    """`fact_key` of the edit if it is a record's."""


def examples_from_records(records: Sequence[Record]) -> list[EditExample]:
    """Edits of records, with their paraphrases as wordings and their neighbourhood as unrelated."""
    examples = []
    for record in records:
        request = record.request
        true = request.target_true or request.target_new
        prompts = (request.text, *record.paraphrase_prompts)
        wordings = tuple((prompt, request.ending(prompt)) for prompt in prompts)
        unrelated = tuple((p, request.ending(p, true)) for p in record.neighborhood_prompts)
        examples.append(EditExample(wordings[0], wordings, unrelated, fact_key(request)))
    return examples


def examples_from_texts(texts: Sequence[Pair]) -> list[EditExample]:
    """Edits of texts: each beginning must be followed by its ending, sampled from the model, also
    after the second half of the beginning alone; the other texts are unrelated."""
    examples = []
    for beginning, ending in texts:
        words = beginning.split(" ")
        half = " ".join(words[len(words) // 2 :])
        edit = (beginning, ending)
        examples.append(EditExample(edit, (edit, (half, ending)), ()))
    return examples


# --- gradients and edited passes -----------------------------------------------------------------


def edited_matrices(lm: LanguageModel, blocks: int) -> dict[str, nn.Module]:
    """The linear modules of the last blocks' MLPs, by the names of their weights."""
    if not 1 <= blocks <= lm.depth:
        raise InputError(
            f"MEND's blocks is {blocks}, but {lm.name} has {lm.depth}: choose 1 to {lm.depth}."
        )
    return {
        name: module
        for layer in range(lm.depth - blocks, lm.depth)
        for name, module in lm.mlp_projections(layer).items()
    }


def _matrix(module: nn.Module) -> Matrix:
    rows, columns = cast(Tensor, module.weight).shape
    return Matrix(columns, rows) if isinstance(module, nn.Linear) else Matrix(rows, columns)


def gradient_factors(
    lm: LanguageModel, modules: Mapping[str, nn.Module], rows: Sequence[TokenRow]
) -> dict[str, Factors]:
    """The gradient of Σ over rows of the mean nll of their targets, for each module's weight.

    Positions without a gradient are left out. Factors are float32.
    """
    # For y = W x the gradient in W is Σ over positions of (∂loss/∂y) xᵀ: record x and y of each
    # module, and differentiate in y alone.
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, _module: nn.Module, args: tuple, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        seen[name] = (args[0].detach(), output)

    with torch.enable_grad(), ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(watch, name)).remove)
        loss = mean_nll(lm, rows).sum()
        gradients = torch.autograd.grad(loss, [seen[name][1] for name in modules])
    found = {}
    for name, gradient in zip(modules, gradients, strict=True):
        x = seen[name][0].flatten(0, -2).float()  # positions × inputs
        delta = gradient.flatten(0, -2).float()  # positions × outputs
        reached = delta.any(1)  # not padding, nor a last layer's positions without a target
        found[name] = Factors(x[reached], delta[reached])
    return found


@contextmanager
def _adding(modules: Mapping[str, nn.Module], changes: Mapping[str, LowRank]) -> Iterator[None]:
    """Let the modules compute with W + Δ, differentiably in Δ's factors."""

    def add(change: LowRank, _module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # Δ x = left (rightᵀ x), without ever making Δ (outputs × inputs).
        return output + (args[0].float() @ change.right @ change.left.T).to(output.dtype)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(add, changes[name])).remove)
        yield


# --- training ------------------------------------------------------------------------------------


def train_mend(
    lm: LanguageModel,
    examples: Sequence[EditExample],
    settings: MendSettings,
    *,
    directory: Path | None,
    progress: Callable[[int], None] | None = None,
) -> tuple[MendNetwork, list[float]]:
    """Train a network on edits that are not the evaluated ones; the model's weights stay as they
    are.

    `directory` keeps checkpoints, from which an interrupted training resumes, under a digest of
    everything that it depends on. Gives the network and the loss of each step.

    Raises:
        InputError: there are too few examples.
        NumericsError: the training diverges.
    """
    if len(examples) < 2 * settings.edits_at_once:
        raise InputError(
            f"MEND has {len(examples)} edits to learn from and needs {2 * settings.edits_at_once}: "
            "edit fewer records, so that more are left, or learn from sampled texts."
        )
    modules = edited_matrices(lm, settings.blocks)
    origin = {
        "model": lm.name,
        "revision": lm.revision,
        "base": base_digests(lm, list(modules)),
        "settings": asdict(settings),
        "examples": content_digest([asdict(example) for example in examples]),
        "trained_on": sorted({example.key for example in examples if example.key}),
    }
    network = MendNetwork(
        {name: _matrix(module) for name, module in modules.items()},
        rank=settings.rank,
        edit_learning_rate=settings.edit_learning_rate,
        seed=settings.seed,
        origin=origin,
    ).to(lm.device)
    edits = [example.edit for example in examples]
    _take_statistics(lm, modules, network, edits[: settings.examples_for_statistics])
    groups = [
        {"params": list(network.networks.parameters()), "lr": settings.learning_rate},
        {"params": [network.log_rates], "lr": settings.rate_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    name, largest = f"mend-{content_digest(origin)[:16]}", settings.largest_gradient
    training = Training(name, settings.steps, directory, largest, progress=progress)
    loss_at = _loss_at(lm, modules, network, examples, settings)
    losses = run_training(training, network, optimizer, loss_at)
    return network.requires_grad_(False), losses


def _take_statistics(
    lm: LanguageModel,
    modules: Mapping[str, nn.Module],
    network: MendNetwork,
    edits: Sequence[Pair],
) -> None:
    parts = [
        gradient_factors(lm, modules, continuation_rows(lm.tokenizer, edits[start : start + 16]))
        for start in range(0, len(edits), 16)
    ]
    for name in modules:
        network.normalise(name, [part[name] for part in parts])


def _loss_at(
    lm: LanguageModel,
    modules: Mapping[str, nn.Module],
    network: MendNetwork,
    examples: Sequence[EditExample],
    settings: MendSettings,
) -> Callable[[int], Tensor]:
    """The loss of a step: `edit_weight` · mean nll of other wordings + mean KL(before ‖ after) at
    the targets of unrelated prompts."""

    def loss_at(step: int) -> Tensor:
        random = Random(f"{settings.seed} {step}")
        chosen = random.sample(examples, 2 * settings.edits_at_once)
        edits, others = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
        # One update for all edits of the step; its loss reaches the network through the factors.
        rows = continuation_rows(lm.tokenizer, [example.edit for example in edits])
        factors = gradient_factors(lm, modules, rows)
        changes = {name: network.update(name, found) for name, found in factors.items()}
        asked = [random.choice(example.wordings) for example in edits]
        unrelated = [random.choice(e.unrelated) for e in edits if e.unrelated]
        unrelated += [random.choice((e.edit, *e.unrelated)) for e in others]
        kept = continuation_rows(lm.tokenizer, unrelated)
        owner, columns, _ = target_positions(kept, lm.device)
        padded = pad([row.ids[:-1] for row in kept], lm.device)
        with torch.no_grad():
            before = logits_at(lm, padded, owner, columns).log_softmax(-1)
        with _adding(modules, changes):
            nll = mean_nll(lm, continuation_rows(lm.tokenizer, asked)).mean()
            after = logits_at(lm, padded, owner, columns).log_softmax(-1)
        divergences = (before.exp() * (before - after)).sum(1)  # one for each target token
        return settings.edit_weight * nll + row_means(divergences, owner, len(kept)).mean()

    return loss_at


# --- the editor ----------------------------------------------------------------------------------


@register("mend")
@dataclass(frozen=True)
class Mend(Editor):
    """Model editor networks with gradient decomposition."""

    settings: MendSettings = field(default_factory=MendSettings)
    trained: Path | None = None
    """A trained network's file; None trains one on the resources' records."""

    def edit(
        self, lm: LanguageModel, requests: Sequence[EditRequest], resources: Resources
    ) -> WeightDelta:
        """Map the gradients of all requests and sum the updates.

        Raises:
            InputError: the network was trained on a request or belongs to another model.
        """
        if self.trained is None:
            examples, directory = examples_from_records(resources.training), resources.checkpoints
            network = train_mend(lm, examples, self.settings, directory=directory)[0]
        else:
            network = MendNetwork.load(self.trained).requires_grad_(False).to(lm.device)
        check_unseen(requests, frozenset(network.origin["trained_on"]), "MEND's network")
        budget, progress = resources.token_budget, resources.progress
        changes = mend_changes(lm, requests, network, token_budget=budget, progress=progress)
        origin = provenance(replace(self, trained=None), lm, requests)
        origin["network"] = self.trained and file_sha256(self.trained)
        return WeightDelta(changes, {**origin, "base": base_digests(lm, changes)})


@torch.no_grad()
def mend_changes(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    network: MendNetwork,
    *,
    token_budget: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, LowRank | Dense]:
    """The summed updates of all requests, by weight name and in the model's orientation.

    Raises:
        InputError: the network was made for other matrices.
    """
    modules = _modules_of(lm, network)
    edits = [(request.text, request.ending()) for request in requests]
    rows = continuation_rows(lm.tokenizer, edits)
    changes: dict[str, LowRank | Dense] = {}
    gradients = partial(gradient_factors, lm, modules)
    for batch, factors in run_in_batches(
        rows, lambda row: (1, len(row.ids)), token_budget, gradients
    ):
        for name, found in factors.items():
            changes[name] = _added(changes.get(name), network.update(name, found))
        if progress is not None:
            progress(len(batch))
    return {
        name: change if isinstance(modules[name], nn.Linear) else change.transposed()
        for name, change in changes.items()
    }


def _modules_of(lm: LanguageModel, network: MendNetwork) -> dict[str, nn.Module]:
    everywhere = edited_matrices(lm, lm.depth)
    for name, matrix in network.matrices.items():
        if name not in everywhere or _matrix(everywhere[name]) != matrix:
            raise InputError(
                f"MEND's network was trained for another model than {lm.name} (its {name} is "
                "missing or has another shape): train it on this one."
            )
    return {name: everywhere[name] for name in network.matrices}


def _added(total: LowRank | Dense | None, update: LowRank) -> LowRank | Dense:
    """The sum of updates of one matrix: factors while these are smaller than the matrix."""
    if isinstance(total, Dense):
        return Dense(total.delta + update.left @ update.right.T)
    found = update if total is None else LowRank.concatenated([total, update])
    (rows, rank), columns = found.left.shape, len(found.right)
    if rank * (rows + columns) <= rows * columns:
        return found
    return Dense(found.left @ found.right.T)
