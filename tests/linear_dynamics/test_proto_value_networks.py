"""Oracles: circulant spectra, SciPy's subspace angles, exact quantiles, breadth-first distances, the tabular limit."""

import math
import sys
from collections import deque

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import subspace_angles
from sklearn.linear_model import LinearRegression

from companion.data import DataUnavailable
from companion.linear_dynamics.proto_value_networks import (
    AtariNetwork,
    FourRooms,
    Frames,
    ProtoValueNetwork,
    dqn,
    fit_quantile_bias,
    frame_indicators,
    linear_agent,
    linear_fit_error,
    linear_q_learning,
    policy_score,
    proto_value_functions,
    q_learning,
    random_frames,
    random_network_indicators,
    successor_representation,
    td_target,
    train_proto_value_network,
)

F64 = torch.float64
MAZE = FourRooms()
P = MAZE.transition_matrix()
CORNERS = torch.tensor([MAZE.state(1, 1), MAZE.state(11, 11)])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ring(n):
    """Random walk on a circle."""
    one = torch.eye(n, dtype=F64)
    return (one.roll(1, 0) + one.roll(-1, 0)) / 2


def distances(goal):
    """Number of steps to the goal from every state, by breadth-first search on the map itself."""
    cells = (~MAZE.walls).nonzero().tolist()
    number = {tuple(cell): state for state, cell in enumerate(cells)}
    found, queue = {tuple(cells[goal]): 0}, deque([tuple(cells[goal])])
    while queue:
        row, column = queue.popleft()
        for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if cell in number and cell not in found:
                found[cell] = found[row, column] + 1
                queue.append(cell)
    return torch.tensor([found[tuple(cell)] for cell in cells])


def best_actions(goal):
    """Actions that step to a neighbour nearer to the goal."""
    return distances(goal)[MAZE.transitions].argmin(1)


# --- the maze ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [None, (1, 1)])
def test_the_maze_is_an_environment_of_gymnasium(goal):
    check_env(FourRooms(goal), skip_render_check=True)


def test_an_episode_ends_at_its_goal_or_after_sixty_steps():
    maze = FourRooms((1, 1))
    goal, far = maze.state(1, 1), distances(maze.state(1, 1))
    for seed in range(20):
        observation, _ = maze.reset(seed=seed)
        start = int(maze.observations.mv(torch.from_numpy(observation)).argmax())
        assert start != goal
        state, rewards, steps, ended = start, 0.0, 0, False
        while not ended:  # downhill in the number of steps to the goal
            action = int(far[maze.transitions[state]].argmin())
            observation, reward, terminated, truncated, _ = maze.step(action)
            state = int(maze.observations.mv(torch.from_numpy(observation)).argmax())
            rewards, steps, ended = rewards + reward, steps + 1, terminated or truncated
        assert (state, rewards, steps) == (goal, 1.0, int(far[start]))
    maze.reset(seed=0)
    outcomes = [maze.step(2)[2:4] for _ in range(60)]  # down, into a wall, for ever
    assert outcomes[-1] == (False, True)
    assert not any(truncated for _, truncated in outcomes[:-1])
    with pytest.raises(ValueError, match=r"free cell of the 13x13 map, got \(0, 0\)"):
        FourRooms((0, 0))


def test_the_maze_is_as_drawn():
    assert MAZE.n_states == 104
    assert torch.equal(P, P.mT)
    expected = torch.tensor([20, 18.03765, 17.71490, 15.78850, 8.50155, 7.48480, 7.27446], dtype=F64)
    torch.testing.assert_close(torch.linalg.svdvals(successor_representation(P, 0.95))[:7], expected, rtol=0, atol=5e-6)


def test_actions_move_to_the_neighbour_or_stay_at_walls():
    cells = (~MAZE.walls).nonzero()
    moves = torch.tensor([(-1, 0), (0, 1), (1, 0), (0, -1)])
    for action, move in enumerate(moves):
        free = ~MAZE.walls[tuple((cells + move).mT)]
        expected = torch.where(free[:, None], cells + move, cells)
        assert torch.equal(cells[MAZE.transitions[:, action]], expected)
    assert MAZE.transitions[MAZE.state(1, 1)].tolist() == [
        MAZE.state(1, 1), MAZE.state(1, 2), MAZE.state(2, 1), MAZE.state(1, 1)
    ]  # fmt: skip


