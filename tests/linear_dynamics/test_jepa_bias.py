"""Oracles: closed forms, SciPy's integrators, autograd, least squares, conservation laws and invariances."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from sklearn.linear_model import LinearRegression

from companion.linear_dynamics.jepa_bias import (
    DeepLinearSSL,
    critical_time,
    feature_strengths,
    fixed_point,
    mode_trajectories,
    static_views,
    temporal_views,
    train_ssl,
)

F64 = torch.float64
LAM, RHO = np.array([1.0, 1.3, 1.0, 0.7]), np.array([0.95, 0.6, 0.75, 0.95])
XX, YX = torch.diag(torch.from_numpy(LAM / RHO)), torch.diag(torch.from_numpy(LAM))
BOTH = pytest.mark.parametrize("objective", ["jepa", "mae"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rotation(d, seed=0):
    return torch.nn.init.orthogonal_(torch.empty(d, d, dtype=F64), generator=generator(seed))


# --- one feature ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_trajectories_solve_the_equation_for_the_strength(objective, depth):
    eps, t = 0.02, np.linspace(0, 60 if objective == "jepa" else 6, 30)
    power = 3 - 1 / depth if objective == "jepa" else 2 - 1 / depth

    def flow(_, w):
        return depth * LAM * (w**power - w**3 / RHO)

    expected = solve_ivp(flow, (0, t[-1]), [eps] * 4, method="DOP853", t_eval=t, rtol=1e-11, atol=1e-13).y.T
    np.testing.assert_allclose(mode_trajectories(objective, LAM, RHO, eps, depth, t), expected, rtol=2e-6)


def test_two_layer_mae_is_the_logistic_curve_of_saxe():
    t, eps = np.linspace(0, 8, 50), 0.01  # strength of V W is the square of that of W; white inputs: λ = ρ
    rho = np.array([0.3, 0.95])
    end_to_end = mode_trajectories("mae", rho, rho, eps, 1, t) ** 2
    expected = rho / (1 + (rho / eps**2 - 1) * np.exp(-2 * rho * t[:, None]))
    np.testing.assert_allclose(end_to_end, expected, rtol=1e-6)


@BOTH
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_fixed_points_do_not_move_and_attract(objective, depth):
    goal = fixed_point(objective, RHO, depth)
    for k, end in enumerate(goal):
        still = mode_trajectories(objective, LAM[k : k + 1], RHO[k : k + 1], end, depth, np.array([0.0, 5.0]))
        np.testing.assert_allclose(still, end, rtol=1e-9)
    for start in (0.3, 1.2):
        late = mode_trajectories(objective, LAM[:1], RHO[:1], start, depth, np.array([1e4]))
        np.testing.assert_allclose(late, goal[0], rtol=1e-7)


def test_fixed_points_have_the_values_of_the_paper_s_formula():
    assert fixed_point("jepa", 0.6, 4) == pytest.approx(0.1296)
    assert fixed_point("mae", 0.6, 1) == pytest.approx(math.sqrt(0.6))
    np.testing.assert_allclose(fixed_point("mae", RHO, 3) ** 4, RHO**3)


def test_a_feature_that_starts_above_its_goal_decays():
    curve = mode_trajectories("jepa", np.ones(1), np.array([0.3]), 0.05, 4, np.linspace(0, 200, 20))[:, 0]
    assert (np.diff(curve) < 0).all()
    assert critical_time("jepa", 1, 0.3, 0.05, 4) == math.inf
    assert critical_time("jepa", 1, 0.5, 0.03125, 4) == math.inf  # half of the fixed point is the start itself
    assert 0 < critical_time("jepa", 1, 0.5, 0.0312, 4) < 2


def test_critical_time_has_the_value_computed_by_hand():
    by_hand = 100 - 1 / 0.475 + math.log(94) / 0.95
    assert critical_time("jepa", 1, 0.95, 0.01, 1) == pytest.approx(by_hand, rel=1e-13)
    assert by_hand == pytest.approx(102.68, abs=5e-3)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_critical_time_of_jepa_is_the_integral(depth):
    u0, u1 = 0.002 ** (1 / depth), 0.8 ** (1 / depth) * 0.7
    value, _ = quad(lambda u: 1 / (u ** (2 * depth) * (1 - u / 0.7)), u0, u1, epsabs=0, epsrel=1e-12, limit=500)
    assert critical_time("jepa", 2.0, 0.7, 0.002, depth, 0.8) == pytest.approx(value / 2, rel=1e-9)


def test_critical_time_of_mae_with_one_matrix_has_a_closed_form():
    rho, eps, p = 0.7, 1e-4, 0.6
    u0, u1 = eps**2, p**2 * rho  # squares
    expected = math.log(u1 * (rho - u0) / (u0 * (rho - u1))) / (2 * 1.3)
    assert critical_time("mae", 1.3, rho, eps, 1, p) == pytest.approx(expected, rel=1e-11)


@settings(deadline=None, max_examples=40)
@given(
    objective=st.sampled_from(["jepa", "mae"]), lam=st.floats(0.1, 5), rho=st.floats(0.5, 1.2),
    eps=st.floats(1e-3, 1e-2), depth=st.integers(1, 4), fraction=st.floats(0.3, 0.95),
)  # fmt: skip
def test_critical_time_inverts_the_trajectory(objective, lam, rho, eps, depth, fraction):
    t = critical_time(objective, lam, rho, eps, depth, fraction)
    reached = mode_trajectories(objective, np.array([lam]), np.array([rho]), eps, depth, np.array([t]))[0, 0]
    assert reached == pytest.approx(fraction * fixed_point(objective, rho, depth), rel=1e-6)
    assert critical_time(objective, 2 * lam, rho, eps, depth, fraction) == pytest.approx(t / 2, rel=1e-12)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_bias_has_the_asymptotic_form_to_second_order(depth):
    constant = (2 * depth - 1) / (2 * depth - 2) * (1 / 0.6 - 1 / 0.95)

    def rest(u0):
        times = [critical_time("jepa", 1, rho, u0**depth, depth) for rho in (0.6, 0.95)]
        return times[0] / times[1] - 1 - constant * u0

    assert rest(2e-3) / rest(1e-3) == pytest.approx(4, abs=0.1)  # what is left is of second order


def test_ratios_of_known_cases():
    def ratio(objective, depth):
        return critical_time(objective, 1, 0.6, 0.01, depth) / critical_time(objective, 1, 0.95, 0.01, depth)

    assert [ratio("jepa", depth) for depth in (1, 2, 3, 4, 6)] == pytest.approx(
        [1.008, 1.110, 1.280, 1.517, 2.024], abs=5e-4
    )
    assert [ratio("mae", depth) for depth in (1, 2, 3, 4, 6)] == pytest.approx(
        [0.943, 0.978, 0.988, 0.992, 0.997], abs=5e-4
    )


# --- the network ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_start_gives_every_feature_the_same_strength_in_every_basis(objective, depth):
    model = DeepLinearSSL(depth, 5, objective, 0.02, generator(), batch=3)
    strengths = feature_strengths(model.encoder(), rotation(5))
    torch.testing.assert_close(strengths, torch.full((3, 5), 0.02, dtype=F64), rtol=1e-10, atol=0)
    for below, above in pairwise([*model.weights, model.v]):
        torch.testing.assert_close(below @ below.mT, above.mT @ above, rtol=0, atol=1e-12)
    # the head undoes MAE's encoder, and leaves JEPA's as it is
    head = model.v @ model.encoder() if objective == "mae" else model.v
    scale = 0.02 ** (1 / depth) * (0.02 if objective == "mae" else 1)
    torch.testing.assert_close(head, scale * torch.eye(5, dtype=F64).expand(3, 5, 5), rtol=0, atol=1e-12)


def test_rotations_of_the_start_have_no_preferred_direction():
    (weight,) = DeepLinearSSL(1, 3, "jepa", 1.0, generator(), batch=2000).weights
    assert weight.mean(0).abs().max() < 5 / (3 * 2000) ** 0.5  # five standard errors of an entry
    assert abs(torch.linalg.det(weight).mean()) < 5 / 2000**0.5


def test_noise_has_its_standard_deviation_and_leaves_the_rotations():
    aligned = DeepLinearSSL(2, 20, "mae", 0.04, generator(), batch=10)
    noisy = DeepLinearSSL(2, 20, "mae", 0.04, generator(), noise=0.1, batch=10)
    for one, other in zip(aligned.weights, noisy.weights, strict=True):
        assert (other - one).std() == pytest.approx(0.1 * 0.2, rel=0.05)
    polar = noisy.v @ noisy.encoder()  # the head holds the rotation nearest to the encoder: the product is symmetric
    torch.testing.assert_close(polar, polar.mT, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(polar).min() > 0


@BOTH
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_step_agrees_with_autograd(objective, depth):
    x, y = (torch.randn(3, 40, 5, generator=generator(seed), dtype=F64) for seed in (1, 2))
    model = DeepLinearSSL(depth, 5, objective, 0.5, generator(), noise=0.3, batch=3)
    *model.weights, model.v = [factor.clone().requires_grad_() for factor in (*model.weights, model.v)]
    factors = [*model.weights, model.v]
    slopes = torch.autograd.grad(model.loss(x, y).sum(), factors)
    expected = [factor.detach() - 0.1 * slope for factor, slope in zip(factors, slopes, strict=True)]
    with torch.no_grad():
        model.step(x.mT @ x / 40, y.mT @ x / 40, lr=0.1)
    for one, other in zip((*model.weights, model.v), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_loss_is_the_mean_over_samples_and_stop_gradient_changes_only_the_gradient():
    x, y = (torch.randn(7, 4, generator=generator(seed), dtype=F64) for seed in (1, 2))
    for objective in ("jepa", "mae"):
        model = DeepLinearSSL(2, 4, objective, 0.5, generator(), noise=0.3, batch=2)
        encoder, total = model.encoder(), torch.zeros(2, dtype=F64)
        for a, b in zip(x, y, strict=True):
            target = encoder @ b if objective == "jepa" else b
            total += 0.5 * (model.v @ encoder @ a - target).square().sum(-1) / 7
        torch.testing.assert_close(model.loss(x, y), total)
        torch.testing.assert_close(model.loss(x, y, stop_gradient=False), total)


def test_without_stop_gradient_the_gradient_includes_the_target():
    x, y = (torch.randn(9, 3, generator=generator(seed), dtype=F64) for seed in (1, 2))
    model = DeepLinearSSL(1, 3, "jepa", 0.5, generator(), noise=0.3)
    start = model.weights[0].clone()
    model.weights = [start.clone().requires_grad_()]
    (slope,) = torch.autograd.grad(model.loss(x, y, stop_gradient=False).sum(), model.weights)
    for i, j in ((0, 0), (2, 1)):
        ends = []
        for h in (1e-5, -1e-5):
            model.weights = [start.clone()]
            model.weights[0][0, i, j] += h
            ends.append(float(model.loss(x, y)))
        assert float(slope[0, i, j]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@BOTH
@pytest.mark.parametrize("depth", [1, 3])
def test_training_follows_the_theory_to_first_order_in_the_step(objective, depth):
    eps, end = 0.05, (50 if depth == 1 else 60) if objective == "jepa" else 8
    basis, errors = rotation(4), []
    for lr in (0.04, 0.02):
        model = DeepLinearSSL(depth, 4, objective, eps, generator())
        steps = round(end / lr)
        encoders = train_ssl(model, basis @ XX @ basis.mT, basis @ YX @ basis.mT, lr, steps, steps // 25)
        strengths = feature_strengths(encoders, basis)[:, 0].numpy()
        theory = mode_trajectories(objective, LAM, RHO, eps, depth, lr * (steps // 25) * np.arange(len(strengths)))
        errors.append(np.abs(strengths - theory).max())
        gram = (encoders @ basis).mT @ (encoders @ basis)
        assert (gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-8
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)


@BOTH
def test_balance_is_conserved_up_to_the_step_size(objective):
    drifts = []
    for lr, steps in ((0.02, 300), (0.01, 600)):
        model = DeepLinearSSL(3, 4, objective, 0.3, generator(), noise=0.3)

        def imbalances(model=model):
            return [a @ a.mT - b.mT @ b for a, b in pairwise([*model.weights, model.v])]

        start = imbalances()
        train_ssl(model, XX, YX, lr, steps, steps)
        drifts.append(max(float((a - b).norm()) for a, b in zip(start, imbalances(), strict=True)))
    assert drifts[0] < 0.05
    assert drifts[0] / drifts[1] == pytest.approx(2, rel=0.1)


def test_trained_mae_is_least_squares():
    basis = rotation(4)
    x, y = static_views(500, torch.from_numpy(LAM), torch.from_numpy(LAM / RHO - LAM), basis, generator())
    model = DeepLinearSSL(2, 4, "mae", 0.1, generator(), noise=0.02)
    train_ssl(model, x.mT @ x / 500, y.mT @ x / 500, 0.05, 4000, 4000)
    expected = LinearRegression(fit_intercept=False).fit(x.numpy(), y.numpy()).coef_
    np.testing.assert_allclose((model.v @ model.encoder())[0].numpy(), expected, atol=1e-3)


def test_population_fixed_point_of_mae_is_the_regression_coefficient():
    for depth in (1, 2, 5):
        w = fixed_point("mae", RHO, depth)
        np.testing.assert_allclose(w * w ** (1 / depth), RHO)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), objective=st.sampled_from(["jepa", "mae"]))
def test_turning_the_views_turns_the_encoder_and_no_strength(seed, objective):
    turn, strengths = rotation(4, seed), []
    for basis in (torch.eye(4, dtype=F64), turn):
        model = DeepLinearSSL(2, 4, objective, 0.1, generator(1))
        encoders = train_ssl(model, basis @ XX @ basis.mT, basis @ YX @ basis.mT, 0.05, 60, 20)
        strengths.append(feature_strengths(encoders, basis))
    torch.testing.assert_close(*strengths, rtol=0, atol=1e-9)


def test_a_batch_trains_like_its_members_and_inputs_stay():
    xx, yx = torch.stack([XX, 2 * XX]), torch.stack([YX, 0.5 * YX])
    model = DeepLinearSSL(3, 4, "jepa", 0.3, generator(), noise=0.2, batch=2)
    members = []
    for k in range(2):
        member = DeepLinearSSL(3, 4, "jepa", 0.3, generator())
        member.weights, member.v = [weight[k : k + 1] for weight in model.weights], model.v[k : k + 1]
        members.append(train_ssl(member, xx[k], yx[k], 0.05, 50, 25))
    before = xx.clone(), yx.clone(), [weight.clone() for weight in model.weights]
    starts = model.weights
    together = train_ssl(model, xx, yx, 0.05, 50, 25)
    assert together.shape == (3, 2, 4, 4)
    torch.testing.assert_close(together, torch.cat(members, 1), rtol=0, atol=1e-12)
    assert torch.equal(xx, before[0])
    assert torch.equal(yx, before[1])
    assert all(torch.equal(a, b) for a, b in zip(starts, before[2], strict=True))  # new matrices, old ones untouched


def test_records_are_the_encoders_before_the_first_and_after_every_so_many_steps():
    recorded, stepped = (DeepLinearSSL(2, 4, "mae", 0.3, generator(), noise=0.2) for _ in range(2))
    encoders, expected = train_ssl(recorded, XX, YX, 0.05, steps=7, record_every=3), [stepped.encoder()]
    for _ in range(2):
        for _ in range(3):
            stepped.step(XX, YX, 0.05)
        expected.append(stepped.encoder())
    torch.testing.assert_close(encoders, torch.stack(expected), rtol=0, atol=0)


def test_strengths_are_read_in_the_basis_of_the_features():
    basis, left = rotation(3, 1), rotation(3, 2)
    encoder = left @ torch.diag(torch.tensor([0.1, 3.0, 1.0], dtype=F64)) @ basis.mT
    torch.testing.assert_close(feature_strengths(encoder, basis), torch.tensor([0.1, 3.0, 1.0], dtype=F64))
    torch.testing.assert_close(
        feature_strengths(encoder.expand(5, 2, 3, 3), basis)[4, 1], feature_strengths(encoder, basis)
    )


# --- the data ---------------------------------------------------------------------------------------------------------


def check_covariances(x, y, basis, lam, sigma2, tolerance):
    """The sample covariances are diagonal in the basis, with the given entries."""
    for one, other, expected in ((x, x, sigma2), (y, y, sigma2), (y, x, lam)):
        seen = basis.mT @ (one.mT @ other / len(one)) @ basis
        torch.testing.assert_close(seen, torch.diag(expected), rtol=0, atol=tolerance)


def test_static_views_have_the_covariances_of_the_model():
    signal, noise, basis = (
        torch.tensor([1.0, 1.3, 0.05], dtype=F64),
        torch.tensor([0.05, 0.87, 1.5], dtype=F64),
        rotation(3),
    )
    x, y = static_views(100_000, signal, noise, basis, generator())
    assert x.shape == y.shape == (100_000, 3)
    check_covariances(x, y, basis, signal, signal + noise, 5 * 3 / 100_000**0.5)
    x, y = static_views(10, signal, torch.zeros(3, dtype=F64), basis, generator())
    assert torch.equal(x, y)


def test_temporal_views_have_the_covariances_of_the_model_from_the_first_frame():
    amplitude, gamma = torch.tensor([1.0, 1.8, 1.5], dtype=F64), torch.tensor([0.9, 0.5, -0.3], dtype=F64)
    noise, basis = torch.tensor([0.02, 0.3, 0.3], dtype=F64), rotation(3)
    x, y = temporal_views(200_000, amplitude, gamma, noise, basis, generator())
    assert torch.equal(x[1:], y[:-1])  # consecutive frames of one sequence
    check_covariances(x, y, basis, amplitude * gamma, amplitude + noise, 0.05)
    first = torch.stack(
        [temporal_views(1, amplitude, gamma, noise, basis, generator(seed))[0][0] for seed in range(2000)]
    )
    check_covariances(first, first, basis, amplitude + noise, amplitude + noise, 0.3)


def test_temporal_views_are_an_autoregression():
    gamma, one, zero = torch.tensor([0.8, 0.3], dtype=F64), torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)
    x, _ = temporal_views(50, one, gamma, zero, torch.eye(2, dtype=F64), generator(3))
    drive = torch.randn(2, 51, 2, generator=generator(3), dtype=F64)[0]
    u = drive[0]
    for t in range(50):
        torch.testing.assert_close(x[t], u)
        u = gamma * u + (1 - gamma**2).sqrt() * drive[t + 1]


# --- what a reader can get wrong --------------------------------------------------------------------------------------

T, ONE, EYE, V2 = np.array([0.0, 1.0]), np.ones(1), torch.eye(2, dtype=F64), torch.ones(2, dtype=F64)


def ssl(**changes):
    return DeepLinearSSL(**{"depth": 2, "dim": 4, "objective": "jepa", "eps": 0.1, "generator": generator(), **changes})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: fixed_point("vae", 0.5, 2), "objective"),
        (lambda: fixed_point("mae", -0.5, 2), "rho"),
        (lambda: fixed_point("mae", 0.5, 0), "depth"),
        (lambda: mode_trajectories("vae", ONE, ONE, 0.1, 2, T), "objective"),
        (lambda: mode_trajectories("jepa", 0 * ONE, ONE, 0.1, 2, T), "lam"),
        (lambda: mode_trajectories("jepa", ONE, math.nan * ONE, 0.1, 2, T), "rho"),
        (lambda: mode_trajectories("jepa", ONE, ONE, 0.0, 2, T), "eps"),
        (lambda: mode_trajectories("jepa", ONE, ONE, 0.1, 1.5, T), "depth"),
        (lambda: mode_trajectories("jepa", ONE, np.ones(2), 0.1, 2, T), "lam and rho"),
        (lambda: mode_trajectories("jepa", ONE, ONE, 0.1, 2, -T), "t must"),
        (lambda: mode_trajectories("jepa", ONE, ONE, 0.1, 2, T[::-1]), "t must"),
        (lambda: mode_trajectories("jepa", ONE, ONE, 0.1, 2, T[:0]), "t must"),
        (lambda: critical_time("vae", 1, 0.5, 0.1, 2), "objective"),
        (lambda: critical_time("mae", -1, 0.5, 0.1, 2), "lam"),
        (lambda: critical_time("mae", 1, 0, 0.1, 2), "rho"),
        (lambda: critical_time("mae", 1, 0.5, -0.1, 2), "eps"),
        (lambda: critical_time("mae", 1, 0.5, 0.1, 0), "depth"),
        (lambda: critical_time("mae", 1, 0.5, 0.1, 2, 1.0), "fraction"),
        (lambda: ssl(objective="vae"), "objective"),
        (lambda: ssl(depth=0), "depth"),
        (lambda: ssl(dim=0), "dim"),
        (lambda: ssl(eps=0), "eps"),
        (lambda: ssl(batch=0), "batch"),
        (lambda: ssl(noise=-1), "noise"),
        (lambda: ssl().loss(torch.ones(5, 3), torch.ones(5, 3)), "x and y"),
        (lambda: ssl().loss(torch.ones(5, 4), torch.ones(6, 4)), "x and y"),
        (lambda: ssl().step(XX[:3, :3], YX, 0.1), "sigma_xx"),
        (lambda: ssl().step(XX, YX.expand(2, 4, 4), 0.1), "sigma_yx"),
        (lambda: train_ssl(ssl(), XX, YX, 0, 1, 1), "lr"),
        (lambda: train_ssl(ssl(), XX, YX, 0.1, 0, 1), "steps"),
        (lambda: train_ssl(ssl(), XX, YX, 0.1, 1, 0), "record_every"),
        (lambda: train_ssl(ssl(), XX * math.nan, YX, 0.1, 1, 1), "sigma_xx"),
        (lambda: feature_strengths(XX, EYE), "basis"),
        (lambda: static_views(0, V2, V2, EYE, generator()), "n must"),
        (lambda: static_views(5, -V2, V2, EYE, generator()), "signal_var"),
        (lambda: static_views(5, V2, V2[:1], EYE, generator()), "noise_var"),
        (lambda: static_views(5, V2, V2, 2 * EYE, generator()), "basis"),
        (lambda: temporal_views(5, V2, V2, V2, EYE, generator()), "gamma"),
        (lambda: temporal_views(5, V2, -1.5 * V2, V2, EYE, generator()), "gamma"),
        (lambda: temporal_views(5, V2 * math.inf, 0.5 * V2, V2, EYE, generator()), "amplitude_var"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_divergence_is_reported():
    with pytest.raises(FloatingPointError, match="smaller lr"):
        train_ssl(ssl(eps=2.0, objective="mae"), 10 * XX, YX, 5.0, 50, 50)
