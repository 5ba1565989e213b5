"""Layer-adaptive pruning: how much of each layer to remove, by dynamic programming over the change of the output.

Xu, Wang, Geng, Lin, Wu, Li and Lin, "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural
Networks", ICCV 2023 (arXiv 2308.10438). Baselines: LAMP (Lee et al., ICLR 2021), global and uniform magnitude pruning.

A layer is named by its module and stands for that module's ``weight``; biases and normalisation are never pruned. Layer
``l`` has ``n_l`` weights, of which the ``k_l`` smallest are set to zero; its fraction is ``k_l / n_l``. Networks are
evaluated in evaluation mode, and no function changes the network it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from companion import models, training

Counts = list[int]
Weights = dict[str, Tensor]  # parameters by their names, "<layer>.weight"


def prunable_layers(model: nn.Module) -> list[str]:
    """Names of the convolutions and linear layers of ``model``, in the order of its modules."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def layer_weights(model: nn.Module, layers: Sequence[str]) -> list[Tensor]:
    """The weight of every layer, as it stands in the model.

    Raises
    ------
    ValueError
        If ``layers`` is empty or repeats itself, or names a module that the model lacks or that has no weight.
    """
    known = {name.removesuffix(".weight"): weight for name, weight in model.named_parameters() if ".weight" in name}
    if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(known):
        raise ValueError(f"layers must be different modules with a weight, some of {list(known)}, got {list(layers)}")
    return [known[name].detach() for name in layers]


def _rank(weight: Tensor) -> Int[Tensor, "*shape"]:
    """Place of every weight in the order of magnitude, from 0 for the smallest; equal ones keep their order."""
    return weight.abs().flatten().argsort(stable=True).argsort().view_as(weight)


def magnitude_mask(weight: Float[Tensor, "*shape"], num_pruned: int) -> Bool[Tensor, "*shape"]:
    """False for the ``num_pruned`` weights of smallest magnitude (the first ones among equals), True for the others.

    Raises
    ------
    ValueError
        If ``num_pruned`` is negative or larger than the number of weights.
    """
    if not 0 <= num_pruned <= weight.numel():
        raise ValueError(f"num_pruned must be between 0 and {weight.numel()}, got {num_pruned}")
    return _rank(weight) >= num_pruned


def _check_inputs(inputs: Tensor) -> None:
    if not inputs.numel() or not inputs.isfinite().all():
        raise ValueError(f"inputs must be finite and not empty, got shape {tuple(inputs.shape)}")


@torch.no_grad()
def logits(model: nn.Module, inputs: Float[Tensor, "n *features"], weights: Weights | None = None) -> Tensor:
    """Outputs in evaluation mode, with some parameters replaced for this call only.

    Raises
    ------
    ValueError
        If ``inputs`` is empty or not finite.
    """
    _check_inputs(inputs)
    return functional_call(deepcopy(model).eval(), weights or {}, (inputs,))


def output_distortion(model: nn.Module, other: nn.Module, inputs: Float[Tensor, "n *features"]) -> float:
    """Mean squared difference of two networks' logits, over samples and classes: the paper's objective."""
    return float((logits(model, inputs) - logits(other, inputs)).square().mean())


def _check_grid(grid: np.ndarray) -> np.ndarray:
    grid = np.asarray(grid, dtype=float)
    if grid.ndim != 1 or not len(grid) or grid[0] != 0 or not (np.diff(grid) > 0).all() or grid[-1] > 1:
        raise ValueError(f"grid must hold increasing fractions from 0 to at most 1, got {grid}")
    return grid


def _grid_counts(sizes: Sequence[int], grid: np.ndarray) -> Int[np.ndarray, "L K"]:
    """Number of pruned weights ``k_l(a)`` for every layer and grid point."""
    return np.rint(np.outer(sizes, grid)).astype(int)


