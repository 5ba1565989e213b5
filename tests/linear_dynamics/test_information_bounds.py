"""Oracles: SciPy's and PyTorch's divergences and distances, quadrature, complete enumeration, invariances."""

import math
from functools import reduce
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad
from scipy.linalg import sqrtm
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from companion.linear_dynamics.information_bounds import (
    binary_network_losses,
    dobrushin,
    dropconnect_kernel,
    dropout_kernel,
    expected_clip_loss,
    gaussian_layer_kl,
    gibbs_exact,
    kl_bound,
    layer_distances,
    layer_kls,
    mean_classifier_network,
    representations,
    sdpi_dropconnect,
    sdpi_dropout,
    sdpi_gaussian,
    sliced_wasserstein,
)

F64 = torch.float64
RANKS, GAINS = (5, 3, 2, 1), (0.7, 0.4, 1.2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def training_set(*batch, n=9, d=6, noise=1.0, seed=0):
    """Inputs and labels around the class mean (1, 0, ..., 0)."""
    g = generator(seed)
    y = 2.0 * torch.randint(0, 2, (*batch, n), generator=g).to(F64) - 1
    return y[..., None] * torch.eye(d, dtype=F64)[0] + noise * torch.randn(*batch, n, d, generator=g, dtype=F64), y


def network(*batch, seed=0, **options):
    x, y = training_set(*batch, seed=seed, **options)
    return mean_classifier_network(x, y, RANKS, GAINS, generator(seed + 1))


def end_to_end(weights):
    return reduce(lambda below, weight: weight @ below, weights)


MEAN = torch.eye(6, dtype=F64)[0]

# --- the Gaussian layer -----------------------------------------------------------------------------------------------


def share_along_estimate(d, n, m, s):
    """E (ŵᵀδ)²/‖ŵ‖² by quadrature over the part of ŵ along μ and the norm of the rest."""
    z, weight_z = np.polynomial.hermite_e.hermegauss(80)
    chi = stats.chi(d - 1)
    low, high = chi.ppf(1e-17), chi.isf(1e-17)
    u, weight_u = np.polynomial.legendre.leggauss(400)
    u = low + (high - low) * (u + 1) / 2
    along, rest = (m + s / math.sqrt(n) * z)[:, None], s**2 / n * u**2
    values = (along * (along - m) + rest) ** 2 / (along**2 + rest)
    return weight_z / weight_z.sum() @ values @ (weight_u * (high - low) / 2 * chi.pdf(u))


@pytest.mark.parametrize(
    ("d", "n", "m", "s"), [(20, 20, 1, 1), (20, 200, 1, 1), (5, 7, 0.3, 2), (50, 1000, 2, 0.5), (30, 25, 0, 1)]
)
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_layer_kl_agrees_with_quadrature(d, n, m, s, fraction):
    r = round(1 + fraction * (d - 1))
    a = share_along_estimate(d, n, m, s)
    shift = a + (r - 1) / (d - 1) * (d * s**2 / n - a)
    expected = r / 2 * (-1 / n - math.log(1 - 1 / n)) + shift / (2 * s**2)
    assert gaussian_layer_kl(r, d, n, m, noise=s) == pytest.approx(expected, rel=2e-5)


def test_layer_kl_in_two_dimensions_is_elementary():
    z = 10 / 2
    expected = 0.5 * (-0.1 - math.log(0.9)) + 0.1 - (1 - math.exp(-z)) / 20
    assert gaussian_layer_kl(1, 2, 10, 1.0) == pytest.approx(expected, rel=1e-13)


def test_layer_kl_is_continuous_where_the_signal_vanishes():
    limit = gaussian_layer_kl(1, 19, 2, 0.0)
    for m in (1e-160, 4e-141, 1e-30, 1e-9):
        assert gaussian_layer_kl(1, 19, 2, m) == pytest.approx(limit, rel=1e-12)


def test_without_a_signal_the_estimate_holds_all_of_the_error():
    shrink = 0.5 * (-1 / 25 - math.log(1 - 1 / 25))
    shift = 2 * (gaussian_layer_kl(1, 30, 25, 0.0) - shrink)
    assert shift == pytest.approx(30 / 25, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(d=st.integers(1, 60), n=st.integers(2, 500), m=st.floats(0, 20), s=st.floats(0.1, 10))
def test_layer_kl_at_the_input_is_the_mutual_information_and_falls_with_rank(d, n, m, s):
    values = [gaussian_layer_kl(r, d, n, m, noise=s) for r in range(d, 0, -1)]
    assert values[0] == pytest.approx(d / 2 * math.log(n / (n - 1)), rel=1e-12)
    assert all(after < before for before, after in pairwise(values))
    independent = gaussian_layer_kl(1, d, n, m, noise=s, data_independent=True)
    assert independent == pytest.approx(0.5 * math.log(n / (n - 1)), rel=1e-12)
    assert values[-1] > independent * (1 - 1e-9)  # the projection on ŵ reveals more than a blind one
    assert gaussian_layer_kl(1, d, n, 3 * m, noise=3 * s) == pytest.approx(values[-1], rel=1e-9)  # units cancel


def test_layer_kl_is_the_mean_over_networks():
    weights = network(20_000, n=12, d=6, noise=0.8)
    simulated = layer_kls(weights, MEAN, 12, noise=0.8).mean(0)
    expected = [gaussian_layer_kl(r, 6, 12, 1.0, noise=0.8) for r in (6, *RANKS)]
    np.testing.assert_allclose(simulated, expected, rtol=0.03)


def test_layer_kls_agree_with_torch_distributions():
    weights, n, s = network(n=9, noise=1.3), 9, 1.3
    w_hat, a = end_to_end(weights)[0], torch.eye(6, dtype=F64)
    ours = layer_kls(weights, MEAN, n, s)
    assert len(ours) == 5
    for layer, value in enumerate(ours):
        cov = s**2 * a @ a.mT
        train, test = MultivariateNormal(a @ w_hat, (1 - 1 / n) * cov), MultivariateNormal(a @ MEAN, cov)
        assert value == pytest.approx(float(kl_divergence(train, test)), rel=1e-10)
        if layer < len(weights):
            a = weights[layer] @ a


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), gains=st.tuples(*[st.floats(0.05, 5)] * 3))
def test_gains_change_distances_but_neither_divergences_nor_products(seed, gains):
    x, y = training_set(seed=seed)
    one, other = (mean_classifier_network(x, y, RANKS, g, generator(seed)) for g in (GAINS, gains))
    torch.testing.assert_close(layer_kls(one, MEAN, 9), layer_kls(other, MEAN, 9), rtol=1e-9, atol=0)
    first, second = (layer_distances(weights, MEAN, 9) for weights in (one, other))
    torch.testing.assert_close(first["weighted"], second["weighted"], rtol=1e-9, atol=0)
    ratio = first["distance"].new_tensor([1, *np.divide(gains, GAINS), 1])
    torch.testing.assert_close(second["distance"], first["distance"] * ratio, rtol=1e-9, atol=0)


