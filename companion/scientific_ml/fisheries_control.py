"""Control of a fishery: reinforcement learning against constant mortality and constant escapement.

Montealegre-Mora, Lapeyrolerie, Chapman, Keller and Boettiger, "Pretty darn good control: when are approximate solutions
better than approximate models", Bulletin of Mathematical Biology 2023 (arXiv 2308.13654).

Stocks are ``N = (X, Y, Z)``: two species that compete, and their predator, in units of a carrying capacity. A step is
a year, an episode at most 200 years. The action is the mortality ``M``: for each fished species the part of the stock
that is caught. A policy maps stocks (n, 3) to mortalities (n, k) and sees neither the time nor the model. Many episodes
run side by side on the first axis.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from companion import models
from companion.training import Ensemble, fit

YEARS = 200
COLLAPSE = 0.05  # a stock at or below it ends the episode
FISHED = {1: 1, 2: 1, 3: 2, 4: 2}  # model: number of fished species, X before Y
START = (0.5, 0.5, 0.7)
_START_1 = (0.5, 0.0, 1 / 3)  # Model 1 has no second species, and a predator whose number never changes
_GAMMA, _LAMBDA, _CLIP = 0.99, 0.95, 0.2
_UNIT = 10.0  # rewards are divided by it for the critic, whose targets are then of order one

Policy = Callable[[Float[np.ndarray, "n 3"]], Float[np.ndarray, "n k"]]


@dataclass(frozen=True)
class FisheryParameters:
    """Parameters of the growth equations; each is a number, or an array (n,) with a value for every episode.

    ``r``, ``K`` (growth rate per year and carrying capacity of X and Y), ``beta``, ``c`` (predation and the stock at
    which it is half saturated), ``c_xy`` (competition), ``D`` (how much rather the predator takes Y), ``b``, ``d_z``
    (births per prey and death rate of the predator), ``sigma`` (standard deviation of the yearly noise).

    Source: the defaults are the values in the authors' code.
    """

    r_x: float = 1.0
    r_y: float = 1.0
    k_x: float = 1.0
    k_y: float = 1.0
    beta: float = 0.3
    c: float = 0.3
    c_xy: float = 0.1
    b: float = 0.1
    d_z: float = 0.1
    D: float = 1.1
    sigma: float = 0.1


def growth(
    N: Float[np.ndarray, "n 3"],
    t: Int[np.ndarray, " n"] | None,
    params: FisheryParameters,
    noise: Float[np.ndarray, "n 3"],
) -> Float[np.ndarray, "n 3"]:
    """Stocks a year later, for stocks ``N`` that are left after the harvest.

    Parameters
    ----------
    N
        Stocks after the harvest.
    t
        Year of each episode, from 0, for the drift of Model 4: the growth rate of X is multiplied by
        ``max(1 - t/200, 1/2)``. None for no drift.
    params
        Parameters of the equations.
    noise
        Standard normal numbers; zeros give the deterministic model.

    Raises
    ------
    ValueError
        If ``N`` or ``noise`` is not of shape (n, 3), or ``N`` is not finite.

    Source: the paper's equations for the three-species models.
    """
    N = np.asarray(N, dtype=float)
    if N.ndim != 2 or N.shape[1] != 3 or not np.isfinite(N).all():
        raise ValueError(f"N must be a finite array of shape (n, 3), got shape {N.shape}")
    if np.shape(noise) != N.shape:
        raise ValueError(f"noise must have the shape of N, {N.shape}, got {np.shape(noise)}")
    X, Y, Z = N.T
    p = params
    r_x = p.r_x if t is None else p.r_x * np.maximum(1 - np.asarray(t) / 200, 0.5)

    def eaten(U: np.ndarray) -> np.ndarray:
        return p.beta * Z * U**2 / (p.c**2 + U**2)

    change = (
        r_x * X * (1 - X / p.k_x) - eaten(X) - p.c_xy * X * Y,
        p.r_y * Y * (1 - Y / p.k_y) - p.D * eaten(Y) - p.c_xy * X * Y,
        Z * (p.b * (X + p.D * Y) - p.d_z),
    )
    return N + np.stack(change, 1) + N * noise * np.broadcast_to(p.sigma, len(N))[:, None]


class VectorFishery:
    """Fisheries side by side. An episode that has ended stays as it is, and earns nothing, until it is reset.

    Parameters
    ----------
    n
        Number of episodes.
    model
        1: X alone, with a constant number of predators. 2: all three species, X fished. 3: X and Y fished. 4: as 3, and
        the growth rate of X falls to one half within 100 years.
    params
        Parameters of the growth equations, the paper's by default.
    seed
        Seed of a generator of its own, or a generator. Every step draws 3n numbers, so that the same seed means the
        same weather under every policy.

    Attributes
    ----------
    N, t, ended
        Stocks (n, 3), year (n,) from 0, and whether the episode is over (n,).

    Raises
    ------
    ValueError
        If ``n`` is not positive or ``model`` is not 1, 2, 3 or 4.
    """

    def __init__(
        self,
        n: int,
        model: int = 4,
        params: FisheryParameters | None = None,
        seed: int | np.random.Generator = 0,
    ) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self.n_fished = _fished(model)
        self.n, self.model, self.params = n, model, params or FisheryParameters()
        self.rng = np.random.default_rng(seed)
        self.N, self.t, self.ended = np.empty((n, 3)), np.zeros(n, dtype=int), np.ones(n, dtype=bool)
        self.reset()

    def reset(self, mask: Bool[np.ndarray, " n"] | None = None) -> Float[np.ndarray, "n 3"]:
        """Start the marked episodes again, all of them by default; returns all stocks."""
        mask = np.ones(self.n, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        count = mask.sum()
        if self.model == 1:
            self.N[mask] = _START_1
            self.N[mask, 0] += 0.02 * self.rng.standard_normal(count)
        else:
            self.N[mask] = START + 0.02 * self.rng.standard_normal((count, 3))
        self.t[mask], self.ended[mask] = 0, False
        return self.N.copy()

    def step(
        self, actions: Float[np.ndarray, "n k"]
    ) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, " n"], Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """A year: harvest, then growth.

        Parameters
        ----------
        actions
            Mortality of each fished species, which is clipped to [0, 1].

        Returns
        -------
        N, reward, terminated, truncated
            Stocks after the year; the catch, less ``100/(t+1)`` where a stock collapsed in year ``t``; whether one did;
            whether the 200 years are over without.

        Raises
        ------
        ValueError
            If ``actions`` is not a finite array of shape (n, number of fished species).
        """
        actions = np.asarray(actions, dtype=float)
        if actions.shape != (self.n, self.n_fished) or not np.isfinite(actions).all():
            raise ValueError(f"actions must be finite, of shape {(self.n, self.n_fished)}, got {actions.shape}")
        active = ~self.ended
        catch = np.clip(actions, 0, 1) * self.N[:, : self.n_fished]
        after = self.N.copy()
        after[:, : self.n_fished] -= catch
        noise = self.rng.standard_normal(after.shape)
        after = np.maximum(growth(after, self.t if self.model == 4 else None, self.params, noise), 0)
        if self.model == 1:
            after[:, 1:] = self.N[:, 1:]
        self.N[active] = after[active]
        stocks = self.N[:, :1] if self.model == 1 else self.N
        terminated = active & (stocks <= COLLAPSE).any(1)
        reward = np.where(active, catch.sum(1), 0) - np.where(terminated, 100 / (self.t + 1), 0)
        self.t += active
        truncated = active & ~terminated & (self.t >= YEARS)
        self.ended |= terminated | truncated
        return self.N.copy(), reward, terminated, truncated


def _fished(model: int) -> int:
    if model not in FISHED:
        raise ValueError(f"model must be 1, 2, 3 or 4, got {model!r}")
    return FISHED[model]


class FisheryEnv(gymnasium.Env):
    """One fishery as an environment of gymnasium, for libraries that train on those; see :class:`VectorFishery`.

    Observations are the three stocks, actions the mortalities.
    """

    def __init__(self, model: int = 4, params: FisheryParameters | None = None) -> None:
        self._fishery = VectorFishery(1, model, params)
        self.observation_space = gymnasium.spaces.Box(0, 10, (3,), np.float32)  # stocks stay far below
        self.action_space = gymnasium.spaces.Box(0, 1, (FISHED[model],), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode; gymnasium's interface."""
        super().reset(seed=seed)
        self._fishery.rng = self.np_random
        return self._fishery.reset()[0].astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """A year; gymnasium's interface."""
        N, reward, terminated, truncated = self._fishery.step(np.asarray(action)[None])
        return N[0].astype(np.float32), float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}


