"""Batched, resumed and early-stopping targets against one slow optimisation for each edit."""

from dataclasses import replace

import pytest
import torch

from memit import reference as oracle
from memit import targets as targets_module
from memit.errors import InputError, IntegrityError, ResourceError
from memit.files.tensors import save_tensors
from memit.requests import EditRequest
from memit.targets import Targets, compute_targets, plain_rows, weak_keys
from tests.families import PREFIXES
from tests.reference import (
    FAMILIES,
    HYPERPARAMETERS,
    REQUESTS,
    build,
    reference,
    relative,
    short_of_memory,
)

TOLERANCE = 1e-4
LARGE = 1 << 20


def _agrees(found: Targets, expected: list[oracle.Target] | tuple[oracle.Target, ...]) -> None:
    assert len(found.z) == len(expected)
    for i, one in enumerate(expected):
        assert relative(found.z[i], one.z) < TOLERANCE
        assert relative(found.hidden[i], one.hidden) < TOLERANCE
        made = len(one.losses)
        assert found.losses[i, :made].tolist() == pytest.approx(one.losses, rel=TOLERANCE)
        assert found.losses[i, made:].isnan().all()
    assert found.finite.all()


def _found(lm, hp=HYPERPARAMETERS, requests=REQUESTS, prefixes=PREFIXES, token_budget=LARGE, **kw):
    return compute_targets(lm, requests, prefixes, hp, token_budget=token_budget, **kw)


def _expected(lm, hp, requests=REQUESTS, prefixes=PREFIXES) -> list[oracle.Target]:
    return [oracle.target(lm.model, lm.tokenizer, r, prefixes, hp) for r in requests]


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_those_of_the_oracle(family):
    found = _found(build(family))
    _agrees(found, reference(family).targets)
    assert found.z.dtype == torch.float32
    assert found.losses[:, -1].mean() < found.losses[:, 0].mean()


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("token_budget", [1, 250, 700])
def test_budgets_and_order_do_not_matter(family, token_budget):
    lm = build(family)
    told = []
    requests = REQUESTS[::-1]
    found = _found(lm, requests=requests, token_budget=token_budget, progress=told.append)
    _agrees(found, reference(family).targets[::-1])
    assert sum(told) == len(REQUESTS)
    assert len(told) > HYPERPARAMETERS.evaluations  # more than one batch


def test_chunks_are_joined():
    lm = build("qwen3")
    parts = [_found(lm, requests=chunk) for chunk in (REQUESTS[:1], REQUESTS[1:])]
    _agrees(Targets.concatenate(parts), reference("qwen3").targets)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "opt_projected"])
def test_each_edit_stops_for_itself(family):
    lm = build(family)
    last = sorted(target.losses[4] for target in reference(family).targets)
    hp = replace(HYPERPARAMETERS, loss_threshold=(last[1] + last[2]) / 2)
    expected = _expected(lm, hp)
    made = [len(target.losses) for target in expected]
    assert min(made) < max(made)
    for token_budget in (1, LARGE):
        _agrees(_found(lm, hp, token_budget=token_budget), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"evaluations": 1},
        {"evaluations": 2},
        {"clamp_factor": 0.05},
        {"kl_factor": 20.0},
        {"weight_decay": 200.0},
        {"learning_rate": 0.02},
        {"learning_rate": 0.1, "rate_unit": "relative"},
        {"layers": (0,)},
        {"layers": (1, 3)},
        {"loss_threshold": 1e9},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["gpt2", "llama2"])
def test_settings(family, change):
    """Each term and each limit of the optimisation where it matters."""
    lm = build(family)
    hp = replace(HYPERPARAMETERS, **change)
    requests = REQUESTS[1:3]
    found = _found(lm, hp, requests)
    _agrees(found, _expected(lm, hp, requests))
    if change.keys() & {"kl_factor", "weight_decay"}:
        assert relative(found.z, reference(family).z[1:3]) > 10 * TOLERANCE
    if "clamp_factor" in change:
        assert (found.delta_ratios <= 0.05 * (1 + 1e-5)).all()
    if change.get("evaluations") == 1 or "loss_threshold" in change:
        assert torch.equal(found.z, found.hidden)


@torch.no_grad()
def _is_chosen(lm, request: EditRequest, prefixes, target: oracle.Target, layer: int) -> bool:
    """Whether each token of the object is the model's choice in every row, with δ in the row."""
    for prefix in ("", *prefixes):
        row = oracle.row(lm.tokenizer, prefix, request.prompt, request.subject, request.target_new)

        def add(module, args, output, at=row.subject_last):
            oracle.hidden_of(output)[0, at] += target.z - target.hidden

        with oracle.block(lm.model, layer).register_forward_hook(add):
            best = lm.model(torch.tensor([row.ids]), use_cache=False).logits[0].argmax(-1)
        if any(int(best[i - 1]) != row.ids[i] for i in row.target):
            return False
    return True


