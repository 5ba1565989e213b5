"""How curvature, and with it the largest usable learning rate, depends on the batch size.

Granziol, Zohren and Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural
Network Training", JMLR 2022 (arXiv 2006.09092).

The Hessian of a batch of ``B`` out of ``N`` samples is the Hessian ``H`` of all samples plus a random matrix. Random
matrix theory says where that puts its extreme eigenvalues, and they say how large a step may be. ``P`` counts
parameters, ``lam`` is an eigenvalue of ``H``, ``sigma2`` the variance of one entry of a single sample's fluctuation.
Networks are functions of one flat vector of parameters ``w``: ``loss_fn(w, X, y)`` is the mean loss of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
MatVec = Callable[[Float[Tensor, " P"]], Float[Tensor, " P"]]


# --- what random matrix theory predicts -------------------------------------------------------------------------------


def _positive(**numbers: float) -> None:
    """Raise unless every number is positive and finite."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def effective_batch_size(B: int, N: int, exact: bool = False) -> float:
    """Size of a batch drawn with replacement whose mean fluctuates like that of ``B`` of ``N`` drawn without.

    Parameters
    ----------
    B, N
        Batch size and number of samples, ``1 <= B <= N``.
    exact
        False: ``B / (1 - B/N)``, the paper's. It is exact for a variance that divides by ``N - 1``.
        True: ``B (N-1) / (N-B)``, exact for a variance that divides by ``N``.

    Returns
    -------
    float
        Infinite at ``B = N``, where nothing fluctuates.

    Raises
    ------
    ValueError
        If ``B`` does not lie between 1 and ``N``.
    """
    if not 1 <= B <= N:
        raise ValueError(f"B must lie between 1 and N, got {B=} and {N=}")
    if B == N:
        return math.inf
    return B * (N - 1) / (N - B) if exact else B / (1 - B / N)


def batch_hessian_extreme(lam: float, P: int, sigma2: float, B: int, N: int) -> float:
    """Where an outlier of the Hessian lies in the Hessian of a batch: additive, Wigner-like noise.

    Parameters
    ----------
    lam
        Outlier of the full Hessian, of either sign.
    P, sigma2, B, N
        Number of parameters, variance of an entry for one sample, batch size, number of samples.

    Returns
    -------
    float
        The outlier, pushed away from zero, or the edge of the noise where the outlier is lost in it.

    Raises
    ------
    ValueError
        If ``lam`` is zero or not finite, ``P`` or ``sigma2`` is not positive, or ``B`` is not between 1 and ``N``.

    Notes
    -----
    Source: the paper's theorem on the extreme eigenvalues of the batch Hessian; equation (1) of the tutorial.
    """
    _positive(P=P, sigma2=sigma2)
    if lam == 0 or not math.isfinite(lam):
        raise ValueError(f"lam must be finite and not zero (it has to have a sign), got {lam}")
    strength = P * sigma2 / effective_batch_size(B, N)  # square of the threshold, a quarter of the squared edge
    if lam**2 > strength:
        return lam + strength / lam
    return math.copysign(2 * math.sqrt(strength), lam)


def batch_ggn_extreme(lam: float, P: int, sigma2: float, B: int) -> float:
    """Where an outlier of the generalised Gauss-Newton matrix lies in that of a batch: multiplicative, Wishart noise.

    Parameters
    ----------
    lam
        Outlier of the full matrix.
    P, sigma2, B
        Number of parameters, eigenvalue of the bulk, batch size.

    Raises
    ------
    ValueError
        If an argument is not positive and finite.

    Notes
    -----
    Source: the paper's theorem for the generalised Gauss-Newton matrix; equation (3) of the tutorial.
    """
    _positive(lam=lam, P=P, sigma2=sigma2, B=B)
    gamma = P / B
    if lam > sigma2 * (1 + math.sqrt(gamma)):
        return lam * (1 + gamma * sigma2 / (lam - sigma2))
    return sigma2 * (1 + math.sqrt(gamma)) ** 2


