"""Causal tracing against its literal form: one noised row at a time, whole forward passes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memit import reference as oracle
from memit import tracing
from memit.language_model import LanguageModel
from memit.requests import EditRequest
from memit.tracing import (
    KINDS,
    PARTS,
    RUNS,
    TracedPrompt,
    critical_layers,
    embedding_deviation,
    everywhere,
    trace,
    traced_prompts,
)
from tests.reference import REQUESTS, build

WINDOW = 2
FAMILIES = ("gpt_neox", "llama", "opt_projected", "bloom")
"""Parallel blocks, a token in front, embeddings of another width; one that cannot be resumed."""


class Literal:
    """One prompt of one model, and its noised runs one by one."""

    def __init__(self, lm: LanguageModel, request: EditRequest, deviation: float):
        self.model: Any = lm.model
        tokenizer = lm.tokenizer
        row = oracle.row(tokenizer, "", request.prompt, request.subject, request.target_new)
        self.ids = row.ids[: row.target.start]
        begin = request.prompt.split("{}")[0] + request.subject[0]
        first = oracle.token_completing(tokenizer, row.ids, begin)
        self.subject = range(first, row.subject_last + 1)
        self.deviation = deviation

    def noise(self, run: int) -> Tensor:
        width = self.model.get_input_embeddings().weight.shape[1]
        drawn = np.random.RandomState(1).randn(10, len(self.subject), width)
        return torch.tensor(3 * self.deviation * drawn[run], dtype=torch.float32)

    def probabilities(self, **states: tuple[nn.Module, int, Tensor]) -> Tensor:
        """Next-token probabilities while modules' outputs are replaced or, for "noise", raised."""
        with ExitStack() as stack:
            for name, (module, position, value) in states.items():
                stack.enter_context(replaced(module, position, value, added=name == "noise"))
            return self.model(torch.tensor([self.ids])).logits[0, -1].softmax(-1)

    def outputs(self, position: int, **states) -> dict[tuple[str, int], Tensor]:
        """Each block's and each MLP's output at a token."""
        seen: dict[tuple[str, int], Tensor] = {}
        with ExitStack() as stack:
            for layer in range(self.depth):
                for kind, module in (("state", self.block(layer)), ("mlp", self.down(layer))):
                    stack.enter_context(kept(module, position, seen, (kind, layer)))
            self.probabilities(**states)
        return seen

    @property
    def depth(self) -> int:
        return self.model.config.num_hidden_layers

    def block(self, layer: int) -> nn.Module:
        return oracle.block(self.model, layer)

    def down(self, layer: int) -> nn.Module:
        return oracle.down_projection(self.model, layer)

    def noised(self, run: int) -> dict[str, tuple[nn.Module, int, Tensor]]:
        embedding = self.model.get_input_embeddings()
        return {"noise": (embedding, self.subject.start, self.noise(run))}

    def restored(self, position: int) -> dict[str, list[float]]:
        """Mean probability of the clean answer by kind and layer."""
        answer, clean = self.probabilities().argmax(), self.outputs(position)
        sums = {kind: torch.zeros(self.depth) for kind in KINDS}
        for run in range(RUNS):
            noise = self.noised(run)
            corrupted = self.outputs(position, **noise)
            for layer in range(self.depth):
                state = {"state": (self.block(layer), position, clean["state", layer][None])}
                window = {
                    f"mlp{near}": (self.down(near), position, clean["mlp", near][None])
                    for near in range(max(0, layer - WINDOW // 2), layer + WINDOW // 2)
                }
                held = {
                    f"mlp{each}": (self.down(each), position, corrupted["mlp", each][None])
                    for each in range(self.depth)
                }
                for kind, states in zip(KINDS, (state, window, state | held), strict=True):
                    sums[kind][layer] += self.probabilities(**noise, **states)[answer]
        return {kind: (total / RUNS).tolist() for kind, total in sums.items()}


@contextmanager
def replaced(module: nn.Module, position: int, value: Tensor, added: bool) -> Iterator[None]:
    def hook(_module, _args, output):
        hidden = oracle.hidden_of(output).clone()
        at = hidden.reshape(-1, hidden.shape[-1])[position : position + len(value)]
        at.copy_(at + value if added else value)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with module.register_forward_hook(hook):
        yield


@contextmanager
def kept(module: nn.Module, position: int, seen: dict, key: tuple) -> Iterator[None]:
    def hook(_module, _args, output):
        hidden = oracle.hidden_of(output)
        seen[key] = hidden.reshape(-1, hidden.shape[-1])[position].clone()

    with module.register_forward_hook(hook):
        yield


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_one_row_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracing, "WINDOW", WINDOW)  # of these models' four blocks
    lm = build(family)
    deviation = 0.2
    one, other = traced_prompts(lm, REQUESTS[:2])
    prompts = [other, everywhere(one)[0]]
    finished: list[int] = []
    found = trace(lm, prompts, deviation, token_budget=900, progress=finished.append)
    assert sum(finished) == len(prompts)
    for index, (prompt, request) in enumerate(zip(prompts, REQUESTS[1::-1], strict=True)):
        literal = Literal(lm, request, deviation)
        assert (prompt.ids, prompt.subject) == (tuple(literal.ids), literal.subject)
        clean, answer = literal.probabilities().max(0)
        noised = [
            literal.probabilities(**literal.noised(run))[answer].item() for run in range(RUNS)
        ]
        assert found.clean[index].item() == pytest.approx(clean.item(), rel=1e-5)
        assert found.noised[index].item() == pytest.approx(sum(noised) / RUNS, rel=1e-5)
        expected = literal.restored(prompt.restored)
        for kind, table in found.restored.items():
            assert table[index].tolist() == pytest.approx(expected[kind], rel=1e-5), kind


@torch.no_grad()
def test_the_deviation_is_that_of_all_subjects_embeddings():
    lm = build("gpt2")
    embeddings = lm.model.get_parameter("transformer.wte.weight")
    rows = [embeddings[lm.tokenizer(subject)["input_ids"]] for subject in ("Rome", "Zoë")]
    assert embedding_deviation(lm, ["Rome", "Zoë"]) == pytest.approx(torch.cat(rows).std().item())


def test_every_token_from_the_subject_on_has_one_part():
    prompt = TracedPrompt(tuple(range(9)), range(2, 5), 4)
    parts = [each.part for each in everywhere(prompt)]
    assert parts == [*PARTS[:4], PARTS[4], PARTS[4], PARTS[5]]
    assert [each.restored for each in everywhere(prompt)] == list(range(2, 9))
    short = TracedPrompt((5, 6), range(1, 2), 1)
    assert [each.part for each in everywhere(short)] == ["last subject token"]


def test_critical_layers_are_around_the_largest_gap():
    severed = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert critical_layers([0.4, 0.2, 0.32, 0.5, 0.31, 0.1], severed) == range(2, 5)
    assert critical_layers([0.5, 0.4, 0.1, 0.4, 0.1, 0.1], severed) == range(2)
    assert critical_layers([0.1, 0.1, 0.1, 0.1, 0.1, 0.5], severed) == range(5, 6)
    for nothing in (0.1, 0.05):
        assert not critical_layers([nothing] * 6, severed)
