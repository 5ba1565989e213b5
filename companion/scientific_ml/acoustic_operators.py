"""Sound of a moving source in a room, learned as an operator: a wave solver and deep operator networks (DeepONets).

Borrel-Jensen, Goswami, Engsig-Karup, Karniadakis and Jeong, "Sound propagation in realistic interactive 3D scenes with
parameterized sources using deep neural operators", PNAS 2024 (arXiv 2308.05141).

A pulse ``u`` of pressure starts at rest in a room of two dimensions, and ``p(x, y, t)`` solves
``∂²p/∂t² = c² ∇²p`` with ``∂p/∂n = -γ/c ∂p/∂t`` on the walls. The admittance ``γ = 1/ξ`` is the inverse of the
normalised impedance; rigid walls have ``γ = 0``. A network learns the linear map from ``u`` to ``p``. Lengths are
in metres, times in seconds, pressures in pascal. Grids have square cells of side ``h``, centred at ``(i + 1/2) h``; the
first grid axis is ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from companion.training import Ensemble, fit

SPEED_OF_SOUND = 343.0  # m/s

# --- the reference solver ---------------------------------------------------------------------------------------------


def _neighbour_sum(p: Float[Tensor, "*batch nx ny"]) -> Float[Tensor, "*batch nx ny"]:
    """Sum over the four neighbours of every cell; beyond the grid is zero."""
    q = pad(p, (1, 1, 1, 1))
    return q[..., :-2, 1:-1] + q[..., 2:, 1:-1] + q[..., 1:-1, :-2] + q[..., 1:-1, 2:]


def _laplacian(p: Float[Tensor, "*batch nx ny"], inside: Float[Tensor, "nx ny"]) -> Float[Tensor, "*batch nx ny"]:
    """``(L p)_i``: the sum of ``p_j - p_i`` over the neighbours ``j`` inside the room; ``p`` is zero outside."""
    return inside * (_neighbour_sum(p) - _neighbour_sum(inside) * p)


def simulate_wave(
    p0: Float[Tensor, "B nx ny"],
    mask: Bool[Tensor, "nx ny"],
    dx: float,
    dt: float,
    steps: int,
    admittance: float = 0.0,
    c: float = SPEED_OF_SOUND,
) -> Float[Tensor, "B steps+1 nx ny"]:
    """Pressure at every time step after a start at rest: finite volumes in space, leapfrog in time.

    Parameters
    ----------
    p0
        Initial pressures (Pa), one room full each; what lies outside the room is ignored.
    mask
        True in the cells of the room.
    dx, dt
        Side of a cell (m) and time step (s).
    steps
        Number of time steps.
    admittance
        ``γ`` of all walls; 0 is rigid.
    c
        Speed of sound (m/s).

    Raises
    ------
    ValueError
        If the shapes disagree, ``p0`` is not finite, ``admittance`` is negative, ``steps`` < 1, or
        ``c dt/dx`` exceeds ``1/sqrt(2)``, where the scheme becomes unstable.
    """
    lam = c * dt / dx
    if p0.ndim != 3 or p0.shape[1:] != mask.shape or not p0.isfinite().all():
        raise ValueError(
            f"p0 must hold finite fields of shape (B, {', '.join(map(str, mask.shape))}), got {tuple(p0.shape)}"
        )
    if not 0 < lam <= math.sqrt(0.5) + 1e-12:
        raise ValueError(f"c dt/dx must lie between 0 and 1/sqrt(2), got {lam:.4g} from {dx=}, {dt=} and {c=}")
    if not admittance >= 0 or steps < 1:
        raise ValueError(f"admittance must not be negative and steps at least 1, got {admittance=} and {steps=}")
    inside = mask.to(p0)
    kappa = lam * admittance / 2 * (4 - _neighbour_sum(inside))  # wall faces absorb, at a re-entrant corner too
    field = p0.new_empty(len(p0), steps + 1, *mask.shape)
    field[:, 0] = p0 * inside
    field[:, 1] = field[:, 0] + lam**2 / 2 * _laplacian(field[:, 0], inside)  # a start at rest: p^1 = p^-1
    for n in range(1, steps):
        now, before = field[:, n], field[:, n - 1]
        field[:, n + 1] = (2 * now - (1 - kappa) * before + lam**2 * _laplacian(now, inside)) / (1 + kappa)
    return field


def acoustic_energy(
    field: Float[Tensor, "steps+1 nx ny"], mask: Bool[Tensor, "nx ny"], lam: float
) -> Float[Tensor, " steps"]:
    """Discrete energy between successive time steps, ``|p' - p|²/2 - λ²/2 <p', L p>`` with ``λ = c dt/h``.

    Constant between rigid walls, never rising between absorbing ones. Without units (a multiple of joules per metre).

    Raises
    ------
    ValueError
        If the shapes disagree or ``lam`` is not positive.
    """
    if field.ndim != 3 or field.shape[1:] != mask.shape or len(field) < 2:
        raise ValueError(f"field must have shape (steps+1, {tuple(mask.shape)}), got {tuple(field.shape)}")
    if not lam > 0:
        raise ValueError(f"lam must be positive, got {lam}")
    before, after = field[:-1], field[1:]
    flow = after * _laplacian(before, mask.to(field))
    return ((after - before).square() - lam**2 * flow).sum((-2, -1)) / 2


def room_mask(shape: str, side: float, dx: float) -> Bool[Tensor, "n n"]:
    """Cells of a ``"square"`` room, or of an ``"L"``: the square without its quadrant of large x and large y.

    Raises
    ------
    ValueError
        If the shape is unknown, or ``side`` is no multiple of ``dx`` (for an L: of ``2 dx``).
    """
    if shape not in ("square", "L"):
        raise ValueError(f"shape must be 'square' or 'L', got {shape!r}")
    n, unit = round(side / dx), 2 if shape == "L" else 1
    if n < unit or n % unit or not math.isclose(n * dx, side):
        raise ValueError(f"side must be a positive multiple of {unit} dx, got {side=} and {dx=}")
    mask = torch.ones(n, n, dtype=torch.bool)
    if shape == "L":
        mask[n // 2 :, n // 2 :] = False
    return mask


def gaussian_source(
    positions: Float[Tensor, "B 2"], mask: Bool[Tensor, "nx ny"], dx: float, sigma: float
) -> Float[Tensor, "B nx ny"]:
    """Pulses ``exp(-|x - x0|²/σ²)`` of amplitude 1 Pa around the given positions (m), zero outside the room.

    Raises
    ------
    ValueError
        If a position lies outside the room, the shape is wrong or ``sigma`` is not positive.
    """
    if positions.ndim != 2 or positions.shape[1] != 2 or not sigma > 0:
        raise ValueError(f"positions must be (B, 2) and sigma positive, got {tuple(positions.shape)} and {sigma=}")
    cell = (positions / dx).floor().long()
    size = torch.tensor(mask.shape, device=positions.device)
    if not ((cell >= 0) & (cell < size)).all() or not mask[cell[:, 0], cell[:, 1]].all():
        raise ValueError("positions must lie inside the room, got at least one outside the mask")
    along = [
        torch.exp(-(((torch.arange(n).to(positions) + 0.5) * dx - positions[:, [k]]) ** 2) / sigma**2)
        for k, n in enumerate(mask.shape)
    ]
    return along[0][:, :, None] * along[1][:, None, :] * mask.to(positions)


class Recording(NamedTuple):
    """What a network learns from, or is tested on, in float32."""

    u: Float[Tensor, "B m"]  # pulses at the sensors (Pa)
    y: Float[Tensor, "Q 3"]  # listeners and times, scaled to the size of the room
    p: Float[Tensor, "B Q"]  # pressure there (Pa)

    def at(self, chosen: Tensor) -> Recording:
        """The recording at some of its coordinates: indices, or a mask."""
        return Recording(self.u, self.y[chosen], self.p.mT[chosen].mT)


@dataclass(frozen=True)
class Room:
    """A room with walls of one impedance, the pulse that sounds in it, and the grid of the solver."""

    shape: str
    side: float = 2.0
    dx: float = 0.05
    steps: int = 60
    sigma: float = 0.4
    impedance: float = 18.0
    sensor_every: int = 4  # cells
    courant: float = 0.6

    @cached_property
    def mask(self) -> Bool[Tensor, "n n"]:
        return room_mask(self.shape, self.side, self.dx)

    @property
    def dt(self) -> float:
        return self.courant * self.dx / SPEED_OF_SOUND

    def refined(self, factor: int) -> Room:
        """The same room and duration on a grid ``factor`` times as fine, in space and in time."""
        return replace(self, dx=self.dx / factor, steps=self.steps * factor)

    def lattice(self, spacing: float) -> Float[Tensor, "B 2"]:
        """Source positions on a square lattice that starts half a spacing from the walls."""
        axis = torch.arange(spacing / 2, self.side, spacing, dtype=torch.float64)
        points = torch.cartesian_prod(axis, axis)
        cell = (points / self.dx).long()
        return points[self.mask[cell[:, 0], cell[:, 1]]]

    def random_sources(self, n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
        """Source positions drawn uniformly from the room."""
        cells = self.mask.nonzero()
        chosen = cells[torch.randint(len(cells), (n,), generator=generator)]
        return (chosen + torch.rand(n, 2, generator=generator, dtype=torch.float64)) * self.dx

    def fields(self, positions: Float[Tensor, "B 2"]) -> Float[Tensor, "B steps+1 n n"]:
        """The solver's pressure (Pa) for sources at these positions, in float64."""
        mask = self.mask.to(positions.device)
        p0 = gaussian_source(positions, mask, self.dx, self.sigma)
        return simulate_wave(p0, mask, self.dx, self.dt, self.steps, 1 / self.impedance)

    def sensors(self, positions: Float[Tensor, "B 2"]) -> Float[Tensor, "B m"]:
        """Pulses at the sensors: a coarse grid over the whole square, silent outside the room."""
        pulse = gaussian_source(positions, self.mask.to(positions.device), self.dx, self.sigma)
        every = slice(self.sensor_every // 2, None, self.sensor_every)
        return pulse[:, every, every].flatten(1).float()

    def coordinates(self) -> Float[Tensor, "Q 3"]:
        """All cells of the room at all time steps, time first: ``(2x/L - 1, 2y/L - 1, ct/L)``."""
        cells = 2 * (self.mask.nonzero() + 0.5) * self.dx / self.side - 1
        times = torch.arange(self.steps + 1) * self.dt * SPEED_OF_SOUND / self.side
        return torch.cat([cells.repeat(len(times), 1), times.repeat_interleave(len(cells))[:, None]], 1).float()

    def record(
        self, positions: Float[Tensor, "B 2"], chosen: Int[Tensor, " Q"] | None = None, at_once: int = 64
    ) -> Recording:
        """Simulate sources, ``at_once`` at a time, and keep the chosen ones (all by default) of :meth:`coordinates`."""
        chosen = torch.arange(int(self.mask.sum()) * (self.steps + 1)) if chosen is None else chosen
        mask, chosen_there = self.mask.to(positions.device), chosen.to(positions.device)
        kept = [self.fields(some)[:, :, mask].flatten(1)[:, chosen_there].float() for some in positions.split(at_once)]
        y = self.coordinates()[chosen].to(positions.device)
        p = torch.cat(kept).mT.contiguous().mT  # coordinates apart in memory: a batch picks among them
        return Recording(self.sensors(positions), y, p)


# --- the networks -----------------------------------------------------------------------------------------------------


def fourier_features(y: Float[Tensor, "Q d"], frequencies: Sequence[float]) -> Float[Tensor, "Q d*(1+2F)"]:
    """``y``, then all ``cos 2πfy``, then all ``sin 2πfy``, with frequencies ``f`` in cycles per unit of ``y``."""
    angles = (2 * math.pi * y.new_tensor(frequencies)[:, None] * y[..., None, :]).flatten(-2)
    return torch.cat([y, angles.cos(), angles.sin()], -1)


class ModifiedMLP(nn.Module):
    """Sine network whose hidden layers ``z`` choose between two codes of the input: ``z U + (1 - z) V``.

    Parameters
    ----------
    in_features, hidden, out_features, depth
        Widths, and the number of hidden layers.
    omega0
        Factor on the first layer's weights.
    gated
        False leaves the codes ``U, V = sin(W x + b)`` out, which is a plain network.
    generator
        Source of the weights: uniform in ±1/fan-in for the first layer and the codes, in ±sqrt(6/fan-in) above. Biases
        start at zero.

    Raises
    ------
    ValueError
        If a width or ``depth`` is not positive.

    Notes
    -----
    Source: the authors' code (``ModMLP``), which divides the weights above by 30 and has ``omega0`` = 30.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        depth: int,
        omega0: float = 10.0,
        gated: bool = True,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if min(in_features, hidden, out_features, depth) < 1:
            raise ValueError(
                "in_features, hidden, out_features and depth must be positive, "
                f"got {in_features}, {hidden}, {out_features}, {depth}"
            )

        def linear(n_in: int, n_out: int, limit: float) -> nn.Linear:
            layer = nn.utils.skip_init(nn.Linear, n_in, n_out)
            nn.init.uniform_(layer.weight, -limit, limit, generator=generator)
            nn.init.zeros_(layer.bias)
            return layer

        first, above = 1 / in_features, math.sqrt(6 / hidden)
        self.omega0 = omega0
        self.codes = nn.ModuleList(linear(in_features, hidden, first) for _ in range(2 if gated else 0))
        self.layers = nn.ModuleList(
            [linear(in_features, hidden, first), *(linear(hidden, hidden, above) for _ in range(depth - 1))]
        )
        self.output = linear(hidden, out_features, above)

    def forward(self, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        codes = [torch.sin(code(x)) for code in self.codes]
        z = self.omega0 * x
        for layer in self.layers:
            z = torch.sin(layer(z))
            if codes:
                z = z * codes[0] + (1 - z) * codes[1]
        return self.output(z)


class DeepONet(nn.Module):
    """Deep operator network ``p(u)(y) = Σ_k b_k(u) τ_k(y) / sqrt(n_basis) + b_0``.

    The branch ``b`` reads the pulse at the sensors, the trunk ``τ`` a coordinate ``(x, y, t)``.

    Parameters
    ----------
    n_sensors
        Number ``m`` of sensors.
    hidden, n_basis
        Width of both networks, and the number of terms.
    frequencies
        Of the trunk's Fourier features; none are given for an empty sequence.
    gated, generator
        As for :class:`ModifiedMLP`.
    """

    def __init__(
        self,
        n_sensors: int,
        hidden: int = 96,
        n_basis: int = 50,
        frequencies: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
        gated: bool = True,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        network = partial(ModifiedMLP, gated=gated, generator=generator)
        self.frequencies = tuple(frequencies)
        self.branch = network(n_sensors, hidden, n_basis, 2)
        self.trunk = network(3 + 6 * len(self.frequencies), hidden, n_basis, 3)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, u: Float[Tensor, "B m"], y: Float[Tensor, "Q 3"]) -> Float[Tensor, "B Q"]:
        branch = self.branch(2 * u - 1)
        trunk = self.trunk(fourier_features(y, self.frequencies))
        return branch @ trunk.mT / math.sqrt(branch.shape[-1]) + self.bias


def transfer(model: DeepONet, freeze: bool = True) -> DeepONet:
    """A copy of a network that goes on to learn another room.

    With ``freeze``, what is near the inputs no longer trains: the codes of both networks, both hidden layers of the
    branch and the first of the trunk. Source: ``freeze_BN_0_1_TN_0`` in the authors' configurations.
    """
    copy = deepcopy(model).requires_grad_(True)
    if freeze:
        for part in (copy.branch.codes, copy.branch.layers, copy.trunk.codes, copy.trunk.layers[0]):
            part.requires_grad_(False)
    return copy


def train_operators(
    networks: Sequence[DeepONet],
    recordings: Sequence[Recording],
    *,
    steps: int,
    n_sources: int,
    n_coordinates: int,
    lr: float,
) -> Ensemble:
    """Train networks of one architecture side by side, each on its own recording; the networks themselves stay.

    Every step draws sources and coordinates for each member and takes the mean square over all their pairs. Adam, with
    a learning rate that falls to zero along a cosine. Parameters without gradient stay as they are.

    Parameters
    ----------
    networks, recordings
        One recording for each network.
    steps, lr
        Number of steps, and the learning rate of the first.
    n_sources, n_coordinates
        Size of a batch; a recording with fewer sources limits it for all.
        Member ``k`` draws with seed ``k``.

    Raises
    ------
    ValueError
        If there are not as many recordings as networks, or the batch is empty.
    """
    if len(networks) != len(recordings):
        raise ValueError(f"recordings must be one per network, got {len(recordings)} for {len(networks)}")
    n_sources = min(n_sources, *(len(recording.u) for recording in recordings))
    if n_sources < 1 or n_coordinates < 1:
        raise ValueError(f"n_sources and n_coordinates must be positive, got {n_sources=} and {n_coordinates=}")
    operators = Ensemble(networks)
    generators = [torch.Generator().manual_seed(k) for k in range(len(networks))]

    def draw(recording: Recording, generator: torch.Generator) -> Recording:
        coordinates = torch.randint(len(recording.y), (n_coordinates,), generator=generator)
        part = recording.at(coordinates.to(recording.y.device))
        if n_sources == len(part.u):
            return part
        sources = torch.randperm(len(part.u), generator=generator)[:n_sources].to(part.u.device)
        return Recording(part.u[sources], part.y, part.p[sources])

    def loss(_: int) -> Float[Tensor, " members"]:
        batch = map(draw, recordings, generators)
        u, y, p = (torch.stack(tensors) for tensors in zip(*batch, strict=True))
        return (operators.each(u, y) - p).square().mean((1, 2))

    trained = [parameter for parameter in operators.parameters.values() if parameter.requires_grad]
    fit(
        loss,
        trained,
        steps=steps,
        lr=lr,
        optimizer=partial(torch.optim.Adam, fused=True),
        cosine_to=0.0,
        record_every=steps,
    )
    return operators


def nearest_source(u: Float[Tensor, "B m"], table: Recording) -> Float[Tensor, "B Q"]:
    """What a table of stored sounds answers: the field of the stored source whose pulse is closest to ``u``."""
    return table.p[torch.cdist(u, table.u).argmin(1)]


def linear_operator(table: Recording, rcond: float = 1e-6) -> Float[Tensor, "m Q"]:
    """The least-squares matrix from pulse to field, ``U⁺ P``: the linear fit, with no network."""
    return torch.linalg.pinv(table.u.double(), rtol=rcond).float() @ table.p
