"""Deep linear self-distillation: in which order JEPA and MAE learn the features of their data.

Littwin, Saremi, Advani, Thilak, Nakkiran, Huang and Susskind, "How JEPA Avoids Noisy Features: The Implicit Bias of
Deep Linear Self Distillation Networks", NeurIPS 2024 (arXiv 2407.03475).

Pairs of views ``(x, y)`` have covariances ``Σxx = E[x xᵀ]`` and ``Σyx = E[y xᵀ]`` that are diagonal in one basis, with
entries ``σ²`` and ``λ`` for each feature; ``ρ = λ/σ²`` is its regression coefficient. A deep linear encoder
``W̄ = W^L ... W^1`` and a linear head ``V`` predict from ``x`` either the code ``W̄ y`` of the other view, held fixed
(``"jepa"``), or the view ``y`` itself (``"mae"``). Time ``t`` is the number of steps times the learning rate. The
equations are derived in the tutorial; "equation (n)" means its numbering.
"""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.integrate import quad, solve_ivp
from scipy.signal import lfilter
from torch import Tensor
from tqdm import trange

OBJECTIVES = ("jepa", "mae")


def _check_setting(objective: str, depth: int, **positive: ArrayLike) -> None:
    """Raise unless the objective is known, the depth a whole number from 1, and all other numbers positive."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if depth != int(depth) or depth < 1:
        raise ValueError(f"depth must be a whole number of encoder matrices, 1 or more, got {depth}")
    for name, values in positive.items():
        if not (np.isfinite(values).all() and np.greater(values, 0).all()):
            raise ValueError(f"{name} must be positive and finite, got {values}")


def fixed_point(objective: str, rho: ArrayLike, depth: int) -> ArrayLike:
    """Strength ``w̄*`` at which a feature of regression coefficient ``rho`` ends: ``ρ^L`` or ``ρ^(L/(L+1))``.

    Parameters
    ----------
    objective
        ``"jepa"`` or ``"mae"``.
    rho
        Regression coefficients, positive: a number or an array.
    depth
        Number ``L`` of matrices of the encoder.

    Raises
    ------
    ValueError
        If the objective is unknown, ``rho`` is not positive, or ``depth`` is no whole number from 1.

    Notes
    -----
    Source: the zeros of equation (2).
    """
    _check_setting(objective, depth, rho=rho)
    return np.power(rho, depth if objective == "jepa" else depth / (depth + 1))


def mode_trajectories(
    objective: str, lam: ArrayLike, rho: ArrayLike, eps: float, depth: int, t: Float[np.ndarray, " times"]
) -> Float[np.ndarray, "times k"]:
    """Strengths ``w̄(t)`` of ``k`` features of the encoder under gradient flow from an ε-balanced start.

    Parameters
    ----------
    objective
        ``"jepa"`` or ``"mae"``.
    lam, rho
        Covariance between the views and regression coefficient of each feature, positive, of shape ``(k,)``.
    eps
        Strength of every feature at time 0, positive.
    depth
        Number ``L`` of matrices of the encoder.
    t
        Increasing times, not negative.

    Raises
    ------
    ValueError
        If the objective is unknown, a parameter is not positive, the shapes differ, or the times do not increase.

    Notes
    -----
    Source: the paper's exact dynamics, here equation (2), integrated in ``ln u`` where ``w̄ = u^L``.
    """
    _check_setting(objective, depth, lam=lam, rho=rho, eps=eps)
    lam, rho, t = (np.asarray(values, dtype=float) for values in (lam, rho, t))
    if lam.ndim != 1 or lam.shape != rho.shape:
        raise ValueError(f"lam and rho must be vectors of one length, got shapes {lam.shape} and {rho.shape}")
    if t.ndim != 1 or len(t) == 0 or not np.isfinite(t).all() or t[0] < 0 or (np.diff(t) <= 0).any():
        raise ValueError(f"t must be increasing finite times, none negative, got {t}")
    growth, saturation = (2 * depth - 1, 1) if objective == "jepa" else (depth - 1, depth + 1)

    def flow(_: float, log_u: np.ndarray) -> np.ndarray:
        return lam * np.exp(growth * log_u) * (1 - np.exp(saturation * log_u) / rho)

    start = np.full(len(lam), math.log(eps) / depth)
    solution = solve_ivp(flow, (0, t[-1] or 1.0), start, method="DOP853", t_eval=t, rtol=1e-11, atol=1e-12)
    return np.exp(depth * solution.y.T)


def critical_time(objective: str, lam: float, rho: float, eps: float, depth: int, fraction: float = 0.5) -> float:
    """Time in which a feature grows from strength ``eps`` to a ``fraction`` of its fixed point.

    In closed form for JEPA, by quadrature for MAE. Infinite when the feature starts at or above this mark: it then has
    no critical time. A JEPA feature with ``ρ^L < ε`` even decays from the start.

    Parameters
    ----------
    objective, eps, depth
        As for :func:`mode_trajectories`.
    lam, rho
        Covariance and regression coefficient of the feature.
    fraction
        Part of the fixed point that counts as learned, between 0 and 1.

    Raises
    ------
    ValueError
        As for :func:`mode_trajectories`, and if ``fraction`` does not lie strictly between 0 and 1.

    Notes
    -----
    Source: the paper's critical times, here equations (3) and (4), derived from (2).
    """
    _check_setting(objective, depth, lam=lam, rho=rho, eps=eps)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    goal = fraction * float(fixed_point(objective, rho, depth))
    if goal <= eps:
        return math.inf
    u0, u1 = eps ** (1 / depth), goal ** (1 / depth)
    if objective == "jepa":
        last = 2 * depth - 1
        powers = sum((u0**-n - u1**-n) / (n * rho ** (last - n)) for n in range(1, last + 1))
        return (powers + math.log(u1 * (rho - u0) / (u0 * (rho - u1))) / rho**last) / lam

    def integrand(log_u: float) -> float:  # in ln u, so that a tiny start costs no accuracy
        return math.exp((1 - depth) * log_u) / (1 - math.exp((depth + 1) * log_u) / rho)

    return quad(integrand, math.log(u0), math.log(u1), epsabs=0, epsrel=1e-11, limit=200)[0] / lam


class DeepLinearSSL:
    """A batch of deep linear encoders with a linear head, from ε-balanced random initial weights, in float64.

    Every ``W^a`` is ``ε^(1/L)`` times a random rotation, and ``V`` is ``ε^(1/L)`` times the identity (JEPA) or the
    inverse of the encoder's rotation (MAE). Such a start is aligned with *every* basis of features: whatever the basis,
    all features have strength ``ε``, and the head has the same share of it as each matrix of the encoder.

    Parameters
    ----------
    depth
        Number ``L`` of matrices of the encoder.
    dim
        Dimension ``d`` of the views, of the codes and of all hidden layers.
    objective
        ``"jepa"`` or ``"mae"``.
    eps
        Initial strength of every feature.
    generator
        Source of randomness.
    noise
        Standard deviation of Gaussian noise on the entries of every ``W^a``, in units of ``ε^(1/L)``. It breaks the
        alignment.
    batch
        Number of networks that are trained side by side.

    Attributes
    ----------
    weights
        The encoder's matrices ``W^1 ... W^L``, each of shape ``(batch, d, d)``.
    v
        The heads ``V``, of the same shape.

    Raises
    ------
    ValueError
        If the objective is unknown, a size or ``eps`` is not positive, or ``noise`` is negative.
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        objective: str,
        eps: float,
        generator: torch.Generator,
        noise: float = 0.0,
        batch: int = 1,
    ) -> None:
        _check_setting(objective, depth, dim=dim, eps=eps, batch=batch)
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be finite and not negative, got {noise}")
        self.objective, scale, shape = objective, eps ** (1 / depth), (batch, dim, dim)
        self.weights = []
        for _ in range(depth):
            disorder, seed = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(seed)
            rotation = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform only with these signs
            self.weights.append(scale * (rotation + noise * disorder))
        left, _, right = torch.linalg.svd(self.encoder())
        self.v = scale * (
            torch.eye(dim, dtype=torch.float64).expand(shape) if objective == "jepa" else (left @ right).mT
        )

    def encoder(self) -> Float[Tensor, "batch d d"]:
        """The product ``W̄ = W^L ... W^1``."""
        *_, product = accumulate(self.weights, lambda below, weight: weight @ below)
        return product

    def loss(
        self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch n d"], stop_gradient: bool = True
    ) -> Float[Tensor, " batch"]:
        """Half the mean squared error of the prediction from ``x``; equation (1), for autograd.

        Parameters
        ----------
        x, y
            The two views, samples as rows: the same for the whole batch, or one set for each network.
        stop_gradient
            Whether JEPA's target is held fixed. False trains encoder and target together, which collapses.

        Raises
        ------
        ValueError
            If the views differ in shape or do not have ``d`` columns.
        """
        dim = self.v.shape[-1]
        if x.shape != y.shape or x.ndim < 2 or x.shape[-1] != dim:
            raise ValueError(f"x and y must both be (n, {dim}), got shapes {tuple(x.shape)} and {tuple(y.shape)}")
        encoder = self.encoder()
        target = y @ (encoder.detach() if stop_gradient else encoder).mT if self.objective == "jepa" else y
        return 0.5 * (x @ (self.v @ encoder).mT - target).square().sum(-1).mean(-1)

    def step(self, sigma_xx: Float[Tensor, "*batch d d"], sigma_yx: Float[Tensor, "*batch d d"], lr: float) -> None:
        """One step of gradient descent on equation (1); all factors move at once, from their old values.

        The data enter only through their covariances. With ``G = V W̄ Σxx - T``, where the target ``T`` is ``W̄ Σyx``
        (JEPA) or ``Σyx`` (MAE), a factor's gradient is ``(factors above)ᵀ G (factors below)ᵀ``.

        Raises
        ------
        ValueError
            If a covariance is not ``(d, d)``, or one such matrix per network.
        """
        shapes = (self.v.shape, self.v.shape[1:])
        if sigma_xx.shape not in shapes or sigma_yx.shape not in shapes:
            raise ValueError(
                f"sigma_xx and sigma_yx must have shape {tuple(shapes[1])} or {tuple(shapes[0])}, "
                f"got {tuple(sigma_xx.shape)} and {tuple(sigma_yx.shape)}"
            )
        encoder = self.encoder()
        error = self.v @ encoder @ sigma_xx - (encoder @ sigma_yx if self.objective == "jepa" else sigma_yx)
        above = [*accumulate(reversed(self.weights[1:]), torch.matmul, initial=self.v)][::-1]
        moved = []
        for weight, top in zip(self.weights, above, strict=True):
            moved.append(weight - lr * top.mT @ error)
            error = error @ weight.mT
        self.weights, self.v = moved, self.v - lr * error