def max_learning_rate(
    B: int,
    lam: float,
    P: int,
    sigma2: float,
    optimizer: str = "sgd",
    model: str = "ggn",
    N: int | None = None,
) -> float:
    """Largest stable learning rate for batches of ``B`` samples.

    Parameters
    ----------
    B, lam, P, sigma2
        Batch size, largest eigenvalue of the full matrix, number of parameters, variance of the noise.
    optimizer
        ``"sgd"``: ``2 / lam'`` with the largest eigenvalue ``lam'`` of a batch. ``"adam"``: ``2 / sqrt(lam')``, up to a
        constant that depends on the scale of the gradients; only ratios between batch sizes have a meaning.
    model
        ``"ggn"`` for :func:`batch_ggn_extreme`, ``"hessian"`` for :func:`batch_hessian_extreme`.
    N
        Number of samples; needed by ``"hessian"``.

    Raises
    ------
    ValueError
        If ``optimizer`` or ``model`` is unknown, ``N`` is missing, ``lam`` is not positive, or another argument is not
        what the model needs.

    Notes
    -----
    Source: the paper's learning rates for SGD and for adaptive methods; equations (4) and (5) of the tutorial.
    """
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer must be 'sgd' or 'adam', got {optimizer!r}")
    if model not in ("ggn", "hessian"):
        raise ValueError(f"model must be 'ggn' or 'hessian', got {model!r}")
    _positive(lam=lam)
    if model == "ggn":
        curvature = batch_ggn_extreme(lam, P, sigma2, B)
    elif N is None:
        raise ValueError("N, the number of samples, is needed by model='hessian', got None")
    else:
        curvature = batch_hessian_extreme(lam, P, sigma2, B, N)
    return 2 / curvature if optimizer == "sgd" else 2 / math.sqrt(curvature)


def min_damping(lr: float, B: int, bulk_trace: float) -> float:
    """Least damping ``delta`` at which ``w -= lr (H + delta)^-1 g_B`` is stable; equation (6) of the tutorial.

    Parameters
    ----------
    lr, B
        Learning rate and batch size.
    bulk_trace
        Sum of the eigenvalues of ``H`` that are much smaller than the damping.

    Raises
    ------
    ValueError
        If an argument is not positive and finite.
    """
    _positive(lr=lr, B=B, bulk_trace=bulk_trace)
    return lr * bulk_trace / (2 * B)


# --- the curvature of a network ---------------------------------------------------------------------------------------


