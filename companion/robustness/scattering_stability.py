"""Deep feature extractors from general frames: why they tolerate shifts and deformations.

Wiatowski and Bölcskei, "A Mathematical Theory of Deep Convolutional Neural Networks for Feature Extraction", IEEE
Transactions on Information Theory 2018 (arXiv 1512.06293).

A signal is convolved with the atoms of a frame, passed through a non-linearity and pooled, layer after layer. In every
layer one further atom, the output atom, hands out features. The paper's signals live on the line; here they are
periodic and sampled: ``n`` points per axis of the circle (or torus), convolutions by the discrete Fourier transform,
l2 norms. A frequency is given in cycles per sample, ``k/n`` in ``[-1/2, 1/2)``, in the order of ``torch.fft``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Complex, Float, Num
from torch import Tensor

Features = list[Complex[Tensor, "batch paths *grid"]]
F64 = torch.float64


def _on_parts(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.complex(function(z.real), function(z.imag))


# Name: the function on complex signals, and its Lipschitz constant L. All map 0 to 0, hence the shifted sigmoid.
NONLINEARITIES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "modulus": (lambda z: z.abs().to(z.dtype), 1.0),
    "relu": (_on_parts(torch.relu), 1.0),
    "tanh": (_on_parts(torch.tanh), 1.0),
    "sigmoid": (_on_parts(lambda x: torch.sigmoid(x) - 0.5), 0.25),
}
POOLINGS = ("none", "subsample", "average")


# --- frames -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """The filters of one layer, by their Fourier transforms.

    Parameters
    ----------
    atoms
        Transforms of the atoms ``g_λ``, whose outputs go on to the next layer.
    output_atom
        Transform of ``χ``, whose output is handed out as a feature.

    Raises
    ------
    ValueError
        If atoms and output atom do not live on one grid.
    """

    atoms: Num[Tensor, "atoms *grid"]
    output_atom: Num[Tensor, "*grid"]

    def __post_init__(self) -> None:
        if self.atoms.shape[1:] != self.output_atom.shape:
            raise ValueError(
                "atoms must have the shape (atoms, *grid) for an output_atom of shape grid, "
                f"got {tuple(self.atoms.shape)} and {tuple(self.output_atom.shape)}"
            )

    def littlewood_paley(self) -> Float[Tensor, "*grid"]:
        """``|χ̂(ω)|² + Σ_λ |ĝ_λ(ω)|²``: how the frame amplifies the energy at each frequency."""
        return self.output_atom.abs().square() + self.atoms.abs().square().sum(0)

    def bounds(self) -> tuple[float, float]:
        """The frame bounds ``A`` and ``B``: ``A ‖f‖² <= ‖f * χ‖² + Σ_λ ‖f * g_λ‖² <= B ‖f‖²``."""
        energy = self.littlewood_paley()
        return energy.min().item(), energy.max().item()

    def scaled(self, factor: float) -> Frame:
        """All atoms times a factor, which multiplies both frame bounds by its square."""
        return Frame(factor * self.atoms, factor * self.output_atom)

    def normalized(self) -> Frame:
        """All atoms over ``√B``, so that the upper frame bound is 1."""
        return self.scaled(self.bounds()[1] ** -0.5)


def _check(**values: tuple[int, int]) -> None:
    """Raise unless each named value is an integer at least as large as the number beside it."""
    for name, (value, least) in values.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _frequencies(n: int, dimension: int) -> Float[Tensor, "dimension *grid"]:
    """Frequency of every point of the Fourier grid, in cycles per sample along each axis."""
    return torch.stack(torch.meshgrid(*[torch.fft.fftfreq(n, dtype=F64)] * dimension, indexing="ij"))


def _step(t: Float[Tensor, "*grid"]) -> Float[Tensor, "*grid"]:
    """A smooth step ``b`` from 0 (t <= 0) to 1 (t >= 1) with ``b(t)² + b(1 - t)² = 1``."""
    return torch.sin(math.pi / 2 * torch.sin(math.pi / 2 * t.clamp(0, 1)).square())


def _bands(nu: Float[Tensor, "*grid"], octaves: int) -> tuple[Tensor, list[Tensor]]:
    """A low-pass window and the octave bands above it, finest first, for radial frequencies; their squares add to 1."""
    low = [torch.ones_like(nu)]
    low += [(1 - _step((2 * nu).log2() + j + 0.5).square()).sqrt() for j in range(1, octaves + 1)]
    return low[-1], [(wide.square() - narrow.square()).clamp(min=0).sqrt() for wide, narrow in pairwise(low)]


def _partition(distance: Float[Tensor, "*grid"], pieces: int) -> Float[Tensor, "*grid"]:
    """Window by distance from its centre on a circle of length 1; the squares of ``pieces`` such windows add to 1."""
    circular = (distance + 0.5) % 1 - 0.5
    return torch.cos(math.pi * pieces / 2 * circular) * (circular.abs() < 1 / pieces)


def wavelet_frame(n: int, octaves: int) -> Frame:
    """A tight wavelet frame (A = B = 1) on ``n`` points: one atom per octave and sign of the frequency.

    The ``2 octaves`` atoms run from the finest octave to the coarsest, in each the positive frequencies first. The
    output atom is the low-pass window below the last octave.

    Raises
    ------
    ValueError
        If ``n`` is smaller than 2 or ``octaves`` smaller than 1.
    """
    _check(n=(n, 2), octaves=(octaves, 1))
    (nu,) = _frequencies(n, 1)
    low, bands = _bands(nu.abs(), octaves)
    return Frame(torch.stack([band * (sign * nu > 0) for band in bands for sign in (1, -1)]), low)


def weyl_heisenberg_frame(n: int, channels: int) -> Frame:
    """A tight Weyl-Heisenberg frame (A = B = 1) on ``n`` points: one window, shifted to equally spaced frequencies.

    The window at frequency 0 is the output atom, the other ``channels - 1`` are the atoms.

    Raises
    ------
    ValueError
        If ``n`` or ``channels`` is smaller than 2.
    """
    _check(n=(n, 2), channels=(channels, 2))
    (nu,) = _frequencies(n, 1)
    windows = torch.stack([_partition(nu - m / channels, channels) for m in range(channels)])
    return Frame(windows[1:], windows[0])


def filter_frame(taps: Float[Tensor, "filters k"], n: int) -> Frame:
    """A frame of arbitrary short filters (learned, random) on ``n`` points, divided by ``√B``: upper bound 1.

    Parameters
    ----------
    taps
        Impulse responses, at least two; the first is the output atom.
    n
        Number of points, at least the number of taps of a filter.

    Raises
    ------
    ValueError
        If ``taps`` is no finite matrix with two rows or more, is zero, or is longer than ``n``.
    """
    if taps.ndim != 2 or len(taps) < 2 or not taps.isfinite().all() or not taps.any():
        raise ValueError(f"taps must be a finite, non-zero (filters >= 2, k) matrix, got shape {tuple(taps.shape)}")
    _check(n=(n, max(2, taps.shape[1])))
    transforms = torch.fft.fft(taps.to(F64), n)
    return Frame(transforms[1:], transforms[0]).normalized()


def directional_frame(n: int, wedges_per_octave: Sequence[int]) -> Frame:
    """A tight frame (A = B = 1) on ``n`` x ``n`` points that cuts every octave of the plane into angular wedges.

    Parameters
    ----------
    n
        Points along each axis.
    wedges_per_octave
        Number of wedges, finest octave first. The same number everywhere gives directional wavelets; doubling in every
        second octave gives curvelets, doubling in every octave ridgelets.

    Raises
    ------
    ValueError
        If ``n`` is smaller than 2, there is no octave, or an octave has fewer than 2 wedges.
    """
    wedges_per_octave = list(wedges_per_octave)
    _check(n=(n, 2), number_of_octaves=(len(wedges_per_octave), 1))
    _check(wedges_per_octave=(min(wedges_per_octave), 2))
    nu = _frequencies(n, 2)
    turn = torch.atan2(nu[1], nu[0]) / (2 * math.pi)  # direction of a frequency, in turns
    low, bands = _bands(nu.norm(dim=0), len(wedges_per_octave))
    atoms = [
        band * _partition(turn - wedge / wedges, wedges)
        for band, wedges in zip(bands, wedges_per_octave, strict=True)
        for wedge in range(wedges)
    ]
    return Frame(torch.stack(atoms), low)


# --- the cascade ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Frame, non-linearity and pooling of one layer.

    Parameters
    ----------
    frame_factory
        Makes the frame for a number of points per axis, as every layer has its own.
    nonlinearity
        ``"modulus"``, ``"relu"``, ``"tanh"`` or ``"sigmoid"`` (shifted to map 0 to 0); all but the modulus act on
        real and imaginary part.
    pooling
        ``"none"``; ``"subsample"``, which keeps every ``factor``-th sample; or ``"average"``, which first removes all
        frequencies beyond the new Nyquist limit and then multiplies by the root of ``factor`` per axis, so that the
        sampling keeps the norm. All have the Lipschitz constant ``R = 1``.
    factor
        The pooling factor ``S``.

    Raises
    ------
    ValueError
        If a name is unknown, ``factor`` is no positive integer, or there is a factor without pooling.
    """

    frame_factory: Callable[[int], Frame]
    nonlinearity: str = "modulus"
    pooling: str = "none"
    factor: int = 1

    def __post_init__(self) -> None:
        if self.nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity must be one of {', '.join(NONLINEARITIES)}, got {self.nonlinearity!r}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        _check(factor=(self.factor, 1))
        if self.pooling == "none" and self.factor > 1:
            raise ValueError(f"factor must be 1 without pooling, got {self.factor}")

    def pool(self, z: Complex[Tensor, "batch paths *grid"]) -> Complex[Tensor, "batch paths *pooled"]:
        """Pool a batch of signals."""
        dims = tuple(range(2, z.ndim))
        if self.pooling == "average":
            # The window falls from 1 at a quarter to 0 at one half cycle per *new* sample.
            (nu,) = _frequencies(z.shape[-1], 1)
            window = (1 - _step(4 * self.factor * nu.abs() - 1).square()).sqrt().to(z)
            spectrum = torch.fft.fftn(z, dim=dims)
            for dim in dims:
                spectrum = spectrum * window.view(-1, *[1] * (z.ndim - 1 - dim))
            z = torch.fft.ifftn(spectrum, dim=dims) * self.factor ** (len(dims) / 2)
        return z[(..., *[slice(None, None, self.factor)] * len(dims))]


