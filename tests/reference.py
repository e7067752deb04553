"""Results of `memit.reference` for each family, computed once for all tests that need them."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from memit.second_moment import SecondMoment
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
