"""Information-theoretic bounds on the generalization error, layer by layer.

He and Goldfeld, "Information-Theoretic Generalization Bounds for Deep Neural Networks", 2024 (arXiv 2404.03176).

The closed forms hold for one instance of the paper's Gaussian example, and were derived for this book: labels
``Y = ±1`` are equally likely, ``X | Y ~ N(Y μ, s² I_d)``, and a deep linear network computes ``ŵᵀx`` with
``ŵ = mean of Y_i X_i ~ N(μ, s²/n I)``. Given ``ŵ``, a training input has the law ``N(Y ŵ, s²(1-1/n) I)``, a fresh one
``N(Y μ, s² I)``. Layer 0 is the input. All information is in nats. Lists of weights start at the input, and every
matrix may carry leading batch axes (training sets).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, combinations_with_replacement, pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import gammaln, hyp1f1, logsumexp, xlogy
from torch import Tensor

Weights = list[Float[Tensor, "*batch n_out n_in"]]


def _check_samples(n: int, noise: float) -> None:
    """Raise unless ``n`` samples of standard deviation ``noise`` have a covariance given their mean."""
    if n < 2 or not noise > 0:
        raise ValueError(f"n must be at least 2 and noise positive, got {n=} and {noise=}")


def gaussian_layer_kl(
    rank: int, dim: int, n: int, mean_norm: float, noise: float = 1.0, data_independent: bool = False
) -> float:
    """KL divergence ``D_l`` between train and test law of a layer of the mean classifier, averaged over training sets.

    ``D_l = r/2 (-1/n - ln(1-1/n)) + d/2n - (d-r)/d · ‖μ‖²/2s² · 1F1(1; d/2+1; -n‖μ‖²/2s²)``. The last term is what a
    layer forgets when it keeps the direction of ``ŵ`` and drops ``d - r`` others.

    Parameters
    ----------
    rank
        Rank ``r`` of the map from the input to the layer; ``rank = dim`` gives ``D_0 = I(Z_i; W) = d/2 ln(n/(n-1))``.
    dim
        Dimension ``d`` of the input.
    n
        Number of training samples.
    mean_norm
        Norm ``‖μ‖`` of the class mean.
    noise
        Standard deviation ``s`` of the inputs within a class.
    data_independent
        True for a random projection that does not look at the data: ``r/2 ln(n/(n-1))``.

    Raises
    ------
    ValueError
        Unless ``1 <= rank <= dim``, ``n >= 2``, ``mean_norm >= 0`` and ``noise > 0``.

    Notes
    -----
    Source: the paper's binary Gaussian classification with linear networks; derived here.
    """
    _check_samples(n, noise)
    if not 1 <= rank <= dim:
        raise ValueError(f"rank must be between 1 and dim, got {rank=} and {dim=}")
    if not 0 <= mean_norm < math.inf:
        raise ValueError(f"mean_norm must be finite and not negative, got {mean_norm}")
    if data_independent:
        return -rank / 2 * math.log1p(-1 / n)
    signal = (mean_norm / noise) ** 2 / 2
    # ‖μ‖² E sin²(angle of ŵ and μ) / 2s² = (d-1)/d · signal · 1F1; each dropped direction takes one (d-1)-th of it
    z = max(n * signal, 1e-30)  # SciPy's function is NaN where its argument nearly underflows
    forgotten = (dim - rank) / dim * signal * float(hyp1f1(1, dim / 2 + 1, -z))
    return rank / 2 * (-1 / n - math.log1p(-1 / n)) + dim / (2 * n) - forgotten


def kl_bound(kl: Float[np.ndarray, "*shape"] | float, sigma: float = 0.5) -> Float[np.ndarray, "*shape"]:
    """Bound ``σ sqrt(2 D)`` on the generalization error of a σ-sub-Gaussian loss (σ = 1/2 for losses in [0, 1]).

    Raises
    ------
    ValueError
        If a divergence is negative or ``sigma`` is not positive.
    """
    if not np.all(np.asarray(kl) >= 0) or not sigma > 0:
        raise ValueError(f"kl must not be negative and sigma must be positive, got {kl=} and {sigma=}")
    return sigma * np.sqrt(2 * np.asarray(kl))


def mean_classifier_network(
    x: Float[Tensor, "*batch n d"],
    y: Float[Tensor, "*batch n"],
    ranks: Sequence[int],
    gains: Sequence[float],
    generator: torch.Generator,
) -> Weights:
    """A deep linear network whose end-to-end map is ``ŵᵀ``, the mean of ``y_i x_i``.

    Layer ``l`` holds ``g_l`` times the coordinates of the input along ``ŵ/‖ŵ‖`` and along ``r_l - 1`` random directions
    orthogonal to it; the layers are nested.

    Parameters
    ----------
    x, y
        Training sets: inputs and labels ±1.
    ranks
        Widths ``r_1 >= ... >= r_L = 1``.
    gains
        Scales ``g_1, ..., g_{L-1}`` of the hidden layers; that of the output is ``‖ŵ‖``.
    generator
        Source of the random directions.

    Raises
    ------
    ValueError
        If the shapes differ, a label is not ±1, ranks increase, exceed ``d`` or do not end with 1, gains are not
        positive, or there is not one gain for each hidden layer.
    """
    if x.ndim < 2 or y.shape != x.shape[:-1] or not (y.abs() == 1).all():
        raise ValueError(
            f"y must hold a label ±1 for each row of x, got shapes {tuple(y.shape)} and {tuple(x.shape)}, "
            f"values from {y.min():g} to {y.max():g}"
        )
    if not ranks or any(a < b for a, b in pairwise([x.shape[-1], *ranks])) or ranks[-1] != 1:
        raise ValueError(f"ranks must fall from at most d={x.shape[-1]} to 1, got {list(ranks)}")
    if len(gains) != len(ranks) - 1 or not all(gain > 0 for gain in gains):
        raise ValueError(f"gains must hold {len(ranks) - 1} positive numbers, one per hidden layer, got {list(gains)}")
    w_hat = (y[..., None] * x).mean(-2)
    columns = torch.randn(*w_hat.shape, ranks[0], generator=generator, dtype=x.dtype)
    columns[..., 0] = w_hat
    q, r = torch.linalg.qr(columns)
    h = (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT  # the first row is ŵ/‖ŵ‖, the others are Haar
    scales = [*gains, w_hat.norm(dim=-1)[..., None, None]]
    steps = zip(pairwise(ranks), pairwise(scales), strict=True)
    return [scales[0] * h, *(after / before * torch.eye(k, j, dtype=x.dtype) for (j, k), (before, after) in steps)]


def _layer_maps(weights: Weights, mean: Float[Tensor, " d"]) -> tuple[Weights, Float[Tensor, "*batch d 1"]]:
    """Maps ``A_0 = 1, A_1, ..., A_L`` from the input to each layer, and the error ``ŵ - μ`` of the end-to-end map."""
    if not weights or weights[0].shape[-1] != len(mean) or weights[-1].shape[-2] != 1:
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(f"weights must lead from d={len(mean)} inputs, as mean has, to 1 output, got shapes {shapes}")
    maps = [*accumulate(weights, lambda below, weight: weight @ below, initial=torch.eye(len(mean), dtype=mean.dtype))]
    return maps, maps[-1].mT - mean[:, None]


def layer_kls(
    weights: Weights, mean: Float[Tensor, " d"], n: int, noise: float = 1.0
) -> Float[Tensor, "*batch layers"]:
    """KL divergence between train and test law of every layer ``0, ..., L`` of a mean classifier with given weights.

    It is computed on the range of the map to the layer, where both covariances are invertible. Its mean over training
    sets is :func:`gaussian_layer_kl`.

    Parameters
    ----------
    weights
        A linear network with end-to-end map ``ŵᵀ``, every layer of which has full row rank.
    mean
        Class mean ``μ``.
    n, noise
        As for :func:`gaussian_layer_kl`.

    Raises
    ------
    ValueError
        If the shapes do not fit, ``n`` or ``noise`` is too small, or a layer has more units than its map has rank.
    """
    _check_samples(n, noise)
    maps, delta = _layer_maps(weights, mean)
    kls = []
    for layer, a in enumerate(maps):
        factor, info = torch.linalg.cholesky_ex(a @ a.mT)
        if info.any():
            raise ValueError(f"weights must keep full row rank, layer {layer} has more units than rank")
        shift = torch.linalg.solve_triangular(factor, a @ delta, upper=False).square().sum((-2, -1))  # ‖P_l δ‖²
        kls.append(a.shape[-2] / 2 * (-1 / n - math.log1p(-1 / n)) + shift / (2 * noise**2))
    return torch.stack(kls, -1)


def layer_distances(
    weights: Weights, mean: Float[Tensor, " d"], n: int, noise: float = 1.0, joint: bool = False
) -> dict[str, Float[Tensor, "*batch layers"]]:
    """Wasserstein distance between train and test law of every layer, and the Lipschitz factor of what follows.

    Parameters
    ----------
    weights, mean, n, noise
        As for :func:`layer_kls`; layers may have any rank.
    joint
        False couples inputs of the same label, for a loss that is Lipschitz in the output. True is for distances on
        pairs (representation, label): no factor is smaller than 1.

    Returns
    -------
    dict
        ``"distance"``: ``sqrt(‖A_l δ‖² + ‖A_l‖_F² s² (1 - sqrt(1-1/n))²)``, the 2-Wasserstein distance of the two
        Gaussians of a label, which bounds the 1-Wasserstein distance from above; ``"factor"``: product of ``‖W_j‖``
        over the layers ``j > l``; ``"weighted"``: product of both, which bounds the distance of the outputs.

    Raises
    ------
    ValueError
        If the shapes do not fit, or ``n`` or ``noise`` is too small.
    """
    _check_samples(n, noise)
    maps, delta = _layer_maps(weights, mean)
    shrink = noise * (1 - math.sqrt(1 - 1 / n))
    distances = [((a @ delta).square().sum((-2, -1)) + (shrink * a).square().sum((-2, -1))).sqrt() for a in maps]
    norms = [torch.linalg.matrix_norm(weight, 2) for weight in reversed(weights)]
    factors = [*accumulate(norms, torch.mul, initial=torch.ones_like(norms[0]))][::-1]
    distance, factor = (torch.stack(torch.broadcast_tensors(*rows), -1) for rows in (distances, factors))
    factor = factor.clamp(min=1) if joint else factor
    return {"distance": distance, "factor": factor, "weighted": factor * distance}


def expected_clip_loss(
    margin: Float[Tensor, "*shape"], std: Float[Tensor, "*shape"] | float
) -> Float[Tensor, "*shape"]:
    """Expectation of the loss ``clip((1 - m)/2, 0, 1)`` for a margin ``m ~ N(margin, std²)``.

    Raises
    ------
    ValueError
        If ``std`` is not positive.
    """
    std = torch.as_tensor(std, dtype=margin.dtype) / 2
    if not (std > 0).all():
        raise ValueError(f"std must be positive, got a smallest value of {2 * std.min():g}")
    normal = torch.distributions.Normal(0.0, 1.0)

    def positive_part(mean: Tensor) -> Tensor:
        """``E max(u, 0)`` for ``u ~ N(mean, std²)``."""
        return mean * torch.special.ndtr(mean / std) + std * normal.log_prob(mean / std).exp()

    return positive_part((1 - margin) / 2) - positive_part((-1 - margin) / 2)


# --- strong data processing -------------------------------------------------------------------------------------------


def _check_drop(p: float, *widths: int) -> None:
    """Raise unless ``p`` is a probability and the widths are positive."""
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability, between 0 and 1, got {p}")
    if min(widths) < 1:
        raise ValueError(f"width must be at least 1 everywhere, got {widths}")


def sdpi_dropout(p: float, width: int) -> float:
    """Contraction ``1 - p^d`` of Dropout on ``width`` units: the probability that at least one survives.

    Raises
    ------
    ValueError
        If ``p`` is no probability or ``width`` is not positive.
    """
    _check_drop(p, width)
    return 1 - p**width


def sdpi_dropconnect(p: float, n_out: int, n_in: int) -> float:
    """Contraction ``1 - p^(kd)`` of DropConnect on a ``k × d`` matrix: at least one weight survives.

    Raises
    ------
    ValueError
        If ``p`` is no probability or a width is not positive.
    """
    _check_drop(p, n_out, n_in)
    return 1 - p ** (n_out * n_in)


def sdpi_gaussian(noise: float, amplitude: float, width: int) -> float:
    """Contraction ``1 - 2Q(A sqrt(d)/ς)`` of Gaussian noise ``ς`` on ``width`` units in ``[-A, A]``.

    Raises
    ------
    ValueError
        If ``noise`` or ``amplitude`` is not positive, or ``width`` is smaller than 1.
    """
    if not noise > 0 or not amplitude > 0 or width < 1:
        raise ValueError(f"noise, amplitude and width must be positive, got {noise=}, {amplitude=}, {width=}")
    return math.erf(amplitude * math.sqrt(width / 2) / noise)  # 1 - 2Q(x) = erf(x/√2)


def dobrushin(kernel: Float[np.ndarray, "n_in n_out"]) -> float:
    """Dobrushin's coefficient of a channel: the largest total variation distance between two rows.

    Raises
    ------
    ValueError
        If the kernel is not row-stochastic.
    """
    kernel = np.asarray(kernel, dtype=float)
    if kernel.ndim != 2 or not (kernel >= 0).all() or not np.allclose(kernel.sum(1), 1):
        raise ValueError(f"kernel must be a matrix of probabilities whose rows sum to 1, got shape {kernel.shape}")
    return float(np.abs(kernel[:, None] - kernel).sum(-1).max() / 2)


def dropout_kernel(p: float, width: int) -> Float[np.ndarray, "3^width 3^width"]:
    """Channel of Dropout on units with values -1, 0, 1, states in the order of ``itertools.product((-1, 0, 1), ...)``.

    Raises
    ------
    ValueError
        If ``p`` is no probability or ``width`` is not positive.
    """
    _check_drop(p, width)
    unit = np.array([[1 - p, p, 0], [0, 1, 0], [0, p, 1 - p]])
    return reduce(np.kron, [unit] * width)


def dropconnect_kernel(weight: Float[np.ndarray, "k d"], p: float) -> Float[np.ndarray, "2^d n_out"]:
    """Channel ``x -> (M ∘ W) x`` with independent zeros in ``M``, for inputs ``product((-1, 1), repeat=d)``.

    Columns are the different outputs, in lexicographic order.

    Raises
    ------
    ValueError
        If ``weight`` is no matrix or ``p`` no probability.
    """
    if np.ndim(weight) != 2:
        raise ValueError(f"weight must be a matrix, got shape {np.shape(weight)}")
    k, d = weight.shape
    _check_drop(p, k, d)
    inputs, masks = (np.array([*product(values, repeat=m)]) for values, m in (((-1, 1), d), ((0, 1), k * d)))
    outputs = np.einsum("mkd,kd,xd->xmk", masks.reshape(-1, k, d), weight, inputs).round(12) + 0.0
    states, state = np.unique(outputs.reshape(-1, k), axis=0, return_inverse=True)
    kernel = np.zeros((len(inputs), len(states)))
    probability = np.where(masks, 1 - p, p).prod(1)
    np.add.at(kernel, (np.arange(len(inputs))[:, None], state.reshape(len(inputs), -1)), probability)
    return kernel


# --- finite parameter spaces and the Gibbs algorithm ------------------------------------------------------------------


def binary_network_losses(
    widths: Sequence[int], p_drop: float, inputs: Float[np.ndarray, "n_inputs d"]
) -> Float[np.ndarray, "n_params n_inputs"]:
    """Expected 0-1 loss, for the label +1, of every network with weights ±1, sign units and Dropout on hidden units.

    ``sign(0) = 0``, and an output of 0 costs 1/2, so that the loss for the label -1 is one minus this. All weights and
    all dropout masks are enumerated.

    Parameters
    ----------
    widths
        Widths from input to output, which has one unit.
    p_drop
        Probability with which each hidden unit is dropped.
    inputs
        Inputs, one a row.

    Raises
    ------
    ValueError
        If the widths do not fit, ``p_drop`` is no probability, or weights and hidden units exceed 20 bits in all.
    """
    _check_drop(p_drop, *widths)
    if len(widths) < 2 or widths[-1] != 1 or np.ndim(inputs) != 2 or inputs.shape[1] != widths[0]:
        raise ValueError(
            f"widths must lead from the columns of inputs to 1, got {list(widths)}, inputs of {np.shape(inputs)}"
        )
    sizes = [a * b for a, b in pairwise(widths)]
    if sum(sizes) + sum(widths[1:-1]) > 20:
        raise ValueError(f"widths {list(widths)} have more than 2^20 combinations of weights and masks")
    weights = np.split(np.array([*product((-1.0, 1.0), repeat=sum(sizes))]), np.cumsum(sizes)[:-1], axis=1)
    kept = np.array([*product((0, 1), repeat=sum(widths[1:-1]))])  # one row for each mask
    probability = np.where(kept, 1 - p_drop, p_drop).prod(1)
    masks = np.split(np.pad(kept, ((0, 0), (0, 1)), constant_values=1), np.cumsum(widths[1:-1]), axis=1)
    signal = np.asarray(inputs, dtype=float)[None, None]  # axes: weights, masks, inputs, units
    for (n_in, n_out), weight, mask in zip(pairwise(widths), weights, masks, strict=True):
        signal = np.sign(signal @ weight.reshape(-1, 1, n_out, n_in).swapaxes(-1, -2)) * mask[:, None]
    return np.einsum("m,wmx->wx", probability, (1 - signal[..., 0]) / 2)


class GibbsResult(NamedTuple):
    """Exact information measures of a Gibbs algorithm, in nats, and its errors."""

    gen: float  # expected population risk minus expected training loss
    mutual_information: float  # I(W; D)
    lautum: float  # D(P_W P_D ‖ P_{W,D})
    individual_mi: float  # I(Z_1; W)
    label_mi: float  # I(Y_1; W)
    risk: float  # expected population risk


def _mutual_information(joint: Float[np.ndarray, "a b"]) -> float:
    """Mutual information of the two indices of a joint distribution."""
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    return float((xlogy(joint, joint) - xlogy(joint, independent)).sum())


def gibbs_exact(
    losses: Float[np.ndarray, "n_params n_inputs"], p_z: Float[np.ndarray, "n_inputs 2"], n: int, alpha: float
) -> GibbsResult:
    """The Gibbs algorithm ``P(w|D) ∝ exp(-α L_D(w))`` with a uniform prior, exactly: a sum over all multisets of data.

    Parameters
    ----------
    losses
        Loss of every parameter vector for every input with label +1; for the label -1 it is one minus this.
    p_z
        Joint probability of input and label; label +1 in the first column.
    n
        Number of samples.
    alpha
        Inverse temperature ``α``; infinity would be empirical risk minimisation.

    Raises
    ------
    ValueError
        If ``p_z`` is no distribution over the inputs of ``losses``, a loss lies outside [0, 1], ``n`` is smaller than 1
        or ``alpha`` is not positive.

    Notes
    -----
    Source: the paper's section on the Gibbs algorithm; ``gen = (I(W;D) + L(W;D))/α`` holds exactly.
    """
    if p_z.shape != (losses.shape[1], 2) or not (p_z >= 0).all() or not np.isclose(p_z.sum(), 1):
        raise ValueError(f"p_z must be a distribution of shape {(losses.shape[1], 2)}, got {p_z.shape}, {p_z.sum()=}")
    if not ((losses >= 0) & (losses <= 1)).all():
        raise ValueError(f"losses must lie in [0, 1], got values from {losses.min()} to {losses.max()}")
    if n < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"n must be at least 1 and alpha positive and finite, got {n=} and {alpha=}")
    # parameter vectors with the same losses are one: the posterior cannot tell them apart
    rows, count = np.unique(losses.round(12), axis=0, return_counts=True)
    loss, p = np.hstack([rows, 1 - rows]), p_z.T.ravel()
    members = np.array([*combinations_with_replacement(range(len(p)), n)])
    counts = (members[:, :, None] == np.arange(len(p))).sum(1)
    p_data = np.exp(gammaln(n + 1) - gammaln(counts + 1).sum(1) + xlogy(counts, p).sum(1))
    train = counts @ loss.T / n
    log_posterior = np.log(count / count.sum()) - alpha * train
    log_posterior -= logsumexp(log_posterior, axis=1, keepdims=True)
    joint = p_data[:, None] * np.exp(log_posterior)
    p_w = joint.sum(0)
    one = counts.T @ joint / n  # law of (Z_1, W)
    return GibbsResult(
        gen=float((joint * (loss @ p - train)).sum()),
        mutual_information=float((joint * (log_posterior - np.log(p_w))).sum()),
        lautum=float((p_data[:, None] * p_w * (np.log(p_w) - log_posterior)).sum()),
        individual_mi=_mutual_information(one),
        label_mi=_mutual_information(one.reshape(2, -1, len(p_w)).sum(1)),
        risk=float(p_w @ (loss @ p)),
    )


# --- real networks ----------------------------------------------------------------------------------------------------


def representations(
    weights: Weights, x: Float[Tensor, "*batch n d"], p_drop: float = 0.0, generator: torch.Generator | None = None
) -> list[Float[Tensor, "*batch n units"]]:
    """Layers ``T_0, ..., T_L`` of a ReLU network without biases; the last one is linear.

    Parameters
    ----------
    weights
        One matrix for each layer.
    x
        Inputs.
    p_drop, generator
        Probability with which a hidden unit is dropped, and the source of the masks; kept units are scaled by
        ``1/(1 - p_drop)``.

    Raises
    ------
    ValueError
        If ``p_drop`` does not lie in [0, 1), or units are to be dropped without a generator.
    """
    if not 0 <= p_drop < 1 or (p_drop > 0 and generator is None):
        raise ValueError(f"p_drop must lie in [0, 1) and needs a generator unless 0, got {p_drop=} and {generator=}")
    layers = [x]
    for weight in weights[:-1]:
        layer = torch.relu(layers[-1] @ weight.mT)
        if p_drop:
            kept = torch.rand(layer.shape, generator=generator, device=layer.device) >= p_drop
            layer = layer * kept / (1 - p_drop)
        layers.append(layer)
    return [*layers, layers[-1] @ weights[-1].mT]


def sliced_wasserstein(
    a: Float[Tensor, "*batch n units"], b: Float[Tensor, "*batch n units"], slices: int, generator: torch.Generator
) -> Float[Tensor, "*batch"]:
    """Mean 1-Wasserstein distance of two samples of one size along random directions, times ``sqrt(units)``.

    The factor makes layers of different width comparable: a shift of length ``δ`` counts about ``0.8 δ`` in any width.

    Raises
    ------
    ValueError
        If the samples differ in shape or ``slices`` is not positive.
    """
    if a.shape != b.shape or slices < 1:
        raise ValueError(f"a and b must have one shape and slices be positive, got {a.shape}, {b.shape}, {slices=}")
    directions = torch.randn(a.shape[-1], slices, generator=generator, dtype=a.dtype, device=generator.device)
    directions = torch.nn.functional.normalize(directions, dim=0).to(a.device)
    gaps = (a @ directions).sort(-2).values - (b @ directions).sort(-2).values
    return gaps.abs().mean((-2, -1)) * a.shape[-1] ** 0.5