def test_kl_bound_is_the_sub_gaussian_one():
    np.testing.assert_allclose(kl_bound(np.array([0.0, 0.5, 2.0])), [0, 0.5, 1])
    assert kl_bound(0.5, sigma=3.0) == pytest.approx(3.0)


# --- the network ------------------------------------------------------------------------------------------------------


def test_mean_classifier_network_computes_the_mean():
    x, y = training_set(4, 3)
    before = x.clone(), y.clone()
    weights = mean_classifier_network(x, y, RANKS, GAINS, generator())
    assert [weight.shape[-2:] for weight in weights] == [(5, 6), (3, 5), (2, 3), (1, 2)]
    w_hat = (y[..., None] * x).mean(-2)
    torch.testing.assert_close(end_to_end(weights).squeeze(-2), w_hat, rtol=0, atol=1e-12)
    first = weights[0] / GAINS[0]
    torch.testing.assert_close(first @ first.mT, torch.eye(5, dtype=F64).expand(4, 3, 5, 5), rtol=0, atol=1e-12)
    torch.testing.assert_close(first[..., 0, :], nn.functional.normalize(w_hat, dim=-1), rtol=0, atol=1e-12)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_other_directions_are_uniform_around_the_estimate():
    x, y = (t.expand(4000, *t.shape) for t in training_set())
    first = mean_classifier_network(x, y, RANKS, GAINS, generator())[0] / GAINS[0]
    rest = torch.eye(6, dtype=F64) - first[0, :1].mT @ first[0, :1]
    for row in (1, 4):  # mean 0, second moment the projector orthogonal to ŵ over its dimension
        torch.testing.assert_close(first[:, row].mean(0), torch.zeros(6, dtype=F64), rtol=0, atol=0.04)
        torch.testing.assert_close(first[:, row].mT @ first[:, row] / 4000, rest / 5, rtol=0, atol=0.02)