def train_ssl(
    model: DeepLinearSSL,
    sigma_xx: Float[Tensor, "*batch d d"],
    sigma_yx: Float[Tensor, "*batch d d"],
    lr: float,
    steps: int,
    record_every: int,
) -> Float[Tensor, "records batch d d"]:
    """Train ``model`` in place by full-batch gradient descent, and keep its encoders on the way.

    Parameters
    ----------
    model
        The networks; their factors are replaced in every step.
    sigma_xx, sigma_yx
        Covariances of the views, one pair for the whole batch or one for each network.
    lr
        Learning rate; a step is a time ``lr``.
    steps, record_every
        Number of steps, and how many of them lie between two records.

    Returns
    -------
    Tensor
        The encoders before the first step and after every ``record_every`` steps.

    Raises
    ------
    ValueError
        If a covariance has a wrong shape or is not finite, or ``lr``, ``steps`` or ``record_every`` is not positive.
    FloatingPointError
        If training diverges.
    """
    if not lr > 0 or steps < 1 or record_every < 1:
        raise ValueError(f"lr, steps and record_every must be positive, got {lr=}, {steps=}, {record_every=}")
    if not (sigma_xx.isfinite().all() and sigma_yx.isfinite().all()):
        raise ValueError("sigma_xx and sigma_yx must be finite, got NaN or infinity")
    encoders = [model.encoder()]
    for step in trange(1, steps + 1, leave=False):
        model.step(sigma_xx, sigma_yx, lr)
        if step % record_every == 0:
            encoders.append(model.encoder())
    if not model.v.isfinite().all():
        raise FloatingPointError(f"training diverged within {steps} steps; try a smaller lr than {lr}")
    return torch.stack(encoders)


