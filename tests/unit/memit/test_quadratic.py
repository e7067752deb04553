"""The closed form against its formula, written out with dense inverses in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memit import reference as oracle
from memit.errors import NumericsError
from memit.quadratic import Quadratic, directions, solve, solve_in_parts
from memit.second_moment import SecondMoment
from memit.weight_delta import Dense, LowRank
from tests.reference import HYPERPARAMETERS, relative


def literal(K: Tensor, R: Tensor, form: Quadratic) -> Tensor:
    """(R Kᵀ + B) U (Uᵀ N U + ρI)⁻¹ Uᵀ."""
    eye = torch.eye(len(K), dtype=torch.float64)
    price = form.covariance_weight * form.moment.mean
    if form.past is not None:
        price = price + form.past
    N = price + form.ridge * eye + K @ K.T
    B = 0 if form.forgotten is None else -form.forgotten @ price
    U = eye if form.basis is None else form.basis
    inner = U.T @ N @ U + form.basis_ridge * torch.eye(U.shape[1], dtype=torch.float64)
    return (R @ K.T + B) @ U @ torch.linalg.inv(inner) @ U.T


def _problem(d: int, f: int, n: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def random(rows, columns):
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    samples = random(3 * f, f) @ torch.diag(torch.logspace(-1.5, 0.5, f, dtype=torch.float64))
    return random(f, n), random(d, n), SecondMoment(samples.T @ samples, 3 * f)


@given(
    d=st.integers(4, 40),
    f=st.integers(4, 60),
    n=st.integers(1, 80),
    covariance_weight=st.sampled_from((0.5, 20.0, 15_000.0)),
)
def test_every_form_solves_the_equation(d, f, n, covariance_weight):
    K, R, moment = _problem(d, f, n)
    hp = replace(HYPERPARAMETERS, covariance_weight=covariance_weight)
    expected = oracle.update(K, R, moment.mean, hp)
    change = solve(K, R, Quadratic(moment, covariance_weight), "layer 3")
    assert isinstance(change, LowRank if n * (d + f) < d * f else Dense)
    assert relative(change.dense(), expected) < 2e-6


@pytest.mark.parametrize(
    ("n", "kind"),
    [(1, LowRank), (19, LowRank), (20, Dense), (32, Dense), (33, Dense), (200, Dense)],
)
def test_form_by_number_of_edits(n, kind):
    """d = 32, f = 48: factors are smaller than Δ below n = 19.2, more edits than d from 33 on."""
    K, R, moment = _problem(32, 48, n)
    change = solve(K, R, Quadratic(moment, 20.0), "layer 3")
    assert type(change) is kind
    expected = oracle.update(K, R, moment.mean, replace(HYPERPARAMETERS, covariance_weight=20))
    assert relative(change.dense(), expected) < 2e-6
    if isinstance(change, LowRank):
        assert change.left.shape == (32, n)
        assert change.right.shape == (48, n)
    assert change.transposed().dense().shape == (48, 32)
    assert relative(change.transposed().dense().T, expected) < 2e-6


@pytest.mark.parametrize("n", [5, 30, 60])
def test_moment_that_is_not_definite_is_named(n):
    K, R, moment = _problem(32, 48, n)
    negative = SecondMoment(-moment.sum, moment.count)
    with pytest.raises(NumericsError, match="layer 3"):
        solve(K, R, Quadratic(negative, 20.0), "layer 3")


@given(
    d=st.integers(4, 40),
    f=st.integers(6, 60),
    n=st.integers(1, 80),
    parts=st.sets(st.sampled_from(("ridge", "past", "forgotten", "basis"))),
    covariance_weight=st.sampled_from((0.0, 3.0)),
)
def test_every_combination_of_parts_solves_the_equation(d, f, n, parts, covariance_weight):
    K, R, moment = _problem(d, f, n)
    form = _with_parts(d, f, Quadratic(moment, covariance_weight), parts)
    if not covariance_weight and not parts & {"ridge", "past", "basis"}:
        form = replace(form, ridge=0.1)  # without any of these nothing but K is in N
    change = solve(K, R, form, "layer 3")
    low_rank = "forgotten" not in parts and n * (d + f) < d * f
    assert isinstance(change, LowRank if low_rank else Dense)
    expected = literal(K, R, form)
    assert relative(change.dense(), expected) < 5e-6
    batches = zip(K.split(30, 1), R.split(30, 1), strict=True)
    assert relative(solve_in_parts(batches, form, "layer 3").dense(), expected) < 5e-6
    if "forgotten" not in parts:
        assert relative(R @ directions(K, form, "layer 3").T, expected) < 1e-7


def _with_parts(d: int, f: int, form: Quadratic, parts) -> Quadratic:
    """The form with random values of some of its parts."""
    keys, change, _ = _problem(d, f, f, seed=1)
    values = {"ridge": 0.7, "past": keys @ keys.T, "forgotten": change}
    if "basis" in parts:
        values |= {"basis": torch.linalg.qr(keys)[0][:, : f // 2], "basis_ridge": 0.3}
    chosen = {*parts, *({"basis_ridge"} if "basis" in parts else ())}
    return replace(form, **{name: values[name] for name in chosen})


def _batches(d: int, f: int):
    """Keys and wanted outputs of three batches, λC, and the original weights."""
    K, W, moment = _problem(d, f, 45)
    V, _, _ = _problem(45, d, 45, seed=2)
    return list(zip(K.split(15, 1), V.split(15, 1), strict=True)), moment, W @ K.T


def test_sequences_with_earlier_keys_add_up_to_one_edit_of_everything():
    """One layer, fixed keys and wanted outputs: R_t = V_t − W_{t−1} K_t."""
    batches, moment, W = _batches(32, 48)
    past, total = torch.zeros(48, 48, dtype=torch.float64), torch.zeros_like(W)
    for K, V in batches:
        form = Quadratic(moment, 2.0, past=past)
        total = total + (V - (W + total) @ K) @ directions(K, form, "layer 3").T
        past = past + K @ K.T
    K, V = (torch.cat(part, 1) for part in zip(*batches, strict=True))
    assert relative(total, literal(K, V - W @ K, Quadratic(moment, 2.0))) < 1e-8


def test_forgetting_leaves_what_the_last_batch_alone_needs():
    batches, moment, W = _batches(32, 48)
    past, total = torch.zeros(48, 48, dtype=torch.float64), torch.zeros_like(W)
    for K, V in batches:
        form = Quadratic(moment, 2.0, past=past, forgotten=total)
        total = total + solve(K, V - (W + total) @ K, form, "layer 3").dense().double()
        alone = literal(K, V - W @ K, replace(form, forgotten=None))
        assert relative(total, alone) < 1e-5
        past = past + K @ K.T