def test_a_single_layer_is_the_classifier_itself():
    x, y = training_set()
    (weight,) = mean_classifier_network(x, y, (1,), (), generator())
    torch.testing.assert_close(weight[0], (y[:, None] * x).mean(0), rtol=0, atol=1e-13)
    found = layer_distances([weight], MEAN, 9)
    assert found["factor"].tolist() == pytest.approx([float(weight.norm()), 1])


# --- distances --------------------------------------------------------------------------------------------------------


def test_distance_agrees_with_the_bures_formula():
    g, n, s = generator(3), 7, 1.4  # no mean classifier: any weights
    weights = [torch.randn(shape, generator=g, dtype=F64) for shape in ((4, 6), (4, 4), (1, 4))]
    ours, a = layer_distances(weights, MEAN, n, s)["distance"], torch.eye(6, dtype=F64)
    for layer in range(4):
        test = (s**2 * a @ a.mT).numpy()
        train, root = (1 - 1 / n) * test, sqrtm(test)
        bures = np.trace(train + test - 2 * sqrtm(root @ train @ root)).real
        shift = float((a @ (end_to_end(weights)[0] - MEAN)).square().sum())
        assert float(ours[layer]) == pytest.approx(math.sqrt(shift + bures), abs=1e-8)
        a = weights[layer] @ a if layer < 3 else a


def test_distance_at_the_output_bounds_the_exact_one():
    n, weights = 9, network()
    w_hat = end_to_end(weights)[0]
    shift, length = float(w_hat @ (w_hat - MEAN)), float(w_hat.norm())
    spread = length * (math.sqrt(1 - 1 / n) - 1)
    folded = abs(shift) * math.erf(abs(shift / spread) / math.sqrt(2))
    exact = folded + abs(spread) * math.sqrt(2 / math.pi) * math.exp(-((shift / spread) ** 2) / 2)
    rng = np.random.default_rng(0)
    train = rng.normal(float(w_hat @ w_hat), length * math.sqrt(1 - 1 / n), 200_000)
    test = rng.normal(float(w_hat @ MEAN), length, 200_000)
    assert stats.wasserstein_distance(train, test) == pytest.approx(exact, rel=0.03)
    ours = float(layer_distances(weights, MEAN, n)["distance"][-1])
    assert exact < ours < math.sqrt(math.pi / 2) * exact  # any Gaussian: E|G| ≤ sqrt(E G²) ≤ sqrt(π/2) E|G|


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), widths=st.lists(st.integers(1, 7), min_size=0, max_size=4))
def test_weighted_distances_never_increase(seed, widths):
    g, sizes = generator(seed), [6, *widths, 1]
    weights = [torch.randn(5, b, a, generator=g, dtype=F64) for a, b in pairwise(sizes)]
    plain, joint = (layer_distances(weights, MEAN, 9, joint=flag) for flag in (False, True))
    terms = plain["weighted"]
    assert terms.shape == (5, len(sizes))
    assert (terms.diff(dim=-1) <= 1e-12 * terms[:, :1]).all()
    assert (joint["weighted"] >= joint["weighted"][:, -1:] * (1 - 1e-12)).all()
    assert torch.equal(joint["factor"], plain["factor"].clamp(min=1))
    norms = torch.stack([torch.linalg.svdvals(weight)[:, 0] for weight in weights], -1)
    torch.testing.assert_close(plain["factor"][:, 0], norms.prod(-1), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("margin", "std"), [(0.3, 1.1), (-2.0, 0.4), (1.0, 0.05), (5.0, 2.0)])
