"""Oracles: scikit-learn's Gaussian process, values by hand, exact moments, and the physics of a wing section."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import block_diag
from scipy.optimize import brentq, minimize
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from companion.scientific_ml.multifidelity_surrogates import (
    CoKriging,
    Kriging,
    MultiFidelityNet,
    _drag,
    _outline,
    _panel_flow,
    adaptive_design,
    airfoil,
    benchmark,
    propagate,
    sampler,
)

LINE = np.linspace(0, 1, 101)[:, None]
THREE = np.array([[0.0], [0.5], [1.0]])
CHEAP = np.linspace(0, 1, 11)[:, None]
FEW = CHEAP[[0, 4, 6, 10]]
LOW, HIGH = benchmark("linear", 1)


def rng(seed=0):
    return np.random.default_rng(seed)


# --- kriging ----------------------------------------------------------------------------------------------------------


def test_kriging_has_the_values_found_by_hand():
    model = Kriging(0, bounds=(math.log10(4), math.log10(4))).fit(THREE, [0, 1, 0])
    assert model.theta == pytest.approx([4])
    assert model.beta == pytest.approx([0.18267206], abs=1e-8)
    assert model.sigma2 == pytest.approx(0.43099792, abs=1e-8)
    mean, variance = model.predict([[0.25], [0.5]])
    assert mean == pytest.approx([0.61802407, 1], abs=1e-8)
    assert variance == pytest.approx([0.04212627, 0], abs=1e-8)


@pytest.mark.parametrize(("isotropic", "nugget"), [(False, 1e-6), (True, 1e-3)])
def test_kriging_agrees_with_scikit_learn(isotropic, nugget):
    X, x = rng().random((25, 3)), rng(1).random((40, 3))
    y = np.sin(5 * X[:, 0]) + X[:, 1] * X[:, 2]
    model = Kriging(nugget, isotropic, (-1, 1)).fit(X, y)
    kernel = ConstantKernel(model.sigma2) * RBF(1 / np.sqrt(2 * np.broadcast_to(model.theta, 3)))
    peer = GaussianProcessRegressor(kernel, alpha=nugget * model.sigma2, optimizer=None).fit(X, y - model.beta[0])
    theirs, std = peer.predict(x, return_std=True)
    mean, variance = model.predict(x)
    np.testing.assert_allclose(mean, theirs + model.beta[0], atol=1e-8)
    np.testing.assert_allclose(variance, std**2, atol=1e-8)


def test_the_concentrated_likelihood_is_the_largest_over_beta_and_sigma():
    X, y = rng().random((8, 2)), rng(1).random(8)
    model = Kriging(1e-4, bounds=(0.3, 0.3)).fit(X, y)
    R = np.exp(-(10**0.3) * np.square(X[:, None] - X).sum(-1)) + 1e-4 * np.eye(8)

    def full(beta_and_log_variance):
        beta, log_variance = beta_and_log_variance
        quadratic = (y - beta) @ np.linalg.solve(R, y - beta) / math.exp(log_variance)
        return 0.5 * (8 * log_variance + np.linalg.slogdet(R)[1] + quadratic)

    best = minimize(full, [0.5, 0.0], method="Nelder-Mead", options=dict(xatol=1e-9, fatol=1e-12))
    assert model.negative_log_likelihood([0.3, 0.3]) == pytest.approx(best.fun - 4, abs=1e-8)
    assert [model.beta[0], math.log(model.sigma2)] == pytest.approx(best.x, abs=1e-6)


def test_theta_has_the_largest_likelihood_of_a_grid():
    X = np.linspace(0, 1, 9)[:, None]
    model = Kriging().fit(X, np.sin(6 * X[:, 0]))
    best = model.negative_log_likelihood(np.log10(model.theta))
    assert best <= min(model.negative_log_likelihood([power]) for power in np.linspace(-2, 3, 101)) + 1e-6


def test_the_scan_finds_the_higher_of_two_maxima():
    """From the middle of the interval, as from its lower half, a search ends at a theta that explains nothing."""
    X = np.linspace(0, 1, 20)[:, None]
    model = Kriging().fit(X, benchmark("nonlinear", 1)[1](X))
    found = model.negative_log_likelihood(np.log10(model.theta))
    values = [model.negative_log_likelihood([power]) for power in np.linspace(-2, 3, 201)]
    assert found <= min(values) + 1e-6 < values[0] - 10


@given(seed=st.integers(0, 1000), shift=st.floats(-5, 5), scale=st.floats(0.2, 5))
def test_kriging_turns_with_the_units_of_the_output(seed, shift, scale):
    X, y = rng(seed).random((7, 2)), rng(seed + 1).random(7)
    one, other = (Kriging(1e-6, bounds=(0.5, 0.5)).fit(X, values) for values in (y, shift + scale * y))
    (mean, variance), (mean2, variance2) = one.predict(X + 0.1), other.predict(X + 0.1)
    np.testing.assert_allclose(mean2, shift + scale * mean, atol=1e-8)
    np.testing.assert_allclose(variance2, scale**2 * variance, rtol=1e-6, atol=1e-10)


def test_kriging_goes_through_its_points_and_leaves_inputs_alone():
    X, y = rng().random((6, 2)), rng(1).random(6)
    before = X.copy(), y.copy()
    mean, variance = Kriging(1e-10, bounds=(0.5, 0.5)).fit(X, y).predict(X)
    np.testing.assert_allclose(mean, y, atol=1e-7)
    assert variance.max() < 1e-7
    assert np.array_equal(X, before[0])
    assert np.array_equal(y, before[1])


# --- co-kriging -------------------------------------------------------------------------------------------------------


def test_cokriging_finds_an_affine_relation():
    model = CoKriging().fit(CHEAP, LOW(CHEAP), FEW, 3 * LOW(FEW) + 2)
    assert model.rho == pytest.approx(3, abs=1e-4)
    assert model.high.beta[1] == pytest.approx(2, abs=1e-4)
    low, _ = model.low.predict(LINE)
    np.testing.assert_allclose(model.predict(LINE)[0], 3 * low + 2, atol=1e-4)


def test_cokriging_of_forrester_s_pair_finds_two():
    model = CoKriging().fit(CHEAP, LOW(CHEAP), FEW, HIGH(FEW))
    assert model.rho == pytest.approx(2, abs=0.05)
    assert np.sqrt(np.mean((model.predict(LINE)[0] - HIGH(LINE)) ** 2)) < 0.03 * HIGH(LINE).std()


def test_cokriging_is_the_joint_gaussian_process():
    """Kennedy and O'Hagan's covariance of all runs at once, with the parameters that the recursion found."""
    model = CoKriging(1e-10, bounds=(1.7, 1.7)).fit(CHEAP, LOW(CHEAP), FEW, HIGH(FEW))

    def k(a, b):
        return np.exp(-(10**1.7) * (a - b.T) ** 2)

    rho, low, delta = model.rho, model.low.sigma2, model.high.sigma2
    corner = rho * low * k(CHEAP, FEW)
    covariance = np.block(
        [[low * k(CHEAP, CHEAP), corner], [corner.T, rho**2 * low * k(FEW, FEW) + delta * k(FEW, FEW)]]
    ) + 1e-10 * block_diag(low * np.eye(11), delta * np.eye(4))
    trend = model.low.beta[0], rho * model.low.beta[0] + model.high.beta[1]
    y = np.concatenate([LOW(CHEAP) - trend[0], HIGH(FEW) - trend[1]])
    x = np.array([[0.13], [0.55], [0.87]])
    cross = np.hstack([rho * low * k(x, CHEAP), (rho**2 * low + delta) * k(x, FEW)])
    mean, variance = model.predict(x)
    np.testing.assert_allclose(mean, trend[1] + cross @ np.linalg.solve(covariance, y), atol=1e-5)
    expected = rho**2 * low + delta - np.einsum("ij,ji->i", cross, np.linalg.solve(covariance, cross.T))
    np.testing.assert_allclose(variance, expected, rtol=1e-4)


def test_a_second_high_fidelity_model_needs_no_new_low_fidelity_fit():
    model = CoKriging().fit(CHEAP, LOW(CHEAP), FEW, HIGH(FEW)).fit_high(FEW, -HIGH(FEW))
    fresh = CoKriging().fit(CHEAP, LOW(CHEAP), FEW, -HIGH(FEW))
    np.testing.assert_allclose(model.predict(LINE), fresh.predict(LINE), atol=1e-10)


def test_adaptive_design_runs_where_the_model_is_least_certain():
    candidates = np.linspace(0, 1, 21)[:, None]
    X0, calls = np.array([[0.0], [0.3]]), []

    def high(x):
        calls.append(x)
        return x[:, 0] ** 2

    def factory(X, y):
        return Kriging(1e-6, bounds=(0.5, 0.5)).fit(X, y)

    X, y, history = adaptive_design(factory, high, X0, candidates, 3)
    assert X.shape == (5, 1)
    assert len(history) == 4
    np.testing.assert_allclose(y, X[:, 0] ** 2)
    assert X[2, 0] == 1.0  # the far end
    assert len(np.unique(X)) == 5
    assert [len(x) for x in calls] == [2, 1, 1, 1]
    for k, model in enumerate(history[:3]):
        variance = model.predict(candidates)[1]
        assert variance[np.isclose(candidates[:, 0], X[2 + k, 0])] == pytest.approx(variance.max())


# --- the network ------------------------------------------------------------------------------------------------------


def test_the_network_fuses_both_pairs_in_one_dimension():
    for pair, n_low, FEW_ in (("linear", 21, FEW), ("nonlinear", 51, np.linspace(0, 1, 20)[:, None])):
        low, high = benchmark(pair, 1)
        X = np.unique(np.concatenate([np.linspace(0, 1, n_low)[:, None], FEW_]), axis=0)
        net = MultiFidelityNet(1, [20] * 3, [10] * 2).fit(X, low(X), FEW_, high(FEW_), 0, low(FEW_))
        for predict, truth in ((net.predict_low, low), (net.predict, high)):
            error = np.sqrt(np.mean((predict(LINE) - truth(LINE)) ** 2)) / truth(LINE).std()
            assert error < (0.03 if pair == "linear" else 0.2)


def small_net(**options):
    return MultiFidelityNet(3, [8], [4], steps=20, **options)


RUNS = rng().random((40, 3))
OUTPUT = RUNS.sum(1)


@pytest.mark.parametrize("batch", [None, 10])
def test_a_seed_fixes_the_network_and_nothing_global_moves(batch):
    state = torch.get_rng_state()
    x = rng(1).random((5, 3))
    one, other, third = (
        small_net(batch=batch).fit(RUNS, OUTPUT, RUNS[:9], OUTPUT[:9] ** 2, seed).predict(x) for seed in (0, 0, 1)
    )
    assert np.array_equal(one, other)
    assert not np.array_equal(one, third)
    assert torch.equal(state, torch.get_rng_state())


def test_a_linear_relation_needs_no_nonlinear_map():
    """With heavy penalties only F_lin is left, which is least squares on (1, x, y_L)."""
    zH, yH = np.sin(3 * RUNS[:12, 0]), rng(5).random(12)
    net = small_net(penalty=1e6, x_penalty=1e6).fit(RUNS, np.sin(3 * RUNS[:, 0]), RUNS[:12], yH, 0, zH)
    columns = np.column_stack([np.ones(12), RUNS[:12], zH])
    weights = np.linalg.lstsq(columns, yH)[0]
    x = rng(2).random((6, 3))
    expected = np.column_stack([np.ones(6), x, net.predict_low(x)]) @ weights
    np.testing.assert_allclose(net.predict(x), expected, atol=1e-3)


def test_the_penalty_on_x_blinds_the_nonlinear_map_to_x():
    yH = np.sin(3 * OUTPUT[:12])
    seen = [
        small_net(penalty=0, x_penalty=value).fit(RUNS, OUTPUT, RUNS[:12], yH, 0, OUTPUT[:12]).nonlinear[0].weight
        for value in (0, 100)
    ]
    free, blind = (float(weight[:, :3].detach().abs().max()) for weight in seen)
    assert blind < 1e-3 < free


def test_the_second_stage_ends_where_its_loss_is_stationary():
    """Mean square of the standardised error, all weights of the nonlinear map, and once more those on x."""
    zH, yH = OUTPUT[:12], np.sin(3 * OUTPUT[:12])
    net = small_net(penalty=0.01, x_penalty=0.05, high_steps=3000).fit(RUNS, OUTPUT, RUNS[:12], yH, 0, zH)
    first, last = net.nonlinear[0], net.nonlinear[-1]
    X = np.column_stack([(RUNS[:12] - RUNS.mean(0)) / RUNS.std(0), (zH - OUTPUT.mean()) / OUTPUT.std()])
    inputs, y = torch.from_numpy(X), torch.from_numpy((yH - yH.mean()) / yH.std())
    output = net.linear(inputs) + torch.tanh(inputs @ first.weight.T + first.bias) @ last.weight.T + last.bias
    squares = first.weight.square().sum() + last.weight.square().sum()
    loss = (output[:, 0] - y).square().mean() + 0.01 * squares + 0.05 * first.weight[:, :3].square().sum()
    assert last.weight.abs().max() > 0.1
    weights = [first.weight, first.bias, last.weight, last.bias, *net.linear.parameters()]
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, weights)) < 1e-4


def test_without_low_fidelity_runs_the_network_s_own_guess_is_used():
    net = small_net().fit_low(RUNS, OUTPUT, 0)
    x, guess = rng(1).random((5, 3)), net.predict_low(RUNS[:9])
    implicit = net.fit_high(RUNS[:9], OUTPUT[:9] ** 2, 0).predict(x)
    assert np.array_equal(implicit, net.fit_high(RUNS[:9], OUTPUT[:9] ** 2, 0, guess).predict(x))
    assert not np.array_equal(implicit, net.fit_high(RUNS[:9], OUTPUT[:9] ** 2, 0, OUTPUT[:9]).predict(x))


# --- inputs and outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d", "box", "high", "low"),
    [(32, (0.5, 2), 311.8, 180.065), (100, (1, 2), 1300.5333, 901.32667), (20, (0, 1), 9.2, -44.54)],
)
def test_benchmarks_have_the_exact_means(d, box, high, low):
    for function, mean in zip(benchmark("linear", d), (low, high), strict=True):
        moments, samples = propagate(function, sampler("uniform", box, d, rng()), 20_000)
        assert abs(moments.mean - mean) < 4 * moments.std / 20_000**0.5
        assert moments.std == pytest.approx(samples.std(), rel=1e-3)


def test_benchmarks_have_the_values_of_their_formulas():
    x = rng().random((4, 1))
    low, high = benchmark("linear", 1)
    np.testing.assert_allclose(high(x), [(6 * t - 2) ** 2 * math.sin(12 * t - 4) for t in x[:, 0]])
    np.testing.assert_allclose(low(x), 0.5 * high(x) + 10 * (x[:, 0] - 0.5) - 5)
    low, high = benchmark("nonlinear", 1)
    np.testing.assert_allclose(high(x), [(t - 2**0.5) * math.sin(8 * math.pi * t) ** 2 for t in x[:, 0]])
    x = np.array([[1.0, 2.0, 0.5]])
    low, high = benchmark("linear", 3)
    assert high(x) == pytest.approx([0 + 49 + 2.25])
    assert low(x) == pytest.approx([0.8 * 51.25 - 0.4 * 3 - 50])
    assert benchmark("nonlinear", 3, mean=1.0, std=2.0)[1](x) == pytest.approx([3.5 / 3 * ((low(x)[0] - 1) / 2) ** 2])


def test_the_nonlinear_pair_has_no_linear_correlation():
    X = sampler("uniform", (0.5, 2), 32, rng())(20_000)
    low, _ = benchmark("nonlinear", 32)
    high = benchmark("nonlinear", 32, low(X).mean(), low(X).std())[1]
    assert abs(np.corrcoef(low(X), high(X))[0, 1]) < 0.3


def test_moments_are_those_of_known_distributions():
    generator = rng()
    moments, _ = propagate(lambda x: x[:, 0], lambda n: generator.exponential(2, (n, 1)), 200_000)
    assert moments == pytest.approx((2, 2, 2), rel=0.03)


def test_samplers_stay_in_the_box():
    uniform, gaussian = (sampler(name, (1, 4), 2, rng())(50_000) for name in ("uniform", "gaussian"))
    for x, std in ((uniform, 3 / 12**0.5), (gaussian, 0.5)):
        assert x.shape == (50_000, 2)
        assert x.min() >= 1
        assert x.max() <= 4
        assert x.mean() == pytest.approx(2.5, abs=0.01)
        assert x.std() == pytest.approx(std, rel=0.02)


# --- the wing section -------------------------------------------------------------------------------------------------


def test_lift_has_the_known_values_and_converges():
    assert airfoil(5, 0.12, 100, camber=0)[0] == pytest.approx(0.598503, abs=1e-6)
    lifts = [airfoil(4, 0.12, n)[0] for n in (20, 40, 80, 160, 320)]
    assert lifts == pytest.approx([0.7097, 0.7264, 0.7343, 0.7381, 0.7399], abs=1e-4)


@given(alpha=st.floats(0.1, 8), thickness=st.sampled_from([0.08, 0.12, 0.18]))
def test_a_symmetric_section_is_symmetric(alpha, thickness):
    up, down = airfoil(alpha, thickness, 60, camber=0), airfoil(-alpha, thickness, 60, camber=0)
    assert up[0] == pytest.approx(-down[0], abs=1e-10)
    assert up[1] == pytest.approx(down[1], abs=1e-8)


def test_thin_section_theory():
    """The lift slope of a section without thickness is 2π per radian."""
    slope = (airfoil(3, 0.01, 200)[0] - airfoil(1, 0.01, 200)[0]) / math.radians(2)
    assert slope == pytest.approx(2 * math.pi, rel=0.02)


def test_circulation_and_pressure_agree_and_there_is_no_pressure_drag():
    """Kutta-Joukowski's theorem and d'Alembert's paradox, by integrating the pressure over the panels."""
    X, Y = _outline(0.12, 160, 0.0, 0.4)
    alpha = math.radians(5)
    pressure = 1 - (_panel_flow(0.12, 160, 0.0, 0.4)[2] @ [math.cos(alpha), math.sin(alpha)]) ** 2
    fx, fy = np.sum(pressure * np.diff(Y)), -np.sum(pressure * np.diff(X))
    lift, drag = fy * math.cos(alpha) - fx * math.sin(alpha), fy * math.sin(alpha) + fx * math.cos(alpha)
    assert lift == pytest.approx(airfoil(5, 0.12, 160, camber=0)[0], rel=0.003)
    assert abs(drag) < 0.005