@torch.no_grad()
def distortion_curves(
    model: nn.Module,
    layers: Sequence[str],
    inputs: Float[Tensor, "S *features"],
    grid: Float[np.ndarray, " K"],
    worst_case: bool = False,
) -> Float[np.ndarray, "L K"]:
    r"""Rate-distortion curves :math:`\delta_l(a)`: change of the logits when layer ``l`` alone is pruned.

    Parameters
    ----------
    model
        The network; its weights are not touched.
    layers
        Names of the layers.
    inputs
        Calibration inputs; no labels are needed.
    grid
        Fractions to try, increasing from 0.
    worst_case
        Take the maximum over samples instead of the mean (the option of the authors' code).

    Returns
    -------
    ndarray
        Squared difference of logits, averaged over classes and samples, for every layer and fraction.

    Raises
    ------
    ValueError
        If a layer is unknown, ``inputs`` is empty or not finite, or ``grid`` is not an increasing list from 0 to 1.
    """
    grid, weights = _check_grid(grid), layer_weights(model, layers)
    _check_inputs(inputs)
    network = deepcopy(model).eval()
    original = network(inputs)

    def distortion(name: str, weight: Tensor, rank: Tensor, k: Tensor) -> Tensor:
        output = functional_call(network, {f"{name}.weight": weight * (rank >= k)}, (inputs,))
        per_sample = (output - original).square().mean(1)
        return per_sample.amax() if worst_case else per_sample.mean()

    counts = torch.from_numpy(_grid_counts([weight.numel() for weight in weights], grid)).to(inputs.device)
    curves = np.zeros(counts.shape)
    for curve, name, weight, pruned in zip(curves, layers, weights, counts, strict=True):
        changed = pruned > (weight == 0).sum()  # the smallest weights may be zero already: nothing to evaluate there
        if changed.any():
            at_k = partial(distortion, name, weight, _rank(weight))
            # Eight grid points at a time: what lies below the pruned layer is then evaluated once for all of them.
            values = torch.vmap(at_k, chunk_size=8)(pruned[changed])
            curve[changed.cpu().numpy()] = values.cpu().numpy()
    return curves


class Allocation(NamedTuple):
    """What :func:`allocate` chose, one entry per layer, and the sum of the curves there."""

    fractions: list[float]
    counts: Counts
    predicted_distortion: float