def _positive(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim not in (1, 2) or not (values >= 0).all():
        raise ValueError(f"{name} must hold numbers >= 0, of shape (k,) or (n, k), got {values}")
    return values


def constant_mortality(m: Float[np.ndarray, "*n k"]) -> Policy:
    """CMort: always catch the part ``m`` of each fished stock. ``m`` is (k,), or (n, k) for n episodes.

    Raises
    ------
    ValueError
        If a mortality is negative or not a number.
    """
    m = _positive("m", m)
    return lambda N: np.broadcast_to(m, (len(N), m.shape[-1]))


def constant_escapement(s: Float[np.ndarray, "*n k"]) -> Policy:
    """CEsc: catch what exceeds ``s`` of each fished stock, and nothing below. ``s`` is (k,), or (n, k) for n episodes.

    Raises
    ------
    ValueError
        If an escapement is negative or not a number.
    """
    s = _positive("s", s)
    return lambda N: np.maximum(1 - s / np.maximum(N[:, : s.shape[-1]], 1e-12), 0)


class EpisodeStatistics(NamedTuple):
    """What came of each episode: the sum of rewards, the number of years, and whether it lasted 200 years."""

    reward: Float[np.ndarray, " n"]
    length: Int[np.ndarray, " n"]
    survived: Bool[np.ndarray, " n"]


def evaluate(
    policy: Policy, model: int, episodes: int, seed: int, params: FisheryParameters | None = None
) -> EpisodeStatistics:
    """Run whole episodes under a policy; equal seeds have equal weather.

    Raises
    ------
    ValueError
        If ``model`` is unknown, ``episodes`` is not positive, or the policy's actions have the wrong shape.
    """
    fishery = VectorFishery(episodes, model, params, seed)
    total, survived = np.zeros(episodes), np.zeros(episodes, dtype=bool)
    while not fishery.ended.all():
        _, reward, _, truncated = fishery.step(policy(fishery.N))
        total, survived = total + reward, survived | truncated
    return EpisodeStatistics(total, fishery.t, survived)


class Tuning(NamedTuple):
    """The best grid point, and mean reward and survival of all of them, in the order of the grid."""

    best: Float[np.ndarray, " k"]
    reward: Float[np.ndarray, " g"]
    survival: Float[np.ndarray, " g"]


def tune(
    family: Callable[[np.ndarray], Policy],
    model: int,
    grid: Float[np.ndarray, "g k"],
    episodes: int,
    seed: int,
    params: FisheryParameters | None = None,
) -> Tuning:
    """Find the grid point with the highest mean reward; all points and episodes run as one batch.

    Parameters
    ----------
    family
        Makes a policy from parameters (n, k) of n episodes, for example :func:`constant_mortality`.
    model, params
        Model of the fishery, 1 to 4, and the parameters of its equations.
    grid
        Values to try.
    episodes, seed
        Episodes of each point, and the seed of the weather.

    Raises
    ------
    ValueError
        If ``grid`` is not of shape (g, k) or empty; and what :func:`evaluate` raises.
    """
    grid = np.asarray(grid, dtype=float)
    if grid.ndim != 2 or not len(grid):
        raise ValueError(f"grid must have the shape (g, k) with g >= 1, got {grid.shape}")
    outcome = evaluate(family(np.repeat(grid, episodes, 0)), model, len(grid) * episodes, seed, params)
    reward = outcome.reward.reshape(len(grid), episodes).mean(1)
    return Tuning(grid[reward.argmax()], reward, outcome.survived.reshape(len(grid), episodes).mean(1))


def gae(
    reward: Float[Tensor, "steps *n"],
    value: Float[Tensor, "steps *n"],
    next_value: Float[Tensor, "steps *n"],
    terminated: Bool[Tensor, "steps *n"],
    ended: Bool[Tensor, "steps *n"],
    gamma: float = _GAMMA,
    lam: float = _LAMBDA,
) -> Float[Tensor, "steps *n"]:
    """Generalised advantage estimates ``A_t = δ_t + γλ A_{t+1}``, ``δ_t = r_t + γ V(N_{t+1}) - V(N_t)``.

    Parameters
    ----------
    reward, value, next_value
        ``r_t``, ``V(N_t)`` and ``V(N_{t+1})``, the stocks after the step and before any reset.
    terminated
        Where a stock collapsed: nothing is earned after, and V there counts as zero.
    ended
        Where the episode ended, by collapse or because time was up; the sum stops. At a time limit V stays in δ.
    gamma, lam
        Discount, and the weight of later steps.

    Raises
    ------
    ValueError
        If the shapes differ.

    Source: Schulman, Moritz, Levine, Jordan and Abbeel, 2016.
    """
    shapes = {tuple(x.shape) for x in (reward, value, next_value, terminated, ended)}
    if len(shapes) != 1:
        raise ValueError(f"reward, value, next_value, terminated and ended must share a shape, got {sorted(shapes)}")
    delta = reward + gamma * next_value * ~terminated - value
    advantage, later = torch.empty_like(delta), torch.zeros_like(delta[0])
    for step in reversed(range(len(delta))):
        later = delta[step] + gamma * lam * later * ~ended[step]
        advantage[step] = later
    return advantage


def _observed(N: Float[np.ndarray, "n 3"]) -> Float[Tensor, "n 3"]:
    return torch.as_tensor(2 * N - 1, dtype=torch.float32)


class _Agents:
    """Actors and critics of several agents, each with episodes of its own."""

    def __init__(self, agents: int, width: int, n_fished: int, generator: torch.Generator) -> None:
        def networks(n_out: int) -> list[nn.Sequential]:
            sizes = [3, width, width, n_out]
            return [models.mlp(sizes, generator=generator, activation=nn.Tanh) for _ in range(agents)]

        actors = networks(n_fished)
        with torch.no_grad():
            for actor in actors:  # a first mortality of 0.2 almost everywhere
                actor[-1].weight *= 0.1
                actor[-1].bias.fill_(-1.4)
        self.actor = Ensemble(actors)
        self.critic = Ensemble(networks(1))
        self.log_sd = torch.full((agents, 1, n_fished), -2.0, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.actor.parameters.values(), *self.critic.parameters.values(), self.log_sd]

    def distribution(self, x: Float[Tensor, "agents n 3"]) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.actor.each(x).sigmoid(), self.log_sd.exp(), validate_args=False)

    def value(self, x: Float[Tensor, "agents n 3"]) -> Float[Tensor, "agents n"]:
        return self.critic.each(x).squeeze(-1)

    def policies(self) -> list[Policy]:
        """The mean action of each agent."""
        return [partial(_mean_action, network) for network in self.actor.members()]