def test_observations_light_the_cell_of_the_agent():
    pictures = MAZE.observations.unflatten(1, (13, 13))
    assert torch.equal(pictures.nonzero()[:, 1:], (~MAZE.walls).nonzero())
    picture = MAZE.picture(torch.arange(104.0))
    assert torch.equal(picture.isnan(), MAZE.walls)
    assert picture[11, 11] == MAZE.state(11, 11) == 103


def test_walks_follow_the_maze_and_the_policy():
    policy = (0.55, 0.15, 0.15, 0.15)
    s, a, following = MAZE.walk(400, 50, generator(), policy).unflatten(0, (50, 400)).unbind(-1)
    assert torch.equal(following, MAZE.transitions[s, a])
    assert torch.equal(s[1:], following[:-1])
    frequency = torch.bincount(a.flatten(), minlength=4) / a.numel()
    assert torch.allclose(frequency, torch.tensor(policy), atol=5 * 0.5 / a.numel() ** 0.5)
    assert len(s[0].unique()) > 95  # starts are everywhere


# --- successor representation -----------------------------------------------------------------------------------------


def test_spectrum_of_a_ring_is_known():
    values = torch.linalg.svdvals(successor_representation(ring(12), 0.9))
    expected = sorted((1 / (1 - 0.9 * math.cos(2 * math.pi * k / 12)) for k in range(12)), reverse=True)
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    np.testing.assert_allclose(values[:7], [10, *[4.53356144] * 2, *[1.81818182] * 2, 1, 1], atol=5e-9)


def test_a_directed_cycle_is_a_geometric_series():
    P = torch.eye(5, dtype=F64).roll(1, 1)
    row = successor_representation(P, 0.8)[0]
    np.testing.assert_allclose(row, [0.8**j / (1 - 0.8**5) for j in range(5)], rtol=1e-13)
    np.testing.assert_allclose(row, [1.48738696, 1.18990957, 0.95192765, 0.76154212, 0.6092337], atol=5e-9)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 12), gamma=st.floats(0, 0.99), seed=st.integers(0, 2**31))
def test_successor_representation_of_any_chain(n, gamma, seed):
    P = torch.rand(n, n, generator=generator(seed), dtype=F64).softmax(1)
    psi = successor_representation(P, gamma)
    torch.testing.assert_close(psi, torch.eye(n, dtype=F64) + gamma * P @ psi, rtol=0, atol=1e-9)  # Bellman
    torch.testing.assert_close(psi.sum(1), torch.full((n,), 1 / (1 - gamma), dtype=F64), rtol=1e-9, atol=0)
    order = torch.randperm(n, generator=generator(seed))
    torch.testing.assert_close(successor_representation(P[order][:, order], gamma), psi[order][:, order])


def test_proto_value_functions_are_laplacian_eigenvectors():
    adjacency = torch.zeros(104, 104, dtype=F64)
    for action in range(4):
        adjacency[torch.arange(104), MAZE.transitions[:, action]] = 1
    adjacency.fill_diagonal_(0)
    eigenvalues, vectors = np.linalg.eigh(torch.diag(adjacency.sum(1)) - adjacency)
    found = proto_value_functions(P, 0.95, 4)
    assert np.rad2deg(subspace_angles(found.numpy(), vectors[:, :4])).max() < 1e-8
    singular = torch.linalg.svdvals(successor_representation(P, 0.95))
    np.testing.assert_allclose(singular, 1 / (1 - 0.95 * (1 - eigenvalues / 4)), rtol=0, atol=1e-10)
    other = successor_representation(MAZE.transition_matrix((0.55, 0.15, 0.15, 0.15)), 0.95)
    assert np.rad2deg(subspace_angles(torch.linalg.svd(other)[0][:, :4].numpy(), vectors[:, :4])).max() > 10


