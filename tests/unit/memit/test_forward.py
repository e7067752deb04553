"""Partial forward passes give what the model's own whole forward pass gives."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from memit import reference as oracle
from memit.forward.key_values import recorded
from memit.forward.passes import (
    Padded,
    block_output,
    changing_module,
    final_states,
    logits_at,
    logits_of,
    mlp_at,
    pad,
    reading_keys,
    reading_module,
)
from memit.forward.probes import can_resume
from memit.language_model import LanguageModel
from tests.families import PREFIXES
from tests.reference import FAMILIES, build


def _rows(lm: LanguageModel) -> list[list[int]]:
    texts = (*PREFIXES, PREFIXES[0] + PREFIXES[2], "Paris")
    return [lm.tokenizer(text.strip())["input_ids"] for text in texts]


def _whole(lm: LanguageModel, rows: list[list[int]]) -> list[Tensor]:
    """Logits of each row by itself (tokens × vocabulary), without any padding."""
    with torch.no_grad():
        return [lm.model(input_ids=torch.tensor([ids])).logits[0] for ids in rows]


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_at_chosen_positions(family):
    """The model's own logit scale, cap and final norm are kept."""
    lm = build(family)
    rows = _rows(lm)
    expected = _whole(lm, rows)
    which = torch.tensor([0, 1, 1, 6, 3, 5])
    columns = torch.tensor([2, 0, len(rows[1]) - 1, 0, 4, len(rows[5]) - 1])
    found = logits_at(lm, pad(rows, lm.device), which, columns)
    assert found.dtype == torch.float32
    for logits, r, c in zip(found, which.tolist(), columns.tolist(), strict=True):
        _close(logits, expected[r][c])


@torch.no_grad()
def test_mlps_do_not_run_on_padding(monkeypatch):
    lm = build("llama")
    rows = [[5, 6, 7, 8, 9, 10], [11], [12, 13]]
    expected = [logits[-1] for logits in _whole(lm, rows)]
    mlp, shapes = cast(nn.Module, lm.blocks[1].mlp), []
    forward = mlp.forward

    def counted(hidden: Tensor) -> Tensor:
        shapes.append(tuple(hidden.shape[:2]))
        return forward(hidden)

    monkeypatch.setattr(mlp, "forward", counted)
    found = logits_at(lm, pad(rows, lm.device), torch.arange(3), torch.tensor([5, 0, 1]))
    _close(found, torch.stack(expected))
    assert shapes == [(1, 9)]


