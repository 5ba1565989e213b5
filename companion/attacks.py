"""White-box attacks within a ball around the input: FGSM, step least-likely and projected gradient descent.

Several inputs are attacked at once: ``x`` has the axes of ``y`` first (one, or networks and samples for an ensemble)
and then the axes of one input. No attack touches the network's gradients or its mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Network = Callable[[Float[Tensor, "*inputs"]], Float[Tensor, "*batch classes"]]
Box = tuple[float, float]


def _cross_entropy(logits: Float[Tensor, "*batch classes"], y: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    return functional.cross_entropy(logits.movedim(-1, 1) if logits.ndim > 2 else logits, y, reduction="none")


def _margin(logits: Float[Tensor, "*batch classes"], y: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The best wrong logit minus the right one; unlike cross-entropy it does not saturate in confident networks."""
    right = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, y[..., None], True)
    return logits.masked_fill(right, -torch.inf).amax(-1) - logits[right].reshape(y.shape)


LOSSES = {"cross_entropy": _cross_entropy, "margin": _margin}


def _gradient(net: Network, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    # The sum over inputs, not the mean: each input then sees its own gradient at full size, whatever the batch.
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(net(x), y).sum(), x)[0]


def _radius(eps: float | Tensor, x: Tensor, n_batch_axes: int) -> Tensor:
    """``eps``, one for all inputs or one each, with trailing axes that broadcast over an input's entries."""
    eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    if not bool((eps >= 0).all()) or not bool(eps.isfinite().all()):
        raise ValueError(f"eps must be finite and not negative, got {eps.tolist() if eps.ndim == 0 else eps.min()}")
    if eps.ndim == 0:
        return eps
    if eps.shape != x.shape[:n_batch_axes]:
        raise ValueError(
            f"eps must be a number or hold one per input, {tuple(x.shape[:n_batch_axes])}, got {eps.shape}"
        )
    return eps.reshape(*eps.shape, *[1] * (x.ndim - eps.ndim))


def _check(x: Tensor, y: Tensor, bounds: Box | None) -> None:
    if not 1 <= y.ndim < x.ndim or x.shape[: y.ndim] != y.shape:
        raise ValueError(f"x must start with the axes of y, got x {tuple(x.shape)} and y {tuple(y.shape)}")
    if bounds is not None and not (bounds[0] <= float(x.min()) and float(x.max()) <= bounds[1]):
        raise ValueError(f"x must lie inside bounds={bounds}, got values from {float(x.min())} to {float(x.max())}")


def _boxed(x: Tensor, bounds: Box | None) -> Tensor:
    return x if bounds is None else x.clamp(*bounds)


def fgsm(
    net: Network,
    x: Float[Tensor, "*inputs"],
    y: Int[Tensor, "*batch"],
    eps: float | Float[Tensor, "*batch"],
    *,
    bounds: Box | None = None,
) -> Float[Tensor, "*inputs"]:
    r"""Fast gradient sign method: :math:`x + \epsilon\,\mathrm{sign}\,\nabla_x L(x, y)`, L the cross-entropy.

    Parameters
    ----------
    net
        Maps inputs to logits, the classes on the last axis.
    x, y
        Inputs, and the classes to be left: labels, or the network's own predictions.
    eps
        Size of the perturbation in the maximum norm, one for all inputs or one each.
    bounds
        Smallest and largest value that an entry of an input may have; None does not clip.

    Raises
    ------
    ValueError
        If ``eps`` is negative, ``x`` and ``y`` do not belong together, or ``x`` lies outside ``bounds``.

    Source: Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples", 2015.
    """
    _check(x, y, bounds)
    return _boxed(x + _radius(eps, x, y.ndim) * _gradient(net, x, y, _cross_entropy).sign(), bounds).detach()


def step_ll(
    net: Network,
    x: Float[Tensor, "*inputs"],
    eps: float | Float[Tensor, "*batch"],
    *,
    bounds: Box | None = None,
) -> Float[Tensor, "*inputs"]:
    r"""One step towards the least likely class, :math:`x - \epsilon\,\mathrm{sign}\,\nabla_x L(x, \arg\min_j h_j(x))`.

    Parameters and errors as for :func:`fgsm`; no label is needed.

    Source: Kurakin, Goodfellow, Bengio, "Adversarial machine learning at scale", 2017.
    """
    with torch.no_grad():
        least_likely = net(x).argmin(-1)
    _check(x, least_likely, bounds)
    step = _radius(eps, x, least_likely.ndim) * _gradient(net, x, least_likely, _cross_entropy).sign()
    return _boxed(x - step, bounds).detach()


def pgd(
    net: Network,
    x: Float[Tensor, "*inputs"],
    y: Int[Tensor, "*batch"],
    eps: float | Float[Tensor, "*batch"],
    *,
    steps: int = 10,
    loss: Literal["cross_entropy", "margin"] = "cross_entropy",
    norm: Literal["linf", "l2"] = "linf",
    bounds: Box | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*inputs"]:
    r"""Projected gradient ascent: steps of length :math:`2.5\,\epsilon/T`, T = ``steps``, each followed by the
    projection on the ball of radius :math:`\epsilon` around ``x``.

    Parameters
    ----------
    net, x, y, eps, bounds
        As for :func:`fgsm`; ``eps`` is measured in ``norm``.
    steps
        Number of gradient steps.
    loss
        ``"cross_entropy"``, or ``"margin"``, :math:`\max_{j\ne y} h_j - h_y`, which confident networks do not saturate.
    norm
        ``"linf"``: steps along the gradient's sign. ``"l2"``: steps along the normalised gradient.
    generator
        If given, the attack starts at a random point of the ball instead of at ``x``: uniform in the cube for
        ``"linf"``, uniform in the ball for ``"l2"``.

    Raises
    ------
    ValueError
        As for :func:`fgsm`, and for ``steps`` < 1, or a ``loss`` or ``norm`` that is not offered.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018.
    """
    _check(x, y, bounds)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if loss not in LOSSES or norm not in ("linf", "l2"):
        raise ValueError(f"loss must be one of {list(LOSSES)} and norm 'linf' or 'l2', got {loss=}, {norm=}")
    radius = _radius(eps, x, y.ndim)
    feature_axes = tuple(range(y.ndim, x.ndim))

    def length(v: Tensor) -> Tensor:
        return torch.linalg.vector_norm(v, dim=feature_axes, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)

    def direction(gradient: Tensor) -> Tensor:
        return gradient.sign() if norm == "linf" else gradient / length(gradient)

    def projected(delta: Tensor) -> Tensor:
        inside = delta.clamp(-radius, radius) if norm == "linf" else delta * (radius / length(delta)).clamp_max(1)
        return _boxed(x + inside, bounds) - x

    delta = torch.zeros_like(x)
    if generator is not None and norm == "linf":
        delta = projected(radius * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) - 1))
    elif generator is not None:
        direction_ = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        # The radius of a uniform point of the unit ball in d dimensions is U^(1/d).
        share = torch.rand(length(direction_).shape, generator=generator, dtype=x.dtype).to(x.device)
        delta = projected(radius * share ** (1 / x[(0,) * y.ndim].numel()) * direction_ / length(direction_))
    for _ in range(steps):
        delta = projected(delta + 2.5 * radius / steps * direction(_gradient(net, x + delta, y, LOSSES[loss])))
    return (x + delta).detach()
