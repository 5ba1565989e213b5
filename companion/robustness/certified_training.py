"""Interval bound propagation (IBP): how tight its boxes are, how to train with them, and what an exact verifier says.

Mao, Müller, Fischer and Vechev, "Understanding Certified Training with Interval Bound Propagation", ICLR 2024
(arXiv 2306.10426). Definitions that the abstract leaves open follow the released code
(github.com/eth-sri/ibp-propagation-tightness).

A box is a centre ``μ`` and a radius ``r``, entry by entry. The tightness of a network is the radius of the smallest box
around its true outputs over the radius of the box that IBP computes. Images live in [0, 1], and so do their boxes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial, reduce
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.special import gammaln
from torch import Tensor, nn
from torch.nn import functional as F

from companion import attacks, training

METHODS = ("standard", "pgd", "ibp", "sabr")
_LAYERS = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.Flatten, nn.ReLU)


def dln_tightness(
    weights: Sequence[Float[Tensor, "*batch n_out n_in"]], eps: float | Float[Tensor, " d0"] = 1.0
) -> tuple[Float[Tensor, "*batch dL"], Float[Tensor, "*batch dL"], Float[Tensor, "*batch dL"]]:
    """Tightness of a deep linear network: exact radius ``|W_L ... W_1| ε`` over IBP radius ``|W_L| ... |W_1| ε``.

    Parameters
    ----------
    weights
        The matrices, input side first; batch axes hold networks side by side.
    eps
        Radius of the input box, one for all inputs or one each.

    Returns
    -------
    tau, exact, ibp
        Tightness (1 where the IBP radius is 0) and the two radii, for every output.

    Raises
    ------
    ValueError
        If there is no matrix, the matrices do not chain, or ``eps`` is negative, zero everywhere or of another size.

    Source: the paper's definition of propagation tightness.
    """
    if not weights:
        raise ValueError("weights is empty; a network needs at least one matrix")
    shapes = [tuple(weight.shape) for weight in weights]
    if min(map(len, shapes)) < 2 or any(a[-2] != b[-1] for a, b in pairwise(shapes)):
        raise ValueError(f"weights must be matrices that chain, input side first, got shapes {shapes}")
    radius = torch.as_tensor(eps, dtype=weights[0].dtype, device=weights[0].device)
    if radius.ndim > 1 or (radius.ndim == 1 and len(radius) != shapes[0][-1]):
        raise ValueError(f"eps must be a number or hold {shapes[0][-1]} of them, got shape {tuple(radius.shape)}")
    if not (radius >= 0).all() or not radius.isfinite().all() or not radius.any():
        raise ValueError(f"eps must be finite, not negative and not zero everywhere, got {radius.tolist()}")
    radius = radius.expand(shapes[0][-1])
    exact = reduce(lambda product, weight: weight @ product, weights).abs() @ radius
    ibp = reduce(lambda product, weight: weight.abs() @ product, weights[1:], weights[0].abs()) @ radius
    return torch.where(ibp > 0, exact / ibp, 1.0), exact, ibp


def expected_tightness(widths: Sequence[int]) -> float:
    r"""Mean exact radius over mean IBP radius of a deep linear network with independent centred Gaussian weights.

    The product over inner widths of :math:`\tau_2(d) = \sqrt\pi\,\Gamma(\frac{d+1}2) / (d\,\Gamma(\frac d2))`.

    Parameters
    ----------
    widths
        The inner widths ``d_1, ..., d_(L-1)``; input and output dimensions and variances play no part.

    Raises
    ------
    ValueError
        If a width is smaller than 1.

    Source: the paper's theorems on width and depth at initialisation; the product is derived in the notebook.
    """
    if any(d < 1 for d in widths):
        raise ValueError(f"widths must be at least 1, got {list(widths)}")
    return math.prod(math.sqrt(math.pi) / d * math.exp(gammaln((d + 1) / 2) - gammaln(d / 2)) for d in widths)


def is_propagation_invariant(weights: Sequence[Float[Tensor, "n_out n_in"]], tol: float = 1e-9) -> bool:
    """Whether IBP is exact for every box, up to a relative error ``tol``.

    Equal radii for ``ε = 1`` suffice: the difference ``|W_L|...|W_1| - |W_L...W_1|`` has no negative entry, so all of
    them vanish when they sum to zero.

    Raises
    ------
    ValueError
        As :func:`dln_tightness`, and for a negative ``tol``.

    Source: the paper's theorem on propagation invariance.
    """
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    return bool((dln_tightness(weights)[0] >= 1 - tol).all())


def _check_network(net: nn.Sequential) -> None:
    if not isinstance(net, nn.Sequential) or not len(net) or not isinstance(net[-1], nn.Linear):
        raise TypeError(f"net must be a Sequential that ends with a Linear layer, got {net!r}")
    for layer in net:
        if not isinstance(layer, _LAYERS):
            raise TypeError(f"net must consist of {', '.join(kind.__name__ for kind in _LAYERS)}, got {layer!r}")


def _affine(
    layer: nn.Module, centre: Float[Tensor, "n *features"], radius: Float[Tensor, "n *features"]
) -> tuple[Tensor, Tensor]:
    """A box through any layer but ReLU: ``μ → W μ + b`` and ``r → |W| r``."""
    if isinstance(layer, nn.Linear):
        return layer(centre), F.linear(radius, layer.weight.abs())
    if isinstance(layer, nn.Conv2d):
        options = layer.stride, layer.padding, layer.dilation, layer.groups
        return layer(centre), F.conv2d(radius, layer.weight.abs(), None, *options)
    if isinstance(layer, nn.BatchNorm2d):  # while training, with the statistics of the centres
        variance = centre.var((0, 2, 3), unbiased=False) if layer.training else layer.running_var
        scale = layer.weight.abs() * (variance + layer.eps).rsqrt()
        return layer(centre), radius * scale[:, None, None]
    return layer(centre), layer(radius)  # Flatten


def _margins(
    last: nn.Linear, centre: Float[Tensor, "n d"], radius: Float[Tensor, "n d"], y: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n classes"], Float[Tensor, "n classes"]]:
    """Centre and radius of ``f_j - f_y``. The last layer is elided: its rows become ``W_j - W_y`` before ``|·|``."""
    rows = (last.weight - last.weight[:, None]).abs()  # label, class, unit
    # One product for all labels, from which each sample takes its own, is faster than a matrix for each sample.
    radii = F.linear(radius, rows.flatten(0, 1)).unflatten(-1, rows.shape[:2])
    scores = last(centre)
    return scores - scores.gather(1, y[:, None]), radii[torch.arange(len(y), device=y.device), y]


def ibp_bounds(
    net: nn.Sequential,
    lower: Float[Tensor, "n *features"],
    upper: Float[Tensor, "n *features"],
    y: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "n classes"], Float[Tensor, "n classes"]]:
    """Bounds of the network's outputs on boxes, by interval bound propagation.

    Parameters
    ----------
    net
        Linear, Conv2d, BatchNorm2d, Flatten and ReLU layers in sequence; the last one is Linear.
    lower, upper
        The ends of the boxes.
    y
        Labels. With them the bounds are those of the margins ``f_j - f_y``, with the last layer elided.

    Raises
    ------
    TypeError
        If the network holds another layer.
    ValueError
        If ``lower`` exceeds ``upper`` somewhere, or shapes differ.

    Source: Gowal et al., "On the effectiveness of interval bound propagation", 2018.
    """
    _check_network(net)
    if lower.shape != upper.shape or not (lower <= upper).all():
        raise ValueError(
            "lower must not exceed upper and must have its shape, got shapes "
            f"{tuple(lower.shape)} and {tuple(upper.shape)} with values up to {lower.max():g} and {upper.max():g}"
        )
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    *body, last = net
    for layer in body:
        if isinstance(layer, nn.ReLU):
            lower, upper = (centre - radius).relu(), (centre + radius).relu()
            centre, radius = (lower + upper) / 2, (upper - lower) / 2
        else:
            centre, radius = _affine(layer, centre, radius)
    centre, radius = _affine(last, centre, radius) if y is None else _margins(last, centre, radius, y)
    return centre - radius, centre + radius


def box(
    x: Float[Tensor, "n *features"], eps: float, data_range: tuple[float, float] = (0.0, 1.0)
) -> tuple[Float[Tensor, "n *features"], Float[Tensor, "n *features"]]:
    """Lower and upper end of the part of the l-infinity ball of radius ``eps`` that lies in the data range.

    Raises
    ------
    ValueError
        If ``eps`` is negative or not finite.
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    return (x - eps).clamp(*data_range), (x + eps).clamp(*data_range)