def feature_strengths(
    encoders: Float[Tensor, "*batch d d"], basis: Float[Tensor, "*batch d d"]
) -> Float[Tensor, "*batch d"]:
    """How strongly encoders pass each feature: ``‖W̄ b_i‖`` for the columns ``b_i`` of ``basis``.

    Not the singular values of ``W̄``: sorted by size, these mix features.

    Raises
    ------
    ValueError
        If the sizes do not fit.
    """
    if encoders.shape[-1] != basis.shape[-2]:
        raise ValueError(
            f"basis must have one row per column of encoders, got {tuple(basis.shape)} for {tuple(encoders.shape)}"
        )
    return (encoders @ basis).norm(dim=-2)


def _check_views(n: int, basis: Tensor, **features: Tensor) -> None:
    """Raise unless there are samples, the basis is orthonormal, and every parameter has one valid entry per feature."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if basis.ndim != 2 or not torch.allclose(basis.mT @ basis, torch.eye(basis.shape[-1], dtype=basis.dtype)):
        raise ValueError(f"basis must have orthonormal columns, got a tensor of shape {tuple(basis.shape)}")
    for name, values in features.items():
        if values.shape != basis.shape[1:]:
            raise ValueError(f"{name} must have shape {tuple(basis.shape[1:])}, got {tuple(values.shape)}")
        if name != "gamma" and not (values.isfinite() & (values >= 0)).all():
            raise ValueError(f"{name} must be finite and not negative, got {values.tolist()}")


def static_views(
    n: int,
    signal_var: Float[Tensor, " k"],
    noise_var: Float[Tensor, " k"],
    basis: Float[Tensor, "d k"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Two noisy views of one signal: ``x = B(s + ξ)``, ``y = B(s + ξ')``, all parts Gaussian and independent.

    A feature has covariance ``λ = signal_var`` and regression coefficient ``ρ = λ/(λ + noise_var)``.

    Parameters
    ----------
    n
        Number of pairs.
    signal_var, noise_var
        Variance of the shared signal and of each view's own noise, for every feature.
    basis
        The features ``B``, as orthonormal columns.
    generator
        Source of randomness.

    Raises
    ------
    ValueError
        If ``n`` is not positive, a variance is negative or not finite, the basis is not orthonormal, or sizes differ.

    Notes
    -----
    Source: the paper's static linear generative model.
    """
    _check_views(n, basis, signal_var=signal_var, noise_var=noise_var)
    signal, first, second = torch.randn(3, n, len(signal_var), generator=generator, dtype=basis.dtype)
    signal, noise_std = signal * signal_var.sqrt(), noise_var.sqrt()
    return (signal + noise_std * first) @ basis.mT, (signal + noise_std * second) @ basis.mT