def test_linear_fit_error_is_that_of_a_regression_with_intercept():
    features, targets = torch.randn(40, 5, generator=generator(), dtype=F64), torch.randn(40, 7, generator=generator(1))
    targets = targets.double() + 3
    fitted = torch.from_numpy(LinearRegression().fit(features, targets).predict(features))
    expected = float((targets - fitted).norm() / (targets - targets.mean(0)).norm())
    assert float(linear_fit_error(features, targets)) == pytest.approx(expected, rel=1e-12)
    dead = torch.cat([features, torch.zeros(40, 2), features[:, :1]], 1)  # dead and dependent features
    assert float(linear_fit_error(dead, targets)) == pytest.approx(expected, rel=1e-9)
    assert float(linear_fit_error(targets @ torch.randn(7, 7, generator=generator(2), dtype=F64), targets)) < 1e-12
    assert float(linear_fit_error(torch.ones(40, 1), targets)) == pytest.approx(1)
    both = linear_fit_error(torch.stack([features, 0 * features]), targets)
    assert both.tolist() == pytest.approx([expected, 1])


def test_singular_vectors_are_the_optimum():
    psi = successor_representation(P, 0.95)
    sigma = torch.linalg.svdvals(psi)
    expected = (sigma[48:].square().sum() / sigma[1:].square().sum()).sqrt()  # the constant is the first
    assert float(linear_fit_error(proto_value_functions(P, 0.95, 48), psi)) == pytest.approx(float(expected), rel=1e-9)
    assert float(expected) == pytest.approx(0.177, abs=5e-4)


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proportion", [0.05, 0.1, 0.5])
def test_indicators_are_active_on_the_share(proportion):
    tasks = random_network_indicators(MAZE.observations, 50, proportion, generator())
    assert tasks.shape == (104, 50)
    assert tasks.dtype == torch.bool
    assert ((tasks.double().mean(0) - proportion).abs() < 1 / 104).all()


def test_indicators_of_one_hot_observations_treat_all_states_alike():
    G = random_network_indicators(MAZE.observations, 20_000, 0.1, generator()).double()
    moment = G @ G.mT / 20_000
    active = 11 / 104  # of all tasks
    pair = 11 * 10 / (104 * 103)
    expected = pair + (active - pair) * torch.eye(104, dtype=F64)
    assert (moment - expected).abs().max() < 6 * (active / 20_000) ** 0.5


def test_many_tasks_find_the_singular_vectors():
    psi, exact = successor_representation(P, 0.95), proto_value_functions(P, 0.95, 4).numpy()
    G = random_network_indicators(MAZE.observations, 4000, 0.1, generator()).double()
    angles = [
        np.rad2deg(
            subspace_angles(torch.linalg.svd(psi @ G[:, :m], full_matrices=False)[0][:, :4].numpy(), exact).max()
        )
        for m in (40, 4000)
    ]
    assert angles[1] < 4
    assert angles[0] / angles[1] > 5  # m^-1/2 would give 10


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_quantile_regression_finds_the_quantile(scale):
    outputs = scale * torch.randn(104, 100, generator=generator()) + scale
    before = outputs.clone()
    bias = fit_quantile_bias(outputs, 0.1, 2000, generator(1))
    assert ((outputs + bias > 0).double().mean(0) - 0.1).abs().max() < 0.02
    assert (bias + torch.quantile(outputs, 0.9, dim=0)).abs().max() < 0.15 * scale
    assert torch.equal(outputs, before)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_the_target_converges_to_the_uniform_policy_s_values_in_the_tabular_limit():
    psi, G = successor_representation(P, 0.95), random_network_indicators(MAZE.observations, 6, 0.1, generator())
    Q, exact, errors = torch.zeros(104, 6, 4, dtype=F64), psi @ G.double(), []
    for _ in range(200):
        Q = td_target(G.double()[:, None], Q[MAZE.transitions], 0.95).transpose(1, 2)
        errors.append(float((Q.mean(-1) - exact).abs().max()))
    assert errors[-1] < 1e-3
    assert errors[-1] / errors[-2] == pytest.approx(0.95, abs=2e-3)


def test_network_is_linear_in_its_features_and_members_are_independent():
    network = ProtoValueNetwork(2, 5, 3, 4, 6, generator())
    x = torch.randn(7, 5, generator=generator(1))
    phi = network.features(x)
    assert phi.shape == (2, 7, 3)
    assert (phi >= 0).all()
    w1, b1, w2, b2, w3, b3 = (parameter[1] for parameter in network.parameters())
    by_hand = ((x @ w1 + b1).relu() @ w2 + b2).relu() @ w3 + b3
    torch.testing.assert_close(network(x)[1], by_hand.view(7, 4, 4))
    limit = (6 / (5 + 6)) ** 0.5
    assert w1.abs().max() <= limit
    assert w1.abs().max() > 0.8 * limit
    assert not b1.any()