class FeatureExtractor:
    """The network: ``Φ^n(f) = { U[q] f * χ_n }`` over the paths ``q = (λ_1, ..., λ_n)`` of length ``n``.

    Layer ``n`` computes ``U_n[λ] z = P_n(M_n(z * g_λ))`` for each atom. The output atom ``χ_n`` comes from the frame of
    layer ``n + 1``, so ``D`` layers give the features ``Φ^0, ..., Φ^(D-1)``, and the last layer is used for its output
    atom alone. Source: the paper's Section III.

    Parameters
    ----------
    layers
        The layers from the input on; they may all be different.

    Raises
    ------
    ValueError
        If there are none.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        if not layers:
            raise ValueError("layers is empty; a feature extractor needs at least one layer")
        self.layers = list(layers)

    def frames(self, n: int) -> list[Frame]:
        """The frame of every layer for signals with ``n`` points per axis, each at the size that pooling leaves.

        Raises
        ------
        ValueError
            If a pooling factor does not divide the number of points.
        """
        frames = []
        for number, layer in enumerate(self.layers, 1):
            frames.append(layer.frame_factory(n))
            if n % layer.factor:
                raise ValueError(f"factor must divide the length of its layer: {layer.factor} in layer {number} of {n}")
            n //= layer.factor
        return frames

    def admissible(self, n: int, tol: float = 1e-9) -> bool:
        """Whether ``max{B, B L² R²} <= 1`` in every layer, up to ``tol`` (with ``R = 1``)."""
        return all(
            frame.bounds()[1] * max(1.0, NONLINEARITIES[layer.nonlinearity][1] ** 2) <= 1 + tol
            for layer, frame in zip(self.layers, self.frames(n), strict=True)
        )

    def __call__(self, f: Num[Tensor, "batch *grid"]) -> Features:
        """Features ``Φ^0, ..., Φ^(D-1)`` of a batch of signals or square images, real or complex.

        The paths of length ``n`` are ordered by their first index, then by their second, and so on.

        Raises
        ------
        ValueError
            If ``f`` has no batch axis, holds NaN or infinity, or its grid is not that of the first frame.
        """
        if f.ndim < 2 or not f.isfinite().all():
            raise ValueError(f"f must be finite with axes (batch, *grid), got shape {tuple(f.shape)}")
        frames = self.frames(f.shape[-1])
        if frames[0].output_atom.shape != f.shape[1:]:
            raise ValueError(
                f"f must live on the grid {tuple(frames[0].output_atom.shape)} of its frame, got {tuple(f.shape[1:])}"
            )
        dims = tuple(range(1 - f.ndim, 0))
        z = f.to(torch.promote_types(f.dtype, torch.complex64))[:, None]  # one path, the empty one
        features = []
        for number, (layer, frame) in enumerate(zip(self.layers, frames, strict=True), 1):
            spectrum = torch.fft.fftn(z, dim=dims)
            features.append(torch.fft.ifftn(spectrum * frame.output_atom.to(z), dim=dims))
            if number < len(frames):
                z = torch.fft.ifftn(spectrum.unsqueeze(2) * frame.atoms.to(z), dim=dims).flatten(1, 2)
                z = layer.pool(NONLINEARITIES[layer.nonlinearity][0](z))
        return features

    def translation_bound(self, n: int, t: float) -> Float[Tensor, " depths"]:
        """Theorem 1 (ii): ``2π|t| K_n / (S_1 ... S_n)`` bounds ``|||Φ^n(T_t f) - Φ^n(f)||| / ‖f‖``, for each ``Φ^n``.

        ``t`` is a shift in samples of the input, and ``K_n`` the largest ``|χ̂_n(ω)| |ω|``.
        """
        bounds, stride = [], 1
        for layer, frame in zip(self.layers, self.frames(n), strict=True):
            atom = frame.output_atom
            k = (atom.abs() * _frequencies(len(atom), atom.ndim).norm(dim=0)).max()
            bounds.append(2 * math.pi * abs(t) * k / stride)
            stride *= layer.factor
        return torch.stack(bounds)


def feature_distance(a: Features, b: Features) -> Float[Tensor, "batch depths"]:
    """``|||Φ^n(f) - Φ^n(h)|||`` for every ``n``; the root of their sum of squares is ``|||Φ(f) - Φ(h)|||``.

    Raises
    ------
    ValueError
        If the two sets of features differ in shape.
    """
    shapes = [[tuple(x.shape) for x in features] for features in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"a and b must be features of one extractor, got shapes {shapes[0]} and {shapes[1]}")
    return torch.stack([(x - y).abs().square().flatten(1).sum(1).sqrt() for x, y in zip(a, b, strict=True)], dim=1)


# --- shifts, deformations, signal classes -----------------------------------------------------------------------------


def translate(f: Num[Tensor, "*batch n"], t: float) -> Complex[Tensor, "*batch n"]:
    """``T_t f(x) = f(x - t)`` on the circle; a shift of a fraction of a sample is interpolated by Fourier series."""
    (nu,) = _frequencies(f.shape[-1], 1)
    return torch.fft.ifft(torch.fft.fft(f) * torch.exp(-2j * math.pi * nu * t))


def deform(
    signal: Callable[[Tensor], Tensor], tau: Float[Tensor, "*batch n"], omega: Float[Tensor, "*batch n"] | float = 0.0
) -> Complex[Tensor, "*batch n"]:
    """``F_{τ,ω} f(x) = e^{2πi ω(x)} f(x - τ(x))`` at ``x = 0, 1/n, ..., 1 - 1/n``.

    The signal is evaluated where the deformation points, not interpolated between samples.

    Parameters
    ----------
    signal
        A function of the circle of length 1: takes points ``(*batch, n)``, returns values of the same shape.
    tau, omega
        Displacement (in units of the circle) and modulation (in cycles) at every ``x``.

    Raises
    ------
    ValueError
        If ``tau`` is not finite or changes faster than the theorem allows, ``‖Dτ‖∞ > 1/2``.
    """
    n = tau.shape[-1]
    steepness = (n * (tau.roll(-1, -1) - tau)).abs().max().item()
    if not steepness <= 0.5:
        raise ValueError(f"tau must be finite with a slope of at most 1/2, got {steepness:.3g}")
    x = torch.arange(n, dtype=F64) / n
    return torch.exp(2j * math.pi * torch.as_tensor(omega, dtype=F64)) * signal(x - tau)


def bandlimited_bound(R: float, tau_sup: float, omega_sup: float = 0.0) -> float:
    """Bound on ``‖F_{τ,ω} f - f‖ / ‖f‖`` for ``f`` band-limited to ``|ξ| <= R``, given ``‖τ‖∞`` and ``‖ω‖∞``.

    ``2π (4 - 2√2) R ‖τ‖∞ + 2π √2 ‖ω‖∞``, for ``‖Dτ‖∞ <= 1/2``.

    Raises
    ------
    ValueError
        If an argument is negative.
    """
    if min(R, tau_sup, omega_sup) < 0:
        raise ValueError(f"R, tau_sup and omega_sup must not be negative, got {R=}, {tau_sup=}, {omega_sup=}")
    return 2 * math.pi * ((4 - 2 * math.sqrt(2)) * R * tau_sup + math.sqrt(2) * omega_sup)


class BandLimited:
    """``count`` random real signals with all frequencies 1, ..., R, of mean square 1.

    Like the other classes of signals: a function of the circle that takes points ``(n,)`` or ``(count, n)`` and returns
    values ``(count, n)``; ``bound(tau_sup)`` bounds the root mean square of ``f(x - τ(x)) - f(x)`` for each signal.
    """

    def __init__(self, count: int, R: int, generator: torch.Generator) -> None:
        _check(count=(count, 1), R=(R, 1))
        self.R = R
        draws = torch.randn(count, R, dtype=torch.complex128, generator=generator)
        self.coefficients = draws * math.sqrt(2) / draws.norm(dim=1, keepdim=True)

    def __call__(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "count n"]:
        waves = torch.exp(2j * math.pi * x[..., None] * torch.arange(1, self.R + 1))
        return (waves @ self.coefficients[..., None]).squeeze(-1).real

    def bound(self, tau_sup: float) -> Float[Tensor, " count"]:
        return torch.full((len(self.coefficients),), bandlimited_bound(self.R, tau_sup), dtype=F64)


class Lipschitz:
    """``count`` random sums of five triangle waves with 4 to 8 periods; linear bound ``K ‖τ‖∞``."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        _check(count=(count, 1))
        self.periods = torch.arange(4, 9, dtype=F64)
        self.slopes = torch.randn(count, 5, 1, dtype=F64, generator=generator)
        self.phases = torch.rand(count, 5, 1, dtype=F64, generator=generator)

    def __call__(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "count n"]:
        periods = self.periods[:, None]
        triangles = ((periods * x.unsqueeze(-2) + self.phases) % 1 - 0.5).abs() - 0.25  # slopes -1 and 1
        return (self.slopes / periods * triangles).sum(-2)

    def bound(self, tau_sup: float) -> Float[Tensor, " count"]:
        return self.slopes.abs().sum((1, 2)) * tau_sup