def test_a_thin_plate_has_the_friction_of_the_flat_plate():
    assert airfoil(0, 0.01, 160, camber=0, tripped=True)[1] == pytest.approx(2 * 0.074 * 1e6**-0.2, rel=0.02)


def side(speed, nu, tripped=False, n=2000):
    """Drag of one side of a plate from s = 0 to 1 with a given speed along it."""
    S = np.full(n, 1 / n)
    s = np.cumsum(S) - S / 2
    return _drag(s, S, speed(s), nu, tripped)


def from_thickness(theta, U):
    return 2 * theta * U**3.2


@pytest.mark.parametrize("nu", [1e-4, 1e-5])
def test_the_laminar_layer_has_thwaites_closed_forms(nu):
    s = 0.985
    plate = math.sqrt(0.45 * nu * s)  # 0.671 s / sqrt(Re_s); Blasius has 0.664
    assert side(np.ones_like, nu) == pytest.approx(from_thickness(plate, 1), rel=1e-3)
    stagnation = math.sqrt(0.075 * nu)  # U = s: the same thickness everywhere, in the first panels too
    assert side(lambda s: s, nu) == pytest.approx(from_thickness(stagnation, s), rel=1e-3)


def test_the_first_panel_has_the_thickness_of_the_stagnation_point():
    """Hiemenz flow, U = s: Thwaites has theta^2 = 0.075 nu / U' at the first midpoint, too, with no panel before it."""
    S = np.full(10, 0.1)
    s = np.cumsum(S) - S / 2
    drag = _drag(np.linspace(0.985, 1, 10), S, s, 1e-4, tripped=False)  # the wake starts from the first midpoint
    assert drag == pytest.approx(from_thickness(math.sqrt(0.075e-4), s[0]), rel=1e-12)