def test_clipped_loss_agrees_with_quad(margin, std):
    def integrand(m):
        return min(max((1 - m) / 2, 0), 1) * stats.norm.pdf(m, margin, std)

    expected = quad(integrand, margin - 12 * std, margin + 12 * std, points=[-1, 1], epsabs=1e-12, limit=200)[0]
    ours = expected_clip_loss(torch.tensor([margin], dtype=F64), torch.tensor([std], dtype=F64))
    assert float(ours) == pytest.approx(expected, abs=1e-9)


# --- noisy layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "width"), [(0.3, 1), (0.3, 3), (0.6, 2), (0.0, 2), (1.0, 2)])
def test_dropout_is_a_product_of_erasures(p, width):
    kernel, states = dropout_kernel(p, width), [*product((-1, 0, 1), repeat=width)]
    expected = np.zeros_like(kernel)
    for row, state in enumerate(states):
        for mask in product((0, 1), repeat=width):
            column = states.index(tuple(m * value for m, value in zip(mask, state, strict=True)))
            expected[row, column] += math.prod(1 - p if m else p for m in mask)
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-14)
    assert dobrushin(kernel) == pytest.approx(sdpi_dropout(p, width), abs=1e-13)


@pytest.mark.parametrize(("k", "d", "p"), [(1, 2, 0.3), (2, 2, 0.6), (2, 1, 0.5), (1, 3, 0.2)])
def test_dropconnect_lists_all_masks(k, d, p):
    check_dropconnect(np.random.default_rng(k + d).standard_normal((k, d)), p)


def test_dropconnect_adds_up_masks_with_the_same_output():
    check_dropconnect(np.ones((1, 3)), 0.3)  # equal weights: many masks give the same sum


def check_dropconnect(weight, p):
    """Compare with a dictionary that is filled mask by mask."""
    (k, d), kernel = weight.shape, dropconnect_kernel(weight, p)
    laws = []
    for x in product((-1, 1), repeat=d):
        law = {}
        for mask in product((0, 1), repeat=k * d):
            output = tuple((np.reshape(mask, (k, d)) * weight @ x).round(9) + 0.0)
            law[output] = law.get(output, 0) + math.prod(1 - p if m else p for m in mask)
        laws.append(law)
    outputs = sorted(set().union(*laws))
    expected = [[law.get(output, 0) for output in outputs] for law in laws]
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-13)
    assert dobrushin(kernel) == pytest.approx(sdpi_dropconnect(p, k, d), abs=1e-13)


def test_gaussian_noise_is_the_distance_of_two_corners():
    noise, amplitude, width = 0.8, 0.7, 3
    reach = amplitude * math.sqrt(width)
    overlap = quad(lambda t: min(stats.norm.pdf(t, reach, noise), stats.norm.pdf(t, -reach, noise)), -9, 9, points=[0])
    assert sdpi_gaussian(noise, amplitude, width) == pytest.approx(1 - overlap[0], abs=1e-9)
    assert sdpi_gaussian(noise, amplitude, width) == pytest.approx(1 - 2 * stats.norm.sf(reach / noise), abs=1e-14)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_dobrushin_bounds_the_contraction_of_divergence(seed):
    rng = np.random.default_rng(seed)
    kernel = rng.dirichlet(np.full(4, 0.5), size=3)
    p, q = rng.dirichlet(np.ones(3), size=2)
    ratio = stats.entropy(p @ kernel, q @ kernel) / stats.entropy(p, q)
    assert ratio <= dobrushin(kernel) + 1e-9
    assert dobrushin(kernel) <= 1