def test_training_learns_the_values_of_the_uniform_policy_off_policy():
    policy = (0.55, 0.15, 0.15, 0.15)
    network = ProtoValueNetwork(2, 169, 48, 10, 64, generator())
    transitions = torch.stack([MAZE.walk(200, 50, generator(seed), policy) for seed in (1, 2)])
    tasks = [random_network_indicators(MAZE.observations, 10, 0.1, generator(seed)) for seed in (3, 4)]
    rewards = torch.stack(tasks).float()
    before = [tensor.clone() for tensor in (transitions, rewards)]
    losses = train_proto_value_network(
        network, transitions, MAZE.observations, rewards, steps=1500, generator=generator()
    )
    assert losses.shape == (31, 2)
    assert all(torch.equal(a, b) for a, b in zip((transitions, rewards), before, strict=True))
    values = network(MAZE.observations).mean(-1).detach().double()

    def errors(matrix):
        exact = successor_representation(matrix, 0.95) @ rewards.double()
        spread = torch.linalg.matrix_norm(exact - exact.mean(1, keepdim=True))
        return torch.linalg.matrix_norm(values - exact) / spread

    assert errors(P).max() < 0.45
    assert errors(MAZE.transition_matrix(policy)).min() > 0.6


def test_without_discount_the_network_learns_the_reward_of_the_state_left():
    network = ProtoValueNetwork(1, 169, 48, 3, 64, generator())
    rewards = random_network_indicators(MAZE.observations, 3, 0.3, generator(1)).float()[None]
    transitions = MAZE.walk(200, 50, generator(2))[None]
    train_proto_value_network(
        network, transitions, MAZE.observations, rewards, steps=400, generator=generator(), gamma=0.0
    )
    torch.testing.assert_close(network(MAZE.observations).mean(-1), rewards, rtol=0, atol=0.25)


def test_nothing_is_expected_behind_the_end_of_an_episode():
    network = ProtoValueNetwork(1, 169, 48, 3, 64, generator())
    rewards = random_network_indicators(MAZE.observations, 3, 0.3, generator(1)).float()[None]
    ends = torch.zeros(104, dtype=torch.bool)
    ends[:52] = True  # wherever the agent goes from there
    transitions = MAZE.walk(200, 50, generator(2))[None]
    options = dict(steps=1000, generator=generator(), ends=ends, gamma=0.9, batch=64)
    train_proto_value_network(network, transitions, MAZE.observations, rewards, **options)
    alive = P * (~ends).double()[:, None]
    exact = torch.linalg.solve(torch.eye(104, dtype=F64) - 0.9 * alive, rewards[0].double())
    error = (network(MAZE.observations).mean(-1)[0] - exact).abs()
    assert error[:52].mean() < 0.15
    assert error[52:].mean() < 0.35
    assert exact[52:].mean() > 1  # while the rewards are 0 or 1


# --- control ----------------------------------------------------------------------------------------------------------


def test_optimal_actions_score_one_without_exploration():
    actions = torch.stack([best_actions(int(goal)) for goal in CORNERS])
    torch.testing.assert_close(policy_score(actions, MAZE, CORNERS, epsilon=0.0), torch.ones(2, dtype=F64))
    assert (policy_score(actions, MAZE, CORNERS) < 1).all()


def test_score_is_the_discounted_length_of_paths():
    goal = MAZE.state(1, 1)
    up = torch.zeros(104, dtype=torch.long)  # reaches the goal from its own column only
    steps = distances(goal)
    below = [MAZE.state(row, 1) for row in range(2, 6)]
    expected = sum(0.9 ** (int(steps[s]) - 1) for s in below) / sum(0.9 ** (d - 1) for d in steps.tolist() if d)
    score = policy_score(up, MAZE, torch.tensor(goal), epsilon=0.0, gamma=0.9)
    assert float(score) == pytest.approx(expected, rel=1e-12)