def test_the_turbulent_layer_has_buri_s_closed_form():
    nu, s = 1e-6, 0.985
    theta = (0.016 * s / 5) ** 0.8 * (nu / s) ** 0.2  # U = s, where the start is forgotten
    assert side(lambda s: s, nu, tripped=True) == pytest.approx(from_thickness(theta, s), rel=1e-3)


def test_transition_follows_michel_on_a_plate():
    """The Reynolds number at which 0.671 sqrt(Re) meets Michel's line."""
    critical = brentq(lambda Re: 0.45**0.5 * Re**0.5 - 1.174 * (1 + 22400 / Re) * Re**0.46, 1e5, 1e8)
    laminar, turbulent = (
        side(np.ones_like, 1 / (factor * critical)) / from_thickness(math.sqrt(0.45 * 0.985 / (factor * critical)), 1)
        for factor in (0.99, 2)
    )
    assert laminar == pytest.approx(1, rel=1e-3)
    assert turbulent > 1.5


def test_separation_has_howarth_s_place():
    """Thwaites' layer under the speed 1 - b s separates at b s = 1 - 2.2^(-1/6) = 0.123; from there it is turbulent."""
    nu = 1e-5

    def over_laminar(b):
        U = 1 - b * 0.985
        theta = math.sqrt(0.45 * nu / (6 * b) * (U**-6 - 1))
        return side(lambda s: 1 - b * s, nu) / from_thickness(theta, U)

    assert over_laminar(0.120) == pytest.approx(1, rel=1e-3)
    assert over_laminar(0.135) > 1.02