def _num_to_prune(sizes: Sequence[int], sparsity: float) -> int:
    """The global target T, in weights."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be between 0 and 1, got {sparsity}")
    if not len(sizes) or min(sizes) < 1:
        raise ValueError(f"sizes must hold a positive number of weights for every layer, got {list(sizes)}")
    return math.ceil(sparsity * sum(sizes) - 1e-9)  # 0.2 * 15 is 3.0000000000000004


def allocate(
    curves: Float[np.ndarray, "L K"],
    sizes: Sequence[int],
    grid: Float[np.ndarray, " K"],
    sparsity: float,
    min_fractions: Sequence[float] | None = None,
    max_fraction: float = 1.0,
) -> Allocation:
    r"""The fractions of least :math:`\sum_l\delta_l(a_l)` among all that prune at least ``sparsity`` of the weights.

    Exact dynamic programming: :math:`f_l(t)`, the least sum of the first ``l`` layers that prunes at least ``t``
    weights, is :math:`\min_a f_{l-1}(\max(t-k_l(a),0))+\delta_l(a)`. Time O(L K T), with T the weights to prune.

    Parameters
    ----------
    curves
        Distortion of every layer at every grid point, finite.
    sizes
        Number of weights of every layer.
    grid
        Fractions, increasing from 0.
    sparsity
        Part of all weights to prune, at least.
    min_fractions
        Least fraction of every layer, for instance what is pruned already.
    max_fraction
        Largest fraction allowed in any layer.

    Raises
    ------
    ValueError
        If shapes do not fit, values are out of range, or no allowed choice prunes that much.
    """
    grid, curves = _check_grid(grid), np.asarray(curves, dtype=float)
    target = _num_to_prune(sizes, sparsity)
    least = np.zeros(len(sizes)) if min_fractions is None else np.asarray(min_fractions, dtype=float)
    if curves.shape != (len(sizes), len(grid)) or not np.isfinite(curves).all():
        raise ValueError(f"curves must be finite, of shape {(len(sizes), len(grid))}, got shape {curves.shape}")
    if least.shape != (len(sizes),) or not ((least >= 0) & (least <= 1)).all():
        raise ValueError(f"min_fractions must hold {len(sizes)} fractions between 0 and 1, got {min_fractions}")
    counts = _grid_counts(sizes, grid)
    allowed = (counts >= np.rint(least * sizes)[:, None]) & (grid <= max_fraction)
    if not allowed.any(1).all() or np.where(allowed, counts, 0).max(1).sum() < target:
        raise ValueError(f"sparsity {sparsity} cannot be reached with {min_fractions=}, {max_fraction=} on this grid")

    best, choices = np.full(target + 1, np.inf), []
    best[0] = 0.0
    for l in range(len(sizes)):
        new, choice = np.full(target + 1, np.inf), np.zeros(target + 1, dtype=np.int16)
        for a in np.flatnonzero(allowed[l]):
            k = min(counts[l, a], target)
            cost = curves[l, a] + np.concatenate([np.full(k, best[0]), best[: target + 1 - k]])
            better = cost < new
            new[better], choice[better] = cost[better], a
        best, choices = new, [*choices, choice]

    left, chosen = target, []
    for l in reversed(range(len(sizes))):
        chosen.insert(0, int(choices[l][left]))
        left = max(left - counts[l, chosen[0]], 0)
    return Allocation(grid[chosen].tolist(), [int(counts[l, a]) for l, a in enumerate(chosen)], float(best[target]))


def _smallest_counts(scores: Sequence[Tensor], sparsity: float) -> Counts:
    """How many of the smallest scores, over all layers together, lie in each layer."""
    sizes = [score.numel() for score in scores]
    target = _num_to_prune(sizes, sparsity)
    pruned = ~magnitude_mask(torch.cat([score.flatten() for score in scores]), target)
    return [int(part.sum()) for part in pruned.split(sizes)]


def lamp_scores(weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""LAMP: :math:`w_u^2/\sum_{v\ge u}w_v^2`, the sum over the weights of the layer that are at least as large.

    Source: Lee et al., ICLR 2021. The largest weight of every layer scores 1, so that no layer vanishes before all
    others are down to one weight. Zeros score 0.
    """
    squares, order = weight.flatten().double().square().sort(stable=True)
    left = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = squares / left.clamp_min(torch.finfo(left.dtype).tiny)
    return scores.view_as(weight)


def lamp_counts(weights: Sequence[Tensor], sparsity: float) -> Counts:
    """Pruned weights of every layer when the smallest LAMP scores go; ValueError for a sparsity outside [0, 1]."""
    return _smallest_counts([lamp_scores(weight) for weight in weights], sparsity)


def global_magnitude_counts(weights: Sequence[Tensor], sparsity: float) -> Counts:
    """Pruned weights of every layer when the smallest of all go; ValueError for a sparsity outside [0, 1]."""
    return _smallest_counts([weight.abs() for weight in weights], sparsity)


def uniform_counts(weights: Sequence[Tensor], sparsity: float) -> Counts:
    """The same fraction of every layer, rounded; ValueError for a sparsity outside [0, 1]."""
    sizes = [weight.numel() for weight in weights]
    _num_to_prune(sizes, sparsity)
    return _grid_counts(sizes, np.array([sparsity]))[:, 0].tolist()


