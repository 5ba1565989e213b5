"""An explainable generative model of a brain image from spatial images and a network, with Monte Carlo dropout.

Jeon, Guhaniyogi and Scheffler, "Deep Generative Modeling with Spatial and Network Images: An Explainable AI (XAI)
Approach", 2025 (arXiv 2505.12743). We work from the abstract: the equations are the standard form that meets it.

Subject ``i`` has an outcome image ``y_i(s_j)`` at locations ``s_j`` of the unit square, each in a region ``g(j)``,
covariate images ``x_ip(s_j)`` and a network ``A_i`` over the regions. The model is
``y_i(s_j) = β_0(s_j) + Σ_p x_ip(s_j) β_p(s_j) + h(u_{i,g(j)}) + noise``, where ``u_ig`` is the latent position of
region ``g`` in the network of subject ``i``.

Sizes: n subjects, J locations, P covariates, G regions, K latent dimensions, m subjects of a batch, T draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from companion import models, training

Masks = tuple[Tensor | float, Tensor | float]  # one for each hidden layer
NO_MASKS: Masks = (1.0, 1.0)


@dataclass(frozen=True)
class ImageData:
    """Images and networks of ``n`` subjects, with the truth that made them."""

    locations: Float[Tensor, "J 2"]
    region: Int[Tensor, " J"]
    covariates: Float[Tensor, "n J P"]
    networks: Float[Tensor, "n G G"]
    outcome: Float[Tensor, "n J"]
    effects: Float[Tensor, "J P+1"]
    node_effect: Float[Tensor, "n G"]
    latent: Float[Tensor, "n G K"]

    @property
    def mean(self) -> Float[Tensor, "n J"]:
        """The outcome without its noise."""
        return mean_image(self.covariates, self.effects, self.node_effect, self.region)

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on another device."""
        return ImageData(**{name: value.to(device) for name, value in vars(self).items()})


def mean_image(
    covariates: Float[Tensor, "m J P"],
    effects: Float[Tensor, "*batch J P+1"],
    node_effect: Float[Tensor, "*batch m G"],
    region: Int[Tensor, " J"],
) -> Float[Tensor, "*batch m J"]:
    """The model's sum ``β_0(s_j) + Σ_p x_ip(s_j) β_p(s_j) + h_{i,g(j)}``; batch axes are draws."""
    local = torch.einsum("mjp,...jp->...mj", covariates, effects[..., 1:])
    return effects[..., None, :, 0] + local + node_effect[..., region]


def simulate_images(
    seed: int,
    n_subjects: int = 70,
    side: int = 16,
    regions_per_side: int = 4,
    noise: float = 0.5,
) -> ImageData:
    """Draw subjects from the model, with two covariates, on a square grid with square regions.

    The effects are two waves and a bump, ``β_2``, that is nearly zero away from its centre; each covariate is a smooth
    field plus white noise. Latent positions are ``U_i = U_0 + 0.7 Z_i`` with ``K = 2``, networks
    ``A_i = U_i U_iᵀ + E_i`` with noise of standard deviation 0.15 and a zero diagonal, and
    ``h(u) = 1.2 sin(1.5 u_1) + 0.5 (u_2² - 1)``.

    Parameters
    ----------
    seed
        Of everything that is drawn.
    n_subjects
        Number of subjects.
    side, regions_per_side
        The grid has ``side²`` locations in ``regions_per_side²`` regions.
    noise
        Standard deviation of the noise of the outcome.

    Raises
    ------
    ValueError
        If ``side`` is no multiple of ``regions_per_side``, a number is not positive, or ``noise`` is negative.
    """
    if min(n_subjects, side, regions_per_side) < 1 or not noise >= 0:
        raise ValueError(
            "n_subjects, side and regions_per_side must be positive and noise not negative, "
            f"got {n_subjects=}, {side=}, {regions_per_side=}, {noise=}"
        )
    if side % regions_per_side:
        raise ValueError(f"side must be a multiple of regions_per_side={regions_per_side}, got {side}")
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    uniform = partial(torch.rand, generator=generator, dtype=torch.float64)

    axis = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    s = torch.cartesian_prod(axis, axis)
    block = torch.arange(side) // (side // regions_per_side)
    region = (regions_per_side * block[:, None] + block).flatten()

    phase, centre = 2 * math.pi * uniform(3), 0.3 + 0.4 * uniform(2)
    waves = (2 * math.pi * s + phase[:2]).T
    effects = torch.stack(
        [
            waves[0].sin() + 0.5 * waves[1].cos(),
            (math.pi * s.sum(1) + phase[2]).sin(),
            1.5 * (-(s - centre).square().sum(1) / (2 * 0.15**2)).exp(),
        ],
        dim=1,
    )
    # A squared-exponential field on a grid is white noise between the square roots of two one-dimensional kernels.
    kernel = (-(axis[:, None] - axis).square() / (2 * 0.15**2)).exp()
    values, vectors = torch.linalg.eigh(kernel)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    smooth = root @ normal(n_subjects, 2, side, side) @ root
    covariates = (0.8 * smooth + 0.6 * normal(smooth.shape)).flatten(2).mT

    n_regions = regions_per_side**2
    u = normal(n_regions, 2) + 0.7 * normal(n_subjects, n_regions, 2)
    node_effect = 1.2 * (1.5 * u[..., 0]).sin() + 0.5 * (u[..., 1].square() - 1)
    error = 0.15 * normal(n_subjects, n_regions, n_regions).triu(1)
    networks = u @ u.mT + error + error.mT
    networks.diagonal(dim1=1, dim2=2).zero_()
    mean = mean_image(covariates, effects, node_effect, region)
    outcome = mean + noise * normal(mean.shape)
    return ImageData(s, region, covariates, networks, outcome, effects, node_effect, u)


