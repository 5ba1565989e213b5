"""Prototype networks: a classifier that decides by distances to learned cases, and can draw those cases.

Li, Liu, Chen and Rudin, "Deep Learning for Case-Based Reasoning through Prototypes: A Neural Network that Explains Its
Predictions", AAAI 2018 (arXiv 1710.04806). Details of the protocol follow the authors' code, PrototypeDL.

An encoder ``f`` maps an image ``x`` in [0, 1] to a code ``z``, a decoder ``g`` maps codes back to images. The logits
are a linear map ``W``, without bias, of the squared distances between ``z`` and the prototypes ``p_1 ... p_m``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from companion import models, training

Images = Float[Tensor, "n channels height width"]
_TERMS = ("classification", "autoencoder", "r1", "r2")


def squared_distances(z: Float[Tensor, "n q"], prototypes: Float[Tensor, "m q"]) -> Float[Tensor, "n m"]:
    """Squared Euclidean distances between all codes and all prototypes.

    Raises
    ------
    ValueError
        If one is no matrix, or their numbers of columns differ.
    """
    if z.ndim != 2 or prototypes.ndim != 2 or z.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"z and prototypes must be (n, q) and (m, q), got {tuple(z.shape)} and {tuple(prototypes.shape)}"
        )
    squares = z.square().sum(1)[:, None] + prototypes.square().sum(1) - 2 * z @ prototypes.mT
    return squares.clamp_min(0)  # rounding can take a distance of zero below it


def mlp_autoencoder(
    image_shape: tuple[int, int, int], hidden: int, latent: int, generator: torch.Generator
) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder with one hidden layer each: ReLU between layers, linear codes, pixels through a sigmoid.

    Raises
    ------
    ValueError
        If a size is not positive.
    """
    pixels = image_shape[0] * image_shape[1] * image_shape[2]
    encoder = models.mlp([pixels, hidden, latent], generator=generator)
    decoder = models.mlp([latent, hidden, pixels], generator=generator)
    return (
        nn.Sequential(nn.Flatten(), *encoder),
        nn.Sequential(*decoder, nn.Sigmoid(), nn.Unflatten(1, image_shape)),
    )


def conv_autoencoder(
    image_shape: tuple[int, int, int], generator: torch.Generator, widths: Sequence[int] = (32, 32, 32, 10)
) -> tuple[nn.Sequential, nn.Sequential]:
    """The paper's encoder and decoder: 3x3 convolutions of stride 2 and their transposes, ReLU between layers.

    Every layer halves height and width, rounded up: an image of 28x28 gets a code of 2x2x10 = 40 numbers.

    Parameters
    ----------
    image_shape
        Channels, height and width.
    generator
        Source of the initial weights, uniform in ±1/sqrt(fan-in), PyTorch's default.
    widths
        Maps of each layer of the encoder; the decoder runs through them backwards.

    Raises
    ------
    ValueError
        If ``widths`` is empty or a size is not positive.
    """
    if not widths or min(*image_shape, *widths) < 1:
        raise ValueError(f"image_shape and widths must be positive, got {image_shape} and {list(widths)}")
    sizes = [image_shape[1:]]
    for _ in widths:
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    down, up = [], []
    for (n_in, n_out), (large, small) in zip(pairwise([image_shape[0], *widths]), pairwise(sizes), strict=True):
        options = dict(kernel_size=3, stride=2, padding=1)
        missing = tuple(big - (2 * little - 1) for big, little in zip(large, small, strict=True))
        down += [nn.utils.skip_init(nn.Conv2d, n_in, n_out, **options), nn.ReLU()]
        back = nn.utils.skip_init(nn.ConvTranspose2d, n_out, n_in, **options, output_padding=missing)
        up = [back, nn.ReLU(), *up]
    for layer in (*down[::2], *up[::2]):
        models.initialised(layer, generator)
    code_shape = (widths[-1], *sizes[-1])
    return (
        nn.Sequential(*down[:-1], nn.Flatten()),
        nn.Sequential(nn.Unflatten(1, code_shape), *up[:-1], nn.Sigmoid()),
    )