@torch.no_grad()
def _mean_action(network: nn.Module, N: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n k"]:
    return network(_observed(N)).sigmoid().numpy().astype(float)


class _Batch(NamedTuple):
    """What PPO learns from: each tensor (agents, steps times episodes, ...)."""

    x: Tensor
    action: Tensor
    log_prob: Tensor
    advantage: Tensor
    target: Tensor


@torch.no_grad()
def _collect(agents: _Agents, fishery: VectorFishery, steps: int, generator: torch.Generator) -> _Batch:
    """Let the agents act for some years, each in an equal part of the episodes, and look back."""
    rows, n_agents = [], len(agents.log_sd)
    for _ in range(steps):
        x = _observed(fishery.N).reshape(n_agents, -1, 3)
        policy = agents.distribution(x)
        action = policy.mean + policy.stddev * torch.randn(policy.mean.shape, generator=generator)
        N, reward, terminated, truncated = fishery.step(action.flatten(0, 1).numpy())
        flags = [torch.as_tensor(flag).reshape(n_agents, -1) for flag in (reward / _UNIT, terminated, truncated)]
        rows.append((x, action, policy.log_prob(action).sum(-1), _observed(N).reshape(x.shape), *flags))
        fishery.reset(terminated | truncated)
    x, action, log_prob, after, reward, terminated, truncated = (
        torch.stack(column) for column in zip(*rows, strict=True)
    )

    def by_agent(column: Tensor) -> Tensor:
        return column.transpose(0, 1).flatten(1, 2)

    def value(states: Tensor) -> Tensor:
        return agents.value(by_agent(states)).unflatten(1, (steps, -1)).transpose(0, 1)

    before = value(x)
    advantage = gae(reward.float(), before, value(after), terminated, terminated | truncated)
    target = by_agent(advantage + before)
    advantage = by_agent(advantage)
    advantage = (advantage - advantage.mean(1, keepdim=True)) / advantage.std(1, keepdim=True)
    return _Batch(by_agent(x), by_agent(action), by_agent(log_prob), advantage, target)


def ppo_loss(
    log_ratio: Float[Tensor, "agents n"], advantage: Float[Tensor, "agents n"], error: Float[Tensor, "agents n"]
) -> Float[Tensor, " agents"]:
    """PPO's clipped surrogate, with its sign turned, plus half the critic's squared error.

    ``log_ratio`` is ``log π(a|N) - log π_old(a|N)``; beyond ``1 ± 0.2`` the ratio earns nothing more.

    Source: Schulman, Wolski, Dhariwal, Radford and Klimov, 2017, equation 7.
    """
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - _CLIP, 1 + _CLIP) * advantage)
    return (0.5 * error.square() - surrogate).mean(-1)


