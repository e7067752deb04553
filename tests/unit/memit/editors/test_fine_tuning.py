"""Fine-tuning against loops written out with torch, and each of its rules by itself."""

import math
from dataclasses import replace

import pytest
import torch

from memit.editors.base import Resources
from memit.editors.fine_tuning import VARIANTS, FineTuning
from memit.editors.unedited import Unedited
from memit.errors import InputError, NumericsError
from memit.language_model import LanguageModel
from memit.weight_delta import WeightDelta
from tests.reference import REQUESTS, build, prompt_row, relative

LARGE = 1 << 20
RESOURCES = Resources(token_budget=LARGE)
EDITOR = FineTuning(2, weight_decay=0.1, learning_rate=5e-3, batch_size=3, epochs=4)


def _literal(lm: LanguageModel, editor: FineTuning) -> dict[str, torch.Tensor]:
    """The changes, by full forward passes of one row at a time."""
    names = [name for name, _ in lm.model.named_parameters() if f"h.{editor.layer}." in name]
    base = {name: lm.parameter(name).detach().clone() for name in names}
    parameters = [lm.parameter(name).requires_grad_() for name in names]
    optimizer = torch.optim.Adam(
        parameters, lr=editor.learning_rate, weight_decay=float(editor.weight_decay)
    )
    for _ in range(editor.epochs):
        total = 0.0
        for start in range(0, len(REQUESTS), editor.batch_size):
            losses = []
            for request in REQUESTS[start : start + editor.batch_size]:
                row = prompt_row(
                    lm.tokenizer, request.prompt, request.subject, target=request.target_new
                )
                log_p = lm.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
                fixed = row.target[0] - 1
                places = [fixed if editor.loss == "published" else at - 1 for at in row.target]
                scored = [
                    log_p[place, row.ids[at]] for place, at in zip(places, row.target, strict=True)
                ]
                losses.append(-torch.stack(scored).mean())
            loss = torch.stack(losses).mean()
            total += loss.item() * len(losses)
            optimizer.zero_grad()
            if loss >= editor.loss_threshold:
                loss.backward()
                optimizer.step()
        if total / len(REQUESTS) < editor.loss_threshold:
            break
    return {name: lm.parameter(name).detach() - base[name] for name in names}


@pytest.mark.parametrize("loss", ["teacher_forced", "published"])
@pytest.mark.parametrize("layer", [0, 2])
def test_changes_are_those_of_a_literal_loop(loss, layer):
    editor = replace(EDITOR, loss=loss, layer=layer)
    expected = _literal(build("gpt2"), editor)
    found = editor.edit(build("gpt2"), REQUESTS, RESOURCES).changes
    assert found.keys() == expected.keys()
    assert len(found) == 12  # weight and bias of two norms and four linear modules
    for name, change in found.items():
        assert relative(change.dense(), expected[name]) < 1e-3, name


def test_the_two_losses_differ_where_objects_have_several_tokens():
    found = [
        replace(EDITOR, loss=loss).edit(build("gpt2"), REQUESTS, RESOURCES)
        for loss in ("teacher_forced", "published")
    ]
    name = "transformer.h.2.mlp.c_proj.weight"
    assert relative(found[0].changes[name].dense(), found[1].changes[name].dense()) > 0.05


@pytest.mark.parametrize("token_budget", [1, 40])
def test_chunks_under_a_budget_add_up_to_one_batch(token_budget):
    whole = EDITOR.edit(build("llama"), REQUESTS, RESOURCES)
    parts = EDITOR.edit(build("llama"), REQUESTS, Resources(token_budget=token_budget))
    for name, change in whole.changes.items():
        assert relative(parts.changes[name].dense(), change.dense()) < 1e-3, name


def test_the_power_law_is_the_published_one():
    editor = replace(EDITOR, weight_decay="power_law")
    assert editor.decay_for(10_000) == pytest.approx(3.9e-4, rel=0.02)
    assert editor.decay_for(1) == pytest.approx(math.exp(0.156))
    assert replace(EDITOR, weight_decay=5e-4).decay_for(10_000) == 5e-4
    with pytest.raises(InputError, match="weight_decay is 'power'"):
        replace(EDITOR, weight_decay="power")


