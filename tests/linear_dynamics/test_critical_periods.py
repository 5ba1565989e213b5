"""Oracles: closed forms, SciPy's integrators, autograd, conservation laws, symmetries and one-run-at-a-time loops."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp

from companion.linear_dynamics.critical_periods import (
    TwoPathwayNetwork,
    complete,
    completion_transfer,
    descend,
    draw_transfer,
    final_shares,
    low_rank_target,
    pathway_dynamics,
    product,
    singular_value_velocity,
)

F64 = torch.float64
TARGET = torch.randn(6, 4, generator=torch.Generator().manual_seed(5), dtype=F64)
U, S, VH = torch.linalg.svd(TARGET, full_matrices=False)
V = VH.mT
OPEN = torch.ones(1, 2, dtype=torch.bool)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(depth=3, batch=1, init=("gaussian", 0.4), seed=0):
    return TwoPathwayNetwork(depth, 4, 5, 6, init, generator(seed), batch)


def invariant(k, depth):
    """What two pathways conserve while both learn, scaled so that a deficit of ``b`` raises it by its dose."""
    p_a, p_b = np.moveaxis(np.asarray(k) ** (1 / depth), -1, 0)
    if depth == 2:
        return np.log(p_a / p_b)
    return (p_b ** (2 - depth) - p_a ** (2 - depth)) / (depth - 2)  # for D = 1 this is p_a - p_b


# --- one mode in two pathways -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_dynamics_solve_the_equations_of_strengths(depth):
    """``dK_x/dt = D K_x^(2-2/D) (S - K_a - K_b)``, integrated in K by another method, edge by edge."""
    t, deficit, k0 = np.linspace(0, 4, 33), (0.3, 0.7), np.array([0.2, 0.35])

    def flow(_, k, b_learns):
        return np.array([1, b_learns]) * depth * k ** (2 - 2 / depth) * (2.5 - k.sum())

    expected = [k0]
    for low, high in pairwise([*np.union1d(t, deficit)]):
        b_learns = not deficit[0] <= low < deficit[1]
        k = solve_ivp(flow, (low, high), expected[-1], "DOP853", args=(b_learns,), rtol=1e-11, atol=1e-13).y[:, -1]
        expected.append(k)
    expected = np.array(expected)[np.isin(np.union1d(t, deficit), t)]
    np.testing.assert_allclose(pathway_dynamics(2.5, tuple(k0), depth, t, deficit), expected, atol=1e-7)


def test_one_matrix_relaxes_exponentially():
    t = np.linspace(0, 3, 7)
    k = pathway_dynamics(2.0, (0.4, 0.1), 1, t)
    error = 1.5 * np.exp(-2 * t)
    np.testing.assert_allclose(k, np.stack([0.4 + (1.5 - error) / 2, 0.1 + (1.5 - error) / 2], 1), atol=1e-8)
    alone = pathway_dynamics(2.0, (0.4, 0.1), 1, t, deficit=(0, 3))
    np.testing.assert_allclose(alone, np.stack([1.9 - 1.5 * np.exp(-t), np.full(7, 0.1)], 1), atol=1e-8)


@settings(deadline=None, max_examples=25)
@given(a=st.floats(0.01, 0.6), b=st.floats(0.01, 0.6), strength=st.floats(1.3, 6), depth=st.integers(1, 6))
def test_the_invariant_is_conserved_and_names_do_not_matter(a, b, strength, depth):
    t = np.linspace(0, 3, 5)
    k = pathway_dynamics(strength, (a, b), depth, t)
    np.testing.assert_allclose(invariant(k, depth), invariant(k[0], depth), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(k, pathway_dynamics(strength, (b, a), depth, t)[:, ::-1], rtol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_deficit_raises_the_invariant_by_the_error_that_passes(depth):
    deficit = (0.2, 0.55)

    def error(moment):
        return 3 - pathway_dynamics(3.0, (0.05, 0.05), depth, np.array([moment]), deficit).sum()

    dose, _ = quad(error, *deficit, epsabs=1e-8)
    end = pathway_dynamics(3.0, (0.05, 0.05), depth, np.array([1.5]), deficit)[0]
    assert invariant(end, depth) == pytest.approx(dose, rel=1e-5)


def test_the_blocked_pathway_stands_still_and_short_deficits_are_not_missed():
    t = np.array([0.0, 0.5, 0.500001, 0.75, 1.0, 1.5])
    k = pathway_dynamics(3.0, (0.1, 0.1), 3, t, deficit=(0.5, 1.0))
    assert k[1, 1] == k[2, 1] == k[3, 1] == k[4, 1]
    assert k[0, 1] < k[1, 1] < k[5, 1]
    undisturbed = pathway_dynamics(3.0, (0.1, 0.1), 3, t)
    np.testing.assert_allclose(k[:2], undisturbed[:2], rtol=1e-9)
    blink = pathway_dynamics(3.0, (0.1, 0.1), 3, np.array([50.0]), deficit=(0.1, 0.1001))[0]
    assert invariant(blink, 3) == pytest.approx(1e-4 * (3 - 2 * 0.12), rel=0.05)


def test_a_time_does_not_depend_on_the_other_times():
    dense = pathway_dynamics(2.0, (0.1, 0.2), 2, np.linspace(0, 2, 21), (0.33, 0.77))
    for moment in (0, 4, 15, 20):
        alone = pathway_dynamics(2.0, (0.1, 0.2), 2, np.array([moment / 10]), (0.33, 0.77))
        np.testing.assert_allclose(alone[0], dense[moment], rtol=1e-8)


@pytest.mark.parametrize(
    ("case", "k_b"), [((5, 1.2, 0.3, 3), 0.0340216), ((2, 1, 0.5, 2), 0.4), ((10, 7, 0.1, 1), 1.55)]
)
def test_final_shares_of_known_cases(case, k_b):
    assert final_shares(*case) == pytest.approx((case[0] - k_b, k_b), abs=5e-8)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(("p_a", "p_b"), [(0.9, 0.4), (0.3, 0.8), (0.6, 0.6)])
def test_final_shares_are_where_the_dynamics_end(depth, p_a, p_b):
    def flow(_, p):
        return p ** (depth - 1) * (3 - (p**depth).sum())

    end = solve_ivp(flow, (0, 200), [p_a, p_b], "LSODA", rtol=1e-11, atol=1e-13).y[:, -1] ** depth
    np.testing.assert_allclose(final_shares(3.0, p_a, p_b, depth), end, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(p_a=st.floats(0.05, 0.9), p_b=st.floats(0.05, 0.9), depth=st.integers(1, 12))
def test_final_shares_add_up_and_follow_the_names(p_a, p_b, depth):
    k_a, k_b = final_shares(2.0, p_a, p_b, depth)
    assert k_a + k_b == pytest.approx(2, rel=1e-9)
    assert final_shares(2.0, p_b, p_a, depth) == pytest.approx((k_b, k_a), rel=1e-9)
    assert final_shares(2.0, p_a, p_a, depth) == pytest.approx((1, 1), rel=1e-9)


def test_final_shares_of_a_table():
    table = {
        1: [0.451, 0.376, 0.251, 0.051],
        2: [0.0252, 0.0102, 0.0051, 0.0029],
        3: [0.0043, 0.0033, 0.0029, 0.0026],
        4: [0.0033, 0.0029, 0.0027, 0.0026],
    }
    goal = math.sqrt(15)
    for depth, row in table.items():
        for fraction, share in zip((0.1, 0.25, 0.5, 0.9), row, strict=True):
            p_a, p_b = (fraction * goal) ** (1 / depth), 0.01 ** (1 / depth)
            tolerance = 6e-4 if depth == 1 else 6e-5  # of the printed digits
            assert final_shares(goal, p_a, p_b, depth)[1] / goal == pytest.approx(share, abs=tolerance)


# --- two pathways of matrices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_step_is_that_of_autograd(depth):
    net = network(depth, batch=3)
    gate = torch.tensor([[True, True], [True, False], [False, True]])
    weights = [weight.clone().requires_grad_() for weight in net.weights]
    loss = 0.5 * (TARGET - product(weights).sum(1)).square().sum()
    slopes = torch.autograd.grad(loss, weights)
    before = net.weights
    net.step(TARGET, 0.03, gate)
    for old, new, slope in zip(before, net.weights, slopes, strict=True):
        torch.testing.assert_close(new, old - 0.03 * slope * gate[..., None, None], rtol=0, atol=1e-10)
        assert torch.equal(new[1, 1], old[1, 1])  # frozen, to the bit
        assert torch.equal(new[2, 0], old[2, 0])


def test_the_output_of_a_blocked_pathway_still_counts():
    net = network(1)
    _, b = net.products()[0].clone()
    for _ in range(400):
        net.step(TARGET, 0.1, torch.tensor([[True, False]]))
    torch.testing.assert_close(net.products()[0, 0], TARGET - b, rtol=0, atol=1e-10)


def test_a_blocked_mode_is_taken_out_of_the_error_of_its_pathway():
    net, u, v = network(2, batch=2), U[:, 1], V[:, 1]
    weights = [weight.clone().requires_grad_() for weight in net.weights]
    error = (TARGET - product(weights).sum(1)).detach()
    seen = torch.stack([error, error], 1)
    seen[0, 1] -= torch.outer(u, v) * (u @ error[0] @ v)  # the second network is not blocked
    expected = torch.autograd.grad((seen * product(weights)).sum(), weights)
    before = net.weights
    net.step(TARGET, 0.05, OPEN.expand(2, 2), blocked_mode=(1, torch.stack([u, 0 * u]), v))
    for old, new, slope in zip(before, net.weights, expected, strict=True):
        torch.testing.assert_close(new, old + 0.05 * slope, rtol=0, atol=1e-12)


def test_a_blocked_mode_does_not_grow_and_the_others_do():
    net = network(3, init=("aligned", U, V, (0.1, 0.1)))
    for _ in range(50):
        net.step(TARGET, 0.02, OPEN, blocked_mode=(0, U[:, 2], V[:, 2]))
    a, b = net.strengths(U, V)[0]
    assert a[2] == pytest.approx(0.1, abs=1e-12)
    assert a[[0, 1, 3]].min() > 0.1
    assert b.min() > 0.1


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_aligned_starts_are_balanced_and_have_the_given_strengths(depth):
    net = network(depth, batch=2, init=("aligned", U, V, (0.3, 0.05)))
    for pathway, k in enumerate((0.3, 0.05)):
        torch.testing.assert_close(net.products()[:, pathway], (k * U @ V.mT).expand(2, 6, 4), rtol=0, atol=1e-12)
    for lower, upper in pairwise(net.weights):
        torch.testing.assert_close(lower @ lower.mT, upper.mT @ upper, rtol=0, atol=1e-12)
    if depth > 1:
        first = net.weights[0] / torch.tensor([0.3, 0.05], dtype=F64)[:, None, None] ** (1 / depth)
        assert not torch.allclose(first[0], first[1])  # hidden bases are independent draws
        assert not torch.allclose(first[:, 0], first[:, 1])


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_aligned_networks_follow_the_scalar_recursion(depth):
    net, p = network(depth, init=("aligned", U, V, (0.3, 0.05))), np.array([[0.3] * 4, [0.05] * 4]) ** (1 / depth)
    for step in range(60):
        gate = torch.tensor([[True, not 10 <= step < 30]])
        net.step(TARGET, 0.02, gate)
        p = p + 0.02 * gate[0].numpy()[:, None] * p ** (depth - 1) * (S.numpy() - (p**depth).sum(0))
    np.testing.assert_allclose(net.strengths(U, V)[0], p**depth, atol=1e-12)
    inside = U.mT @ net.products()[0] @ V
    torch.testing.assert_close(inside, torch.diag_embed(net.strengths(U, V)[0]), rtol=0, atol=1e-12)


def test_descent_approaches_the_theory_in_proportion_to_the_step():
    errors = []
    for lr in (8e-3, 4e-3):
        net, steps = network(3, init=("aligned", U, V, (0.05, 0.05))), round(1.2 / lr)
        for step in range(steps):
            net.step(TARGET, lr, torch.tensor([[True, step * lr >= 0.4]]))
        theory = [pathway_dynamics(float(s), (0.05, 0.05), 3, np.array([1.2]), (0, 0.4))[0] for s in S]
        errors.append(np.abs(net.strengths(U, V)[0].numpy().T - theory).max())
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_gaussian_starts_have_the_given_spread():
    first, second = TwoPathwayNetwork(2, 40, 50, 30, ("gaussian", 0.3), generator(), batch=20).weights
    assert first.shape == (20, 2, 50, 40)
    assert second.shape == (20, 2, 30, 50)
    assert first.std() == pytest.approx(0.3, rel=0.01)
    flat = first.flatten(2).flatten(0, 1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 5 / 2000**0.5  # members and pathways are independent
    again = TwoPathwayNetwork(2, 40, 50, 30, ("gaussian", 0.3), generator(), batch=20).weights
    assert torch.equal(first, again[0])


# --- completing matrices ----------------------------------------------------------------------------------------------


def test_descend_is_pytorch_s_gradient_descent_and_leaves_its_input():
    g = generator()
    weights = [torch.randn(2, b, a, generator=g, dtype=F64) for a, b in pairwise([4, 5, 3, 6])]
    copies = [weight.clone() for weight in weights]
    ours = [weight.clone().requires_grad_() for weight in weights]
    optimizer = torch.optim.SGD(ours, lr=0.01)
    stepped = weights
    for _ in range(5):
        optimizer.zero_grad()
        (0.5 * (ours[2] @ ours[1] @ ours[0] - TARGET).square().sum()).backward()
        optimizer.step()
        stepped = descend(stepped, lambda whole: whole - TARGET, 0.01)
    for one, other in zip(stepped, ours, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_low_rank_targets_have_their_rank_and_size(rank):
    target = low_rank_target(7, rank, np.random.default_rng(0))
    assert np.linalg.matrix_rank(target) == rank
    assert np.mean(target**2) == pytest.approx(1, rel=1e-12)


def test_draws_come_in_the_documented_order():
    first, second, observed, *weights = draw_transfer(8, 3, 2, 20, 2, seed=4, scale=1e-2)
    rng = np.random.default_rng(4)
    m2, m1 = low_rank_target(8, 2, rng), low_rank_target(8, 3, rng)
    seen = rng.permutation(64)[:20]
    np.testing.assert_allclose(first, m1, rtol=1e-6)
    np.testing.assert_allclose(second, m2, rtol=1e-6)
    assert sorted(np.flatnonzero(observed)) == sorted(seen)
    for weight in weights:
        np.testing.assert_allclose(weight, 0.1 / 8**0.5 * rng.standard_normal((8, 8)), rtol=1e-6)
    same, also, *rest = draw_transfer(8, 2, 2, 20, 2, seed=4, scale=1e-2, relation="same")
    assert torch.equal(same, also)
    assert torch.equal(also, second)
    assert torch.equal(rest[1], draw_transfer(8, 2, 2, 20, 2, seed=4, scale=1e-2)[3])


def test_one_matrix_forgets_what_it_sees_and_keeps_what_it_does_not():
    first, second, observed, start = draw_transfer(8, 3, 2, 20, 1, seed=0)
    (middle,) = complete([start], first, observed, 5.0, 40)
    (end,) = complete([middle], second, observed, 5.0, 60)
    seen = observed.bool()
    assert torch.equal(end[~seen], start[~seen])
    left = (1 - 5 / 20) ** 40
    torch.testing.assert_close(middle[seen], first[seen] + left * (start - first)[seen], rtol=0, atol=1e-5)
    torch.testing.assert_close(end[seen], second[seen], rtol=0, atol=1e-6)

    result = completion_transfer(8, 3, 2, 20, 1, 5.0, [0, 10, 40], 60, [0])
    unseen = ((start - second).square() * ~seen).mean()
    np.testing.assert_allclose(result["test_loss"], unseen.expand(1, 3), rtol=1e-5)
    assert result["train_loss"].max() < 1e-6


@pytest.mark.parametrize("depth", [2, 3])
def test_transfer_is_what_one_run_per_switch_and_seed_gives(depth):
    switches, seeds, lr = [0, 7, 30], [3, 8], 0.4
    result = completion_transfer(6, 3, 1, 14, depth, lr, switches, 25, seeds, scale=0.5)
    for i, seed in enumerate(seeds):
        for j, switch in enumerate(switches):
            first, second, observed, *weights = draw_transfer(6, 3, 1, 14, depth, seed, 0.5)
            seen = observed.bool()
            weights = [weight.requires_grad_() for weight in weights]
            optimizer = torch.optim.SGD(weights, lr=lr)
            for step in range(switch + 25):
                if step == switch:
                    at_switch = torch.linalg.multi_dot(weights[::-1]).detach()
                target = first if step < switch else second
                optimizer.zero_grad()
                (0.5 * (torch.linalg.multi_dot(weights[::-1]) - target)[seen].square().mean()).backward()
                optimizer.step()
            w = torch.linalg.multi_dot(weights[::-1]).detach()
            expected = {
                "test_loss": (w - second).square().mean(),
                "train_loss": 0.5 * (w - second)[seen].square().mean(),
                "pretrain_test_loss": (at_switch - first).square().mean(),
                "singular_values": torch.linalg.svdvals(w),
            }
            for name, value in expected.items():
                np.testing.assert_allclose(result[name][i, j], value, rtol=1e-4, atol=1e-6, err_msg=name)


def balanced(depth):
    """Balanced factors of a random 4x4 matrix, and a random gradient."""
    g = generator(3)
    w, grad = torch.randn(2, 4, 4, generator=g, dtype=F64)
    u, s, vh = torch.linalg.svd(w)
    root = torch.diag(s ** (1 / depth))
    factors = [root] * depth
    factors[0], factors[-1] = factors[0] @ vh, u @ factors[-1]
    if depth == 1:
        factors = [w]
    return w, grad, factors


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_singular_values_move_as_predicted(depth):
    w, grad, factors = balanced(depth)
    h = 1e-7
    moved = product(descend(factors, lambda _: grad, h))

    def power(matrix, exponent):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values**exponent) @ vectors.mT

    flow = -sum(
        power(w @ w.mT, (depth - j) / depth) @ grad @ power(w.mT @ w, (j - 1) / depth) for j in range(1, depth + 1)
    )
    torch.testing.assert_close(moved, w + h * flow, rtol=0, atol=1e-3 * h)
    seen = (torch.linalg.svdvals(moved) - torch.linalg.svdvals(w)) / h
    torch.testing.assert_close(singular_value_velocity(w, grad, depth), seen, rtol=1e-4, atol=0)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(S=0), "S must be positive"),
        (dict(S=math.nan), "S must be positive"),
        (dict(k0=(0.1, 0.0)), "k0 must be two positive"),
        (dict(k0=(0.1,)), "k0 must be two positive"),
        (dict(depth=0), "depth must be"),
        (dict(depth=1.5), "depth must be"),
        (dict(t=np.array([0.0, 2.0, 1.0])), "t must hold increasing"),
        (dict(t=np.array([-1.0])), "t must hold increasing"),
        (dict(t=np.array([])), "t must hold increasing"),
        (dict(t=np.array([0.0, math.nan])), "t must hold increasing"),
        (dict(deficit=(2.0, 1.0)), "deficit must start"),
        (dict(deficit=(-1.0, 1.0)), "deficit must start"),
    ],
)
def test_pathway_dynamics_refuses(changes, message):
    arguments = dict(S=2.0, k0=(0.1, 0.1), depth=2, t=np.array([0.0, 1.0])) | changes
    with pytest.raises(ValueError, match=message):
        pathway_dynamics(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.8, 0.6, 2), "must be smaller than S"),
        ((1.0, 0.0, 0.6, 2), "p_a and p_b must be two positive"),
        ((-1.0, 0.1, 0.6, 2), "S must be positive"),
        ((1.0, 0.1, 0.6, 0), "depth must be"),
    ],
)
def test_final_shares_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        final_shares(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 5, 6, ("gaussian", 0.1)), "sizes must be positive"),
        ((2, 4, 5, 6, ("gaussian", 0.0)), "init must be"),
        ((2, 4, 5, 6, ("orthogonal", 1.0)), "init must be"),
        ((2, 4, 5, 6, ("aligned", U, V, (0.1, -0.1))), "init must be"),
        ((2, 4, 5, 6, ("aligned", V, U, (0.1, 0.1))), "U and V must have shapes"),
        ((2, 4, 3, 6, ("aligned", U, V, (0.1, 0.1))), "n_hidden must be at least 4"),
    ],
)
def test_networks_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoPathwayNetwork(*arguments, generator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TARGET.mT, 0.1, OPEN), "target and gate must have shapes"),
        ((TARGET, 0.1, OPEN[0]), "target and gate must have shapes"),
        ((TARGET, 0.0, OPEN), "lr must be positive"),
    ],
)
def test_steps_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        network().step(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_obs=37), "n_obs must be between 1 and n² = 36"),
        (dict(n_obs=0), "n_obs must be"),
        (dict(rank_pre=7), "rank must be between 1 and n = 6, got 7"),
        (dict(rank=0), "rank must be between"),
        (dict(depth=0), "depth must be at least 1"),
        (dict(scale=0.0), "scale positive"),
        (dict(relation="nested"), "relation must be"),
        (dict(relation="same"), "with equal ranks"),
        (dict(lr=0.0), "lr must be positive"),
        (dict(continue_steps=-1), "steps not negative"),
        (dict(switch_steps=[5, 5]), "switch_steps increase"),
        (dict(switch_steps=[]), "switch_steps increase"),
        (dict(seeds=[]), "seeds must not be empty"),
    ],
)
def test_completion_transfer_refuses(changes, message):
    arguments = dict(
        n=6, rank_pre=2, rank=1, n_obs=10, depth=2, lr=0.1, switch_steps=[0, 2], continue_steps=2, seeds=[0]
    )
    with pytest.raises(ValueError, match=message):
        completion_transfer(**(arguments | changes))


def test_singular_value_velocity_refuses():
    w = torch.eye(3)
    with pytest.raises(ValueError, match="W and grad must be finite matrices of one shape"):
        singular_value_velocity(w, torch.eye(2), 2)
    with pytest.raises(ValueError, match="W and grad must be finite"):
        singular_value_velocity(w, w * math.nan, 2)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        singular_value_velocity(w, w, 0)
