"""Neural collapse in deep linear networks: the unconstrained features model and the geometry of its minimisers.

Source: Dang, Tran, Osher, Tran-The, Ho and Nguyen, "Neural Collapse in Deep Linear Networks: From Balanced to
Imbalanced Data", ICML 2023, arXiv 2301.00437. Metrics and loss follow the authors' code.

Shapes: K classes, n_k samples of class k, N samples in all, M linear layers; features are columns. Leading axes
(``*seeds``) hold independent runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, minimize, minimize_scalar
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from companion import models, training


def class_strength(beta: float, depth: int) -> float:
    r"""How strongly a class is learned: the minimiser :math:`x \ge 0` of :math:`g(x) = 1/(1+x^M) + \beta x`.

    The class vanishes (0 is returned) when regularisation costs more than the class is worth.

    Parameters
    ----------
    beta
        Price of strength, :math:`\beta_k = M N (N\Lambda\lambda_H)^{1/M} / n_k`; positive.
    depth
        Number M of linear layers.

    Raises
    ------
    ValueError
        If ``beta`` is not positive and finite or ``depth`` is smaller than 1.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1 linear layer, got {depth}")
    if depth == 1:
        return max(beta**-0.5 - 1, 0.0)
    # Beyond this price g(x) > g(0) for every x > 0: a root of g' may exist, but only as a local minimum.
    if beta >= (depth - 1) ** ((depth - 1) / depth) / depth:
        return 0.0

    def slope(x: float) -> float:
        return beta - depth * x ** (depth - 1) / (1 + x**depth) ** 2

    # g' falls until x = peak and rises from there, so the largest root, which is the minimum, lies beyond the peak.
    peak = ((depth - 1) / (depth + 1)) ** (1 / depth)
    far = peak + 1.0
    while slope(far) < 0:
        far *= 2
    return brentq(slope, peak, far, xtol=1e-14)


class Geometry(NamedTuple):
    """What :func:`gof_geometry` predicts, one entry per class."""

    row_sq: NDArray[np.float64]  # squared length of the row w_k of W = W_M ... W_1
    mean_norm: NDArray[np.float64]  # length of the class mean h_k
    logit: NDArray[np.float64]  # w_k . h_k
    loss: float  # the smallest value of the objective


def _check_decays(weight_decays: Sequence[float], feature_decay: float) -> None:
    if not weight_decays or not all(0 < decay < math.inf for decay in [*weight_decays, feature_decay]):
        raise ValueError(
            "weight_decays (one per linear layer) and feature_decay must be positive, "
            f"got {list(weight_decays)} and {feature_decay}"
        )