@pytest.mark.parametrize("bound", [5e-5, 1e-3])
def test_no_weight_moves_further_than_the_bound(bound):
    lm = build("llama")
    editor = FineTuning(**VARIANTS["ft_l"] | {"bound": bound, "epochs": 5})
    changes = editor.edit(lm, REQUESTS, RESOURCES).changes
    assert list(changes) == [lm.weight_name(0)]
    change = changes[lm.weight_name(0)].dense()
    assert change.abs().max() <= bound * 1.01 + 1e-7
    assert (change.abs() > 0.9 * bound).float().mean() > 0.3
    free = replace(editor, bound=None).edit(lm, REQUESTS, RESOURCES).changes
    assert free[lm.weight_name(0)].dense().abs().max() > 1.5 * bound


def test_batches_below_the_threshold_make_no_step():
    learnt = replace(EDITOR, weight_decay=0.0, epochs=200, loss_threshold=0.5)
    lm = build("gpt2")
    delta = learnt.edit(lm, REQUESTS[:2], RESOURCES)
    assert delta.provenance["method"] == "fine_tuning"
    losses = delta.provenance["losses"]
    assert len(losses) < 200
    assert losses[-1] < 0.5 <= min(losses[:-1])
    delta.apply(lm)
    again = replace(learnt, batch_size=2).edit(lm, REQUESTS[:2], RESOURCES)
    assert len(again.provenance["losses"]) == 1
    assert all(not change.dense().any() for change in again.changes.values())
    # Decay would move the weights if a step were made after all.
    decayed = replace(learnt, weight_decay=1.0).edit(lm, REQUESTS[:2], RESOURCES)
    assert all(not change.dense().any() for change in decayed.changes.values())


def test_one_batch_is_skipped_while_others_are_learnt():
    lm = build("gpt2")
    learnt = replace(EDITOR, weight_decay=0.0, epochs=200, batch_size=1, loss_threshold=0.5)
    first = learnt.edit(lm, REQUESTS[:1], RESOURCES)
    first.apply(lm)
    once = replace(learnt, epochs=1)
    both = once.edit(lm, REQUESTS[:2], RESOURCES)
    second = once.edit(lm, REQUESTS[1:2], RESOURCES)
    for name, change in both.changes.items():
        assert torch.equal(change.dense(), second.changes[name].dense()), name


def test_the_model_is_given_back_and_progress_reaches_the_end():
    lm = build("gptj")
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    told: list[int] = []
    EDITOR.edit(lm, REQUESTS, Resources(LARGE, progress=told.append))
    assert sum(told) == len(REQUESTS)
    assert min(told) >= 0
    after = lm.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())


def test_small_steps_add_up_in_a_bfloat16_model():
    lm = build("gpt2")
    lm.model.bfloat16()
    editor = FineTuning(2, learning_rate=1e-5, epochs=20, loss_threshold=0.0)
    change = editor.edit(lm, REQUESTS, RESOURCES).changes["transformer.h.2.mlp.c_proj.weight"]
    assert change.dense().abs().median() > 5e-5


def test_a_loss_that_is_not_finite_stops_with_its_history():
    lm = build("gpt2")
    editor = replace(EDITOR, learning_rate=1e30, batch_size=4)
    with pytest.raises(NumericsError, match=r"epoch 2 \(mean losses so far: \d"):
        editor.edit(lm, REQUESTS, RESOURCES)
    assert all(p.isfinite().all() for p in lm.model.parameters())


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(InputError, match="layer 12"):
        replace(EDITOR, layer=12).edit(build("gpt2"), REQUESTS, RESOURCES)


def test_the_unedited_model_is_an_edit_like_any_other(tmp_path):
    lm = build("gpt2")
    told: list[int] = []
    Unedited().edit(lm, REQUESTS, Resources(LARGE, progress=told.append)).save(tmp_path / "edit")
    assert sum(told) == len(REQUESTS)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    delta = WeightDelta.load(tmp_path / "edit")
    delta.apply(lm)
    after = lm.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    delta.revert(lm)
    assert not lm.applied


@pytest.mark.parametrize(
    "bad", [{"learning_rate": 0.0}, {"weight_decay": -1.0}, {"loss": "mean"}, {"bound": math.nan}]
)
def test_settings_out_of_range_are_named(bad) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(bad))} is "):
        replace(EDITOR, **bad)
