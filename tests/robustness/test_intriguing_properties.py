"""Oracles: order statistics, closed forms of linear networks, exact power laws, finite differences, bandits."""

import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional

from companion import attacks, models
from companion.robustness.intriguing_properties import (
    ArchitectureController,
    accuracy,
    adversarial_error,
    critical_epsilon,
    entropy_regularized_loss,
    fit_power_law,
    logit_differences,
    logits,
    random_logit_gap_distribution,
    train,
)

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=F64)


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=F64)
    layer.weight.data = weight.to(F64)
    layer.bias.data = torch.zeros(len(weight), dtype=F64) if bias is None else bias
    return layer


PLANE = linear(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
MLP = models.mlp([6, 15, 4], generator=generator(3), activation=nn.Tanh, dtype=F64)


# --- logit differences ------------------------------------------------------------------------------------------------


def test_differences_of_known_logits():
    h = torch.tensor([[3.0, 10.0, 7.0], [2.0, 2.0, -1.0]])
    assert logit_differences(h).tolist() == [[3.0, 7.0], [0.0, 3.0]]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
def test_differences_ignore_a_common_shift_and_the_order_of_classes(seed, shift, scale):
    h = normal(7, 5, seed=seed)
    order = torch.randperm(5, generator=generator(seed))
    gaps = logit_differences(h)
    assert (gaps >= 0).all()
    assert (gaps.diff(dim=1) >= 0).all()
    torch.testing.assert_close(logit_differences(scale * h[:, order] + shift), scale * gaps, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("n_classes", "j"), [(2, 2), (3, 3), (10, 2), (10, 3), (10, 5), (10, 10)])
def test_gaps_of_uniform_logits_follow_the_beta_law(n_classes, j):
    draws = torch.rand(20_000, n_classes, generator=generator(1), dtype=F64)
    gaps = logit_differences(draws)[:, j - 2].numpy()
    assert stats.kstest(gaps, random_logit_gap_distribution(n_classes, j).cdf).pvalue > 1e-3


def test_closed_forms_of_the_beta_law():
    t = np.linspace(0, 1, 50)
    two = random_logit_gap_distribution(2, 2)
    np.testing.assert_allclose(two.pdf(t), 2 * (1 - t), atol=1e-12)  # |u - v|
    for n in (3, 10, 100):
        np.testing.assert_allclose(random_logit_gap_distribution(n, 2).cdf(t), 1 - (1 - t) ** n, atol=1e-12)
        # The range of n uniform numbers.
        np.testing.assert_allclose(
            random_logit_gap_distribution(n, n).cdf(t), n * t ** (n - 1) - (n - 1) * t**n, atol=1e-12
        )


@pytest.mark.parametrize("j", [2, 3, 5])
def test_the_beta_law_starts_as_a_power(j):
    t = np.geomspace(1e-7, 1e-5, 10)
    law = fit_power_law(t, random_logit_gap_distribution(10, j).cdf(t) * 1e-2 / 1e-5 ** (j - 1), 1e-12, 1.0)
    assert law.exponent == pytest.approx(j - 1, abs=1e-3)


# --- adversarial error ------------------------------------------------------------------------------------------------


def test_fgsm_on_a_binary_linear_model_flips_exactly_the_small_margins():
    net, x = linear(normal(2, 5), normal(2, seed=1)), normal(400, 5, seed=2)
    h = net(x).detach()
    norm = (net.weight[1] - net.weight[0]).abs().sum().item()
    eps = [0.0, 0.05, 0.2, 0.7, 3.0]
    expected = [float(((h[:, 1] - h[:, 0]).abs() < e * norm).double().mean()) for e in eps]
    assert expected[2] > 0
    for attack in (attacks.fgsm, attacks.pgd, lambda net, x, y, e: attacks.step_ll(net, x, e)):
        np.testing.assert_allclose(adversarial_error(net, x, attack, eps), expected, atol=1e-12)


def test_error_is_zero_without_a_perturbation_and_counts_many_chunks():
    x = normal(4500, 6)
    assert adversarial_error(MLP, x, attacks.fgsm, [0.0]).tolist() == [0.0]
    error = adversarial_error(MLP, x, attacks.fgsm, [0.1])[0]
    before = MLP(x).argmax(1)
    after = MLP(attacks.fgsm(MLP, x, before, 0.1)).argmax(1)
    assert error == pytest.approx(float((before != after).double().mean()), abs=1e-12)
    assert error > 0
    torch.testing.assert_close(logits(MLP, x), MLP(x).detach(), rtol=0, atol=1e-12)


def test_accuracy_counts_labels():
    x = normal(50, 6)
    right = MLP(x).argmax(1)
    assert accuracy(MLP, x, right) == 1.0
    wrong = right.clone()
    wrong[:10] = (wrong[:10] + 1) % 4
    assert accuracy(MLP, x, wrong) == pytest.approx(0.8)
    assert accuracy(MLP, x, right, attacks.pgd, 1.0) < 0.5


# --- critical perturbation --------------------------------------------------------------------------------------------


def test_critical_perturbation_by_hand():
    x = torch.tensor([[2.0, 1.0], [-1.0, -3.0]], dtype=F64)
    torch.testing.assert_close(critical_epsilon(PLANE, x), torch.tensor([0.5, 5 / 3], dtype=F64), rtol=0, atol=1e-14)


def test_best_pair_attack_on_a_linear_model_needs_exactly_the_critical_perturbation():
    net, x = linear(normal(4, 3), normal(4, seed=1)), normal(30, 3, seed=2)
    w, top = net.weight.detach(), net(x).argmax(1)
    directions = (w[None] - w[top][:, None]).sign()  # towards each class

    def flipped(eps):  # bisection over the size, for all inputs, trying every class
        attacked = x[:, None] + eps[:, None, None] * directions
        return (net(attacked).argmax(-1) != top[:, None]).any(1)

    low, high = torch.zeros(30, dtype=F64), torch.full((30,), 100.0, dtype=F64)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = torch.where(flipped(middle), low, middle), torch.where(flipped(middle), middle, high)
    torch.testing.assert_close(critical_epsilon(net, x), high, rtol=0, atol=1e-12)


def test_critical_perturbation_agrees_with_finite_differences():
    x, step = normal(5, 6), 1e-6
    changes = [logits(MLP, x + step * e) - logits(MLP, x - step * e) for e in torch.eye(6, dtype=F64)]
    numeric = torch.stack(changes, -1) / (2 * step)
    h = MLP(x).detach()
    for row in range(5):
        top = int(h[row].argmax())
        expected = min(
            float((h[row, top] - h[row, j]) / (numeric[row, top] - numeric[row, j]).abs().sum())
            for j in range(4)
            if j != top
        )
        assert float(critical_epsilon(MLP, x)[row]) == pytest.approx(expected, rel=1e-6)


def test_scaling_the_last_layer_widens_gaps_and_moves_nothing():
    x, louder = normal(40, 6), copy.deepcopy(MLP)
    louder[-1].weight.data *= 10
    louder[-1].bias.data *= 10
    torch.testing.assert_close(critical_epsilon(louder, x), critical_epsilon(MLP, x), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        logit_differences(logits(louder, x)), 10 * logit_differences(logits(MLP, x)), rtol=1e-12, atol=1e-12
    )


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
def test_critical_perturbation_has_the_unit_of_the_input(seed, scale):
    net, x = linear(normal(4, 3, seed=seed)), normal(10, 3, seed=seed + 1)
    torch.testing.assert_close(
        critical_epsilon(net, scale * x), scale * critical_epsilon(net, x), rtol=1e-9, atol=1e-12
    )


def test_images_and_identical_classes_are_handled():
    net = models.resnet(3, [2, 3], 1, 4, generator=generator()).eval()
    critical = critical_epsilon(net, torch.rand(5, 3, 8, 8, generator=generator()))
    assert critical.shape == (5,)
    assert (critical > 0).all()
    same = linear(torch.ones(3, 2))
    assert critical_epsilon(same, normal(4, 2)).tolist() == [math.inf] * 4


# --- fit --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(exponent=st.floats(0.3, 4), prefactor=st.floats(0.1, 100))
def test_an_exact_power_law_is_recovered(exponent, prefactor):
    error = np.geomspace(1e-3, 1, 60)
    law = fit_power_law((error / prefactor) ** (1 / exponent), error)
    assert law.exponent == pytest.approx(exponent, rel=1e-10)
    assert law.prefactor == pytest.approx(prefactor, rel=1e-9)
    assert law.r2 == pytest.approx(1, abs=1e-12)
    assert law.n_points == int(((error >= 0.01) & (error <= 0.3)).sum())


def test_points_outside_the_window_do_not_count():
    eps = np.geomspace(1e-3, 1, 30)
    error = np.minimum(2 * eps, 0.35)
    error[eps < 0.004] = 0.0  # too few errors to be seen
    assert fit_power_law(eps, error).exponent == pytest.approx(1, abs=1e-10)


# --- loss and training ------------------------------------------------------------------------------------------------


def test_entropy_term():
    h, y = normal(20, 7), torch.arange(20) % 7
    ce = functional.cross_entropy(h, y)
    torch.testing.assert_close(entropy_regularized_loss(h, y, 0.0), ce, rtol=0, atol=1e-12)
    entropy = torch.distributions.Categorical(logits=h).entropy().mean()
    torch.testing.assert_close(entropy_regularized_loss(h, y, 2.5), ce + 2.5 * entropy, rtol=0, atol=1e-12)
    uniform = torch.zeros(3, 7, dtype=F64)
    assert float(entropy_regularized_loss(uniform, y[:3], 1.0)) == pytest.approx(2 * math.log(7), abs=1e-12)


def blobs(n=300):
    y = torch.arange(n) % 3
    return torch.eye(3)[y] + 0.2 * torch.randn(n, 3, generator=generator(5)), y


def trained(**training):
    net = models.mlp([3, 16, 3], generator=generator())
    options = dict(epochs=20, batch_size=50, lr=1e-2) | training
    return train(net, *blobs(), generator=generator(1), **options)


def test_training_learns():
    x, y = blobs()
    net = trained()
    assert not net.training
    assert accuracy(net, x, y) > 0.97
    confident = trained(entropy_weight=1.0)
    entropy = [torch.distributions.Categorical(logits=logits(n, x)).entropy().mean() for n in (net, confident)]
    assert entropy[1] < 0.8 * entropy[0]


@pytest.mark.parametrize(("eps_max", "weight"), [(0.0, 0.0), (0.5, 0.0), (0.5, 1.0)])
def test_training_is_an_ordinary_loop_and_a_short_run_begins_a_long_one(eps_max, weight):
    x, y = blobs()
    reference = models.mlp([3, 16, 3], generator=generator())
    optimizer, g = torch.optim.Adam(reference.parameters(), lr=1e-2), generator(1)
    for epochs in (1, 2, 3):
        for rows in torch.randperm(len(x), generator=g).split(50):
            inputs = x[rows].requires_grad_()
            if eps_max:
                eps = eps_max * torch.rand(50, 1, generator=g)
                slope = torch.autograd.grad(functional.cross_entropy(reference(inputs), y[rows]), inputs)[0]
                inputs = inputs + eps * slope.sign()
            optimizer.zero_grad()
            h = reference(inputs.detach())
            entropy = torch.distributions.Categorical(logits=h).entropy().mean()
            (functional.cross_entropy(h, y[rows]) + weight * entropy).backward()
            optimizer.step()
        net = trained(epochs=epochs, eps_max=eps_max, entropy_weight=weight)
        torch.testing.assert_close(logits(net, x), logits(reference, x), rtol=1e-3, atol=1e-3)


def test_adversarial_training_makes_robust():
    y = torch.arange(400) % 2
    # One feature that an attack of 0.3 cannot turn, and thirty weak ones that it can.
    sign, noise = 2.0 * y[:, None] - 1, torch.randn(400, 31, generator=generator(2))
    x = torch.cat([sign + 0.4 * noise[:, :1], 0.15 * sign + 0.3 * noise[:, 1:]], 1)

    def network(eps_max):
        net = models.mlp([31, 2], generator=generator())
        return train(net, x, y, epochs=60, batch_size=50, lr=1e-2, generator=generator(1), eps_max=eps_max)

    plain, robust = network(0.0), network(0.4)
    assert accuracy(robust, x, y, attacks.pgd, 0.3) > accuracy(plain, x, y, attacks.pgd, 0.3) + 0.2


# --- controller -------------------------------------------------------------------------------------------------------


def test_constant_rewards_teach_nothing():
    controller = ArchitectureController([3, 2], seed=1)
    for _ in range(20):
        controller.update([controller.sample() for _ in range(4)], [0.7] * 4)
    for theta in controller.theta:
        np.testing.assert_allclose(theta, 0, atol=1e-12)


def test_rewards_that_ignore_the_action_move_theta_nowhere_on_average():
    rng, moved = np.random.default_rng(0), []
    for seed in range(400):
        controller = ArchitectureController([3], lr=1.0, seed=seed)
        controller.baseline = 0.5
        controller.update([controller.sample() for _ in range(4)], rng.uniform(size=4))
        moved.append(controller.theta[0])
    moved = np.array(moved)
    np.testing.assert_allclose(moved.sum(1), 0, atol=1e-12)  # the mean of theta over options never moves
    assert (np.abs(moved.mean(0)) < 4 * moved.std(0) / 20).all()


def test_update_is_the_gradient_of_the_expected_reward():
    controller = ArchitectureController([2, 3], lr=1.0)
    controller.theta = [np.array([0.3, -0.2]), np.array([0.1, 0.5, -0.4])]
    controller.baseline = 0.37
    actions = list(product(range(2), range(3)))
    rewards = np.random.default_rng(3).uniform(size=6)
    theta = [torch.tensor(value, requires_grad=True) for value in controller.theta]
    p = [value.softmax(0) for value in theta]
    expected = torch.autograd.grad(
        sum(r * p[0][a] * p[1][b] for (a, b), r in zip(actions, rewards, strict=True)), theta
    )
    # All actions, each weighted by its probability, are the expectation of the estimator, whatever the baseline.
    total = [np.zeros(2), np.zeros(3)]
    for action, reward in zip(actions, rewards, strict=True):
        one = copy.deepcopy(controller)
        one.update([action], [reward])
        weight = float((p[0][action[0]] * p[1][action[1]]).detach())
        for k in range(2):
            total[k] += weight * (one.theta[k] - controller.theta[k])
    for ours, theirs in zip(total, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-12)


def test_baseline_is_a_moving_average():
    controller = ArchitectureController([2], baseline_decay=0.8)
    for reward in (1.0, 0.0, 0.5):
        controller.update([(0,)], [reward])
    assert controller.baseline == pytest.approx(0.8 * 0.8 * 1.0 + 0.8 * 0.2 * 0.0 + 0.2 * 0.5)


@pytest.mark.parametrize("good", [0, 1])
def test_a_two_armed_bandit_is_solved(good):
    for seed in range(5):
        controller = ArchitectureController([2], seed=seed)
        for _ in range(30):
            actions = [controller.sample() for _ in range(4)]
            controller.update(actions, [float(action == (good,)) for action in actions])
        assert controller.best() == (good,)
        assert controller.probabilities()[0][good] > 0.9


def test_controllers_of_one_seed_agree():
    one, other = (ArchitectureController([3, 4], seed=7) for _ in range(2))
    assert [one.sample() for _ in range(10)] == [other.sample() for _ in range(10)]


# --- what a reader can get wrong --------------------------------------------------------------------------------------

X, Y = torch.zeros(4, 6, dtype=F64), torch.zeros(4, dtype=torch.long)
GRID = np.geomspace(0.01, 0.3, 10)


def short_training(**wrong):
    options = dict(epochs=1, batch_size=2, lr=1e-3, generator=generator()) | wrong
    return train(models.mlp([6, 3], generator=generator(), dtype=F64), X, Y, **options)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: logit_differences(torch.zeros(5)), "logits"),
        (lambda: logit_differences(torch.zeros(5, 1)), "logits"),
        (lambda: logit_differences(torch.full((5, 2), math.nan)), "logits"),
        (lambda: random_logit_gap_distribution(10, 1), "j must"),
        (lambda: random_logit_gap_distribution(10, 11), "j must"),
        (lambda: accuracy(MLP, X, Y[:2]), "x and y"),
        (lambda: accuracy(MLP, X[:0], Y[:0]), "x and y"),
        (lambda: accuracy(MLP, X, Y, attacks.fgsm, -0.1), "eps"),
        (lambda: adversarial_error(MLP, X, attacks.pgd, [-0.1]), "eps"),
        (lambda: fit_power_law(GRID, GRID[1:]), "eps"),
        (lambda: fit_power_law(-GRID, GRID), "eps"),
        (lambda: fit_power_law(GRID, GRID, 0.3, 0.01), "low"),
        (lambda: fit_power_law(GRID, GRID, 0.0, 0.3), "low"),
        (lambda: fit_power_law(GRID[:3], GRID[:3]), "error must"),
        (lambda: fit_power_law(GRID, np.full(10, 0.9)), "error must"),
        (lambda: critical_epsilon(MLP, X * math.nan), "x must"),
        (lambda: entropy_regularized_loss(X, Y, -1.0), "weight"),
        (lambda: entropy_regularized_loss(X, Y, math.nan), "weight"),
        (lambda: short_training(eps_max=-0.1), "eps_max"),
        (lambda: short_training(entropy_weight=-1.0), "weight"),
        (lambda: short_training(batch_size=5), "batch_size"),
        (lambda: short_training(epochs=0), "epochs"),
        (lambda: short_training(lr=0.0), "lr"),
        (lambda: ArchitectureController([]), "choices"),
        (lambda: ArchitectureController([3, 0]), "choices"),
        (lambda: ArchitectureController([3], lr=0.0), "lr"),
        (lambda: ArchitectureController([3], baseline_decay=1.0), "baseline_decay"),
        (lambda: ArchitectureController([3]).update([], []), "rewards"),
        (lambda: ArchitectureController([3]).update([(0,)], [1.0, 2.0]), "rewards"),
        (lambda: ArchitectureController([3]).update([(0,)], [math.nan]), "rewards"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
