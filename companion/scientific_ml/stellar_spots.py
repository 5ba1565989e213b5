"""Transit light curves of spotted stars, the score of the Ariel challenge, and what a linear model needs to see.

Nikolaou, Waldmann, Tsiaras, Morvan et al., "Lessons Learned from the 1st ARIEL Machine Learning Challenge: Correcting
Transiting Exoplanet Light Curves for Stellar Spots", 2020 (arXiv 2010.15996).

Lengths are in stellar radii, wavelengths in micron, temperatures in kelvin. The observer looks along z; ``W`` counts
wavelength channels, ``T`` time steps. The flux is that of the star and planet over that of the spotted star alone. The
simulator is ours: it stands in for that of the challenge, whose format and score it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from companion import models, training

WAVELENGTHS = np.geomspace(0.55, 7.8, 55)  # µm, blue first
IN_TRANSIT = 0.3  # part of the observation, in its middle, when every planet here covers the star
Channels = Float[np.ndarray, " W"]
Spots = Float[np.ndarray, "spots 3"]


class Planets(NamedTuple):
    """What is known about each light curve besides the flux; the template may use all but the last two."""

    number: Int[np.ndarray, " n"]  # of the planet: its curves differ by spots and noise only
    t_star: Float[np.ndarray, " n"]
    b: Float[np.ndarray, " n"]
    u1: Float[np.ndarray, "n W"]
    u2: Float[np.ndarray, "n W"]
    x: Float[np.ndarray, "n T"]
    contrast: Float[np.ndarray, "n W"]
    spots: list[Spots]


def planck_contrast(wavelength_um: Float[np.ndarray, "*shape"], t_spot: float, t_star: float) -> np.ndarray:
    """Brightness of a spot over that of the star around it, both black bodies, at each wavelength (µm).

    Raises
    ------
    ValueError
        If a wavelength or a temperature is not positive.
    """
    wavelength_um = np.asarray(wavelength_um, dtype=float)
    if not (wavelength_um > 0).all() or not t_spot > 0 or not t_star > 0:
        raise ValueError(f"wavelength_um, t_spot and t_star must be positive, got {wavelength_um}, {t_spot}, {t_star}")
    x = 14387.77 / wavelength_um  # hc / (λ k_B), in kelvin
    return np.expm1(x / t_star) / np.expm1(x / t_spot)


@lru_cache
def _sunflower(n: int) -> Float[np.ndarray, "2 n"]:
    """``n`` points that share the unit disk evenly, so that their mean is the mean over the disk."""
    r, angle = np.sqrt((np.arange(n) + 0.5) / n), np.arange(n) * math.pi * (3 - math.sqrt(5))
    return r * np.stack([np.cos(angle), np.sin(angle)])


def _check_spots(spots: Spots) -> Spots:
    spots = np.asarray(spots, dtype=float).reshape(-1, 3)
    if not (np.hypot(spots[:, 0], spots[:, 1]) < 1).all():
        raise ValueError(f"spots must have their centres (nx, ny) inside the unit disk, got {spots[:, :2].tolist()}")
    if not ((spots[:, 2] > 0) & (spots[:, 2] < math.pi / 2)).all():
        raise ValueError(f"spots must have angular radii between 0 and π/2, got {spots[:, 2].tolist()}")
    return spots


def in_spots(px: Float[np.ndarray, "*shape"], py: Float[np.ndarray, "*shape"], spots: Spots) -> np.ndarray:
    """Whether each point of the star's disk lies in a spot; spots are caps on the sphere, so they narrow at the limb.

    Raises
    ------
    ValueError
        If a spot's centre lies outside the disk, or its angular radius outside (0, π/2).
    """
    nx, ny, rho = _check_spots(spots).T
    normals = np.stack([nx, ny, np.sqrt(1 - nx**2 - ny**2)], axis=1)
    points = np.stack([px.ravel(), py.ravel(), np.sqrt(np.maximum(1 - px**2 - py**2, 0)).ravel()])
    return (normals @ points > np.cos(rho)[:, None]).any(0).reshape(px.shape)


def _moments(px: np.ndarray, py: np.ndarray, spots: Spots) -> Float[np.ndarray, "2 3 ..."]:
    """Means over the last axis of ``(1-µ)^m``, m = 0, 1, 2, and of the same inside spots; 0 beside the star."""
    mu2 = 1 - px**2 - py**2
    on, limb = mu2 > 0, 1 - np.sqrt(np.maximum(mu2, 0))
    powers = np.stack([on, on * limb, on * limb**2])
    return np.stack([powers.mean(-1), np.einsum("m...n,...n->m...", powers, in_spots(px, py, spots)) / px.shape[-1]])


def _limb(u1: Channels, u2: Channels) -> Float[np.ndarray, "W 3"]:
    """Coefficients of the intensity in the powers of ``1-µ``."""
    return np.stack([np.ones_like(u1), -u1, -u2], axis=-1)


def spot_dimming(u1: Channels, u2: Channels, spots: Spots, contrast: Channels, n_star: int = 4000) -> Channels:
    """Part ``ε`` of the star's light that its spots take away, in each channel, from ``n_star`` points of the disk.

    Raises
    ------
    ValueError
        If a spot's centre lies outside the disk, or its angular radius outside (0, π/2).
    """
    _, spotted = _moments(*_sunflower(n_star), spots)
    return (1 - contrast) * (_limb(u1, u2) @ spotted) / (1 - u1 / 3 - u2 / 6)


def spotted_light_curve(
    k: Channels,
    k_white: float,
    b: float,
    u1: Channels,
    u2: Channels,
    spots: Spots,
    contrast: Channels,
    x: Float[np.ndarray, " T"],
    n_planet: int = 200,
    n_star: int = 4000,
) -> Float[np.ndarray, "W T"]:
    """Flux of a spotted star while a planet crosses it, relative to the flux without the planet.

    Parameters
    ----------
    k
        Radius of the planet in each channel.
    k_white
        Radius of the disk over which the star's brightness is averaged: one for all channels, so that they share the
        geometry.
    b
        Impact parameter: the planet's centre moves along ``y = b``.
    u1, u2
        Quadratic limb darkening: the intensity is ``1 - u1 (1-µ) - u2 (1-µ)²``.
    spots
        Rows ``(nx, ny, rho)``: projected centre of a cap on the sphere and its angular radius in rad; may be empty.
        Where caps overlap the spot is no darker.
    contrast
        Brightness of the spots over that of the star around them.
    x
        Position of the planet's centre along its chord at each time.
    n_planet, n_star
        Points of the averages over the planet's and the star's disk.

    Raises
    ------
    ValueError
        If ``k, u1, u2, contrast`` differ in shape, a radius is not positive, or a spot is impossible.
    """
    k, u1, u2, contrast, x = (np.asarray(value, dtype=float) for value in (k, u1, u2, contrast, x))
    if k.ndim != 1 or not k.shape == u1.shape == u2.shape == contrast.shape:
        shapes = [value.shape for value in (k, u1, u2, contrast)]
        raise ValueError(f"k, u1, u2 and contrast must have one value for each of W channels, got shapes {shapes}")
    if not ((k > 0) & (k < 1)).all() or not 0 < k_white < 1:
        raise ValueError(f"k and k_white must lie between 0 and 1, got {k} and {k_white}")
    near = np.abs(x) < 1 + k_white  # at other times the planet is beside the star
    dx, dy = k_white * _sunflower(n_planet)
    px, py = np.broadcast_arrays(x[near, None] + dx, b + dy)
    everywhere, spotted = _limb(u1, u2) @ _moments(px, py, spots)
    star = (1 - u1 / 3 - u2 / 6) * (1 - spot_dimming(u1, u2, spots, contrast, n_star))
    flux = np.ones((len(k), len(x)))
    flux[:, near] -= (k**2 / star)[:, None] * (everywhere - (1 - contrast)[:, None] * spotted)
    return flux


def simulate_challenge(
    n_planets: int, n_instances: int, seed: int, spotted: bool = True, noise: bool = True, n_steps: int = 100
) -> tuple[Float[np.ndarray, "n W T"], Float[np.ndarray, "n W"], Float[np.ndarray, "n W"], Planets]:
    """Noisy light curves of random planets before random spots, in the channels of :data:`WAVELENGTHS`.

    Planets, spots and noise come from three independent streams of ``seed``: with and without spots, or noise, the
    planets are the same, curve by curve.

    Parameters
    ----------
    n_planets, n_instances
        Number of planets, and of curves of each, which differ by spots and noise.
    seed
        Of all randomness.
    spotted, noise
        Whether stars have spots, and curves noise.
    n_steps
        Time steps of a curve.

    Returns
    -------
    curves
        Fluxes in float32, the instances of a planet one after the other.
    k
        The planet's radius in each channel: the target.
    weights
        ``1/σ²`` of the noise, for :func:`ariel_score`.
    planets
        What else is known of each curve.

    Raises
    ------
    ValueError
        If a number is smaller than 1.
    """
    if min(n_planets, n_instances, n_steps) < 1:
        raise ValueError(f"n_planets, n_instances and n_steps must be positive, got {n_planets, n_instances, n_steps}")
    planet, spot, error = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3))
    draw, w = partial(planet.uniform, size=(n_planets, 1)), WAVELENGTHS
    t_star, k0, b = draw(3500, 6200), draw(0.03, 0.15), draw(0, 0.7)
    slope, feature, centre = planet.normal(0, 0.01, (n_planets, 1)), draw(0, 0.03), draw(1, 5)
    k = 1 + slope * np.log(w / 2) + feature * np.exp(-0.5 * (np.log(w / centre) / 0.12) ** 2)
    k = k0 * (k + 0.7 * feature * np.exp(-0.5 * (np.log(w / 4.3) / 0.1) ** 2))
    sigma = 10 ** draw(-3.9, -3.1) * (1 + 0.6 * np.abs(np.log(w / 2)) ** 1.5)
    u1 = np.clip(0.10 + 0.22 * (5200 / t_star) / w, 0, 0.6)
    u2 = np.broadcast_to(np.clip(0.08 + 0.12 * w**-0.5, 0, 0.3), u1.shape)
    x = draw(0.8, 1.15) * np.linspace(-1.5, 1.5, n_steps)

    of = np.repeat(np.arange(n_planets), n_instances)
    t_spot = t_star[of, 0] * (1 - spot.uniform(500, 1500, len(of)) / 5500)
    contrast = np.stack([planck_contrast(w, cool, t) for cool, t in zip(t_spot, t_star[of, 0], strict=True)])
    spots = [_random_spots(spot) if spotted else np.empty((0, 3)) for _ in of]
    curves = np.empty((len(of), len(w), n_steps), dtype=np.float32)
    for row, p in enumerate(of):  # one by one: stars differ in their number of spots
        curves[row] = spotted_light_curve(k[p], k0[p, 0], b[p, 0], u1[p], u2[p], spots[row], contrast[row], x[p])
        if noise:
            curves[row] += sigma[p, :, None] * error.standard_normal(curves[row].shape, dtype=np.float32)
    planets = Planets(of, t_star[of, 0], b[of, 0], u1[of], u2[of], x[of], contrast, spots)
    return curves, k[of], sigma[of] ** -2.0, planets


def _random_spots(rng: np.random.Generator) -> Spots:
    """Between one and about ten spots, from 5 to 20 degrees in radius, fewer near the limb."""
    count = 1 + rng.poisson(4)
    mu, angle = rng.uniform(0.15, 1, count), rng.uniform(0, 2 * math.pi, count)
    r = np.sqrt(1 - mu**2)
    return np.stack([r * np.cos(angle), r * np.sin(angle), np.exp(rng.uniform(*np.log([0.08, 0.35]), count))], axis=1)


def ariel_score(
    k: Float[np.ndarray, "*shape"], k_hat: Float[np.ndarray, "*shape"], weights: Float[np.ndarray, "*shape"]
) -> float:
    """Score of the challenge: 10 000 minus the weighted mean error of the transit depth ``k²`` in ppm.

    The error of the depth is counted as ``2 k |Δk|``. Source: the rules of the challenge.

    Raises
    ------
    ValueError
        If shapes differ, a weight is negative or their sum is not positive, or a prediction is not finite.
    """
    k, k_hat, weights = (np.asarray(value, dtype=float) for value in (k, k_hat, weights))
    if not k.shape == k_hat.shape == weights.shape:
        raise ValueError(f"k, k_hat and weights must have one shape, got {k.shape}, {k_hat.shape} and {weights.shape}")
    if not weights.sum() > 0 or weights.min() < 0:
        raise ValueError(f"weights must not be negative and must have a positive sum, got the sum {weights.sum()}")
    if not np.isfinite(k_hat).all():
        raise ValueError("k_hat holds NaN or infinite values")
    return float(1e4 - 2e6 * np.average(k * np.abs(k_hat - k), weights=weights))


def _check_curves(curves: Float[np.ndarray, "n W T"], least: int) -> None:
    if curves.ndim != 3 or curves.shape[-1] < least or not np.isfinite(curves).all():
        raise ValueError(f"curves must be finite, of shape (n, W, T) with T >= {least}, got shape {curves.shape}")


def _middle(curves: Float[np.ndarray, "n W T"]) -> Float[np.ndarray, "n W T2"]:
    """The time steps around mid-transit."""
    length = curves.shape[-1]
    count = round(IN_TRANSIT * length)
    start = (length - count) // 2
    return curves[..., start : start + count]


def radius(flux: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """``sqrt(1-F)``: the radius of the planet before a uniform star; noise above 1 gives 1e-4, not NaN."""
    return np.sqrt(np.maximum(1 - flux, 1e-8))


def template_depths(curves: Float[np.ndarray, "n W T"], planets: Planets) -> Float[np.ndarray, "n W"]:
    """The classical fit: least-squares radius of the known limb-darkened transit shape, which knows no spots.

    ``k² = Σ_t (1-F) g / Σ_t g²``, where ``g`` is the curve's depth for a clean star over ``k²``. Its shape depends
    weakly on the planet's radius, which comes from the median flux in the first pass and from the fit in the second.

    Raises
    ------
    ValueError
        If ``curves`` is no finite array (n, W, T), or has not one row for each of ``planets``.
    """
    _check_curves(curves, 4)
    if len(curves) != len(planets.number):
        raise ValueError(f"curves and planets must have as many rows, got {len(curves)} and {len(planets.number)}")
    k_white, empty = radius(np.median(_middle(curves), axis=(1, 2))), np.empty((0, 3))
    for _ in range(2):
        k = np.empty(curves.shape[:2])
        for row, (u1, u2, b, x) in enumerate(zip(planets.u1, planets.u2, planets.b, planets.x, strict=True)):
            one = np.full_like(u1, k_white[row])
            g = (1 - spotted_light_curve(one, k_white[row], b, u1, u2, empty, np.ones_like(u1), x)) / k_white[row] ** 2
            k[row] = radius(1 - ((1 - curves[row]) * g).sum(1) / (g**2).sum(1))
        k_white = k.mean(1)
    return k


def time_bins(curves: Float[np.ndarray, "n W T"], bins: int) -> Float[np.ndarray, "n W bins"]:
    """Averages of equally many neighbouring time steps.

    Raises
    ------
    ValueError
        If ``curves`` is no finite array (n, W, T), or ``bins`` does not divide T.
    """
    _check_curves(curves, 1)
    if bins < 1 or curves.shape[-1] % bins:
        raise ValueError(f"bins must divide the number of time steps, {curves.shape[-1]}, got {bins}")
    return curves.reshape(*curves.shape[:2], bins, -1).mean(-1)


def transit_statistics(curves: Float[np.ndarray, "n W T"]) -> Float[np.ndarray, "n {6*W+50}"]:
    """Statistics that mean something: everything a radius, except the colour.

    For each channel the samples around mid-transit, sorted by flux and averaged in six groups, each as a radius (the
    deepest first: spots that the planet crosses move the last groups, spots that it misses all of them). Then the white
    light curve in 25 time bins, as radii, and 25 bins of the colour, the flux of the bluest third of the channels minus
    that of the reddest third.

    Raises
    ------
    ValueError
        If ``curves`` is no finite array (n, W, T) with at least 3 channels, T a multiple of 25 and at least 50.
    """
    _check_curves(curves, 50)
    n, channels, _ = curves.shape
    if channels < 3:
        raise ValueError(f"curves must have at least 3 channels for a colour, got {channels}")
    middle = np.sort(_middle(curves), axis=-1)
    ordered = np.stack([group.mean(-1) for group in np.array_split(middle, 6, axis=-1)], axis=-1)
    binned = time_bins(curves, 25)
    white, third = binned.mean(1), channels // 3
    colour = binned[:, :third].mean(1) - binned[:, -third:].mean(1)
    return np.concatenate([radius(ordered).reshape(n, -1), radius(white), colour], axis=1)


def transit_cnn(channels: int, width: int, generator: torch.Generator) -> nn.Sequential:
    """A convolutional network along time: (n, channels, time) to one value for each channel.

    Raises
    ------
    ValueError
        If ``channels`` or ``width`` is not positive.
    """
    if min(channels, width) < 1:
        raise ValueError(f"channels and width must be positive, got {channels} and {width}")
    first, second = (
        models.initialised(nn.utils.skip_init(nn.Conv1d, n_in, width, 5, padding=2), generator)
        for n_in in (channels, width)
    )
    head = models.initialised(nn.utils.skip_init(nn.Linear, 5 * width, channels), generator)
    return nn.Sequential(
        first, nn.ReLU(), nn.MaxPool1d(2), second, nn.ReLU(), nn.AdaptiveAvgPool1d(5), nn.Flatten(), head
    )


def train_networks(
    networks: Sequence[nn.Module],
    inputs: Float[Tensor, "members n *features"],
    targets: Float[Tensor, "members n W"],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
) -> training.Ensemble:
    """Train networks side by side, each on curves of its own: squared error, Adam, a rate that falls to 0 (cosine).

    Raises
    ------
    ValueError
        If ``inputs`` and ``targets`` have not one entry for each network, or differ in their number of curves.
    """
    if not len(networks) == len(inputs) == len(targets) or inputs.shape[1] != targets.shape[1]:
        raise ValueError(
            f"inputs and targets must have an entry for each of {len(networks)} networks and as many curves, "
            f"got shapes {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    ensemble, n = training.Ensemble(networks), inputs.shape[1]
    batches = training.minibatches(n, batch_size, generator)

    def loss(_: int) -> Float[Tensor, " members"]:
        rows = next(batches).to(inputs.device)
        return (ensemble.each(inputs[:, rows]) - targets[:, rows]).square().mean((1, 2))

    steps = epochs * (n // batch_size)
    training.fit(loss, ensemble.parameters.values(), steps=steps, lr=lr, cosine_to=0.0, record_every=steps)
    return ensemble
