"""Cosmology from points and trees: a few invariant features with least squares, and graph networks.

Huang, Stiskalek, Lee, Bayer, Margossian, Jespersen, Perez, Saul and Villaescusa-Navarro, "CosmoBench: a multiscale,
multiview, multitask cosmology benchmark for geometric deep learning", NeurIPS 2025 (arXiv 2507.03707).

The benchmark's clouds come from simulations of millions of core-hours. Two classical approximations stand in for them:
Zel'dovich's for clouds, extended Press-Schechter theory for merger trees. Units: length Mpc/h, velocity km/s, mass
M_sun/h; a flat universe today, with ``h = 0.6711`` and ``n_s = 0.9624``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import fft
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist, squareform
from torch import Tensor, nn

from companion import runtime
from companion.data import DataUnavailable, download
from companion.models import mlp

H, N_S = 0.6711, 0.9624
LIMITS = np.array([[0.1, 0.6], [0.5, 1.0]])  # smallest and largest (Ω_m, σ_8); predictions are clipped to them
_WAVENUMBERS = np.geomspace(1e-4, 1e2, 1500)  # h/Mpc, of the integral for σ(R)
_ADDRESS = "https://users.flatironinstitute.org/~fvillaescusa/CosmoBench/"
_FILES = {"CAMELS-SAM": "CAMELS-SAM/galaxies/top5000_galaxies_{}.hdf5", "CAMELS": "CAMELS/ALL_galaxies_{}.hdf5"}
_BOXES = {"zeldovich": 128.0, "CAMELS-SAM": 100.0, "CAMELS": 25.0}
Clouds = tuple[list[np.ndarray], list[np.ndarray], np.ndarray]  # positions, velocities, (Ω_m, σ_8) of each cloud


def _check_cosmology(omega_m: float, sigma_8: float = 1.0) -> None:
    if not 0 < omega_m <= 1 or not 0 < sigma_8 < np.inf:
        raise ValueError(f"omega_m must lie in (0, 1] and sigma_8 be positive, got {omega_m=} and {sigma_8=}")


def _check_cloud(positions: np.ndarray, box: float) -> None:
    if positions.ndim != 2 or positions.shape[1] != 3 or len(positions) < 2:
        raise ValueError(f"positions must have shape (N, 3) with N of 2 or more, got {positions.shape}")
    if not (positions.min() >= 0 and positions.max() <= box):  # false for NaN
        raise ValueError(f"positions must lie between 0 and box={box}, got {positions.min()} to {positions.max()}")


# --- the universe -----------------------------------------------------------------------------------------------------


def transfer_function(k: Float[np.ndarray, "*shape"], omega_m: float) -> Float[np.ndarray, "*shape"]:
    """How much of an early fluctuation of wavenumber ``k > 0`` (h/Mpc) survives; 1 for the longest waves.

    Source: Bardeen, Bond, Kaiser and Szalay, 1986 (cold dark matter).
    """
    _check_cosmology(omega_m)
    q = k / (omega_m * H)
    series = 1 + 3.89 * q + (16.1 * q) ** 2 + (5.46 * q) ** 3 + (6.71 * q) ** 4
    return np.log1p(2.34 * q) / (2.34 * q) * series**-0.25


def _shape(k: np.ndarray, omega_m: float) -> np.ndarray:
    """The power spectrum up to its amplitude."""
    return k**N_S * transfer_function(k, omega_m) ** 2


def _rough_sigma(R: np.ndarray, omega_m: float) -> np.ndarray:
    """σ(R) for a power spectrum of amplitude 1."""
    x = np.multiply.outer(R, _WAVENUMBERS)
    window = 3 * (np.sin(x) - x * np.cos(x)) / (x * x * x)
    small = x < 1e-2
    window[small] = 1 - x[small] ** 2 / 10
    window *= window
    integrand = _WAVENUMBERS**3 * _shape(_WAVENUMBERS, omega_m) * window  # k² P W² dk = k³ P W² d(ln k)
    return np.sqrt(np.trapezoid(integrand, np.log(_WAVENUMBERS)) / (2 * np.pi**2))


def sigma_radius(R: float | Float[np.ndarray, "*shape"], omega_m: float, sigma_8: float) -> Float[np.ndarray, "*shape"]:
    """Standard deviation of the linear density contrast in spheres of radius ``R`` (Mpc/h), today.

    Raises
    ------
    ValueError
        If a radius is not positive, ``omega_m`` is outside (0, 1] or ``sigma_8`` is not positive.
    """
    _check_cosmology(omega_m, sigma_8)
    R = np.asarray(R, dtype=float)
    if not (R > 0).all():
        raise ValueError(f"R must be positive, got {R.min()}")
    return sigma_8 * _rough_sigma(R, omega_m) / _rough_sigma(np.array(8.0), omega_m)


def growth_factor(a: float | Float[np.ndarray, "*shape"], omega_m: float) -> Float[np.ndarray, "*shape"]:
    """Size of linear fluctuations at scale factor ``a`` of a flat universe, relative to today.

    Raises
    ------
    ValueError
        If a scale factor is not positive, or ``omega_m`` is outside (0, 1].

    Source: the fit of Carroll, Press and Turner, 1992, within 0.3 % of the integral.
    """
    _check_cosmology(omega_m)
    a = np.asarray(a, dtype=float)
    if not (a > 0).all():
        raise ValueError(f"a must be positive, got {a.min()}")

    def growth(a: np.ndarray) -> np.ndarray:
        matter = omega_m / (omega_m + (1 - omega_m) * a**3)
        vacuum = 1 - matter
        return a * 2.5 * matter / (matter ** (4 / 7) - vacuum + (1 + matter / 2) * (1 + vacuum / 70))

    return growth(a) / growth(np.array(1.0))


def _waves(n_grid: int, box: float) -> tuple[list[np.ndarray], np.ndarray]:
    """Components of the wave vector for derivatives, and k², on the half grid of a real transform."""
    full, half = (2 * np.pi * n_grid / box * f(n_grid) for f in (fft.fftfreq, fft.rfftfreq))
    k = np.meshgrid(full, full, half, indexing="ij", sparse=True)
    squared = sum(component**2 for component in k)
    squared[0, 0, 0] = np.inf  # the mean has no wave
    # The shortest wave along an axis has a derivative that vanishes at every grid point.
    return [np.where(np.isclose(abs(component), np.pi * n_grid / box), 0, component) for component in k], squared


def _field(field_k: np.ndarray, n_grid: int) -> Float[np.ndarray, "n n n"]:
    return fft.irfftn(field_k, s=(n_grid,) * 3, axes=(0, 1, 2))


def _displacement(delta_k: np.ndarray, n_grid: int, box: float) -> Float[np.ndarray, "n n n 3"]:
    """ψ with ψ_k = i k δ_k / k², hence ∇·ψ = -δ: matter flows to where there is more of it."""
    k, squared = _waves(n_grid, box)
    return np.stack([_field(1j * component * delta_k / squared, n_grid) for component in k], -1)


def _grid_power(omega_m: float, n_grid: int, box: float) -> np.ndarray:
    """The power spectrum on the half grid, up to its amplitude; the squared wavenumbers are whole multiples of one."""
    unit = (2 * np.pi / box) ** 2
    squared = _waves(n_grid, box)[1]
    squared[0, 0, 0] = 0
    table = np.append(0, _shape(np.sqrt(unit * np.arange(1, 3 * (n_grid // 2) ** 2 + 1)), omega_m))
    return table[np.rint(squared / unit).astype(int)]


def _growth_rate(omega_m: float) -> float:
    return omega_m**0.55


def zeldovich_halos(
    omega_m: float, sigma_8: float, rng: np.random.Generator, box: float = 128.0, n_grid: int = 32, n_halos: int = 400
) -> tuple[Float[np.ndarray, "n_halos 3"], Float[np.ndarray, "n_halos 3"], Float[np.ndarray, "n n n"]]:
    """Positions and velocities of the densest cells of a random universe, moved by Zel'dovich's approximation.

    A Gaussian density contrast δ is drawn on a grid. The ``n_halos`` cells of highest δ move from a random point q of
    the cell to ``q + ψ``, where ``∇·ψ = -δ``, with velocity ``100 Ω_m^0.55 ψ``. Their number is fixed, as in the
    benchmark, so that it tells nothing; and ranking cells removes the amplitude σ_8 from q, though not from ψ.

    Parameters
    ----------
    omega_m, sigma_8
        Matter density and amplitude of fluctuations.
    rng
        Source of randomness.
    box
        Side of the periodic cube, Mpc/h.
    n_grid
        Cells along a side, even.
    n_halos
        How many cells are kept.

    Returns
    -------
    positions
        In [0, box), Mpc/h.
    velocities
        Peculiar velocities in km/s.
    delta
        The density contrast on the grid.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Source: Zel'dovich, 1970; the selection is ours, after the benchmark's clouds of the 5000 largest objects.
    """
    _check_cosmology(omega_m, sigma_8)
    if not box > 0 or n_grid < 2 or n_grid % 2 or not 2 <= n_halos <= n_grid**3:
        raise ValueError(
            f"box must be positive, n_grid even and n_halos in 2..n_grid³, got {box=}, {n_grid=}, {n_halos=}"
        )
    amplitude = sigma_8 / _rough_sigma(np.array(8.0), omega_m)
    power = _grid_power(omega_m, n_grid, box)
    white = fft.rfftn(rng.standard_normal((n_grid,) * 3))
    delta_k = white * amplitude * np.sqrt(power * n_grid**3 / box**3)
    delta = _field(delta_k, n_grid)
    cells = np.argpartition(delta.ravel(), -n_halos)[-n_halos:]
    psi = _displacement(delta_k, n_grid, box).reshape(-1, 3)[cells]
    corner = np.stack(np.unravel_index(cells, delta.shape), 1)
    moved = (corner + rng.random((n_halos, 3))) * box / n_grid + psi
    return moved % box % box, 100 * _growth_rate(omega_m) * psi, delta  # twice: -1e-17 % box is box itself


def clouds(source: str, seed: int, n_train: int, n_test: int) -> tuple[Clouds, Clouds, float]:
    """Point clouds for training and for testing, and the side of their box.

    Parameters
    ----------
    source
        ``"zeldovich"`` draws Ω_m uniformly in (0.1, 0.5), σ_8 in (0.6, 1.0) and one cloud of 400 halos each.
        ``"CAMELS-SAM"`` and ``"CAMELS"`` are the benchmark's own clouds of galaxies in its split; the package h5py is
        needed. In the ``smoke`` profile clouds of the first kind stand in for them, in a box of their size.
    seed
        Of the draw; the benchmark's clouds do not depend on it.
    n_train, n_test
        How many clouds, at most.

    Raises
    ------
    ValueError
        If the source is unknown, or a number is smaller than 2.
    DataUnavailable
        If the benchmark's clouds cannot be had.
    """
    if source not in _BOXES or min(n_train, n_test) < 2:
        raise ValueError(
            f"source must be one of {', '.join(_BOXES)}, n_train and n_test at least 2, "
            f"got {source!r}, {n_train=}, {n_test=}"
        )
    box = _BOXES[source]
    if source != "zeldovich" and runtime.profile() != "smoke":
        train, test = (_benchmark(source, split, n) for split, n in (("train", n_train), ("test", n_test)))
        return train, test, box
    rng = np.random.default_rng(seed)
    targets = rng.uniform(*LIMITS, (n_train + n_test, 2))
    drawn = [zeldovich_halos(*pair, rng, box)[:2] for pair in targets]
    positions, velocities = map(list, zip(*drawn, strict=True))
    train, test = slice(n_train), slice(n_train, None)
    return *((positions[part], velocities[part], targets[part]) for part in (train, test)), box


def _benchmark(source: str, split: str, n: int) -> Clouds:
    """The first ``n`` clouds of one of the benchmark's files."""
    path = download(f"CosmoBench {source}", _ADDRESS + _FILES[source].format(split), None)
    try:
        import h5py
    except ImportError as error:
        raise DataUnavailable(
            f"the clouds of {source} are HDF5 files; install the package h5py, or set BOOK_PROFILE=book"
        ) from error
    with h5py.File(path) as file:
        targets = np.stack([file["params"][name][:n] for name in ("Omega_m", "sigma_8")], 1)
        groups = [file[f"LH/LH_{number}"] for number in range(len(targets))]
        positions = [np.stack([group[axis][:] for axis in "XYZ"], 1).astype(float) for group in groups]
        velocities = [np.stack([group[f"V{axis}"][:] for axis in "XYZ"], 1).astype(float) for group in groups]
    return [x % _BOXES[source] for x in positions], velocities, targets


