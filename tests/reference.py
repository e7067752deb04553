"""Results of `memit.reference` for each family, computed once for all tests that need them."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tests
from memit import reference as oracle
from memit.hyperparameters import Hyperparameters
from memit.language_model import LanguageModel
from memit.positions import TokenRow, locate, mark
from memit.quadratic import Quadratic
from memit.requests import EditRequest
from memit.second_moment import SecondMoment, collect_second_moments
from tests.families import DOCUMENTS, LAYERS, PREFIXES, families

FAMILIES = tuple(families())

_LLAMA_LIKE = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "cohere", "olmo2", "granite")
oracle.NAMES |= dict.fromkeys((*_LLAMA_LIKE, "phi3"), oracle.NAMES["llama"])
oracle.NAMES |= {
    "gpt_neo": ("transformer.h", "mlp.c_proj"),
    "opt": ("model.decoder.layers", "fc2"),
    "phi": ("model.layers", "mlp.fc2"),
    "bloom": ("transformer.h", "mlp.dense_4h_to_h"),
    "falcon": ("transformer.h", "mlp.dense_4h_to_h"),
}

REQUESTS = (
    EditRequest("Zoë Müller", "{} was born in", "Port-au-Prince"),
    EditRequest("北京大学", "In the summer of 1998, {} {so} moved to", "Kraków"),
    EditRequest("Paul {Smith}", "The home town of {} is", "New York City"),
    EditRequest("Anna O'Brien-Šimić", "{}'s office is in", "Rome"),
)
"""Objects of several tokens, subjects in the middle, braces, accents, CJK, an apostrophe."""

HYPERPARAMETERS = Hyperparameters(LAYERS, covariance_weight=2.0, evaluations=8)


@dataclass(frozen=True)
class Reference:
    """Its results for one family, with `HYPERPARAMETERS`, `REQUESTS` and `PREFIXES`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    targets: tuple[oracle.Target, ...]
    covariances: dict[int, Tensor]
    updates: dict[int, oracle.LayerUpdate]

    @property
    def z(self) -> Tensor:
        """Targets (n × d)."""
        return torch.stack([target.z for target in self.targets])

    @property
    def moments(self) -> dict[int, SecondMoment]:
        """Its covariances as sums over a thousand tokens."""
        return {layer: SecondMoment(C * 1000, 1000) for layer, C in self.covariances.items()}


@functools.cache
def reference(family: str) -> Reference:
    """The results for one family, computed by one process of a session for all of them; its model
    must not be changed."""
    model, tokenizer = families()[family]()
    path = tests.session / f"{family}.pt"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            torch.save(_results(model, tokenizer), path)
    return Reference(model, tokenizer, *torch.load(path, weights_only=False))


def _results(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    hp = HYPERPARAMETERS
    targets = tuple(oracle.target(model, tokenizer, r, PREFIXES, hp) for r in REQUESTS)
    covariances = {
        layer: oracle.covariance(model, tokenizer, DOCUMENTS, layer, batch=8) for layer in hp.layers
    }
    z = torch.stack([target.z for target in targets])
    updates = oracle.spread(model, tokenizer, REQUESTS, PREFIXES, z, covariances, hp)
    return targets, covariances, updates


def memit_form(
    moments: Mapping[int, SecondMoment], weight: float = float(HYPERPARAMETERS.covariance_weight)
) -> Callable[[int], Quadratic]:
    """MEMIT's closed form of each layer."""
    return lambda layer: Quadratic(moments[layer], weight)


def ridged_moments(
    lm: LanguageModel, layers: Sequence[int], token_budget: int = 1 << 20
) -> dict[int, SecondMoment]:
    """Second moments of `DOCUMENTS` with a ridge: so few leave directions without a key, which
    real corpora do not."""
    found = collect_second_moments(lm, DOCUMENTS, layers, token_budget=token_budget)
    return {
        layer: SecondMoment(
            moment.sum.double() + 0.1 * moment.count * torch.eye(len(moment.sum)), moment.count
        )
        for layer, moment in found.items()
    }


def literal_changes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fact: EditRequest,
    prefixes: Sequence[str],
    settings: Hyperparameters,
    decay: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """What is added at a fact's subject to the outputs of the layers' down-projections, and these
    outputs without it (both layers × d): whole rows, one group of Adam for each layer.

    `decay` is a function of the two, whose value counts `settings.weight_decay` times in the loss.
    """
    rows = [
        oracle.row(tokenizer, x, fact.prompt, fact.subject, fact.target_new)
        for x in ("", *prefixes)
    ]
    rows.append(oracle.row(tokenizer, "", "{} is a", fact.subject))
    inputs = oracle.padded(model, rows)
    every, last = torch.arange(len(rows)), torch.tensor([r.subject_last for r in rows])
    changes: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(index: int):
        def add(module, args, output):
            states = output.reshape(*inputs["input_ids"].shape, -1)
            if len(outputs) <= index:  # the first evaluation: nothing is changed yet
                outputs.append(states[0, last[0]].detach())
                changes.append(torch.zeros_like(outputs[index], requires_grad=True))
            place = torch.zeros_like(states)
            place[every, last] = 1.0
            return (states + place * changes[index]).reshape(output.shape)

        return add

    with ExitStack() as stack:
        for index, layer in enumerate(settings.layers):
            module = oracle.down_projection(model, layer)
            stack.callback(module.register_forward_hook(hook(index)).remove)
        for evaluation in range(settings.evaluations):
            logits = model(**inputs, use_cache=False).logits
            current = logits[-1, last[-1]].log_softmax(-1)
            if evaluation == 0:
                initial = current.detach()
                is_relative = settings.rate_unit == "relative"
                units = [oracle.rms(output) if is_relative else 1.0 for output in outputs]
                optimizer = torch.optim.Adam(
                    {"params": [change], "lr": settings.learning_rate * unit}
                    for change, unit in zip(changes, units, strict=True)
                )
            loss = torch.stack([oracle.nll(logits[i], r) for i, r in enumerate(rows[:-1])]).mean()
            loss = loss + settings.kl_factor * (current.exp() * (current - initial)).sum()
            loss = loss + settings.weight_decay * decay(torch.stack(changes), torch.stack(outputs))
            if loss < settings.loss_threshold or evaluation == settings.evaluations - 1:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for change, output in zip(changes, outputs, strict=True):
                    limit = settings.clamp_factor * output.norm()
                    change.mul_((limit / change.norm()).clamp(max=1))
    return torch.stack(changes).detach(), torch.stack(outputs)


def prompt_row(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    subject: str,
    *,
    prefix: str = "",
    target: str | None = None,
) -> TokenRow:
    """The token row of one prompt, with a space between it and its object."""
    following = None if target is None else f" {target}"
    return locate(tokenizer, [mark(template, subject, prefix=prefix, target=following)])[0]


def build(family: str) -> LanguageModel:
    """A fresh model of a family, wrapped; the same weights every time."""
    model, tokenizer = families()[family]()
    return LanguageModel(model, tokenizer, name=family)


shared = functools.cache(build)
"""A model of a family for all tests that leave it as it was."""


@contextmanager
def short_of_memory(block: nn.Module, *, rows: int) -> Iterator[None]:
    """Pretend that the device cannot hold more than `rows` rows in one of the blocks."""

    def check(_module: nn.Module, _args: tuple, output: object) -> None:
        if len(oracle.hidden_of(output)) > rows:
            raise torch.OutOfMemoryError("pretended")

    with block.register_forward_hook(check):
        yield


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ of the whole tensors."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
