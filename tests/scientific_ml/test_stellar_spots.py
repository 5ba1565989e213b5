"""Oracles: light curves known in closed form or by quadrature, a transit code's values, and symmetries of the sky."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import nn

from companion import models
from companion.scientific_ml.stellar_spots import (
    WAVELENGTHS,
    ariel_score,
    in_spots,
    planck_contrast,
    radius,
    simulate_challenge,
    spot_dimming,
    spotted_light_curve,
    template_depths,
    time_bins,
    train_networks,
    transit_cnn,
    transit_statistics,
)

EMPTY = np.empty((0, 3))


def curve(k, b, x, u=(0.0, 0.0), spots=EMPTY, contrast=1.0, **options):
    """The light curve of one channel."""
    k, u1, u2, contrast = (np.array([value]) for value in (k, *u, contrast))
    return spotted_light_curve(k, k[0], b, u1, u2, spots, contrast, np.atleast_1d(x), **options)[0]


# --- the clean transit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "flux"), [(0.03, 0.9989298931), (0.1, 0.9881234622), (0.15, 0.9733201982)])
def test_mid_transit_is_that_of_batman(k, flux):
    """Values of batman-package 2.5.3, quadratic law."""
    assert curve(k, 0.3, 0.0, (0.4, 0.25)) == pytest.approx(flux, abs=1e-6)
    assert curve(k, 0.3, 0.0, (0.4, 0.25), n_planet=2000) == pytest.approx(flux, abs=2e-8)


def blocked(k, z, u1, u2):
    """The light that a planet at distance ``z`` covers, beyond its centre, ring by ring of the star."""

    def ring(r):
        cosine = (r**2 + z**2 - k**2) / (2 * r * z)
        mu = math.sqrt(1 - r**2)
        return (1 - u1 * (1 - mu) - u2 * (1 - mu) ** 2) * 2 * r * math.acos(min(1, max(-1, cosine))) / math.pi

    return quad(ring, z - k, min(1, z + k), epsabs=1e-12, limit=200)[0] if z - k < 1 else 0.0


@pytest.mark.parametrize("k", [0.03, 0.1, 0.15])
def test_every_phase_agrees_with_an_integral_over_rings(k):
    u1, u2, b = 0.4, 0.25, 0.3
    x = np.linspace(-1.3, 1.3, 27)
    exact = [1 - blocked(k, math.hypot(b, p), u1, u2) / (1 - u1 / 3 - u2 / 6) for p in x]
    # near the limb, where the brightness jumps, a mean over n points is off by about k² / n^(3/4)
    assert curve(k, b, x, (u1, u2)) == pytest.approx(exact, abs=2 * k**2 / 200**0.75)
    assert curve(k, b, x, (u1, u2), n_planet=5000) == pytest.approx(exact, abs=2 * k**2 / 5000**0.75)


def test_limits():
    assert curve(0.1, 0, 0.0) == pytest.approx(0.99, abs=1e-12)
    assert (curve(0.1, 0, [-1.11, 1.11, 3.0]) == 1).all()
    small = 1 - curve(0.001, 0, 0.0, (0.4, 0.25))
    assert small == pytest.approx(1e-6 / (1 - 0.4 / 3 - 0.25 / 6), rel=1e-6)


def test_the_depth_goes_with_the_area_in_each_channel():
    k, u = np.array([0.05, 0.1]), np.array([0.3, 0.3])
    deep = 1 - spotted_light_curve(k, 0.08, 0.2, u, u, EMPTY, np.ones(2), np.linspace(-1, 1, 9))
    assert deep[1] == pytest.approx(4 * deep[0], rel=1e-12)


# --- spots ------------------------------------------------------------------------------------------------------------


def test_contrast():
    assert planck_contrast([0.55, 7.8], 4500, 5500) == pytest.approx([0.345558, 0.786436], abs=1e-6)
    assert planck_contrast(1.0, 5000, 5000) == 1
    assert planck_contrast(1e6, 4000, 5000) == pytest.approx(0.8, rel=1e-4)  # Rayleigh and Jeans
    x = 14387.77 / 0.1  # Wien, where the ratio is exp(-x/T_spot + x/T_star)
    assert planck_contrast(0.1, 4000, 5000) == pytest.approx(math.exp(x / 5000 - x / 4000), rel=1e-9)


@pytest.mark.parametrize(("nx", "ny", "rho"), [(0.0, -0.6, 0.2), (0.5, 0.5, 0.3), (0.0, 0.0, 0.1), (0.9, 0.1, 0.2)])
def test_a_visible_cap_takes_its_projected_area(nx, ny, rho):
    area = math.sin(rho) ** 2 * math.sqrt(1 - nx**2 - ny**2)
    zero = np.zeros(1)
    assert spot_dimming(zero, zero, [(nx, ny, rho)], zero, n_star=40_000) == pytest.approx(area, rel=5e-3)


def test_missed_spots_deepen_the_transit():
    spots = [(0, -0.6, 0.2)]
    ratio = (1 - curve(0.1, 0.5, 0.0, spots=spots, contrast=0.0)) / (1 - curve(0.1, 0.5, 0.0))
    assert ratio == pytest.approx(1 / (1 - 0.8 * math.sin(0.2) ** 2), abs=3e-4)
    x, u = np.linspace(-0.9, 0.9, 21), (0.4, 0.25)
    epsilon = spot_dimming(np.array([0.4]), np.array([0.25]), spots, np.array([0.5]))
    ratio = (1 - curve(0.1, 0.5, x, u, spots, 0.5)) / (1 - curve(0.1, 0.5, x, u))
    assert ratio == pytest.approx(np.full(21, 1 / (1 - epsilon)), rel=1e-9)


def test_a_planet_inside_a_spot_blocks_the_light_of_the_spot():
    depth = 1 - curve(0.05, 0.0, 0.0, spots=[(0, 0, 0.3)], contrast=0.4)
    assert depth == pytest.approx(0.05**2 * 0.4 / (1 - 0.6 * math.sin(0.3) ** 2), rel=1e-3)


def test_spots_narrow_towards_the_limb():
    n, rho = math.sin(1.2), 0.2  # the cap's rim runs from 1.0 to 1.4 rad along x, and sin(rho) to both sides
    x = np.array([math.sin(1.0) + 0.002, math.sin(1.0) - 0.002, math.sin(1.4) - 0.002, n])
    assert in_spots(x, np.zeros(4), [(n, 0, rho)]).tolist() == [True, False, True, True]
    middle = math.cos(rho) * n
    y = math.sin(rho) * np.array([0.99, 1.01])
    assert in_spots(np.full(2, middle), y, [(n, 0, rho)]).tolist() == [True, False]


@settings(deadline=None, max_examples=20)
@given(
    nx=st.floats(-0.6, 0.6),
    ny=st.floats(-0.6, 0.6),
    rho=st.floats(0.05, 0.4),
    b=st.floats(0, 0.7),
    contrast=st.floats(0, 1),
)
def test_the_mirrored_sky_gives_the_mirrored_curve(nx, ny, rho, b, contrast):
    x = np.linspace(-1.2, 1.2, 15)
    one = curve(0.1, b, x, (0.4, 0.2), [(nx, ny, rho)], contrast, n_planet=2000)
    other = curve(0.1, b, -x, (0.4, 0.2), [(-nx, ny, rho)], contrast, n_planet=2000)
    assert one == pytest.approx(other, abs=1e-4)
    upside_down = curve(0.1, -b, x, (0.4, 0.2), [(nx, -ny, rho)], contrast, n_planet=2000)
    assert one == pytest.approx(upside_down, abs=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_spots_as_bright_as_the_star_do_nothing_and_order_is_nothing(seed):
    rng = np.random.default_rng(seed)
    spots = np.column_stack([rng.uniform(-0.6, 0.6, (4, 2)), rng.uniform(0.05, 0.4, 4)])
    x = np.linspace(-1.2, 1.2, 9)
    assert curve(0.1, 0.2, x, (0.4, 0.2), spots, 1.0) == pytest.approx(curve(0.1, 0.2, x, (0.4, 0.2)), abs=1e-12)
    dark = curve(0.1, 0.2, x, (0.4, 0.2), spots, 0.3)
    twice = np.concatenate([spots[::-1], spots])  # overlaps are no darker
    assert dark == pytest.approx(curve(0.1, 0.2, x, (0.4, 0.2), twice, 0.3), abs=1e-12)


# --- the challenge ----------------------------------------------------------------------------------------------------


def test_pairs_differ_in_spots_only():
    noisy, k, weights, planets = simulate_challenge(5, 3, 7)
    clean, k2, weights2, planets2 = simulate_challenge(5, 3, 7, spotted=False)
    quiet, *_ = simulate_challenge(5, 3, 7, noise=False)
    neither, *_ = simulate_challenge(5, 3, 7, spotted=False, noise=False)
    assert np.array_equal(k, k2)
    assert np.array_equal(weights, weights2)
    assert np.array_equal(planets.contrast, planets2.contrast)
    assert np.array_equal(planets.x, planets2.x)
    assert noisy - quiet == pytest.approx(clean - neither, abs=3e-7)  # the same noise, in float32
    assert not np.array_equal(quiet, neither)
    assert (neither.reshape(5, 3, -1) == neither.reshape(5, 3, -1)[:, :1]).all()  # instances share the planet
    assert not np.array_equal(quiet[0], quiet[1])


def test_spots_are_independent_of_the_planet():
    _, _, _, planets = simulate_challenge(400, 1, 4, n_steps=1)
    x = 14387.77 / WAVELENGTHS[0]
    t_spot = x / np.log1p(np.expm1(x / planets.t_star) / planets.contrast[:, 0])
    cooling = 1 - t_spot / planets.t_star
    assert cooling.min() > 500 / 5500
    assert cooling.max() < 1500 / 5500
    assert abs(np.corrcoef(cooling, planets.t_star)[0, 1]) < 5 / 400**0.5
    assert abs(np.corrcoef(cooling, planets.b)[0, 1]) < 5 / 400**0.5


def test_ranges_and_noise_of_the_challenge():
    curves, k, weights, planets = simulate_challenge(60, 2, 3)
    quiet, *_ = simulate_challenge(60, 2, 3, noise=False)
    assert curves.shape == (120, 55, 100)
    assert curves.dtype == np.float32
    assert planets.number.tolist() == np.repeat(range(60), 2).tolist()
    assert ((k > 0.02) & (k < 0.18)).all()
    scaled = (curves - quiet) * np.sqrt(weights)[..., None]
    assert scaled.mean() == pytest.approx(0, abs=5e-3)
    assert scaled.std() == pytest.approx(1, abs=5e-3)
    assert abs((scaled[:, 1:] * scaled[:, :-1]).mean()) < 5e-3  # independent between channels
    sigma = weights**-0.5
    assert sigma.min() > 10**-3.9 - 1e-9
    assert sigma[:, np.abs(np.log(WAVELENGTHS / 2)).argmin()].max() < 10**-3.1 * 1.01
    counts = [len(spots) for spots in planets.spots]
    assert min(counts) >= 1
    assert np.mean(counts) == pytest.approx(5, abs=5 * 2 / 120**0.5)  # 1 + Poisson(4), five standard errors
    spots = np.concatenate(planets.spots)
    assert (np.hypot(spots[:, 0], spots[:, 1]) < math.sqrt(1 - 0.15**2) + 1e-9).all()
    assert ((spots[:, 2] > 0.08) & (spots[:, 2] < 0.35)).all()
    coolest = planck_contrast(WAVELENGTHS, planets.t_star[0] * (1 - 1500 / 5500), planets.t_star[0])
    assert (planets.contrast[0] > coolest).all()
    row = 5
    again = spotted_light_curve(
        k[row], 0.1, planets.b[row], planets.u1[row], planets.u2[row], planets.spots[row], planets.contrast[row], [0.0]
    )
    middle = (1 - quiet[row, :, 49:51].mean(-1)) / (1 - again[:, 0])
    assert middle == pytest.approx(np.ones(55), rel=0.3)  # another white radius, the same star


def test_score():
    k = np.full((3, 55), 0.1)
    assert ariel_score(k, k, np.ones_like(k)) == 10_000
    assert ariel_score(k, k + 1e-4, np.ones_like(k)) == pytest.approx(9980, abs=1e-9)
    assert ariel_score(k, k - 1e-4, 5 * np.ones_like(k)) == pytest.approx(9980, abs=1e-9)
    two = ariel_score(np.array([0.1, 0.05]), np.array([0.101, 0.05]), np.array([1.0, 3.0]))
    assert two == pytest.approx(1e4 - 2e6 * 0.1 * 1e-3 / 4)
    depth_error = 1e6 * np.abs(0.1001**2 - 0.1**2)  # in ppm, to first order the loss of points
    assert 1e4 - ariel_score(k, k + 1e-4, np.ones_like(k)) == pytest.approx(depth_error, rel=1e-3)


def test_template_finds_clean_radii_and_errs_by_the_theory_on_missed_spots():
    clean, k, _, planets = simulate_challenge(8, 1, 5, spotted=False, noise=False)
    assert template_depths(clean, planets) == pytest.approx(k, rel=2e-4)
    noisy, _, weights, _ = simulate_challenge(8, 1, 5, spotted=False)
    expected = 1 / (2 * k * np.sqrt(40 * weights))  # error of a mean over the time steps in transit, 40 or more
    assert (np.abs(template_depths(noisy, planets) - k) / expected).max() < 5
    epsilon = 0.04
    deeper = 1 - (1 - clean) / (1 - epsilon)
    assert template_depths(deeper, planets) == pytest.approx(k * (1 - epsilon) ** -0.5, rel=1e-3)


def test_template_is_least_squares():
    curves, _, _, planets = simulate_challenge(1, 1, 2)
    k = template_depths(curves, planets)[0]
    one = np.full(55, k.mean())
    geometry = planets.b[0], planets.u1[0], planets.u2[0], EMPTY, np.ones(55), planets.x[0]
    shape = (1 - spotted_light_curve(one, one[0], *geometry)) / one[0] ** 2
    fit = [np.linalg.lstsq(shape[w, :, None], 1 - curves[0, w], rcond=None)[0][0] for w in range(55)]
    assert k == pytest.approx(np.sqrt(fit), rel=1e-3)  # but for one more pass of the shape


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_of_a_box():
    """A box-shaped transit of a uniform star: every radius is k, the colour is the difference of depths."""
    k = np.linspace(0.05, 0.1, 55)
    curves = np.broadcast_to((1 - k**2)[:, None], (55, 100))[None].astype(np.float64)
    found = transit_statistics(curves)
    assert found.shape == (1, 55 * 6 + 50)
    assert found[0, :330].reshape(55, 6) == pytest.approx(np.repeat(k[:, None], 6, 1))
    assert found[0, 330:355] == pytest.approx(np.full(25, math.sqrt((k**2).mean())))
    assert found[0, 355:] == pytest.approx(np.full(25, (k[-18:] ** 2).mean() - (k[:18] ** 2).mean()))


def test_order_statistics_are_those_of_the_middle():
    rng = np.random.default_rng(0)
    curves = 1 - rng.uniform(0.001, 0.02, (2, 3, 100))
    found = transit_statistics(curves)[:, :18].reshape(2, 3, 6)
    expected = np.sort(curves[..., 35:65])[..., :5].mean(-1)
    assert found[..., 0] == pytest.approx(np.sqrt(1 - expected))
    assert (np.diff(found) < 0).all()  # the deepest first
    shuffled = curves.copy()
    shuffled[..., 35:65] = rng.permutation(curves[..., 35:65], axis=-1)
    shuffled[..., :35] = 1
    assert transit_statistics(shuffled)[:, :18] == pytest.approx(found.reshape(2, 18))


def test_a_radius_of_noise_is_no_nan():
    assert radius(np.array([0.99, 1.0, 1.01])) == pytest.approx([0.1, 1e-4, 1e-4])


def test_time_bins():
    curves = np.arange(12.0).reshape(1, 2, 6)
    assert time_bins(curves, 3).tolist() == [[[0.5, 2.5, 4.5], [6.5, 8.5, 10.5]]]
    assert np.array_equal(time_bins(curves, 6), curves)


# --- networks ---------------------------------------------------------------------------------------------------------


def test_networks_side_by_side_train_as_alone():
    g = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, 40, 3, 4, generator=g), torch.randn(2, 40, 3, generator=g)

    def member(seed):
        return nn.Sequential(nn.Flatten(), models.mlp([12, 5, 3], generator=torch.Generator().manual_seed(seed)))

    def trained(members):
        options = dict(epochs=5, batch_size=8, lr=1e-2, generator=torch.Generator().manual_seed(1))
        return train_networks([member(m) for m in members], inputs[members], targets[members], **options)

    pair, single = trained([0, 1]), trained([1])
    with torch.no_grad():
        both = pair.each(inputs)
        torch.testing.assert_close(both[1], single.each(inputs[[1]])[0], rtol=1e-4, atol=1e-5)
        before = torch.stack([member(m)(inputs[m]) for m in (0, 1)])
    assert (both - targets).square().mean() < 0.98 * (before - targets).square().mean()


def test_training_solves_a_linear_regression():
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 64, 4, generator=g)
    targets = inputs @ torch.randn(4, 2, generator=g)
    line = models.mlp([4, 2], generator=g)
    fitted = train_networks([line], inputs, targets, epochs=150, batch_size=16, lr=0.05, generator=g)
    with torch.no_grad():
        assert (fitted.each(inputs) - targets).abs().max() < 1e-2


@pytest.mark.parametrize("steps", [20, 30, 300])
def test_cnn_takes_any_number_of_steps(steps):
    g = torch.Generator().manual_seed(0)
    network = transit_cnn(5, 7, g)
    x = torch.randn(3, 5, steps, generator=g)
    assert network(x).shape == (3, 5)
    assert sum(p.numel() for p in network.parameters()) == (5 * 5 + 1) * 7 + (7 * 5 + 1) * 7 + (35 + 1) * 5


# --- what a reader can get wrong --------------------------------------------------------------------------------------

TWO, X = np.full(2, 0.1), np.array([0.0])
CURVES, K, WEIGHTS, PLANETS = simulate_challenge(2, 1, 0)
HOLE = np.where(np.arange(100) == 3, np.nan, CURVES)
G = torch.Generator()
NETWORK = models.mlp([4, 2], generator=G)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: planck_contrast([0.0], 4000, 5000), "wavelength_um"),
        (lambda: planck_contrast([1.0], 0, 5000), "t_spot"),
        (lambda: in_spots(X, X, [(0.8, 0.7, 0.1)]), "spots"),
        (lambda: in_spots(X, X, [(0.8, 0.0, 2.0)]), "angular radii"),
        (lambda: spot_dimming(TWO, TWO, [(1.0, 0.0, 0.1)], TWO), "spots"),
        (lambda: spotted_light_curve(TWO, 0.1, 0.0, TWO[:1], TWO, EMPTY, TWO, X), "channels"),
        (lambda: spotted_light_curve(TWO, 0.1, 0.0, TWO, TWO, EMPTY, np.ones(3), X), "channels"),
        (lambda: spotted_light_curve(-TWO, 0.1, 0.0, TWO, TWO, EMPTY, TWO, X), "k and"),
        (lambda: spotted_light_curve(TWO, 1.5, 0.0, TWO, TWO, EMPTY, TWO, X), "k_white"),
        (lambda: spotted_light_curve(TWO, 0.1, 0.0, TWO, TWO, [(0.0, 1.0, 0.1)], TWO, X), "spots"),
        (lambda: simulate_challenge(0, 1, 0), "n_planets"),
        (lambda: simulate_challenge(1, 0, 0), "n_instances"),
        (lambda: ariel_score(K, K[:1], WEIGHTS), "one shape"),
        (lambda: ariel_score(K, K, 0 * WEIGHTS), "weights"),
        (lambda: ariel_score(K, K, -WEIGHTS), "weights"),
        (lambda: ariel_score(K, K * np.nan, WEIGHTS), "k_hat"),
        (lambda: template_depths(CURVES[:1], PLANETS), "planets"),
        (lambda: template_depths(HOLE, PLANETS), "curves"),
        (lambda: transit_statistics(HOLE), "curves"),
        (lambda: transit_statistics(CURVES[0]), "curves"),
        (lambda: transit_statistics(CURVES[:, :2]), "channels"),
        (lambda: transit_statistics(CURVES[..., :25]), "curves"),
        (lambda: time_bins(CURVES, 7), "bins"),
        (lambda: time_bins(CURVES, 0), "bins"),
        (lambda: transit_cnn(0, 3, G), "channels"),
        (
            lambda: train_networks(
                [NETWORK], torch.ones(2, 4, 4), torch.ones(2, 4, 2), epochs=1, batch_size=2, lr=0.1, generator=G
            ),
            "networks",
        ),
        (
            lambda: train_networks(
                [NETWORK], torch.ones(1, 4, 4), torch.ones(1, 3, 2), epochs=1, batch_size=2, lr=0.1, generator=G
            ),
            "inputs",
        ),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