def train_ppo(
    model: int,
    iterations: int = 50,
    seed: int = 0,
    *,
    agents: int = 1,
    params: FisheryParameters | None = None,
    width: int = 64,
    episodes: int = 64,
    steps: int = 100,
    epochs: int = 5,
    minibatch: int = 800,
    lr: float = 2e-3,
) -> list[Policy]:
    """Train agents by proximal policy optimisation, side by side and independent of each other.

    Parameters
    ----------
    model
        Model of the fishery, 1 to 4.
    iterations
        How often experience is collected and learned from; none gives the untrained policies.
    seed, agents
        One seed for all agents, and their number.
    params
        Parameters of the fishery; arrays hold a value for each episode, ``episodes`` in a row for each agent.
    episodes, steps
        Episodes that an agent runs in parallel, and years between two updates.
    epochs, minibatch, lr
        Passes through each batch, size of a minibatch, and Adam's first learning rate, which falls linearly to 1/200.

    Returns
    -------
    list of policies
        The mean action of each agent.

    Raises
    ------
    ValueError
        If ``model`` is unknown, a number is not positive, or a minibatch is larger than the batch.

    Source: the paper's method, at a smaller size; its implementation is that of RLlib.
    """
    if min(agents, episodes, steps, epochs) < 1 or iterations < 0 or not lr > 0:
        raise ValueError(
            "agents, episodes, steps, epochs and lr must be positive and iterations not negative, got "
            f"{agents=}, {episodes=}, {steps=}, {epochs=}, {lr=}, {iterations=}"
        )
    if not 1 <= minibatch <= episodes * steps:
        raise ValueError(f"minibatch must be between 1 and episodes * steps = {episodes * steps}, got {minibatch}")
    generator = torch.Generator().manual_seed(seed)
    learners = _Agents(agents, width, _fished(model), generator)
    if iterations == 0:
        return learners.policies()
    fishery = VectorFishery(agents * episodes, model, params, seed)
    fishery.t[:] = fishery.rng.integers(YEARS, size=fishery.n)  # else all would be in the same year of the drift
    per_epoch = episodes * steps // minibatch
    batch, order = None, None

    def loss(step: int) -> Float[Tensor, " agents"]:
        nonlocal batch, order
        if step % (epochs * per_epoch) == 0:
            batch = _collect(learners, fishery, steps, generator)
        if step % per_epoch == 0:
            order = torch.randperm(episodes * steps, generator=generator)
        chosen = order[(step % per_epoch) * minibatch :][:minibatch]
        part = _Batch(*(column[:, chosen] for column in batch))
        log_prob = learners.distribution(part.x).log_prob(part.action).sum(-1)
        return ppo_loss(log_prob - part.log_prob, part.advantage, learners.value(part.x) - part.target)

    n_steps = iterations * epochs * per_epoch
    schedule = partial(LinearLR, start_factor=1, end_factor=5e-3, total_iters=n_steps)
    fit(loss, learners.parameters, steps=n_steps, lr=lr, schedule=schedule, record_every=n_steps)
    return learners.policies()