def local_tightness(
    net: nn.Sequential,
    x: Float[Tensor, "n *features"],
    y: Int[Tensor, " n"],
    eps: float,
    data_range: tuple[float, float] = (0.0, 1.0),
) -> Float[Tensor, " n"]:
    """Tightness of the linear map that the network is around each input, averaged over the wrong classes.

    The activation pattern of ``x`` is kept fixed. Then the exact radius of a margin is its gradient's absolute value
    times the radius of the box, and the IBP radius passes through ``|W|`` and the same pattern.

    Parameters
    ----------
    net
        As for :func:`ibp_bounds`, in evaluation mode.
    x, y
        Inputs and labels.
    eps, data_range
        As for :func:`box`.

    Raises
    ------
    TypeError, ValueError
        As :func:`ibp_bounds` and :func:`box`.

    Source: the authors' code, ``PI_functions.py``.
    """
    _check_network(net)
    lower, upper = box(x, eps, data_range)
    radius = widths = (upper - lower) / 2
    x = point = x.detach().requires_grad_()
    *body, last = net
    for layer in body:
        if isinstance(layer, nn.ReLU):
            radius, point = radius * (point > 0), point.relu()
        else:
            point, radius = _affine(layer, point, radius)
    margins, ibp = _margins(last, point, radius, y)
    n, classes = margins.shape
    pick = torch.eye(classes, dtype=x.dtype, device=x.device)[:, None].expand(-1, n, -1)
    (gradient,) = torch.autograd.grad(margins, x, pick, is_grads_batched=True)  # class, sample, *features
    exact = (gradient.abs() * widths).flatten(2).sum(-1).mT
    tau = torch.where(ibp > 0, exact / ibp, 1.0).detach()
    wrong = F.one_hot(y, classes) == 0
    return tau[wrong].view(n, classes - 1).mean(1)