# --- a few invariant features -----------------------------------------------------------------------------------------


def squared_distances(positions: Float[np.ndarray, "N 3"], box: float) -> Float[np.ndarray, " pairs"]:
    """Squared distances of all pairs of points in a periodic cube: each axis takes the shorter way round.

    Raises
    ------
    ValueError
        If ``positions`` has another shape, or a point lies outside the cube.
    """
    _check_cloud(positions, box)
    total = np.zeros(len(positions) * (len(positions) - 1) // 2)
    for axis in positions.T:
        apart = pdist(axis[:, None])
        total += np.minimum(apart, box - apart) ** 2
    return total


def _check_radii(name: str, radii: np.ndarray, box: float) -> None:
    if radii.ndim != 1 or not len(radii) or not (radii > 0).all() or radii.max() > box / 2:
        raise ValueError(f"{name} must hold radii between 0 and box/2={box / 2}, got {radii}")


def pair_distance_features(
    positions: Float[np.ndarray, "N 3"], box: float, cutoffs: Sequence[float]
) -> Float[np.ndarray, " 4*cutoffs"]:
    """Four statistics of the squared distances below each cut-off: mean, standard deviation, 1/3 and 2/3 quantile.

    They do not change when the cloud is shifted, mirrored or its axes or points are permuted.

    Parameters
    ----------
    positions
        Points in a periodic cube, Mpc/h.
    box
        Side of the cube.
    cutoffs
        Radii R_c, at most half the side: a larger sphere would meet itself.

    Returns
    -------
    ndarray
        The four statistics of the first cut-off, then those of the next, in (Mpc/h)².

    Raises
    ------
    ValueError
        If the cloud or a cut-off is not as asked, or fewer than two pairs lie within a cut-off.

    Source: the benchmark's code; quantiles are those of the nearest rank.
    """
    cutoffs = np.asarray(cutoffs, dtype=float)
    _check_radii("cutoffs", cutoffs, box)
    r2 = squared_distances(positions, box)
    r2 = np.sort(r2[r2 <= cutoffs.max() ** 2])
    counts = np.searchsorted(r2, cutoffs**2, side="right")
    if counts.min() < 2:
        raise ValueError(f"cutoffs must have two pairs within each, got {counts.min()} within {cutoffs.min()}")
    within = [r2[:count] for count in counts]
    thirds = [[v[round(q * (len(v) - 1))] for q in (1 / 3, 2 / 3)] for v in within]
    return np.concatenate([[v.mean(), v.std(ddof=1), *pair] for v, pair in zip(within, thirds, strict=True)])


def correlation_function(
    positions: Float[np.ndarray, "N 3"], box: float, edges: Float[np.ndarray, " bins+1"]
) -> Float[np.ndarray, " bins"]:
    """Two-point correlation ξ(r): the excess of pairs in each shell over what uniform points would have.

    Raises
    ------
    ValueError
        If the cloud or an edge is not as asked (edges rise, and reach at most half the side).
    """
    edges = np.asarray(edges, dtype=float)
    _check_radii("edges", edges, box)
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"edges must rise, got {edges}")
    r2 = squared_distances(positions, box)
    near = r2[r2 < edges[-1] ** 2]
    pairs = np.diff([np.count_nonzero(near < edge**2) for edge in edges])
    return pairs / (len(r2) * 4 / 3 * np.pi * np.diff(edges**3) / box**3) - 1


