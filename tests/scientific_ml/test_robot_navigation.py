"""The laser against marching and sampled outlines, the robot against its geometry, learning against calculus."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter

from companion.scientific_ml import robot_navigation
from companion.scientific_ml.robot_navigation import (
    ACTIONS,
    GOAL_RADIUS,
    RADIUS,
    ROOM,
    SCAN_RANGE,
    STEP_TIME,
    ActorCritic,
    NavigationSimulator,
    actor_critic_loss,
    blind,
    clearance,
    draw_worlds,
    drive,
    drive_straight,
    evaluate,
    follow_gap,
    greedy,
    navigation_reward,
    random_policy,
    ray_distances,
    segment_returns,
    train_ga3c,
    wrap,
)

F64 = torch.float64
BOX = torch.tensor([[[0, 0, 6, 0], [6, 0, 6, 6], [6, 6, 0, 6], [0, 6, 0, 0]]], dtype=F64)
NOTHING = torch.zeros(1, 1, 3, dtype=F64)
HERE = torch.tensor([[1.0, 2.0]], dtype=F64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def degrees(*angles):
    return torch.deg2rad(torch.tensor([angles], dtype=F64))


def disc(*numbers):
    return torch.tensor([[numbers]], dtype=F64)


def worlds(n, seed=0):
    """Random worlds of all levels in double precision."""
    discs, segments = draw_worlds(torch.arange(n) % 4, generator(seed))
    return discs.double(), segments.double()


def free_points(discs, segments, margin, seed=0):
    """One point per world with this clearance."""
    points = 6 * torch.rand(len(discs), 500, 2, generator=generator(seed), dtype=F64)
    first = (clearance(points, discs, segments) > margin).int().argmax(1)
    return points[torch.arange(len(discs)), first]


def doubled(simulator):
    """The simulator in double precision, so that symmetries can be compared closely."""
    for name in simulator._STATE:
        value = getattr(simulator, name)
        if value.is_floating_point():
            setattr(simulator, name, value.double())
    simulator.frames = simulator._sense(slice(None))[:, None].expand_as(simulator.frames)
    return simulator


# --- the laser --------------------------------------------------------------------------------------------------------


def test_rays_by_hand():
    found = ray_distances(HERE, degrees(-135, -67.5, 0, 67.5, 135), NOTHING, BOX, 2.5)
    expected = torch.tensor([[1.41421356, 2.1647844, 2.5, 2.5, 1.41421356]], dtype=F64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    for obstacle, ahead in (
        ((2, 2, 0.3), 0.7),
        ((2, 2.2, 0.3), 1 - 0.05**0.5),
        ((2, 2.4, 0.3), 2.5),
        ((0, 2, 0.3), 2.5),
    ):
        assert ray_distances(HERE, degrees(0), disc(*obstacle), BOX, 2.5).item() == pytest.approx(ahead, abs=1e-12)
    wall = torch.tensor([[[2.5, 0, 2.5, 3]]], dtype=F64)
    found = ray_distances(HERE, degrees(0, 33.75, 33.6, 90, 180), NOTHING, wall, 2.5)
    beyond = 1.5 / math.cos(math.radians(33.6))
    torch.testing.assert_close(found, torch.tensor([[1.5, 2.5, beyond, 2.5, 2.5]], dtype=F64), rtol=0, atol=1e-12)


def test_rays_agree_with_marching():
    discs, segments = worlds(8)
    origin, angles = free_points(discs, segments, 0.01), 6.3 * torch.rand(8, 9, generator=generator(1), dtype=F64)
    found = ray_distances(origin, angles, discs, segments, SCAN_RANGE)
    for step, low, high in ((0.01, 0.0, SCAN_RANGE), (1e-4, None, None)):  # coarsely, then finely around the hit
        start = found[..., None] - 0.02 if low is None else torch.zeros_like(found)[..., None]
        length = start + step * torch.arange(400 if low is None else int(high / step), dtype=F64)
        u = torch.stack([angles.cos(), angles.sin()], -1)
        points = origin[:, None, None] + length[..., None] * u[:, :, None]
        close = clearance(points.flatten(1, 2), discs, segments).view(length.shape) < 0.6 * step
        first = torch.where(close, length, torch.inf).amin(-1).clamp(max=SCAN_RANGE)
        if low is None:
            # a ray that grazes comes near before it hits, so marching may only be early
            assert ((first - found).abs() < 2e-3).double().mean() > 0.97
        else:
            assert (first < found + 2 * step).all()  # nothing was jumped over


def test_rays_end_on_an_obstacle_or_in_free_space():
    discs, segments = worlds(40)
    origin, angles = free_points(discs, segments, 0.05), 6.3 * torch.rand(40, 33, generator=generator(1), dtype=F64)
    found = ray_distances(origin, angles, discs, segments, SCAN_RANGE)
    u = torch.stack([angles.cos(), angles.sin()], -1)
    ends = clearance(origin[:, None] + found[..., None] * u, discs, segments)
    assert ends[found < SCAN_RANGE].abs().max() < 1e-9
    assert ends[found == SCAN_RANGE].min() > 0
    for part in (0.3, 0.9):
        assert clearance(origin[:, None] + part * found[..., None] * u, discs, segments).min() > 0


def test_clearance_agrees_with_sampled_outlines():
    discs, segments = worlds(4)
    points = free_points(discs, segments, 0.05)
    turn = torch.linspace(0, 2 * math.pi, 4001, dtype=F64)
    for k in range(4):
        present = discs[k][discs[k, :, 2] > 0]
        rings = present[:, None, :2] + present[:, None, 2:] * torch.stack([turn.cos(), turn.sin()], -1)
        lines = segments[k, :, None, :2] + turn[:, None] / turn[-1] * (
            segments[k, :, None, 2:] - segments[k, :, None, :2]
        )
        nearest = (torch.cat([rings.flatten(0, 1), lines.flatten(0, 1)]) - points[k]).norm(dim=1).min().item()
        assert clearance(points[None, k, None], discs[None, k], segments[None, k]).item() == pytest.approx(
            nearest, abs=1e-4
        )
    assert clearance(disc(2, 2, 0)[..., :2], disc(2, 2, 0.3), BOX).item() == pytest.approx(-0.3)
    wall = torch.tensor([[[2.5, 0, 2.5, 3]]], dtype=F64)  # beyond its end the end itself is nearest
    assert clearance(torch.tensor([[[2.5, 4.0], [2.8, 3.4], [1.0, 1.0]]], dtype=F64), NOTHING, wall)[0].tolist() == (
        pytest.approx([1.0, 0.5, 1.5])
    )


# --- the robot --------------------------------------------------------------------------------------------------------


def test_worlds_are_what_the_levels_say():
    discs, segments = worlds(400)
    assert [(discs[level::4, :, 2] > 0).sum(1).unique().tolist() for level in range(4)] == [[0], [3], [7], [2]]
    present = discs[discs[..., 2] > 0]
    assert present[:, :2].min() >= 0.8
    assert present[:, :2].max() <= 5.2
    assert present[:, 2].min() >= 0.15
    assert present[:, 2].max() <= 0.4
    assert {tuple(row) for row in segments[:, :4].flatten(0, 1).tolist()} == {tuple(row) for row in BOX[0].tolist()}
    assert torch.equal(segments[0, 4:], segments[0, :2])
    walls = segments[3::4, 4:].view(-1, 4, 2)  # four ends of two pieces
    along_y = (walls[:, 0, 0] == walls[:, 3, 0]).long()
    assert 30 < along_y.sum() < 70
    at = walls.gather(2, (1 - along_y)[:, None, None].expand(-1, 4, 1))[..., 0]
    ends = walls.gather(2, along_y[:, None, None].expand(-1, 4, 1))[..., 0]
    assert (at == at[:, :1]).all()
    low, start, stop, high = ends.unbind(1)
    assert at.min() >= 2.4
    assert at.max() <= 3.6
    assert low.abs().max() == 0
    assert (high - ROOM).abs().max() == 0
    torch.testing.assert_close(stop - start, torch.full_like(start, 1.2), rtol=0, atol=1e-6)
    assert start.min() >= 1
    assert start.max() <= 4.2


def test_starts_and_goals_are_clear_and_apart():
    simulator = NavigationSimulator(400, [0, 1, 2, 3], seed=0)
    assert clearance(simulator.pose[:, None, :2], simulator.discs, simulator.segments).min() > RADIUS + 0.35
    assert clearance(simulator.goal[:, None], simulator.discs, simulator.segments).min() > 0.2
    distance, bearing = simulator.to_goal()
    assert distance.min() > 2
    assert bearing.abs().max() <= math.pi


def place(simulator, pose, goal):
    """Put the robot at a pose and give it a goal."""
    simulator.pose, simulator.goal = torch.tensor([pose]), torch.tensor([goal])
    return simulator


def test_a_step_by_hand():
    simulator = doubled(place(NavigationSimulator(1, 0, seed=0), (1.0, 2.0, -0.3), (4.0, 2.0)))
    reward, *ends = simulator.step(torch.tensor([0]))
    assert reward.item() == pytest.approx(9.57363169, abs=1e-6)
    torch.testing.assert_close(
        simulator.pose, torch.tensor([[1.07499414, 2.00093748, 0.0125]], dtype=F64), rtol=0, atol=1e-7
    )
    assert not any(map(bool, ends))


@pytest.mark.parametrize("action", range(7))
def test_a_constant_action_goes_round_a_circle(action):
    simulator = doubled(place(NavigationSimulator(1, 0, seed=0), (3.0, 3.0, 0.0), (5.5, 5.5)))
    path = [simulator.pose[0, :2]]
    for _ in range(4 if action == 3 else 21):
        simulator.step(torch.tensor([action]))
        path.append(simulator.pose[0, :2])
    path, (omega, v) = torch.stack(path), ACTIONS[action].double()
    sides = (path[1:] - path[:-1]).norm(dim=1)
    torch.testing.assert_close(sides, torch.full_like(sides, float(v) * STEP_TIME), rtol=1e-6, atol=0)
    if action == 3:
        torch.testing.assert_close(path[-1], torch.tensor([3.6, 3.0], dtype=F64), rtol=0, atol=1e-6)
    else:
        turn = omega * STEP_TIME
        radius = v * STEP_TIME / (2 * (turn / 2).sin().abs())
        centre = torch.linalg.lstsq(2 * (path[1:] - path[0]), (path[1:] ** 2 - path[0] ** 2).sum(1)).solution
        torch.testing.assert_close((path - centre).norm(dim=1), radius.expand(len(path)), rtol=1e-5, atol=0)


def test_collision_goal_and_time_limit():
    ahead = torch.tensor([3])
    crash = place(NavigationSimulator(1, 0, seed=0), (5.7, 3.0, 0.0), (1.0, 1.0)).step(ahead)
    assert [value.item() for value in crash] == [-15.0, True, False, False]
    both = place(NavigationSimulator(1, 0, seed=0), (5.7, 3.0, 0.0), (5.75, 3.0)).step(ahead)
    assert [value.item() for value in both] == [-15.0, True, False, False]  # a crash at the goal is a crash
    near = place(NavigationSimulator(1, 0, seed=0), (5.6, 3.0, 0.0), (1.0, 1.0))
    assert not near.step(ahead)[1]  # 0.25 m from the wall, body 0.18 m
    simulator = place(NavigationSimulator(1, 0, seed=0, horizon=3), (3.0, 3.0, 0.0), (3.45, 3.0))
    assert [value.item() for value in simulator.step(ahead)] == [12.0, False, True, False]
    assert simulator.to_goal()[0].item() > 2  # a new goal, and the episode goes on
    assert simulator.clock.item() == 0
    simulator = place(NavigationSimulator(1, 0, seed=0, horizon=3), (3.0, 3.0, 0.0), (5.5, 3.0))
    assert [simulator.step(torch.tensor([k]))[3].item() for k in (0, 0, 0)] == [False, False, True]
    before = simulator.pose.clone()
    simulator.reset(torch.tensor([False]))
    assert torch.equal(simulator.pose, before)
    simulator.reset(torch.tensor([True]))
    assert not torch.equal(simulator.pose, before)
    assert torch.equal(simulator.frames[:, 0], simulator.frames[:, 1])


def test_an_observation_is_scan_and_compass():
    simulator = NavigationSimulator(300, [0, 1, 2, 3], noise=0.0, seed=0)
    frame = simulator.observe()[:, -1]
    assert frame.shape == (300, 49)
    angles = simulator.pose[:, 2:] + torch.deg2rad(torch.linspace(-135, 135, 33))
    scan = ray_distances(simulator.pose[:, :2], angles, simulator.discs, simulator.segments, SCAN_RANGE)
    torch.testing.assert_close(frame[:, :33], scan / SCAN_RANGE)
    assert (frame[:, 33:].sum(1) == 1).all()
    middle = wrap(frame[:, 33:].argmax(1) * 2 * math.pi / 16)
    assert wrap(middle - simulator.to_goal()[1]).abs().max() <= math.pi / 16 + 1e-5
    before = simulator.observe()
    simulator.step(torch.full((300,), 3))
    assert torch.equal(simulator.observe()[:, 0], before[:, 1])


def test_noise_has_its_size_and_stays_in_range():
    noise = torch.tensor([0.0, 0.2]).repeat(500)
    clean, noisy = (NavigationSimulator(1000, 2, noise=s, seed=0) for s in (0.0, noise))
    error = SCAN_RANGE * (noisy.observe() - clean.observe())[:, -1, :33]
    assert torch.equal(noisy.pose, clean.pose)
    assert error[::2].abs().max() == 0
    inside = ((clean.observe()[:, -1, :33] - 0.5).abs() < 0.2)[1::2]
    assert error[1::2][inside].std().item() == pytest.approx(0.2, rel=0.05)
    assert noisy.observe().min() >= 0
    assert noisy.observe().max() <= 1


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_a_quarter_turn_of_the_world_changes_nothing(seed):
    def turned(x, y):
        return ROOM - y, x

    one, other = (doubled(NavigationSimulator(8, [0, 1, 2, 3], noise=0.0, seed=seed)) for _ in range(2))
    x, y, theta = one.pose.unbind(1)
    other.pose = torch.stack([*turned(x, y), wrap(theta + math.pi / 2)], 1)
    other.goal = torch.stack(turned(*one.goal.unbind(1)), 1)
    other.discs = torch.stack([*turned(*one.discs[..., :2].unbind(-1)), one.discs[..., 2]], -1)
    x1, y1, x2, y2 = one.segments.unbind(-1)
    other.segments = torch.stack([*turned(x1, y1), *turned(x2, y2)], -1)
    other.frames = other._sense(slice(None))[:, None].expand_as(other.frames)
    for action in torch.randint(7, (5, 8), generator=generator(seed)):
        torch.testing.assert_close(one.observe(), other.observe(), rtol=0, atol=1e-6)
        going = torch.ones(8, dtype=torch.bool)
        for first, second in zip(one.step(action), other.step(action), strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
            going &= ~first if first.dtype == torch.bool else True
        one.keep(going), other.keep(going)
        if going.sum() < 8:
            break


def test_a_robot_alone_moves_as_in_a_crowd():
    crowd, alone = NavigationSimulator(32, 2, noise=0.0, seed=0), NavigationSimulator(1, 2, noise=0.0, seed=1)
    for name in crowd._STATE:
        setattr(alone, name, getattr(crowd, name)[5:6].clone())
    for action in torch.randint(7, (10, 32), generator=generator()):
        expected, found = crowd.step(action), alone.step(action[5:6])
        torch.testing.assert_close(found[0], expected[0][5:6])
        torch.testing.assert_close(alone.observe(), crowd.observe()[5:6])
        torch.testing.assert_close(alone.pose, crowd.pose[5:6])


# --- rewards, returns, losses -----------------------------------------------------------------------------------------


def reward(d0, d1, phi0, phi1, s=0.15, collided=False, reached=False):
    numbers = [torch.tensor([value], dtype=F64) for value in (d0, d1, phi0, phi1, s)]
    return navigation_reward(*numbers, torch.tensor([collided]), torch.tensor([reached])).item()


def test_rewards_by_hand():
    assert reward(3, 2.85, 0, 0) == pytest.approx(9.0)
    assert reward(3, 3.15, math.pi, math.pi) == pytest.approx(-9.0)
    assert reward(3, 2.85, 0, 0, collided=True) == -15
    assert reward(3, 2.85, 0, 0, reached=True) == 12
    assert reward(3, 3, 0.5, 0.2) == pytest.approx(3 * math.cos(0.2) + 2 * 0.3)
    assert reward(3, 3, -0.2, 0.5) == pytest.approx(3 * math.cos(0.5) - 3 * 0.3)
    assert reward(3, 3.002, 1.5, 1.5) == pytest.approx(6 * 0.002 / 0.15 + 3 * math.cos(1.5))  # as far as sideways
    assert reward(3, 3.01, 1.5, 1.5) == pytest.approx(-6 * 0.01 / 0.15 + 3 * math.cos(1.5))


@given(values=st.lists(st.floats(-15, 12), min_size=1, max_size=12), end=st.floats(-5, 5), gamma=st.floats(0, 1))
def test_returns_are_a_recursive_filter(values, end, gamma):
    found = segment_returns(torch.tensor(values, dtype=F64), torch.tensor(end, dtype=F64), gamma)
    expected = lfilter([1], [1, -gamma], [end, *values[::-1]])[:0:-1]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_returns_by_hand():
    rewards = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, -15.0]])
    found = segment_returns(rewards, torch.tensor([4.0, 0.0]), 0.5)
    assert found.mT.tolist() == [[3.25, 4.5, 5.0], [-1.75, -5.5, -15.0]]


def test_loss_by_hand_and_without_exploding_logarithms():
    output = torch.tensor([[0.0, math.log(3.0), 0.5]], dtype=F64)  # probabilities 1/4 and 3/4, value 1/2
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    found = actor_critic_loss(output, torch.tensor([1]), torch.tensor([2.0], dtype=F64), beta=0.1)
    assert found.item() == pytest.approx(-math.log(0.75) * 1.5 - 0.1 * entropy + 1.125)
    output = torch.tensor([[-40.0, 0.0, 0.0]], dtype=F64, requires_grad=True)
    loss = actor_critic_loss(output, torch.tensor([0]), torch.tensor([1.0], dtype=F64), beta=0.0)
    assert loss.item() == pytest.approx(-math.log(1e-6) + 0.5)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert gradient[0, :2].abs().max() == 0


def test_gradient_of_the_policy_is_the_advantage_times_the_score():
    output = torch.randn(5, 8, generator=generator(), dtype=F64, requires_grad=True)
    actions, value = torch.randint(7, (5,), generator=generator()), output[:, -1].detach()
    (gradient,) = torch.autograd.grad(actor_critic_loss(output, actions, value, beta=0.0).sum(), output)
    assert gradient.abs().max() == 0  # R = V
    (gradient,) = torch.autograd.grad(actor_critic_loss(output, actions, value + 2, beta=0.0).sum(), output)
    score = torch.nn.functional.one_hot(actions, 7) - output[:, :-1].softmax(1)
    torch.testing.assert_close(gradient, torch.cat([-2 * score, -2 * torch.ones(5, 1)], 1))


# --- networks and policies --------------------------------------------------------------------------------------------


def test_the_network_has_the_stated_size_and_starts_undecided():
    network = ActorCritic(2, 49, generator=generator())
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_336
    log_pi = network(torch.rand(50, 2, 49, generator=generator()))[:, :-1].log_softmax(1)
    entropy = -(log_pi.exp() * log_pi).sum(1)
    assert entropy.min() > 1.9
    assert entropy.max() <= math.log(7) + 1e-6


def test_policies():
    observation = torch.ones(16, 1, 49)
    observation[:, 0, 33:] = torch.eye(16)
    bearings = wrap(torch.arange(16) * math.pi / 8)
    turns = STEP_TIME * ACTIONS[:, 0]
    expected = (bearings[:, None] - turns).abs().argmin(1)
    assert torch.equal(drive_straight(observation), expected)
    assert expected[0] == 3
    assert expected[4] == 0
    assert expected[12] == 6
    assert follow_gap(observation)[[0, 4, 12]].tolist() == [3, 0, 6]
    ahead = torch.ones(1, 1, 49)
    ahead[0, 0, 33:] = torch.eye(16)[0]
    ahead[0, 0, 14:20] = 0.3 / SCAN_RANGE  # something ahead, a little to the left
    assert follow_gap(ahead).item() > 3
    assert follow_gap(torch.cat([ahead[..., :33].flip(-1), ahead[..., 33:]], -1)).item() < 3
    narrow = ahead.clone()
    narrow[0, 0, :33] = torch.where(torch.arange(33) < 20, 0.35, 0.7) / SCAN_RANGE  # no direction is free for 0.8 m
    assert follow_gap(narrow).item() < 3  # there is more room on the left
    assert follow_gap(torch.cat([narrow[..., :33].flip(-1), narrow[..., 33:]], -1)).item() > 3
    seen = blind(lambda observation: observation)(ahead)
    assert (seen[..., :33] == 1).all()
    assert torch.equal(seen[..., 33:], ahead[..., 33:])
    assert ahead.min() == 0  # inputs stay as they are
    assert random_policy(generator())(torch.ones(7000, 1, 49)).bincount().min() > 900


def test_drives_end_where_they_should():
    drives = drive(drive_straight, [0, 1, 2, 3], 80, seed=5)
    for k in range(80):
        path = drives.poses[:, k]
        end = path[~path[:, 0].isnan()][-1]
        near = (end[:2] - drives.goal[k]).norm() < GOAL_RADIUS
        hit = clearance(end[None, None, :2], drives.discs[k, None], drives.segments[k, None]).item() < RADIUS
        assert bool(near & (not hit)) == bool(drives.reached[k])
        assert hit == bool(drives.collided[k])
    rates = evaluate(drive_straight, [0, 1, 2, 3], 80, seed=5)
    assert rates[0] == pytest.approx(drives.reached.double().mean().item())
    assert sum(rates) == pytest.approx(1)
    assert evaluate(drive_straight, 0, 50, seed=1)[0] > 0.95
    circling = evaluate(lambda observation: torch.zeros(len(observation), dtype=torch.long), 0, 60, seed=1)
    assert circling[0] == 0  # the circle is narrower than the distance to any goal
    assert circling[2] > 0.8


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_learns_to_drive_in_an_empty_room_and_repeats_itself():
    sensors, network = dict(rays=9), dict(layers=((8, 5, 2),), hidden=32)
    options = dict(steps=600, gamma=0.9, lr=3e-3, sensors=sensors, network=network, seed=0)
    (trained,), history = train_ga3c([[0]], [0.0], **options)
    assert evaluate(greedy(trained), 0, 60, seed=99, rays=9)[0] > 0.7
    assert history.lag.mean() > 1  # the trainer leaves a batch waiting
    assert history.lag.shape == ((600 - 10) * 32 // 160 - 1,)
    short = dict(options, steps=60, agents=8, batch=40)
    first, second = (train_ga3c([[0], [1, 2]], [0.05, 0.0], **short) for _ in range(2))
    for one, other in zip(first[0], second[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(first[1].collided, second[1].collided)
    assert first[1].reached.shape == (len(first[1].collided), 2)


def test_samples_in_the_queue_are_whole_segments_with_their_returns(monkeypatch):
    batches, rewards = [], []
    loss, step = robot_navigation.actor_critic_loss, NavigationSimulator.step

    def spy_loss(output, actions, returns, beta):
        batches.append((actions.clone(), returns.clone()))
        return loss(output, actions, returns, beta)

    def spy_step(self, actions):
        result = step(self, actions)
        rewards.append((actions.clone(), *result))
        return result

    monkeypatch.setattr(robot_navigation, "actor_critic_loss", spy_loss)
    monkeypatch.setattr(NavigationSimulator, "step", spy_step)
    train_ga3c(
        [[2]], [0.0], steps=60, agents=1, segment=4, lag=0, batch=1, gamma=0.5, seed=3, reward_scale=1.0, lr=1e-9
    )
    taken = torch.cat([actions for actions, _ in batches]).flatten()
    done = torch.cat([row[0] for row in rewards])
    assert torch.equal(taken, done[: len(taken)])  # one agent: every step once, in order
    returns = torch.cat([values for _, values in batches]).flatten()
    reward, collided = (torch.cat([row[k] for row in rewards]) for k in (1, 2))
    assert collided[: len(taken)].any()
    for t in range(len(taken) - 1):
        if collided[t]:
            assert returns[t] == reward[t]  # nothing after a collision
    chained = sum(abs(returns[t] - reward[t] - 0.5 * returns[t + 1]) < 1e-4 for t in range(len(taken) - 1))
    assert chained > len(taken) / 2  # within segments the recursion holds


# --- what a reader can get wrong --------------------------------------------------------------------------------------

ONE = torch.ones(1)
NO = torch.tensor([False])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ray_distances(HERE.expand(2, 2), degrees(0), NOTHING, BOX, 2.5), "origin"),
        (lambda: ray_distances(HERE, degrees(0), NOTHING[..., :2], BOX, 2.5), "discs"),
        (lambda: ray_distances(HERE, degrees(0), NOTHING, BOX, 0.0), "max_range"),
        (lambda: navigation_reward(ONE, ONE, ONE, ONE, 0 * ONE, NO, NO), "s must"),
        (lambda: navigation_reward(ONE, -ONE, ONE, ONE, ONE, NO, NO), "d1"),
        (lambda: NavigationSimulator(2, 4, seed=0), "levels"),
        (lambda: NavigationSimulator(2, [0, -1], seed=0), "levels"),
        (lambda: NavigationSimulator(2, [], seed=0), "levels"),
        (lambda: NavigationSimulator(0, 0, seed=0), "n="),
        (lambda: NavigationSimulator(2, 0, seed=0, horizon=0), "horizon"),
        (lambda: NavigationSimulator(2, 0, seed=0, noise=-0.1), "noise"),
        (lambda: NavigationSimulator(2, 0, seed=0, noise=torch.ones(3)), "noise"),
        (lambda: NavigationSimulator(2, 0, seed=0).step(torch.tensor([0, 7])), "actions"),
        (lambda: NavigationSimulator(2, 0, seed=0).step(torch.tensor([-1, 0])), "actions"),
        (lambda: NavigationSimulator(2, 0, seed=0).step(torch.tensor([0])), "actions"),
        (lambda: ActorCritic(2, 8, generator=generator()), "size"),
        (lambda: segment_returns(torch.ones(3, 2), torch.ones(3), 0.5), "bootstrap"),
        (lambda: segment_returns(torch.ones(3), torch.tensor(1.0), 1.5), "gamma"),
        (lambda: train_ga3c([], [], steps=100, seed=0), "levels"),
        (lambda: train_ga3c([[0]], [0.0, 0.1], steps=100, seed=0), "noise"),
        (lambda: train_ga3c([[0]], [0.0], steps=10, seed=0), "steps"),
        (lambda: train_ga3c([[0]], [0.0], steps=100, lag=-1, seed=0), "lag"),
        (lambda: train_ga3c([[]], [0.0], steps=100, seed=0), "levels"),
        (lambda: drive(drive_straight, 5, 3, seed=0), "levels"),
        (lambda: evaluate(drive_straight, 0, 0, seed=0), "n="),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