def flat_network(
    network: nn.Module, generator: torch.Generator, gain: float = 1.0
) -> tuple[Callable[[Float[Tensor, " P"], Tensor], Tensor], Float[Tensor, " P"]]:
    """A network as a function ``forward(w, x)`` of one vector, and a random vector to start from.

    Weights are Gaussian with variance gain/fan-in, biases zero. A deep network of ReLU units needs a gain of 2:
    otherwise each of its layers halves the mean square of the signal.
    """
    names, shapes = zip(*((name, p.shape) for name, p in network.named_parameters()), strict=True)

    def forward(w: Float[Tensor, " P"], x: Tensor) -> Tensor:
        pieces = w.split([shape.numel() for shape in shapes])
        parameters = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return functional_call(network, parameters, (x,))

    draws = [torch.randn(shape, generator=generator) for shape in shapes]
    scales = [(gain / math.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.0 for shape in shapes]
    return forward, torch.cat([scale * draw.flatten() for scale, draw in zip(scales, draws, strict=True)])


def hessian_matvec(
    loss_fn: Loss, w: Float[Tensor, " P"], X: Float[Tensor, "n *features"], y: Tensor, chunk_size: int | None = None
) -> MatVec:
    """The map ``v -> H v`` of the Hessian of ``loss_fn`` at ``w`` on the samples given.

    It costs about two gradients. The graph of the gradient is kept from one product to the next, unless there are more
    samples than ``chunk_size``: then they are worked through in chunks, anew for every product.
    """
    w = w.detach().requires_grad_()
    chunks = list(zip(X.split(chunk_size or len(X)), y.split(chunk_size or len(X)), strict=True))

    def slope(x: Tensor, target: Tensor) -> Float[Tensor, " P"]:
        return torch.autograd.grad(loss_fn(w, x, target) * (len(x) / len(X)), w, create_graph=True)[0]

    if len(chunks) > 1:
        return lambda v: sum(torch.autograd.grad(slope(*chunk), w, v)[0] for chunk in chunks)
    kept = slope(X, y)
    return lambda v: torch.autograd.grad(kept, w, v, retain_graph=True)[0]


def top_eigenpairs(
    matvec: MatVec, dim: int, k: int, generator: torch.Generator
) -> tuple[Float[Tensor, " k"], Float[Tensor, "dim k"]]:
    """The ``k`` largest eigenvalues of a symmetric matrix, in falling order, and their eigenvectors (ARPACK).

    Raises
    ------
    ValueError
        If ``k`` does not lie between 1 and ``dim - 1``.
    """
    if not 1 <= k < dim:
        raise ValueError(f"k must lie between 1 and dim - 1, got {k=} and {dim=}")
    start = torch.randn(dim, generator=generator, device=generator.device)

    def product(v: np.ndarray) -> np.ndarray:
        return matvec(torch.from_numpy(v).to(start).flatten()).cpu().numpy()

    operator = LinearOperator((dim, dim), matvec=product, dtype=np.float32)
    values, vectors = eigsh(operator, k, which="LA", v0=start.cpu().numpy(), tol=1e-4)
    order = values.argsort()[::-1]
    return tuple(torch.from_numpy(array[..., order].copy()).to(start.device) for array in (values, vectors))


def lanczos(
    matvec: MatVec, dim: int, num_steps: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Stochastic Lanczos quadrature: the Gauss quadrature of a symmetric matrix's spectrum, seen from a random vector.

    With the unit start vector ``v``, ``sum(weights * ritz_values**p)`` is ``v' H^p v`` for every ``p <= 2 m - 1``.

    Parameters
    ----------
    matvec
        Product of the matrix with a vector of the type ``dtype`` on the generator's device.
    dim, num_steps
        Size of the matrix, and the number of products with it.
    generator
        Source of the start vector.
    dtype
        Type of the vectors.

    Returns
    -------
    ritz_values
        ``m`` nodes in rising order; ``m`` is ``num_steps``, or less where the Krylov space is exhausted earlier.
    weights
        Their weights, which sum to 1.

    Raises
    ------
    ValueError
        If ``num_steps`` does not lie between 1 and ``dim``.
    """
    if not 1 <= num_steps <= dim:
        raise ValueError(f"num_steps must lie between 1 and dim={dim}, got {num_steps}")
    q = torch.randn(dim, generator=generator, device=generator.device, dtype=dtype)
    basis = q.new_zeros(num_steps, dim)
    alpha, beta = [], []
    norm = q.norm()
    for step in range(num_steps):
        basis[step] = q / norm
        q = matvec(basis[step])
        alpha.append(basis[step] @ q)
        known = basis[: step + 1]
        for _ in range(2):  # once leaves rounding errors that grow into copies of converged eigenvalues
            q = q - known.mT @ (known @ q)
        norm = q.norm()
        if norm <= 100 * torch.finfo(dtype).eps * max(abs(a) for a in alpha + beta):
            break
        beta.append(norm)
    diagonal = torch.stack(alpha).double()
    off = torch.stack(beta[: len(alpha) - 1]).double() if len(alpha) > 1 else diagonal[:0]
    ritz_values, vectors = torch.linalg.eigh(diagonal.diag() + off.diag(1) + off.diag(-1))
    return ritz_values, vectors[0] ** 2


class CurvatureNoise(NamedTuple):
    """How one sample's Hessian fluctuates along the top eigenvector, and what that does to the top eigenvalue."""

    c_total: float  # mean of ‖(H_i - H) v_1‖²
    c_j: Float[Tensor, " k"]  # mean of (v_j' (H_i - H) v_1)²
    coefficient: float  # shift of the top eigenvalue, times the effective batch size


def curvature_noise(
    loss_fn: Loss,
    w: Float[Tensor, " P"],
    X: Float[Tensor, "n *features"],
    y: Float[Tensor, "n *targets"],
    eigvals: Float[Tensor, " k"],
    eigvecs: Float[Tensor, "P k"],
    chunk_size: int = 512,
) -> CurvatureNoise:
    """Measure the noise of the curvature along the top eigenvector, from one Hessian-vector product per sample.

    Parameters
    ----------
    loss_fn, w
        Mean loss of a batch, and the flat parameters at which the curvature is asked for.
    X, y
        All samples.
    eigvals, eigvecs
        The largest eigenvalues of the full Hessian in falling order, and their eigenvectors in columns.
    chunk_size
        Number of samples that are worked on side by side, each with a vector of ``P`` numbers.

    Returns
    -------
    CurvatureNoise
        Means are sums over samples divided by ``n - 1``. Directions beyond the ``k`` given count as flat.

    Raises
    ------
    ValueError
        If there are fewer than two samples, shapes do not fit, or the eigenvalues do not fall from a positive one.

    Notes
    -----
    Source: second-order perturbation; equation (2) of the tutorial.
    """
    if len(X) != len(y) or len(X) < 2:
        raise ValueError(f"X and y must hold the same samples, at least two, got {len(X)} and {len(y)}")
    if eigvecs.shape != (len(w), len(eigvals)):
        raise ValueError(f"eigvecs must have shape {(len(w), len(eigvals))}, got {tuple(eigvecs.shape)}")
    if not eigvals[0] > 0 or not (eigvals[1:] < eigvals[0]).all():
        raise ValueError(f"eigvals must be positive and largest at the start, got {eigvals.tolist()}")
    top = eigvecs[:, 0]

    def product(x: Tensor, target: Tensor) -> Tensor:
        return grad(lambda point: grad(loss_fn)(point, x, target) @ top)(w)

    chunks = zip(X.split(chunk_size), y.split(chunk_size), strict=True)
    centre = sum(len(x) / len(X) * product(x, target) for x, target in chunks)

    def deviation(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        change = product(x[None], target[None]) - centre
        return change @ change, (change @ eigvecs) ** 2

    total, along = (sums.double().sum(0) / (len(X) - 1) for sums in vmap(deviation, chunk_size=chunk_size)(X, y))
    rest = (total - along.sum()) / eigvals[0]
    return CurvatureNoise(float(total), along, float((along[1:] / (eigvals[0] - eigvals[1:])).sum() + rest))


# --- training ---------------------------------------------------------------------------------------------------------


def descend(
    loss_fn: Loss,
    w: Float[Tensor, "seeds runs P"],
    batches: Iterable[tuple[Float[Tensor, "seeds B *features"], Tensor]],
    schedule: Callable[[int, Tensor], tuple[float | Tensor, float | Tensor]],
    optimizer: str = "sgd",
    record_every: int = 1,
    record_from: int = 0,
    record: Callable[[Float[Tensor, "seeds runs P"]], Tensor] = torch.clone,
) -> Float[Tensor, "records ..."]:
    """Train many networks side by side; the runs of one seed see the same batches.

    Parameters
    ----------
    loss_fn
        Mean loss of a batch for one flat vector of parameters.
    w
        Initial parameters; not modified.
    batches
        Inputs and targets of every step.
    schedule
        Learning rate and momentum for a step and the parameters before it; numbers, or tensors that
        spread over (seeds, runs, P).
    optimizer
        ``"sgd"``: heavy ball as in ``torch.optim.SGD``. ``"adam"``: ``torch.optim.Adam`` with ``beta_1 = momentum``,
        ``beta_2 = 0.999``, ``epsilon = 1e-8``.
    record_every, record_from
        Number of steps between two records, and the step before which there is none.
    record
        What to keep of the parameters; by default all of them.

    Returns
    -------
    Tensor
        What ``record`` returned after every ``record_every`` steps.

    Raises
    ------
    ValueError
        If ``optimizer`` is unknown, ``w`` does not have three axes, or ``record_every`` is not positive.
    """
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer must be 'sgd' or 'adam', got {optimizer!r}")
    if w.ndim != 3 or record_every < 1:
        raise ValueError(
            f"w must have axes (seeds, runs, P) and record_every be positive, got {w.shape=}, {record_every=}"
        )
    gradient = vmap(vmap(grad(loss_fn), (0, None, None)))
    first = second = torch.zeros_like(w)
    records = []
    for step, (x, y) in enumerate(batches, 1):
        slope = gradient(w, x, y)
        lr, momentum = schedule(step - 1, w)
        if optimizer == "sgd":
            first = momentum * first + slope
            w = w - lr * first
        else:
            first = momentum * first + (1 - momentum) * slope
            second = 0.999 * second + 0.001 * slope**2
            w = w - lr * first / (1 - momentum**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        if step % record_every == 0 and step >= record_from:
            records.append(record(w))
    return torch.stack(records)


def largest_usable_rate(
    rates: Float[Tensor, " rates"], losses: Float[Tensor, "*batch rates"], limit: float
) -> Float[Tensor, "*batch"]:
    """The rate at which the loss crosses ``limit`` for the last time, interpolated in the logarithm of the rate.

    Parameters
    ----------
    rates
        Learning rates in rising order.
    losses
        The loss reached with each; NaN counts as infinite.
    limit
        The highest loss that counts as usable.

    Returns
    -------
    Tensor
        NaN where there is no crossing: every rate of the grid is usable up to its end, or none is.

    Raises
    ------
    ValueError
        If ``rates`` do not rise from a positive one, or do not match the last axis of ``losses``.
    """
    if not rates[0] > 0 or not (rates.diff() > 0).all():
        raise ValueError(f"rates must be positive and rise, got {rates.tolist()}")
    if losses.shape[-1:] != rates.shape:
        raise ValueError(f"losses must have a last axis of length {len(rates)}, got shape {tuple(losses.shape)}")
    losses = losses.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    usable = losses < limit
    last = torch.where(usable, torch.arange(len(rates), device=losses.device), -1).amax(-1)
    found = (last >= 0) & (last < len(rates) - 1)
    here = last.clamp(0, len(rates) - 2)
    below, above = (losses.gather(-1, k[..., None])[..., 0] for k in (here, here + 1))
    log = rates.log()
    crossing = log[here] + (limit - below) / (above - below) * (log[here + 1] - log[here])
    return torch.where(found, crossing.exp(), math.nan)


@dataclass
class LanczosLearner:
    """Learning rate and momentum from the spectrum of a batch Hessian, looked at again every few steps.

    Parameters
    ----------
    probe_every
        Steps between two looks at the curvature, once the first few steps are over; see :meth:`due`.
    num_steps
        Lanczos steps of a look, each the cost of one Hessian-vector product.
    generator
        Source of the start vectors.
    max_momentum
        Upper limit of the momentum (rule ``"inverse"`` only).
    rule
        ``"inverse"``: learning rate ``1/lam``, limited momentum. ``"heavy_ball"``: the textbook values, optimal for a
        quadratic whose eigenvalues lie between ``bulk`` and ``lam``.

    Raises
    ------
    ValueError
        If a count is not positive, ``max_momentum`` is not in [0, 1), or the rule is unknown.

    Notes
    -----
    Source: after the paper's learner; the rule ``"inverse"`` is ours, equation (8) of the tutorial.
    """

    probe_every: int
    num_steps: int
    generator: torch.Generator
    max_momentum: float = 0.9
    rule: str = "inverse"
    curvature: float = field(default=0.0, init=False)  # running estimate of the largest eigenvalue

    def __post_init__(self) -> None:
        _positive(probe_every=self.probe_every, num_steps=self.num_steps)
        if not 0 <= self.max_momentum < 1:
            raise ValueError(f"max_momentum must lie in [0, 1), got {self.max_momentum}")
        if self.rule not in ("inverse", "heavy_ball"):
            raise ValueError(f"rule must be 'inverse' or 'heavy_ball', got {self.rule!r}")

    def due(self, step: int) -> bool:
        """Whether to look at the curvature before this step: early on, when it changes fast, up to 4 times as often."""
        haste = 4 if step <= self.probe_every / 2 else 2 if step <= 2 * self.probe_every else 1
        return step % max(self.probe_every // haste, 1) == 0

    def propose(self, matvec: MatVec, dim: int) -> tuple[float, float]:
        """Learning rate and momentum for the Hessian behind ``matvec``, a matrix of size ``dim``."""
        ritz_values, weights = lanczos(matvec, dim, self.num_steps, self.generator)
        # The estimate may jump up but only sinks slowly: a step that is too long costs more than one that is too short.
        self.curvature = max(float(ritz_values[-1]), 0.8 * self.curvature)
        if not self.curvature > 0:
            raise ValueError(f"matvec must have a positive eigenvalue, found none above {self.curvature}")
        top, bulk = math.sqrt(self.curvature), math.sqrt(abs(float(ritz_values[weights.argmax()])))
        momentum = ((top - bulk) / (top + bulk)) ** 2
        if self.rule == "heavy_ball":
            return (2 / (top + bulk)) ** 2, momentum
        return 1 / self.curvature, min(momentum, self.max_momentum)