class Cartoon:
    """``count`` random cartoons: ``pieces`` separate plateaus on a small sine; bound ``H √(2J‖τ‖∞) + Lip ‖τ‖∞``."""

    def __init__(self, count: int, pieces: int, generator: torch.Generator) -> None:
        _check(count=(count, 1), pieces=(pieces, 1))
        jitter = torch.rand(count, 2 * pieces, 1, dtype=F64, generator=generator)
        self.edges = (torch.arange(2 * pieces, dtype=F64)[:, None] + 0.6 * jitter) / (2 * pieces)
        self.heights = 0.5 + torch.rand(count, pieces, 1, dtype=F64, generator=generator)

    def __call__(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "count n"]:
        points = (x % 1).unsqueeze(-2)
        inside = (points >= self.edges[:, ::2]) & (points < self.edges[:, 1::2])
        return 0.1 * torch.sin(2 * math.pi * x) + (self.heights * inside).sum(-2)

    def bound(self, tau_sup: float) -> Float[Tensor, " count"]:
        jumps = self.edges.shape[1]
        return self.heights.amax((1, 2)) * math.sqrt(2 * jumps * tau_sup) + 0.2 * math.pi * tau_sup


class Noise:
    """``count`` signals of white noise: independent values on ``n`` cells of the circle. They have no ``bound``."""

    def __init__(self, count: int, n: int, generator: torch.Generator) -> None:
        _check(count=(count, 1), n=(n, 2))
        self.values = torch.randn(count, n, dtype=F64, generator=generator)

    def __call__(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "count n"]:
        n = self.values.shape[1]
        return self.values.gather(1, (x * n).round().long().remainder(n).expand(len(self.values), -1))