# --- stage 1: from a network to latent positions ---------------------------------------------------------------------


def spectral_embedding(
    networks: Float[Tensor, "n G G"], latent_dim: int, n_completion: int = 10
) -> Float[Tensor, "n G K"]:
    """Positions ``U_i`` with ``U_i U_iᵀ ≈ A_i`` off the diagonal; each up to a rotation or reflection of its own.

    The diagonal, which a network does not have, is completed: it starts at what ``networks`` holds there, and every
    round sets it to that of the best approximation of rank ``latent_dim``.

    Parameters
    ----------
    networks
        Symmetric matrices.
    latent_dim
        Number ``K`` of dimensions.
    n_completion
        Rounds of the completion. It converges linearly, and slowly.

    Raises
    ------
    ValueError
        If the networks are not symmetric and finite, ``latent_dim`` is not between 1 and ``G``, or ``n_completion`` is
        negative.
    """
    if networks.ndim != 3 or networks.shape[1] != networks.shape[2] or not networks.isfinite().all():
        raise ValueError(f"networks must be finite and of shape (n, G, G), got {tuple(networks.shape)}")
    if not torch.allclose(networks, networks.mT):
        raise ValueError("networks must be symmetric, got one that differs from its transpose")
    if not 1 <= latent_dim <= networks.shape[1]:
        raise ValueError(
            f"latent_dim must be between 1 and the number of regions {networks.shape[1]}, got {latent_dim}"
        )
    if n_completion < 0:
        raise ValueError(f"n_completion must not be negative, got {n_completion}")
    completed = networks.clone()
    for step in range(n_completion + 1):
        values, vectors = torch.linalg.eigh(completed)  # in ascending order
        positions = vectors[..., -latent_dim:] * values[:, None, -latent_dim:].clamp(min=0).sqrt()
        if step < n_completion:
            completed.diagonal(dim1=1, dim2=2).copy_(positions.square().sum(-1))
    return positions.flip(-1)


def align(latents: Float[Tensor, "n G K"], n_train: int, rounds: int = 5) -> Float[Tensor, "n G K"]:
    """Turn every subject's positions to a common template, the mean of the first ``n_train`` (generalised Procrustes).

    Every subject gets the orthogonal matrix that brings it closest to the template, which starts as subject 0.

    Raises
    ------
    ValueError
        If ``n_train`` is not between 1 and the number of subjects.
    """
    if not 1 <= n_train <= len(latents):
        raise ValueError(f"n_train must be between 1 and the number of subjects {len(latents)}, got {n_train}")
    template = latents[0]
    for _ in range(rounds):
        p, _, qh = torch.linalg.svd(latents.mT @ template)
        aligned = latents @ p @ qh
        template = aligned[:n_train].mean(0)
    return aligned


def embed_networks(
    networks: Float[Tensor, "n G G"], latent_dim: int, n_train: int, n_completion: int = 10
) -> Float[Tensor, "n G K"]:
    """Latent positions that can be compared across subjects: :func:`spectral_embedding`, then :func:`align`."""
    return align(spectral_embedding(networks, latent_dim, n_completion), n_train)