def velocity_features(
    positions: Float[np.ndarray, "N 3"], box: float, n_modes: int = 10, n_powers: int = 4
) -> Float[np.ndarray, "3 n_modes*n_powers N"]:
    """Pulls on every point from all others: ``F_kp(i) = Σ_j sin(2πk(x_i - x_j)/L) (L/r_ij)^p``, and the same for y, z.

    Odd in the displacement: mirror an axis and its features change sign. Rows run over k within p.

    Raises
    ------
    ValueError
        If the cloud is not as asked, two points coincide, or a number is smaller than 1.

    Source: the benchmark's code.
    """
    _check_cloud(positions, box)
    if min(n_modes, n_powers) < 1:
        raise ValueError(f"n_modes and n_powers must be at least 1, got {n_modes=}, {n_powers=}")
    distance = np.sqrt(squared_distances(positions, box))
    if not distance.min() > 0:
        raise ValueError("positions must differ, got two points at one place")
    nearness = squareform(box / distance)  # zero on the diagonal: no point pulls itself
    phase = 2 * np.pi / box * np.arange(1, n_modes + 1)[:, None] * positions.T[:, None]  # axes, modes, points
    sine, cosine = np.sin(phase), np.cos(phase)
    powers = accumulate([nearness] * n_powers, np.multiply)
    # sin(a - b) = sin a cos b - cos a sin b turns the sum over pairs into two products with R_p
    return np.concatenate([sine * (cosine @ R) - cosine * (sine @ R) for R in powers], axis=1)