def record(
    policy: Policy, model: int, episodes: int, seed: int
) -> tuple[Float[np.ndarray, "years n 3"], Float[np.ndarray, "years n k"]]:
    """Stocks at the start of each year, and the mortality chosen then; NaN once an episode is over.

    The weather is that of :func:`evaluate` with the same seed. Raises what that function raises.
    """
    fishery, stocks, mortality = VectorFishery(episodes, model, seed=seed), [], []
    while not fishery.ended.all():
        action = np.clip(policy(fishery.N), 0, 1)
        for rows, values in ((stocks, fishery.N), (mortality, action)):
            rows.append(np.where(fishery.ended[:, None], np.nan, values))
        fishery.step(action)
    return np.stack(stocks), np.stack(mortality)


def smooth_policy(
    policy: Policy,
    states: Float[np.ndarray, "m 3"],
    seed: int = 0,
    *,
    points: int = 900,
    optimizer: str | None = None,
) -> Policy:
    """The policy smoothed by a Gaussian process, fitted to it where ``states`` are usual (PPO+GP).

    The window runs from the 1 % to the 99 % quantile of each stock. Three grids in it have 25 values of one stock and 5
    of the others; the process, with kernel RBF(10) + WhiteKernel(0.1), is fitted to some of these points.

    Parameters
    ----------
    policy
        What to smooth.
    states
        Stocks that the policy meets.
    seed, points
        Which grid points are used, at random, and how many of the 1875.
    optimizer
        None keeps the kernel as it is. ``"fmin_l_bfgs_b"`` lets the likelihood choose its three numbers.

    Raises
    ------
    ValueError
        If ``states`` is not (m, 3), or ``points`` is not between 1 and 1875.

    Source: the paper's Appendix C; scikit-learn's default is to optimise.
    """
    states = np.asarray(states, dtype=float)
    if states.ndim != 2 or states.shape[1] != 3 or not len(states):
        raise ValueError(f"states must have the shape (m, 3), got {states.shape}")
    if not 1 <= points <= 1875:
        raise ValueError(f"points must be between 1 and 1875, got {points}")
    window = np.quantile(states, [0.01, 0.99], axis=0)
    grids = []
    for fine in range(3):
        axes = [np.linspace(*window[:, k], 25 if k == fine else 5) for k in range(3)]
        grids.append(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3))
    chosen = np.random.default_rng(seed).permutation(np.concatenate(grids))[:points]
    kernel = 1.0 * RBF(10.0) + WhiteKernel(0.1)
    with warnings.catch_warnings():  # a policy has no noise, so its fitted variance may end at the search's lower end
        warnings.simplefilter("ignore", ConvergenceWarning)
        process = GaussianProcessRegressor(kernel, optimizer=optimizer).fit(chosen, policy(chosen))
    return lambda N: np.clip(process.predict(N).reshape(len(N), -1), 0, 1)
