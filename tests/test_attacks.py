"""The attacks against closed forms for linear networks, and against the Adversarial Robustness Toolbox."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from companion import attacks, models

CLASSES, FEATURES = 4, 6


@pytest.fixture
def net(generator):
    return models.mlp([FEATURES, 16, CLASSES], generator=generator, activation=nn.Tanh, dtype=torch.float64)


@pytest.fixture
def linear(generator):
    return models.mlp([FEATURES, CLASSES], generator=generator, dtype=torch.float64)


@pytest.fixture
def x(generator):
    return torch.rand(32, FEATURES, generator=generator, dtype=torch.float64)


@pytest.fixture
def y(generator):
    return torch.randint(CLASSES, (32,), generator=generator)


def peer(net, bounds):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.estimators.classification import PyTorchClassifier
    return PyTorchClassifier(
        net.float(), nn.CrossEntropyLoss(), (FEATURES,), CLASSES, clip_values=bounds, device_type="cpu"
    )


def test_fgsm_agrees_with_the_adversarial_robustness_toolbox(net, x, y):
    classifier = peer(net, (0.0, 1.0))
    from art.attacks.evasion import FastGradientMethod

    theirs = FastGradientMethod(classifier, eps=0.1).generate(x.float().numpy(), y.numpy())
    ours = attacks.fgsm(net, x.float(), y, 0.1, bounds=(0.0, 1.0))
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)


def test_step_ll_agrees_with_the_adversarial_robustness_toolbox(net, x):
    classifier = peer(net, (0.0, 1.0))
    from art.attacks.evasion import FastGradientMethod

    least_likely = net(x.float()).argmin(1).numpy()
    theirs = FastGradientMethod(classifier, eps=0.1, targeted=True).generate(x.float().numpy(), least_likely)
    np.testing.assert_allclose(attacks.step_ll(net, x.float(), 0.1, bounds=(0.0, 1.0)).numpy(), theirs, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_agrees_with_the_adversarial_robustness_toolbox(net, x, y, norm):
    # The toolbox clips before it projects on the ball, we after it: for the cube it is the same, for the sphere not.
    bounds = (0.0, 1.0) if norm == "linf" else (-9.0, 9.0)
    classifier = peer(net, bounds)
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    attack = ProjectedGradientDescentPyTorch(
        classifier, norm=np.inf if norm == "linf" else 2, eps=0.2, eps_step=0.05, max_iter=10, verbose=False
    )
    theirs = attack.generate(x.float().numpy(), y.numpy())
    ours = attacks.pgd(net, x.float(), y, 0.2, norm=norm, bounds=bounds)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-6)


@pytest.mark.parametrize("attack", [attacks.fgsm, attacks.pgd, partial(attacks.pgd, loss="margin")])
def test_a_linear_binary_margin_falls_by_the_dual_norm(generator, x, attack):
    net = models.mlp([FEATURES, 2], generator=generator, dtype=torch.float64)
    y = torch.zeros(len(x), dtype=torch.long)
    difference = net[0].weight[1] - net[0].weight[0]
    rise = (lambda z: z[:, 1] - z[:, 0])(net(attack(net, x, y, 0.3)) - net(x))
    torch.testing.assert_close(rise, 0.3 * difference.abs().sum().expand(len(x)))


def test_the_l2_attack_on_a_linear_margin_gains_eps_times_the_length_of_the_gradient(generator, x):
    net = models.mlp([FEATURES, 2], generator=generator, dtype=torch.float64)
    y = torch.ones(len(x), dtype=torch.long)
    difference = net[0].weight[0] - net[0].weight[1]
    most = 0.3 * difference.norm().item()

    def gain(start):
        attacked = attacks.pgd(net, x, y, 0.3, norm="l2", loss="margin", generator=start)
        return (net(attacked) - net(x)) @ torch.tensor([1.0, -1.0], dtype=torch.float64)

    torch.testing.assert_close(gain(None), torch.full_like(x[:, 0], most))
    # From a random start the path along the sphere is too short to arrive: the angle shrinks like exp(-2.5).
    assert 0.9 * most < gain(generator).min().item()
    assert gain(generator).max().item() <= most + 1e-12


def test_the_margin_moves_a_network_whose_cross_entropy_is_saturated(net, x):
    net[-1].weight.data *= 1e4
    net.float()
    x, y = x.float(), net(x.float()).argmax(1)
    gradient = attacks._gradient(net, x, y, attacks._cross_entropy)
    assert (gradient == 0).all(1).float().mean() > 0.5
    lost = [
        float((net(attacks.pgd(net, x, y, 0.3, loss=loss)).argmax(1) != y).float().mean()) for loss in attacks.LOSSES
    ]
    assert lost[1] > lost[0] + 0.2


@given(st.integers(0, 10**6), st.sampled_from(["linf", "l2"]), st.floats(0, 0.5), st.booleans())
def test_the_attack_stays_in_the_ball_and_in_the_box(seed, norm, eps, random_start):
    generator = torch.Generator().manual_seed(seed)
    net = models.mlp([FEATURES, 8, CLASSES], generator=generator, dtype=torch.float64)
    x = torch.rand(5, 2, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (5,), generator=generator)
    kept = x.clone()
    attacked = attacks.pgd(
        lambda z: net(z.flatten(1)), x, y, eps, norm=norm, bounds=(0, 1), generator=generator if random_start else None
    )
    size = (attacked - x).flatten(1)
    size = size.abs().amax(1) if norm == "linf" else size.norm(dim=1)
    assert float(size.max()) <= eps * (1 + 1e-9) + 1e-12
    assert float(attacked.min()) >= 0
    assert float(attacked.max()) <= 1
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_random_start_fills_the_ball(norm):
    x, y = torch.zeros(4000, 2, dtype=torch.float64), torch.zeros(4000, dtype=torch.long)
    flat = attacks.pgd(lambda z: z * 0.0, x, y, 1.0, steps=1, norm=norm, generator=torch.Generator().manual_seed(0))
    radius = flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)
    # A uniform point of a ball in two dimensions has a radius whose square is uniform.
    assert abs(float((radius**2).mean()) - 0.5) < 0.02


def test_attacks_reach_higher_losses_step_by_step(net, x, y):
    def loss(z):
        return functional.cross_entropy(net(z), y).item()

    one = attacks.fgsm(net, x, y, 0.2)
    many = attacks.pgd(net, x, y, 0.2, steps=40)
    assert loss(x) < loss(one) <= loss(many) + 1e-9


def test_every_input_may_have_its_own_eps(net, x, y):
    eps = torch.linspace(0, 0.2, len(x), dtype=torch.float64)
    for attack in (attacks.fgsm, attacks.pgd):
        together = attack(net, x, y, eps)
        for i in (0, 7, 31):
            torch.testing.assert_close(together[i : i + 1], attack(net, x[i : i + 1], y[i : i + 1], float(eps[i])))
    torch.testing.assert_close(attacks.step_ll(net, x, eps)[7:8], attacks.step_ll(net, x[7:8], float(eps[7])))


def test_an_ensemble_is_attacked_as_its_members_are(x, y, generator):
    weight = torch.randn(3, FEATURES, CLASSES, generator=generator, dtype=torch.float64)
    stacked, labels = x.expand(3, *x.shape).contiguous(), y.expand(3, -1).contiguous()
    for attack in (attacks.fgsm, attacks.pgd, partial(attacks.pgd, norm="l2", loss="margin")):
        together = attack(lambda z: (z @ weight).tanh(), stacked, labels, 0.1)
        for w, attacked in zip(weight, together, strict=True):
            torch.testing.assert_close(attacked, attack(lambda z, w=w: (z @ w).tanh(), x, y, 0.1))


def test_zero_eps_returns_the_input(net, x, y):
    for attacked in (attacks.fgsm(net, x, y, 0.0), attacks.step_ll(net, x, 0.0), attacks.pgd(net, x, y, 0.0)):
        torch.testing.assert_close(attacked, x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, x, y: attacks.fgsm(n, x, y, -0.1), "eps must be finite and not negative, got -0.1"),
        (lambda n, x, y: attacks.pgd(n, x, y, float("nan")), "eps must be finite"),
        (lambda n, x, y: attacks.pgd(n, x, y, torch.ones(3)), r"hold one per input, \(32,\)"),
        (lambda n, x, y: attacks.fgsm(n, x, y[:5], 0.1), "x must start with the axes of y"),
        (lambda n, x, y: attacks.pgd(n, x, y, 0.1, steps=0), "steps must be at least 1, got 0"),
        (lambda n, x, y: attacks.pgd(n, x, y, 0.1, loss="hinge"), "loss='hinge'"),
        (lambda n, x, y: attacks.pgd(n, x, y, 0.1, norm="l1"), "norm='l1'"),
        (lambda n, x, y: attacks.step_ll(n, x + 1, 0.1, bounds=(0.0, 1.0)), "x must lie inside bounds"),
        (lambda n, x, y: attacks.pgd(n, x * float("nan"), y, 0.1, bounds=(0.0, 1.0)), "x must lie inside bounds"),
    ],
)
def test_bad_input_is_named(net, x, y, call, message):
    with pytest.raises(ValueError, match=message):
        call(net, x, y)