def _masks(model: nn.Module, layers: Sequence[str], counts: Sequence[int]) -> Weights:
    """Magnitude masks by the names of the parameters."""
    weights = layer_weights(model, layers)
    if len(counts) != len(layers):
        raise ValueError(f"counts must have one entry per layer, got {len(counts)} for {len(layers)} layers")
    triples = zip(layers, weights, counts, strict=True)
    return {f"{name}.weight": magnitude_mask(weight, count) for name, weight, count in triples}


def apply_counts(model: nn.Module, layers: Sequence[str], counts: Sequence[int]) -> nn.Module:
    """A copy of ``model`` whose layers lack their ``counts`` smallest weights.

    Raises
    ------
    ValueError
        If a layer is unknown, ``counts`` and ``layers`` differ in length, or a count does not fit its layer.
    """
    masks, pruned = _masks(model, layers, counts), deepcopy(model)
    for name, mask in masks.items():
        pruned.get_parameter(name).data.mul_(mask)
    return pruned


def prune_iteratively(
    model: nn.Module,
    layers: Sequence[str],
    schedule: Sequence[float],
    finetune: Callable[[nn.Module, Weights], object],
    allocator: Callable[[nn.Module, float, Counts], Sequence[int]],
) -> list[nn.Module]:
    """Prune, fine-tune, and prune again what is left.

    Parameters
    ----------
    model
        The dense network; not modified.
    layers
        Names of the layers.
    schedule
        Global sparsity after every step, increasing.
    finetune
        Called with the pruned network and the masks of its weights; trains it in place and keeps zeros at zero.
    allocator
        Called with the current network, the sparsity to reach and the counts pruned so far; returns the new counts.

    Returns
    -------
    list of Module
        The network after every step, fine-tuned.

    Raises
    ------
    ValueError
        If ``schedule`` does not increase within [0, 1], the allocator gives weights back, or ``finetune`` does.
    """
    if not len(schedule) or min(schedule) < 0 or max(schedule) > 1 or not (np.diff(schedule) > 0).all():
        raise ValueError(f"schedule must increase within [0, 1], got {list(schedule)}")
    network, counts, stages = model, [0] * len(layers), []
    for sparsity in schedule:
        previous, counts = counts, list(allocator(network, sparsity, counts))
        masks = _masks(network, layers, counts)
        if any(new < old for new, old in zip(counts, previous, strict=True)):
            raise ValueError(f"allocator gave weights back: it pruned {previous} and then {counts}")
        network = apply_counts(network, layers, counts)
        finetune(network, masks)
        if any(network.get_parameter(name)[~mask].any() for name, mask in masks.items()):
            raise ValueError(f"finetune must keep pruned weights at zero, it did not at sparsity {sparsity}")
        stages.append(network)
    return stages


def train(
    network: nn.Module,
    inputs: Float[Tensor, "n *features"],
    labels: Int[Tensor, " n"],
    masks: Weights,
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None,
    **options: object,
) -> None:
    """Train a classifier in place; weights whose mask is False get no gradient, and stay zero if they are zero.

    ``augment`` changes the inputs of a batch, None leaves them; ``options`` go to :func:`companion.training.fit`.
    """
    batches = training.minibatches(len(inputs), batch_size, generator)

    def loss(_: int) -> Tensor:
        rows = next(batches).to(inputs.device)
        batch = augment(inputs[rows], generator) if augment else inputs[rows]
        weights = {name: network.get_parameter(name) * mask for name, mask in masks.items()}
        return F.cross_entropy(functional_call(network, weights, (batch,)), labels[rows])

    steps = epochs * (len(inputs) // batch_size)
    training.fit(loss, network.train().parameters(), steps=steps, record_every=steps, **options)


def digit_cnn(*, generator: torch.Generator) -> nn.Sequential:
    """Four convolutions and two linear layers for 8x8 images, without normalisation: 49 680 weights, 10 outputs.

    Initial values are uniform in ±1/sqrt(fan-in), as PyTorch's default.
    """
    with torch.device("meta"):
        network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
        )
    network = network.to_empty(device="cpu")
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            models.initialised(layer, generator)
    return network