class PrototypeOutput(NamedTuple):
    """What a prototype network computes for a batch of images; a stack of networks adds leading axes."""

    logits: Float[Tensor, "*members n classes"]
    reconstruction: Float[Tensor, "*members n channels height width"]
    distances: Float[Tensor, "*members n m"]


class PrototypeNetwork(nn.Module):
    """An autoencoder with a prototype layer, and a linear layer from squared distances to logits.

    Parameters
    ----------
    encoder, decoder
        Modules from images to codes (n, q) and back.
    image_shape
        Channels, height and width of an image.
    n_prototypes, n_classes
        Numbers ``m`` and ``C``.
    generator
        Source of the initial prototypes (normal, standard deviation 1/2) and of ``W`` (uniform in [0, 1]).

    Raises
    ------
    ValueError
        If a number is not positive.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        image_shape: tuple[int, int, int],
        n_prototypes: int = 15,
        n_classes: int = 10,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if n_prototypes < 1 or n_classes < 1:
            raise ValueError(f"n_prototypes and n_classes must be positive, got {n_prototypes} and {n_classes}")
        with torch.no_grad():
            latent = encoder(torch.zeros(1, *image_shape)).shape[1]
        self.encoder, self.decoder = encoder, decoder
        self.prototypes = nn.Parameter(torch.randn(n_prototypes, latent, generator=generator) / 2)
        self.weight = nn.Parameter(torch.rand(n_prototypes, n_classes, generator=generator))

    def forward(self, x: Images) -> PrototypeOutput:
        z = self.encoder(x)
        distances = squared_distances(z, self.prototypes)
        return PrototypeOutput(distances @ self.weight, self.decoder(z), distances)

    @torch.no_grad()
    def prototype_images(self) -> Float[Tensor, "m channels height width"]:
        """The prototypes, decoded."""
        return self.decoder(self.prototypes)

    @torch.no_grad()
    def centred_weight(self) -> Float[Tensor, "m classes"]:
        """``W`` with the mean of each row removed, which changes no probability."""
        return self.weight - self.weight.mean(1, keepdim=True)

    def prototype_classes(self) -> Int[Tensor, " m"]:
        """The class whose logit a prototype supports most when it is near: the most negative entry of its row."""
        return self.centred_weight().argmin(1)


def cross_entropy(
    logits: Float[Tensor, "*members n classes"], y: Int[Tensor, "*members n"]
) -> Float[Tensor, "*members"]:
    """Mean cross-entropy over the samples, one value for each member."""
    return -logits.log_softmax(-1).gather(-1, y[..., None]).mean((-2, -1))


def prototype_loss(
    output: PrototypeOutput,
    x: Float[Tensor, "*members n channels height width"],
    y: Int[Tensor, "*members n"],
    weights: Sequence[float] | Float[Tensor, "*members 4"] = (20, 1, 5, 5),
) -> tuple[Float[Tensor, "*members"], dict[str, Float[Tensor, "*members"]]]:
    """The paper's objective: its weighted sum, and its four terms.

    ``classification`` is the mean cross-entropy ``E``; ``autoencoder`` the squared error ``R``, summed over pixels and
    averaged over images; ``r1`` the mean over prototypes of the squared distance to the nearest code; ``r2`` the mean
    over codes of the squared distance to the nearest prototype.

    Parameters
    ----------
    output
        What the network computes for ``x``.
    x, y
        Images and their labels.
    weights
        Weights of the four terms, in this order, not negative; one row for each member of a stack of networks.

    Raises
    ------
    ValueError
        If ``weights`` does not hold four finite numbers, none negative, or ``x`` is not of the reconstruction's shape.

    Notes
    -----
    Source: the paper's section on the cost function.
    """
    weights = torch.as_tensor(weights, dtype=x.dtype, device=x.device)
    if weights.shape[-1:] != (4,) or not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError(f"weights must hold four finite numbers, none negative, got {weights.tolist()}")
    if x.shape != output.reconstruction.shape:
        raise ValueError(f"x must have shape {tuple(output.reconstruction.shape)}, got {tuple(x.shape)}")
    terms = (
        cross_entropy(output.logits, y),
        (output.reconstruction - x).square().sum((-3, -2, -1)).mean(-1),
        output.distances.amin(-2).mean(-1),
        output.distances.amin(-1).mean(-1),
    )
    return (weights * torch.stack(terms, -1)).sum(-1), dict(zip(_TERMS, terms, strict=True))


def _smoothing_matrix(size: int, sigma: float, like: Tensor) -> Float[Tensor, "size size"]:
    """Convolution with a Gaussian, cut off at four standard deviations, on a line with zeros at both ends."""
    radius = int(4 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).to(like) / sigma) ** 2)
    offset = (torch.arange(size)[:, None] - torch.arange(size)).abs().to(like.device)
    return torch.where(offset <= radius, (kernel / kernel.sum())[(offset + radius).clamp_max(2 * radius)], 0)


def elastic_transform(
    images: Float[Tensor, "*batch channels height width"], sigma: float, alpha: float, generator: torch.Generator
) -> Float[Tensor, "*batch channels height width"]:
    """Deform each image by a smooth random field: uniform noise in [-1, 1], smoothed by a Gaussian, times ``alpha``.

    Pixels are interpolated linearly; what comes from outside the image is 0.

    Parameters
    ----------
    images
        Images, with sides of at least two pixels.
    sigma, alpha
        Standard deviation of the Gaussian, and scale of the displacement, both in pixels.
    generator
        Source of the noise, on the device of ``images``.

    Raises
    ------
    ValueError
        If ``images`` has fewer than four axes or a side of one pixel, ``sigma`` is not positive or ``alpha`` negative.

    Notes
    -----
    Source: Simard, Steinkraus and Platt, 2003, as in the authors' code (sigma 4, alpha 20 for 28x28 pixels).
    """
    if images.ndim < 4 or min(images.shape[-2:]) < 2:
        raise ValueError(f"images must be (..., channels, height, width), got shape {tuple(images.shape)}")
    if not sigma > 0 or not alpha >= 0:
        raise ValueError(f"sigma must be positive and alpha not negative, got {sigma=} and {alpha=}")
    flat = images.flatten(0, -4)
    height, width = flat.shape[-2:]
    noise = 2 * torch.rand(len(flat), 2, height, width, generator=generator, device=flat.device) - 1
    rows, columns = (_smoothing_matrix(side, sigma, flat) for side in (height, width))
    down, right = (alpha * rows @ noise.to(flat) @ columns.mT).unbind(1)
    y, x = down + torch.arange(height).to(flat)[:, None], right + torch.arange(width).to(flat)
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return (F.grid_sample(flat, grid, align_corners=True) * inside[:, None]).view_as(images)


def train_networks(
    networks: Sequence[nn.Module],
    loss: Callable[[PrototypeOutput | Tensor, Tensor, Tensor], Float[Tensor, " members"]],
    x: Float[Tensor, "seeds n channels height width"],
    y: Int[Tensor, "seeds n"],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    augment: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    record_every: int,
) -> tuple[list[nn.Module], training.History]:
    """Train networks of one architecture side by side, with Adam and a learning rate that falls to 0 along a cosine.

    Network ``k`` learns from data set ``k % seeds``. Networks that share a data set see the same deformed images in
    the same order, so that two of them differ in nothing but their initial weights and their loss.

    Parameters
    ----------
    networks
        Initial networks, a multiple of ``seeds``; not modified.
    loss
        Called with the stacked outputs, images and labels of a batch; returns one loss per network.
    x, y
        Images and labels of each seed.
    epochs, batch_size, lr
        Passes over the data, images in a batch, initial learning rate.
    augment
        Called with each batch (seeds, batch, channels, height, width).
    generator
        Source of the order of the images, on the CPU.
    record_every
        Epochs between two records of the parameters.

    Returns
    -------
    networks, history
        The trained networks, and ``history[name]`` of shape (records, members, ...) for every parameter.

    Raises
    ------
    ValueError
        If the number of networks is no multiple of ``seeds``, ``epochs`` or ``record_every`` is not positive, a
        data set has fewer images than a batch, ``x`` is not finite, or ``x`` and ``y`` do not fit together.
    """
    if x.shape[:2] != y.shape or not x.isfinite().all():
        raise ValueError(f"x must be finite and start with the axes of y, got {tuple(x.shape)} and {tuple(y.shape)}")
    seeds, n = y.shape
    if not networks or len(networks) % seeds:
        raise ValueError(f"networks must be a multiple of the {seeds} data sets, got {len(networks)}")
    if epochs < 1 or record_every < 1:
        raise ValueError(f"epochs and record_every must be positive, got {epochs=} and {record_every=}")
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be between 1 and the {n} images of a data set, got {batch_size}")
    ensemble = training.Ensemble(networks)
    order = [training.minibatches(n, batch_size, generator) for _ in range(seeds)]
    data_set = torch.arange(seeds, device=x.device)[:, None]
    learner = torch.arange(len(networks), device=x.device) % seeds

    def step_loss(_: int) -> Float[Tensor, " members"]:
        rows = torch.stack([next(stream) for stream in order]).to(x.device)
        batch, labels = augment(x[data_set, rows])[learner], y[data_set, rows][learner]
        return loss(ensemble.each(batch), batch, labels)

    history = training.fit(
        step_loss,
        ensemble.parameters.values(),
        steps=epochs * (n // batch_size),
        lr=lr,
        optimizer=partial(torch.optim.Adam, fused=True),
        cosine_to=0.0,
        record=lambda: {name: value.detach().clone() for name, value in ensemble.parameters.items()},
        record_every=record_every * (n // batch_size),
    )
    return ensemble.members(), history


class Explanation(NamedTuple):
    """A decision about one image, as the network computes it."""

    prediction: int
    distances: Float[Tensor, " m"]
    contributions: Float[Tensor, "m classes"]  # of every prototype to every logit: their sum over m is the logits
    prototypes: Float[Tensor, "m channels height width"]


@torch.no_grad()
def explain(network: PrototypeNetwork, x: Float[Tensor, "channels height width"]) -> Explanation:
    """Take the decision about one image apart: the logit of class c is the sum over j of ``D_j W_jc``.

    Raises
    ------
    ValueError
        If ``x`` is not one finite image.
    """
    if x.ndim != 3 or not x.isfinite().all():
        raise ValueError(f"x must be one finite image (channels, height, width), got shape {tuple(x.shape)}")
    output = network(x[None])
    contributions = output.distances[0, :, None] * network.weight
    return Explanation(int(output.logits.argmax()), output.distances[0], contributions, network.prototype_images())


def nearest_images(
    images: Images, x_train: Float[Tensor, "n_train channels height width"]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Euclidean distance, over pixels in [0, 1], from each image to the nearest training image, and its index.

    Raises
    ------
    ValueError
        If the shapes of the images differ.
    """
    if images.shape[1:] != x_train.shape[1:]:
        raise ValueError(f"images must be of shape {tuple(x_train.shape[1:])}, got {tuple(images.shape[1:])}")
    return tuple(torch.cdist(images.flatten(1), x_train.flatten(1)).min(1))


@torch.no_grad()
def prototype_quality(
    network: PrototypeNetwork, x_train: Float[Tensor, "n_train channels height width"]
) -> dict[str, float]:
    """How well prototypes and data are tied together, on the whole training set.

    ``r1_normalised`` and ``r2_normalised`` are R1 and R2 divided by the variance of the codes (mean squared distance
    from their mean); ``pixel_nn`` is the mean distance from a decoded prototype to the nearest training image.

    Raises
    ------
    ValueError
        If ``x_train`` holds no images or is not finite.
    """
    if x_train.ndim != 4 or not len(x_train) or not x_train.isfinite().all():
        raise ValueError(f"x_train must hold finite images, got shape {tuple(x_train.shape)}")
    z = network.encoder(x_train)
    distances, variance = squared_distances(z, network.prototypes), (z - z.mean(0)).square().sum(1).mean()
    return {
        "r1_normalised": float(distances.amin(0).mean() / variance),
        "r2_normalised": float(distances.amin(1).mean() / variance),
        "pixel_nn": float(nearest_images(network.prototype_images(), x_train)[0].mean()),
    }
