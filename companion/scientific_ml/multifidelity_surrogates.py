"""Surrogates from many cheap simulations and a few good ones: co-kriging, a multi-fidelity network, and two simulators.

Kumar and Montomoli, "Uncertainty Quantification for Multi-fidelity Simulations", 2025 (arXiv 2503.08408).

``XL, yL`` are points and outputs of the low-fidelity model (cheap, biased), ``XH, yH`` those of the high-fidelity one
(dear, few). Points are rows. A design is *nested* if the low-fidelity model was run at every high-fidelity point, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import cumulative_trapezoid
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import OneCycleLR

from companion import models, training

Points = Float[np.ndarray, "n d"]
Values = Float[np.ndarray, " n"]
Function = Callable[[Points], Values]


def _check_runs(name: str, X: Points, y: Values) -> None:
    """Raise unless these are at least two finite points with one finite output each."""
    if X.ndim != 2 or y.shape != X.shape[:1] or len(X) < 2:
        raise ValueError(f"{name} needs points (n, d) and outputs (n,) with n >= 2, got shapes {X.shape} and {y.shape}")
    if not (np.isfinite(X).all() and np.isfinite(y).all()):
        raise ValueError(f"{name} holds NaN or infinite values; remove those runs first")


def _check_fidelities(XL: Points, yL: Values, XH: Points, yH: Values) -> None:
    """Raise unless two sets of runs can be fused."""
    _check_runs("XL, yL", XL, yL)
    _check_runs("XH, yH", XH, yH)
    if XL.shape[1] != XH.shape[1]:
        raise ValueError(f"XL and XH must have as many inputs each, got {XL.shape[1]} and {XH.shape[1]}")
    if len(XH) > len(XL):
        raise ValueError(f"XH must not hold more points than XL, got {len(XH)} and {len(XL)}; are they swapped?")


# --- kriging ----------------------------------------------------------------------------------------------------------


class Kriging:
    """A Gaussian process with a regression as its mean; the inverse squared lengths have the largest likelihood.

    Correlations are ``exp(-sum_k theta_k (x_k - x'_k)^2)``. After :meth:`fit` the object holds ``theta``, the
    coefficients ``beta`` of the regressors and the process variance ``sigma2``.

    Parameters
    ----------
    nugget
        Added to the diagonal of the correlation matrix, as a part of ``sigma2``: noise, or numerical safety.
    isotropic
        Whether all inputs share one ``theta``.
    bounds
        Range of the logarithm of ``theta`` to base 10.

    Raises
    ------
    ValueError
        If ``nugget`` is negative or the bounds are out of order.

    Notes
    -----
    Source: the form of Kennedy and O'Hagan (2000) and Le Gratiet (2014). The uncertainty of ``beta`` is left out of
    the variance.
    """

    def __init__(
        self, nugget: float = 1e-8, isotropic: bool = False, bounds: tuple[float, float] = (-2.0, 3.0)
    ) -> None:
        if not nugget >= 0:
            raise ValueError(f"nugget must not be negative, got {nugget}")
        if not bounds[0] <= bounds[1]:
            raise ValueError(f"bounds must be (lower, upper), got {bounds}")
        self.nugget, self.isotropic, self.bounds = nugget, isotropic, bounds

    def fit(self, X: Points, y: Values, F: Float[np.ndarray, "n regressors"] | None = None) -> Kriging:
        """Fit to the outputs ``y`` at ``X``, with a row of regressors for each point (None: a constant).

        Raises
        ------
        ValueError
            If shapes do not match, there are fewer than two points, or a value is not finite.
        """
        X, y = np.asarray(X, dtype=float), np.asarray(y, dtype=float)
        _check_runs("X, y", X, y)
        F = np.ones((len(y), 1)) if F is None else np.asarray(F, dtype=float)
        if F.ndim != 2 or len(F) != len(y):
            raise ValueError(f"F must have one row for each of the {len(y)} points, got shape {F.shape}")
        self.X, self.y, self.F = X, y, F
        size = 1 if self.isotropic else X.shape[1]
        # the likelihood has several maxima: a coarse scan with one theta for all inputs, then a search from the best
        scan = [np.full(size, power) for power in np.unique(np.linspace(*self.bounds, 9))]
        start = min(scan, key=self.negative_log_likelihood)
        best = minimize(self.negative_log_likelihood, start, method="L-BFGS-B", bounds=[self.bounds] * size)
        self.negative_log_likelihood(best.x)
        return self

    def negative_log_likelihood(self, log_theta: Float[np.ndarray, " d"]) -> float:
        """``(n ln sigma2 + ln|R|) / 2`` with the best ``beta`` and ``sigma2`` for this ``theta``, which are kept."""
        self.theta = 10.0 ** np.asarray(log_theta)
        R = self._correlation(self.X)
        R[np.diag_indices_from(R)] += self.nugget
        self._factor = cho_factor(R, lower=True, overwrite_a=True)
        RF = cho_solve(self._factor, self.F)
        self.beta = np.linalg.solve(self.F.T @ RF, RF.T @ self.y)
        residual = self.y - self.F @ self.beta
        self._weights = cho_solve(self._factor, residual)
        # a regression that explains everything leaves nothing to the process, and ln 0 is no number
        self.sigma2 = max(float(residual @ self._weights) / len(self.y), np.finfo(float).tiny)
        return 0.5 * len(self.y) * math.log(self.sigma2) + float(np.log(np.diag(self._factor[0])).sum())

    def _correlation(self, x: Points) -> Float[np.ndarray, "n fitted"]:
        a, b = np.sqrt(self.theta) * x, np.sqrt(self.theta) * self.X
        # a matrix product: differences of each input would need d times the memory
        return np.exp(np.minimum(2 * a @ b.T - np.square(a).sum(1)[:, None] - np.square(b).sum(1), 0))

    def predict(self, x: Points, f: Float[np.ndarray, "n regressors"] | None = None) -> tuple[Values, Values]:
        """Mean and variance at ``x``, with the regressors there.

        Raises
        ------
        ValueError
            If ``x`` has another number of inputs than the fitted points.
        """
        x = np.asarray(x, dtype=float)
        if x.ndim != 2 or x.shape[1] != self.X.shape[1]:
            raise ValueError(f"x must have shape (n, {self.X.shape[1]}), got {x.shape}")
        f = np.ones((len(x), 1)) if f is None else f
        k = self._correlation(x)
        explained = np.square(solve_triangular(self._factor[0], k.T, lower=True)).sum(0)
        return f @ self.beta + k @ self._weights, self.sigma2 * np.maximum(0, 1 - explained)


class CoKriging:
    """Autoregressive co-kriging, ``y_H = rho y_L + delta``: kriging of ``y_L``, then of ``y_H`` with it as regressor.

    For a nested design this recursion is the joint model of both fidelities. Parameters as for :class:`Kriging`;
    after :meth:`fit` the factor is ``rho``.
    """

    def __init__(
        self, nugget: float = 1e-8, isotropic: bool = False, bounds: tuple[float, float] = (-2.0, 3.0)
    ) -> None:
        self.low = Kriging(nugget, isotropic, bounds)

    def fit(self, XL: Points, yL: Values, XH: Points, yH: Values) -> CoKriging:
        """Fit to the runs of both fidelities; ``XL`` should hold the points of ``XH``, too.

        Raises
        ------
        ValueError
            If shapes do not match, a set has fewer than two runs, ``XH`` has more than ``XL``, or a value is not
            finite.
        """
        _check_fidelities(XL, yL, XH, yH)
        self.low.fit(XL, yL)
        return self.fit_high(XH, yH)

    def fit_high(self, XH: Points, yH: Values) -> CoKriging:
        """The second step of :meth:`fit` alone, for another high-fidelity model above the same low-fidelity runs."""
        self.high = Kriging(self.low.nugget, self.low.isotropic, self.low.bounds)
        self.high.fit(XH, yH, self._regressors(self.low.predict(XH)[0]))
        self.rho = float(self.high.beta[0])
        return self

    @staticmethod
    def _regressors(low: Values) -> Float[np.ndarray, "n 2"]:
        return np.stack([low, np.ones_like(low)], axis=1)

    def predict(self, x: Points) -> tuple[Values, Values]:
        """Mean and variance of the high-fidelity model at ``x``."""
        low, low_variance = self.low.predict(x)
        mean, variance = self.high.predict(x, self._regressors(low))
        return mean, variance + self.rho**2 * low_variance


def adaptive_design(
    model_factory: Callable[[Points, Values], Kriging | CoKriging],
    high_fidelity: Function,
    X0: Points,
    candidates: Points,
    n_new: int,
) -> tuple[Points, Values, list[Kriging | CoKriging]]:
    """Add high-fidelity runs one by one, each at the candidate where the fitted model is least certain.

    Parameters
    ----------
    model_factory
        Fits a model to the high-fidelity runs ``(X, y)`` so far; its ``predict`` returns mean and variance.
    high_fidelity
        The model to run.
    X0, candidates
        The first points, and those to choose from.
    n_new
        Number of runs to add.

    Returns
    -------
    X, y
        All points and outputs, in the order in which they were run.
    history
        The models fitted to the first ``len(X0)``, ``len(X0) + 1``, ... runs.

    Raises
    ------
    ValueError
        If ``n_new`` is negative or larger than the number of candidates.
    """
    if not 0 <= n_new <= len(candidates):
        raise ValueError(f"n_new must be between 0 and the number of candidates, {len(candidates)}, got {n_new}")
    X, y = X0, high_fidelity(X0)
    history = [model_factory(X, y)]
    for _ in range(n_new):
        k = int(history[-1].predict(candidates)[1].argmax())
        chosen, candidates = candidates[k : k + 1], np.delete(candidates, k, axis=0)
        X, y = np.concatenate([X, chosen]), np.concatenate([y, high_fidelity(chosen)])
        history.append(model_factory(X, y))
    return X, y, history


# --- the network ------------------------------------------------------------------------------------------------------


def _lbfgs(loss: Callable[[], Tensor], parameters: Iterable[Tensor], steps: int) -> None:
    """Minimise a deterministic loss of few points, where quasi-Newton steps reach what Adam does not."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


class MultiFidelityNet:
    """A network of the low-fidelity model, and a linear plus a nonlinear map from ``(x, y_L)`` to ``y_H`` on top.

    Parameters
    ----------
    d
        Number of inputs.
    hidden, high_hidden
        Widths of the hidden layers of the low-fidelity network and of the nonlinear map (tanh).
    activation
        Of the low-fidelity network.
    steps, high_steps
        Steps of the two fits.
    batch
        Size of its mini-batches (AdamW, one-cycle learning rate, single precision); None uses L-BFGS on all points, in
        double precision, as the high-fidelity fit does.
    penalty
        Times the squared weights of the nonlinear map.
    x_penalty
        Times the squared weights with which the nonlinear map sees ``x``. A few points in many dimensions can be
        memorised through ``x``; what is to be learned is how ``y_H`` depends on ``y_L``.
    device
        Where to train.

    Raises
    ------
    ValueError
        If a size is not positive or a penalty is negative.

    Notes
    -----
    Source: the composite network of Meng and Karniadakis (2020), fitted in two stages.
    """

    def __init__(
        self,
        d: int,
        hidden: Sequence[int],
        high_hidden: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.Tanh,
        steps: int = 400,
        high_steps: int = 200,
        batch: int | None = None,
        penalty: float = 1e-4,
        x_penalty: float = 0.1,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(d, steps, high_steps, *hidden, *high_hidden) < 1:
            raise ValueError(f"sizes must be positive, got {d=}, {hidden=}, {high_hidden=}, {steps=}, {high_steps=}")
        if not penalty >= 0 or not x_penalty >= 0:
            raise ValueError(f"penalties must not be negative, got {penalty=} and {x_penalty=}")
        self.d, self.hidden, self.high_hidden = d, list(hidden), list(high_hidden)
        self.activation, self.steps, self.high_steps, self.batch = activation, steps, high_steps, batch
        self.penalty, self.x_penalty, self.device = penalty, x_penalty, device
        self.dtype = torch.float32 if batch else torch.float64

    def fit(
        self, XL: Points, yL: Values, XH: Points, yH: Values, seed: int, yL_at_XH: Values | None = None
    ) -> MultiFidelityNet:
        """Fit both stages. ``yL_at_XH`` are the low-fidelity runs at ``XH``; None uses the network's guess there.

        Raises
        ------
        ValueError
            If shapes do not match, a set has fewer than two runs, ``XH`` has more than ``XL``, or a value is not
            finite.
        """
        _check_fidelities(XL, yL, XH, yH)
        return self.fit_low(XL, yL, seed).fit_high(XH, yH, seed, yL_at_XH)

    def fit_low(self, XL: Points, yL: Values, seed: int) -> MultiFidelityNet:
        """First stage: the low-fidelity network. By itself it is an ordinary network, see :meth:`predict_low`."""
        _check_runs("XL, yL", XL, yL)
        if XL.shape[1] != self.d:
            raise ValueError(f"XL must have d={self.d} columns, got {XL.shape[1]}")
        generator = torch.Generator().manual_seed(seed)
        self._inputs, self._low_output = (XL.mean(0), XL.std(0)), (yL.mean(), yL.std())
        low = models.mlp([self.d, *self.hidden, 1], generator=generator, activation=self.activation, dtype=self.dtype)
        self.low = low.to(self.device)
        x = self._tensor(XL, self._inputs, self.dtype)
        y = self._tensor(yL[:, None], self._low_output, self.dtype)
        if self.batch is None:
            _lbfgs(lambda: mse_loss(self.low(x), y), self.low.parameters(), self.steps)
            return self
        batches = training.minibatches(len(x), self.batch, generator)

        def loss(_: int) -> Tensor:
            batch = next(batches)
            return mse_loss(self.low(x[batch]), y[batch])

        training.fit(
            loss,
            self.low.parameters(),
            steps=self.steps,
            lr=5e-3,
            optimizer=partial(torch.optim.AdamW, fused=True),
            schedule=lambda optimizer: OneCycleLR(optimizer, 5e-3, total_steps=self.steps),
            record_every=self.steps,
        )
        return self

    def fit_high(self, XH: Points, yH: Values, seed: int, yL_at_XH: Values | None = None) -> MultiFidelityNet:
        """Second stage: the linear and the nonlinear map from ``(x, y_L)`` to ``y_H``."""
        d, generator = self.d, torch.Generator().manual_seed(seed)
        self._high_output = yH.mean(), yH.std()
        inputs = self._with_low(XH, self.predict_low(XH) if yL_at_XH is None else yL_at_XH)
        y = self._tensor(yH[:, None], self._high_output)
        linear = models.mlp([d + 1, 1], generator=generator, activation=None, dtype=torch.float64)
        sizes = [d + 1, *self.high_hidden, 1]
        nonlinear = models.mlp(sizes, generator=generator, activation=nn.Tanh, dtype=torch.float64)
        with torch.no_grad():  # it starts as the zero function, and looks at y_L rather than at x
            nonlinear[-1].weight.zero_()
            nonlinear[-1].bias.zero_()
            nonlinear[0].weight[:, :d] *= 0.1
            nonlinear[0].weight[:, d].normal_(generator=generator)
        self.linear, self.nonlinear = linear.to(self.device), nonlinear.to(self.device)

        def loss() -> Tensor:
            error = mse_loss(self.linear(inputs) + self.nonlinear(inputs), y)
            size = sum(layer.weight.square().sum() for layer in self.nonlinear[::2])
            return error + self.penalty * size + self.x_penalty * self.nonlinear[0].weight[:, :d].square().sum()

        _lbfgs(loss, [*self.linear.parameters(), *self.nonlinear.parameters()], self.high_steps)
        return self

    def _tensor(self, values, centre_and_scale, dtype=torch.float64) -> Tensor:
        centre, scale = centre_and_scale
        return torch.as_tensor((values - centre) / scale, dtype=dtype, device=self.device)

    def _with_low(self, x: Points, low: Values) -> Float[Tensor, "n d+1"]:
        return torch.cat([self._tensor(x, self._inputs), self._tensor(low[:, None], self._low_output)], 1)

    def predict_low(self, x: Points) -> Values:
        """The low-fidelity network at ``x``."""
        with torch.no_grad():
            output = self.low(self._tensor(x, self._inputs, self.dtype))[:, 0]
        return self._low_output[0] + self._low_output[1] * output.double().cpu().numpy()

    def predict(self, x: Points) -> Values:
        """The high-fidelity prediction at ``x``."""
        inputs = self._with_low(x, self.predict_low(x))
        with torch.no_grad():
            output = (self.linear(inputs) + self.nonlinear(inputs))[:, 0]
        return self._high_output[0] + self._high_output[1] * output.cpu().numpy()


# --- inputs and outputs -----------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Mean, standard deviation and skewness of an output."""

    mean: float
    std: float
    skewness: float


def sampler(
    distribution: str, box: tuple[float, float], d: int, generator: np.random.Generator
) -> Callable[[int], Points]:
    """Draws independent inputs in a box: ``"uniform"``, or ``"gaussian"`` about its centre.

    The Gaussian has a sixth of the box's width as standard deviation and is clipped to the box.

    Raises
    ------
    ValueError
        If the distribution is unknown or the box is empty.
    """
    lower, upper = box
    if not lower < upper:
        raise ValueError(f"box must be (lower, upper), got {box}")
    if distribution == "uniform":
        return lambda n: generator.uniform(lower, upper, (n, d))
    if distribution == "gaussian":
        centre, std = (lower + upper) / 2, (upper - lower) / 6
        return lambda n: generator.normal(centre, std, (n, d)).clip(lower, upper)
    raise ValueError(f"distribution must be 'uniform' or 'gaussian', got {distribution!r}")


def propagate(predict: Function, sampler: Callable[[int], Points], n: int) -> tuple[Moments, Values]:
    """Send ``n`` random inputs through a model: moments of its output, and the output itself.

    Raises
    ------
    ValueError
        If ``n`` is smaller than 2.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    samples = predict(sampler(n))
    mean = samples.mean()
    standardised = (samples - mean) / max(samples.std(), np.finfo(float).tiny)  # a constant output has skewness 0
    return Moments(float(mean), float(samples.std(ddof=1)), float((standardised**3).mean())), samples


def benchmark(name: str, d: int, mean: float = 0.0, std: float = 1.0) -> tuple[Function, Function]:
    """A pair of functions, low and high fidelity, whose correlation is ``"linear"`` or ``"nonlinear"``.

    Parameters
    ----------
    name
        ``"linear"`` or ``"nonlinear"``.
    d
        Number of inputs. With one: Forrester's pair and ``sin 8πx``, on [0, 1]. With more: a quartic chain.
    mean, std
        Of the low-fidelity output; the nonlinear pair in several dimensions squares the standardised output.

    Raises
    ------
    ValueError
        If the name is unknown, ``d`` is not positive, or ``std`` is not.
    """
    if name not in ("linear", "nonlinear"):
        raise ValueError(f"name must be 'linear' or 'nonlinear', got {name!r}")
    if d < 1 or not std > 0:
        raise ValueError(f"d and std must be positive, got {d=} and {std=}")

    def forrester(x: Points) -> Values:
        return (6 * x[:, 0] - 2) ** 2 * np.sin(12 * x[:, 0] - 4)

    def wave(x: Points) -> Values:
        return np.sin(8 * np.pi * x[:, 0])

    def chain(x: Points) -> Values:
        return (x[:, 0] - 1) ** 2 + np.square(2 * x[:, 1:] ** 2 - x[:, :-1]).sum(1)

    def cheap_chain(x: Points) -> Values:
        return 0.8 * chain(x) - 0.4 * (x[:, 1:] * x[:, :-1]).sum(1) - 50

    if d == 1 and name == "linear":
        return lambda x: 0.5 * forrester(x) + 10 * (x[:, 0] - 0.5) - 5, forrester
    if d == 1:
        return wave, lambda x: (x[:, 0] - math.sqrt(2)) * wave(x) ** 2
    if name == "linear":
        return cheap_chain, chain
    return cheap_chain, lambda x: x.mean(1) * ((cheap_chain(x) - mean) / std) ** 2


# --- a wing section ---------------------------------------------------------------------------------------------------


def _outline(thickness: float, panels: int, camber: float, position: float) -> tuple[np.ndarray, np.ndarray]:
    """Corners of a NACA section with a closed rear edge, from there along the lower side and back on the upper one."""
    turn = np.linspace(0, 2 * np.pi, panels + 1)
    x, side = (1 + np.cos(turn)) / 2, np.where(turn < np.pi, -1, 1)
    polynomial = -0.126 * x - 0.3516 * x**2 + 0.2843 * x**3 - 0.1036 * x**4
    half = 5 * thickness * (0.2969 * np.sqrt(x) + polynomial)
    scale = np.where(x < position, camber / position**2, camber / (1 - position) ** 2)
    line = scale * (2 * position * x - x**2 + np.where(x < position, 0, 1 - 2 * position))
    slope = np.arctan(2 * scale * (position - x))
    return x - side * half * np.sin(slope), line + side * half * np.cos(slope)


@lru_cache(maxsize=128)  # the geometry is most of the work, and many angles share one
def _panel_flow(
    thickness: float, panels: int, camber: float, position: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Midpoints and lengths of the panels, and the surface speed along each per unit of (cos α, sin α).

    Vortex panels of linear strength after Kuethe and Chow, in their symbols; the Kutta condition closes the system.
    """
    X, Y = _outline(thickness, panels, camber, position)
    S, theta = np.hypot(np.diff(X), np.diff(Y)), np.arctan2(np.diff(Y), np.diff(X))
    x, y = (X[1:] + X[:-1]) / 2, (Y[1:] + Y[:-1]) / 2
    dx, dy = x[:, None] - X[:-1], y[:, None] - Y[:-1]
    phi, chi = theta[:, None] - theta, theta[:, None] - 2 * theta
    A, B = -dx * np.cos(theta) - dy * np.sin(theta), dx**2 + dy**2
    C, D = np.sin(phi), np.cos(phi)
    E = dx * np.sin(theta) - dy * np.cos(theta)
    F, G = np.log(1 + (S**2 + 2 * A * S) / B), np.arctan2(E * S, B + A * S)
    P, Q = dx * np.sin(chi) + dy * np.cos(chi), dx * np.cos(chi) - dy * np.sin(chi)
    Cn2 = D + Q * F / (2 * S) - (A * C + D * E) * G / S
    Cn1 = D * F / 2 + C * G - Cn2
    Ct2 = C + P * F / (2 * S) + (A * D - C * E) * G / S
    Ct1 = C * F / 2 - D * G - Ct2
    for matrix, own in ((Cn1, -1), (Cn2, 1), (Ct1, np.pi / 2), (Ct2, np.pi / 2)):
        np.fill_diagonal(matrix, own)
    normal, tangential = (
        np.pad(first, ((0, 0), (0, 1))) + np.pad(second, ((0, 0), (1, 0))) for first, second in ((Cn1, Cn2), (Ct1, Ct2))
    )
    kutta = np.zeros((1, panels + 1))
    kutta[0, [0, -1]] = 1
    inflow = np.stack([np.sin(theta), -np.cos(theta)], axis=1)  # sin(θ - α) = inflow @ (cos α, sin α)
    gamma = np.linalg.solve(np.concatenate([normal, kutta]), np.pad(inflow, ((0, 1), (0, 0))))
    return x, S, np.stack([np.cos(theta), np.sin(theta)], axis=1) + tangential @ gamma


def _drag(x: np.ndarray, S: np.ndarray, U: np.ndarray, nu: float, tripped: bool) -> float:
    """Drag of one side, whose panels run from the stagnation point to the rear edge.

    Thwaites (laminar), Michel (transition), Buri (turbulent), Squire and Young (wake).
    """
    s = np.cumsum(S) - S / 2
    nose = U[0] ** 5 * s[0] / 6  # before the first midpoint the speed grows from zero in proportion to s
    theta = np.sqrt(0.45 * nu * (nose + cumulative_trapezoid(U**5, s, initial=0)) / U**6)  # momentum thickness
    Re_theta, Re_s = U * theta / nu, U * s / nu
    separated = theta**2 * np.gradient(U, s) / nu < -0.09
    turbulent = (Re_theta > 1.174 * (1 + 22400 / Re_s) * Re_s**0.46) | separated | tripped
    turbulent[:3] = False
    if turbulent.any():
        k = int(turbulent.argmax())
        start = theta[k] * Re_theta[k] ** 0.25 * U[k] ** 4
        grown = (start + 0.016 * cumulative_trapezoid(U[k:] ** 4, s[k:], initial=0)) / U[k:] ** 4
        theta[k:] = grown**0.8 * (nu / U[k:]) ** 0.2
    rear = slice(int(x.argmin()), None)  # from the nose on, x grows
    return float(2 * np.interp(0.985, x[rear], theta[rear]) * np.interp(0.985, x[rear], U[rear]) ** 3.2)


def airfoil(
    alpha_deg: float,
    thickness: float,
    panels: int,
    camber: float = 0.02,
    position: float = 0.4,
    reynolds: float = 1e6,
    tripped: bool = False,
) -> tuple[float, float]:
    """Lift and drag coefficients of a NACA four-digit section: vortex panels and an integral boundary layer.

    Parameters
    ----------
    alpha_deg
        Angle of attack in degrees.
    thickness, camber, position
        Largest thickness, largest camber and its place, in chords.
    panels
        Number of panels, at least 10.
    reynolds
        Reynolds number of the chord.
    tripped
        Whether both boundary layers are turbulent from the fourth panel on; otherwise the transition is free.

    Returns
    -------
    tuple of float
        Lift coefficient (from the circulation) and drag coefficient (friction only; no large separation).

    Raises
    ------
    ValueError
        If there are fewer than 10 panels, or a length or the Reynolds number is not positive.

    Notes
    -----
    Source: Kuethe and Chow (panels); Thwaites, Michel, Buri, Squire and Young (boundary layer). It stands in for the
    paper's XFOIL and Nektar++.
    """
    if panels < 10:
        raise ValueError(f"panels must be at least 10, got {panels}")
    if not (thickness > 0 and 0 < position < 1 and reynolds > 0):
        raise ValueError(f"lengths and reynolds must be positive, got {thickness=}, {position=}, {reynolds=}")
    x, S, speeds = _panel_flow(thickness, panels, camber, position)
    V = speeds @ [math.cos(math.radians(alpha_deg)), math.sin(math.radians(alpha_deg))]
    stagnation = int((V > 0).argmax())
    sides = slice(stagnation, None), slice(stagnation - 1, None, -1)
    drag = sum(_drag(x[side], S[side], np.abs(V[side]), 1 / reynolds, tripped) for side in sides)
    return 2 * float(V @ S), drag
