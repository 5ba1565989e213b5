"""Oracles: steps by hand, a fixed point found by SciPy, yields in closed form, sums written out, gymnasium."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import fsolve
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from companion.scientific_ml import fisheries_control
from companion.scientific_ml.fisheries_control import (
    FisheryEnv,
    FisheryParameters,
    VectorFishery,
    constant_escapement,
    constant_mortality,
    evaluate,
    gae,
    growth,
    ppo_loss,
    record,
    smooth_policy,
    train_ppo,
    tune,
)

PAPER, CALM = FisheryParameters(), FisheryParameters(sigma=0.0)
LOGISTIC = FisheryParameters(sigma=0.0, c_xy=0.0)


def rng(seed=0):
    return np.random.default_rng(seed)


def fishery(N, model=3, params=CALM, t=0):
    """One fishery at given stocks."""
    sea = VectorFishery(1, model, params)
    sea.N[:], sea.t[:] = N, t
    return sea


# --- the sea ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "t", "start", "action", "reward", "expected"),
    [
        (3, 0, (0.5, 0.5, 0.7), (0.2, 0.1), 0.15, (0.4876, 0.51957692, 0.69265)),
        (4, 50, (0.8, 0.6, 0.3), (0, 0.3), 0.18, (0.80749589, 0.56444595, 0.30786)),
        (2, 0, (0.5, 0.5, 0.7), (0.2,), 0.1, None),
    ],
)
def test_a_year_has_the_values_found_by_hand(model, t, start, action, reward, expected):
    sea = fishery(start, model, t=t)
    N, earned, terminated, truncated = sea.step(np.array([action]))
    assert earned == pytest.approx([reward])
    assert not terminated.any()
    assert not truncated.any()
    assert sea.t == t + 1
    if expected is not None:
        assert N[0] == pytest.approx(expected, abs=1e-8)
    else:  # Y is not fished: its harvest is zero
        assert N[0] == pytest.approx(fishery(start, 3).step(np.array([[0.2, 0.0]]))[0][0])


def test_growth_is_a_sum_over_processes_written_out():
    N, noise, t = rng().uniform(0.1, 1, (6, 3)), rng(1).standard_normal((6, 3)), np.array([0, 20, 99, 100, 150, 199])
    found = growth(N, t, PAPER, noise)
    for (X, Y, Z), (a, b, c), year, row in zip(N, noise, t, found, strict=True):
        rate = max(1 - year / 200, 0.5)
        fx, fy = (0.3 * Z * U**2 / (0.09 + U**2) for U in (X, Y))
        assert row[0] == pytest.approx(X + rate * X * (1 - X) - fx - 0.1 * X * Y + 0.1 * X * a)
        assert row[1] == pytest.approx(Y + Y * (1 - Y) - 1.1 * fy - 0.1 * X * Y + 0.1 * Y * b)
        assert row[2] == pytest.approx(Z + Z * (0.1 * (X + 1.1 * Y) - 0.1) + 0.1 * Z * c)


def test_the_unfished_sea_settles_where_scipy_finds_the_root():
    N = np.array([[0.5, 0.5, 0.7]])
    for _ in range(5000):
        N = growth(N, None, PAPER, np.zeros((1, 3)))
    root = fsolve(lambda n: growth([n], None, PAPER, np.zeros((1, 3)))[0] - n, [0.5, 0.5, 1])
    assert N[0] == pytest.approx([0.52598675, 0.43092113, 1.00130806], abs=1e-7)
    assert N[0] == pytest.approx(root, abs=1e-8)
    assert N[0, 0] + 1.1 * N[0, 1] == pytest.approx(1, abs=1e-9)  # births and deaths of the predator balance


def steady_yield(policy, years=600):
    N = np.array([[0.5, 0.0, 0.0]])
    for _ in range(years):
        catch = policy(N)[:, 0] * N[:, 0]
        N = growth(N - [[catch[0], 0, 0]], None, LOGISTIC, np.zeros((1, 3)))
    return catch[0]


@pytest.mark.parametrize("s", [0.1, 0.3, 0.5, 0.8])
def test_steady_yield_of_constant_escapement(s):
    assert steady_yield(constant_escapement([s])) == pytest.approx(s * (1 - s), abs=1e-9)


@pytest.mark.parametrize(("m", "value"), [(0.2, 0.1875), (1 / 3, 0.25), (0.4, None)])
def test_steady_yield_of_constant_mortality(m, value):
    theory = m / (1 - m) * (2 - 1 / (1 - m))
    assert steady_yield(constant_mortality([m])) == pytest.approx(value or theory, abs=1e-9)


def test_the_first_model_is_one_species_under_constant_predation():
    sea = fishery((0.6, 0.0, 1 / 3), 1)
    N, reward, *_ = sea.step(np.array([[0.25]]))
    X = 0.45
    assert reward == pytest.approx([0.15])
    assert N[0] == pytest.approx([X + X * (1 - X) - 0.1 * X**2 / (X**2 + 0.09), 0, 1 / 3])
    assert (VectorFishery(1000, 1).N[:, 1:] == (0, 1 / 3)).all()


def test_noise_has_the_size_that_is_asked_for():
    sea = VectorFishery(20_000, 3)
    sea.N[:] = 0.5, 0.5, 0.7
    N, *_ = sea.step(np.zeros((20_000, 2)))
    calm = growth([[0.5, 0.5, 0.7]], None, CALM, np.zeros((1, 3)))[0]
    assert N.std(0) == pytest.approx([0.05, 0.05, 0.07], rel=0.03)
    assert N.mean(0) == pytest.approx(calm, abs=4 * 0.07 / 20_000**0.5)


def test_parameters_may_differ_between_episodes():
    both = FisheryParameters(sigma=np.array([0.0, 0.2]), r_x=np.array([1.0, 0.7]))
    N, noise = rng().uniform(0.2, 1, (2, 3)), rng(1).standard_normal((2, 3))
    together = growth(N, None, both, noise)
    for k, (sigma, r_x) in enumerate(((0.0, 1.0), (0.2, 0.7))):
        alone = growth(N[k : k + 1], None, FisheryParameters(sigma=sigma, r_x=r_x), noise[k : k + 1])
        assert together[k] == pytest.approx(alone[0])


# --- episodes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 9, 199])
def test_a_collapse_costs_more_the_earlier_it_comes(t):
    sea = fishery((0.5, 0.5, 0.7), t=t)
    N, reward, terminated, truncated = sea.step(np.array([[1.0, 0.0]]))  # all of X
    assert N[0, 0] == 0
    assert reward == pytest.approx([0.5 - 100 / (t + 1)])
    assert terminated.all()
    assert not truncated.any()


def test_two_hundred_years_are_no_collapse():
    sea = fishery((0.5, 0.5, 0.7), t=198)
    for last in (False, True):
        _, reward, terminated, truncated = sea.step(np.array([[0.1, 0.1]]))
        assert reward > 0
        assert not terminated.any()
        assert truncated.all() == last


def test_an_ended_episode_rests_until_it_is_reset():
    sea = VectorFishery(3, 4, seed=1)
    sea.step(np.array([[1, 1], [0, 0], [0, 0]]))
    before = sea.N[0].copy()
    _, reward, terminated, _ = sea.step(np.full((3, 2), 0.2))
    assert (sea.N[0] == before).all()
    assert reward[0] == 0
    assert not terminated[0]
    assert sea.t.tolist() == [1, 2, 2]
    kept = sea.N[1:].copy()
    sea.reset(sea.ended)
    assert sea.t.tolist() == [0, 2, 2]
    assert (sea.N[1:] == kept).all()
    assert np.abs(sea.N[0] - (0.5, 0.5, 0.7)).max() < 0.1


def test_the_weather_does_not_depend_on_the_policy():
    one, other = VectorFishery(5, 3, seed=3), VectorFishery(5, 3, seed=3)
    one.step(np.full((5, 2), 1.0))  # all episodes end
    other.step(np.zeros((5, 2)))
    one.step(np.zeros((5, 2)))
    other.step(np.zeros((5, 2)))
    assert (one.rng.standard_normal(4) == other.rng.standard_normal(4)).all()


def test_evaluation_is_the_sum_over_a_plain_loop():
    policy, sea = constant_mortality([0.3, 0.4]), VectorFishery(6, 4, seed=7)
    total, length, alive = np.zeros(6), np.zeros(6, int), np.ones(6, bool)
    survived = np.zeros(6, bool)
    for _ in range(200):
        _, reward, terminated, truncated = sea.step(policy(sea.N))
        total[alive] += reward[alive]
        length[alive] += 1
        survived |= truncated
        alive &= ~(terminated | truncated)
    found = evaluate(policy, 4, 6, 7)
    assert found.reward == pytest.approx(total)
    assert found.length.tolist() == length.tolist()
    assert found.survived.tolist() == survived.tolist()


def test_a_record_adds_up_to_the_evaluation():
    policy = constant_escapement([0.5, 0.4])
    N, M = record(policy, 4, 30, 2)
    found = evaluate(policy, 4, 30, 2)
    assert np.isfinite(N[..., 0]).sum(0).tolist() == found.length.tolist()
    catch = np.nansum(N[..., :2] * M, axis=(0, 2))
    penalty = np.where(found.survived, 0, 100 / found.length)
    assert found.reward == pytest.approx(catch - penalty)


def test_tuning_finds_the_known_optimum_in_a_calm_sea():
    grid = np.linspace(0.1, 0.9, 17)[:, None]
    calm = FisheryParameters(sigma=0.0, beta=0.0)  # Model 1 without predation: logistic
    escapement = tune(constant_escapement, 1, grid, 2, 0, calm)
    assert escapement.best == pytest.approx([0.5])
    assert escapement.survival == pytest.approx(np.ones(17))
    alone = evaluate(constant_escapement([0.3]), 1, 2, 0, calm).reward.mean()
    assert escapement.reward[4] == pytest.approx(alone, abs=0.03)  # other starts, same sea
    mortality = tune(constant_mortality, 1, np.array([[0.2], [1 / 3], [0.45]]), 2, 0, calm)
    assert mortality.best == pytest.approx([1 / 3])


def test_gymnasium_accepts_the_environment():
    for model in (1, 2, 3, 4):
        env = FisheryEnv(model)
        assert isinstance(env, gymnasium.Env)
        check_env(env, skip_render_check=True)


def test_the_environment_is_the_vector_fishery_step_by_step():
    env, sea = FisheryEnv(4), VectorFishery(1, 4)
    first, _ = env.reset(seed=11)
    sea.rng = gymnasium.utils.seeding.np_random(11)[0]
    assert first == pytest.approx(sea.reset()[0])
    for _ in range(200):
        N, reward, terminated, truncated, _ = env.step(np.array([0.1, 0.2]))
        expected = sea.step(np.array([[0.1, 0.2]]))
        assert pytest.approx(expected[0][0], rel=1e-6) == N
        assert (reward, terminated, truncated) == (expected[1][0], expected[2][0], expected[3][0])
        if terminated or truncated:
            break


# --- policies ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 3), min_size=3, max_size=3), st.floats(0, 2), st.floats(0, 2))
def test_escapement_leaves_s_of_a_larger_stock_and_all_of_a_smaller_one(N, s_x, s_y):
    N, s = np.array([N]), np.array([s_x, s_y])
    left = N[:, :2] * (1 - constant_escapement(s)(N))
    assert left == pytest.approx(np.minimum(N[:, :2], s), abs=1e-9)


def test_constant_policies_take_one_row_for_each_episode():
    rows = rng().uniform(0, 1, (4, 2))
    N = rng(1).uniform(0, 1, (4, 3))
    for family in (constant_mortality, constant_escapement):
        each = [family(row)(N[k : k + 1])[0] for k, row in enumerate(rows)]
        assert family(rows)(N) == pytest.approx(np.array(each))


def test_the_smoothed_policy_is_kernel_regression_on_the_grids():
    def policy(N):
        return np.column_stack([N[:, 0] ** 2 * N[:, 2], 0.2 + 0.1 * N[:, 1]])

    states = rng().uniform(0.1, 0.9, (500, 3))
    smooth, x = smooth_policy(policy, states, points=1875), rng(1).uniform(0.2, 0.8, (30, 3))
    low, high = np.quantile(states, [0.01, 0.99], axis=0)
    points = []
    for fine in range(3):
        counts = [25 if k == fine else 5 for k in range(3)]
        for index in np.ndindex(*counts):
            points.append([low[k] + (high[k] - low[k]) * index[k] / (counts[k] - 1) for k in range(3)])
    peer = GaussianProcessRegressor(RBF(10.0), alpha=0.1, optimizer=None).fit(points, policy(np.array(points)))
    assert smooth(x) == pytest.approx(peer.predict(x), abs=1e-6)
    fitted = smooth_policy(policy, states, points=80, optimizer="fmin_l_bfgs_b")
    assert np.abs(fitted(x) - policy(x)).max() < 0.02
    assert np.abs(smooth(x) - policy(x)).max() < 0.1


# --- learning ---------------------------------------------------------------------------------------------------------


def experience(steps=30, n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, steps, n, generator=g, dtype=torch.float64)
    ended = torch.rand(steps, n, generator=g) < 0.1
    return reward, value, next_value, ended & (torch.rand(steps, n, generator=g) < 0.5), ended


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_advantages_are_the_sums_written_out(lam):
    reward, value, next_value, terminated, ended = experience()
    delta = reward + 0.9 * next_value * ~terminated - value
    expected = torch.zeros_like(delta)
    for t in range(30):
        for episode in range(4):
            for k in range(t, 30):
                expected[t, episode] += (0.9 * lam) ** (k - t) * delta[k, episode]
                if ended[k, episode]:
                    break
    found = gae(reward, value, next_value, terminated, ended, 0.9, lam)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_with_lambda_one_the_advantage_is_the_return_less_the_value():
    reward, value, _, _, _ = experience()
    never, last = torch.zeros(30, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.float64)
    found = gae(reward, value, torch.cat([value[1:], last]), never, never, 0.95, 1.0)
    returns, later = torch.zeros_like(value), last[0]
    for t in reversed(range(30)):
        later = reward[t] + 0.95 * later
        returns[t] = later
    torch.testing.assert_close(found, returns - value, rtol=0, atol=1e-10)


def test_ppo_s_gradient_vanishes_where_the_ratio_is_clipped():
    log_ratio = torch.tensor([[math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5), 0.0]], requires_grad=True)
    advantage = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0]])
    loss = ppo_loss(log_ratio, advantage, torch.zeros(1, 5))
    assert loss.item() == pytest.approx(-(2.4 - 3.0 + 1.0 - 1.6 + 1.0) / 5)
    loss.sum().backward()
    assert log_ratio.grad[0] == pytest.approx([0, 3 / 5, -1 / 5, 0, -1 / 5], abs=1e-6)
    critic = ppo_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]]))
    assert critic.item() == pytest.approx(14 / 6)


def test_an_update_sees_what_the_sea_did(monkeypatch):
    years, seen, losses = [], [], []
    step = VectorFishery.step

    def spy_step(self, actions):
        years.append(step(self, actions))
        return years[-1]

    def spy_gae(*arguments):
        seen.append(arguments)
        return gae(*arguments)

    def spy_loss(*arguments):
        losses.append([argument.detach() for argument in arguments])
        return ppo_loss(*arguments)

    for name, spy in (("gae", spy_gae), ("ppo_loss", spy_loss)):
        monkeypatch.setattr(fisheries_control, name, spy)
    monkeypatch.setattr(VectorFishery, "step", spy_step)
    options = dict(agents=2, width=8, episodes=16, steps=60, minibatch=960, epochs=1)
    train_ppo(4, 1, params=FisheryParameters(sigma=0.3), **options)
    (reward, value, next_value, terminated, ended), (log_ratio, advantage, error) = seen[0], losses[0]
    N, earned, collapsed, in_time = (
        torch.as_tensor(np.stack(column)).unflatten(1, (2, 16)) for column in zip(*years, strict=True)
    )
    assert collapsed.any()
    assert in_time.any()
    torch.testing.assert_close(reward, earned.float() / 10)
    assert torch.equal(terminated, collapsed)
    assert torch.equal(ended, collapsed | in_time)
    torch.testing.assert_close(next_value[:-1][~ended[:-1]], value[1:][~ended[:-1]])
    critic = fisheries_control._Agents(2, 8, 2, torch.Generator().manual_seed(0)).value  # as it was before the update
    after = critic((2 * N - 1).float().transpose(0, 1).flatten(1, 2)).unflatten(1, (60, 16)).transpose(0, 1)
    torch.testing.assert_close(next_value, after.detach(), rtol=0, atol=1e-5)  # before any reset
    assert log_ratio.abs().max() < 1e-5  # nothing was learned yet
    torch.testing.assert_close(advantage.mean(1), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(advantage.std(1), torch.ones(2))
    raw = -error  # the critic's target less its value
    standard = (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True)
    torch.testing.assert_close(standard, advantage, rtol=0, atol=1e-4)


def test_an_untrained_agent_catches_a_fifth():
    N = rng().uniform(0.1, 1, (50, 3))
    (policy,) = train_ppo(4, 0)
    assert policy(N).shape == (50, 2)
    assert policy(N) == pytest.approx(np.full((50, 2), 0.2), abs=0.03)


def test_agents_learn_in_a_sea_with_one_species():
    N = np.column_stack([np.linspace(0.3, 1.2, 20), np.zeros(20), np.full(20, 1 / 3)])
    first, second = train_ppo(1, 10, agents=2, width=16, episodes=32, steps=50, minibatch=400)
    (before,) = train_ppo(1, 0, width=16)
    start = evaluate(before, 1, 100, 9).reward.mean()
    assert np.abs(first(N) - second(N)).max() > 1e-3  # the agents are not one
    for agent in (first, second):
        assert evaluate(agent, 1, 100, 9).reward.mean() > start + 0.5
        assert agent(N)[-1, 0] > agent(N)[0, 0]  # more is caught of a larger stock


def test_training_repeats_itself_and_agents_start_differently():
    N, small = rng().uniform(0.2, 1, (20, 3)), dict(agents=2, width=8, episodes=4, steps=20, minibatch=40)
    first, again = train_ppo(4, 1, 5, **small), train_ppo(4, 1, 5, **small)
    assert all((one(N) == other(N)).all() for one, other in zip(first, again, strict=True))
    assert np.abs(first[0](N) - train_ppo(4, 1, 6, **small)[0](N)).max() > 1e-4
    assert np.abs(first[0](N) - train_ppo(4, 0, 5, agents=2, width=8)[0](N)).max() > 1e-4


# --- what a reader can get wrong --------------------------------------------------------------------------------------

ONE, TWO = np.ones((1, 3)), np.zeros((1, 2))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: growth(np.ones((2, 2)), None, PAPER, np.zeros((2, 2))), "N must"),
        (lambda: growth(ONE * np.nan, None, PAPER, np.zeros((1, 3))), "N must"),
        (lambda: growth(ONE, None, PAPER, np.zeros((2, 3))), "noise"),
        (lambda: VectorFishery(0), "n must"),
        (lambda: VectorFishery(1, 5), "model"),
        (lambda: FisheryEnv(0), "model"),
        (lambda: VectorFishery(1).step(np.zeros((1, 1))), "actions"),
        (lambda: VectorFishery(1).step(TWO * np.nan), "actions"),
        (lambda: constant_mortality([-0.1]), "m must"),
        (lambda: constant_mortality(0.1), "m must"),
        (lambda: constant_escapement([0.1, np.nan]), "s must"),
        (lambda: evaluate(constant_mortality([0.1]), 4, 2, 0), "actions"),
        (lambda: evaluate(constant_mortality([0.1]), 1, 0, 0), "n must"),
        (lambda: tune(constant_mortality, 4, np.zeros(3), 2, 0), "grid"),
        (lambda: tune(constant_mortality, 4, np.zeros((0, 2)), 2, 0), "grid"),
        (lambda: gae(torch.zeros(3, 2), *[torch.zeros(3, 1)] * 2, *[torch.zeros(3, 2) > 0] * 2), "share a shape"),
        (lambda: train_ppo(7, 1), "model"),
        (lambda: train_ppo(4, -1), "iterations"),
        (lambda: train_ppo(4, 1, agents=0), "agents"),
        (lambda: train_ppo(4, 1, lr=0), "lr"),
        (lambda: train_ppo(4, 1, minibatch=6401), "minibatch"),
        (lambda: smooth_policy(constant_mortality([0.1]), np.zeros((3, 2))), "states"),
        (lambda: smooth_policy(constant_mortality([0.1]), ONE, points=2000), "points"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
