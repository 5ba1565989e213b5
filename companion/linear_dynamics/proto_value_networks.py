"""Proto-value networks: features learned by predicting the values of many random indicator rewards.

Farebrother, Greaves, Agarwal, Le Lan, Goroshin, Castro and Bellemare, "Proto-Value Networks: Scaling Representation
Learning with Auxiliary Tasks", ICLR 2023 (arXiv 2304.12567).

``P`` is the transition matrix of the uniform random policy on ``n`` states, ``γ`` the discount and
``Ψ = (I - γP)^-1`` the successor representation. A task is a reward of 0 or 1 on the states, a column of ``G``; its
value function is the same column of ``ΨG``. "Equation (n)" means the numbering of the tutorial. Several seeds or runs
lie on the first axis of a tensor and are computed side by side. The last part holds what Atari games need besides.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import trange

from companion.data import DataUnavailable
from companion.training import fit

_MAP = (
    "#############",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#.....#.....#",
    "##.####.....#",
    "#.....###.###",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#############",
)
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left
_LIMIT = 60  # steps of an episode that does not find its goal
_N_STEP = 5  # rewards that a return of Q-learning sums before it bootstraps


class FourRooms(gymnasium.Env):
    """A maze of four rooms; an agent that walks into a wall stays where it is.

    States are the free cells, row by row. An observation is the 13x13 picture of the maze with a one at the agent. As
    an environment of gymnasium it starts anywhere but on the goal, pays 1 on entering the goal, which ends the episode,
    and gives up after 60 steps. The functions below use the table of transitions instead, many runs at once.

    Parameters
    ----------
    goal
        Row and column of the goal; without one there is no reward.

    Attributes
    ----------
    walls
        (13, 13), true on walls.
    transitions
        (n, 4), the next state for the actions up, right, down and left.
    observations
        (n, 169), one-hot.

    Raises
    ------
    ValueError
        If the goal is a wall or outside the map.
    """

    def __init__(self, goal: tuple[int, int] | None = None) -> None:
        self.walls: Bool[Tensor, "13 13"] = torch.tensor([[cell == "#" for cell in row] for row in _MAP])
        cells = (~self.walls).nonzero()
        self.n_states = len(cells)
        number = torch.full_like(self.walls, -1, dtype=torch.long)
        number[~self.walls] = torch.arange(self.n_states)
        ahead = cells[:, None] + torch.tensor(_MOVES)
        following = number[ahead[..., 0], ahead[..., 1]]
        self.transitions: Int[Tensor, "n 4"] = torch.where(following < 0, number[~self.walls][:, None], following)
        self.observations: Float[Tensor, "n 169"] = torch.eye(self.walls.numel())[(~self.walls).flatten()]
        self._number = number
        self.action_space = gymnasium.spaces.Discrete(len(_MOVES))
        self.observation_space = gymnasium.spaces.Box(0, 1, (self.walls.numel(),), np.float32)
        self._goal = None if goal is None else self.state(*goal)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode; gymnasium's interface."""
        super().reset(seed=seed)
        self._at = int(self.np_random.choice([state for state in range(self.n_states) if state != self._goal]))
        self._age = 0
        return self.observations[self._at].numpy().copy(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Move; gymnasium's interface."""
        self._at = int(self.transitions[self._at, action])
        self._age += 1
        arrived = self._at == self._goal
        return self.observations[self._at].numpy().copy(), float(arrived), arrived, self._age >= _LIMIT, {}

    def state(self, row: int, column: int) -> int:
        """The state of a cell; a cell on a wall or outside the map raises ValueError."""
        inside = 0 <= row < len(self.walls) and 0 <= column < len(self.walls)
        if not inside or self.walls[row, column]:
            raise ValueError(f"row and column must name a free cell of the 13x13 map, got ({row}, {column})")
        return int(self._number[row, column])

    def transition_matrix(self, policy: Sequence[float] = (0.25,) * 4) -> Float[Tensor, "n n"]:
        """Float64 transition matrix of a policy that takes the four actions with the given probabilities everywhere."""
        _check_policy(policy)
        moves = torch.eye(self.n_states, dtype=torch.float64)[self.transitions]
        return torch.einsum("a,san->sn", torch.tensor(policy, dtype=torch.float64), moves)

    def picture(self, values: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch 13 13"]:
        """Values of the states, laid out on the map; NaN on walls."""
        result = torch.full((*values.shape[:-1], *self.walls.shape), torch.nan, dtype=values.dtype)
        result[..., ~self.walls] = values
        return result

    def walk(
        self, episodes: int, length: int, generator: torch.Generator, policy: Sequence[float] = (0.25,) * 4
    ) -> Int[Tensor, "episodes*length 3"]:
        """Transitions ``(s, a, s')`` of random walks without reward, each from a state drawn uniformly.

        Raises
        ------
        ValueError
            If a number is not positive or ``policy`` is no distribution over the four actions.
        """
        if episodes < 1 or length < 1:
            raise ValueError(f"episodes and length must be at least 1, got {episodes=} and {length=}")
        _check_policy(policy)
        state, steps = torch.randint(self.n_states, (episodes,), generator=generator), []
        for _ in range(length):
            action = torch.tensor(policy).multinomial(episodes, replacement=True, generator=generator)
            following = self.transitions[state, action]
            steps.append(torch.stack([state, action, following], 1))
            state = following
        return torch.cat(steps)


def _check_policy(policy: Sequence[float]) -> None:
    """Raise unless ``policy`` is a distribution over four actions."""
    if len(policy) != len(_MOVES) or min(policy) < 0 or abs(sum(policy) - 1) > 1e-9:
        raise ValueError(f"policy must hold four probabilities that sum to 1, got {tuple(policy)}")


def _check_gamma(gamma: float) -> None:
    """Raise unless ``gamma`` is a discount."""
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must lie in [0, 1), got {gamma}")


# --- the exact object -------------------------------------------------------------------------------------------------


def successor_representation(P: Float[Tensor, "n n"], gamma: float) -> Float[Tensor, "n n"]:
    """Expected discounted number of visits, ``Ψ = Σ_t (γP)^t = (I - γP)^-1``: row = start, column = visited state.

    Raises
    ------
    ValueError
        If ``P`` is no square matrix of non-negative rows that sum to 1, or ``gamma`` is not in [0, 1).

    Notes
    -----
    Source: equation (1); the sum of columns over a set of states is the successor measure of that set.
    """
    if P.ndim != 2 or P.shape[0] != P.shape[1]:
        raise ValueError(f"P must be a square matrix, got shape {tuple(P.shape)}")
    if not (P >= 0).all() or not torch.allclose(P.sum(1), torch.ones_like(P[0])):
        raise ValueError(f"P must have non-negative rows that sum to 1, got least entry {P.min()}, sums {P.sum(1)}")
    _check_gamma(gamma)
    identity = torch.eye(len(P), dtype=P.dtype, device=P.device)
    return torch.linalg.solve(identity - gamma * P, identity)


def proto_value_functions(P: Float[Tensor, "n n"], gamma: float, d: int) -> Float[Tensor, "n d"]:
    """The ``d`` leading left singular vectors of the successor representation.

    Raises
    ------
    ValueError
        As for :func:`successor_representation`, and if ``d`` is not between 1 and ``n``.
    """
    if not 1 <= d <= len(P):
        raise ValueError(f"d must be between 1 and the number of states, {len(P)}, got {d}")
    return torch.linalg.svd(successor_representation(P, gamma))[0][:, :d]


def linear_fit_error(features: Float[Tensor, "*batch n d"], targets: Float[Tensor, "n m"]) -> Float[Tensor, " *batch"]:
    """``‖T - [Φ, 1]X‖ / ‖T - column means‖`` for the best ``X``: 0 if features and a constant span all targets.

    Raises
    ------
    ValueError
        If features and targets have different numbers of states.
    """
    if features.shape[-2] != len(targets):
        raise ValueError(f"features must have the {len(targets)} rows of targets, got {tuple(features.shape)}")
    phi, centred = features.double() - features.double().mean(-2, keepdim=True), targets - targets.mean(0)
    fitted = phi @ (torch.linalg.pinv(phi) @ centred)  # features may be dependent, or dead
    return torch.linalg.matrix_norm(centred - fitted) / torch.linalg.matrix_norm(centred)


# --- the tasks --------------------------------------------------------------------------------------------------------


def _check_proportion(proportion: float) -> None:
    """Raise unless ``proportion`` is one."""
    if not 0 < proportion < 1:
        raise ValueError(f"proportion must lie strictly between 0 and 1, got {proportion}")


def random_network_indicators(
    observations: Float[Tensor, "n k"], tasks: int, proportion: float, generator: torch.Generator
) -> Bool[Tensor, "n tasks"]:
    """Rewards ``1[f(s) + b > 0]``: one random network ``f`` and one bias per task, active on a share of the states.

    The networks have one hidden layer of 32 rectified units and standard normal weights. The bias is the exact
    quantile over all observations, which :func:`fit_quantile_bias` approaches from samples.

    Raises
    ------
    ValueError
        If ``tasks`` is not positive, ``proportion`` not in (0, 1), or ``observations`` no finite matrix.

    Notes
    -----
    Source: the paper's random network indicators; equation (4).
    """
    if observations.ndim != 2 or not observations.isfinite().all():
        raise ValueError(f"observations must be a finite (n, k) matrix, got shape {tuple(observations.shape)}")
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, got {tasks}")
    _check_proportion(proportion)
    hidden = 32
    first = torch.randn(observations.shape[1], tasks * hidden, generator=generator)
    second = torch.randn(tasks, hidden, generator=generator)
    outputs = torch.einsum("nth,th->nt", (observations @ first).relu().unflatten(1, (tasks, hidden)), second)
    return outputs > torch.quantile(outputs, 1 - proportion, dim=0)


def fit_quantile_bias(
    outputs: Float[Tensor, "n m"], proportion: float, steps: int, generator: torch.Generator
) -> Float[Tensor, " m"]:
    """Biases under which ``outputs + bias`` is positive on a share ``proportion``, by stochastic gradient descent.

    Minimises the pinball loss of ``z = f + b``, whose slope in ``b`` is ``(1 - p) - 1[z < 0]``, from 32 rows a step.
    The step size falls as ``t^-1/2``, and the second half of the path is averaged.

    Raises
    ------
    ValueError
        If ``outputs`` is no finite matrix, ``proportion`` is not in (0, 1), or ``steps`` is smaller than 2.

    Notes
    -----
    Source: the quantile regression of the paper; equation (5).
    """
    if outputs.ndim != 2 or not outputs.isfinite().all():
        raise ValueError(f"outputs must be a finite (n, m) matrix, got shape {tuple(outputs.shape)}")
    _check_proportion(proportion)
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    scale = outputs.std(0)
    bias, average = -outputs.mean(0), torch.zeros_like(scale)
    for step, rows in enumerate(torch.randint(len(outputs), (steps, 32), generator=generator)):
        slope = (1 - proportion) - (outputs[rows] + bias < 0).to(bias.dtype).mean(0)
        bias = bias - scale * (step + 1) ** -0.5 * slope
        if step >= steps // 2:
            average += bias / (steps - steps // 2)
    return average


# --- the network ------------------------------------------------------------------------------------------------------


class _BatchedLinear(nn.Module):
    """A linear layer for each member; Xavier's uniform weights, biases zero."""

    def __init__(self, members: int, n_in: int, n_out: int, generator: torch.Generator) -> None:
        super().__init__()
        limit = (6 / (n_in + n_out)) ** 0.5
        draw = torch.rand(members, n_in, n_out, generator=generator)
        self.weight = nn.Parameter(limit * (2 * draw - 1))
        self.bias = nn.Parameter(torch.zeros(members, 1, n_out))

    def forward(self, x: Float[Tensor, "*members batch n_in"]) -> Float[Tensor, "members batch n_out"]:
        return x @ self.weight + self.bias


class ProtoValueNetwork(nn.Module):
    """Action values of all tasks, linear in shared features: ``Q(s, a) = W_a φ(s) + c_a``.

    Parameters
    ----------
    members
        Number of networks that are held side by side, one per seed.
    inputs, features, tasks
        Sizes of observations, of ``φ`` (which ends in a rectifier) and number of tasks; there are four actions.
    width
        Units of the one hidden layer.
    generator
        Source of the initial weights.

    Raises
    ------
    ValueError
        If a size is smaller than 1.
    """

    def __init__(
        self, members: int, inputs: int, features: int, tasks: int, width: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.actions = len(_MOVES)
        sizes = dict(members=members, inputs=inputs, features=features, tasks=tasks, width=width)
        if min(sizes.values()) < 1:
            raise ValueError(f"{', '.join(sizes)} must be at least 1, got {sizes}")
        first = _BatchedLinear(members, inputs, width, generator)
        second = _BatchedLinear(members, width, features, generator)
        self.features = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.heads = _BatchedLinear(members, features, tasks * self.actions, generator)

    def forward(self, x: Float[Tensor, "*members batch inputs"]) -> Float[Tensor, "members batch tasks 4"]:
        return self.heads(self.features(x)).unflatten(-1, (-1, self.actions))


def td_target(
    rewards: Float[Tensor, "*batch tasks"],
    next_values: Float[Tensor, "*batch tasks actions"],
    gamma: float | Float[Tensor, "*batch 1"],
) -> Float[Tensor, "*batch tasks"]:
    """Expected SARSA for the uniform policy, ``y = G(s) + γ mean_a' Q(s', a')``, whoever chose the actions of the data.

    Where an episode ends, ``γ`` is to be 0.

    Notes
    -----
    Source: equation (6). The reward is that of the state left, so that the fixed point is ``ΨG``.
    """
    return rewards + gamma * next_values.mean(-1)


def train_proto_value_network(
    network: ProtoValueNetwork | AtariNetwork,
    transitions: Int[Tensor, "members N 3"],
    observations: Float[Tensor, "n inputs"] | Frames,
    rewards: Float[Tensor, "members n tasks"],
    *,
    steps: int,
    generator: torch.Generator,
    ends: Bool[Tensor, " n"] | None = None,
    gamma: float = 0.95,
    tau: float = 0.97,
    batch: int = 128,
    lr: float = 3e-3,
    eps: float = 1e-5,
) -> Float[Tensor, "records members"]:
    """Learn the values of all tasks from stored transitions; the members of the network are trained in place.

    Parameters
    ----------
    network
        To be trained.
    transitions
        Stored ``(s, a, s')`` for each member, from any policy.
    observations, rewards
        What is seen in each state, and the reward of every task there.
    steps, batch
        Number of steps, and of transitions in each.
    generator
        Draws the batches.
    ends
        States that end an episode when they are left; None if there are none.
    gamma, tau
        Discount, and inertia of the target network: ``θ⁻ ← τ θ⁻ + (1 - τ) θ``.
    lr, eps
        Learning rate and ``ε`` of Adam.

    Returns
    -------
    Tensor
        The loss at the first step and after every 50.

    Raises
    ------
    ValueError
        If the numbers of members, states or tasks do not agree, ``gamma`` or ``tau`` is not in [0, 1), or ``batch``
        is not positive.
    """
    members, _, outputs = network.heads.weight.shape
    expected = (members, len(observations), outputs // network.actions)
    if rewards.shape != expected:
        raise ValueError(f"rewards must be (members, states, tasks) = {expected}, got {tuple(rewards.shape)}")
    if transitions.ndim != 3 or transitions.shape[::2] != (members, 3):
        raise ValueError(f"transitions must be ({members}, N, 3), got {tuple(transitions.shape)}")
    if ends is not None and ends.shape != expected[1:2]:
        raise ValueError(f"ends must have one entry for each of {expected[1]} states, got {tuple(ends.shape)}")
    _check_gamma(gamma)
    if not 0 <= tau < 1 or batch < 1:
        raise ValueError(f"tau must lie in [0, 1) and batch be positive, got {tau=}, {batch=}")
    target = copy.deepcopy(network).requires_grad_(False)
    member = torch.arange(members)[:, None]

    def loss(_: int) -> Float[Tensor, " members"]:
        rows = torch.randint(transitions.shape[1], (members, batch), generator=generator)
        s, a, following = transitions[member, rows].unbind(-1)
        for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
            slow.lerp_(fast.detach(), 1 - tau)
        discount = gamma if ends is None else gamma * (~ends[s][..., None]).to(rewards.device)
        y = td_target(rewards[member, s], target(observations[following]), discount)
        chosen = a[..., None, None].expand(*y.shape, 1).to(y.device)
        q = network(observations[s]).gather(-1, chosen).squeeze(-1)
        return 0.5 * (y - q).square().mean((1, 2))

    adam = partial(torch.optim.Adam, eps=eps, fused=True)
    return fit(loss, network.parameters(), steps=steps, lr=lr, optimizer=adam, record_every=50)["loss"]


# --- control ----------------------------------------------------------------------------------------------------------


def _n_step(
    first: Int[Tensor, "runs batch"], rewards: Tensor, ended: Bool[Tensor, "runs steps"], gamma: float
) -> tuple[Float[Tensor, "runs batch"], Int[Tensor, "runs batch"]]:
    """Discounted sum of five rewards from each past moment, and the moment of the last of them.

    What lies behind the end of an episode does not count.
    """
    window = first[..., None] + torch.arange(_N_STEP)
    each = torch.arange(len(first))[:, None, None]
    over = ended[each, window].long()
    alive = (over.cumsum(-1) - over) == 0
    gain = (alive * gamma ** torch.arange(_N_STEP) * rewards[each, window]).sum(-1)
    return gain, first + alive.sum(-1) - 1


def q_learning(
    values: Callable[[], Float[Tensor, "runs n 4"]],
    parameters: Iterable[Tensor],
    maze: FourRooms,
    goals: Int[Tensor, " runs"],
    *,
    steps: int,
    lr: float,
    generator: torch.Generator,
    gamma: float = 0.95,
    records: int = 10,
) -> Float[Tensor, "records runs n 4"]:
    """Deep Q-learning with 5-step returns for the reward 1 at the goal, many runs side by side.

    An episode starts in a random state and ends at the goal, or after 60 steps. Actions are ε-greedy (ε = 0.1, the
    first 200 all random). Every second step one batch of 64 past transitions gives an Adam step; every 50 updates the
    target table is renewed. As the maze is small, values are always computed for all of its states.

    Parameters
    ----------
    values
        Computes the table of action values of every run from ``parameters``, which are trained in place.
    goals
        The state of the goal in each run.
    steps
        Interactions with the maze in each run.
    records
        How often the table is kept, at equal distances; the last one is final.

    Raises
    ------
    ValueError
        If a goal is no state, ``gamma`` is not in [0, 1), ``lr`` is not positive, or ``steps`` does not reach
        20 or is not a multiple of ``2 * records``.
    """
    if goals.min() < 0 or goals.max() >= maze.n_states:
        raise ValueError(f"goals must be states from 0 to {maze.n_states - 1}, got {goals.tolist()}")
    _check_gamma(gamma)
    if steps < 20 or records < 1 or steps % (2 * records) or not lr > 0:
        raise ValueError(f"steps must be 20 or more and a multiple of 2 * records, lr > 0: {steps=}, {records=}, {lr=}")
    runs = len(goals)
    run, each = torch.arange(runs), torch.arange(runs)[:, None]
    starts = torch.randint(maze.n_states, (steps + 1, runs), generator=generator)
    explore = torch.rand(steps, runs, generator=generator) < 0.1
    explore[:200] = True
    random_action = torch.randint(len(_MOVES), (steps, runs), generator=generator)
    s, a, following = torch.zeros(3, runs, steps, dtype=torch.long)
    reached, ended = torch.zeros(2, runs, steps, dtype=torch.bool)
    update = torch.optim.Adam(list(parameters), lr=lr, fused=True)
    state, age = starts[-1], torch.zeros(runs, dtype=torch.long)
    kept, target = [], values().detach().amax(-1)
    for t in trange(steps, leave=False):
        if t % 2 == 0:
            table = values()
        ties = 1e-6 * torch.rand(runs, len(_MOVES), generator=generator)  # a head that starts at zero has only ties
        greedy = (table.detach()[run, state] + ties).argmax(-1)
        s[:, t], a[:, t] = state, torch.where(explore[t], random_action[t], greedy)
        following[:, t] = maze.transitions[state, a[:, t]]
        age += 1
        reached[:, t] = following[:, t] == goals
        ended[:, t] = reached[:, t] | (age == _LIMIT)
        state = torch.where(ended[:, t], starts[t], following[:, t])
        age[ended[:, t]] = 0
        if t % 2 == 0 or t < _N_STEP:
            continue
        first = torch.randint(t - _N_STEP + 2, (runs, 64), generator=generator)
        gain, end = _n_step(first, reached, ended, gamma)
        y = gain + gamma ** (end - first + 1) * target[each, following[each, end]] * ~reached[each, end]
        q = table[each, s[each, first], a[each, first]]
        update.zero_grad()
        (0.5 * (y - q).square().mean(1)).sum().backward()
        update.step()
        if t % 100 == 99:
            target = values().detach().amax(-1)
        if (t + 1) % (steps // records) == 0:
            kept.append(values().detach())
    return torch.stack(kept)


def linear_q_learning(
    features: Float[Tensor, "runs n d"], maze: FourRooms, goals: Int[Tensor, " runs"], *, lr: float = 5e-3, **options
) -> Float[Tensor, "records runs n 4"]:
    """:func:`q_learning` of a linear head on frozen features, scaled to a mean square norm of 1; it starts at zero.

    Raises
    ------
    ValueError
        As for :func:`q_learning`, and if features do not have the shape (runs, states, d) or are all zero.
    """
    if features.ndim != 3 or features.shape[:2] != (len(goals), maze.n_states):
        raise ValueError(f"features must be ({len(goals)}, {maze.n_states}, d), got {tuple(features.shape)}")
    size = features.square().sum(-1, keepdim=True).mean(1, keepdim=True).sqrt()
    if not (size > 0).all():
        raise ValueError("features are all zero in a run; nothing can be learned from them")
    phi = features.detach() / size
    w = torch.zeros(len(goals), phi.shape[-1], len(_MOVES), requires_grad=True)
    c = torch.zeros(len(goals), 1, len(_MOVES), requires_grad=True)
    return q_learning(lambda: phi @ w + c, [w, c], maze, goals, lr=lr, **options)


def dqn(
    network: ProtoValueNetwork, maze: FourRooms, goals: Int[Tensor, " runs"], *, lr: float = 1e-3, **options
) -> Float[Tensor, "records runs n 4"]:
    """:func:`q_learning` of whole networks with one task, one member per run, from a copy of their present weights.

    Raises
    ------
    ValueError
        As for :func:`q_learning`, and if the network does not have one member per run and one task.
    """
    if network.heads.bias.shape != (len(goals), 1, len(_MOVES)):
        raise ValueError(f"network must have {len(goals)} members and 1 task, got {tuple(network.heads.bias.shape)}")
    learner = copy.deepcopy(network)
    return q_learning(
        lambda: learner(maze.observations).squeeze(-2), learner.parameters(), maze, goals, lr=lr, **options
    )


def policy_score(
    actions: Int[Tensor, "*runs n"],
    maze: FourRooms,
    goals: Int[Tensor, " *runs"],
    *,
    epsilon: float = 0.05,
    gamma: float = 0.95,
) -> Float[Tensor, " *runs"]:
    """Exact value of the ε-greedy policy over that of the optimal policy, both summed over all starts but the goal.

    The small ε lets a deterministic policy leave loops. 1 is optimal, and needs ``epsilon = 0``.

    Raises
    ------
    ValueError
        If actions are not from 0 to 3, a goal is no state, or ``epsilon`` or ``gamma`` is out of range.
    """
    if actions.shape != (*goals.shape, maze.n_states) or actions.min() < 0 or actions.max() >= len(_MOVES):
        raise ValueError(
            f"actions must be {(*goals.shape, maze.n_states)} with entries 0 to 3, got {tuple(actions.shape)}"
        )
    if goals.min() < 0 or goals.max() >= maze.n_states:
        raise ValueError(f"goals must be states from 0 to {maze.n_states - 1}, got {goals.tolist()}")
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must lie in [0, 1], got {epsilon}")
    _check_gamma(gamma)
    identity = torch.eye(maze.n_states, dtype=torch.float64)
    at_goal = identity[goals]  # (*runs, n)
    greedy = identity[maze.transitions[torch.arange(maze.n_states), actions]]  # (*runs, n, n)
    P = (1 - epsilon) * greedy + epsilon * maze.transition_matrix()
    reward = P @ at_goal[..., None]
    value = torch.linalg.solve(identity - gamma * P * (1 - at_goal)[..., None, :], reward).squeeze(-1)
    best = torch.zeros_like(value)
    for _ in range(maze.n_states):  # deterministic: exact after as many sweeps as the longest path has steps
        best = (at_goal + gamma * (1 - at_goal) * best)[..., maze.transitions].amax(-1)
    start = 1 - at_goal
    return (start * value).sum(-1) / (start * best).sum(-1)


# --- Atari games ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frames:
    """Experience in a game. State ``t`` is what is seen before step ``t``: the last four screens of its episode."""

    screens: Int[Tensor, "n 84 84"]  # grey values from 0 to 255
    first: Int[Tensor, " n"]  # the state in which the episode of each state began
    actions: Int[Tensor, " n"]
    ends: Bool[Tensor, " n"]  # whether the game was over after the step
    n_actions: int

    def __len__(self) -> int:
        return len(self.screens)

    def __getitem__(self, states: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch 4 84 84"]:
        rows = states[..., None] - torch.arange(3, -1, -1)
        return self.screens[rows.maximum(self.first[states][..., None])] / 255

    def to(self, device: torch.device) -> Frames:
        """The same with the screens on a device."""
        return replace(self, screens=self.screens.to(device))

    @property
    def transitions(self) -> Int[Tensor, "N 3"]:
        """``(s, a, s')``; behind the end of an episode ``s'`` has no meaning, and the last state has no successor."""
        states = torch.arange(len(self) - 1)
        return torch.stack([states, self.actions[:-1], states + 1], 1)


def _open(game: str) -> gymnasium.Env:
    """A game that shows grey pictures. Those of the Arcade Learning Environment need the package ale-py."""
    if game.startswith("ALE/"):
        try:
            import ale_py
        except ImportError as error:
            raise DataUnavailable(
                f"the game {game!r} could not be had: {error}. Install the package ale-py, or set BOOK_PROFILE=book, "
                "which plays no game."
            ) from error
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        gymnasium.register_envs(ale_py)
    return gymnasium.make(game, obs_type="grayscale")


def _screen(picture: np.ndarray) -> Int[Tensor, "84 84"]:
    """A screen of any size, made smaller."""
    grey = torch.from_numpy(picture)[None, None].float()
    small = nn.functional.interpolate(grey, (84, 84), mode="bilinear", antialias=True)
    return small[0, 0].round().clamp(0, 255).to(torch.uint8)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator))


def random_frames(game: str, n: int, generator: torch.Generator) -> Frames:
    """``n`` steps of the uniform random policy in a game such as ``"ALE/Pong-v5"``.

    Raises
    ------
    ValueError
        If ``n`` is smaller than 2.
    DataUnavailable
        If the game needs the package ale-py, which is missing.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    env = _open(game)
    actions = torch.randint(int(env.action_space.n), (n,), generator=generator)
    screens, first, ends = torch.empty(n, 84, 84, dtype=torch.uint8), torch.zeros_like(actions), actions < 0
    picture, start = env.reset(seed=_seed(generator))[0], 0
    for t in trange(n, leave=False):
        screens[t], first[t] = _screen(picture), start
        picture, _, terminated, truncated, _ = env.step(int(actions[t]))
        ends[t] = terminated or truncated  # a game is cut only after half an hour of play
        if ends[t]:
            picture, start = env.reset()[0], t + 1
    env.close()
    return Frames(screens, first, actions, ends, int(env.action_space.n))


class AtariNetwork(nn.Module):
    """:class:`ProtoValueNetwork` for stacks of four screens: the encoder of Mnih et al. (2015) and linear heads.

    There are 512 features and one member. Weights are Xavier's uniform, biases zero.

    Raises
    ------
    ValueError
        If a number is smaller than 1.
    """

    def __init__(self, tasks: int, actions: int, generator: torch.Generator) -> None:
        super().__init__()
        if min(tasks, actions) < 1:
            raise ValueError(f"tasks and actions must be at least 1, got {tasks=}, {actions=}")
        self.actions = actions
        layers: list[nn.Module] = []
        for n_in, n_out, size, stride in ((4, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)):
            layers += [nn.utils.skip_init(nn.Conv2d, n_in, n_out, size, stride=stride), nn.ReLU()]
        layers += [nn.Flatten(), nn.utils.skip_init(nn.Linear, 64 * 7 * 7, 512), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        for parameter in self.encoder.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)
        self.heads = _BatchedLinear(1, 512, tasks * actions, generator)

    def features(self, x: Float[Tensor, "*batch 4 84 84"]) -> Float[Tensor, "*batch 512"]:
        """The 512 features of each stack of screens."""
        return self.encoder(x.flatten(0, -4)).unflatten(0, x.shape[:-3])

    def forward(self, x: Float[Tensor, "1 batch 4 84 84"]) -> Float[Tensor, "1 batch tasks actions"]:
        return self.heads(self.features(x)).unflatten(-1, (-1, self.actions))


@torch.no_grad()
def frame_indicators(
    frames: Frames, tasks: int, proportion: float, steps: int, generator: torch.Generator
) -> Bool[Tensor, "n tasks"]:
    """:func:`random_network_indicators` on screens: a random :class:`AtariNetwork`, biases by quantile regression.

    The tasks share the layers of the random network but the last one. ``steps`` and errors are those of
    :func:`fit_quantile_bias`.
    """
    network = AtariNetwork(tasks, 1, generator).to(frames.screens.device)
    outputs = [network(frames[states][None])[0, ..., 0] for states in torch.arange(len(frames)).split(512)]
    outputs = torch.cat(outputs)
    return outputs + fit_quantile_bias(outputs, proportion, steps, generator) > 0


class Played(NamedTuple):
    """Episodes that came to their end while :func:`linear_agent` learned."""

    step: Int[Tensor, " episodes"]  # how many interactions were over
    score: Float[Tensor, " episodes"]  # sum of the game's rewards


def linear_agent(
    network: AtariNetwork,
    frames: Frames,
    game: str,
    *,
    steps: int,
    generator: torch.Generator,
    gamma: float = 0.99,
    lr: float = 1e-3,
) -> Played:
    """Q-learning of a linear head on the frozen features of a network, as :func:`linear_q_learning`, in a game.

    Rewards are clipped to -1, 0 and 1. Actions are ε-greedy, where ε falls from 1 to 0.01 over the first quarter of the
    steps. After a fiftieth of the steps every fourth is followed by an Adam step on 32 moments of the past; the target
    head is renewed 125 times.

    Parameters
    ----------
    network
        Its features are used, scaled to a mean square norm of 1; its heads are not.
    frames
        Experience over which this mean is taken.
    steps
        Interactions with the game.

    Raises
    ------
    ValueError
        If ``steps`` is smaller than 250, ``gamma`` is not in [0, 1), ``lr`` is not positive, or the features are zero.
    DataUnavailable
        If the game needs the package ale-py, which is missing.
    """
    _check_gamma(gamma)
    if steps < 250 or not lr > 0:
        raise ValueError(f"steps must be at least 250 and lr positive, got {steps=}, {lr=}")
    device = frames.screens.device
    with torch.no_grad():
        sample = network.features(frames[torch.randint(len(frames), (1000,), generator=generator)])
    size = sample.square().sum(-1).mean().sqrt()
    if not size > 0:
        raise ValueError("the features of the network are all zero; nothing can be learned from them")
    env = _open(game)
    n_actions = int(env.action_space.n)
    head = nn.utils.skip_init(nn.Linear, sample.shape[-1], n_actions, device=device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    target, update = copy.deepcopy(head), torch.optim.Adam(head.parameters(), lr=lr)
    phi = torch.empty(steps, sample.shape[-1], device=device)
    actions = torch.randint(n_actions, (steps,), generator=generator)
    explore = torch.rand(steps, generator=generator)
    rewards, ended = torch.zeros(1, steps), torch.zeros(1, steps, dtype=torch.bool)
    recent = deque([_screen(env.reset(seed=_seed(generator))[0])] * 4, maxlen=4)
    played, score = [], 0.0
    for t in trange(steps, leave=False):
        with torch.no_grad():
            phi[t] = network.features(torch.stack(list(recent))[None].to(device) / 255)[0] / size
            if explore[t] >= max(0.01, 1 - 4 * t / steps):
                actions[t] = head(phi[t]).argmax()
        picture, reward, terminated, truncated, _ = env.step(int(actions[t]))
        rewards[0, t], ended[0, t] = float(np.sign(reward)), terminated or truncated
        score += float(reward)
        if ended[0, t]:
            played.append((t + 1, score))
            recent.extend([_screen(env.reset()[0])] * 4)
            score = 0.0
        else:
            recent.append(_screen(picture))
        if t % 4 or t < max(steps // 50, _N_STEP):
            continue
        first = torch.randint(t - _N_STEP + 1, (1, 32), generator=generator)  # so that the state behind is known
        gain, end = _n_step(first, rewards, ended, gamma)
        weight = gamma ** (end - first + 1) * ~ended[0, end]
        with torch.no_grad():
            y = gain[0].to(device) + weight[0].to(device) * target(phi[end[0] + 1]).amax(-1)
        q = head(phi[first[0]]).gather(-1, actions[first[0], None].to(device)).squeeze(-1)
        update.zero_grad()
        (0.5 * (y - q).square().mean()).backward()
        update.step()
        if t // 4 % max(steps // 500, 1) == 0:
            target.load_state_dict(head.state_dict())
    env.close()
    step, total = zip(*played, strict=True) if played else ((), ())
    return Played(torch.tensor(step, dtype=torch.long), torch.tensor(total))