# --- stage 2: the effects as networks with dropout -------------------------------------------------------------------


class Inputs(NamedTuple):
    """What the model reads: one pytree, so that ``training.Ensemble`` can hand it over."""

    locations: Float[Tensor, "J 2"]
    region: Int[Tensor, " J"]
    covariates: Float[Tensor, "m J P"]
    latents: Float[Tensor, "m G K"]
    effect_masks: Masks = NO_MASKS
    node_masks: Masks = NO_MASKS


def _masked(network: nn.Sequential, x: Tensor, masks: Masks) -> Tensor:
    """Outputs of the network with the units of every hidden layer multiplied by its mask."""
    for linear, activation, mask in zip(network[:-1:2], network[1::2], masks, strict=True):
        x = activation(linear(x)) * mask
    return network[-1](x)


def dropout_masks(keep: Tensor, shape: Sequence[int], generator: torch.Generator) -> Masks:
    """Masks of both hidden layers: ``1/keep`` with probability ``keep``, else 0, so that their mean is 1.

    Parameters
    ----------
    keep
        Probability that a unit stays, broadcast over ``shape``; in (0, 1].
    shape
        Shape of each mask; the last axis is over hidden units. An axis of length 1 is shared.
    generator
        Source of randomness, on the device of ``keep``.

    Raises
    ------
    ValueError
        If an entry of ``keep`` is not in (0, 1].
    """
    if not ((keep > 0) & (keep <= 1)).all():
        raise ValueError(f"keep must lie in (0, 1], got values from {float(keep.min())} to {float(keep.max())}")
    draws = (torch.rand(*shape, generator=generator, device=keep.device) for _ in range(2))
    return tuple((draw < keep) / keep for draw in draws)


class SpatialNetworkModel(nn.Module):
    """Effect maps ``β(s)`` as a network of the location, node effects ``h(u)`` as a network of the latent position.

    Both have two hidden layers with GELU, and dropout after each.

    Parameters
    ----------
    n_covariates, latent_dim
        Sizes ``P`` and ``K``.
    generator
        Source of the initial weights. The first layer of the effect network starts wide, with weights N(0, 2²) and
        biases U(-2, 2): from the usual start, functions on the unit square are too smooth to bend around a bump.
    width
        Units of a hidden layer.
    dropout
        Probability ``q`` that a hidden unit is dropped.

    Raises
    ------
    ValueError
        If a size is not positive or ``dropout`` is not in [0, 1).
    """

    def __init__(
        self, n_covariates: int, latent_dim: int, generator: torch.Generator, width: int = 64, dropout: float = 0.05
    ) -> None:
        super().__init__()
        if min(n_covariates, latent_dim, width) < 1 or not 0 <= dropout < 1:
            raise ValueError(
                "n_covariates, latent_dim and width must be positive and dropout in [0, 1), "
                f"got {n_covariates=}, {latent_dim=}, {width=}, {dropout=}"
            )
        self.width = width
        self.register_buffer("keep", torch.tensor(1 - dropout))  # a buffer: the members of an ensemble have their own
        perceptron = partial(models.mlp, generator=generator, activation=nn.GELU)
        self.effect_network = perceptron([2, width, width, n_covariates + 1])
        self.node_network = perceptron([latent_dim, width, width, 1])
        nn.init.normal_(self.effect_network[0].weight, std=2, generator=generator)
        nn.init.uniform_(self.effect_network[0].bias, -2, 2, generator=generator)

    def effects(self, s: Float[Tensor, "J 2"], masks: Masks = NO_MASKS) -> Float[Tensor, "*draws J P+1"]:
        """Effect maps ``β_0 ... β_P`` at locations of the unit square."""
        return _masked(self.effect_network, 2 * s - 1, masks)

    def node_effect(self, u: Float[Tensor, "*shape K"], masks: Masks = NO_MASKS) -> Float[Tensor, "*draws *shape"]:
        """Effect ``h`` of latent positions."""
        return _masked(self.node_network, u, masks).squeeze(-1)

    def forward(self, inputs: Inputs) -> Float[Tensor, "m J"]:
        """Mean images."""
        effects = self.effects(inputs.locations, inputs.effect_masks)
        nodes = self.node_effect(inputs.latents, inputs.node_masks)
        return mean_image(inputs.covariates, effects, nodes, inputs.region)


