"""Oracles: closed values, SciPy's and NumPy's eigenvalues, resampled batches, torch.optim, exact quadratures."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigvalsh
from sklearn.datasets import load_wine
from torch import nn
from torch.autograd.functional import hessian

from companion import models
from companion.linear_dynamics.batch_size_learning_rates import (
    LanczosLearner,
    batch_ggn_extreme,
    batch_hessian_extreme,
    curvature_noise,
    descend,
    effective_batch_size,
    flat_network,
    hessian_matvec,
    lanczos,
    largest_usable_rate,
    max_learning_rate,
    min_damping,
    top_eigenpairs,
)

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_matrix(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def symmetric(dim, seed=0):
    a = random_matrix(dim, dim, seed=seed)
    return (a + a.mT) / 2


def squares(w, X, y):
    """Least squares, whose Hessian is the mean of x xᵀ."""
    return 0.5 * (X @ w - y).square().mean()


# --- what random matrix theory predicts -------------------------------------------------------------------------------


@given(N=st.integers(2, 60), seed=st.integers(0, 2**31), data=st.data())
@settings(deadline=None, max_examples=20)
def test_effective_batch_size_is_that_of_sampling_without_replacement(N, seed, data):
    B = data.draw(st.integers(1, N - 1))
    a = np.random.default_rng(seed).normal(size=N)
    pair = -a.var() / (N - 1)  # covariance of two draws, because all N have a fixed sum
    variance = (a.var() + (B - 1) * pair) / B
    assert a.var(ddof=1) / effective_batch_size(B, N) == pytest.approx(variance)
    assert a.var() / effective_batch_size(B, N, exact=True) == pytest.approx(variance)


def test_a_batch_of_everything_does_not_fluctuate():
    for exact in (False, True):
        assert effective_batch_size(100, 100, exact) == math.inf
    assert batch_hessian_extreme(0.7, 1000, 0.3, 100, 100) == 0.7
    assert batch_hessian_extreme(-0.7, 1000, 0.3, 100, 100) == -0.7
    assert max_learning_rate(100, 0.7, 1000, 0.3, model="hessian", N=100) == 2 / 0.7


def test_hessian_extreme_closed_values():
    assert batch_hessian_extreme(2.0, 1000, 0.01, 10, 100) == pytest.approx(2.45)
    assert batch_hessian_extreme(0.5, 1000, 0.01, 10, 100) == pytest.approx(1.8973666)
    assert batch_hessian_extreme(-2.0, 1000, 0.01, 10, 100) == pytest.approx(-2.45)


@given(lam=st.floats(0.1, 10), sigma2=st.floats(0.01, 10), P=st.integers(10, 10**6), B=st.integers(1, 999))
def test_hessian_extreme_is_odd_grows_and_joins_at_the_threshold(lam, sigma2, P, B):
    value = batch_hessian_extreme(lam, P, sigma2, B, 1000)
    assert batch_hessian_extreme(-lam, P, sigma2, B, 1000) == -value
    assert value >= lam * (1 - 1e-12)
    assert batch_hessian_extreme(lam, P, sigma2, B + 1, 1000) <= value
    threshold = math.sqrt(P * sigma2 / effective_batch_size(B, 1000))
    for side in (1 - 1e-9, 1 + 1e-9):
        assert batch_hessian_extreme(side * threshold, P, sigma2, B, 1000) == pytest.approx(2 * threshold)


@pytest.mark.parametrize("B", [2, 8, 40])
def test_hessian_extreme_is_that_of_a_spiked_random_matrix(B):
    dim, sigma2 = 500, 0.008
    rng = np.random.default_rng(B)
    noise = rng.normal(0, math.sqrt(sigma2 / effective_batch_size(B, 10**6)), (dim, dim))
    matrix = (noise + noise.T) / math.sqrt(2)
    matrix[0, 0] += 1.5
    matrix[1, 1] -= 0.8
    values = eigvalsh(matrix)
    assert values[-1] == pytest.approx(batch_hessian_extreme(1.5, dim, sigma2, B, 10**6), rel=0.05)
    assert values[0] == pytest.approx(batch_hessian_extreme(-0.8, dim, sigma2, B, 10**6), rel=0.05)


@pytest.mark.parametrize("lam", [1.2, 20.0])
@pytest.mark.parametrize("B", [20, 150, 1500])
def test_ggn_extreme_is_that_of_a_spiked_wishart_matrix(lam, B):
    rng = np.random.default_rng(B)
    draws = rng.normal(size=(12, B, 100)) * np.sqrt([0.5 * lam] + [0.5] * 99)
    tops = [eigvalsh(x @ x.T if B < 100 else x.T @ x, subset_by_index=[min(B, 100) - 1] * 2)[0] / B for x in draws]
    assert np.mean(tops) == pytest.approx(batch_ggn_extreme(0.5 * lam, 100, 0.5, B), rel=0.07)


def test_ggn_extreme_joins_at_the_threshold():
    threshold = 0.3 * (1 + math.sqrt(50))
    low, high = (batch_ggn_extreme(side * threshold, 500, 0.3, 10) for side in (1 - 1e-9, 1 + 1e-9))
    assert low == pytest.approx(high)
    assert low == pytest.approx(0.3 * (1 + math.sqrt(50)) ** 2)


@pytest.mark.parametrize(("optimizer", "growth"), [("sgd", 1.962), ("adam", 1.4007)])
def test_learning_rates_grow_with_the_batch_and_saturate(optimizer, growth):
    def rate(B):
        return max_learning_rate(B, 100.0, 10**5, 1.0, optimizer)

    assert rate(40) / rate(20) == pytest.approx(growth, abs=1e-3)
    assert 1 < rate(2 * 10**6) / rate(10**6) < 1.001
    assert rate(10**9) == pytest.approx(0.02 if optimizer == "sgd" else 0.2, rel=1e-3)


def test_learning_rates_under_additive_noise():
    rates = [max_learning_rate(B, 6.0, 10**6, 1e-4, model="hessian", N=10**9) for B in (4, 8)]
    assert rates == pytest.approx([0.19672131, 0.24742268], abs=1e-8)
    adam = max_learning_rate(4, 6.0, 10**6, 1e-4, "adam", "hessian", 10**9)
    assert adam == pytest.approx(math.sqrt(2 * rates[0]))


@given(B=st.integers(1, 10**4))
def test_additive_noise_never_gives_an_exponent_above_one_half(B):
    rates = [max_learning_rate(b, 6.0, 10**6, 1e-4, model="hessian", N=10**9) for b in (B, 2 * B)]
    assert rates[1] / rates[0] <= math.sqrt(2) * (1 + 1e-6)


def test_damping_bounds_the_preconditioned_curvature_of_a_batch():
    bulk, B, lr = 1e-3, 2, 0.3
    delta = min_damping(lr, B, 4000 * bulk)
    x = math.sqrt(bulk) * random_matrix(20, B, 4000)
    top = torch.linalg.eigvalsh(x @ x.mT / B / (bulk + delta))[:, -1].mean()
    assert float(lr * top) == pytest.approx(2, rel=0.06)
    assert min_damping(2 * lr, 2 * B, 4.0) == pytest.approx(delta)


# --- the curvature of a network ---------------------------------------------------------------------------------------


def small_network():
    forward, w = flat_network(models.mlp([3, 5, 2], generator=generator(), activation=nn.Tanh), generator(1))
    X, y = random_matrix(20, 3, seed=2, dtype=torch.float32), torch.arange(20) % 2

    def loss(w, X, y):
        return nn.functional.cross_entropy(forward(w, X), y)

    return loss, w, X, y


def test_flat_network_is_the_network():
    network = models.mlp([3, 5, 2], generator=generator(), activation=nn.Tanh)
    forward, start = flat_network(network, generator())
    x = random_matrix(4, 3, dtype=torch.float32)
    w = nn.utils.parameters_to_vector(network.parameters())
    torch.testing.assert_close(forward(w, x), network(x))
    assert start.shape == w.shape
    _, wide = flat_network(models.mlp([400, 300, 2], generator=generator()), generator(3))
    assert float(wide[:120_000].var()) == pytest.approx(1 / 400, rel=0.03)
    assert not wide[120_000:120_300].any()
    _, wider = flat_network(models.mlp([400, 300, 2], generator=generator()), generator(3), gain=2.0)
    torch.testing.assert_close(wider, 2**0.5 * wide)


def test_a_gain_of_two_keeps_the_signal_of_a_deep_relu_network():
    sizes = {}
    for gain in (1.0, 2.0):
        network = models.convnet(3, (64,) * 3, 10, generator=generator(), convolutions=(3, 3, 3))
        forward, w = flat_network(network, generator(1), gain)
        sizes[gain] = float(forward(w, random_matrix(8, 3, 16, 16, dtype=torch.float32)).std())
    assert sizes[2.0] > 0.3
    assert sizes[1.0] < 0.1 * sizes[2.0]  # nine ReLU layers halve the mean square nine times


def test_matvec_and_top_eigenpairs_are_those_of_the_hessian():
    loss, w, X, y = small_network()
    matrix = hessian(lambda w: loss(w, X, y), w)
    matvec = hessian_matvec(loss, w, X, y)
    torch.testing.assert_close(torch.stack([matvec(row) for row in torch.eye(len(w))]), matrix, rtol=1e-4, atol=1e-6)
    values, vectors = top_eigenpairs(matvec, len(w), 4, generator())
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix.numpy())[:-5:-1], atol=1e-5)
    torch.testing.assert_close(matrix @ vectors, vectors * values, rtol=0, atol=2e-4)


@pytest.mark.parametrize("chunk_size", [1, 7, 20])
def test_chunks_change_neither_products_nor_noise(chunk_size):
    loss, w, X, y = small_network()
    whole, parts = hessian_matvec(loss, w, X, y), hessian_matvec(loss, w, X, y, chunk_size)
    for row in torch.eye(len(w))[:5]:
        for _ in range(2):  # a product can be taken again
            torch.testing.assert_close(parts(row), whole(row), rtol=1e-4, atol=1e-6)
    values, vectors = top_eigenpairs(whole, len(w), 4, generator())
    expected, noise = (curvature_noise(loss, w, X, y, values, vectors, size) for size in (20, chunk_size))
    assert noise.c_total == pytest.approx(expected.c_total, rel=1e-4)
    assert noise.coefficient == pytest.approx(expected.coefficient, rel=1e-4)
    np.testing.assert_allclose(noise.c_j, expected.c_j, rtol=1e-3, atol=1e-7)


def test_complete_lanczos_is_the_eigendecomposition():
    matrix = symmetric(30)
    ritz, weights = lanczos(lambda v: matrix @ v, 30, 30, generator(4), F64)
    values, vectors = np.linalg.eigh(matrix.numpy())
    start = random_matrix(30, seed=4)
    np.testing.assert_allclose(ritz, values, atol=1e-8)
    np.testing.assert_allclose(weights, (vectors.T @ (start / start.norm()).numpy()) ** 2, atol=1e-8)


@settings(deadline=None, max_examples=15)
@given(m=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_lanczos_is_a_gauss_quadrature(m, seed):
    matrix, start = symmetric(30, seed) / 10, random_matrix(30, seed=seed)
    ritz, weights = lanczos(lambda v: matrix @ v, 30, m, generator(seed), F64)
    start, power = start / start.norm(), start / start.norm()
    for p in range(2 * m):
        assert float((weights * ritz**p).sum()) == pytest.approx(float(start @ power), abs=1e-10)
        power = matrix @ power


def test_lanczos_makes_no_ghosts_in_single_precision():
    matrix = torch.diag(torch.cat([torch.tensor([100.0, 50.0]), torch.linspace(0, 1, 298)]))
    ritz, weights = lanczos(lambda v: matrix @ v, 300, 60, generator())
    assert int((ritz > 40).sum()) == 2
    start = random_matrix(300, dtype=torch.float32)
    assert float(weights[-1]) == pytest.approx(float(start[0] ** 2 / start.square().sum()), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_lanczos_stops_when_the_space_is_exhausted(dtype):
    matrix = torch.diag(torch.tensor([3.0] * 10 + [-1.0] * 10, dtype=dtype))
    ritz, weights = lanczos(lambda v: matrix @ v, 20, 10, generator(), dtype)
    np.testing.assert_allclose(ritz, [-1, 3], atol=1e-5)
    assert float(weights.sum()) == pytest.approx(1)
    ritz, _ = lanczos(lambda v: 0 * v, 20, 10, generator(), dtype)
    assert ritz.tolist() == [0]


def wine():
    X = torch.from_numpy(load_wine().data)
    X = (X - X.mean(0)) / X.std(0)
    values, vectors = torch.linalg.eigh(X.mT @ X / len(X))
    return X, torch.zeros(len(X), dtype=F64), torch.zeros(13, dtype=F64), values.flip(0), vectors.flip(1)


@pytest.mark.parametrize("k", [1, 4, 13])
def test_curvature_noise_of_least_squares_is_known(k):
    X, y, w, values, vectors = wine()
    noise = curvature_noise(squares, w, X, y, values[:k], vectors[:, :k])
    rows, top = X.numpy(), vectors[:, 0].numpy()
    deviations = rows * (rows @ top)[:, None] - rows.T @ rows @ top / len(rows)
    along = ((deviations @ vectors.numpy()) ** 2).sum(0) / (len(rows) - 1)
    assert noise.c_total == pytest.approx((deviations**2).sum() / (len(rows) - 1))
    np.testing.assert_allclose(noise.c_j, along[:k])
    gaps = (values[0] - torch.cat([values[:k], torch.zeros(13 - k)])).numpy()
    assert noise.coefficient == pytest.approx((along[1:] / gaps[1:]).sum())


def test_curvature_noise_predicts_the_top_eigenvalue_of_batches_of_real_data():
    X, y, w, values, vectors = wine()
    noise = curvature_noise(squares, w, X, y, values, vectors)
    for B, tolerance in ((20, 0.01), (40, 0.005), (80, 0.004)):  # the next order falls faster than 1/B
        order = torch.rand(4000, len(X), generator=generator(B)).argsort(1)[:, :B]
        measured = torch.linalg.eigvalsh(X[order].mT @ X[order] / B)[:, -1].mean()
        predicted = values[0] + noise.coefficient / effective_batch_size(B, len(X))
        assert float(measured) == pytest.approx(float(predicted), rel=tolerance)
        assert measured > 1.01 * values[0]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "momentum", "reference"),
    [
        ("sgd", 0.0, lambda p: torch.optim.SGD(p, lr=0.1)),
        ("sgd", 0.8, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
        ("adam", 0.9, lambda p: torch.optim.Adam(p, lr=0.1)),
        ("adam", 0.7, lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.7, 0.999))),
    ],
)
def test_descend_is_torch_optim(name, momentum, reference):
    loss, start, _, _ = small_network()
    batches = [(random_matrix(2, 4, 3, seed=s, dtype=torch.float32), torch.arange(8).view(2, 4) % 2) for s in range(6)]
    w = torch.stack([start, -start])[:, None].repeat(1, 2, 1)
    before, rates = w.clone(), torch.tensor([[0.1], [0.05]])
    records = descend(loss, w, batches, lambda step, _: (rates, momentum), name, record_every=2)
    assert records.shape == (3, *w.shape)
    assert torch.equal(w, before)
    for seed in range(2):
        expected = w[seed, 0].clone().requires_grad_()
        optimizer = reference([expected])
        for X, y in batches:
            optimizer.zero_grad()
            loss(expected, X[seed], y[seed]).backward()
            optimizer.step()
        torch.testing.assert_close(records[-1, seed, 0], expected.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(records[-1, :, 0], records[-1, :, 1])  # runs have their own rates


def test_descend_diverges_beyond_two_over_the_curvature():
    X, y = torch.ones(1, 1, 1), torch.zeros(1, 1)  # curvature 1
    rates = torch.tensor([[1.99], [2.01]])
    steps = [(X, y)] * 50
    last = descend(squares, torch.ones(1, 2, 1), steps, lambda step, _: (rates, 0.0))[-1].abs().flatten()
    np.testing.assert_allclose(last, [0.99**50, 1.01**50], rtol=1e-4)


def test_records_start_late_and_keep_what_is_asked_for():
    steps = [(torch.ones(1, 1, 1), torch.zeros(1, 1))] * 7
    options = dict(schedule=lambda step, _: (0.5, 0.0), record_every=2)
    everything = descend(squares, torch.ones(1, 2, 1), steps, **options)
    np.testing.assert_allclose(everything[:, 0, 0, 0], [1 / 4, 1 / 16, 1 / 64])
    late = descend(squares, torch.ones(1, 2, 1), steps, **options, record_from=4, record=lambda w: w.sum(-1))
    assert torch.equal(late, everything[1:].sum(-1))


def test_the_schedule_sees_steps_and_parameters():
    seen = []

    def schedule(step, w):
        seen.append((step, float(w)))
        return 0.5, 0.0

    descend(squares, torch.ones(1, 1, 1), [(torch.ones(1, 1, 1), torch.zeros(1, 1))] * 3, schedule)
    assert seen == [(0, 1.0), (1, 0.5), (2, 0.25)]


def test_largest_usable_rate_takes_the_upper_crossing():
    rates = torch.tensor([1.0, 2.0, 4.0, 8.0])
    losses = torch.tensor([[3.0, 1.0, 1.0, 3.0], [0.0, 5.0, 1.0, 9.0], [1.0, 1.0, math.nan, math.nan]])
    expected = [4 * 2**0.5, 4 * 2 ** (1 / 8), 2.0]
    np.testing.assert_allclose(largest_usable_rate(rates, losses, 2.0), expected, rtol=1e-6)
    none = largest_usable_rate(rates, torch.tensor([[1.0, 1, 1, 1], [3, 3, 3, 3]]), 2.0)
    assert none.isnan().all()


# --- the learner ------------------------------------------------------------------------------------------------------


def spectrum(top, bulk, dim=200):
    diagonal = torch.full((dim,), bulk)
    diagonal[0] = top
    return lambda v: diagonal * v


def test_rules_of_the_learner():
    heavy = LanczosLearner(20, 2, generator(), rule="heavy_ball")
    lr, momentum = heavy.propose(spectrum(9.0, 1.0), 200)
    assert lr == pytest.approx(4 / 16, rel=1e-3)
    assert momentum == pytest.approx(1 / 4, rel=1e-3)
    lr, momentum = LanczosLearner(20, 2, generator()).propose(spectrum(9.0, 1.0), 200)
    assert lr == pytest.approx(1 / 9, rel=1e-3)
    assert momentum == pytest.approx(1 / 4, rel=1e-3)
    assert LanczosLearner(20, 2, generator(), 0.6).propose(spectrum(1e4, 1.0), 200)[1] == 0.6


def test_the_textbook_rule_is_the_fastest_heavy_ball():
    eigenvalues = torch.tensor([9.0, 1.0], dtype=F64)

    def factor(lr, momentum):
        """Spectral radius of heavy ball on a quadratic."""
        blocks = [[[1 + momentum - lr * h, -momentum], [1.0, 0.0]] for h in eigenvalues]
        return float(torch.linalg.eigvals(torch.tensor(blocks, dtype=F64)).abs().max())

    lr, momentum = LanczosLearner(20, 2, generator(), rule="heavy_ball").propose(spectrum(9.0, 1.0), 200)
    best = factor(lr, momentum)
    assert best == pytest.approx(0.5, abs=0.02)
    assert all(factor(a * lr, momentum) > best - 0.02 for a in (0.8, 0.9, 1.1, 1.2))
    assert all(factor(lr, momentum + b) > best - 0.02 for b in (-0.1, 0.1))


def test_the_learner_lengthens_steps_slowly_and_shortens_them_at_once():
    learner = LanczosLearner(20, 2, generator())
    rates = [learner.propose(spectrum(top, 0.1), 200)[0] for top in (10.0, 1.0, 20.0)]
    np.testing.assert_allclose(rates, [1 / 10, 1 / 8, 1 / 20], rtol=1e-3)


def test_the_learner_looks_more_often_at_the_start():
    learner = LanczosLearner(20, 2, generator())
    assert [step for step in range(130) if learner.due(step)] == [0, 5, 10, 20, 30, 40, 60, 80, 100, 120]
    assert all(LanczosLearner(1, 2, generator()).due(step) for step in range(10))


# --- what a reader can get wrong --------------------------------------------------------------------------------------

X, Y, W = torch.ones(3, 2), torch.ones(3), torch.zeros(2)
EYE = torch.eye(2)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: effective_batch_size(0, 10), "B must"),
        (lambda: effective_batch_size(11, 10), "B must"),
        (lambda: batch_hessian_extreme(0.0, 10, 1.0, 1, 10), "lam"),
        (lambda: batch_hessian_extreme(math.nan, 10, 1.0, 1, 10), "lam"),
        (lambda: batch_hessian_extreme(1.0, 0, 1.0, 1, 10), "P must"),
        (lambda: batch_hessian_extreme(1.0, 10, -1.0, 1, 10), "sigma2"),
        (lambda: batch_hessian_extreme(1.0, 10, 1.0, 20, 10), "B must"),
        (lambda: batch_ggn_extreme(-1.0, 10, 1.0, 1), "lam"),
        (lambda: batch_ggn_extreme(1.0, 10, 0.0, 1), "sigma2"),
        (lambda: batch_ggn_extreme(1.0, 10, 1.0, 0), "B must"),
        (lambda: max_learning_rate(1, 1.0, 10, 1.0, "adagrad"), "optimizer"),
        (lambda: max_learning_rate(1, 1.0, 10, 1.0, model="fisher"), "model"),
        (lambda: max_learning_rate(1, 1.0, 10, 1.0, model="hessian"), "N, the number"),
        (lambda: max_learning_rate(1, -1.0, 10, 1.0, model="hessian", N=10), "lam"),
        (lambda: min_damping(0.0, 1, 1.0), "lr"),
        (lambda: min_damping(0.1, 0, 1.0), "B must"),
        (lambda: min_damping(0.1, 1, math.nan), "bulk_trace"),
        (lambda: top_eigenpairs(lambda v: v, 3, 3, generator()), "k must"),
        (lambda: lanczos(lambda v: v, 3, 4, generator()), "num_steps"),
        (lambda: lanczos(lambda v: v, 3, 0, generator()), "num_steps"),
        (lambda: curvature_noise(squares, W, X, Y[:2], torch.ones(1), EYE[:, :1]), "X and y"),
        (lambda: curvature_noise(squares, W, X[:1], Y[:1], torch.ones(1), EYE[:, :1]), "X and y"),
        (lambda: curvature_noise(squares, W, X, Y, torch.ones(1), EYE), "eigvecs"),
        (lambda: curvature_noise(squares, W, X, Y, torch.tensor([1.0, 2.0]), EYE), "eigvals"),
        (lambda: curvature_noise(squares, W, X, Y, torch.tensor([-1.0, -2.0]), EYE), "eigvals"),
        (lambda: descend(squares, W, [], lambda step, w: (1, 0)), "w must"),
        (lambda: descend(squares, W[None, None], [], lambda step, w: (1, 0), "lion"), "optimizer"),
        (lambda: descend(squares, W[None, None], [], lambda step, w: (1, 0), record_every=0), "record_every"),
        (lambda: largest_usable_rate(torch.tensor([2.0, 1.0]), torch.ones(2), 1.0), "rates"),
        (lambda: largest_usable_rate(torch.tensor([0.0, 1.0]), torch.ones(2), 1.0), "rates"),
        (lambda: largest_usable_rate(torch.tensor([1.0, 2.0]), torch.ones(3), 1.0), "losses"),
        (lambda: LanczosLearner(0, 2, generator()), "probe_every"),
        (lambda: LanczosLearner(2, 0, generator()), "num_steps"),
        (lambda: LanczosLearner(2, 2, generator(), max_momentum=1.0), "max_momentum"),
        (lambda: LanczosLearner(2, 2, generator(), rule="adam"), "rule"),
        (lambda: LanczosLearner(2, 2, generator()).propose(lambda v: -v, 5), "positive eigenvalue"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