@torch.no_grad()
def test_soft_cap_and_logit_scale_are_not_bare_head_outputs():
    """The check above would mean nothing if the head alone gave the same."""
    for family in ("gemma2", "cohere", "granite"):
        lm = build(family)
        seen = {}
        with lm.head.register_forward_hook(
            lambda m, args, output, seen=seen: seen.update(bare=output)
        ):
            (logits,) = _whole(lm, [_rows(lm)[0]])
        assert not torch.allclose(seen["bare"][0], logits, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_outputs_and_keys_are_read_where_the_oracle_reads_them(family):
    lm = build(family)
    rows = _rows(lm)[:2]
    padded = pad(rows, lm.device)
    with (
        reading_module(lm.blocks[0]) as first,
        reading_module(lm.blocks[2]) as last,
        reading_keys(lm, (1, 2)) as keys,
    ):
        block_output(lm, padded, 2)
    outputs = {0: first[0], 2: last[0]}
    seen: dict = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = oracle.hidden_of(output)[0] if name[0] == "hidden" else args[0]

        return hook

    for index, ids in enumerate(rows):
        for layer in (0, 1, 2):
            with (
                oracle.block(lm.model, layer).register_forward_hook(keep(("hidden", layer))),
                oracle.down_projection(lm.model, layer).register_forward_hook(keep(("key", layer))),
            ):
                _whole(lm, [ids])
        for layer in (0, 2):
            _close(outputs[layer][index, : len(ids)], seen["hidden", layer])
        for layer in (1, 2):
            by_row = keys[layer].reshape(2, padded.ids.shape[1], -1)
            _close(by_row[index, : len(ids)], seen["key", layer].reshape(len(ids), -1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_changed_output_reaches_later_positions_only(family):
    lm = build(family)
    ids = _rows(lm)[0]
    padded = pad([ids], lm.device)
    every = torch.arange(len(ids))
    first = torch.zeros_like(every)
    step = torch.randn(lm.width)

    def add(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, 3] += step
        return hidden

    before = logits_at(lm, padded, first, every)
    with changing_module(lm.blocks[1], add):
        after = logits_at(lm, padded, first, every)
    moved = (after - before).abs().amax(1)
    assert moved[:3].max() < 1e-5
    assert moved[3] > 1e-2
    assert moved[4] > 1e-4
    assert torch.equal(logits_at(lm, padded, first, every), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [1, 3])
@torch.no_grad()
def test_resumed_rows_give_the_logits_of_whole_ones(family, start):
    """Each row goes on from a place of its own, in a batch where one row is taken twice."""
    lm = build(family)
    rows = _rows(lm)
    padded = pad(rows, lm.device)
    expected = _whole(lm, rows)
    cache = DynamicCache()
    with reading_module(lm.blocks[start - 1]) as outputs:
        block_output(lm, padded, lm.depth - 1, record=cache)
    first = torch.tensor([len(ids) * part // 5 for part, ids in enumerate(rows[:5])] + [1, 0])
    taken = torch.tensor([3, 1, 6, 0, 1, 4])
    before = recorded(cache, start, first).select(taken)
    tails = [rows[r][int(first[r]) :] for r in taken.tolist()]
    tail = pad(tails, lm.device)
    hidden = torch.zeros(*tail.ids.shape, lm.width)
    for i, r in enumerate(taken.tolist()):
        hidden[i, : len(tails[i])] = outputs[0][r, int(first[r]) : len(rows[r])]
    which = torch.tensor([i for i, ids in enumerate(tails) for _ in ids])
    columns = torch.tensor([c for ids in tails for c in range(len(ids))])
    found = logits_at(lm, tail, which, columns, start=start, hidden=hidden, before=before)
    wanted = [expected[r][int(first[r]) :] for r in taken.tolist()]
    _close(found, torch.cat(wanted))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_follow_from_what_leaves_the_last_block(family):
    lm = build(family)
    padded = pad(_rows(lm)[:3], lm.device)
    which, columns = padded.mask.nonzero(as_tuple=True)
    states = final_states(lm, padded, which, columns)
    _close(logits_of(lm, states), logits_at(lm, padded, which, columns))


def test_gradients_reach_the_hidden_states_that_enter():
    lm = build("llama")
    padded = pad([_rows(lm)[0]], lm.device)
    with torch.no_grad():
        entering = block_output(lm, padded, 1)
    entering.requires_grad_()
    logits = logits_at(lm, padded, torch.tensor([0]), torch.tensor([4]), start=2, hidden=entering)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), entering)
    assert gradient[0, :5].norm(dim=1).min() > 0
    assert gradient[0, 5:].norm() == 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_only_the_wanted_blocks_run(family):
    """Blocks that must not run are poisoned."""
    lm = build(family)
    padded = pad(_rows(lm), lm.device)
    entering = block_output(lm, padded, 1)
    expected = block_output(lm, padded, 2)
    for layer in (0, 1, 3):
        for parameter in lm.blocks[layer].parameters():
            parameter.fill_(torch.nan)
    found = block_output(lm, padded, 2, start=2, hidden=entering)
    real = padded.mask.bool()
    assert torch.equal(found[real], expected[real])


@torch.no_grad()
def test_model_is_left_as_it_was_even_after_an_error():
    lm = build("gptj")
    padded = pad(_rows(lm), lm.device)
    before = _whole(lm, _rows(lm))
    with pytest.raises(RuntimeError), changing_module(lm.blocks[1], lambda hidden: hidden[..., :5]):
        logits_at(lm, padded, torch.tensor([0]), torch.tensor([0]))
    with pytest.raises((RuntimeError, IndexError)):
        logits_at(
            lm,
            padded,
            torch.tensor([0]),
            torch.tensor([0]),
            start=2,
            hidden=torch.zeros(*padded.ids.shape, lm.width + 1),
        )
    block_output(lm, padded, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, _whole(lm, _rows(lm)), strict=True))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules()]
    assert sum(hooks) == 0
    assert not any("forward" in block.__dict__ for block in lm.blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_resumed(family):
    assert can_resume(build(family))


def test_model_that_cannot_be_resumed_is_found_out():
    """A block that looks at the whole row, whatever its positions are."""
    lm = build("gpt2")

    def blend(module, args, output):
        return output + output.mean(1, keepdim=True)

    with lm.blocks[3].register_forward_hook(blend):
        assert not can_resume(lm)


def test_padding_is_masked_on_the_right():
    padded = pad([[5, 6, 7], [8]], torch.device("cpu"))
    assert isinstance(padded, Padded)
    assert padded.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert padded.ids[0].tolist() == [5, 6, 7]
    assert padded[torch.tensor([1])].ids[0, 0] == 8


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_mlp_at_chosen_positions_has_their_keys_and_outputs(family):
    lm = build(family)
    padded = pad(_rows(lm), lm.device)
    rows, columns = torch.tensor([0, 1, 3, 3]), torch.tensor([2, 0, 1, 3])
    places = rows * padded.ids.shape[1] + columns
    with reading_keys(lm, [1]) as found:
        expected = block_output(lm, padded, 1)
    keys = found[1][places]
    with mlp_at(lm, 1, rows, columns) as there_only, reading_keys(lm, [1]) as found:
        output = block_output(lm, padded, 1)
    assert len(found[1]) == (4 if there_only else padded.ids.numel())
    _close(found[1] if there_only else found[1][places], keys)
    _close(output[rows, columns], expected[rows, columns])


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
@torch.no_grad()
def test_an_mlp_that_somebody_listens_to_runs_whole(family):
    lm = build(family)
    place, padded = torch.tensor([0]), pad(_rows(lm), lm.device)
    with mlp_at(lm, 1, place, place) as there_only:
        block_output(lm, padded, 1)
    assert there_only
    with reading_keys(lm, [1]), mlp_at(lm, 1, place, place) as there_only:
        block_output(lm, padded, 1)
    assert not there_only


@torch.no_grad()
def test_an_mlp_that_is_handed_a_list_of_positions_runs_whole():
    lm = build("llama")
    padded = pad(_rows(lm), lm.device)
    expected = block_output(lm, padded, 1)
    mlp = cast(nn.Module, lm.blocks[1].mlp)

    class Flat(nn.Module):
        """Calls the MLP as mixtures of experts call theirs."""

        def __init__(self):
            super().__init__()
            self.inner = mlp

        def forward(self, hidden):
            return self.inner(hidden.reshape(-1, hidden.shape[-1])).reshape(hidden.shape)

    assert lm.mlps[1] is mlp
    lm.blocks[1].mlp = Flat()
    with mlp_at(lm, 1, torch.tensor([1, 2]), torch.tensor([0, 1])) as there_only:
        found = block_output(lm, padded, 1)
    assert not there_only
    assert torch.equal(found, expected)