def _attack(
    net: nn.Sequential, x: Tensor, y: Tensor, eps: float, steps: int, generator: torch.Generator, loss: str
) -> Tensor:
    """PGD from a random start, against the network in evaluation mode."""
    mode = net.training
    net.eval()
    found = attacks.pgd(net, x, y, eps, steps=steps, loss=loss, bounds=(0.0, 1.0), generator=generator)
    net.train(mode)
    return found


def robust_loss(
    net: nn.Sequential,
    x: Float[Tensor, "n *features"],
    y: Int[Tensor, " n"],
    method: Literal["standard", "pgd", "ibp", "sabr"],
    eps: float,
    *,
    sabr_lambda: float = 0.4,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Cross-entropy of a batch in the worst case, as each method sees the worst case.

    ``"standard"``: none, the inputs as they are. ``"pgd"``: the worst point that an attack of 5 steps finds.
    ``"ibp"``: upper bounds of the margins on the whole ball, as logits. ``"sabr"``: the same on a small box, of radius
    ``λ ε``, around the worst point of the ball of radius ``(1-λ) ε``.

    Raises
    ------
    TypeError, ValueError
        For an unknown ``method``, ``sabr_lambda`` outside [0, 1], and as :func:`ibp_bounds` and :func:`box`.

    Source: Gowal et al. 2018 (IBP); Müller et al., "Certified training: small boxes are all you need", 2023 (SABR).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0 <= sabr_lambda <= 1:
        raise ValueError(f"sabr_lambda must lie in [0, 1], got {sabr_lambda}")
    if method == "standard":
        return F.cross_entropy(net(x), y)
    if method == "pgd":
        return F.cross_entropy(net(_attack(net, x, y, eps, 5, generator, "cross_entropy")), y)
    if method == "sabr":
        x = _attack(net, x, y, (1 - sabr_lambda) * eps, 5, generator, "cross_entropy")
        eps = sabr_lambda * eps
    return F.cross_entropy(ibp_bounds(net, *box(x, eps), y)[1], y)


def train(
    net: nn.Sequential,
    x: Float[Tensor, "n *features"],
    y: Int[Tensor, " n"],
    method: Literal["standard", "pgd", "ibp", "sabr"],
    eps: float,
    *,
    sabr_lambda: float = 0.4,
    epochs: int,
    lr: float = 5e-3,
    batch_size: int = 128,
    generator: torch.Generator,
) -> nn.Sequential:
    """A trained copy of the network, in evaluation mode.

    Adam; the learning rate falls along half a cosine to a tenth, and the radius grows linearly from 0 to ``eps`` during
    the first half of the steps.

    Parameters
    ----------
    net
        Initial network; not modified.
    x, y
        Training inputs in [0, 1] and labels.
    method, eps, sabr_lambda
        As for :func:`robust_loss`.
    epochs, lr, batch_size
        Passes over the data, initial learning rate, samples in a mini-batch.
    generator
        Source of mini-batches and of the attacks' starting points.

    Raises
    ------
    TypeError, ValueError
        As :func:`robust_loss`; also if ``x`` is not finite, or ``epochs`` is smaller than 1.
    """
    if not x.isfinite().all():
        raise ValueError("x holds NaN or infinite values; remove them first")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    net = copy.deepcopy(net).train()
    batches = training.minibatches(len(x), batch_size, generator)
    steps = epochs * (len(x) // batch_size)

    def loss(step: int) -> Tensor:
        rows = next(batches)
        radius = eps * min(1, 2 * step / steps)
        return robust_loss(net, x[rows], y[rows], method, radius, sabr_lambda=sabr_lambda, generator=generator)

    adam = partial(torch.optim.Adam, fused=True)
    training.fit(loss, net.parameters(), steps=steps, lr=lr, optimizer=adam, cosine_to=0.1, record_every=steps)
    return net.eval()


def evaluate(
    net: nn.Sequential, x: Float[Tensor, "n *features"], y: Int[Tensor, " n"], eps: float, generator: torch.Generator
) -> dict[str, float]:
    """Accuracies of a network, in evaluation mode, and its mean local tightness.

    ``standard``: of the inputs as they are. ``adversarial``: after an attack of 20 steps on the margin. ``certified``:
    the share of inputs for which IBP proves every margin ``f_j - f_y`` negative on the whole box. ``tightness``: of
    :func:`local_tightness`.

    Raises
    ------
    TypeError, ValueError
        As :func:`ibp_bounds` and :func:`box`.
    """
    rows = []
    for images, labels in zip(x.split(500), y.split(500), strict=True):  # a whole test set may not fit in memory
        with torch.no_grad():
            margins = ibp_bounds(net, *box(images, eps), labels)[1]
            certified = (margins < 0).sum(1) == margins.shape[1] - 1  # all but the margin of y with itself, which is 0
            standard = net(images).argmax(1) == labels
            adversarial = net(_attack(net, images, labels, eps, 20, generator, "margin")).argmax(1) == labels
        rows.append([standard, adversarial, certified, local_tightness(net, images, labels, eps)])
    names = ("standard", "adversarial", "certified", "tightness")
    return {
        name: float(torch.cat(parts).double().mean())
        for name, parts in zip(names, zip(*rows, strict=True), strict=True)
    }


def exact_margin(
    net: nn.Sequential,
    lower: Float[Tensor, " d"],
    upper: Float[Tensor, " d"],
    c: Float[Tensor, " classes"],
    time_limit: float = 5.0,
    rel_gap: float = 1e-6,
) -> tuple[float, float]:
    """The largest value of ``c · f(x')`` over a box, by mixed-integer linear programming (HiGHS).

    Variables are the input and the output of every hidden unit, and for each unit whose sign the box leaves open a
    binary ``a``: with bounds ``l < h < u`` of its input ``h``, the constraints ``z ≥ 0``, ``z ≥ h``, ``z ≤ u a`` and
    ``z ≤ h - l (1 - a)`` say ``z = max(h, 0)``. The bounds come from :func:`ibp_bounds`.

    Parameters
    ----------
    net
        Linear layers with a ReLU between any two of them.
    lower, upper
        The ends of one box.
    c
        Direction in the space of outputs; ``e_j - e_y`` for the margin of class j.
    time_limit
        Seconds after which the solver stops, whatever the gap between the two results.
    rel_gap
        The gap, relative to ``value``, at which it stops. Below 1 the sign of the maximum is settled.

    Returns
    -------
    value, upper_bound
        The best value found (``-inf`` if none) and a proved upper bound.

    Raises
    ------
    TypeError
        If the network is of another form.
    ValueError
        If ``c`` does not have one entry per output, ``time_limit`` or ``rel_gap`` is not positive, and as
        :func:`ibp_bounds`.

    Source: Tjeng, Xiao and Tedrake, "Evaluating robustness of neural networks with mixed integer programming", 2019.
    """
    linear, between = net[::2], net[1::2]
    if not all(isinstance(f, nn.Linear) for f in linear) or not all(isinstance(f, nn.ReLU) for f in between):
        raise TypeError(f"net must alternate Linear and ReLU layers, got {net!r}")
    if tuple(c.shape) != (linear[-1].out_features,):
        raise ValueError(f"c must have {linear[-1].out_features} entries, got shape {tuple(c.shape)}")
    if not time_limit > 0 or not rel_gap > 0:
        raise ValueError(f"time_limit and rel_gap must be positive, got {time_limit=} and {rel_gap=}")
    net = copy.deepcopy(net).double()
    layers = [
        (f.weight.detach().numpy(), np.zeros(f.out_features) if f.bias is None else f.bias.detach().numpy())
        for f in net[::2]
    ]
    with torch.no_grad():
        ends = [ibp_bounds(net[: 2 * k + 1], lower[None].double(), upper[None].double()) for k in range(len(layers))]
    # Variables: the input, the outputs z of the hidden layers, a binary for every open unit, and the constant 1, which
    # brings the bias of the last layer into the objective, so that the relative gap is that of the margin itself.
    first = np.cumsum([0, len(lower), *(len(bias) for _, bias in layers[:-1])])  # where each layer's variables begin
    n_real = first[-1]
    n = n_real + sum(int(((low < 0) & (up > 0)).sum()) for low, up in ends[:-1]) + 1
    lowest, highest = np.zeros(n), np.ones(n)
    lowest[: len(lower)], highest[: len(lower)], lowest[-1] = lower, upper, 1
    rows, smallest, largest = [], [], []

    def require(
        z: int, h: slice, weight: np.ndarray, low: float, high: float, a: int = -1, factor: float = 0.0
    ) -> None:
        """``low ≤ z - weight · z_before + factor a ≤ high``."""
        row = np.zeros(n)
        row[h], row[z], row[a] = -weight, 1, factor
        rows.append(row)
        smallest.append(low)
        largest.append(high)

    binary = n_real
    for k, (weight, bias) in enumerate(layers[:-1]):
        before = slice(first[k], first[k + 1])
        for z, w, b, low, up in zip(
            range(first[k + 1], first[k + 2]), weight, bias, *(end[0].tolist() for end in ends[k]), strict=True
        ):
            highest[z] = max(up, 0)  # a unit that is always off needs no more than this
            if low >= 0:
                require(z, before, w, b, b)
            elif up > 0:
                require(z, before, w, b, math.inf)
                require(z, before, w, -math.inf, b - low, binary, -low)
                require(z, before, 0 * w, -math.inf, 0, binary, -up)
                binary += 1
    weight, bias = layers[-1]
    direction = c.double().numpy()
    objective = np.zeros(n)
    objective[first[-2] : n_real], objective[-1] = -direction @ weight, -direction @ bias
    result = milp(
        objective,
        integrality=np.arange(n) >= n_real,
        bounds=Bounds(lowest, highest),
        constraints=LinearConstraint(np.array(rows), smallest, largest) if rows else None,
        # Presolving takes longer than it saves here, and HiGHS prints while it undoes it.
        options={"time_limit": time_limit, "mip_rel_gap": rel_gap, "presolve": False},
    )
    return (-math.inf if result.x is None else -result.fun), -result.mip_dual_bound


def cnn7(channels: int, side: int, width: int, n_classes: int, generator: torch.Generator) -> nn.Sequential:
    """The paper's CNN7 (``width`` 64): five 3x3 convolutions with batch normalisation and two linear layers.

    Weights are normal with standard deviation ``sqrt(2π) / fan_in``, which keeps the radii of IBP boxes of one size.

    Parameters
    ----------
    channels, side
        Channels, and height and width of the images.
    width
        Channels of the first two convolutions; the other three have twice as many, the hidden linear layer 8 times.
    n_classes, generator
        Number of outputs, and source of the weights.

    Raises
    ------
    ValueError
        If a size is smaller than 1.

    Source: Shi et al., "Fast certified robust training with short warmup", 2021.
    """
    if min(channels, side, width, n_classes) < 1:
        raise ValueError(f"sizes must be at least 1, got {channels=}, {side=}, {width=}, {n_classes=}")
    wide, half = 2 * width, (side + 1) // 2
    layers: list[nn.Module] = []
    for n_in, n_out, stride in [
        (channels, width, 1),
        (width, width, 1),
        (width, wide, 2),
        (wide, wide, 1),
        (wide, wide, 1),
    ]:
        convolution = nn.utils.skip_init(nn.Conv2d, n_in, n_out, 3, stride=stride, padding=1)
        layers += [convolution, nn.BatchNorm2d(n_out), nn.ReLU()]
    hidden = nn.utils.skip_init(nn.Linear, wide * half**2, 8 * width)
    net = nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU(), nn.utils.skip_init(nn.Linear, 8 * width, n_classes))
    for layer in net:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel(), generator=generator)
            nn.init.zeros_(layer.bias)
    return net
