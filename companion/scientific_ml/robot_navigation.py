"""Mapless robot navigation: an actor-critic that sees a laser scan and the direction of the goal, and nothing else.

Surmann, Jestel, Marchel, Musberg, Elhadj and Ardani, "Deep reinforcement learning for real autonomous mobile robot
navigation in indoor environments", 2020 (arXiv 2005.13857). Rewards and actions are those of the authors' code
(RoblabWh/RobLearn).

Lengths are in metres, times in seconds, angles in radians. The room is the square from (0, 0) to (6, 6). A *world* is a
room with ``discs`` (x, y, radius), of which those of radius 0 are absent, and ``segments`` (x1, y1, x2, y2) of wall. A
*policy* maps observations (n, frames, rays + bins) to actions (n,). Robots live side by side in the first axis.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from companion.models import initialised
from companion.training import Ensemble, fit

RADIUS, STEP_TIME, ROOM, SCAN_RANGE, GOAL_RADIUS, DOOR = 0.18, 0.25, 6.0, 2.5, 0.35, 1.2
FIELD_OF_VIEW = math.radians(270)
ACTIONS = torch.tensor(  # angular velocity ω, linear velocity v
    [[1.25, 0.3], [1.0, 0.4], [0.5, 0.5], [0.0, 0.6], [-0.5, 0.5], [-1.0, 0.4], [-1.25, 0.3]]
)
N_DISCS = torch.tensor([0, 3, 7, 2])  # of the levels 0 to 3; level 3 also has a wall with a door

Policy = Callable[[Float[Tensor, "n frames size"]], Int[Tensor, " n"]]
Discs = Float[Tensor, "n discs 3"]
Segments = Float[Tensor, "n segments 4"]


def wrap(angle: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same angle in [-π, π)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def ray_distances(
    origin: Float[Tensor, "n 2"],
    angles: Float[Tensor, "n rays"],
    discs: Discs,
    segments: Segments,
    max_range: float,
) -> Float[Tensor, "n rays"]:
    """Distance along each ray to the first disc or segment, at most ``max_range``.

    With ``f = c - p``, ``b = f·u`` and ``h = R² - (|f|² - b²)`` a ray from ``p`` in direction ``u`` meets the disc
    ``(c, R)`` at ``b - √h`` if ``h > 0`` and ``b > 0``. It meets a segment where
    ``p + t u = a + s w`` with ``t > 0`` and ``0 ≤ s ≤ 1``.

    Parameters
    ----------
    origin, angles
        Where the rays of each robot start, and their directions in the frame of the room.
    discs, segments
        The world of each robot.
    max_range
        Where a ray ends that meets nothing.

    Raises
    ------
    ValueError
        If the arguments do not describe the same number of robots, or ``max_range`` is not positive.
    """
    shapes = [tuple(x.shape) for x in (origin, angles, discs, segments)]
    if len({shape[0] for shape in shapes}) > 1 or [s[-1] for s in (shapes[0], *shapes[2:])] != [2, 3, 4]:
        raise ValueError(
            f"origin, angles, discs, segments must be (n, 2), (n, rays), (n, discs, 3), (n, segments, 4), got {shapes}"
        )
    if not max_range > 0:
        raise ValueError(f"max_range must be positive, got {max_range}")
    ux, uy = angles.cos()[..., None], angles.sin()[..., None]  # robot, ray, obstacle
    (fx, fy), radius = (discs[:, None, :, :2] - origin[:, None, None]).unbind(-1), discs[:, None, :, 2]
    b = fx * ux + fy * uy
    h = b.square() + (radius.square() - fx.square() - fy.square())
    to_discs = torch.where((h > 0) & (b > 0), b - h.clamp(min=0).sqrt(), max_range)
    qx, qy = (segments[:, None, :, :2] - origin[:, None, None]).unbind(-1)
    wx, wy = (segments[:, None, :, 2:] - segments[:, None, :, :2]).unbind(-1)
    cross = ux * wy - uy * wx
    t, s = (qx * wy - qy * wx) / cross, (qx * uy - qy * ux) / cross  # no number for parallel lines, and so no hit
    to_segments = torch.where((t > 0) & (s >= 0) & (s <= 1), t, max_range)
    return torch.cat([to_discs, to_segments], -1).amin(-1).clamp(0, max_range)


def clearance(points: Float[Tensor, "n points 2"], discs: Discs, segments: Segments) -> Float[Tensor, "n points"]:
    """Distance from each point to the nearest disc or segment; negative inside a disc."""
    gap = (points[:, :, None] - discs[:, None, :, :2]).norm(dim=-1) - discs[:, None, :, 2]
    gap = gap.masked_fill(discs[:, None, :, 2] == 0, math.inf)
    a, w = segments[:, None, :, :2], (segments[..., 2:] - segments[..., :2])[:, None]
    q = points[:, :, None] - a
    along = ((q * w).sum(-1) / w.square().sum(-1)).clamp(0, 1)
    return torch.cat([gap, (q - along[..., None] * w).norm(dim=-1)], -1).amin(-1)


def draw_worlds(levels: Int[Tensor, " n"], generator: torch.Generator) -> tuple[Discs, Segments]:
    """A random world for each robot: 0 an empty room, 1 three discs, 2 seven discs, 3 a wall with a door and two discs.

    Disc centres are uniform in [0.8, 5.2]², radii in [0.15, 0.4]. The wall crosses the room at a place uniform in
    [2.4, 3.6], along x or y, with a door of 1.2 m that starts at a place uniform in [1, 4.2].
    """
    n, device = len(levels), levels.device
    uniform = torch.rand(n, 7, 3, generator=generator, device=device)
    discs = uniform * torch.tensor([4.4, 4.4, 0.25], device=device) + torch.tensor([0.8, 0.8, 0.15], device=device)
    discs[..., 2] *= torch.arange(7, device=device) < N_DISCS.to(device)[levels, None]
    corners = torch.tensor([[0, 0], [ROOM, 0], [ROOM, ROOM], [0, ROOM]], device=device)
    room = torch.cat([corners, corners.roll(-1, 0)], 1)
    at, door, swap = torch.rand(3, n, generator=generator, device=device)
    at, door, low = 2.4 + 1.2 * at, 1 + 3.2 * door, torch.zeros_like(at)
    wall = torch.stack([at, low, at, door, at, door + DOOR, at, low + ROOM], -1).view(n, 2, 4)
    wall = torch.where((swap < 0.5)[:, None, None], wall[..., [1, 0, 3, 2]], wall)
    wall = torch.where((levels == 3)[:, None, None], wall, room[:2])  # no wall: two sides of the room once more
    return discs, torch.cat([room.expand(n, 4, 4), wall], 1)


def navigation_reward(
    d0: Float[Tensor, " n"],
    d1: Float[Tensor, " n"],
    phi0: Float[Tensor, " n"],
    phi1: Float[Tensor, " n"],
    s: Float[Tensor, " n"],
    collided: Bool[Tensor, " n"],
    reached: Bool[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Reward of a step that leads from distance ``d0`` and bearing ``phi0`` of the goal to ``d1`` and ``phi1``.

    ``±6 |d0 - d1|/s + 3 cos φ1 + k ||φ0| - |φ1||``: minus if ``d1 > √(s² + d0²)``; ``k`` is 2 if the robot turned to
    the goal and -3 if it turned away. A collision gives -20 instead, the goal 20. All is clipped to [-15, 12].

    Parameters
    ----------
    d0, d1, phi0, phi1
        Distance and bearing of the goal, before and after the step.
    s
        Length of the step, positive.
    collided, reached
        How the step ended.

    Raises
    ------
    ValueError
        If a distance is negative or a step is not positive.

    Notes
    -----
    Source: the authors' code, ``environment_fitness.py``.
    """
    if not (s > 0).all() or not (torch.minimum(d0, d1) >= 0).all():
        raise ValueError(f"s must be positive and d0, d1 not negative, got minima {s.min()}, {d0.min()}, {d1.min()}")
    sign = torch.where(d1 > (s.square() + d0.square()).sqrt(), -6.0, 6.0)
    k = torch.where(phi1.abs() <= phi0.abs(), 2.0, -3.0)
    reward = sign * (d0 - d1).abs() / s + 3 * phi1.cos() + k * (phi0.abs() - phi1.abs()).abs()
    return reward.masked_fill(collided, -20.0).masked_fill(reached, 20.0).clamp(-15, 12)