@pytest.mark.parametrize(("family", "times"), [("gpt2", 1), ("gpt2", 3), ("llama", 2)])
def test_an_edit_stops_when_its_object_was_chosen_often_enough(family, times):
    """δ at an evaluation is the result with so many of them; the stop is at the right one."""
    lm, prefixes = build(family), PREFIXES[:2]
    hp = replace(HYPERPARAMETERS, evaluations=10, clamp_factor=8.0)
    objects = ("Paris", "Paris", "New York City")  # the last one is never chosen
    requests = [
        EditRequest(r.subject, "So said {}", new) for r, new in zip(REQUESTS, objects, strict=False)
    ]
    expected = []
    for request in requests:
        chosen = 0
        for count in range(1, hp.evaluations + 1):
            settings = replace(hp, evaluations=count)
            target = oracle.target(lm.model, lm.tokenizer, request, prefixes, settings)
            chosen += _is_chosen(lm, request, prefixes, target, hp.layers[-1])
            if chosen == times:
                break
        expected.append(target)
    made = [len(target.losses) for target in expected]
    assert max(made[:2]) < made[2] == hp.evaluations
    stopping = replace(hp, argmax_stop=times)
    _agrees(_found(lm, stopping, requests, prefixes), expected)


@pytest.mark.parametrize("prefixes", [(), PREFIXES[:1]], ids=["none", "one"])
def test_any_number_of_prefixes(prefixes):
    lm = build("phi")
    _agrees(_found(lm, prefixes=prefixes), _expected(lm, HYPERPARAMETERS, prefixes=prefixes))


@pytest.mark.parametrize("family", ["mistral", "gpt_neox", "bloom"])
def test_whole_rows_give_the_same(family, monkeypatch, caplog):
    """The way of a family that cannot be resumed, which says so."""
    monkeypatch.setattr(targets_module, "can_resume", lambda lm: False)
    found = _found(build(family))
    _agrees(found, reference(family).targets)
    assert "cannot be resumed" in caplog.text


def test_model_is_not_changed():
    lm = build("gemma3")
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    _found(lm, requests=REQUESTS[:2])
    after = lm.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_memory_that_runs_out_halves_the_budget():
    lm = build("llama")
    with short_of_memory(lm.blocks[3], rows=14):
        found = _found(lm)
    _agrees(found, reference("llama").targets)


def test_edit_that_never_fits_is_an_error():
    lm = build("llama")
    with short_of_memory(lm.blocks[3], rows=0), pytest.raises(ResourceError, match="memory"):
        _found(lm)


def test_edit_whose_loss_is_not_finite_is_marked_and_leaves_the_others_alone():
    lm = build("gpt2")
    ids = [set(lm.tokenizer(r.text + " " + r.target_new)["input_ids"]) for r in REQUESTS]
    spoilt = 2
    prefix_ids = set(lm.tokenizer("".join(PREFIXES))["input_ids"])
    others = set.union(prefix_ids, *(s for i, s in enumerate(ids) if i != spoilt))
    own = min(ids[spoilt] - others)
    separate = torch.nn.Embedding.from_pretrained(lm.model.get_parameter("lm_head.weight").clone())
    lm.model.set_input_embeddings(separate)  # the head must stay as it is
    with torch.no_grad():
        separate.weight[own] = torch.nan
    found = _found(lm)
    assert found.finite.tolist() == [i != spoilt for i in range(len(REQUESTS))]
    expected = reference("gpt2").targets
    for i in range(len(REQUESTS)):
        if i != spoilt:
            assert relative(found.z[i], expected[i].z) < TOLERANCE


def test_bfloat16_optimises_in_float32():
    lm = build("llama")
    lm.model.bfloat16()
    kernels: list[str | None] = []

    def note(_finished: int) -> None:
        kernels.append(lm.model.config._attn_implementation)

    found = _found(lm, progress=note)
    assert {*kernels} == {"eager"}, "one kernel's backward pass is slow in bf16"
    assert lm.model.config._attn_implementation == "sdpa"
    assert found.z.dtype == torch.float32
    hidden = torch.stack([target.hidden for target in reference("llama").targets])
    assert relative(found.hidden, hidden) < 0.05
    delta = found.z - found.hidden
    assert not torch.equal(delta, delta.to(torch.bfloat16).float())
    limits = HYPERPARAMETERS.clamp_factor * (1 + 1e-5)
    assert (found.delta_ratios <= limits).all()
    assert found.losses[:, -1].mean() < found.losses[:, 0].mean()


def test_subject_without_tokens_is_refused():
    request = replace(REQUESTS[0], subject="\u200b")
    with pytest.raises(InputError, match="subject"):
        _found(build("gpt2_slow_tokenizer"), requests=[request], prefixes=())


def test_a_file_without_targets_is_refused_by_name(tmp_path):
    path = tmp_path / "targets.safetensors"
    save_tensors({"z": torch.zeros(2, 3)}, path, {})
    with pytest.raises(IntegrityError, match=r"targets\.safetensors does not hold target vectors"):
        Targets.load(path)


def test_a_subject_that_is_the_first_token_of_all_is_told_of(caplog) -> None:
    requests = [EditRequest(name, "{}'s home is in", "Rome") for name in ("Zoë Müller", "a", "b")]
    plain, begun = build("gpt2"), build("llama")
    said = weak_keys(requests, plain_rows(plain, requests))
    assert said
    assert "2 of 3" in said
    assert repr(requests[1].text) in said
    assert weak_keys(requests, plain_rows(begun, requests)) is None  # a token of its own begins
    assert weak_keys(requests[:1], plain_rows(plain, requests[:1])) is None
    for lm in (plain, begun):
        compute_targets(lm, requests, (), replace(HYPERPARAMETERS, evaluations=1), token_budget=900)
    assert [record.getMessage() for record in caplog.records] == [said]