# --- small networks and the Gibbs algorithm ---------------------------------------------------------------------------

CORNERS = np.array([*product((-1.0, 1.0), repeat=3)])
MAJORITY = np.sign(CORNERS.sum(1))
P_Z = np.stack([np.where(MAJORITY > 0, 0.8, 0.2), np.where(MAJORITY > 0, 0.2, 0.8)], axis=1) / 8


def test_losses_agree_with_plain_loops():
    widths, p = (3, 2, 1), 0.3
    expected = []
    for numbers in product((-1, 1), repeat=8):
        first, second = np.reshape(numbers[:6], (2, 3)), np.reshape(numbers[6:], (1, 2))
        row = np.zeros(8)
        for mask in product((0, 1), repeat=2):
            share = math.prod(1 - p if m else p for m in mask)
            row += [share * (1 - np.sign(second @ (np.sign(first @ x) * mask))[0]) / 2 for x in CORNERS]
        expected.append(row)
    np.testing.assert_allclose(binary_network_losses(widths, p, CORNERS), expected, rtol=0, atol=1e-14)


def test_losses_in_the_limits():
    single = binary_network_losses((3, 1), 0.3, CORNERS)  # no hidden unit, nothing to drop
    weights = np.array([*product((-1, 1), repeat=3)])
    np.testing.assert_array_equal(single, (weights @ CORNERS.T < 0).astype(float))
    np.testing.assert_array_equal(binary_network_losses((3, 2, 2, 1), 1.0, CORNERS), 0.5)
    chain = binary_network_losses((3, 1, 1, 1), 0.3, CORNERS)  # both units survive or the answer is a tie
    np.testing.assert_allclose(np.unique(chain.round(12)), [0.5 - 0.7**2 / 2, 0.5 + 0.7**2 / 2], rtol=0, atol=1e-12)


def test_gibbs_agrees_with_a_sum_over_ordered_data():
    losses, alpha, p = binary_network_losses((3, 2, 1), 0.3, CORNERS), 5.0, P_Z.T.ravel()
    loss = np.hstack([losses, 1 - losses])
    joint = np.zeros((16, 16, len(loss)))
    for i, j in product(range(16), repeat=2):
        posterior = np.exp(-alpha * (loss[:, i] + loss[:, j]) / 2)
        joint[i, j] = p[i] * p[j] * posterior / posterior.sum()
    independent = joint.sum((1, 2))[:, None, None] * joint.sum((0, 2))[None, :, None] * joint.sum((0, 1))
    one = joint.sum(1)
    label = one.reshape(2, 8, -1).sum(1)
    train = (loss.T[:, None] + loss.T[None]) / 2
    result = gibbs_exact(losses, P_Z, 2, alpha)
    assert result.risk == pytest.approx(float(joint.sum((0, 1)) @ loss @ p), abs=1e-12)
    assert result.gen == pytest.approx(result.risk - float((joint * train).sum()), abs=1e-12)
    assert result.mutual_information == pytest.approx(stats.entropy(joint.ravel(), independent.ravel()), abs=1e-12)
    assert result.lautum == pytest.approx(stats.entropy(independent.ravel(), joint.ravel()), abs=1e-12)
    for value, table in ((result.individual_mi, one), (result.label_mi, label)):
        assert value == pytest.approx(
            stats.entropy(table.ravel(), np.outer(table.sum(1), table.sum(0)).ravel()), abs=1e-12
        )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 4), alpha=st.floats(0.1, 30))