class NavigationSimulator:
    """Disc-shaped robots with a laser scanner and a goal compass, each in a world of its own, in lockstep.

    Parameters
    ----------
    n
        Number of robots.
    levels
        Difficulty of the worlds, 0 to 3 (see :func:`draw_worlds`), repeated over the robots.
    rays, bins, frames
        Rays of the scan, bins of the compass, and how many of the latest frames an observation holds.
    noise
        Standard deviation of the scan's Gaussian noise in metres; one number, or one for each robot.
    horizon
        Steps in which a goal must be reached.
    seed
        Of the worlds, starts, goals and noise.
    device
        Where the simulation runs.

    Raises
    ------
    ValueError
        If a level is unknown, a number is not positive, or ``noise`` is negative.
    """

    _STATE = ("levels", "noise", "discs", "segments", "pose", "goal", "clock", "frames")

    def __init__(
        self,
        n: int,
        levels: int | Sequence[int],
        *,
        rays: int = 33,
        bins: int = 16,
        noise: float | Float[Tensor, " n"] = 0.05,
        frames: int = 2,
        horizon: int = 120,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        levels = torch.as_tensor(levels).flatten()
        if not len(levels) or not ((levels >= 0) & (levels < len(N_DISCS))).all():
            raise ValueError(f"levels must be numbers from 0 to 3, got {levels.tolist()}")
        if min(n, rays, bins, frames, horizon) < 1:
            raise ValueError(f"sizes must be positive, got {n=}, {rays=}, {bins=}, {frames=}, {horizon=}")
        noise = torch.as_tensor(noise, dtype=torch.float32)
        if not (noise >= 0).all() or noise.shape not in ((), (n,)):
            raise ValueError(f"noise must not be negative, one number or one per robot, got {noise.tolist()}")
        self.bins, self.horizon = bins, horizon
        self.generator = torch.Generator(device).manual_seed(seed)
        self.bearings = torch.linspace(-FIELD_OF_VIEW / 2, FIELD_OF_VIEW / 2, rays, device=device)
        self.levels = levels.repeat(-(-n // len(levels)))[:n].to(device)
        self.noise = noise.expand(n).to(device)
        empty = partial(torch.zeros, device=device)
        self.discs, self.segments, self.pose, self.goal = empty(n, 7, 3), empty(n, 6, 4), empty(n, 3), empty(n, 2)
        self.clock, self.frames = empty(n), empty(n, frames, rays + bins)
        self.reset(torch.ones(n, dtype=torch.bool, device=device))

    def _free_points(self, who: Int[Tensor, " k"], margin: float, far_from: Tensor | None = None) -> Tensor:
        """For each robot the first of many random points with this clearance, 2 m away from another if one is given."""
        missing, found = torch.arange(len(who), device=who.device), self.goal[who]
        while len(missing):
            robots = who[missing]
            points = ROOM * torch.rand(len(robots), 32, 2, generator=self.generator, device=who.device)
            free = clearance(points, self.discs[robots], self.segments[robots]) > margin
            if far_from is not None:
                free &= (points - far_from[missing, None]).norm(dim=-1) > 2
            found[missing] = points[torch.arange(len(robots), device=who.device), free.int().argmax(1)]
            missing = missing[~free.any(1)]
        return found

    def reset(self, mask: Bool[Tensor, " n"]) -> None:
        """New worlds, starts and goals for the robots in ``mask``; the start is 0.35 m clear of the robot's body."""
        who = mask.nonzero()[:, 0]
        if not len(who):
            return
        self.discs[who], self.segments[who] = draw_worlds(self.levels[who], self.generator)
        self.pose[who, :2] = self._free_points(who, RADIUS + 0.35)
        turn = torch.rand(len(who), generator=self.generator, device=who.device)
        self.pose[who, 2] = (2 * turn - 1) * math.pi
        self._new_goals(who)
        self.frames[who] = self._sense(who)[:, None]

    def _new_goals(self, who: Int[Tensor, " k"]) -> None:
        self.goal[who] = self._free_points(who, 0.2, far_from=self.pose[who, :2])
        self.clock[who] = 0

    def to_goal(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Distance and bearing of the goal."""
        x, y = (self.goal - self.pose[:, :2]).unbind(1)
        return torch.hypot(x, y), wrap(torch.atan2(y, x) - self.pose[:, 2])

    def _sense(self, who: Int[Tensor, " k"] | slice) -> Float[Tensor, "k size"]:
        """One frame: the noisy scan as a part of its range, and the compass as a one-hot vector."""
        pose = self.pose[who]
        scan = ray_distances(pose[:, :2], pose[:, 2:] + self.bearings, self.discs[who], self.segments[who], SCAN_RANGE)
        error = torch.randn(scan.shape, generator=self.generator, device=scan.device)
        scan = (scan + self.noise[who, None] * error).clamp(0, SCAN_RANGE)
        bin = (self.to_goal()[1][who] / (2 * math.pi) * self.bins).round().long() % self.bins
        return torch.cat([scan / SCAN_RANGE, nn.functional.one_hot(bin, self.bins)], 1)

    def observe(self) -> Float[Tensor, "n frames size"]:
        """The latest frames of every robot, oldest first."""
        return self.frames.clone()

    def step(self, actions: Int[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Turn, then drive, for a quarter of a second; a robot that reaches its goal gets a new one.

        Parameters
        ----------
        actions
            Rows of ``ACTIONS``.

        Returns
        -------
        reward, collided, reached, timed_out
            One entry per robot. Who collided or ran out of time stays where it is until :meth:`reset`.

        Raises
        ------
        ValueError
            If there is not one action from 0 to 6 for each robot.
        """
        if actions.shape != self.clock.shape or not ((actions >= 0) & (actions < len(ACTIONS))).all():
            raise ValueError(f"actions must be {len(self.clock)} numbers from 0 to 6, got {actions.tolist()}")
        omega, v = ACTIONS.to(self.pose)[actions].unbind(1)
        d0, phi0 = self.to_goal()
        theta = wrap(self.pose[:, 2] + omega * STEP_TIME)
        s = v * STEP_TIME
        self.pose = torch.stack([self.pose[:, 0] + s * theta.cos(), self.pose[:, 1] + s * theta.sin(), theta], 1)
        d1, phi1 = self.to_goal()
        collided = clearance(self.pose[:, None, :2], self.discs, self.segments)[:, 0] < RADIUS
        reached = (d1 < GOAL_RADIUS) & ~collided
        self.clock = self.clock + 1
        timed_out = (self.clock >= self.horizon) & ~collided & ~reached
        self._new_goals(reached.nonzero()[:, 0])
        self.frames = torch.cat([self.frames[:, 1:], self._sense(slice(None))[:, None]], 1)
        return navigation_reward(d0, d1, phi0, phi1, s, collided, reached), collided, reached, timed_out

    def keep(self, mask: Bool[Tensor, " n"]) -> None:
        """Go on with the robots in ``mask`` alone."""
        for name in self._STATE:
            setattr(self, name, getattr(self, name)[mask])


class ActorCritic(nn.Module):
    """One network for policy and value: two convolutions over scan and compass, a dense layer, and one head for both.

    Maps observations (n, frames, size) to (n, actions + 1): the logits of the policy π, and the value V in the last
    column.

    Parameters
    ----------
    frames, size
        Shape of an observation.
    actions
        Number of actions.
    layers
        Channels, taps and stride of the convolutions.
    hidden
        Width of the dense layer.
    generator
        Source of the initial weights.
    """

    def __init__(
        self,
        frames: int,
        size: int,
        actions: int = 7,
        *,
        layers: Sequence[tuple[int, int, int]] = ((8, 5, 2), (16, 3, 2)),
        hidden: int = 64,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for channels, taps, stride in layers:
            convolution = nn.utils.skip_init(nn.Conv1d, frames, channels, taps, stride=stride)
            modules += [initialised(convolution, generator), nn.ReLU()]
            frames, size = channels, (size - taps) // stride + 1
        if size < 1:
            raise ValueError(f"size must be large enough for the convolutions {layers}, {size} entries are left")
        dense = nn.utils.skip_init(nn.Linear, frames * size, hidden)
        head = nn.utils.skip_init(nn.Linear, hidden, actions + 1)
        self.layers = nn.Sequential(
            *modules, nn.Flatten(), initialised(dense, generator), nn.ReLU(), initialised(head, generator)
        )

    def forward(self, x: Float[Tensor, "n frames size"]) -> Float[Tensor, "n actions+1"]:
        return self.layers(x)


def segment_returns(
    rewards: Float[Tensor, "steps *agents"], bootstrap: Float[Tensor, "*agents"], gamma: float
) -> Float[Tensor, "steps *agents"]:
    """Returns ``R_t = r_t + γ R_{t+1}`` of segments that end where the value is ``bootstrap`` (0 after a collision)."""
    if rewards.shape[1:] != bootstrap.shape or not 0 <= gamma <= 1:
        raise ValueError(
            f"rewards must be (steps, *agents), bootstrap (*agents) and gamma in [0, 1], "
            f"got {tuple(rewards.shape)}, {tuple(bootstrap.shape)}, {gamma}"
        )
    result = torch.empty_like(rewards)
    for t in reversed(range(len(rewards))):
        bootstrap = result[t] = rewards[t] + gamma * bootstrap
    return result


def actor_critic_loss(
    output: Float[Tensor, "*batch actions+1"],
    actions: Int[Tensor, "*batch"],
    returns: Float[Tensor, "*batch"],
    beta: float,
    epsilon: float = 1e-6,
) -> Float[Tensor, "*batch"]:
    """``-log max(π(a|s), ε) (R - V) - β H(π) + ½ (R - V)²`` per sample; the first term holds V fixed."""
    log_pi, value = output[..., :-1].log_softmax(-1), output[..., -1]
    chosen = log_pi.gather(-1, actions[..., None])[..., 0].clamp(min=math.log(epsilon))
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    advantage = returns - value
    return -chosen * advantage.detach() - beta * entropy + advantage.square() / 2


class History(NamedTuple):
    """What happened in training: counts for each step and network, and the policy lag of each update."""

    reached: Int[Tensor, "steps networks"]
    collided: Int[Tensor, "steps networks"]
    timed_out: Int[Tensor, "steps networks"]
    lag: Float[Tensor, " updates"]  # mean number of updates between acting and learning


def train_ga3c(
    levels: Sequence[Sequence[int]],
    noise: Sequence[float],
    *,
    steps: int,
    agents: int = 32,
    segment: int = 10,
    lag: int = 1,
    batch: int = 160,
    gamma: float = 0.97,
    beta: float = 0.01,
    lr: float = 4e-3,
    reward_scale: float = 0.02,
    seed: int,
    network: dict | None = None,
    sensors: dict | None = None,
    device: torch.device | str = "cpu",
) -> tuple[list[ActorCritic], History]:
    """Train several networks by GA3C, side by side, each with agents and queues of its own.

    The asynchrony is emulated by a deterministic scheduler. All agents move in lockstep, so the prediction queue is
    one batch. Agents deliver their segments at different times to the training queue of their network, which is
    first in, first out. An update happens when more than ``lag`` batches wait; it takes the oldest.

    Parameters
    ----------
    levels, noise
        For each network the levels of its agents (repeated over them) and the noise of their scans.
    steps
        Simulator steps at most; an agent delivers a segment after ``segment`` of them, or when its episode ends.
    agents, segment, lag, batch
        Agents per network, steps of a segment, batches left waiting, and samples of an update.
    gamma, beta, lr
        Discount, weight of the entropy, and initial learning rate of Adam, which falls linearly to 0.
    reward_scale
        Factor of all rewards, so that returns are of order one.
    seed
        Of initial weights, worlds and actions.
    network, sensors
        Options of :class:`ActorCritic`, and of :class:`NavigationSimulator`.

    Returns
    -------
    networks, history

    Raises
    ------
    ValueError
        If ``levels`` and ``noise`` differ in length, or ``steps`` are too few for an update.
    """
    if not levels or not all(levels) or len(levels) != len(noise):
        raise ValueError(f"levels and noise must hold one entry per network, none empty, got {levels} and {noise}")
    updates = (steps - segment) * agents // batch - lag
    if min(agents, segment, batch) < 1 or lag < 0 or updates < 1:
        raise ValueError(f"steps must suffice for an update, got {steps=}, {agents=}, {segment=}, {batch=}, {lag=}")
    n = len(levels)
    each_level = torch.tensor([[row[k % len(row)] for k in range(agents)] for row in levels])
    each_noise = torch.tensor(noise, dtype=torch.float32).repeat_interleave(agents)
    simulator = NavigationSimulator(
        n * agents, each_level, noise=each_noise, seed=seed, device=device, **(sensors or {})
    )
    weights = torch.Generator().manual_seed(seed)
    shape = simulator.frames.shape[1:]
    ensemble = Ensemble([ActorCritic(*shape, generator=weights, **(network or {})).to(device) for _ in range(n)])
    dice = torch.Generator(device).manual_seed(seed + 1)

    # What the agents saw and did, at place t modulo a length that outlives every wait in a queue.
    length = 3 * segment + -(-(lag + 2) * batch // agents)
    per_agent = partial(torch.zeros, length, n, agents, device=device)
    memory = {name: per_agent() for name in ("reward", "return", "update")}
    memory |= {"observation": per_agent(*shape), "action": per_agent(dtype=torch.long)}
    queues: list[deque[int]] = [deque() for _ in range(n)]  # places in the memory
    began = torch.zeros(n, agents, dtype=torch.long, device=device)  # the step with which the present segment began
    phase = torch.randint(segment, (n, agents), generator=dice, device=device)
    counts: list[Tensor] = []
    lags: list[Tensor] = []

    @torch.no_grad()
    def predict() -> tuple[Tensor, Tensor, Tensor]:
        """Observations of all agents, with π and V from the network of each."""
        observation = simulator.observe().view(n, agents, *shape)
        output = ensemble.each(observation)
        return observation, output[..., :-1].softmax(-1), output[..., -1]

    def advance(update: int) -> None:
        """One step of all agents; segments that are complete go to the training queues."""
        nonlocal prediction
        t, (observation, policy, _) = len(counts), prediction
        actions = torch.multinomial(policy.flatten(0, 1), 1, generator=dice)
        reward, *ends = simulator.step(actions[:, 0])
        counts.append(torch.stack(ends).view(3, n, agents))
        collided, _, timed_out = counts[-1]
        last_value = predict()[2] if timed_out.any() else 0  # V of where time ran out, not of the new world
        simulator.reset((collided | timed_out).flatten())
        prediction = predict()
        here = t % length
        memory["observation"][here], memory["action"][here] = observation, actions.view(n, agents)
        memory["reward"][here], memory["update"][here] = reward_scale * reward.view(n, agents), update

        window = torch.arange(max(0, t + 1 - segment), t + 1, device=device)
        bootstrap = torch.where(timed_out, last_value, prediction[2]) * ~collided
        returns = segment_returns(memory["reward"][window % length], bootstrap, gamma)
        complete = collided | timed_out | ((t + phase) % segment == segment - 1)
        ready = (complete & (window[:, None, None] >= began)).nonzero()
        step, member, agent = ready.unbind(1)
        places = window[step] % length
        memory["return"][places, member, agent] = returns[step, member, agent]
        for k, place in zip(member.tolist(), (places * agents + agent).tolist(), strict=True):
            queues[k].append(place)
        began[complete] = t + 1

    prediction = predict()

    def loss(update: int) -> Float[Tensor, " networks"]:
        while min(map(len, queues)) < (lag + 1) * batch:
            advance(update)
        places = torch.tensor([[queue.popleft() for _ in range(batch)] for queue in queues], device=device)
        index = (places // agents, torch.arange(n, device=device)[:, None], places % agents)
        sample = {name: values[index] for name, values in memory.items()}
        lags.append(update - sample["update"].mean())
        output = ensemble.each(sample["observation"])
        return actor_critic_loss(output, sample["action"], sample["return"], beta).sum(1)

    parameters = list(ensemble.parameters.values())

    def clipped_adam(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
        def clip(*_: object) -> None:  # the gradient of each network to a norm of at most 5
            norm = sum(p.grad.flatten(1).square().sum(1) for p in parameters).sqrt()
            factor = (5 / norm).clamp(max=1)
            for p in parameters:
                p.grad.mul_(factor.view(-1, *[1] * (p.ndim - 1)))

        adam = torch.optim.Adam(parameters, lr=lr)
        adam.register_step_pre_hook(clip)
        return adam

    falling = partial(LinearLR, start_factor=1, end_factor=0, total_iters=updates)
    fit(loss, parameters, steps=updates, lr=lr, optimizer=clipped_adam, schedule=falling, record_every=updates)
    collided, reached, timed_out = torch.stack(counts, 1).sum(-1)
    return ensemble.members(), History(reached, collided, timed_out, torch.stack(lags))


class Drives(NamedTuple):
    """Drives to one goal each: how they ended, the poses on the way (NaN after the end), and the worlds."""

    reached: Bool[Tensor, " n"]
    collided: Bool[Tensor, " n"]
    poses: Float[Tensor, "steps n 3"]
    goal: Float[Tensor, "n 2"]
    discs: Discs
    segments: Segments


def drive(policy: Policy, level: int | Sequence[int], episodes: int, *, seed: int, **options: object) -> Drives:
    """Let a policy drive in fresh worlds, each episode until goal, collision or time limit.

    Worlds, starts and goals depend on level, episodes and seed alone: policies meet the same.

    Parameters
    ----------
    policy
        Maps observations to actions.
    level, episodes, seed
        Difficulty, number and seed of the worlds; take another seed than in training.
    options
        Of :class:`NavigationSimulator`: noise, rays, horizon, ...

    Raises
    ------
    ValueError
        As :class:`NavigationSimulator`.
    """
    simulator = NavigationSimulator(episodes, level, seed=seed, **options)
    alive = torch.arange(episodes, device=simulator.pose.device)
    world = (simulator.goal.clone(), simulator.discs.clone(), simulator.segments.clone())
    ends = torch.zeros(2, episodes, dtype=torch.bool, device=alive.device)
    poses = [simulator.pose]
    while len(alive):
        _, collided, reached, timed_out = simulator.step(policy(simulator.observe()))
        poses.append(torch.full_like(poses[0], math.nan).index_copy(0, alive, simulator.pose))
        ends[:, alive] = torch.stack([reached, collided])
        going = ~(collided | reached | timed_out)
        simulator.keep(going)
        alive = alive[going]
    return Drives(*ends, torch.stack(poses), *world)


def evaluate(
    policy: Policy, level: int | Sequence[int], episodes: int, *, seed: int, **options: object
) -> tuple[float, float, float]:
    """Rates of success, collision and timeout of :func:`drive`, with the same arguments."""
    drives = drive(policy, level, episodes, seed=seed, **options)
    success, collision = drives.reached.double().mean().item(), drives.collided.double().mean().item()
    return success, collision, 1 - success - collision


def greedy(network: nn.Module) -> Policy:
    """The policy that takes the most probable action."""

    @torch.no_grad()
    def policy(observation: Float[Tensor, "n frames size"]) -> Int[Tensor, " n"]:
        return network(observation)[:, :-1].argmax(1)

    return policy


def blind(policy: Policy, bins: int = 16) -> Policy:
    """The same policy with the scan overwritten by "free" in every direction."""

    def blinded(observation: Float[Tensor, "n frames size"]) -> Int[Tensor, " n"]:
        observation = observation.clone()
        observation[..., :-bins] = 1
        return policy(observation)

    return blinded


def random_policy(generator: torch.Generator) -> Policy:
    """The policy that takes every action equally often."""
    return lambda observation: torch.randint(
        len(ACTIONS), observation.shape[:1], generator=generator, device=observation.device
    )


def _steer(bearing: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The action whose turn in one step comes nearest to a bearing."""
    turns = STEP_TIME * ACTIONS[:, 0].to(bearing)
    return (bearing[:, None] - turns).abs().argmin(1)


def _compass(observation: Float[Tensor, "n frames size"], bins: int) -> Float[Tensor, " n"]:
    """The bearing in the middle of the compass bin of the latest frame."""
    return wrap(observation[:, -1, -bins:].argmax(1) * (2 * math.pi / bins))


def drive_straight(observation: Float[Tensor, "n frames size"], bins: int = 16) -> Int[Tensor, " n"]:
    """The policy that steers by the compass alone."""
    return _steer(_compass(observation, bins))


def follow_gap(
    observation: Float[Tensor, "n frames size"], bins: int = 16, free: float = 0.8, margin: float = 0.3
) -> Int[Tensor, " n"]:
    """A policy without learning: steer for the free direction that is nearest to the goal's.

    A direction is free if no return of the latest scan lies in a corridor of half-width ``margin`` (metres) along it,
    up to a distance of ``free``, or of the most that any direction offers.
    """
    scan, bearing = SCAN_RANGE * observation[:, -1, :-bins], _compass(observation, bins)
    rays = torch.linspace(-FIELD_OF_VIEW / 2, FIELD_OF_VIEW / 2, scan.shape[1], device=scan.device)
    ahead, aside = (rays[:, None] - rays).cos(), (rays[:, None] - rays).sin().abs()
    blocked = (scan[:, None] * aside < margin) & (ahead > 0)  # robot, direction, ray
    room = torch.where(blocked, scan[:, None] * ahead, SCAN_RANGE).amin(2)
    good = room >= torch.minimum(room.amax(1, keepdim=True), room.new_tensor(free))
    return _steer(rays[wrap(rays - bearing[:, None]).abs().masked_fill(~good, math.inf).argmin(1)])
