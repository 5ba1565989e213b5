"""Noise-adaptive layerwise learning rates for optimisers that step along linear minimisation oracles (LANTON).

Hao, Gong, Xu, Wang and Liu, "Noise-Adaptive Layerwise Learning Rates: Accelerating Geometry-Aware Optimization for Deep
Neural Network Training", 2025 (arXiv 2510.14009). The authors' code was not at hand; the formula of the rates is
reconstructed from the paper's description.

Every layer has a norm, named by its geometry, and moves along the steepest direction in that norm:

- ``"spectral"``, hidden matrices: ``sqrt(d_in/d_out) ‖A‖_2``, how much a matrix can amplify the RMS of a vector;
- ``"max"``, embeddings and output layer: ``d_in max |A_ij|``;
- ``"rms"``, vectors of length ``n``: ``‖a‖_2 / sqrt(n)``.

Matrices are stored as ``(d_out, d_in)``. Leading axes of any tensor are independent runs (seeds, learning rates).
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from companion import runtime
from companion.data import DataUnavailable

_AXES = {"spectral": 2, "max": 2, "rms": 1}  # how many axes the tensors of a geometry have


def _check(matrix: Tensor, geometry: str) -> None:
    """Raise unless the tensor can be one of this geometry."""
    if geometry not in _AXES:
        raise ValueError(f"geometry must be one of {', '.join(_AXES)}, got {geometry!r}")
    if matrix.ndim < _AXES[geometry]:
        raise ValueError(f"matrix needs {_AXES[geometry]} axes for {geometry=}, got shape {tuple(matrix.shape)}")


def orthogonalize(
    matrix: Float[Tensor, "*batch m n"], method: str = "svd", steps: int = 5
) -> Float[Tensor, "*batch m n"]:
    """The nearest matrix with orthonormal rows or columns: ``U Vᵀ`` of ``U Σ Vᵀ``.

    Parameters
    ----------
    matrix
        What to orthogonalise; not modified.
    method
        ``"svd"``: exact, where the singular values are positive. ``"newton_schulz"``: Muon's iteration
        ``X ← aX + (bA + cA²)X``, ``A = X Xᵀ``, which needs only products and takes all but very small singular values
        to about 0.68 to 1.14.
    steps
        Iterations of Newton-Schulz.

    Raises
    ------
    ValueError
        If there are fewer than two axes, the method is unknown, or ``steps`` is not positive.

    Notes
    -----
    Source: the iteration and its coefficients are Muon's (Jordan et al., 2024).
    """
    _check(matrix, "spectral")
    if method == "svd":
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u @ vh
    if method != "newton_schulz" or steps < 1:
        raise ValueError(f"method must be 'svd' or 'newton_schulz' and steps positive, got {method!r} and {steps}")
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # zero stays zero
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def lmo(matrix: Float[Tensor, "*batch"], geometry: str, method: str = "svd") -> Float[Tensor, "*batch"]:
    """Linear minimisation oracle: the tensor ``O`` of norm 1 that minimises ``⟨matrix, O⟩``.

    Parameters
    ----------
    matrix
        A momentum or gradient; leading axes are a batch.
    geometry
        ``"spectral"``, ``"max"`` or ``"rms"``, see the head of this module.
    method
        How :func:`orthogonalize` works, for ``"spectral"``.

    Raises
    ------
    ValueError
        If the geometry is unknown or the tensor has too few axes for it.

    Notes
    -----
    Source: the paper's Section 3. For a zero matrix the minimiser is not unique; ``"max"`` and ``"rms"`` return zero.
    """
    _check(matrix, geometry)
    n = matrix.shape[-1]
    if geometry == "spectral":
        return -math.sqrt(matrix.shape[-2] / n) * orthogonalize(matrix, method)
    if geometry == "max":
        return -matrix.sign() / n
    return -math.sqrt(n) * F.normalize(matrix, dim=-1)


def dual_norm(matrix: Float[Tensor, "*batch"], geometry: str, method: str = "svd") -> Float[Tensor, "*runs"]:
    """Dual norm ``max ⟨matrix, O⟩`` over all ``O`` of norm 1: nuclear, entrywise l1 or Euclidean, with its scale.

    Parameters and errors are those of :func:`lmo`. With ``method="newton_schulz"`` the nuclear norm is
    ``⟨B, NS(B)⟩``, which is off by as much as the singular values of ``NS(B)`` differ from one.
    """
    _check(matrix, geometry)
    n = matrix.shape[-1]
    if geometry == "rms":
        return math.sqrt(n) * matrix.norm(dim=-1)
    if geometry == "max":
        return matrix.abs().sum((-2, -1)) / n
    if method == "svd":
        nuclear = torch.linalg.svdvals(matrix).sum(-1)
    else:
        nuclear = (matrix * orthogonalize(matrix, method)).sum((-2, -1))
    return math.sqrt(matrix.shape[-2] / n) * nuclear


def noise_factors(H: Float[Tensor, "layers *batch"] | Sequence[float], alpha: float) -> Float[Tensor, "layers *batch"]:
    """Part of the group's learning rate that each layer gets: 1 for the quietest, less for noisier ones.

    ``sqrt(a_l / max_j a_j)`` with ``a_l = alpha / sqrt(alpha² + H_l)``.

    Parameters
    ----------
    H
        Noise estimates (squared dual norms) of the layers of one group.
    alpha
        Noise level (a dual norm, not squared) below which layers count as quiet.

    Raises
    ------
    ValueError
        If ``alpha`` is not positive and finite, or an estimate is negative or NaN.

    Notes
    -----
    Source: the rule of the paper's Algorithm 1, reconstructed.
    """
    H = torch.as_tensor(H)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if not (H >= 0).all():
        raise ValueError(f"H must hold estimates of squared norms, none negative or NaN, got {H.tolist()}")
    a = alpha / (alpha**2 + H).sqrt()
    return (a / a.amax(0)).sqrt()


def _alike(layers: Iterable[Tensor]) -> list[list[Tensor]]:
    """Layers of one shape together: their oracles are computed side by side."""
    found: dict[torch.Size, list[Tensor]] = {}
    for layer in layers:
        found.setdefault(layer.shape, []).append(layer)
    return list(found.values())


class Lanton(torch.optim.Optimizer):
    """LANTON; with ``adaptive=False`` Muon and Scion without weight decay: one rate for all layers of a group.

    Parameters
    ----------
    params
        Tensors or parameter groups. Each group has a ``geometry`` and an ``lr``, its layers share one noise scale.
        Axes in front of a layer's own (two, or one for ``"rms"``) are independent runs.
    lr, geometry
        Defaults of the groups. The rate is in units of the geometry's norm; schedules come from
        ``torch.optim.lr_scheduler``.
    beta1, beta2
        Decay of the momentum and of the noise estimate.
    alpha
        As in :func:`noise_factors`.
    adaptive
        Whether noisier layers get smaller rates. The noise is estimated in any case.
    orthogonalization
        Method of :func:`orthogonalize`.

    Raises
    ------
    ValueError
        If a number is out of range, a geometry is unknown or a tensor does not fit its geometry.

    Notes
    -----
    Source: the paper's Algorithm 1, the rates reconstructed.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.02,
        geometry: str = "spectral",
        *,
        beta1: float = 0.95,
        beta2: float = 0.9,
        alpha: float = 0.1,
        adaptive: bool = True,
        orthogonalization: str = "svd",
    ) -> None:
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"beta1 and beta2 must lie in [0, 1), got {beta1=} and {beta2=}")
        if orthogonalization not in ("svd", "newton_schulz"):
            raise ValueError(f"orthogonalization must be 'svd' or 'newton_schulz', got {orthogonalization!r}")
        noise_factors([0.0], alpha)  # checks alpha
        self.beta1, self.beta2, self.alpha = beta1, beta2, alpha
        self.adaptive, self.method = adaptive, orthogonalization
        super().__init__(params, dict(lr=lr, geometry=geometry))
        for group in self.param_groups:
            if not group["lr"] > 0:
                raise ValueError(f"lr must be positive, got {group['lr']}")
            for p in group["params"]:
                _check(p, group["geometry"])
                runs = p.shape[: p.ndim - _AXES[group["geometry"]]]
                self.state[p] = {"B": torch.zeros_like(p), "H": p.new_zeros(runs).detach(), "G": None}

    @torch.no_grad()
    def step(self, second_gradients: Iterable[Tensor] | None = None) -> None:
        """Move every layer once.

        Parameters
        ----------
        second_gradients
            Option II: an independent second stochastic gradient at the same point for every parameter, in the order
            of the groups. None is option I, which takes the gradient of the step before in its place, and so has no
            noise estimate in the first step.

        Raises
        ------
        ValueError
            If a parameter has no gradient, or there are more or fewer second gradients than parameters.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        seconds = [self.state[p]["G"] for p in parameters] if second_gradients is None else list(second_gradients)
        if any(p.grad is None for p in parameters) or len(seconds) != len(parameters):
            raise ValueError(
                f"every parameter needs a gradient and, if given, one of second_gradients: got {len(parameters)} "
                f"parameters, {sum(p.grad is not None for p in parameters)} gradients, {len(seconds)} second gradients"
            )
        second = dict(zip(parameters, seconds, strict=True))
        for group in self.param_groups:
            for layers in _alike(group["params"]):
                if second[layers[0]] is not None:
                    difference = torch.stack([p.grad - second[p] for p in layers])
                    squares = dual_norm(difference, group["geometry"], self.method).square()
                    for p, square in zip(layers, squares, strict=True):
                        self.state[p]["H"].lerp_(square, 1 - self.beta2)
                for p in layers:
                    self.state[p]["B"].lerp_(p.grad, 1 - self.beta1)
                    self.state[p]["G"] = p.grad.clone()
        for group, factors in zip(self.param_groups, self.factors(), strict=True):
            factor = dict(zip(group["params"], factors, strict=True))
            for layers in _alike(group["params"]):
                directions = lmo(torch.stack([self.state[p]["B"] for p in layers]), group["geometry"], self.method)
                for p, direction in zip(layers, directions, strict=True):
                    p += group["lr"] * factor[p][(...,) + (None,) * _AXES[group["geometry"]]] * direction

    def noise_estimates(self) -> list[Float[Tensor, "layers *runs"]]:
        """The estimates ``H`` of the layers of every group."""
        return [torch.stack([self.state[p]["H"] for p in group["params"]]) for group in self.param_groups]

    def factors(self) -> list[Float[Tensor, "layers *runs"]]:
        """What the rate of each layer is multiplied with, for every group."""
        return [noise_factors(H, self.alpha) if self.adaptive else torch.ones_like(H) for H in self.noise_estimates()]


class Runs(NamedTuple):
    """What :func:`simulate_layers` measured."""

    loss: Float[Tensor, "steps *cases seeds rates"]
    slope: Float[Tensor, "*cases seeds rates"]  # dual norm of the true gradient, summed over layers, mean over the run
    factors: Float[Tensor, "layers *cases seeds rates"]  # at the end


def simulate_layers(
    noise: Float[Tensor, "layers *cases"],
    distance: Float[Tensor, "layers *cases"],
    lrs: Sequence[float],
    mode: str,
    generator: torch.Generator,
    *,
    seeds: int = 3,
    steps: int = 200,
    size: int = 16,
    alpha: float = 1.0,
) -> Runs:
    """Train matrices on ``Σ_l ½‖W_l - W*_l‖²`` with gradient noise of known strength, for all cases and rates at once.

    The target of layer ``l`` is ``distance_l`` times a random rotation of a diagonal from 0.2 to 1; the noise of its
    gradient has independent entries of standard deviation ``noise_l / sqrt(size)``. Rates fall to zero along a cosine.
    All cases and rates see the same targets (up to scale) and the same noise.

    Parameters
    ----------
    noise, distance
        Strength of the noise and distance to the target of each layer; further axes are cases.
    lrs
        Base learning rates.
    mode
        ``"uniform"``: one rate for all layers. ``"adaptive"``: LANTON with option I. ``"reversed"``: LANTON with its
        factors handed out in reverse, so that the noisiest layer steps fastest if noise rises along the layers.
    generator
        Source of targets and noise.
    seeds, steps, size
        Number of independent repetitions, steps, and width of the square matrices.
    alpha
        As in :func:`noise_factors`.

    Raises
    ------
    ValueError
        If shapes differ, a number is out of range, or the mode is unknown.
    """
    if noise.ndim < 1 or noise.shape != distance.shape:
        raise ValueError(f"noise and distance must have one shape, got {tuple(noise.shape)}, {tuple(distance.shape)}")
    if not (noise >= 0).all() or not (distance >= 0).all():
        raise ValueError("noise and distance must not be negative or NaN")
    if mode not in ("uniform", "adaptive", "reversed"):
        raise ValueError(f"mode must be 'uniform', 'adaptive' or 'reversed', got {mode!r}")
    if not lrs or not min(lrs) > 0 or min(seeds, steps, size) < 1:
        raise ValueError(f"lrs, seeds, steps and size must be positive, got {lrs=}, {seeds=}, {steps=}, {size=}")
    layers, cases = len(noise), (1,) * (noise.ndim - 1)

    def gaussian() -> Float[Tensor, "layers *ones seeds 1 size size"]:
        return torch.randn(layers, *cases, seeds, 1, size, size, generator=generator)

    noise, distance = (x.float()[..., None, None, None, None] for x in (noise, distance))
    target = distance * torch.linalg.qr(gaussian())[0] * torch.linspace(0.2, 1, size)
    w = target.new_zeros(*target.shape[:-3], len(lrs), size, size)
    momentum, H, rates = torch.zeros_like(w), w.new_zeros(w.shape[:-2]), torch.tensor(lrs)
    losses, slopes, previous = [], [], None
    for step in range(steps):
        error = w - target  # the true gradient
        losses.append(0.5 * error.square().sum((0, -2, -1)))
        if step % 10 == 0:
            slopes.append(dual_norm(error, "spectral").sum(0))
        gradient = error + noise * size**-0.5 * gaussian()
        momentum.lerp_(gradient, 0.05)
        if previous is not None and mode != "uniform":
            H.lerp_(dual_norm(gradient - previous, "spectral").square(), 0.1)
        previous = gradient
        factors = torch.ones_like(H) if mode == "uniform" else noise_factors(H, alpha)
        if mode == "reversed":
            factors = factors.flip(0)
        eta = 0.5 * (1 + math.cos(math.pi * step / steps)) * rates * factors
        w += eta[..., None, None] * lmo(momentum, "spectral")
    return Runs(torch.stack(losses), torch.stack(slopes).mean(0), factors)


def load_text(name: str, n_tokens: int) -> tuple[Int[Tensor, " n"], int]:
    """A text as a sequence of symbol numbers, and how many symbols there are.

    Parameters
    ----------
    name
        ``"sklearn"``: the descriptions of scikit-learn's data sets, one after the other, character by character.
        ``"openwebtext"``: documents of OpenWebText as GPT-2 tokens, streamed from Hugging Face; the packages
        ``datasets`` and ``transformers`` are needed. In the ``smoke`` profile the first text stands in for it.
    n_tokens
        At most so many symbols are read.

    Raises
    ------
    ValueError
        If the name is unknown or ``n_tokens`` is not positive.
    DataUnavailable
        If OpenWebText cannot be had.
    """
    if name not in ("sklearn", "openwebtext") or n_tokens < 1:
        raise ValueError(f"name must be 'sklearn' or 'openwebtext', n_tokens positive, got {name!r} and {n_tokens}")
    if name == "sklearn" or runtime.profile() == "smoke":
        folder = importlib.resources.files("sklearn.datasets.descr")
        files = sorted((file for file in folder.iterdir() if file.name.endswith(".rst")), key=lambda file: file.name)
        text = "".join(file.read_text(encoding="utf-8") for file in files)[:n_tokens]
        symbols = {character: number for number, character in enumerate(sorted(set(text)))}
        return torch.tensor([symbols[character] for character in text]), len(symbols)
    try:
        from datasets import load_dataset
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained("gpt2")
        documents = load_dataset("Skylion007/openwebtext", split="train", streaming=True)
        tokens = (token for document in documents for token in tokenizer(document["text"])["input_ids"])
        return torch.from_numpy(np.fromiter(islice(tokens, n_tokens), np.int64)), tokenizer.vocab_size
    except Exception as error:  # missing packages, the network, the server
        raise DataUnavailable(
            f"the text 'openwebtext' could not be had: {error}. Install the packages datasets and transformers and "
            "connect to the internet, or set BOOK_PROFILE=book, which needs no download."
        ) from error


def init_transformer(
    n_symbols: int, width: int, blocks: int, context: int, generator: torch.Generator
) -> dict[str, Float[Tensor, "..."]]:
    """Initial weights of a decoder-only transformer without biases, by name.

    Hidden matrices (``q``, ``k``, ``v``, ``o``, ``up``, ``down`` of each block) have entries of variance 1/fan-in, the
    embedding standard deviation 0.5, positions 0.1; the output layer is zero and the gains of the norms are one.

    Raises
    ------
    ValueError
        If a size is not positive.
    """
    if min(n_symbols, width, blocks, context) < 1:
        raise ValueError(f"sizes must be positive, got {n_symbols=}, {width=}, {blocks=}, {context=}")

    def gaussian(n_out: int, n_in: int, std: float) -> Tensor:
        return std * torch.randn(n_out, n_in, generator=generator)

    shapes = {name: (width, width) for name in "qkvo"} | {"up": (4 * width, width), "down": (width, 4 * width)}
    weights = {"embedding": gaussian(n_symbols, width, 0.5), "position": gaussian(context, width, 0.1)}
    for block in range(1, blocks + 1):
        weights |= {f"{name} {block}": gaussian(*shape, shape[1] ** -0.5) for name, shape in shapes.items()}
        weights |= {f"gain {block}a": torch.ones(width), f"gain {block}b": torch.ones(width)}
    return weights | {"gain": torch.ones(width), "head": torch.zeros(n_symbols, width)}


def transformer_loss(
    weights: dict[str, Float[Tensor, "..."]], tokens: Int[Tensor, "n time"], heads: int
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of a pre-norm transformer that predicts every token from those before it.

    ``torch.vmap`` runs it for many seeds. Windows are one token longer than the context.

    Raises
    ------
    ValueError
        If ``heads`` does not divide the width, or the windows are too short or too long.
    """
    context, width = weights["position"].shape
    if width % heads or not 2 <= tokens.shape[-1] <= context + 1:
        raise ValueError(
            f"heads must divide the width {width} and windows have 2 to {context + 1} tokens, "
            f"got {heads=} and {tokens.shape[-1]} tokens"
        )
    time = tokens.shape[-1] - 1
    future = torch.ones(time, time, dtype=torch.bool, device=tokens.device).triu(1)  # not to be looked at
    x = weights["embedding"][tokens[:, :-1]] + weights["position"][:time]
    for block in range(1, 1 + sum(name.startswith("q ") for name in weights)):
        q, k, v, o, up, down = (weights[f"{name} {block}"].mT for name in ("q", "k", "v", "o", "up", "down"))
        y = F.rms_norm(x, (width,), weights[f"gain {block}a"])
        q, k, v = ((y @ matrix).unflatten(-1, (heads, -1)).transpose(1, 2) for matrix in (q, k, v))
        scores = (q @ k.mT / (width // heads) ** 0.5).masked_fill(future, -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ o
        x = x + F.gelu(F.rms_norm(x, (width,), weights[f"gain {block}b"]) @ up) @ down
    logits = F.rms_norm(x, (width,), weights["gain"]) @ weights["head"].mT
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def groups(weights: dict[str, Float[Tensor, "..."]], lr: float) -> list[dict]:
    """The three parameter groups of :class:`Lanton` for the weights of :func:`init_transformer`.

    Hidden matrices and gains get the rate ``lr``; embedding, positions and output layer ``8 lr``.
    """
    ends = ("embedding", "position", "head")
    gains = [name for name in weights if name.startswith("gain")]
    hidden = [name for name in weights if name not in (*ends, *gains)]
    return [
        {"params": [weights[name] for name in names], "geometry": geometry, "lr": rate}
        for names, geometry, rate in ((hidden, "spectral", lr), (ends, "max", 8 * lr), (gains, "rms", lr))
    ]