def test_gibbs_identities_hold_for_any_losses(seed, n, alpha):
    rng = np.random.default_rng(seed)
    losses, p_z = rng.random((6, 2)), rng.dirichlet(np.ones(4)).reshape(2, 2)
    result = gibbs_exact(losses, p_z, n, alpha)
    assert result.gen == pytest.approx((result.mutual_information + result.lautum) / alpha, abs=1e-12)
    assert n * result.individual_mi <= result.mutual_information + 1e-12
    assert -1e-12 <= result.label_mi <= result.individual_mi + 1e-12
    assert result.gen <= kl_bound(max(result.individual_mi, 0)) + 1e-9
    assert result.mutual_information <= math.log(6) + 1e-12
    doubled = gibbs_exact(np.repeat(losses, 2, axis=0), p_z, n, alpha)
    np.testing.assert_allclose(doubled, result, rtol=0, atol=1e-12)  # copies of parameters change nothing


def test_gibbs_that_cannot_learn_does_not_overfit():
    np.testing.assert_allclose(gibbs_exact(np.full((5, 2), 0.5), np.full((2, 2), 0.25), 3, 9.0)[:5], 0, atol=1e-14)
    labels = gibbs_exact(np.array([[0.0], [1.0]]), np.array([[0.3, 0.7]]), 2, 4.0)  # the label is all there is
    assert labels.label_mi == pytest.approx(labels.individual_mi, abs=1e-14)
    assert labels.label_mi > 0.1


# --- real networks ----------------------------------------------------------------------------------------------------


def test_representations_are_those_of_torch():
    net = nn.Sequential(
        nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)
    )
    x = torch.randn(11, 5, generator=generator())
    layers = representations([net[0].weight, net[2].weight, net[4].weight], x)
    for ours, stop in zip(layers, (0, 2, 4, 5), strict=True):
        torch.testing.assert_close(ours, net[:stop](x))