def _cloud_in_cell(positions: np.ndarray, box: float, n_grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (N, 8) and weights of the eight grid points around each point."""
    scaled = positions / box * n_grid
    low = np.floor(scaled).astype(int)
    corners = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(8, 3)
    share = abs(1 - corners - (scaled - low)[:, None])
    cells = (low[:, None] + corners) % n_grid
    return np.ravel_multi_index(tuple(np.moveaxis(cells, 2, 0)), (n_grid,) * 3), share.prod(2)


def linear_theory_velocity(
    positions: Float[np.ndarray, "N 3"], box: float, omega_m: float, smoothing: float, n_grid: int = 32
) -> Float[np.ndarray, "N 3"]:
    """Velocities (km/s) of linear theory for a bias of 1: ``v_k = 100 f i k/k² δ_k exp(-k² R_s²/2)``.

    The density contrast is that of the points themselves, spread over a grid; a biased tracer needs division by b.

    Parameters
    ----------
    positions, box
        Points in a periodic cube, Mpc/h.
    omega_m
        Gives the growth rate ``f = Ω_m^0.55``: linear theory has to be told the cosmology.
    smoothing
        R_s in Mpc/h.
    n_grid
        Cells along a side, even.

    Raises
    ------
    ValueError
        If the cloud or a parameter is not as asked.
    """
    _check_cloud(positions, box)
    _check_cosmology(omega_m)
    if not smoothing >= 0 or n_grid < 2 or n_grid % 2:
        raise ValueError(f"smoothing must not be negative and n_grid be even, got {smoothing=}, {n_grid=}")
    cells, share = _cloud_in_cell(positions, box, n_grid)
    count = np.bincount(cells.ravel(), share.ravel(), n_grid**3).reshape((n_grid,) * 3)
    squared = _waves(n_grid, box)[1]
    delta_k = fft.rfftn(count / count.mean() - 1) * np.exp(-squared * smoothing**2 / 2 if smoothing else 0 * squared)
    psi = _displacement(delta_k, n_grid, box).reshape(-1, 3)
    return 100 * _growth_rate(omega_m) * (psi[cells] * share[..., None]).sum(1)


def fit_least_squares(
    X: Float[np.ndarray, "n d"], Y: Float[np.ndarray, "n t"]
) -> Callable[[Float[np.ndarray, "m d"]], Float[np.ndarray, "m t"]]:
    """Least squares with a bias, on features standardised by the training set; constant features get no weight.

    Raises
    ------
    ValueError
        If the sizes differ or a value is not finite.
    """
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y) or not np.isfinite(X).all() or not np.isfinite(Y).all():
        raise ValueError(f"X and Y must be finite, of shapes (n, d) and (n, t), got shapes {X.shape} and {Y.shape}")
    centre, scale = X.mean(0), X.std(0)
    scale = np.where(scale > 1e-12 * abs(centre), scale, np.inf)
    weights = np.linalg.lstsq((X - centre) / scale, Y - Y.mean(0))[0]
    offset = Y.mean(0)
    return lambda x: (x - centre) / scale @ weights + offset


# --- merger trees -----------------------------------------------------------------------------------------------------


def eps_merger_tree(
    omega_m: float,
    sigma_8: float,
    rng: np.random.Generator,
    m0: float | Float[np.ndarray, " trees"],
    m_res: float,
    scale_factors: Float[np.ndarray, " levels"],
    substeps: int = 4,
) -> tuple[Float[np.ndarray, " nodes"], Int[np.ndarray, " nodes"], Int[np.ndarray, " nodes"]]:
    """Merger trees of extended Press-Schechter theory, from the last scale factor back to the first.

    In a substep that raises the barrier ``ω = 1.686/D(a)`` by Δω, a halo of mass M has a progenitor of mass M_1 with
    ``S(M_1) = S(M) + (Δω/x)²``, x a standard normal number and ``S = σ²``, and a second one of mass ``M - M_1``. What
    falls below the resolution is lost. At the end of a step the two largest progenitors are kept, which makes the tree
    binary, as the benchmark does. Drawing M_1 and taking the rest as M_2 is an approximation (Lacey and Cole, 1993):
    the mean number of progenitors of a given mass is not exactly that of the theory.

    Parameters
    ----------
    omega_m, sigma_8, rng
        The cosmology, and the source of randomness.
    m0
        Mass of the halo at the root, M_sun/h; several masses grow one tree each.
    m_res
        Smallest mass that is followed.
    scale_factors
        Of the levels, falling; the first is that of the root.
    substeps
        Binary splits between two levels.

    Returns
    -------
    mass
        Of every node, M_sun/h. Nodes of a level stand together, roots first; siblings, the larger one first.
    level
        0 at the root.
    parent
        Index of the descendant; -1 at the root.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Source: Lacey and Cole, 1993.
    """
    _check_cosmology(omega_m, sigma_8)
    roots, a = np.atleast_1d(np.asarray(m0, dtype=float)), np.asarray(scale_factors, dtype=float)
    if not 0 < m_res < roots.min() or substeps < 1:
        raise ValueError(f"m_res must be positive and below m0, substeps at least 1, got {m_res=}, {m0=}, {substeps=}")
    if a.ndim != 1 or len(a) < 2 or not (np.diff(a) < 0).all() or not a[-1] > 0:
        raise ValueError(f"scale_factors must fall and be positive, got {scale_factors}")
    log_m = np.linspace(np.log(m_res / 10), np.log(roots.max()), 60)
    radius = np.exp(log_m / 3) * (3 / (4 * np.pi * 2.775e11 * omega_m)) ** (1 / 3)  # of the mean density
    variance = sigma_radius(radius, omega_m, sigma_8) ** 2
    barrier = 1.686 / growth_factor(a, omega_m)
    masses, levels, parents = [roots], [np.zeros(len(roots), int)], [np.full(len(roots), -1)]
    first = 0  # index of the first node of the level
    for number, rise in enumerate(np.diff(barrier) / substeps, start=1):
        mass, origin = masses[-1], np.arange(len(masses[-1]))
        for _ in range(substeps):
            S1 = np.interp(np.log(mass), log_m, variance) + (rise / rng.standard_normal(len(mass))) ** 2
            M1 = np.exp(np.interp(S1, variance[::-1], log_m[::-1], right=-np.inf))  # tiny: all of M stays together
            mass, origin = np.concatenate([M1, mass - M1]), np.tile(origin, 2)
            mass, origin = mass[mass >= m_res], origin[mass >= m_res]
        order = np.lexsort((-mass, origin))
        mass, origin = mass[order], origin[order]
        largest = np.arange(len(origin)) - np.searchsorted(origin, origin) < 2  # rank among its siblings
        masses.append(mass[largest])
        parents.append(first + origin[largest])
        levels.append(np.full(largest.sum(), number))
        first += len(masses[-2])
    return np.concatenate(masses), np.concatenate(levels), np.concatenate(parents)


Forest = tuple[np.ndarray, np.ndarray, np.ndarray]  # mass, level and parent of every node


def merger_forest(
    targets: Float[np.ndarray, "n 2"],
    rng: np.random.Generator,
    n_trees: int,
    m0: float,
    m_res: float,
    scale_factors: Float[np.ndarray, " levels"],
) -> Forest:
    """Mass, level and parent of ``n_trees`` trees for each cosmology (Ω_m, σ_8), one cosmology after the other.

    Arguments and errors as for :func:`eps_merger_tree`.
    """
    grown = [eps_merger_tree(*pair, rng, np.full(n_trees, m0), m_res, scale_factors) for pair in targets]
    offsets = np.cumsum([0] + [len(mass) for mass, _, _ in grown])
    parents = [
        np.where(parent < 0, -1, parent + offset) for (_, _, parent), offset in zip(grown, offsets, strict=False)
    ]
    return *(np.concatenate([tree[part] for tree in grown]) for part in (0, 1)), np.concatenate(parents)


def tree_of(level: Int[np.ndarray, " nodes"], parent: Int[np.ndarray, " nodes"]) -> Int[np.ndarray, " nodes"]:
    """Number of the tree to which each node belongs."""
    tree = np.cumsum(parent < 0) - 1  # right for the roots
    for number in range(1, level.max() + 1):
        below = level == number
        tree[below] = tree[parent[below]]
    return tree


def tree_features(forest: Forest, n_levels: int, m_res: float) -> Float[np.ndarray, "trees 2*(n_levels-1)"]:
    """Two numbers for each level below the root: log10 mass of the main branch, and log(1 + number of progenitors).

    The main branch follows the largest progenitor; once it is lost, its mass is set to ``m_res``.
    """
    mass, level, parent = forest
    tree = tree_of(level, parent)
    main = parent < 0
    largest = np.append(True, parent[1:] != parent[:-1])  # siblings stand together, the larger one first
    branch = np.full((tree.max() + 1, n_levels), np.log10(m_res))
    for number in range(1, n_levels):
        nodes = np.flatnonzero((level == number) & largest)
        nodes = nodes[main[parent[nodes]]]
        main[nodes] = True
        branch[tree[nodes], number] = np.log10(mass[nodes])
    counts = np.zeros_like(branch)
    np.add.at(counts, (tree, level), 1)
    return np.hstack([branch[:, 1:], np.log1p(counts[:, 1:])])


def refinement_samples(
    forest: Forest, scale_factors: Float[np.ndarray, " levels"]
) -> tuple[Float[np.ndarray, "n 5"], Int[np.ndarray, " n"]]:
    """Questions about trees whose odd levels have been dropped: did the dropped node merge?

    A sample is a node of an even level with two or more progenitors two levels down. Its label is 1 if the two largest
    of them have one dropped node as their parent: they merged in the earlier half of the step. Features are the log10
    masses of the node and the two, the number of all, and the node's scale factor.

    Source: the benchmark's refinement task.
    """
    mass, level, parent = forest
    kept = np.flatnonzero((level >= 2) & (level % 2 == 0))
    kept = kept[np.lexsort((-mass[kept], parent[parent[kept]]))]  # by descendant, the largest first
    node, start, count = np.unique(parent[parent[kept]], return_index=True, return_counts=True)
    node, start, count = node[count > 1], start[count > 1], count[count > 1]
    first, second = kept[start], kept[start + 1]
    logs = np.log10(np.stack([mass[node], mass[first], mass[second]], 1))
    X = np.column_stack([logs, count, np.asarray(scale_factors)[level[node]]])
    return X, (parent[first] == parent[second]).astype(int)


# --- graph networks ---------------------------------------------------------------------------------------------------


def neighbour_graph(
    positions: Float[np.ndarray, "N 3"], box: float, reach: float
) -> tuple[Int[Tensor, "2 edges"], Float[Tensor, "edges 3"]]:
    """Edges between points closer than ``reach``, in both directions, and for each its vector from target to source.

    Raises
    ------
    ValueError
        If the cloud is not as asked, or ``reach`` is not between 0 and half the side.
    """
    _check_cloud(positions, box)
    _check_radii("reach", np.array([reach]), box)
    pairs = cKDTree(positions % box, boxsize=box).query_pairs(reach, output_type="ndarray")
    both = np.concatenate([pairs, pairs[:, ::-1]])
    edges = np.ascontiguousarray(both[np.argsort(both[:, 1], kind="stable")].T)  # rows: source, target
    apart = positions[edges[0]] - positions[edges[1]]
    apart -= box * np.round(apart / box)
    return torch.from_numpy(edges), torch.from_numpy(apart).float()


def batch_graphs(
    graphs: Sequence[tuple[Int[Tensor, "2 edges"], Float[Tensor, "edges 3"]]], sizes: Sequence[int]
) -> tuple[Int[Tensor, "2 all_edges"], Float[Tensor, "all_edges 3"], Int[Tensor, " nodes"]]:
    """One graph of several that are not connected, and for each node the number of its graph."""
    offsets = np.cumsum([0, *sizes[:-1]])
    edges = torch.cat([pairs + offset for (pairs, _), offset in zip(graphs, offsets, strict=True)], 1)
    graph = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return edges, torch.cat([apart for _, apart in graphs]), graph


def _sum_at(values: Float[Tensor, "n d"], index: Int[Tensor, " n"], size: int) -> Float[Tensor, "size d"]:
    return values.new_zeros(size, values.shape[1]).index_add_(0, index, values)


def _mean_at(values: Float[Tensor, "n d"], index: Int[Tensor, " n"], size: int) -> Float[Tensor, "size d"]:
    """Mean pooling: the number of nodes itself stays hidden."""
    return _sum_at(values, index, size) / torch.bincount(index, minlength=size).clamp_min(1)[:, None]


def _length(vectors: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
    return vectors.square().sum(1).sqrt()


def _radial(distance: Float[Tensor, " edges"]) -> Float[Tensor, "edges 4"]:
    """Edge features of a distance d in units of the reach: d, d², exp(-4d), cos πd."""
    return torch.stack([distance, distance**2, torch.exp(-4 * distance), torch.cos(torch.pi * distance)], 1)


class CloudGNN(nn.Module):
    """Targets of a cloud from two rounds of messages between neighbours, and a mean over the points.

    Parameters
    ----------
    width
        Of all layers.
    reach
        Largest distance of neighbours.
    generator
        Source of the initial weights.
    """

    def __init__(self, width: int, reach: float, generator: torch.Generator) -> None:
        super().__init__()
        self.reach = reach
        self.edges = nn.ModuleList(mlp([4, width], generator=generator) for _ in range(2))
        self.ends = mlp([width, 2 * width], generator=generator)
        self.updates = nn.ModuleList(
            mlp(sizes, generator=generator) for sizes in ([width] * 3, [2 * width, width, width])
        )
        self.head = mlp([width, width, 2], generator=generator)

    def forward(
        self, edges: Int[Tensor, "2 edges"], apart: Float[Tensor, "edges 3"], cloud: Int[Tensor, " nodes"]
    ) -> Float[Tensor, "clouds 2"]:
        source, target = edges
        radial = _radial(_length(apart) / self.reach)
        h = _sum_at(torch.relu(self.edges[0](radial)), target, len(cloud))  # all points are alike: edges say it all
        h = torch.relu(self.updates[0](h))
        sending, receiving = self.ends(h).chunk(2, 1)  # multiplied at the nodes, which are fewer than the edges
        ends = sending.index_select(0, source) + receiving.index_select(0, target)
        message = torch.relu(self.edges[1](radial) + ends)
        h = torch.relu(self.updates[1](torch.cat([h, _sum_at(message, target, len(h))], 1)))
        return self.head(_mean_at(h, cloud, int(cloud[-1]) + 1))


class VelocityGNN(nn.Module):
    """Velocities as sums of pulls along the lines to the neighbours: equivariant under rotation and reflection.

    ``v_i = Σ_j κ(r_ij, h_i, h_j) r̂_ij / 20`` with a learned summary of the surroundings ``h_i = Σ_j MLP(r_ij) / 20``.
    Parameters as for :class:`CloudGNN`.
    """

    def __init__(self, width: int, reach: float, generator: torch.Generator) -> None:
        super().__init__()
        self.reach = reach
        self.surroundings = mlp([4, width, width // 2], generator=generator)
        self.pull = mlp([4 + width // 2 * 2, width, width, 1], generator=generator)

    def forward(
        self, edges: Int[Tensor, "2 edges"], apart: Float[Tensor, "edges 3"], cloud: Int[Tensor, " nodes"]
    ) -> Float[Tensor, "nodes 3"]:
        source, target = edges
        distance = _length(apart)
        radial = _radial(distance / self.reach)
        h = _sum_at(self.surroundings(radial), target, len(cloud)) / 20
        kappa = self.pull(torch.cat([radial, h.index_select(0, source), h.index_select(0, target)], 1))
        return _sum_at(kappa * apart / distance[:, None], target, len(cloud)) / 20


class DeepSet(nn.Module):
    """Targets of a tree from the unordered set of its nodes: a network for each node, a mean, a second network."""

    def __init__(self, n_features: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.node = mlp([n_features, width, width], generator=generator)
        self.head = mlp([width, width, 2], generator=generator)

    def forward(
        self, x: Float[Tensor, "nodes features"], parent: Int[Tensor, " nodes"], tree: Int[Tensor, " nodes"]
    ) -> Float[Tensor, "trees 2"]:
        return self.head(_mean_at(torch.relu(self.node(x)), tree, int(tree.max()) + 1))  # parents are not used


class TreeGNN(nn.Module):
    """Targets of a tree from three rounds in which every node adds up what its progenitors send."""

    def __init__(self, n_features: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.embed = mlp([n_features, width], generator=generator)
        self.updates = nn.ModuleList(mlp([2 * width, width], generator=generator) for _ in range(3))
        self.head = mlp([width, width, 2], generator=generator)

    def forward(
        self, x: Float[Tensor, "nodes features"], parent: Int[Tensor, " nodes"], tree: Int[Tensor, " nodes"]
    ) -> Float[Tensor, "trees 2"]:
        child = (parent >= 0).nonzero()[:, 0]
        h = torch.relu(self.embed(x))
        for update in self.updates:
            h = torch.relu(update(torch.cat([h, _sum_at(h.index_select(0, child), parent[child], len(h))], 1)))
        return self.head(_mean_at(h, tree, int(tree.max()) + 1))