def test_score_of_the_random_policy_agrees_with_simulation():
    goal, gamma, n = CORNERS[0], 0.95, 40_000
    state, total, alive = torch.arange(104).repeat(n // 104 + 1), 0.0, None
    state = state[state != goal]
    alive = torch.ones(len(state))
    g = generator()
    for t in range(200):
        state = MAZE.transitions[state, torch.randint(4, state.shape, generator=g)]
        total += gamma**t * alive * (state == goal)
        alive = alive * (state != goal)
    best = sum(gamma ** (d - 1) for d in distances(int(goal)).tolist() if d)
    exact = float(policy_score(torch.zeros(104, dtype=torch.long), MAZE, goal, epsilon=1.0))
    assert total.mean() * 103 / best == pytest.approx(exact, rel=0.05)


def test_values_next_to_the_goal_are_discounted_rewards():
    goals, features = CORNERS[:1].repeat(4), torch.eye(104).expand(4, -1, -1)
    tables = linear_q_learning(features, MAZE, goals, steps=6000, lr=1e-2, generator=generator())
    assert tables.shape == (10, 4, 104, 4)
    steps = distances(int(goals[0]))
    values = tables[-1].amax(-1)
    for distance, expected in ((1, 1.0), (2, 0.95), (3, 0.95**2)):
        errors = (values[:, steps == distance] - expected).abs()
        assert errors.median() < 0.03


def test_the_scale_of_features_does_not_matter_and_they_stay():
    features = torch.rand(2, 104, 6, generator=generator())
    before = features.clone()
    one = linear_q_learning(features, MAZE, CORNERS, steps=400, generator=generator())
    other = linear_q_learning(8 * features, MAZE, CORNERS, steps=400, generator=generator())
    assert torch.equal(features, before)
    torch.testing.assert_close(one, other)


def test_dqn_leaves_the_network_as_it_is():
    network = ProtoValueNetwork(2, 169, 8, 1, 8, generator())
    before = [parameter.clone() for parameter in network.parameters()]
    tables = dqn(network, MAZE, CORNERS, steps=200, records=2, generator=generator())
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert not torch.equal(tables[0], tables[1])
    assert (tables[-1] - network(MAZE.observations).squeeze(-2)).abs().max() > 0.01


# --- games ------------------------------------------------------------------------------------------------------------


class Lamp(gymnasium.Env):
    """One half of the screen is lit; its action pays 2, the other one -1. An episode has seven steps."""

    action_space = gymnasium.spaces.Discrete(2)
    observation_space = gymnasium.spaces.Box(0, 255, (210, 160), np.uint8)
    noise = np.random.default_rng(0).integers(0, 60, (210, 160), dtype=np.uint8)

    def __init__(self, obs_type):
        assert obs_type == "grayscale"

    def picture(self):
        self.lit = int(self.np_random.integers(2))
        picture = self.noise.copy()
        picture[:, 80 * self.lit : 80 * self.lit + 80] += 180
        return picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age = 0
        return self.picture(), {}

    def step(self, action):
        reward, self.age = 2.0 if action == self.lit else -1.0, self.age + 1
        return self.picture(), reward, self.age == 7, False, {}


@pytest.fixture
def lamp():
    gymnasium.register("Lamp-v0", Lamp)
    yield "Lamp-v0"
    del gymnasium.registry["Lamp-v0"]


def lit(screens):
    """Which half is bright."""
    return (screens[..., 42:].float().mean((-1, -2)) > screens[..., :42].float().mean((-1, -2))).long()


def test_frames_are_screens_actions_and_episodes(lamp):
    before = torch.get_rng_state()
    frames = random_frames(lamp, 100, generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert len(frames) == 100
    assert frames.n_actions == 2
    steps = torch.arange(100)
    assert torch.equal(frames.ends, steps % 7 == 6)
    assert torch.equal(frames.first, steps - steps % 7)
    assert 30 < frames.actions.sum() < 70
    assert torch.equal(frames.transitions, torch.stack([steps[:-1], frames.actions[:-1], steps[1:]], 1))
    picture = Lamp.noise.copy()
    half = slice(80, 160) if lit(frames.screens[0]) else slice(0, 80)
    picture[:, half] += 180
    small = np.asarray(Image.fromarray(picture).resize((84, 84), Image.Resampling.BILINEAR))
    assert np.abs(small.astype(int) - frames.screens[0].numpy()).max() <= 1
    again = random_frames(lamp, 100, generator())
    assert torch.equal(again.screens, frames.screens)


def test_a_state_is_four_screens_of_one_episode():
    screens = torch.arange(8, dtype=torch.uint8)[:, None, None].expand(8, 84, 84)
    none = torch.zeros(8, dtype=torch.long)
    frames = Frames(screens, torch.tensor([0, 0, 0, 0, 0, 5, 5, 5]), none, none > 0, 3)
    states = frames[torch.tensor([[0, 2], [4, 7]])]
    assert states.shape == (2, 2, 4, 84, 84)
    seen = (255 * states[..., 0, 0]).round().long()
    assert seen.tolist() == [[[0, 0, 0, 0], [0, 0, 1, 2]], [[1, 2, 3, 4], [5, 5, 6, 7]]]


def test_the_encoder_is_the_one_of_deep_q_learning():
    network = AtariNetwork(5, 3, generator())
    assert sum(parameter.numel() for parameter in network.encoder.parameters()) == 1_684_128
    x = torch.rand(1, 2, 4, 84, 84, generator=generator(1))
    phi = network.features(x)
    assert phi.shape == (1, 2, 512)
    assert (phi >= 0).all()
    torch.testing.assert_close(network.features(x[0])[1], phi[0, 1], rtol=1e-4, atol=1e-5)
    assert network(x).shape == (1, 2, 5, 3)
    torch.testing.assert_close(network(x)[..., 4, 2], phi @ network.heads.weight[0, :, 14])


def test_indicators_of_screens_are_active_on_the_share():
    screens = torch.randint(0, 256, (300, 84, 84), generator=generator(), dtype=torch.uint8)
    steps = torch.arange(300)
    frames = Frames(screens, 0 * steps, 0 * steps, steps < 0, 2)
    tasks = frame_indicators(frames, 20, 0.1, 1000, generator(1))
    assert tasks.shape == (300, 20)
    assert ((tasks.double().mean(0) - 0.1).abs() < 0.03).all()
    assert len(tasks.unique(dim=1)[0]) == 20


def test_a_linear_head_learns_to_play(lamp):
    frames = random_frames(lamp, 50, generator())
    network = AtariNetwork(1, 2, generator(1))
    before = [parameter.clone() for parameter in network.parameters()], torch.get_rng_state()
    played = linear_agent(network, frames, lamp, steps=700, lr=0.02, gamma=0.5, generator=generator(2))
    assert all(torch.equal(a, b) for a, b in zip(before[0], network.parameters(), strict=True))
    assert torch.equal(before[1], torch.get_rng_state())
    assert played.step.tolist() == list(range(7, 701, 7))
    assert -3 < played.score[:10].mean() < 10  # 3.5 by chance
    assert played.score[-30:].mean() > 13  # of 14


def test_pong_is_played():
    pytest.importorskip("ale_py")
    frames = random_frames("ALE/Pong-v5", 120, generator())
    assert frames.n_actions == 6
    assert not frames.ends.any()  # a game takes longer
    assert frames.screens[0].float().std() > 5
    assert (frames.screens[1:] != frames.screens[:-1]).flatten(1).any(1).float().mean() > 0.5  # something moves


def test_a_missing_game_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(DataUnavailable, match=r"ALE/Pong-v5.*ale-py.*BOOK_PROFILE=book"):
        random_frames("ALE/Pong-v5", 10, generator())


# --- errors -----------------------------------------------------------------------------------------------------------


NETWORK = ProtoValueNetwork(1, 169, 4, 2, 4, generator())
DATA = MAZE.walk(1, 5, generator())[None]
REWARDS = torch.zeros(1, 104, 2)


def train(transitions=DATA, rewards=REWARDS, **options):
    options = {"steps": 1, "generator": generator(), **options}
    return train_proto_value_network(NETWORK, transitions, MAZE.observations, rewards, **options)


STEPS = torch.arange(3)
DARK = Frames(torch.zeros(3, 84, 84, dtype=torch.uint8), 0 * STEPS, 0 * STEPS, STEPS < 0, 2)


def agent(**options):
    options = {"steps": 250, "generator": generator(), **options}
    return linear_agent(AtariNetwork(1, 2, generator()), DARK, "Lamp-v0", **options)


def control(goals=CORNERS[:1], **options):
    table = torch.zeros(1, 104, 4, requires_grad=True)
    return q_learning(
        lambda: 1 * table, [table], MAZE, goals, **{"steps": 40, "lr": 0.1, "generator": generator(), **options}
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: MAZE.state(0, 3), "row and column"),
        (lambda: MAZE.state(1, 13), "row and column"),
        (lambda: MAZE.transition_matrix((0.5, 0.5)), "policy"),
        (lambda: MAZE.walk(0, 5, generator()), "episodes"),
        (lambda: MAZE.walk(1, 5, generator(), (1.5, -0.5, 0, 0)), "policy"),
        (lambda: successor_representation(torch.ones(3, 2), 0.5), "square"),
        (lambda: successor_representation(torch.ones(3, 3), 0.5), "sum to 1"),
        (lambda: successor_representation(torch.tensor([[1.5, -0.5], [0, 1]]), 0.5), "non-negative"),
        (lambda: successor_representation(torch.full((2, 2), math.nan), 0.5), "non-negative"),
        (lambda: successor_representation(torch.eye(2), 1.0), "gamma"),
        (lambda: proto_value_functions(torch.eye(2), 0.5, 3), "d must"),
        (lambda: linear_fit_error(torch.ones(3, 1), torch.ones(4, 1)), "features"),
        (lambda: random_network_indicators(torch.ones(3), 5, 0.1, generator()), "observations"),
        (lambda: random_network_indicators(torch.full((2, 2), math.nan), 5, 0.1, generator()), "observations"),
        (lambda: random_network_indicators(torch.eye(3), 0, 0.1, generator()), "tasks"),
        (lambda: random_network_indicators(torch.eye(3), 5, 1.0, generator()), "proportion"),
        (lambda: fit_quantile_bias(torch.ones(3), 0.1, 10, generator()), "outputs"),
        (lambda: fit_quantile_bias(torch.ones(3, 2), 0.0, 10, generator()), "proportion"),
        (lambda: fit_quantile_bias(torch.ones(3, 2), 0.1, 1, generator()), "steps"),
        (lambda: ProtoValueNetwork(1, 169, 0, 1, 4, generator()), "features"),
        (lambda: train(rewards=torch.zeros(1, 104, 3)), "rewards"),
        (lambda: train(transitions=DATA[0]), "transitions"),
        (lambda: train(gamma=1.0), "gamma"),
        (lambda: train(tau=1.0), "tau"),
        (lambda: train(batch=0), "batch"),
        (lambda: train(ends=torch.ones(3, dtype=torch.bool)), "ends"),
        (lambda: random_frames("Lamp-v0", 1, generator()), "n must"),
        (lambda: AtariNetwork(0, 2, generator()), "tasks"),
        (lambda: frame_indicators(DARK, 2, 1.0, 10, generator()), "proportion"),
        (lambda: agent(steps=249), "steps"),
        (lambda: agent(lr=0.0), "lr"),
        (lambda: agent(gamma=1.0), "gamma"),
        (agent, "zero"),
        (lambda: control(goals=torch.tensor([104])), "goals"),
        (lambda: control(gamma=-0.1), "gamma"),
        (lambda: control(steps=30), "steps"),
        (lambda: control(lr=0.0), "lr"),
        (
            lambda: linear_q_learning(torch.ones(2, 104, 3), MAZE, CORNERS[:1], steps=40, generator=generator()),
            "features",
        ),
        (lambda: linear_q_learning(torch.zeros(1, 104, 3), MAZE, CORNERS[:1], steps=40, generator=generator()), "zero"),
        (lambda: dqn(NETWORK, MAZE, CORNERS[:1], steps=40, generator=generator()), "network"),
        (lambda: policy_score(torch.full((104,), 4), MAZE, CORNERS[0]), "actions"),
        (lambda: policy_score(torch.zeros(104, dtype=torch.long), MAZE, torch.tensor(-1)), "goals"),
        (lambda: policy_score(torch.zeros(104, dtype=torch.long), MAZE, CORNERS[0], epsilon=2.0), "epsilon"),
        (lambda: policy_score(torch.zeros(104, dtype=torch.long), MAZE, CORNERS[0], gamma=1.0), "gamma"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