def test_dropout_keeps_the_mean_and_only_touches_hidden_units():
    weights, x = [torch.eye(3), torch.eye(3)], torch.rand(20_000, 3, generator=generator()) + 1
    first, hidden, last = representations(weights, x, 0.3, generator(1))
    assert torch.equal(first, x)
    assert torch.equal(hidden, last)
    assert (hidden == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(hidden[hidden > 0], (x / 0.7)[hidden > 0])
    assert torch.equal(hidden, representations(weights, x, 0.3, generator(1))[1])


def test_sliced_distance_agrees_with_scipy():
    a, b = torch.randn(2, 40, 3, generator=generator(), dtype=F64)
    directions = nn.functional.normalize(torch.randn(3, 6, generator=generator(5), dtype=F64), dim=0)
    expected = [stats.wasserstein_distance((a @ v).numpy(), (b @ v).numpy()) for v in directions.mT]
    ours = sliced_wasserstein(a, b, 6, generator(5))
    assert float(ours) == pytest.approx(math.sqrt(3) * np.mean(expected), rel=1e-12)


@pytest.mark.parametrize("units", [10, 300])
def test_sliced_distance_of_a_shift_hardly_depends_on_width(units):
    a = torch.randn(2, 50, units, generator=generator(), dtype=F64)
    shift = torch.zeros(units, dtype=F64)
    shift[0] = 2.0
    found = sliced_wasserstein(a, a + shift, 5000, generator(1))
    np.testing.assert_allclose(found, 2 * math.sqrt(2 / math.pi), rtol=0.05)


# --- what a reader can get wrong --------------------------------------------------------------------------------------

X, Y = training_set()
WEIGHTS = network()
HALF = np.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: gaussian_layer_kl(0, 5, 10, 1.0), "rank"),
        (lambda: gaussian_layer_kl(6, 5, 10, 1.0), "rank"),
        (lambda: gaussian_layer_kl(3, 5, 1, 1.0), "n must"),
        (lambda: gaussian_layer_kl(3, 5, 10, 1.0, noise=0.0), "noise"),
        (lambda: gaussian_layer_kl(3, 5, 10, -1.0), "mean_norm"),
        (lambda: gaussian_layer_kl(3, 5, 10, math.nan), "mean_norm"),
        (lambda: kl_bound(-0.1), "kl"),
        (lambda: kl_bound(math.nan), "kl"),
        (lambda: kl_bound(0.1, sigma=0.0), "sigma"),
        (lambda: mean_classifier_network(X, Y, (3, 4, 1), (1, 1), generator()), "ranks"),
        (lambda: mean_classifier_network(X, Y, (7, 1), (1,), generator()), "ranks"),
        (lambda: mean_classifier_network(X, Y, (3, 2), (1,), generator()), "ranks"),
        (lambda: mean_classifier_network(X, Y, (), (), generator()), "ranks"),
        (lambda: mean_classifier_network(X, Y, (3, 1), (1, 1), generator()), "gains"),
        (lambda: mean_classifier_network(X, Y, (3, 1), (0.0,), generator()), "gains"),
        (lambda: mean_classifier_network(X, Y[:-1], (3, 1), (1,), generator()), "y must"),
        (lambda: mean_classifier_network(X, 0 * Y, (3, 1), (1,), generator()), "y must"),
        (lambda: layer_kls([], MEAN, 9), "weights"),
        (lambda: layer_kls(WEIGHTS, MEAN[:5], 9), "weights"),
        (lambda: layer_kls(WEIGHTS[:-1], MEAN, 9), "weights"),
        (lambda: layer_kls(WEIGHTS, MEAN, 1), "n must"),
        (lambda: layer_kls([torch.zeros(2, 6, dtype=F64), torch.ones(1, 2, dtype=F64)], MEAN, 9), "layer 1"),
        (lambda: layer_distances(WEIGHTS, MEAN[:5], 9), "weights"),
        (lambda: layer_distances(WEIGHTS, MEAN, 9, noise=-1.0), "noise"),
        (lambda: expected_clip_loss(torch.zeros(2), torch.tensor([1.0, 0.0])), "std"),
        (lambda: sdpi_dropout(1.2, 3), "p must"),
        (lambda: sdpi_dropout(0.2, 0), "width"),
        (lambda: sdpi_dropconnect(-0.1, 2, 2), "p must"),
        (lambda: sdpi_dropconnect(0.1, 2, 0), "width"),
        (lambda: sdpi_gaussian(0.0, 1.0, 2), "noise"),
        (lambda: sdpi_gaussian(1.0, 1.0, 0), "width"),
        (lambda: dobrushin(np.ones((2, 2))), "kernel"),
        (lambda: dobrushin(np.array([[1.5, -0.5]])), "kernel"),
        (lambda: dropout_kernel(math.nan, 2), "p must"),
        (lambda: dropconnect_kernel(np.ones(3), 0.1), "weight"),
        (lambda: dropconnect_kernel(np.ones((1, 3)), 2.0), "p must"),
        (lambda: binary_network_losses((2, 1), 0.1, CORNERS), "widths"),
        (lambda: binary_network_losses((3, 2), 0.1, CORNERS), "widths"),
        (lambda: binary_network_losses((3, 5, 1), 0.1, CORNERS), "widths"),
        (lambda: binary_network_losses((3, 2, 1), 1.1, CORNERS), "p must"),
        (lambda: gibbs_exact(HALF, np.full((2, 2), 0.3), 2, 1.0), "p_z"),
        (lambda: gibbs_exact(HALF, np.full((4,), 0.25), 2, 1.0), "p_z"),
        (lambda: gibbs_exact(3 * HALF, HALF / 2, 2, 1.0), "losses"),
        (lambda: gibbs_exact(HALF, HALF / 2, 0, 1.0), "n must"),
        (lambda: gibbs_exact(HALF, HALF / 2, 2, 0.0), "alpha"),
        (lambda: representations([torch.eye(2)], torch.eye(2), 1.0, generator()), "p_drop"),
        (lambda: representations([torch.eye(2)], torch.eye(2), 0.5), "p_drop"),
        (lambda: sliced_wasserstein(torch.ones(3, 2), torch.ones(4, 2), 5, generator()), "a and b"),
        (lambda: sliced_wasserstein(torch.ones(3, 2), torch.ones(3, 2), 0, generator()), "slices"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
