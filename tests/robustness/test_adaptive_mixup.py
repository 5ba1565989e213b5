"""AdaMixUp against hand calculations, distributions from SciPy, invariances, and training that can be checked."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

from companion import data, models
from companion.robustness import adaptive_mixup as am

LINE = torch.tensor([[-2.0], [0.0], [2.0]])
EYE = torch.eye(3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def line3(seed=0, per_class=30):
    return data.gaussian_mixture(F.pad(LINE, (0, 1)), per_class, 0.15, generator(seed))


def small(**options):
    """Options of a short training run."""
    return dict(seeds=[0, 1], steps=3, lr=1e-2, batch_size=8) | options


BUILD = partial(am.mlps, 2, 3, 8)
X = torch.stack([line3(0)[0], line3(1)[0]])
Y = torch.stack([line3(0)[1], line3(1)[1]])


# --- mixing -----------------------------------------------------------------------------------------------------------


def test_mixup_by_hand():
    x, y = torch.tensor([[0.0, 0.0], [2.0, 4.0]]), torch.eye(2)
    mixed, label = am.mixup(x, y, torch.tensor([0.25, 1.0]), torch.tensor([1, 0]))
    assert mixed.tolist() == [[1.5, 3.0], [2.0, 4.0]]
    assert label.tolist() == [[0.25, 0.75], [0.0, 1.0]]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_swapping_a_pair_and_its_weight_changes_nothing(seed):
    g = generator(seed)
    x, gamma = torch.randn(6, 2, 3, generator=g), torch.rand(6, 1, generator=g)
    y, partner = torch.rand(6, 4, generator=g).softmax(-1), torch.tensor([1, 0, 3, 2, 5, 4])
    before = x.clone()
    one = am.mixup(x, y, gamma, partner)
    other = am.mixup(x[partner], y[partner], 1 - gamma, partner)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    torch.testing.assert_close(one[1].sum(1), torch.ones(6))
    assert torch.equal(x, before)
    torch.testing.assert_close(am.mixup(x, y, torch.ones(6), partner), (x, y), rtol=0, atol=0)


def test_each_pair_has_its_own_weight():
    mixed, _ = am.mixup(
        torch.arange(4.0)[:, None], torch.eye(4), torch.tensor([0.0, 0.5, 1.0, 0.5]), torch.arange(4).flip(0)
    )
    assert mixed.flatten().tolist() == [3.0, 1.5, 2.0, 1.5]


def test_cross_entropy_is_linear_in_the_mixed_label():
    logits, gamma = torch.randn(50, 3, generator=generator()), torch.rand(50, 1, generator=generator(1))
    a, b = torch.randint(3, (2, 50), generator=generator(2))
    label = am._blend(EYE[a], EYE[b], gamma)
    parts = [F.cross_entropy(logits, c, reduction="none") for c in (a, b)]
    expected = gamma[:, 0] * parts[0] + (1 - gamma[:, 0]) * parts[1]
    torch.testing.assert_close(F.cross_entropy(logits, label, reduction="none"), expected, rtol=0, atol=1e-6)


def test_strength():
    assert am.mixing_strength(torch.tensor([0.0, 1.0])) == 0
    assert am.mixing_strength(torch.tensor([0.5])) == 1
    assert am.mixing_strength(torch.rand(200_000, generator=generator())) == pytest.approx(0.5, abs=3e-3)


# --- the policy -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), scale=st.floats(0, 1e3))
def test_intervals_lie_in_the_unit_interval(seed, scale):
    policy = am.PolicyRegion(3, 8, generator=generator(seed))
    with torch.no_grad():
        policy.g[-1].weight.mul_(1e3 * scale)
        x1, x2 = scale * torch.randn(2, 40, 3, generator=generator(seed))
        alpha, delta = policy(x1, x2)
        gamma = policy.sample(x1, x2, torch.ones(40, 1))
    assert alpha.shape == delta.shape == gamma.shape == (40, 1)
    assert alpha.min() >= 0
    assert delta.min() >= 0
    assert gamma.max() <= 1 + 1e-6


def test_a_policy_without_an_opinion_is_uniform_in_the_middle_third():
    policy = am.PolicyRegion(2, generator=generator())
    x = torch.randn(2, 20_000, 2, generator=generator(1))
    with torch.no_grad():
        start = policy.sample(*x, torch.rand(20_000, 1, generator=generator(2)))
        assert (policy(*x)[0] - 1 / 3).abs().max() < 0.01  # the last layer starts small
        policy.g[-1].weight.zero_()
        gamma = policy.sample(*x, torch.rand(20_000, 1, generator=generator(2))).flatten().double().numpy()
    assert start.min() > 0.32
    assert stats.kstest(gamma, stats.uniform(1 / 3, 1 / 3).cdf).pvalue > 0.01
    assert gamma.mean() == pytest.approx(0.5, abs=2e-3)
    assert gamma.var() == pytest.approx(1 / 108, rel=0.03)


def test_the_draw_is_differentiable():
    policy = am.PolicyRegion(2, 4, generator=generator()).double()
    x1, x2 = torch.randn(2, 5, 2, generator=generator(1), dtype=torch.float64)
    epsilon, bias = torch.rand(5, 1, generator=generator(2), dtype=torch.float64), policy.g[-1].bias
    (slope,) = torch.autograd.grad(policy.sample(x1, x2, epsilon).sum(), bias)
    for k in range(3):
        ends = []
        for nudge in (1e-6, -1e-6):
            with torch.no_grad():
                bias[k] += nudge
                ends.append(policy.sample(x1, x2, epsilon).sum())
                bias[k] -= nudge
        assert float(slope[k]) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, abs=1e-7)


# --- the loss ---------------------------------------------------------------------------------------------------------


def batch(n=12):
    x, y = line3()
    rows = torch.randint(len(x), (3, n), generator=generator(5))
    onehot = F.one_hot(y).float()
    return (
        x[rows[0]],
        onehot[rows[0]],
        x[rows[1]],
        onehot[rows[1]],
        x[rows[2]],
        torch.rand(n, 1, generator=generator(6)),
    )


def test_terms_are_those_of_the_formulas():
    network = am.AdaMixUp(*BUILD(generator()))
    x1, y1, x2, y2, unseen, epsilon = batch()
    losses = network(x1, y1, x2, y2, unseen, epsilon)
    gamma = network.policy.sample(x1, x2, epsilon)
    mixed, label = gamma * x1 + (1 - gamma) * x2, gamma * y1 + (1 - gamma) * y2
    data_term = -(y1 * network.classifier(x1).log_softmax(-1)).sum(1).mean()
    mix_term = -(label * network.classifier(mixed).log_softmax(-1)).sum(1).mean()
    real = torch.cat([network.discriminator(x1), network.discriminator(unseen)]).sigmoid()
    fake = network.discriminator(mixed).sigmoid()
    intrusion = -torch.cat([real.log(), (1 - fake).log()]).mean()  # real is 1, mixed is 0, one mean over all
    for name, expected in (("data", data_term), ("mix", mix_term), ("intrusion", intrusion)):
        torch.testing.assert_close(losses[name], expected, rtol=1e-5, atol=1e-6)


def test_only_the_joint_policy_hears_the_classifier():
    for stop in (True, False):
        network = am.AdaMixUp(*BUILD(generator()), stop_gradient=stop)
        losses, policy = network(*batch()), list(network.policy.parameters())
        heard = torch.autograd.grad(losses["mix"], policy, allow_unused=True, retain_graph=True)
        silent = all(slope is None or not slope.any() for slope in heard)
        assert silent == stop
        assert all(slope.any() for slope in torch.autograd.grad(losses["intrusion"], policy))


def test_policy_and_discriminator_pull_the_same_way():
    network = am.AdaMixUp(*BUILD(generator()))
    before = network(*batch())["intrusion"]
    before.backward()
    with torch.no_grad():
        for parameter in network.policy.parameters():
            parameter -= parameter.grad
        assert network(*batch())["intrusion"] < before


def test_without_a_policy_it_is_mixup():
    network = am.AdaMixUp(BUILD(generator())[0])
    x1, y1, x2, y2, unseen, epsilon = batch()
    losses = network(x1, y1, x2, y2, unseen, epsilon)
    mixed, label = am.mixup(
        torch.cat([x1, x2]), torch.cat([y1, y2]), torch.cat([epsilon, epsilon]), torch.arange(24).roll(12)
    )
    expected = F.cross_entropy(network.classifier(mixed[:12]), label[:12])
    torch.testing.assert_close(losses["mix"], expected)
    assert set(losses) == {"data", "mix"}


@pytest.mark.parametrize(("method", "shown"), [("erm", [8]), ("mixup", [8]), ("mixup_clean", [16]), ("adamixup", [16])])
def test_the_classifier_is_shown_what_it_trains_on_and_nothing_else(method, shown):
    rows = []

    class Spy(nn.Identity):
        def forward(self, x):
            rows.append(len(x))
            return x

    def build(g):
        classifier, policy, discriminator = BUILD(g)
        return nn.Sequential(Spy(), classifier), policy, discriminator

    am.fit(method, X, Y, build, **small(steps=1))
    assert rows == shown


@pytest.mark.parametrize("kappa", [0.05, 0.3, 0.6])
def test_the_floor_of_a_contradictory_label(kappa):
    label = np.array([kappa / 2, 1 - kappa, kappa / 2])
    best = minimize(lambda z: np.logaddexp.reduce(z) - label @ z, np.zeros(3), tol=1e-12).x
    clean = np.logaddexp.reduce(best) - best[1]
    stream = torch.zeros(1000, 2), torch.eye(3)[torch.tensor([0, 2]).repeat(500)]
    reals = round(1000 * (1 - kappa) / kappa)
    found = am.label_conflict(
        torch.cat([stream[0], torch.zeros(reals, 2)]), torch.cat([stream[1], EYE[1].expand(reals, 3)]),
        torch.zeros(1, 2), torch.tensor([1]), 0.1,
    )  # fmt: skip
    assert found.item() == pytest.approx(kappa, abs=1e-3)
    assert clean == pytest.approx(-np.log(1 - kappa), abs=1e-5)


# --- intrusion and linearity ------------------------------------------------------------------------------------------


def test_intrusion_by_hand():
    x, y = LINE, torch.arange(3)
    mixed = torch.tensor([[0.0], [0.1], [0.1], [1.0], [-1.9], [2.1]])
    label = torch.tensor(
        [[0.5, 0, 0.5], [0.4, 0.2, 0.4], [0, 0.95, 0.05], [0, 0.5, 0.5], [0.95, 0, 0.05], [0.6, 0, 0.4]]
    )
    assert am.intrudes(mixed, label, x, y, 0.15).tolist() == [True, True, False, False, False, True]
    assert am.intrusion_rate(mixed, label, x, y, 0.15) == 0.5
    assert not am.intrudes(mixed, label, x, y, 0.05)[1]


def test_intrusion_of_copies():
    x, y = line3()
    third = EYE[(y + 1) % 3]
    assert am.intrusion_rate(x, third, x, y, 0.01) == 1
    partner, gamma = torch.randperm(len(x), generator=generator(3)), torch.randint(2, (len(x),), generator=generator(4))
    copies = am.mixup(x, EYE[y], gamma.float(), partner)
    assert am.intrusion_rate(*copies, x, y, 0.5) == 0


def test_chords_of_a_ring_intrude_though_both_ends_agree():
    x, y = am.target(200, generator())
    outer = x[y == 2]
    chords, label = am.mixup(
        outer, EYE[[2] * 200], torch.full((200,), 0.5), torch.randperm(200, generator=generator(1))
    )
    assert am.intrusion_rate(chords, label, x, y, 0.12) > 0.1
    assert am.intrusion_rate(chords, label, outer, y[y == 2], 0.12) == 0


def test_target_has_its_radii():
    x, y = am.target(4000, generator())
    norm = x.norm(dim=1)
    for c in (1, 2):
        assert norm[y == c].mean() == pytest.approx(c, abs=0.01)
        assert norm[y == c].std() == pytest.approx((0.08**2 + 0.05**2) ** 0.5, rel=0.05)
    assert x[y == 0].var(0).tolist() == pytest.approx([0.08**2 / 2 + 0.05**2] * 2, rel=0.1)
    assert x.mean(0).abs().max() < 0.05


def test_label_conflict_by_hand():
    stream, label = torch.tensor([[0.0], [0.1], [5.0]]), torch.tensor([[0.5, 0, 0.5], [0, 1.0, 0], [1.0, 0, 0]])
    found = am.label_conflict(stream, label, torch.tensor([[0.05], [5.0], [9.0]]), torch.tensor([1, 0, 0]), 0.2)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.0, torch.nan]), equal_nan=True)


class Step(nn.Module):
    """Two classes with a hard border at zero."""

    def forward(self, x):
        return 100 * torch.cat([-x.sign(), x.sign()], 1)


def test_deviation_of_known_classifiers():
    x = torch.tensor([[-1.0], [1.0]])
    assert am.linearity_deviation(Step(), x, 100_000, generator()) == pytest.approx(0.25, abs=5e-3)
    constant = nn.Linear(1, 3)
    nn.init.zeros_(constant.weight)
    assert am.linearity_deviation(constant, x, 100, generator()) < 1e-6


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", am.METHODS)
def test_every_method_starts_from_the_same_classifier_and_learns(method):
    start, end = am.fit(method, X, Y, BUILD, **small(steps=40))
    for seed in (0, 1):
        drawn = BUILD(generator(seed))[0].state_dict()
        kept = start[seed].classifier.state_dict()
        assert all(torch.equal(drawn[key], kept[key]) for key in drawn)
        losses = [F.cross_entropy(record[seed].classifier(X[seed]), Y[seed]) for record in (start, end)]
        assert losses[1] < losses[0]
    taught = {"adamixup", "adamixup_joint"}
    if start[0].policy is not None:
        same = torch.equal(start[0].policy.g[-1].bias, end[0].policy.g[-1].bias)
        assert same == (method not in taught)
    assert (end[0].discriminator is not None) == (method in taught)


def test_erm_is_plain_adam():
    *_, [trained] = am.fit("erm", X[:1], Y[:1], BUILD, **small(seeds=[3], steps=5))
    classifier, g = BUILD(generator(3))[0], generator(3)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
    for _ in range(5):
        rows = torch.randint(90, (3, 1, 8), generator=g)[0, 0]
        torch.rand(1, 8, 1, generator=g)
        optimizer.zero_grad()
        F.cross_entropy(classifier(X[0][rows]), Y[0][rows]).backward()
        optimizer.step()
    for one, other in zip(trained.classifier.parameters(), classifier.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_members_do_not_disturb_each_other():
    twins = am.fit("adamixup", X[[0, 0]], Y[[0, 0]], BUILD, **small(seeds=[5, 6]))[-1]
    other = am.fit("adamixup", X[[0, 1]], Y[[0, 1]], BUILD, **small(seeds=[5, 7]))[-1]
    for one, two in zip(twins[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert not torch.equal(twins[0].policy.g[0].weight, twins[1].policy.g[0].weight)


def test_records_and_inputs():
    before, state = X.clone(), torch.random.get_rng_state()
    records = am.fit("adamixup", X, Y, BUILD, **small(steps=5), record_every=2)
    assert [len(record) for record in records] == [2] * 4  # at 0, 2, 4 and the end
    weights = [record[0].classifier[0].weight for record in records]
    assert all(not torch.equal(a, b) for a, b in pairwise(weights))
    assert torch.equal(X, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_discriminator_clears_the_middle():
    x, y = (torch.stack(parts) for parts in zip(line3(0, 60), line3(1, 60), strict=True))
    g, ends = generator(1), []
    records = am.fit("adamixup", x, y, partial(am.mlps, 2, 3, 32), **small(steps=250, lr=5e-3, batch_size=64))
    for record in records:
        for network, points, labels in zip(record, x, y, strict=True):
            a, b = points[labels == 0], points[labels == 2]
            with torch.no_grad():
                gamma = network.gamma(a, b, torch.rand(60, 1, generator=g))
            label = am._blend(EYE[[0] * 60], EYE[[2] * 60], gamma)
            ends.append(am.intrusion_rate(am._blend(a, b, gamma), label, points, labels, 0.15))
    assert min(ends[:2]) > 0.25
    assert max(ends[2:]) < 0.05


# --- images -----------------------------------------------------------------------------------------------------------


def test_resnets_share_a_trunk_and_learn():
    images = torch.rand(1, 6, 3, 16, 16, generator=generator())
    state = torch.random.get_rng_state()
    build = partial(am.resnets, 3, 4, 2)
    options = small(seeds=[0], batch_size=4, augment=data.flip_and_crop)
    (start,), (end,) = am.fit("adamixup", images, torch.arange(6)[None] % 4, build, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert end.classifier[0] is end.discriminator[0]
    assert end.policy.trunk is not end.classifier[0]
    assert end.classifier(images[0]).shape == (6, 4)
    assert end.discriminator(images[0]).shape == (6, 1)
    assert not end.training
    for before, after in ((start.classifier[0], end.classifier[0]), (start.policy.trunk, end.policy.trunk)):
        assert not torch.equal(before[0].weight, after[0].weight)
        assert not torch.equal(before[1].activate[0].running_mean, after[1].activate[0].running_mean)


def test_resnet_18_has_its_size():
    classifier, _, _ = am.resnets(3, 10, 64, generator())
    convolutions = [layer for layer in classifier.modules() if isinstance(layer, nn.Conv2d)]
    assert len([layer for layer in convolutions if layer.kernel_size == (3, 3)]) == 17  # and the linear layer: 18
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 11_171_146  # 11.17 million, as published


def test_a_block_is_the_identity_plus_its_residual():
    block = am._Block(4, 4, 1).eval()
    nn.init.zeros_(block.residual[-1].weight)
    x = torch.randn(2, 4, 8, 8, generator=generator())
    assert torch.equal(block(x), x)


# --- what a reader can get wrong --------------------------------------------------------------------------------------

TWO = torch.zeros(2, 1)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: am.target(0, generator()), "per_class"),
        (lambda: am.mixup(LINE, EYE[:2], torch.ones(3), torch.arange(3)), "y_onehot"),
        (lambda: am.mixup(LINE, EYE, torch.ones(3), torch.arange(2)), "index"),
        (lambda: am.mixup(LINE, EYE, torch.ones(2), torch.arange(3)), "gamma"),
        (lambda: am.mixup(LINE, EYE, torch.full((3,), 1.1), torch.arange(3)), "gamma"),
        (lambda: am.mixup(LINE, EYE, torch.full((3,), torch.nan), torch.arange(3)), "gamma"),
        (lambda: am.PolicyRegion(0, generator=generator()), "d and hidden"),
        (lambda: am.PolicyRegion(2, 0, generator=generator()), "hidden"),
        (lambda: am.AdaMixUp(nn.Identity(), terms=()), "terms"),
        (lambda: am.AdaMixUp(nn.Identity(), terms=("intrusion",)), "terms"),
        (lambda: am.fit("cutmix", X, Y, BUILD, **small()), "method"),
        (lambda: am.fit("erm", X, Y[:, :5], BUILD, **small()), "x, y and seeds"),
        (lambda: am.fit("erm", X, Y, BUILD, **small(seeds=[0])), "seeds"),
        (lambda: am.fit("erm", X * torch.nan, Y, BUILD, **small()), "x holds NaN"),
        (lambda: am.fit("erm", X, Y, BUILD, **small(batch_size=0)), "batch_size"),
        (lambda: am.fit("erm", X, Y, BUILD, **small(lr=0)), "lr"),
        (lambda: am.intrudes(TWO, EYE[:2], LINE, torch.arange(3), 0), "radius"),
        (lambda: am.intrudes(TWO, EYE, LINE, torch.arange(3), 0.1), "y_mixed"),
        (lambda: am.intrusion_rate(TWO, EYE[:2], LINE, torch.arange(2), 0.1), "y must|y_mixed and y"),
        (lambda: am.label_conflict(TWO, EYE[:2], LINE, torch.arange(3), -1), "radius"),
        (lambda: am.linearity_deviation(models.mlp([1, 2], generator=generator()), LINE, 0, generator()), "n_pairs"),
        (lambda: am.mixing_strength(torch.tensor([1.5])), "gamma"),
        (lambda: am.mixing_strength(torch.empty(0)), "gamma"),
        (lambda: am.mlps(2, 1, 8, generator()), "n_classes"),
        (lambda: am.resnets(3, 10, 0, generator()), "width"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
