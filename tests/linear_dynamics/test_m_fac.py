"""Oracles: dense linear algebra, scikit-learn's ridge regression, autograd, constrained optima and invariances."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from companion import models
from companion.linear_dynamics.m_fac import (
    MFAC,
    BlockInverseFisher,
    DynamicInverseFisher,
    StaticInverseFisher,
    empirical_fisher_gradients,
    prune_one_shot,
)

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def fisher(gradients, damping):
    return damping * torch.eye(gradients.shape[1], dtype=F64) + gradients.mT @ gradients / len(gradients)


def window(gradients, damping, size=None):
    dynamic = DynamicInverseFisher(size or len(gradients), gradients.shape[1], damping)
    for g in gradients:
        dynamic.push(g)
    return dynamic


def close(ours, exact, tol=1e-10):
    torch.testing.assert_close(ours, exact, rtol=tol, atol=tol * float(exact.abs().max()))


# --- the static algorithm ---------------------------------------------------------------------------------------------


def test_the_example_computed_by_hand():
    inverse = StaticInverseFisher(torch.tensor([[1.0, 2.0]], dtype=F64), 1.0)
    assert inverse.v.tolist() == [[1.0, 2.0]]
    assert inverse.q.tolist() == [6.0]
    close(inverse.diagonal(), torch.tensor([5 / 6, 1 / 3], dtype=F64), 1e-14)
    assert inverse.element(0, 1) == pytest.approx(-1 / 3, rel=1e-14)


@pytest.mark.parametrize(("m", "d"), [(1, 7), (6, 20), (20, 6)])
@pytest.mark.parametrize("damping", [1e-5, 1e-2, 1.0])
def test_everything_agrees_with_the_dense_inverse(m, d, damping):
    gradients, x = random_matrix(m, d), random_matrix(d, seed=1)
    dense = torch.linalg.inv(fisher(gradients, damping))
    inverse = StaticInverseFisher(gradients, damping)
    close(inverse.ihvp(x), torch.linalg.solve(fisher(gradients, damping), x), 1e-8)
    close(inverse.diagonal(), dense.diagonal(), 1e-8)
    close(inverse.columns([3, 0, 3]), dense[:, [3, 0, 3]], 1e-8)
    assert inverse.element(2, 4) == pytest.approx(float(dense[2, 4]), abs=1e-8 / damping)
    assert inverse.element(2, 2) == pytest.approx(float(dense[2, 2]), abs=1e-8 / damping)


def test_products_solve_ridge_regression():
    features, target = load_diabetes(return_X_y=True)
    m, damping = len(features), 0.01
    expected = Ridge(alpha=m * damping, fit_intercept=False, solver="cholesky").fit(features, target).coef_
    x = torch.from_numpy(features.T @ target / m)
    for inverse in (
        StaticInverseFisher(torch.from_numpy(features), damping),
        window(torch.from_numpy(features), damping),
    ):
        np.testing.assert_allclose(inverse.ihvp(x).numpy(), expected, rtol=1e-10)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), m=st.integers(1, 9), d=st.integers(1, 12), damping=st.floats(1e-3, 10))
def test_the_order_of_gradients_does_not_matter(seed, m, d, damping):
    gradients, x = random_matrix(m, d, seed=seed), random_matrix(d, seed=seed + 1)
    shuffled = gradients[torch.randperm(m, generator=generator(seed))]
    expected = StaticInverseFisher(gradients, damping).ihvp(x)
    close(StaticInverseFisher(shuffled, damping).ihvp(x), expected)
    close(window(shuffled, damping).ihvp(x), expected)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
def test_the_inverse_is_symmetric_linear_and_scales(seed, scale):
    gradients = random_matrix(4, 9, seed=seed)
    x, y = random_matrix(2, 9, seed=seed + 1)
    inverse = StaticInverseFisher(gradients, 0.1)
    assert float(x @ inverse.ihvp(y)) == pytest.approx(float(y @ inverse.ihvp(x)), rel=1e-9, abs=1e-9)
    close(inverse.ihvp(x + scale * y), inverse.ihvp(x) + scale * inverse.ihvp(y))
    scaled = StaticInverseFisher(scale * gradients, 0.1 * scale**2)  # F → scale² F
    close(scale**2 * scaled.ihvp(x), inverse.ihvp(x))


def test_zero_gradients_leave_the_damping():
    x = random_matrix(5)
    close(StaticInverseFisher(torch.zeros(3, 5, dtype=F64), 0.25).ihvp(x), 4 * x, 1e-15)
    close(DynamicInverseFisher(3, 5, 0.25).ihvp(x), 4 * x, 1e-15)


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 4, 5, 11, 30])
def test_blocks_invert_the_block_diagonal(block_size):
    gradients, x, damping = random_matrix(6, 11), random_matrix(11, seed=1), 0.05
    block = torch.arange(11) // block_size
    dense = torch.linalg.inv(fisher(gradients, damping) * (block[:, None] == block))
    inverse = BlockInverseFisher(gradients, damping, block_size)
    close(inverse.ihvp(x), dense @ x)
    close(inverse.diagonal(), dense.diagonal())


def test_blocks_are_inverted_in_double_precision():
    gradients, x = 30 * random_matrix(3, 11), random_matrix(11, seed=1)  # in float32, 1e-5 would drown in their squares
    single = BlockInverseFisher(gradients.float(), 1e-5, 8)
    expected = BlockInverseFisher(gradients.float().double(), 1e-5, 8)
    assert single.ihvp(x.float()).dtype == single.diagonal().dtype == torch.float32
    close(single.ihvp(x.float()).double(), expected.ihvp(x), 1e-5)


# --- the window -------------------------------------------------------------------------------------------------------


def test_the_window_holds_the_latest_gradients():
    gradients, x, damping = random_matrix(17, 9), random_matrix(9, seed=1), 1e-2
    dynamic = DynamicInverseFisher(5, 9, damping)
    for count, g in enumerate(gradients, start=1):
        dynamic.push(g)
        held = torch.zeros(5, 9, dtype=F64)  # rows not yet filled count in the divisor and nowhere else
        held[: min(count, 5)] = gradients[max(0, count - 5) : count]
        close(dynamic.ihvp(x), torch.linalg.solve(fisher(held, damping), x), 1e-9)
        assert dynamic.num_gradients == min(count, 5)


def test_the_pivots_are_those_of_the_recursion():
    gradients, damping = random_matrix(6, 10), 0.1
    a = gradients @ gradients.mT / damping + 6 * torch.eye(6, dtype=F64)
    c = torch.linalg.cholesky(a)
    static = StaticInverseFisher(gradients, damping)
    close(c.diagonal().square(), static.q)
    b = torch.linalg.inv(c / c.diagonal()) / damping
    close(b @ gradients, static.v)  # v is a combination of gradients, with coefficients B


def test_push_ihvp_is_push_then_ihvp_and_keeps_a_copy():
    one, other, g = DynamicInverseFisher(3, 6, 0.1), DynamicInverseFisher(3, 6, 0.1), random_matrix(6)
    other.push(g)
    close(one.push_ihvp(g), other.ihvp(g), 1e-15)
    before = one.ihvp(g)
    x = g.clone()
    g.zero_()
    close(one.ihvp(x), before, 1e-15)


def test_single_precision_is_close_and_says_when_it_fails():
    gradients, x = random_matrix(8, 30), random_matrix(30, seed=1)
    single = DynamicInverseFisher(8, 30, 1e-2, dtype=torch.float32)
    for g in gradients.float():
        single.push(g)
    assert single.ihvp(x.float()).dtype == torch.float32
    close(single.ihvp(x.float()).double(), StaticInverseFisher(gradients, 1e-2).ihvp(x), 1e-3)
    broken = DynamicInverseFisher(8, 30, 1e-5, dtype=torch.float32)
    large = [1e4 * gradients[0].float() * (1 + k / 7) for k in range(8)]
    with pytest.raises(torch.linalg.LinAlgError):
        any(map(broken.push, large))


# --- gradients --------------------------------------------------------------------------------------------------------


def squared_error(w, x, y):
    return 0.5 * (x @ w - y).square().mean()


def test_fisher_gradients_are_those_of_autograd():
    x, y, w = random_matrix(40, 5), random_matrix(40, seed=1), random_matrix(5, seed=2)
    gradients = empirical_fisher_gradients(squared_error, w, x, y, 6, 3, generator(4))
    assert gradients.shape == (6, 5)
    chosen = torch.randperm(40, generator=generator(4))[:18].view(6, 3)
    for row, batch in zip(gradients, chosen, strict=True):
        w_ = w.clone().requires_grad_()
        squared_error(w_, x[batch], y[batch]).backward()
        close(row, w_.grad, 1e-13)


def test_all_samples_average_to_the_full_gradient():
    x, y, w = random_matrix(12, 5), random_matrix(12, seed=1), random_matrix(5, seed=2)
    gradients = empirical_fisher_gradients(squared_error, w, x, y, 4, 3, generator())
    close(gradients.mean(0), x.mT @ (x @ w - y) / 12, 1e-12)


def test_gradients_of_a_residual_network_are_those_of_autograd_at_its_running_statistics():
    network = models.resnet(1, (2, 4), 1, 3, generator=generator()).double()
    network(3 + random_matrix(32, 1, 8, 8))  # moves the running statistics away from 0 and 1
    network.eval()
    shapes = {name: p.shape for name, p in network.named_parameters()}

    def loss(w, x, y):
        pieces = w.split([shape.numel() for shape in shapes.values()])
        named = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return cross_entropy(functional_call(network, named, (x,)), y)

    x, y = random_matrix(12, 1, 8, 8), torch.arange(12) % 3
    w = parameters_to_vector(network.parameters()).detach()
    gradients = empirical_fisher_gradients(loss, w, x, y, 3, 4, generator(5))
    for row, batch in zip(gradients, torch.randperm(12, generator=generator(5)).view(3, 4), strict=True):
        network.zero_grad()
        cross_entropy(network(x[batch]), y[batch]).backward()
        close(row, parameters_to_vector([p.grad for p in network.parameters()]), 1e-12)


# --- pruning ----------------------------------------------------------------------------------------------------------


def quadratic(seed=0, d=7, damping=1e-2):
    """Curvature, minimum and gradients of a quadratic loss whose Fisher matrix is the curvature."""
    gradients, w = random_matrix(2 * d, d, seed=seed), random_matrix(d, seed=seed + 1)
    return fisher(gradients, damping), w, lambda w: gradients


ALL = torch.ones(7, dtype=torch.bool)


@pytest.mark.parametrize("seed", range(5))
def test_removing_one_weight_is_the_constrained_optimum(seed):
    h, w, gradient_fn = quadratic(seed)

    def constrained(k):
        """Loss and weights of the minimum with weight k at zero, from the normal equations."""
        others = [i for i in range(7) if i != k]
        best = torch.zeros(7, dtype=F64)
        best[others] = torch.linalg.solve(h[others][:, others], h[others] @ w)
        return float(0.5 * (best - w) @ h @ (best - w)), best

    loss, best = min((constrained(k) for k in range(7)), key=lambda pair: pair[0])
    pruned, kept = prune_one_shot(w, ALL, 1 / 7, gradient_fn, 1e-2)
    close(pruned, best)
    k = int((~kept).nonzero())
    predicted = w[k] ** 2 / (2 * torch.linalg.inv(h)[k, k])
    assert loss == pytest.approx(float(predicted), rel=1e-9)


def test_rounds_of_one_weight_are_repeated_constrained_optima():
    h, w, gradient_fn = quadratic()
    # keep fractions 7 → 6 → 5 → 4 within rounding: three weights in three rounds, each exact on a quadratic
    pruned, kept = prune_one_shot(w, ALL, 3 / 7, gradient_fn, 1e-2, num_recomputations=3)
    expected, alive = w.clone(), list(range(7))
    for _ in range(3):
        inverse = torch.linalg.inv(h[alive][:, alive])
        here = expected[alive]
        k = int((here.square() / inverse.diagonal()).argmin())
        expected[alive] = here - here[k] / inverse[k, k] * inverse[:, k]
        expected[alive[k]] = 0
        alive.pop(k)
    close(pruned, expected)
    assert kept.nonzero()[:, 0].tolist() == alive


def test_many_weights_get_the_sum_of_single_corrections():
    h, w, gradient_fn = quadratic()
    inverse = torch.linalg.inv(h)
    removed = (w.square() / inverse.diagonal()).argsort()[:3]
    expected = w - sum(w[k] / inverse[k, k] * inverse[:, k] for k in removed)
    expected[removed] = 0
    pruned, kept = prune_one_shot(w, ALL, 3 / 7, gradient_fn, 1e-2)
    close(pruned, expected)
    assert sorted((~kept).nonzero()[:, 0].tolist()) == sorted(removed.tolist())


def test_blocks_of_one_choose_by_the_diagonal_and_correct_nothing():
    h, w, gradient_fn = quadratic()
    pruned, kept = prune_one_shot(w, ALL, 3 / 7, gradient_fn, 1e-2, block_size=1)
    expected = (w.square() * h.diagonal()).argsort()[:3]
    assert sorted((~kept).nonzero()[:, 0].tolist()) == sorted(expected.tolist())
    close(pruned, w * kept, 1e-9)
    whole, _ = prune_one_shot(w, ALL, 3 / 7, gradient_fn, 1e-2, block_size=7)
    close(whole, prune_one_shot(w, ALL, 3 / 7, gradient_fn, 1e-2)[0])


def test_magnitude_and_diagonal_remove_the_smallest_of_their_statistic():
    _, w, gradient_fn = quadratic()
    small = w.abs().argsort()[:2].tolist()
    pruned, kept = prune_one_shot(w, ALL, 2 / 7, gradient_fn, 1e-2, statistic="magnitude")
    assert sorted((~kept).nonzero()[:, 0].tolist()) == sorted(small)
    assert torch.equal(pruned, w * kept)
    saliency = w.square() * gradient_fn(w).square().mean(0)
    pruned, kept = prune_one_shot(w, ALL, 2 / 7, gradient_fn, 1e-2, statistic="diagonal")
    assert sorted((~kept).nonzero()[:, 0].tolist()) == sorted(saliency.argsort()[:2].tolist())
    assert torch.equal(pruned, w * kept)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31), sparsity=st.floats(0, 0.99), rounds=st.integers(1, 5),
    statistic=st.sampled_from(["mfac", "magnitude", "diagonal"]),
)  # fmt: skip
def test_sparsity_counts_prunable_weights_and_the_others_stay(seed, sparsity, rounds, statistic):
    g = generator(seed)
    w, mask = torch.randn(30, generator=g, dtype=F64), torch.rand(30, generator=g) < 0.7
    before, calls = w.clone(), []

    def gradient_fn(weights):
        calls.append(weights.clone())
        return torch.randn(4, 30, generator=g, dtype=F64)

    pruned, kept = prune_one_shot(w, mask, sparsity, gradient_fn, 0.1, None, rounds, statistic)
    assert torch.equal(w, before)
    assert int((kept & mask).sum()) == round(int(mask.sum()) * (1 - sparsity))
    assert kept[~mask].all()
    assert torch.equal(pruned[~mask], w[~mask])
    assert (pruned[~kept] == 0).all()
    assert len(calls) == (0 if statistic == "magnitude" else rounds)
    survivors = [int((call[mask] != 0).sum()) for call in calls]
    expected = [round(int(mask.sum()) * (1 - sparsity) ** (k / rounds)) for k in range(len(calls))]
    assert survivors == expected  # new gradients are taken at the weights that are left, a geometric sequence


def test_nothing_to_remove_changes_nothing():
    _, w, gradient_fn = quadratic()
    pruned, kept = prune_one_shot(w, ALL, 0.0, gradient_fn, 1e-2)
    assert torch.equal(pruned, w)
    assert kept.all()


# --- the optimiser ----------------------------------------------------------------------------------------------------


def parameters():
    return [random_matrix(3, 2).requires_grad_(), random_matrix(4, seed=1).requires_grad_()]


def loss_of(params):
    return params[0].square().sum().sin() + (params[1] ** 4).sum() * (1 + params[0].sum())


def test_steps_are_those_of_the_dense_formula():
    params, held = parameters(), torch.zeros(3, 10, dtype=F64)
    optimizer = MFAC(params, lr=1e-3, momentum=0.6, weight_decay=0.1, window=3, damping=0.2)
    w = torch.cat([p.detach().flatten() for p in params])
    velocity = torch.zeros(10, dtype=F64)
    for step in range(7):
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()
        leaf = w.clone().requires_grad_()
        loss_of([leaf[:6].view(3, 2), leaf[6:]]).backward()
        g = leaf.grad + 0.1 * w
        held[step % 3] = g
        velocity = 0.6 * velocity + 0.4 * torch.linalg.solve(fisher(held, 0.2), g)
        w = w - 1e-3 * velocity
        close(torch.cat([p.detach().flatten() for p in params]), w)


def test_much_damping_is_gradient_descent():
    ours, theirs = parameters(), parameters()
    fast = MFAC(ours, lr=1e-3 * 1e8, window=4, damping=1e8)
    slow = torch.optim.SGD(theirs, lr=1e-3)
    for _ in range(5):
        for params, optimizer in ((ours, fast), (theirs, slow)):
            optimizer.zero_grad()
            loss_of(params).backward()
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        close(one.detach(), other.detach(), 1e-5)


def test_a_lone_gradient_gives_a_step_that_scales_with_the_window():
    for m in (4, 16):
        params = parameters()
        before = torch.cat([p.detach().flatten() for p in params])
        loss_of(params).backward()
        g = torch.cat([p.grad.flatten() for p in params])
        MFAC(params, lr=1.0, window=m, damping=1e-9).step()
        close(before - torch.cat([p.detach().flatten() for p in params]), m * g / g.square().sum(), 1e-6)


def test_groups_have_windows_and_rates_of_their_own_and_missing_gradients_are_zero():
    params = parameters()
    optimizer = MFAC([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], lr=0.1, window=2, damping=0.3)
    before = [p.detach().clone() for p in params]
    params[0].grad = random_matrix(3, 2, seed=9)
    optimizer.step()
    alone = DynamicInverseFisher(2, 6, 0.3)
    close((before[0] - params[0].detach()).flatten(), 0.5 * alone.push_ihvp(params[0].grad.flatten()))
    assert torch.equal(params[1].detach(), before[1])


def test_a_closure_computes_gradients_and_its_loss_is_returned():
    params = parameters()
    optimizer = MFAC(params, lr=1e-4, window=2, damping=0.3)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    expected = loss_of(params).detach()
    assert torch.equal(optimizer.step(closure).detach(), expected)
    assert loss_of(params).detach() < expected
    assert optimizer.step() is None


def test_a_saved_state_continues_the_run():
    params = parameters()
    optimizer = MFAC(params, lr=1e-3, momentum=0.5, window=3, damping=0.1)

    def advance(params, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(params).backward()
            optimizer.step()
        return [p.detach().clone() for p in params]

    advance(params, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    twins = [p.detach().clone().requires_grad_() for p in params]
    twin = MFAC(twins)
    twin.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(advance(params, optimizer), advance(twins, twin), strict=True))


# --- training at full scale -------------------------------------------------------------------------------------------


# --- what a reader can get wrong --------------------------------------------------------------------------------------

G = random_matrix(4, 7)
W = random_matrix(7, seed=1)
X, Y = random_matrix(9, 7), random_matrix(9, seed=1)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: StaticInverseFisher(G, 0.0), "damping"),
        (lambda: StaticInverseFisher(G, math.inf), "damping"),
        (lambda: StaticInverseFisher(G[0], 0.1), "gradients"),
        (lambda: StaticInverseFisher(G * math.nan, 0.1), "gradients"),
        (lambda: StaticInverseFisher(torch.ones(2, 3, dtype=torch.long), 0.1), "gradients"),
        (lambda: StaticInverseFisher(G, 0.1).ihvp(W[:6]), "x must"),
        (lambda: StaticInverseFisher(G, 0.1).ihvp(W * math.nan), "x must"),
        (lambda: StaticInverseFisher(G, 0.1).columns([7]), "indices"),
        (lambda: StaticInverseFisher(G, 0.1).element(0, -1), "i and j"),
        (lambda: BlockInverseFisher(G, 0.1, 0), "block_size"),
        (lambda: BlockInverseFisher(G, -0.1, 2), "damping"),
        (lambda: BlockInverseFisher(G, 0.1, 2).ihvp(W[:6]), "x must"),
        (lambda: DynamicInverseFisher(0, 7, 0.1), "window"),
        (lambda: DynamicInverseFisher(3, 0, 0.1), "dim"),
        (lambda: DynamicInverseFisher(3, 7, 0.0), "damping"),
        (lambda: DynamicInverseFisher(3, 7, 0.1).push(W[:6]), "g must"),
        (lambda: DynamicInverseFisher(3, 7, 0.1).push(W * math.inf), "g must"),
        (lambda: DynamicInverseFisher(3, 7, 0.1).ihvp(W[:6]), "x must"),
        (lambda: empirical_fisher_gradients(squared_error, W, X, Y[:8], 2, 2, generator()), "X and y"),
        (lambda: empirical_fisher_gradients(squared_error, W, X, Y, 5, 2, generator()), "num_gradients"),
        (lambda: empirical_fisher_gradients(squared_error, W, X, Y, 0, 2, generator()), "num_gradients"),
        (lambda: empirical_fisher_gradients(squared_error, W, X, Y, 2, 0, generator()), "batch_size"),
        (lambda: prune_one_shot(G, ALL, 0.5, lambda w: G, 0.1), "weights"),
        (lambda: prune_one_shot(W, ALL[:6], 0.5, lambda w: G, 0.1), "prunable_mask"),
        (lambda: prune_one_shot(W, ALL.double(), 0.5, lambda w: G, 0.1), "prunable_mask"),
        (lambda: prune_one_shot(W, ALL, 1.0, lambda w: G, 0.1), "sparsity"),
        (lambda: prune_one_shot(W, ALL, -0.1, lambda w: G, 0.1), "sparsity"),
        (lambda: prune_one_shot(W, ALL, math.nan, lambda w: G, 0.1), "sparsity"),
        (lambda: prune_one_shot(W, ALL, 0.5, lambda w: G, 0.1, num_recomputations=0), "num_recomputations"),
        (lambda: prune_one_shot(W, ALL, 0.5, lambda w: G, 0.1, block_size=0), "block_size"),
        (lambda: prune_one_shot(W, ALL, 0.5, lambda w: G, 0.1, statistic="fisher"), "statistic"),
        (lambda: prune_one_shot(W, ALL, 0.5, lambda w: G, 0.0), "damping"),
        (lambda: prune_one_shot(W, ALL, 0.5, lambda w: G[:, :6], 0.1), "gradient_fn"),
        (lambda: MFAC(parameters(), lr=-1.0), "lr"),
        (lambda: MFAC(parameters(), weight_decay=-1.0), "weight_decay"),
        (lambda: MFAC(parameters(), momentum=1.0), "momentum"),
        (lambda: MFAC(parameters(), window=0), "window"),
        (lambda: MFAC(parameters(), damping=0.0), "damping"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