def test_an_early_transition_costs_drag():
    assert airfoil(2, 0.12, 160, tripped=True)[1] > 1.2 * airfoil(2, 0.12, 160)[1]


# --- what a reader can get wrong --------------------------------------------------------------------------------------

NAN = np.full(4, np.nan)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Kriging(nugget=-1), "nugget"),
        (lambda: Kriging(bounds=(1, 0)), "bounds"),
        (lambda: Kriging().fit(THREE, [0, 1]), "X, y"),
        (lambda: Kriging().fit(THREE[:1], [0]), "n >= 2"),
        (lambda: Kriging().fit(THREE[:, 0], [0, 1, 0]), "X, y"),
        (lambda: Kriging().fit(THREE, [0, np.nan, 0]), "NaN"),
        (lambda: Kriging().fit(THREE, [0, 1, 0], np.ones((2, 1))), "F must"),
        (lambda: Kriging(bounds=(0, 0)).fit(THREE, [0, 1, 0]).predict([[0, 1]]), "x must"),
        (lambda: CoKriging().fit(FEW, HIGH(FEW), CHEAP, LOW(CHEAP)), "swapped"),
        (lambda: CoKriging().fit(RUNS, OUTPUT, FEW, HIGH(FEW)), "as many inputs"),
        (lambda: CoKriging().fit(CHEAP, LOW(CHEAP), FEW, NAN), "XH, yH"),
        (lambda: CoKriging(nugget=-1), "nugget"),
        (lambda: adaptive_design(lambda X, y: None, HIGH, FEW, CHEAP, 12), "n_new"),
        (lambda: MultiFidelityNet(0, [8], [4]), "d=0"),
        (lambda: MultiFidelityNet(1, [8], [4], penalty=-1), "penalty"),
        (lambda: small_net().fit(RUNS[:5], OUTPUT[:5], RUNS, OUTPUT, 0), "swapped"),
        (lambda: small_net().fit(RUNS, OUTPUT, FEW, HIGH(FEW), 0), "as many inputs"),
        (lambda: small_net().fit(CHEAP, LOW(CHEAP), FEW, HIGH(FEW), 0), "d=3"),
        (lambda: small_net().fit(RUNS, OUTPUT, RUNS[:4], NAN, 0), "XH, yH"),
        (lambda: sampler("normal", (0, 1), 1, rng()), "distribution"),
        (lambda: sampler("uniform", (1, 1), 1, rng()), "box"),
        (lambda: propagate(HIGH, sampler("uniform", (0, 1), 1, rng()), 1), "n must"),
        (lambda: benchmark("cubic", 2), "name"),
        (lambda: benchmark("linear", 0), "d and std"),
        (lambda: benchmark("nonlinear", 2, std=0.0), "d and std"),
        (lambda: airfoil(1, 0.12, 9), "panels"),
        (lambda: airfoil(1, 0.0, 40), "thickness"),
        (lambda: airfoil(1, 0.12, 40, reynolds=0), "reynolds"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