def _check_latents(data: ImageData, latents: Tensor) -> None:
    if latents.ndim != 3 or latents.shape[:2] != data.networks.shape[:2] or not latents.isfinite().all():
        expected = (*data.networks.shape[:2], "K")
        raise ValueError(f"latents must be finite and of shape {expected}, got {tuple(latents.shape)}")


def fit_models(
    networks: Sequence[SpatialNetworkModel],
    data: Sequence[ImageData],
    latents: Sequence[Float[Tensor, "n G K"]],
    n_train: int,
    epochs: int = 40,
    batch_size: int = 4,
    lr: float = 5e-3,
    seed: int = 0,
) -> list[SpatialNetworkModel]:
    """Train models side by side, each on data and latent positions of its own, and return the trained copies.

    Squared error by AdamW with weight decay 1e-4 under a one-cycle learning rate. A batch is whole images, so that the
    effect network is evaluated once per location and the node network once per region, for all of them. Dropout masks
    are fresh for every location, every node and every step.

    Parameters
    ----------
    networks
        Models of one architecture; their dropout rates may differ. Not modified.
    data, latents
        One entry per model, with equal shapes; the first ``n_train`` subjects are for training.
    n_train, epochs, batch_size, lr
        Training subjects, passes through them, subjects in a batch, largest learning rate.
    seed
        Of the batches, which all models share, and the masks, which they do not.

    Raises
    ------
    ValueError
        If the three lists differ in length, ``latents`` do not fit the data, ``n_train`` exceeds the subjects,
        ``epochs`` is less than 1 or ``batch_size`` not between 1 and ``n_train``.
    """
    if not len(networks) == len(data) == len(latents):
        raise ValueError(
            "networks, data and latents must have one entry per model, "
            f"got {len(networks)}, {len(data)} and {len(latents)}"
        )
    for one, positions in zip(data, latents, strict=True):
        _check_latents(one, positions)
        if not 1 <= n_train <= len(one.outcome):
            raise ValueError(f"n_train must be between 1 and the number of subjects {len(one.outcome)}, got {n_train}")
    if epochs < 1 or not 1 <= batch_size <= n_train:
        raise ValueError(
            "epochs must be at least 1 and batch_size between 1 and n_train, "
            f"got {epochs=} and {batch_size=} for {n_train=}"
        )
    every = [_inputs(one, positions, range(n_train)) for one, positions in zip(data, latents, strict=True)]
    locations, region, covariates, positions = (
        torch.stack(leaves) for leaves in zip(*(e[:4] for e in every), strict=True)
    )
    outcome = torch.stack([one.outcome[:n_train] for one in data]).float()
    ensemble = training.Ensemble(networks)
    keep = ensemble.buffers["keep"]
    batches = training.minibatches(n_train, batch_size, torch.Generator().manual_seed(seed))
    generator = torch.Generator(outcome.device).manual_seed(seed)
    width = networks[0].width

    def loss(_: int) -> Float[Tensor, " members"]:
        batch = next(batches)
        effect_masks = dropout_masks(keep[:, None, None], (*locations.shape[:2], width), generator)
        u = positions[:, batch]
        node_masks = dropout_masks(keep[:, None, None, None], (*u.shape[:3], width), generator)
        images = ensemble.each(Inputs(locations, region, covariates[:, batch], u, effect_masks, node_masks))
        return (images - outcome[:, batch]).square().mean((1, 2))

    steps = epochs * (n_train // batch_size)
    training.fit(
        loss,
        ensemble.parameters.values(),
        steps=steps,
        lr=lr,
        optimizer=partial(torch.optim.AdamW, weight_decay=1e-4),
        schedule=partial(OneCycleLR, max_lr=lr, total_steps=steps + 1),
        record_every=steps,
    )
    return ensemble.members()


def _inputs(data: ImageData, latents: Tensor, index: Sequence[int]) -> Inputs:
    """The images and positions of some subjects, in the networks' single precision."""
    index = torch.as_tensor(index)
    return Inputs(data.locations.float(), data.region, data.covariates[index].float(), latents[index].float())


class McDraws(NamedTuple):
    """Draws of mean images, effect maps and node effects: one dropout mask each, shared by all places and subjects."""

    mean: Float[Tensor, "T m J"]
    effects: Float[Tensor, "T J P+1"]
    node_effect: Float[Tensor, "T m G"]


@torch.no_grad()
def mc_dropout(
    model: SpatialNetworkModel,
    data: ImageData,
    latents: Float[Tensor, "n G K"],
    index: Sequence[int],
    n_samples: int = 100,
    seed: int = 0,
) -> McDraws:
    """Monte Carlo dropout: draws of every part of the model for the subjects in ``index``.

    A draw uses one mask per layer for all locations, regions and subjects, so that it is one function.

    Parameters
    ----------
    model, data, latents
        A trained model, and the data and latent positions to draw for.
    index
        Numbers of the subjects.
    n_samples
        Number ``T`` of draws.
    seed
        Of the masks.

    Raises
    ------
    ValueError
        If ``n_samples`` is less than 2, which leaves no variance, or ``latents`` do not fit the data.
    """
    if n_samples < 2:
        raise ValueError(f"n_samples must be at least 2, got {n_samples}")
    _check_latents(data, latents)
    inputs = _inputs(data, latents, index)
    generator = torch.Generator(model.keep.device).manual_seed(seed)
    effects = model.effects(inputs.locations, dropout_masks(model.keep, (n_samples, 1, model.width), generator))
    nodes = model.node_effect(inputs.latents, dropout_masks(model.keep, (n_samples, 1, 1, model.width), generator))
    return McDraws(mean_image(inputs.covariates, effects, nodes, inputs.region), effects, nodes)


# --- intervals -------------------------------------------------------------------------------------------------------


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")


def normal_interval(
    mean: Float[Tensor, "*shape"], std: Float[Tensor, "*shape"], level: float = 0.95
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Ends of the central interval of normal distributions.

    Raises
    ------
    ValueError
        If ``level`` is not in (0, 1).
    """
    _check_level(level)
    half = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item() * std
    return mean - half, mean + half


def prediction_interval(
    draws: Float[Tensor, "T *shape"], noise_variance: float, level: float = 0.95
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Mean over draws, and the normal interval whose variance is that of the draws plus that of the noise.

    Raises
    ------
    ValueError
        If ``noise_variance`` is negative or ``level`` is not in (0, 1).
    """
    if not noise_variance >= 0:
        raise ValueError(f"noise_variance must not be negative, got {noise_variance}")
    mean = draws.mean(0)
    return mean, *normal_interval(mean, (draws.var(0) + noise_variance).sqrt(), level)


def effect_interval(
    draws: Float[Tensor, "T *shape"], level: float = 0.95
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Central quantiles over draws, for each entry.

    Raises
    ------
    ValueError
        If ``level`` is not in (0, 1).
    """
    _check_level(level)
    return torch.quantile(draws, (1 - level) / 2, dim=0), torch.quantile(draws, (1 + level) / 2, dim=0)


def interval_coverage(truth: Tensor, lower: Tensor, upper: Tensor) -> float:
    """Share of the entries of ``truth`` that lie inside their interval, ends included.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if not truth.shape == lower.shape == upper.shape:
        raise ValueError(
            "truth, lower and upper must have one shape, "
            f"got {tuple(truth.shape)}, {tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    return float(((lower <= truth) & (truth <= upper)).double().mean())


# --- the Bayesian baseline -------------------------------------------------------------------------------------------


def gaussian_basis(
    points: Float[Tensor, "*shape d"], centres: Float[Tensor, "k d"], length: float
) -> Float[Tensor, "*shape k"]:
    """``exp(-‖x - c‖² / (2 length²))`` for every centre ``c``; constant 1 for an infinite length."""
    squared = (points[..., None, :] - centres).square().sum(-1)
    return (-squared / (2 * length**2)).exp()


class BayesianSVC:
    """Bayesian regression with spatially varying coefficients ``β_p(s) = φ(s)ᵀ w_p`` in a basis of Gaussian bumps.

    The prior is ``w ~ N(0, I/a)``, the noise has precision ``b``; both maximise the evidence (MacKay 1992). In double
    precision.

    Parameters
    ----------
    n_basis, length
        The bumps ``φ`` have their centres on an ``n_basis`` x ``n_basis`` grid over the unit square, and this standard
        deviation. ``BayesianSVC(1, math.inf)`` has constant coefficients.
    latent_basis
        How the latent position of the location's region enters: not at all, by itself, or through ``"rbf"``: 40
        Gaussian bumps of length 0.8 at latent positions drawn from the training subjects.

    Raises
    ------
    ValueError
        If ``n_basis`` or ``length`` is not positive, or ``latent_basis`` is unknown.
    """

    def __init__(
        self, n_basis: int = 7, length: float = 0.18, latent_basis: Literal["linear", "rbf"] | None = None
    ) -> None:
        if n_basis < 1 or not length > 0:
            raise ValueError(f"n_basis and length must be positive, got {n_basis=}, {length=}")
        if latent_basis not in (None, "linear", "rbf"):
            raise ValueError(f"latent_basis must be None, 'linear' or 'rbf', got {latent_basis!r}")
        self.n_basis, self.length, self.latent_basis = n_basis, length, latent_basis

    def _check_fitted(self) -> None:
        if not hasattr(self, "m"):
            raise NotFittedError("the regression has no posterior yet; call fit first")

    def design(
        self, data: ImageData, latents: Float[Tensor, "n G K"], index: Sequence[int]
    ) -> Float[Tensor, "m*J features"]:
        """One row ``(φ, x_1 φ, ..., x_P φ, latent features)`` per subject and location."""
        index = torch.as_tensor(index)
        x = data.covariates[index]
        x = torch.cat([torch.ones_like(x[..., :1]), x], -1)
        features = [(x[..., None] * self._phi(data.locations)[:, None]).flatten(2)]
        if self.latent_basis:
            u = latents[index]
            u = u if self.latent_basis == "linear" else gaussian_basis(u, self.centres, 0.8)
            features.append(u[:, data.region])
        return torch.cat(features, -1).flatten(0, 1)

    def _phi(self, s: Tensor) -> Float[Tensor, "J basis"]:
        axis = torch.linspace(0, 1, self.n_basis).to(s)
        return gaussian_basis(s, torch.cartesian_prod(axis, axis), self.length)

    def fit(
        self, data: ImageData, latents: Float[Tensor, "n G K"], n_train: int, seed: int = 0, tol: float = 1e-10
    ) -> BayesianSVC:
        """Posterior ``N(m, C)`` of the weights from the first ``n_train`` subjects; ``seed`` draws the latent centres.

        The evidence is raised by MacKay's updates until ``a`` and ``b`` change by less than ``tol``, relatively.

        Raises
        ------
        ValueError
            If ``latents`` do not fit the data or ``n_train`` exceeds the subjects.
        """
        _check_latents(data, latents)
        if not 1 <= n_train <= len(latents):
            raise ValueError(f"n_train must be between 1 and the number of subjects {len(latents)}, got {n_train}")
        positions = latents[:n_train].flatten(0, 1)
        order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
        self.centres = positions[order[:40]]
        self._where = data.locations
        phi, y = self.design(data, latents, range(n_train)), data.outcome[:n_train].flatten()
        w, v = torch.linalg.eigh(phi.T @ phi)
        projected, energy, n = v.T @ (phi.T @ y), y @ y, len(y)
        a, b, change = 1.0, float(1 / y.var()), math.inf
        while change > tol:  # in the basis of eigenvectors, where the posterior is diagonal
            m = b * projected / (a + b * w)
            gamma = (b * w / (a + b * w)).sum()
            residual = energy - 2 * m @ projected + m @ (w * m)
            new_a, new_b = float(gamma / (m @ m)), float((n - gamma) / residual)
            change = max(abs(new_a / a - 1), abs(new_b / b - 1))
            a, b = new_a, new_b
        self.a, self.b = a, b
        self.m = v @ (b * projected / (a + b * w))
        self.C = v / (a + b * w) @ v.T
        return self

    def predict(
        self, data: ImageData, latents: Float[Tensor, "n G K"], index: Sequence[int]
    ) -> tuple[Float[Tensor, "m J"], Float[Tensor, "m J"]]:
        """Mean and standard deviation, noise included, of the outcome images of the subjects in ``index``.

        Raises
        ------
        NotFittedError
            If there is no posterior yet.
        """
        self._check_fitted()
        phi = self.design(data, latents, index)
        std = ((phi @ self.C * phi).sum(1) + 1 / self.b).sqrt()
        shape = (len(index), len(data.locations))
        return (phi @ self.m).view(shape), std.view(shape)

    def effect_map(self, p: int) -> tuple[Float[Tensor, " J"], Float[Tensor, " J"]]:
        """Posterior mean and standard deviation of ``β_p`` at the locations of the training data.

        Raises
        ------
        NotFittedError
            If there is no posterior yet.
        """
        self._check_fitted()
        phi = self._phi(self._where)
        block = slice(p * phi.shape[1], (p + 1) * phi.shape[1])
        return phi @ self.m[block], (phi @ self.C[block, block] * phi).sum(1).sqrt()
