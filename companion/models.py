"""Networks that several tutorials share, with initial weights from the generator that is handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn


def initialised(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """The layer with PyTorch's default weights, uniform in ±1/sqrt(fan-in), drawn from ``generator``."""
    limit = layer.weight[0].numel() ** -0.5
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -limit, limit, generator=generator)
    return layer


def mlp(
    sizes: Sequence[int],
    *,
    generator: torch.Generator,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """A fully connected network with ``len(sizes) - 1`` linear layers.

    Parameters
    ----------
    sizes
        Width of every layer of neurons, input and output included.
    generator
        Source of the initial weights, uniform in ±1/sqrt(fan-in).
    activation
        Makes the module between two linear layers; None gives a deep *linear* network.
    bias
        Whether the linear layers have a bias.
    dtype
        Type of the parameters.

    Raises
    ------
    ValueError
        If there are fewer than two sizes, or one is not positive.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must hold at least two positive widths, got {list(sizes)}")
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        linear = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias, dtype=dtype)
        layers += [initialised(linear, generator), *([activation()] if activation else [])]
    return nn.Sequential(*layers[: -1 if activation else None])


def _convolution(
    n_in: int, n_out: int, size: int, generator: torch.Generator, *, stride: int = 1, bias: bool = True
) -> nn.Module:
    layer = nn.utils.skip_init(nn.Conv2d, n_in, n_out, size, stride=stride, padding=size // 2, bias=bias)
    return initialised(layer, generator)


def convnet(
    in_channels: int,
    widths: Sequence[int],
    n_out: int,
    *,
    generator: torch.Generator,
    convolutions: Sequence[int] | None = None,
) -> nn.Sequential:
    """A convolutional network: stages of 3x3 convolutions with ReLU and a 2x2 max-pooling, average, linear layer.

    Maps images (n, in_channels, height, width) to (n, n_out); each stage halves height and width.

    Parameters
    ----------
    in_channels, n_out
        Channels of the images, and number of outputs.
    widths
        Channels of every stage. With ``(64, 128, 256, 512, 512)`` and ``convolutions=(2, 2, 3, 3, 3)`` it is VGG-16
        for images of 32x32.
    convolutions
        Number of convolutions of every stage; None is one each.

    Raises
    ------
    ValueError
        If ``widths`` is empty, a number is not positive, or ``convolutions`` and ``widths`` differ in length.
    """
    if not widths or min(in_channels, n_out, *widths) < 1:
        raise ValueError(
            f"channels must be positive, got in_channels={in_channels}, widths={list(widths)}, n_out={n_out}"
        )
    convolutions = [1] * len(widths) if convolutions is None else convolutions
    if len(convolutions) != len(widths) or min(convolutions) < 1:
        raise ValueError(f"convolutions must hold a positive number for each stage, got {list(convolutions)}")
    layers: list[nn.Module] = []
    for n_in, width, count in zip([in_channels, *widths], widths, convolutions, strict=False):
        for k in range(count):
            layers += [_convolution(width if k else n_in, width, 3, generator), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    head = nn.utils.skip_init(nn.Linear, widths[-1], n_out)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), initialised(head, generator))


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around them, which is a 1x1 convolution where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int, norm: bool, generator: torch.Generator) -> None:
        super().__init__()

        def convolution(n_in: int, size: int, stride: int) -> nn.Module:
            layer = _convolution(n_in, n_out, size, generator, stride=stride, bias=not norm)
            return nn.Sequential(layer, nn.BatchNorm2d(n_out)) if norm else layer

        # ReLU modules of their own: who reads activations with hooks finds each of them once.
        self.first, self.second = convolution(n_in, 3, stride), convolution(n_out, 3, 1)
        self.relus = nn.ModuleList([nn.ReLU(), nn.ReLU()])
        self.shortcut = nn.Identity() if stride == 1 and n_in == n_out else convolution(n_in, 1, stride)

    def forward(self, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n out h2 w2"]:
        return self.relus[1](self.second(self.relus[0](self.first(x))) + self.shortcut(x))


def resnet(
    in_channels: int,
    widths: Sequence[int],
    blocks: int,
    n_out: int,
    *,
    generator: torch.Generator,
    norm: bool = True,
) -> nn.Sequential:
    """A residual network for small images: a 3x3 convolution, stages of ``blocks`` residual blocks, a linear layer.

    Maps images (n, in_channels, height, width) to (n, n_out). Every stage but the first halves height and width.
    ``widths=(16, 32, 64), blocks=3`` is ResNet-20, ``widths=(64, 128, 256, 512), blocks=2`` is ResNet-18 for images of
    32x32, both with 1x1 convolutions as shortcuts where the shape changes.

    Parameters
    ----------
    in_channels, n_out
        Channels of the images, and number of outputs.
    widths, blocks
        Channels of every stage, and residual blocks in each.
    generator
        Source of the initial weights, uniform in ±1/sqrt(fan-in).
    norm
        Whether a batch normalisation follows each convolution; without it the convolutions have a bias.

    Raises
    ------
    ValueError
        If ``widths`` is empty or a number is not positive.

    Source: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016.
    """
    if not widths or min(in_channels, n_out, blocks, *widths) < 1:
        raise ValueError(
            "channels and blocks must be positive, "
            f"got in_channels={in_channels}, widths={list(widths)}, blocks={blocks}, n_out={n_out}"
        )
    stem = _convolution(in_channels, widths[0], 3, generator, bias=not norm)
    layers: list[nn.Module] = [stem, *([nn.BatchNorm2d(widths[0])] if norm else []), nn.ReLU()]
    n_in = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(_Block(n_in, width, 2 if stage and not block else 1, norm, generator))
            n_in = width
    head = nn.utils.skip_init(nn.Linear, n_in, n_out)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), initialised(head, generator))
