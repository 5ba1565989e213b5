"""Learning dynamics of deep linear networks: exact solutions, and the initial weights that make depth harmless.

Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear neural networks",
ICLR 2014 (arXiv 1312.6120).

A network of ``D`` weight matrices computes ``W = W_D ... W_1``. It is trained by full-batch gradient descent on
``1/2 tr(W Σ11 Wᵀ) - tr(Σ31ᵀ W)``, the squared error up to a constant, where ``Σ31`` is the input-output and ``Σ11`` the
input correlation. Time ``t`` is the number of steps times the learning rate, in units where ``tau = 1``. Lists of
weights start at the input; every matrix may carry leading batch axes (seeds, learning rates).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import quad, solve_ivp
from torch import Tensor

Weights = list[Float[Tensor, "*batch n_out n_in"]]


def _check_mode(s: float, u0: float, depth: float, tau: float) -> None:
    """Raise unless the parameters describe a mode that can be learned."""
    if not s > 0 or not tau > 0 or not (math.isfinite(s) and math.isfinite(tau)):
        raise ValueError(f"s and tau must be positive and finite, got {s=} and {tau=}")
    if not depth >= 1 or (math.isfinite(depth) and depth != int(depth)):
        raise ValueError(f"depth must be a number of weight matrices, 1 or more, got {depth=}")
    if not math.isfinite(u0) or (depth > 1 and u0 <= 0):
        raise ValueError(f"u0 must be finite, and positive for depth > 1 (a mode of strength 0 never grows), got {u0=}")


def mode_strength(t: Float[np.ndarray, "*shape"], s: float, u0: float, depth: int = 2, tau: float = 1.0) -> np.ndarray:
    """Strength ``u(t)`` of a mode in a network of ``depth`` matrices with decoupled, balanced initial weights.

    Solves ``tau du/dt = D u^(2-2/D) (s - u)`` with ``u(0) = u0``: in closed form for one matrix (exponential) and for
    two (sigmoid), numerically for more.

    Parameters
    ----------
    t
        Times, not negative, in any order.
    s
        Singular value of Σ31, where the mode ends.
    u0
        Initial strength; positive, except that a single matrix may start anywhere. It may exceed ``s``.
    depth
        Number ``D`` of weight matrices (the paper's number of layers of neurons, less one).
    tau
        Time constant, the inverse of the learning rate.

    Returns
    -------
    ndarray
        ``u`` at every time, of the shape of ``t``.

    Raises
    ------
    ValueError
        If ``s`` or ``tau`` is not positive, ``u0`` is not positive for ``depth`` of 2 or more, ``depth`` is no whole
        number from 1, or a time is negative or not finite.

    Notes
    -----
    Source: equations 12 (two matrices) and 15 (any number).
    """
    _check_mode(s, u0, depth, tau)
    if depth == math.inf:
        raise ValueError("depth must be finite; learning_time knows the limit of infinite depth")
    t = np.asarray(t, dtype=float)
    if not (t >= 0).all() or not np.isfinite(t).all():
        raise ValueError(f"t must hold finite times, none negative, got values from {t.min()} to {t.max()}")
    if depth == 1:
        return s + (u0 - s) * np.exp(-t / tau)
    if depth == 2:
        return s / (1 + (s / u0 - 1) * np.exp(-2 * s * t / tau))
    times, position = np.unique(np.append(0.0, t), return_inverse=True)

    def log_growth(_: float, log_u: np.ndarray) -> np.ndarray:  # in ln u, where small strengths keep their digits
        return depth / tau * np.exp((1 - 2 / depth) * log_u) * (s - np.exp(log_u))

    solution = solve_ivp(
        log_growth, (0, times[-1] or 1.0), [math.log(u0)], method="LSODA", t_eval=times, rtol=1e-11, atol=1e-12
    )
    return np.exp(solution.y[0])[position[1:]].reshape(t.shape)


def learning_time(s: float, u0: float, uf: float, depth: float = 2, tau: float = 1.0) -> float:
    """Time in which a mode goes from strength ``u0`` to ``uf``, or the limit of ``D t_D`` for infinite depth.

    Parameters
    ----------
    s, u0, tau
        As for :func:`mode_strength`; ``u0`` is positive for every depth.
    uf
        Final strength: between ``u0`` and ``s``.
    depth
        Number ``D`` of weight matrices. ``math.inf`` gives the limit of ``D t_D``, the time when the learning rate
        falls as ``1/D``.

    Raises
    ------
    ValueError
        As for :func:`mode_strength`, and if ``uf`` does not lie strictly between ``u0`` and ``s``.

    Notes
    -----
    Source: equations 11 (two matrices), 15 (any number, integrated) and 17 (limit).
    """
    _check_mode(s, u0, depth, tau)
    if not (0 < u0 < uf < s or s < uf < u0):
        raise ValueError(f"uf must lie strictly between a positive u0 and s, got {u0=}, {uf=}, {s=}")
    if depth == 2:
        return tau / (2 * s) * math.log(uf * (s - u0) / (u0 * (s - uf)))
    if depth == math.inf:
        return tau * (math.log(uf * (u0 - s) / (u0 * (uf - s))) / s**2 + (1 / u0 - 1 / uf) / s)
    # ∫ du / (D u^(2-2/D) (s-u)) with u = e^x, so that a tiny u0 costs no accuracy
    ends = math.log(u0), math.log(uf)
    value, _ = quad(
        lambda x: math.exp((2 / depth - 1) * x) / (depth * (s - math.exp(x))), *ends, epsabs=0, epsrel=1e-11
    )
    return tau * value


def hierarchy(levels: int) -> Float[Tensor, "features items"]:
    """Properties of the leaves of a binary tree: entry 1 where the item (a leaf) descends from the node (a feature).

    With one-hot inputs this is Σ31 as a sum over items, and Σ11 is the identity. Rows run from the root to the leaves:
    ``2^(levels+1) - 1`` features of ``2^levels`` items. Float64.

    Raises
    ------
    ValueError
        If ``levels`` is smaller than 1.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    nodes = [torch.eye(2**level, dtype=torch.float64) for level in range(levels + 1)]
    return torch.cat([node.repeat_interleave(2**levels // len(node), dim=1) for node in nodes])


def _orthogonal(n_out: int, n_in: int, generator: torch.Generator) -> Float[Tensor, "n_out n_in"]:
    """A Haar-distributed matrix with orthonormal columns, or rows where these are fewer."""
    gaussian = torch.randn(max(n_out, n_in), min(n_out, n_in), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal().sign()  # QR fixes signs by convention; without this the distribution is not uniform
    return q if n_out >= n_in else q.mT


def initial_weights(sizes: Sequence[int], scheme: str, generator: torch.Generator, gain: float = 1.0) -> Weights:
    """Random initial weights of a network whose layers of neurons have the given sizes, in float64.

    Parameters
    ----------
    sizes
        Widths of the layers of neurons, input and output included.
    scheme
        ``"gaussian"``: independent entries of variance ``gain²/fan-in``, which keeps the expected norm of a signal.
        ``"orthogonal"``: ``gain`` times a random matrix with orthonormal columns (or rows).
    generator
        Source of randomness.
    gain
        Scale ``g`` of every matrix.

    Raises
    ------
    ValueError
        If there are fewer than two sizes or one is not positive, the scheme is unknown, or ``gain`` is not positive.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must hold at least two positive widths, got {list(sizes)}")
    if scheme not in ("gaussian", "orthogonal"):
        raise ValueError(f"scheme must be 'gaussian' or 'orthogonal', got {scheme!r}")
    if not gain > 0:
        raise ValueError(f"gain must be positive, got {gain}")
    pairs = pairwise(sizes)
    if scheme == "orthogonal":
        return [gain * _orthogonal(n_out, n_in, generator) for n_in, n_out in pairs]
    draws = [torch.randn(n_out, n_in, generator=generator, dtype=torch.float64) for n_in, n_out in pairs]
    return [gain * draw.shape[1] ** -0.5 * draw for draw in draws]


def decoupled_weights(
    sigma31: Float[Tensor, "n3 n1"], n_hidden: int, depth: int, u0: float, generator: torch.Generator
) -> Weights:
    """Initial weights under which the modes of ``sigma31`` never interact, each with initial strength ``u0``.

    ``W_l = R_{l+1} u0^(1/D) R_lᵀ`` with the right singular vectors of ``sigma31`` as ``R_1``, the left ones as
    ``R_{D+1}``, and random orthonormal columns between.

    Parameters
    ----------
    sigma31
        Input-output correlation.
    n_hidden
        Width of every hidden layer.
    depth
        Number of weight matrices.
    u0
        Initial strength of every mode, positive.
    generator
        Source of the hidden bases.

    Raises
    ------
    ValueError
        If ``sigma31`` is no finite matrix, ``n_hidden`` is less than its rank, or ``depth`` or ``u0`` is not positive.

    Notes
    -----
    Source: the paper's decoupled initial conditions, Sections 1.2 and 2.
    """
    if sigma31.ndim != 2 or not sigma31.isfinite().all():
        raise ValueError(f"sigma31 must be a finite (n3, n1) matrix, got shape {tuple(sigma31.shape)}")
    if depth < 1 or not u0 > 0:
        raise ValueError(f"depth must be at least 1 and u0 positive, got {depth=} and {u0=}")
    rank = int(torch.linalg.matrix_rank(sigma31))
    if n_hidden < rank:
        raise ValueError(f"n_hidden must be at least the rank of sigma31, {rank}, got {n_hidden}")
    u, _, vh = torch.linalg.svd(sigma31, full_matrices=False)
    hidden = [_orthogonal(n_hidden, rank, generator).to(sigma31) for _ in range(depth - 1)]
    bases = [vh[:rank].mT, *hidden, u[:, :rank]]
    return [u0 ** (1 / depth) * after @ before.mT for before, after in pairwise(bases)]


def gradients(
    weights: Weights, sigma31: Float[Tensor, "n3 n1"], sigma11: Float[Tensor, "n1 n1"]
) -> tuple[Weights, Float[Tensor, "*batch n3 n1"]]:
    """Gradient of the loss with respect to every matrix, and the product of all of them.

    Layer ``l`` gets ``(W_D ... W_{l+1})ᵀ (W Σ11 - Σ31) (W_{l-1} ... W_1)ᵀ``: the paper's gradient flow (Section 2) with
    its sign turned. Both products are built along the network, so that the cost is linear in depth, and both have as
    many rows as there are outputs, which are few.
    """
    top = torch.eye(len(sigma31), dtype=sigma31.dtype, device=sigma31.device)
    product, *above = [*accumulate(reversed(weights), torch.matmul)][::-1]
    error = product @ sigma11 - sigma31
    result = []
    for weight, suffix in zip(weights, [*above, top], strict=True):
        result.append(suffix.mT @ error)
        error = error @ weight.mT
    return result, product


def _check_network(weights: Weights, sigma31: Tensor, sigma11: Tensor) -> None:
    """Raise unless the matrices fit together."""
    if not weights:
        raise ValueError("weights is empty; a network needs at least one matrix")
    sizes = [weights[0].shape[-1], *(weight.shape[-2] for weight in weights)]
    if [weight.shape[-1] for weight in weights] != sizes[:-1]:
        raise ValueError(f"weights must fit together, got shapes {[tuple(weight.shape) for weight in weights]}")
    if tuple(sigma31.shape) != (sizes[-1], sizes[0]) or tuple(sigma11.shape) != (sizes[0], sizes[0]):
        raise ValueError(
            f"sigma31 and sigma11 must have shapes {(sizes[-1], sizes[0])} and {(sizes[0], sizes[0])}, "
            f"got {tuple(sigma31.shape)} and {tuple(sigma11.shape)}"
        )


def train_deep_linear(
    weights: Weights,
    sigma31: Float[Tensor, "n3 n1"],
    sigma11: Float[Tensor, "n1 n1"],
    lr: float,
    steps: int,
    record_every: int,
) -> tuple[Float[Tensor, "records *batch n3 n1"], Weights]:
    """Full-batch gradient descent on a deep linear network; all layers move at once, from the same old weights.

    Parameters
    ----------
    weights
        Initial weights, input side first; not modified. Batch axes are trained side by side.
    sigma31, sigma11
        Input-output and input correlations, with one common normalisation (sums or means).
    lr
        Learning rate; a step is a time ``lr`` (with ``tau = 1``).
    steps, record_every
        Number of steps, and how many of them lie between two records.

    Returns
    -------
    products
        The end-to-end map before the first step and after every ``record_every`` steps.
    weights
        The final weights.

    Raises
    ------
    ValueError
        If the shapes do not fit, or ``lr``, ``steps`` or ``record_every`` is not positive.
    """
    _check_network(weights, sigma31, sigma11)
    if not lr > 0 or steps < 1 or record_every < 1:
        raise ValueError(f"lr, steps and record_every must be positive, got {lr=}, {steps=}, {record_every=}")
    products = []
    for step in range(steps):
        slopes, product = gradients(weights, sigma31, sigma11)
        if step % record_every == 0:
            products.append(product)
        weights = [weight - lr * slope for weight, slope in zip(weights, slopes, strict=True)]
    if steps % record_every == 0:
        products.append(gradients(weights, sigma31, sigma11)[1])
    return torch.stack(products), weights


def epochs_to_learn(
    weights: Sequence[Float[Tensor, "seeds n_out n_in"]],
    sigma31: Float[Tensor, "n3 n1"],
    sigma11: Float[Tensor, "n1 n1"],
    rates: Sequence[float],
    max_epochs: int,
    excess: float = 0.01,
) -> Float[Tensor, " seeds"]:
    """Fewest full-batch epochs, over learning rates, until ``‖Σ31 - W‖² < excess ‖Σ31‖²``; infinity if never.

    All rates run side by side, so that the first to arrive is the best and ends the race of its seed. Rates that
    diverge drop out. The criterion is the excess loss for white inputs (Σ11 = 1). Source: the paper's Figures 4 and 6.

    Parameters
    ----------
    weights
        Initial weights with a first axis over seeds; not modified.
    sigma31, sigma11
        Input-output and input correlations.
    rates
        Learning rates to try.
    max_epochs
        Where to give up.
    excess
        Part of the initial loss that may be left.

    Raises
    ------
    ValueError
        If the shapes do not fit, or rates, ``max_epochs`` or ``excess`` are not positive.
    """
    _check_network(weights, sigma31, sigma11)
    if any(weight.ndim != 3 for weight in weights):
        raise ValueError(f"weights must have a first axis over seeds, got shapes {[tuple(w.shape) for w in weights]}")
    if not rates or not min(rates) > 0 or max_epochs < 1 or not excess > 0:
        raise ValueError(f"rates, max_epochs and excess must be positive, got {rates=}, {max_epochs=}, {excess=}")
    seeds = len(weights[0])
    runner = torch.arange(seeds, device=sigma31.device).repeat_interleave(len(rates))  # the seed of each run
    lr = sigma31.new_tensor(rates).repeat(seeds)[:, None, None]
    weights = [weight[runner] for weight in weights]
    epochs = torch.full((seeds,), math.inf)
    for epoch in range(max_epochs + 1):
        slopes, product = gradients(weights, sigma31, sigma11)
        left = (sigma31 - product).square().sum((-2, -1)) / sigma31.square().sum()
        arrived = runner[left < excess].unique()
        epochs[arrived.cpu()] = epoch
        stays = left.isfinite() & ~torch.isin(runner, arrived)
        if not stays.any():
            break
        for weight, slope in zip(weights, slopes, strict=True):
            weight -= lr * slope
        if not stays.all():
            weights, lr, runner = [weight[stays] for weight in weights], lr[stays], runner[stays]
    return epochs


def pretrain_greedy(
    sigma11: Float[Tensor, "n1 n1"],
    sizes: Sequence[int],
    generator: torch.Generator,
    lr: float,
    tol: float,
    max_steps: int = 20_000,
) -> tuple[Weights, list[int]]:
    """Greedy layer-wise pretraining: every layer is the encoder of a linear autoencoder of the code below it.

    An autoencoder is itself a deep linear network with two matrices and ``Σ31 = Σ11 = C``, the covariance of its input.
    It starts from Gaussian weights of gain 0.3 and is trained until ``‖(1 - W_2 W_1) C‖² < tol ‖C‖²``. Source: the
    paper's Section 3.

    Parameters
    ----------
    sigma11
        Covariance of the network's input.
    sizes
        Widths of the input and of every layer to pretrain.
    generator
        Source of the autoencoders' initial weights.
    lr, tol
        Learning rate and tolerance of the autoencoders.
    max_steps
        Where to give up on a layer.

    Returns
    -------
    weights
        The encoders, input side first.
    steps
        Gradient steps that each took.

    Raises
    ------
    ValueError
        If a layer is too narrow to keep the code's information, sizes do not fit, or ``lr`` or ``tol`` is not positive.
    RuntimeError
        If a layer does not reach ``tol`` within ``max_steps``.
    """
    if len(sizes) < 2 or tuple(sigma11.shape) != (sizes[0], sizes[0]):
        raise ValueError(
            f"sigma11 must be square, of size sizes[0], got shape {tuple(sigma11.shape)} and {list(sizes)}"
        )
    rank = int(torch.linalg.matrix_rank(sigma11, hermitian=True))
    if min(sizes) < rank:
        raise ValueError(f"sizes must be at least the rank of sigma11, {rank}, got {list(sizes)}")
    if not lr > 0 or not tol > 0:
        raise ValueError(f"lr and tol must be positive, got {lr=} and {tol=}")
    code, encoders, steps = sigma11, [], []
    for n_in, n_out in pairwise(sizes):
        pair = [0.3 * weight.to(sigma11) for weight in initial_weights([n_in, n_out, n_in], "gaussian", generator)]
        for step in range(max_steps):
            slopes, product = gradients(pair, code, code)
            if (code - product @ code).square().sum() < tol * code.square().sum():
                steps.append(step)
                break
            pair = [weight - lr * slope for weight, slope in zip(pair, slopes, strict=True)]
        else:
            layer = len(encoders) + 1
            raise RuntimeError(f"layer {layer} missed tol={tol} in {max_steps} steps; try another lr than {lr}")
        encoders.append(pair[0])
        code = pair[0] @ code @ pair[0].mT
    return encoders, steps


def jacobian_singular_values(
    depth: int, width: int, gain: float, scheme: str, generator: torch.Generator
) -> Float[Tensor, " width"]:
    """Singular values, largest first, of the end-to-end Jacobian of a random deep tanh network at a random input.

    ``x_{l+1} = tanh(W_l x_l)`` with weights from :func:`initial_weights` and a standard normal input. All in float64:
    in single precision the small singular values of a long product are rounding noise.

    Parameters
    ----------
    depth, width
        Number of layers, and neurons in each.
    gain, scheme, generator
        As for :func:`initial_weights`.

    Raises
    ------
    ValueError
        If ``depth`` is smaller than 1, and as for :func:`initial_weights`.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    weights = initial_weights([width] * (depth + 1), scheme, generator, gain)
    x = torch.randn(width, generator=generator, dtype=torch.float64)
    jacobian = torch.eye(width, dtype=torch.float64)
    for weight in weights:
        x = torch.tanh(weight @ x)
        jacobian = (1 - x**2)[:, None] * (weight @ jacobian)
    return torch.linalg.svdvals(jacobian)