def temporal_views(
    n: int,
    amplitude_var: Float[Tensor, " k"],
    gamma: Float[Tensor, " k"],
    noise_var: Float[Tensor, " k"],
    basis: Float[Tensor, "d k"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Consecutive frames of one long sequence whose features are autoregressive: ``x = z_t``, ``y = z_(t+1)``.

    ``z_t = B(a ⊙ u_t + ξ_t)`` with ``u_(t+1) = γ u_t + sqrt(1-γ²) η_t``, stationary and of variance 1. A feature has
    covariance ``λ = a²γ`` and regression coefficient ``ρ = a²γ/(a² + noise_var)``.

    Parameters
    ----------
    n
        Number of pairs. Neighbouring frames of slow features are nearly copies: these need a large ``n``.
    amplitude_var, gamma, noise_var
        Variance ``a²``, correlation from one frame to the next, and variance of each frame's own noise, per feature.
    basis, generator
        As for :func:`static_views`.

    Raises
    ------
    ValueError
        As for :func:`static_views`, and if a ``gamma`` does not lie strictly between -1 and 1.

    Notes
    -----
    Source: the paper's dynamic linear generative model.
    """
    _check_views(n, basis, amplitude_var=amplitude_var, gamma=gamma, noise_var=noise_var)
    if not (gamma.abs() < 1).all():
        raise ValueError(f"gamma must lie strictly between -1 and 1, got {gamma.tolist()}")
    drive, noise = torch.randn(2, n + 1, len(gamma), generator=generator, dtype=basis.dtype)
    drive[1:] *= (1 - gamma**2).sqrt()  # the first frame keeps variance 1: the sequence is stationary from its start
    u = np.stack(
        [lfilter([1], [1, -float(g)], column) for g, column in zip(gamma, drive.mT.numpy(), strict=True)], axis=1
    )
    z = (amplitude_var.sqrt() * torch.from_numpy(u) + noise_var.sqrt() * noise) @ basis.mT
    return z[:-1], z[1:]