def _strengths(
    class_sizes: Sequence[int], weight_decays: Sequence[float], feature_decay: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each class the minimiser x_k of its scalar problem and the minimum g_k(x_k)."""
    if len(class_sizes) < 2 or min(class_sizes) < 1:
        raise ValueError(f"class_sizes must hold at least two positive numbers of samples, got {list(class_sizes)}")
    _check_decays(weight_decays, feature_decay)
    M, N = len(weight_decays), sum(class_sizes)
    beta = M * N * (N * math.prod(weight_decays) * feature_decay) ** (1 / M) / np.array(class_sizes)
    x = np.array([class_strength(price, M) for price in beta])
    return x, 1 / (1 + x**M) + beta * x


def gof_geometry(class_sizes: Sequence[int], weight_decays: Sequence[float], feature_decay: float) -> Geometry:
    r"""The general orthogonal frame: geometry of the global minimisers for MSE without bias, all widths at least K.

    Class means and classifier rows are orthogonal, :math:`WW^\top = \mathrm{diag}(\omega_k^2)` with
    :math:`\omega_k^2 = N\lambda_H x_k^M`, and :math:`w_k = (\omega_k^2 + N\lambda_H) h_k`.

    Parameters
    ----------
    class_sizes
        Samples :math:`n_k` of each class; equal sizes give the orthogonal frame of balanced data.
    weight_decays
        Decay :math:`\lambda_m` of each linear layer; their number is the depth M.
    feature_decay
        Decay :math:`\lambda_H` of the features.

    Raises
    ------
    ValueError
        If there are fewer than two classes, or a size or decay is not positive.
    """
    x, minimum = _strengths(class_sizes, weight_decays, feature_decay)
    N = sum(class_sizes)
    row_sq = N * feature_decay * x ** len(weight_decays)
    total = row_sq + N * feature_decay
    return Geometry(row_sq, np.sqrt(row_sq) / total, row_sq / total, float(np.dot(class_sizes, minimum)) / (2 * N))


def gof_targets(
    class_sizes: Sequence[int], weight_decays: Sequence[float], feature_decay: float
) -> tuple[Float[Tensor, "K K"], Float[Tensor, "K K"], Float[Tensor, "K K"]]:
    r"""The matrices :math:`WW^\top`, :math:`\bar H^\top\bar H` and :math:`W\bar H` of :func:`gof_geometry`."""
    geometry = gof_geometry(class_sizes, weight_decays, feature_decay)
    w, h, wh = (torch.diag(torch.from_numpy(v)) for v in (geometry.row_sq, geometry.mean_norm**2, geometry.logit))
    return w, h, wh


def logit_scale(
    pattern: Float[Tensor, "K K"], n_per_class: int, weight_decays: Sequence[float], feature_decay: float
) -> tuple[float, float]:
    r"""Best scale t and loss of balanced cross entropy among collapsed solutions with logits t × ``pattern``.

    The cheapest factorisation of :math:`WH_1` with singular values :math:`\sigma_i` costs
    :math:`\frac{M+1}{2} (\Lambda\lambda_H)^{1/(M+1)} \sum_i \sigma_i^{2/(M+1)}`, a Schatten quasi-norm.

    Parameters
    ----------
    pattern
        Logits of the K class means up to scale: entry (j, k) is the logit of class j for a sample of class k.
    n_per_class, weight_decays, feature_decay
        Samples of each class, decay of each linear layer, and decay of the features.

    Raises
    ------
    ValueError
        If ``pattern`` is not square, not finite or the same for every class, or a number is not positive.
    """
    if pattern.ndim != 2 or pattern.shape[0] != pattern.shape[1] or not pattern.isfinite().all():
        raise ValueError(f"pattern must be a finite square matrix, got shape {tuple(pattern.shape)}")
    if n_per_class < 1:
        raise ValueError(f"n_per_class must be positive, got {n_per_class}")
    _check_decays(weight_decays, feature_decay)
    logits, depth = pattern.double().numpy(), len(weight_decays)
    margins = logits - np.diag(logits)  # of every class against the true one, per column
    if not margins.any():
        raise ValueError("pattern must tell the classes apart, got the same logits for every class")
    p = 2 / (depth + 1)
    price = (math.prod(weight_decays) * feature_decay) ** (p / 2) / p
    sigma = np.linalg.svd(logits, compute_uv=False) * n_per_class**0.5
    sigma = sigma[sigma > 1e-9 * sigma[0]]  # a power below 1 would turn rounding noise into cost

    def loss(t: ArrayLike) -> NDArray[np.float64]:
        t = np.asarray(t)[..., None]
        entropy = np.logaddexp.reduce(t[..., None] * margins, axis=-2).mean(-1)
        return entropy + price * ((t * sigma) ** p).sum(-1)

    # For M > 1 the cost rises with infinite slope at t = 0, a local minimum: a grid finds the way to the other one.
    grid = np.linspace(0, 100, 1001) / np.abs(margins).max()
    best = grid[loss(grid).argmin()]
    bounds = max(best - grid[1], 0), best + grid[1]
    t = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-10 * best + 1e-300}).x
    return float(t), float(loss(t))


def simplex_etf(n_classes: int) -> Float[Tensor, "K K"]:
    r"""The Gram matrix of a simplex equiangular tight frame up to scale, :math:`I - \frac1K 11^\top`.

    Raises
    ------
    ValueError
        If there are fewer than two classes.
    """
    if n_classes < 2:
        raise ValueError(f"n_classes must be at least 2, got {n_classes}")
    return torch.eye(n_classes, dtype=torch.float64) - 1 / n_classes


def etf_scale(
    n_classes: int, n_per_class: int, weight_decays: Sequence[float], feature_decay: float, loss: str
) -> tuple[float, float]:
    r"""Scale and loss of the simplex ETF on balanced data with a free last-layer bias.

    Parameters
    ----------
    n_classes, n_per_class
        K classes with n samples each.
    weight_decays, feature_decay
        Decay of each linear layer, and of the features.
    loss
        ``"mse"``: the scale is :math:`\omega^2` in :math:`WW^\top = \omega^2 (I - 11^\top/K)`.
        ``"ce"``: it is t in :math:`W\bar H = t (I - 11^\top/K)`.

    Raises
    ------
    ValueError
        If a number is not positive or ``loss`` is unknown.
    """
    frame = simplex_etf(n_classes)
    if loss == "ce":
        return logit_scale(frame, n_per_class, weight_decays, feature_decay)
    if loss != "mse":
        raise ValueError(f"loss must be 'mse' or 'ce', got {loss!r}")
    orthogonal = gof_geometry([n_per_class] * n_classes, weight_decays, feature_decay)
    # The bias takes over the direction of all-ones, and the other K - 1 keep their scalar problem.
    return float(orthogonal.row_sq[0]), orthogonal.loss * (n_classes - 1) / n_classes


def weight_product(weights: Sequence[Float[Tensor, "*seeds out in"]]) -> Float[Tensor, "*seeds K d"]:
    r"""The product :math:`W = W_M \cdots W_1` of ``weights`` = :math:`(W_1, \dots, W_M)`."""
    return functools.reduce(lambda product, layer: layer @ product, weights)


def regularised_loss(
    weights: Sequence[Float[Tensor, "*seeds out in"]],
    features: Float[Tensor, "*seeds d N"],
    labels: Int[Tensor, " N"],
    weight_decays: Sequence[float],
    feature_decay: float,
    loss: str,
    bias: Float[Tensor, "*seeds K 1"] | None = None,
    bias_decay: float = 0.0,
) -> Float[Tensor, "*seeds"]:
    r"""The paper's objective for every seed, whether the features are free or come out of a network.

    .. math:: \tfrac1N \ell(WH_1 + b1^\top, Y) + \sum_m \tfrac{\lambda_m}2 \|W_m\|_F^2
              + \tfrac{\lambda_H}2 \|H_1\|_F^2 + \tfrac{\lambda_b}2 \|b\|^2

    where :math:`\ell` is half the squared error (``"mse"``) or the sum of cross entropies (``"ce"``).

    Raises
    ------
    ValueError
        If ``loss`` is unknown, or ``weight_decays`` has not one entry per layer.
    """
    if len(weights) != len(weight_decays):
        raise ValueError(f"weight_decays must have {len(weights)} entries, one per layer, got {len(weight_decays)}")
    logits = weight_product(weights) @ features
    penalty = feature_decay * features.square().sum((-2, -1))
    penalty = penalty + sum(decay * W.square().sum((-2, -1)) for W, decay in zip(weights, weight_decays, strict=True))
    if bias is not None:
        logits, penalty = logits + bias, penalty + bias_decay * bias.square().sum((-2, -1))
    if loss == "mse":
        fit = (logits - torch.nn.functional.one_hot(labels).mT).square().sum((-2, -1)) / 2
    elif loss == "ce":
        fit = (logits.logsumexp(-2) - logits[..., labels, torch.arange(len(labels))]).sum(-1)
    else:
        raise ValueError(f"loss must be 'mse' or 'ce', got {loss!r}")
    return fit / len(labels) + penalty / 2


class DeepLinearUFM:
    """The unconstrained features model: features ``H`` as free as the M linear layers ``W``; one run per seed.

    Parameters
    ----------
    class_sizes
        Samples n_k of each class; samples are ordered class after class (``labels``).
    widths
        Input width d_1, ..., d_M of each linear layer; the last one has K outputs.
    weight_decays, feature_decay
        Decay of each linear layer, and of the features.
    generator
        Source of the initial weights and features, normal with standard deviation ``std``.
    n_seeds
        Number of independent runs, the first axis of every parameter.
    std
        Too small a start falls into the local minimum at zero when M > 1.
    bias, bias_decay
        Whether the last layer has a bias ``b`` (starting at zero), and its decay.

    Raises
    ------
    ValueError
        If a size, width, decay or ``std`` is not positive, ``bias_decay`` is negative, or ``widths`` and
        ``weight_decays`` differ in number.
    """

    def __init__(
        self,
        class_sizes: Sequence[int],
        widths: Sequence[int],
        weight_decays: Sequence[float],
        feature_decay: float,
        *,
        generator: torch.Generator,
        n_seeds: int = 1,
        std: float = 0.15,
        bias: bool = False,
        bias_decay: float = 0.0,
    ) -> None:
        _strengths(class_sizes, weight_decays, feature_decay)  # checks these three
        if len(widths) != len(weight_decays) or min(widths) < 1:
            raise ValueError(
                f"widths must hold one positive width per layer, got {list(widths)} for {len(weight_decays)} decays"
            )
        if n_seeds < 1 or not std > 0 or not bias_decay >= 0:
            raise ValueError(
                f"n_seeds and std must be positive and bias_decay not negative, got {n_seeds=}, {std=}, {bias_decay=}"
            )

        def normal(rows: int, columns: int) -> Tensor:
            entries = torch.randn(n_seeds, rows, columns, generator=generator, dtype=torch.float64)
            return (std * entries).requires_grad_()

        K = len(class_sizes)
        self.W = [normal(n_out, n_in) for n_in, n_out in zip(widths, [*widths[1:], K], strict=True)]
        self.H = normal(widths[0], sum(class_sizes))
        self.b = torch.zeros(n_seeds, K, 1, dtype=torch.float64, requires_grad=True) if bias else None
        self.labels = torch.arange(K).repeat_interleave(torch.tensor(class_sizes))
        self.weight_decays, self.feature_decay, self.bias_decay = list(weight_decays), feature_decay, bias_decay

    @property
    def parameters(self) -> list[Tensor]:
        """All that is trained: W_1, ..., W_M, H and, if there is one, b."""
        return [*self.W, self.H] + ([] if self.b is None else [self.b])

    def objective(self, loss: str) -> Float[Tensor, " seeds"]:
        """The regularised loss of every seed; ``loss`` is ``"mse"`` or ``"ce"``."""
        decays = self.weight_decays, self.feature_decay
        return regularised_loss(self.W, self.H, self.labels, *decays, loss, self.b, self.bias_decay)

    def fit(self, loss: str, max_iter: int = 3000) -> tuple[Float[Tensor, " seeds"], float]:
        """Minimise to machine precision by L-BFGS; return the loss of every seed and the largest gradient entry.

        The seeds do not interact, so the sum of their losses is minimised as one problem.
        """

        def value_and_gradient(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            vector_to_parameters(torch.from_numpy(point), self.parameters)
            total = self.objective(loss).sum()
            return total.item(), parameters_to_vector(torch.autograd.grad(total, self.parameters)).numpy()

        start = parameters_to_vector(self.parameters).detach().numpy()
        options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "ftol": 0, "gtol": 1e-11}
        found = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
        vector_to_parameters(torch.from_numpy(found.x), self.parameters)
        return self.objective(loss).detach(), float(np.abs(found.jac).max())

    def descend(
        self, targets: Sequence[Float[Tensor, "K K"]], *, steps: int, lr: float, record_every: int
    ) -> training.History:
        """Minimise the MSE objective by gradient descent with Nesterov momentum 0.9, and watch the collapse.

        Parameters
        ----------
        targets
            What :func:`collapse_metrics` compares with: predicted W Wᵀ, H̄ᵀ H̄ and W H̄.
        steps, lr, record_every
            Number of steps, learning rate (a bias needs less than 3.8), and steps between two measurements.
        """
        return training.fit(
            lambda step: self.objective("mse"),
            self.parameters,
            steps=steps,
            lr=lr,
            optimizer=functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
            record=lambda: collapse_metrics(weight_product(self.W), self.H, self.labels, *targets),
            record_every=record_every,
        )


def class_means(
    features: Float[Tensor, "*seeds d N"], labels: Int[Tensor, " N"], n_classes: int
) -> Float[Tensor, "*seeds d K"]:
    r"""The class means :math:`\bar H = [h_1, \dots, h_K]`, as columns.

    Raises
    ------
    ValueError
        If ``labels`` does not name every class, or does not fit ``features`` or ``n_classes``.
    """
    if labels.shape != features.shape[-1:]:
        raise ValueError(f"labels must have shape {tuple(features.shape[-1:])} as features, got {tuple(labels.shape)}")
    counts = torch.bincount(labels, minlength=n_classes)
    if len(counts) != n_classes or counts.min() == 0:
        raise ValueError(f"labels must hold every class from 0 to {n_classes - 1}, got the counts {counts.tolist()}")
    return features @ torch.nn.functional.one_hot(labels).to(features) / counts


def shape_distance(matrix: Float[Tensor, "*seeds K K"], target: Float[Tensor, "K K"]) -> Float[Tensor, "*seeds"]:
    """Frobenius distance of two matrices after each is scaled to norm 1 (the form of NC2 and NC3)."""
    norm = torch.linalg.matrix_norm
    return norm(matrix / norm(matrix, keepdim=True) - target / norm(target, keepdim=True))


def collapse_metrics(
    weights: Float[Tensor, "*seeds K d"],
    features: Float[Tensor, "*seeds d N"],
    labels: Int[Tensor, " N"],
    target_w: Float[Tensor, "K K"],
    target_h: Float[Tensor, "K K"],
    target_wh: Float[Tensor, "K K"],
) -> dict[str, Float[Tensor, "*seeds"]]:
    r"""How far features and classifier are from collapse; 0 is perfect.

    Parameters
    ----------
    weights
        The product :math:`W = W_M \cdots W_1`.
    features, labels
        Features :math:`H_1` of all samples, and their classes.
    target_w, target_h, target_wh
        Predicted :math:`WW^\top`, :math:`\bar H^\top\bar H` and :math:`W\bar H`, each up to scale.

    Returns
    -------
    dict
        ``"nc1"``: :math:`\frac1K \mathrm{tr}(\Sigma_W\Sigma_B^\dagger)`, within-class over between-class covariance
        (the latter of the class means around the mean of all samples);
        ``"nc2_w"``, ``"nc2_h"``, ``"nc3"``: distance in shape to the three targets.

    Raises
    ------
    ValueError
        If a class has no sample, shapes do not fit, or ``features`` holds NaN or infinity.
    """
    weights, features = weights.detach().double(), features.detach().double()
    if not features.isfinite().all():
        raise ValueError("features holds NaN or infinite values; did the training diverge?")
    K = weights.shape[-2]
    means = class_means(features, labels, K)
    within = features - means[..., labels]
    between = means - features.mean(-1, keepdim=True)
    sigma_w, sigma_b = within @ within.mT / len(labels), between @ between.mT / K
    # Between classes the rank is K at most; the default cut of pinv would turn rounding noise into NC1 of order 1.
    nc1 = (sigma_w * torch.linalg.pinv(sigma_b, rtol=1e-8, hermitian=True)).sum((-2, -1)) / K
    return {
        "nc1": nc1,
        "nc2_w": shape_distance(weights @ weights.mT, target_w),
        "nc2_h": shape_distance(means.mT @ means, target_h),
        "nc3": shape_distance(weights @ means, target_wh),
    }


def first_of_each(
    x: Float[Tensor, "n *shape"], labels: Int[Tensor, " n"], class_sizes: Sequence[int]
) -> tuple[Float[Tensor, "N *shape"], Int[Tensor, " N"]]:
    """The first n_k samples of each class k, class after class, and their labels.

    Raises
    ------
    ValueError
        If a class has fewer samples than asked for.
    """
    rows = []
    for label, size in enumerate(class_sizes):
        found = (labels == label).nonzero().flatten()
        if not 1 <= size <= len(found):
            raise ValueError(f"class_sizes must be between 1 and {len(found)} for class {label}, got {size}")
        rows.append(found[:size])
    return x[torch.cat(rows)], labels[torch.cat(rows)]


class Trained(NamedTuple):
    """What :func:`train_network` returns, with a first axis over seeds."""

    W: Float[Tensor, "seeds K d"]  # the product of the linear layers
    H: Float[Tensor, "seeds d N"]  # the features that the backbone computes
    history: training.History  # loss and collapse metrics over training


def train_network(
    make_backbone: Callable[..., nn.Module],
    x: Float[Tensor, "N *shape"],
    labels: Int[Tensor, " N"],
    depth: int,
    decay: float,
    *,
    seeds: Sequence[int],
    steps: int,
    lr: float,
    record_every: int,
) -> Trained:
    """Train a network whose features are no longer free: a backbone computes them, M linear layers read them (MSE).

    Decay acts on the linear layers and on the features, as in the model, not on the backbone. Full-batch Adam whose
    learning rate falls along half a cosine to 1%; all seeds at once.

    Parameters
    ----------
    make_backbone
        Makes the network that maps ``x`` to features (N, d); called with ``generator=``.
    x, labels
        Inputs and classes.
    depth, decay
        Number of linear layers, and the decay of each of them and of the features.
    seeds, steps, lr, record_every
        One network per seed; number of steps, learning rate, and steps between two measurements.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    backbone = training.Ensemble([make_backbone(generator=generator).to(x.device) for generator in generators])
    n_classes, d = int(labels.max()) + 1, backbone(x[:1]).shape[-1]
    heads = [models.mlp([d] * depth + [n_classes], generator=g, activation=None, bias=False) for g in generators]
    head = training.Ensemble([linear.to(x.device) for linear in heads])
    W = list(head.parameters.values())
    sizes = torch.bincount(labels).tolist()
    targets = [target.to(x.device) for target in gof_targets(sizes, [decay] * depth, decay)]

    def features() -> Tensor:
        return backbone(x).mT

    history = training.fit(
        lambda step: regularised_loss(W, features(), labels, [decay] * depth, decay, "mse"),
        [*backbone.parameters.values(), *W],
        steps=steps,
        lr=lr,
        cosine_to=0.01,
        record=lambda: collapse_metrics(weight_product(W), features(), labels, *targets),
        record_every=record_every,
    )
    with torch.no_grad():
        return Trained(weight_product(W).cpu(), features().cpu(), {key: value.cpu() for key, value in history.items()})
