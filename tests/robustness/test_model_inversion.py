"""Oracles: closed forms, autograd per record, PyTorch's optimiser, limiting cases and invariances."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from companion import models
from companion.robustness.model_inversion import (
    attack_metrics,
    clipped_gradients,
    conv_gan,
    dp_train,
    emi_attack,
    gmi_attack,
    gradient_penalty,
    identity_loss,
    logits,
    mlp_gan,
    predictive_power,
    toy_faces,
    train_wgan_gp,
    zcdp_epsilon,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def identity_generator(d):
    """A generator whose image is its code, and a critic without opinion."""
    G = nn.Linear(d, d, bias=False)
    nn.init.eye_(G.weight)
    return G, lambda image: 0 * image.sum(-1)


# --- faces ------------------------------------------------------------------------------------------------------------


def test_faces_are_a_function_of_their_seed():
    X, y, traits = toy_faces(5, 7, generator(3))
    again, *_ = toy_faces(5, 7, generator(3))
    assert torch.equal(X, again)
    assert not torch.equal(X, toy_faces(5, 7, generator(4))[0])
    assert (X.shape, X.dtype, traits.shape) == ((35, 256), torch.float32, (5, 8))
    assert y.tolist() == [person for person in range(5) for _ in range(7)]
    assert X.min() >= 0
    assert X.max() <= 1


def test_faces_are_drawn_where_they_should_be():
    X, _, _ = toy_faces(400, 1, generator())
    face = X.mean(0).reshape(16, 16)
    assert face[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 0.05  # corners are background
    assert face[5:10].mean() > face[1:3].mean() + 0.1  # hair is darker than skin
    torch.testing.assert_close(face, face.flip(1), rtol=0, atol=0.05)  # symmetric on average
    assert face[11].mean() < min(face[9].mean(), face[13, 4:12].mean())  # the mouth, at height 0.46
    assert face[7, [5, 10]].max() < face[7, 7:9].min()  # eyes


def test_a_person_looks_more_like_themselves_than_like_others():
    X, y, _ = toy_faces(20, 20, generator(1))
    judge = SVC(C=10).fit(X[::2].numpy(), y[::2].numpy())
    assert judge.score(X[1::2].numpy(), y[1::2].numpy()) > 0.85  # chance is 0.05


# --- networks and the GAN ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[6, 3], [6, 5, 3], [6, 5, 4, 3]])
def test_logits_are_those_of_pytorch_for_every_run(sizes):
    networks = [models.mlp(sizes, generator=generator(seed)) for seed in range(2)]
    x = normal(2, 9, 6)
    stacked = [torch.stack(tensors) for tensors in zip(*(n.parameters() for n in networks), strict=True)]
    expected = torch.stack([network(rows) for network, rows in zip(networks, x, strict=True)])
    torch.testing.assert_close(logits(stacked, x), expected)
    torch.testing.assert_close(logits(stacked, x[0]), torch.stack([network(x[0]) for network in networks]))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 5), scale=st.floats(0.1, 10))
def test_penalty_of_a_linear_critic_depends_on_its_slope_alone(seed, n, scale):
    a = scale * normal(4, seed=seed, dtype=torch.float64)
    real, fake = normal(2, n, 4, seed=seed + 1, dtype=torch.float64)
    penalty = gradient_penalty(lambda x: x @ a, real, fake, torch.rand(n, 1, generator=generator(seed)))
    torch.testing.assert_close(penalty, (a.norm() - 1) ** 2)


def test_penalty_is_taken_between_the_images_and_trains_the_critic():
    weight = torch.tensor(1.0, requires_grad=True)
    real, fake = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    penalty = gradient_penalty(lambda x: weight * x**2 / 2, real, fake, torch.tensor([[0.75]]))
    assert penalty.item() == pytest.approx((2.5 - 1) ** 2)
    penalty.backward()
    assert weight.grad.item() == pytest.approx(2 * (2.5 - 1) * 2.5)


def test_gan_learns_the_faces_and_leaves_them_alone():
    X, _, _ = toy_faces(200, 4, generator())
    before = X.clone()
    G, D = mlp_gan(8, 96, 256, generator(1))
    train_wgan_gp(G, D, X, generator(2), steps=150, lr=1e-3)
    with torch.no_grad():
        images = G(normal(500, 8, seed=5))
    assert (images.mean(0) - X.mean(0)).abs().mean() < 0.05  # at the start it is about 0.3
    assert 0.25 < images.std(0).mean() / X.std(0).mean() < 1.2  # neither one face nor noise
    assert torch.cdist(images, X).min(1).values.mean() < (X - X.mean(0)).norm(dim=1).mean()
    assert torch.equal(X, before)


def test_critic_s_first_step_is_that_of_the_wasserstein_loss():
    X = torch.rand(64, 3, generator=generator())
    G, D = mlp_gan(2, 4, 3, generator(1))
    copy = mlp_gan(2, 4, 3, generator(1))[1]
    g = generator(2)
    real = X[torch.randperm(64, generator=g)]
    fake = G(torch.randn(64, 2, generator=g)).detach()
    mix = torch.rand(64, 1, generator=g)
    (copy(fake).mean() - copy(real).mean() + 10 * gradient_penalty(copy, real, fake, mix)).backward()
    torch.optim.Adam(copy.parameters(), lr=5e-4, betas=(0.5, 0.9)).step()
    train_wgan_gp(G, D, X, generator(2), steps=1, critic_steps=1)
    for ours, theirs in zip(D.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_convolutional_pair_has_the_shapes_of_mnist_at_32():
    G, D = conv_gan(5, 2, generator())
    assert G(normal(3, 5)).shape == (3, 1, 32, 32)
    assert D(G(normal(3, 5))).shape == (3, 1)
    assert 0 <= G(normal(3, 5)).min() <= G(normal(3, 5)).max() <= 1
    assert all(
        torch.equal(a, b) for a, b in zip(G.parameters(), conv_gan(5, 2, generator())[0].parameters(), strict=True)
    )
    train_wgan_gp(G, D, normal(64, 1, 32, 32), generator(), steps=1)


# --- attacks ----------------------------------------------------------------------------------------------------------

W, B = normal(3, 4, seed=1), normal(3, seed=2)


def test_first_step_against_a_linear_classifier_shows_its_weights():
    labels = torch.tensor([0, 1, 2, 1])
    template = (torch.eye(3)[labels] - B.softmax(0)) @ W
    ours = emi_attack(partial(logits, [W, B]), labels, (4,), steps=1, lr=0.05, momentum=0.0)
    torch.testing.assert_close(ours, (0.05 * template).clamp(0, 1))
    G, D = identity_generator(4)
    start = normal(4, 4, seed=7)
    slope = (torch.eye(3)[labels] - (start @ W.T + B).softmax(-1)) @ W
    image, z = gmi_attack(
        G, D, partial(logits, [W, B]), labels, generator(7), lam=1.0, steps=1, lr=0.05, momentum=0.0, clip=9.0
    )
    torch.testing.assert_close(z, start + 0.05 * slope)
    torch.testing.assert_close(image, z)


def test_descent_is_pytorch_s_nesterov():
    G, D = identity_generator(4)
    labels = torch.tensor([0, 2])
    ours, _ = gmi_attack(
        G, D, partial(logits, [W, B]), labels, generator(), lam=3.0, steps=7, lr=0.02, momentum=0.8, clip=math.inf
    )
    x = normal(2, 4).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.02, momentum=0.8, nesterov=True)
    for _ in range(7):
        optimizer.zero_grad()
        (3 * F.cross_entropy(x @ W.T + B, labels, reduction="sum")).backward()
        optimizer.step()
    # Two forms of one method: ours keeps the point at which the next gradient is taken, and so does PyTorch.
    torch.testing.assert_close(ours, x.detach(), rtol=0, atol=1e-5)


def test_prior_alone_climbs_the_critic_whatever_the_label():
    G, _ = identity_generator(4)
    slope = torch.tensor([1.0, -1.0, 0.5, 0.0])
    images = [
        gmi_attack(
            G, lambda image: image @ slope, partial(logits, [W, B]), torch.tensor([label]), generator(), lam=0.0,
            steps=1, lr=0.01, momentum=0.0, clip=9.0,
        )[0]
        for label in range(3)
    ]  # fmt: skip
    for image in images:
        torch.testing.assert_close(image, normal(1, 4) + 0.01 * slope)


def test_codes_stay_in_the_box_and_no_steps_give_the_prior():
    G, D = mlp_gan(3, 8, 4, generator())
    target = partial(logits, [W, B])
    images, z = gmi_attack(G, D, target, torch.tensor([0, 1]), generator(1), steps=5, lr=1.0, clip=0.3)
    assert z.abs().max() <= 0.3 + 1e-6
    torch.testing.assert_close(images, G(z).detach())
    assert not images.requires_grad
    _, start = gmi_attack(G, D, target, torch.tensor([0, 1]), generator(1), steps=0)
    assert torch.equal(start, normal(2, 3, seed=1))
    pixels = emi_attack(target, torch.tensor([0, 1]), (4,), steps=50, lr=5.0)
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_rows_are_independent_and_runs_are_attacked_side_by_side():
    G, D = mlp_gan(3, 8, 4, generator())
    stacked = [normal(2, 3, 4, seed=1), normal(2, 3, seed=2)]
    labels = torch.tensor([[0, 1, 2], [2, 2, 0]])
    options = dict(lr=1e-3, steps=20, lam=10.0)
    together, _ = gmi_attack(G, D, partial(logits, stacked), labels, generator(), **options)
    starts = normal(2, 3, 3)

    class Fixed(nn.Module):  # shifts codes, so that the same start is drawn wherever the run stands
        def __init__(self, shift):
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.zeros(3, 3)), shift

        def forward(self, z):
            return G(z + self.shift)

    for run in range(2):
        drawn = normal(3, 3)
        alone, _ = gmi_attack(
            Fixed(starts[run] - drawn), D, partial(logits, [t[run] for t in stacked]), labels[run], generator(),
            **options, clip=math.inf,
        )  # fmt: skip
        free, _ = gmi_attack(G, D, partial(logits, stacked), labels, generator(), **options, clip=math.inf)
        torch.testing.assert_close(free[run], alone, rtol=0, atol=1e-5)
    assert together.shape == (2, 3, 4)


def test_restarts_keep_the_start_with_the_highest_score_of_the_wanted_class():
    G, D = mlp_gan(3, 8, 4, generator())
    target, labels = partial(logits, [W, B]), torch.tensor([2, 0])
    _, all_codes = gmi_attack(G, D, target, labels.repeat_interleave(6), generator(), steps=3)
    _, kept = gmi_attack(G, D, target, labels, generator(), steps=3, restarts=6)
    for label, codes, best in zip(labels, all_codes.reshape(2, 6, 3), kept, strict=True):
        scores = target(G(codes)).softmax(-1)[:, label]
        assert torch.equal(best, codes[scores.argmax()])


def test_the_target_is_only_evaluated():
    G, D = mlp_gan(3, 8, 4, generator())
    target = models.mlp([4, 5, 3], generator=generator())
    gmi_attack(G, D, target, torch.tensor([1]), generator(), steps=2)
    assert all(p.grad is None for module in (G, D, target) for p in module.parameters())


def test_identity_loss_is_a_sum_over_rows():
    images, labels = normal(2, 5, 4), torch.tensor([[0, 1, 2, 0, 1], [2, 1, 0, 0, 2]])
    target = partial(logits, [W, B])
    rows = [
        identity_loss(target, image[None], label[None])
        for image, label in zip(images.flatten(0, 1), labels.flatten(), strict=True)
    ]
    torch.testing.assert_close(identity_loss(target, images, labels), torch.stack(rows).sum())


def test_metrics_against_a_loop():
    X, y = normal(40, 6), torch.arange(4).repeat(10)
    judge = KNeighborsClassifier(3).fit(X.numpy(), y.numpy())
    images, labels = normal(9, 6, seed=3), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
    metrics = attack_metrics(images, labels, judge, X, y)
    nearest = [
        min(float((row - other).norm()) for other in X[y == label]) for row, label in zip(images, labels, strict=True)
    ]
    assert metrics["knn_distance"] == pytest.approx(np.mean(nearest), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((judge.predict(images.numpy()) == labels.numpy()).mean())
    own = attack_metrics(X, y, KNeighborsClassifier(1).fit(X.numpy(), y.numpy()), X, y)
    assert own["accuracy"] == 1
    assert own["knn_distance"] < 1e-2


# --- the theorem ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), inputs=st.integers(1, 12), classes=st.integers(1, 6))
def test_vulnerability_is_predictive_power_up_to_a_constant(seed, inputs, classes):
    rng = np.random.default_rng(seed)
    joint = rng.dirichlet(np.ones(inputs * classes)).reshape(inputs, classes) + 1e-6
    joint /= joint.sum()
    model = rng.dirichlet(np.ones(classes), inputs) + 1e-6
    model /= model.sum(1, keepdims=True)
    U, S = predictive_power(joint, model)
    p_x = joint.sum(1)
    for label in range(classes):
        given_y = joint[:, label] / joint[:, label].sum()
        assert S[label] - U[label] == pytest.approx(-(given_y * np.log(given_y / p_x)).sum(), abs=1e-10)
        assert S[label] < 1e-12


def test_truth_is_most_vulnerable_and_constants_tell_nothing():
    joint = np.random.default_rng(0).dirichlet(np.ones(12)).reshape(4, 3)
    truth = joint / joint.sum(1, keepdims=True)
    U, S = predictive_power(joint, truth)
    np.testing.assert_allclose(S, 0, atol=1e-12)
    information = (joint * np.log(joint / np.outer(joint.sum(1), joint.sum(0)))).sum()
    assert joint.sum(0) @ U == pytest.approx(information)  # mutual information
    blind, _ = predictive_power(joint, np.full((4, 3), 1 / 3))
    np.testing.assert_allclose(blind, 0, atol=1e-12)


# --- differential privacy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.5, 2.0, 1e6])
def test_clipped_gradients_agree_with_a_gradient_per_record(clip):
    parameters = [p.detach().double() for p in models.mlp([5, 7, 4], generator=generator()).parameters()]
    x, y = 2 * normal(11, 5, dtype=torch.float64), torch.randint(4, (11,), generator=generator(1))

    def loss(parameters, x, y):
        return F.cross_entropy(logits(parameters, x[None])[0], y)

    single = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in single]).sum(0).sqrt()
    scale = (clip / norms).clamp(max=1)
    assert clip > 100 or (scale < 1).any()
    for ours, records in zip(clipped_gradients(parameters, x, y, clip), single, strict=True):
        torch.testing.assert_close(ours, torch.einsum("n,n...->...", scale, records), rtol=0, atol=1e-10)


def test_without_noise_and_clipping_dp_is_gradient_descent():
    X, y = normal(1, 30, 6), torch.arange(30)[None] % 3
    ours = dp_train(X, y, 3, generator(4), noise_multiplier=0.0, clip=1e6, steps=5, lr=0.1)
    network = models.mlp([6, 64, 3], generator=generator(4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(network(X[0]), y[0]).backward()
        optimizer.step()
    for one, other in zip(ours, network.parameters(), strict=True):
        torch.testing.assert_close(one[0], other.detach(), rtol=0, atol=1e-5)


def test_noise_has_the_announced_size():
    X, y = normal(3, 50, 100), torch.arange(150).reshape(3, 50) % 4
    options = dict(clip=0.7, steps=1, lr=1.0)
    quiet = dp_train(X, y, 4, generator(), noise_multiplier=0.0, **options)
    noisy = dp_train(X, y, 4, generator(), noise_multiplier=5.0, **options)
    assert (noisy[0] - quiet[0]).std() == pytest.approx(5 * 0.7 / 50, rel=0.03)
    assert quiet[0].shape == (3, 64, 100)


def test_epsilon_has_the_values_computed_by_hand():
    assert zcdp_epsilon(150, 10, 1e-5) == pytest.approx(0.75 + 2 * math.sqrt(0.75 * math.log(1e5)), rel=1e-14)
    assert [round(zcdp_epsilon(150, s, 1e-5), 1) for s in (2, 4, 6, 10)] == [48.1, 19.4, 11.9, 6.6]
    assert zcdp_epsilon(150, 0, 1e-5) == math.inf
    assert zcdp_epsilon(1, 1e9, 1e-5) < 1e-7


@given(steps=st.integers(1, 1000), noise=st.floats(0.5, 100))
def test_four_times_the_steps_need_twice_the_noise(steps, noise):
    assert zcdp_epsilon(4 * steps, 2 * noise, 1e-5) == pytest.approx(zcdp_epsilon(steps, noise, 1e-5))


# --- what a reader can get wrong --------------------------------------------------------------------------------------

PAIR = mlp_gan(3, 8, 4, generator())
TARGET = partial(logits, [W, B])
ONE = torch.tensor([1])
EVEN = np.full((2, 2), 0.25)
HALF = np.full((2, 2), 0.5)
ROWS, PEOPLE = normal(2, 6, 5), torch.zeros(2, 6, dtype=torch.long)


def gmi(labels=ONE, **options):
    return gmi_attack(*PAIR, TARGET, labels, generator(), **options)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: toy_faces(0, 3, generator()), "n_people"),
        (lambda: toy_faces(3, 0, generator()), "per_person"),
        (lambda: train_wgan_gp(*PAIR, torch.zeros(63, 4), generator(), steps=1), "X must"),
        (lambda: train_wgan_gp(*PAIR, torch.full((64, 4), math.nan), generator(), steps=1), "X must"),
        (lambda: train_wgan_gp(*PAIR, torch.zeros(64, 4), generator(), steps=0), "steps"),
        (lambda: train_wgan_gp(*PAIR, torch.zeros(64, 4), generator(), steps=1, critic_steps=0), "critic_steps"),
        (lambda: train_wgan_gp(*PAIR, torch.zeros(64, 4), generator(), steps=1, lr=0), "lr"),
        (lambda: gmi(torch.tensor([], dtype=torch.long)), "labels is empty"),
        (lambda: gmi(torch.tensor([3])), "labels must"),
        (lambda: gmi(torch.tensor([-1])), "labels must"),
        (lambda: gmi(torch.tensor([1.0])), "labels must"),
        (lambda: gmi(lam=-1), "lam"),
        (lambda: gmi(lam=math.nan), "lam"),
        (lambda: gmi(clip=0), "clip"),
        (lambda: gmi(restarts=0), "restarts"),
        (lambda: gmi(steps=-1), "steps"),
        (lambda: gmi(lr=0), "lr"),
        (lambda: gmi(momentum=1), "momentum"),
        (lambda: emi_attack(TARGET, torch.tensor([3]), (4,)), "labels must"),
        (lambda: emi_attack(TARGET, ONE[:0], (4,)), "labels is empty"),
        (lambda: attack_metrics(normal(2, 4), ONE, None, normal(3, 4), torch.ones(3)), "one length"),
        (lambda: attack_metrics(normal(1, 4), ONE, None, normal(3, 4), torch.zeros(3)), "y_private"),
        (lambda: predictive_power(EVEN, HALF[:1]), "one shape"),
        (lambda: predictive_power(2 * EVEN, HALF), "joint"),
        (lambda: predictive_power(EVEN, EVEN), "rows of model"),
        (lambda: predictive_power(EVEN, np.eye(2)), "rows of model"),
        (lambda: clipped_gradients([], ROWS, PEOPLE, 0.0), "clip"),
        (lambda: dp_train(ROWS[0], PEOPLE, 2, generator(), noise_multiplier=1), "X must"),
        (lambda: dp_train(ROWS, PEOPLE[:, 1:], 2, generator(), noise_multiplier=1), "X must"),
        (lambda: dp_train(ROWS, PEOPLE + 2, 2, generator(), noise_multiplier=1), "y must"),
        (lambda: dp_train(ROWS, PEOPLE, 2, generator(), noise_multiplier=-1), "noise_multiplier"),
        (lambda: dp_train(ROWS, PEOPLE, 2, generator(), noise_multiplier=1, steps=0), "steps"),
        (lambda: zcdp_epsilon(0, 1, 1e-5), "steps"),
        (lambda: zcdp_epsilon(1, -1, 1e-5), "noise_multiplier"),
        (lambda: zcdp_epsilon(1, 1, 1.0), "delta"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
