"""Oracles: closed forms, SciPy's integrators, autograd, conservation laws and invariances."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp

from companion.linear_dynamics.exact_solutions import (
    decoupled_weights,
    epochs_to_learn,
    gradients,
    hierarchy,
    initial_weights,
    jacobian_singular_values,
    learning_time,
    mode_strength,
    pretrain_greedy,
    train_deep_linear,
)

F64 = torch.float64
TREE = hierarchy(3)
ONE = torch.eye(8, dtype=F64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def product(weights):
    return torch.linalg.multi_dot(weights[::-1])


# --- one mode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 20])
@pytest.mark.parametrize(("s", "u0"), [(3.0, 0.02), (0.4, 0.01), (1.0, 2.5)])
def test_mode_strength_solves_the_paper_s_equation(depth, s, u0):
    tau = 0.7
    t = np.linspace(0, 5, 40)

    def flow(_, u):
        return depth * u ** (2 - 2 / depth) * (s - u) / tau

    solution = solve_ivp(flow, (0, 5), [u0], method="DOP853", t_eval=t, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(mode_strength(t, s, u0, depth, tau), solution.y[0], atol=1e-7)


def test_mode_strength_is_the_closed_form_for_two_matrices():
    t, s, u0 = np.linspace(0, 4, 9), 3.0, 1e-3
    grown = np.exp(2 * s * t)
    np.testing.assert_allclose(mode_strength(t, s, u0), s * grown / (grown - 1 + s / u0), rtol=1e-12)
    assert mode_strength(np.array(1e6), s, u0) == s  # no overflow


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_mode_strength_takes_times_of_any_shape_and_order(depth):
    t = np.array([[2.0, 0.0, 1.0], [1.0, 0.5, 2.0]])
    expected = [[mode_strength(np.array([x]), 1.0, 0.1, depth)[0] for x in row] for row in t]
    np.testing.assert_allclose(mode_strength(t, 1.0, 0.1, depth), expected, rtol=1e-7)
    assert mode_strength(np.array(0.0), 1.0, 0.1, depth) == pytest.approx(0.1, rel=1e-12)
    assert mode_strength(np.array([]), 1.0, 0.1, depth).shape == (0,)


def test_learning_time_has_the_value_computed_by_hand():
    assert learning_time(3, 1e-3, 1.5) == pytest.approx(math.log(2999) / 6, rel=1e-14)
    assert learning_time(3, 1e-3, 1.5) == pytest.approx(1.33433903, abs=5e-9)


@pytest.mark.parametrize("depth", [1, 2, 3, 10])
def test_learning_time_is_the_integral(depth):
    value, _ = quad(lambda u: 1 / (depth * u ** (2 - 2 / depth) * (3 - u)), 0.1, 2.5, epsabs=0, epsrel=1e-12)
    assert learning_time(3, 0.1, 2.5, depth, tau=2.0) == pytest.approx(2 * value, rel=1e-10)


@settings(deadline=None, max_examples=40)
@given(
    s=st.floats(0.1, 10), start=st.floats(1e-4, 0.5), end=st.floats(0.55, 0.99), depth=st.integers(1, 12),
    above=st.booleans(),
)  # fmt: skip
def test_learning_time_inverts_mode_strength(s, start, end, depth, above):
    start, end = (1 / start, 1 / end) if above else (start, end)
    t = learning_time(s, start * s, end * s, depth)
    assert mode_strength(np.array(t), s, start * s, depth) == pytest.approx(end * s, rel=1e-6)


@pytest.mark.parametrize(("u0", "uf"), [(0.1, 2.5), (0.01, 1.0), (9.0, 3.5)])
def test_depth_times_learning_time_has_the_paper_s_limit(u0, uf):
    limit = learning_time(3, u0, uf, math.inf)
    errors = [abs(depth * learning_time(3, u0, uf, depth) / limit - 1) for depth in (10**3, 10**5)]
    assert errors[1] < 1e-4
    assert errors[1] < errors[0] / 50  # first order in 1/D


def test_learning_times_of_known_cases():
    values = [depth * learning_time(3, 0.1, 2.5, depth) for depth in (10, 100, 10_000)]
    assert values == pytest.approx([2.956, 3.659, 3.7520], abs=5e-4)
    assert learning_time(3, 0.1, 2.5, math.inf) == pytest.approx(3.7530, abs=5e-5)


# --- the task and the initial weights ---------------------------------------------------------------------------------


def test_hierarchy_has_the_singular_values_of_a_binary_tree():
    expected = torch.tensor([15.0, 7, 3, 3, 1, 1, 1, 1], dtype=F64).sqrt()
    torch.testing.assert_close(torch.linalg.svdvals(TREE), expected, rtol=0, atol=1e-12)
    shared = [[4 - (i ^ j).bit_length() for j in range(8)] for i in range(8)]  # nodes above both leaves
    assert (TREE.mT @ TREE).tolist() == shared


@pytest.mark.parametrize(("n_out", "n_in"), [(6, 6), (9, 4), (4, 9)])
def test_orthogonal_weights_do_what_torch_does(n_out, n_in):
    (ours,) = initial_weights([n_in, n_out], "orthogonal", generator(), gain=1.3)
    theirs = torch.nn.init.orthogonal_(torch.empty(n_out, n_in, dtype=F64), gain=1.3, generator=generator())
    small = (lambda w: w.mT @ w) if n_out >= n_in else (lambda w: w @ w.mT)
    torch.testing.assert_close(small(ours), small(theirs), rtol=0, atol=1e-12)
    torch.testing.assert_close(small(ours), 1.69 * torch.eye(min(n_out, n_in), dtype=F64), rtol=0, atol=1e-12)


def test_orthogonal_weights_have_no_preferred_direction():
    g = generator()
    draws = torch.stack(initial_weights([3] * 2001, "orthogonal", g))
    assert draws.mean(0).abs().max() < 5 / (3 * 2000) ** 0.5  # five standard errors of an entry
    assert abs(torch.linalg.det(draws).mean()) < 5 / 2000**0.5  # rotations and reflections alike


def test_gaussian_weights_have_variance_one_over_fan_in():
    first, second = initial_weights([400, 300, 100], "gaussian", generator(), gain=2.0)
    assert first.shape == (300, 400)
    assert first.var() == pytest.approx(4 / 400, rel=0.03)
    assert second.var() == pytest.approx(4 / 300, rel=0.04)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_decoupled_weights_start_every_mode_at_the_same_strength(depth):
    task = random_matrix(6, 3) @ random_matrix(3, 8, seed=1)  # rank 3
    u, _, vh = torch.linalg.svd(task, full_matrices=False)
    weights = decoupled_weights(task, 4, depth, 0.2, generator())
    start = product(weights) if depth > 1 else weights[0]
    torch.testing.assert_close(start, 0.2 * u[:, :3] @ vh[:3], rtol=0, atol=1e-12)
    for below, above in pairwise(weights):  # balanced
        torch.testing.assert_close(below @ below.mT, above.mT @ above, rtol=0, atol=1e-12)


# --- gradient descent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[4, 3], [4, 6, 3], [4, 2, 5, 3, 6]])
def test_gradients_agree_with_autograd(sizes):
    weights = [random_matrix(2, b, a, seed=a + 10 * b).requires_grad_() for a, b in pairwise(sizes)]
    sigma31, root = random_matrix(sizes[-1], 4, seed=3), random_matrix(4, 4, seed=4)
    sigma11 = root @ root.mT
    w = weights[0]
    for weight in weights[1:]:
        w = weight @ w
    loss = 0.5 * torch.einsum("bij,jk,bik->", w, sigma11, w) - torch.einsum("ij,bij->", sigma31, w)
    expected = torch.autograd.grad(loss, weights)
    ours, end_to_end = gradients([weight.detach() for weight in weights], sigma31, sigma11)
    torch.testing.assert_close(end_to_end, w.detach(), rtol=0, atol=1e-10)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_one_matrix_converges_geometrically():
    start = random_matrix(15, 8)
    products, (final,) = train_deep_linear([start], TREE, ONE, lr=0.1, steps=30, record_every=10)
    expected = [TREE + 0.9**k * (start - TREE) for k in (0, 10, 20, 30)]
    torch.testing.assert_close(products, torch.stack(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(final, expected[-1], rtol=0, atol=1e-12)


def test_training_is_pytorch_s_gradient_descent():
    start, root = [random_matrix(6, 5), random_matrix(7, 6, seed=1), random_matrix(3, 7, seed=2)], random_matrix(5, 5)
    sigma31, sigma11 = random_matrix(3, 5, seed=3), root @ root.mT
    weights = [weight.clone().requires_grad_() for weight in start]
    optimizer = torch.optim.SGD(weights, lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        w = product(weights)
        (0.5 * (w @ sigma11 @ w.mT).trace() - (sigma31.mT @ w).trace()).backward()
        optimizer.step()
    _, ours = train_deep_linear(start, sigma31, sigma11, 1e-3, 5, 1)
    for one, other in zip(ours, weights, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("depth", "u0"), [(2, 1e-2), (3, 0.05), (5, 0.1)])
def test_decoupled_training_follows_the_theory(depth, u0):
    u, s, vh = torch.linalg.svd(TREE, full_matrices=False)
    errors = []
    for lr in (4e-3, 2e-3):
        steps = round(4 / lr)
        weights = decoupled_weights(TREE, 10, depth, u0, generator())
        products, _ = train_deep_linear(weights, TREE, ONE, lr, steps, record_every=steps // 40)
        modes = u.mT @ products @ vh.mT
        strengths = modes.diagonal(dim1=-2, dim2=-1)
        assert (modes - torch.diag_embed(strengths)).abs().max() < 1e-12
        theory = np.stack([mode_strength(np.linspace(0, 4, 41), float(x), u0, depth) for x in s], axis=1)
        errors.append(np.abs(strengths.numpy() - theory).max())
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)  # the error is that of finite steps: first order


def test_balance_is_conserved_up_to_the_step_size():
    sizes, drifts = [8, 10, 9, 15], []
    start = [0.3 * weight for weight in initial_weights(sizes, "gaussian", generator(), gain=1.0)]

    def imbalances(weights):
        return [a @ a.mT - b.mT @ b for a, b in pairwise(weights)]

    for lr, steps in ((2e-4, 5000), (1e-4, 10_000)):
        _, end = train_deep_linear(start, TREE, ONE, lr, steps, record_every=steps)
        pairs = zip(imbalances(start), imbalances(end), strict=True)
        scale = max(float((weight @ weight.mT).norm()) for weight in end)
        drifts.append(max(float((a - b).norm()) for a, b in pairs) / scale)
    assert drifts[0] < 5e-4
    assert drifts[0] / drifts[1] == pytest.approx(2, rel=0.05)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), layer=st.integers(0, 1))
def test_a_change_of_hidden_basis_changes_nothing(seed, layer):
    weights = initial_weights([8, 6, 6, 15], "gaussian", generator(seed), gain=0.5)
    (rotation,) = initial_weights([6, 6], "orthogonal", generator(seed + 1))
    turned = list(weights)
    turned[layer], turned[layer + 1] = rotation @ turned[layer], turned[layer + 1] @ rotation.mT
    one, _ = train_deep_linear(weights, TREE, ONE, 5e-3, 60, 20)
    other, _ = train_deep_linear(turned, TREE, ONE, 5e-3, 60, 20)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_batch_trains_like_its_members_and_inputs_stay():
    networks = [initial_weights([8, 5, 15], "gaussian", generator(seed)) for seed in range(3)]
    batch = [torch.stack(layers) for layers in zip(*networks, strict=True)]
    before = [weight.clone() for weight in batch]
    together, _ = train_deep_linear(batch, TREE, ONE, 1e-2, 50, 25)
    assert together.shape == (3, 3, 15, 8)
    for seed, network in enumerate(networks):
        alone, _ = train_deep_linear(network, TREE, ONE, 1e-2, 50, 25)
        torch.testing.assert_close(together[:, seed], alone, rtol=0, atol=1e-12)
    epochs_to_learn(batch, TREE, ONE, [1e-2], 5)
    assert all(torch.equal(a, b) for a, b in zip(batch, before, strict=True))


# --- epochs -----------------------------------------------------------------------------------------------------------


def test_epochs_of_one_matrix_are_known():
    zero = [torch.zeros(2, 15, 8, dtype=F64)]  # what is left falls by (1 - lr)^2 in each epoch
    expected = {lr: math.ceil(math.log(0.01) / (2 * math.log(1 - lr))) for lr in (0.03, 0.1, 0.2)}
    for lr, epochs in expected.items():
        assert epochs_to_learn(zero, TREE, ONE, [lr], 200).tolist() == [epochs] * 2
    assert epochs_to_learn(zero, TREE, ONE, list(expected), 200).tolist() == [expected[0.2]] * 2  # the best rate
    slow = math.ceil(math.log(0.01) / (2 * math.log(1 - 0.002)))  # the other rate overflows long before
    assert epochs_to_learn(zero, TREE, ONE, [0.002, 3.0], 2000).tolist() == [slow] * 2
    assert epochs_to_learn(zero, TREE, ONE, [0.03], expected[0.03] - 1).tolist() == [math.inf] * 2
    assert epochs_to_learn(zero, TREE, ONE, [3.0], 2000).tolist() == [math.inf] * 2


def test_epochs_of_each_seed_are_its_own():
    starts = torch.stack([TREE, 0.5 * TREE, torch.zeros_like(TREE)])
    together = epochs_to_learn([starts], TREE, ONE, [0.1, 0.05], 100)
    alone = [epochs_to_learn([start[None]], TREE, ONE, [0.1], 100).item() for start in starts]
    assert together.tolist() == alone
    assert alone[0] == 0


def test_epochs_of_a_decoupled_network_are_those_of_the_scalar_recursion():
    task, lr, a, epochs = 0.25 * torch.eye(4, dtype=F64), 0.1, 0.1 ** (1 / 6), 0
    weights = [weight[None] for weight in decoupled_weights(task, 4, 6, 0.1, generator())]
    while (0.25 - a**6) ** 2 >= 0.01 * 0.25**2:
        a += lr * a**5 * (0.25 - a**6)
        epochs += 1
    assert epochs_to_learn(weights, task, torch.eye(4, dtype=F64), [lr], 1000).tolist() == [epochs]


# --- pretraining and Jacobians ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [[1.0] * 6, [1.5, 1.2, 1.0, 0.8, 0.6, 0.5]])
def test_pretraining_gives_nearly_orthogonal_layers(scales):
    covariance = torch.diag(torch.tensor(scales, dtype=F64))
    encoders, steps = pretrain_greedy(covariance, [6, 10, 8, 8], generator(), lr=0.1, tol=1e-8)
    assert [tuple(encoder.shape) for encoder in encoders] == [(10, 6), (8, 10), (8, 8)]
    assert len(steps) == 3
    assert min(steps) > 0
    values = torch.linalg.svdvals(product(encoders))
    assert values.min() > 0.7
    assert values.max() < 1.4


def test_pretraining_is_gradient_descent_on_each_code_until_the_tolerance_is_met():
    covariance, g = torch.diag(torch.tensor([1.5, 1.2, 1.0, 0.8, 0.6, 0.5], dtype=F64)), generator()
    encoders, steps = pretrain_greedy(covariance, [6, 6, 7], generator(), 0.1, 1e-4)
    for encoder, count in zip(encoders, steps, strict=True):
        n_out, n_in = encoder.shape
        first, second = (0.3 * weight for weight in initial_weights([n_in, n_out, n_in], "gaussian", g))
        unexplained = []
        for step in range(count + 1):
            error = (torch.eye(n_in, dtype=F64) - second @ first) @ covariance
            unexplained.append(float(error.square().sum() / covariance.square().sum()))
            if step < count:
                first, second = first + 0.1 * second.mT @ error, second + 0.1 * error @ first.mT
        assert unexplained[-1] < 1e-4 <= unexplained[-2]
        torch.testing.assert_close(encoder, first, rtol=0, atol=1e-12)
        covariance = first @ covariance @ first.mT


@pytest.mark.parametrize("scheme", ["gaussian", "orthogonal"])
def test_jacobian_agrees_with_autograd(scheme):
    values = jacobian_singular_values(4, 7, 1.2, scheme, generator(5))
    g = generator(5)
    weights = initial_weights([7] * 5, scheme, g, gain=1.2)

    def network(x):
        for weight in weights:
            x = torch.tanh(weight @ x)
        return x

    x = torch.randn(7, generator=g, dtype=F64)
    expected = torch.linalg.svdvals(torch.autograd.functional.jacobian(network, x))
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-14)


# --- what a reader can get wrong --------------------------------------------------------------------------------------

PAIR = [random_matrix(16, 8), random_matrix(15, 16)]
T = np.array([0.0, 1.0])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: mode_strength(T, 0.0, 0.1), "s"),
        (lambda: mode_strength(T, math.nan, 0.1), "s"),
        (lambda: mode_strength(T, 1.0, 0.0), "u0"),
        (lambda: mode_strength(T, 1.0, 0.1, tau=0.0), "tau"),
        (lambda: mode_strength(T, 1.0, 0.1, depth=0), "depth"),
        (lambda: mode_strength(T, 1.0, 0.1, depth=2.5), "depth"),
        (lambda: mode_strength(T, 1.0, 0.1, depth=math.inf), "depth"),
        (lambda: mode_strength(-T, 1.0, 0.1), "t must"),
        (lambda: mode_strength(T * math.nan, 1.0, 0.1), "t must"),
        (lambda: learning_time(1.0, 0.1, 1.0), "uf"),
        (lambda: learning_time(1.0, 0.5, 0.1), "uf"),
        (lambda: learning_time(1.0, 2.0, 0.5), "uf"),
        (lambda: learning_time(1.0, -0.5, 0.5, depth=1), "u0"),
        (lambda: learning_time(-1.0, 0.1, 0.5), "s"),
        (lambda: learning_time(1.0, 0.1, 0.5, depth=math.nan), "depth"),
        (lambda: hierarchy(0), "levels"),
        (lambda: initial_weights([3], "gaussian", generator()), "sizes"),
        (lambda: initial_weights([3, 0], "gaussian", generator()), "sizes"),
        (lambda: initial_weights([3, 3], "uniform", generator()), "scheme"),
        (lambda: initial_weights([3, 3], "gaussian", generator(), gain=0), "gain"),
        (lambda: decoupled_weights(TREE, 7, 2, 0.1, generator()), "n_hidden"),
        (lambda: decoupled_weights(TREE * math.nan, 16, 2, 0.1, generator()), "sigma31"),
        (lambda: decoupled_weights(TREE, 16, 0, 0.1, generator()), "depth"),
        (lambda: decoupled_weights(TREE, 16, 2, 0.0, generator()), "u0"),
        (lambda: train_deep_linear([], TREE, ONE, 0.1, 1, 1), "weights"),
        (lambda: train_deep_linear(PAIR[::-1], TREE, ONE, 0.1, 1, 1), "weights"),
        (lambda: train_deep_linear(PAIR, TREE.mT, ONE, 0.1, 1, 1), "sigma31"),
        (lambda: train_deep_linear(PAIR, TREE, torch.eye(7, dtype=F64), 0.1, 1, 1), "sigma11"),
        (lambda: train_deep_linear(PAIR, TREE, ONE, 0.0, 1, 1), "lr"),
        (lambda: train_deep_linear(PAIR, TREE, ONE, 0.1, 0, 1), "steps"),
        (lambda: train_deep_linear(PAIR, TREE, ONE, 0.1, 1, 0), "record_every"),
        (lambda: epochs_to_learn([w[None] for w in PAIR], TREE, ONE, [], 5), "rates"),
        (lambda: epochs_to_learn([w[None] for w in PAIR], TREE, ONE, [0.1, -1], 5), "rates"),
        (lambda: epochs_to_learn([w[None] for w in PAIR], TREE, ONE, [0.1], 0), "max_epochs"),
        (lambda: epochs_to_learn([w[None] for w in PAIR], TREE, ONE, [0.1], 5, excess=0), "excess"),
        (lambda: epochs_to_learn(PAIR, TREE, ONE, [0.1], 5), "weights"),
        (lambda: pretrain_greedy(ONE, [7, 8], generator(), 0.1, 1e-3), "sigma11"),
        (lambda: pretrain_greedy(ONE, [8, 7], generator(), 0.1, 1e-3), "sizes"),
        (lambda: pretrain_greedy(ONE, [8, 8], generator(), 0.0, 1e-3), "lr"),
        (lambda: pretrain_greedy(ONE, [8, 8], generator(), 0.1, 0.0), "tol"),
        (lambda: jacobian_singular_values(0, 5, 1.0, "gaussian", generator()), "depth"),
        (lambda: jacobian_singular_values(3, 5, 1.0, "uniform", generator()), "scheme"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_pretraining_says_when_it_fails():
    with pytest.raises(RuntimeError, match="layer 1 missed"):
        pretrain_greedy(ONE, [8, 8], generator(), lr=0.1, tol=1e-8, max_steps=3)
    with pytest.raises(RuntimeError, match="another lr"):
        pretrain_greedy(ONE, [8, 8], generator(), lr=50.0, tol=1e-8, max_steps=100)
