"""Networks that several tutorials share, with initial weights from the generator that is handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn


def _initialised(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> nn.Module:
    """PyTorch's default initialisation, uniform in ±1/sqrt(fan-in), drawn from ``generator``."""
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
        layers += [_initialised(linear, generator), *([activation()] if activation else [])]
    return nn.Sequential(*layers[: -1 if activation else None])


def convnet(in_channels: int, widths: Sequence[int], n_out: int, *, generator: torch.Generator) -> nn.Sequential:
    """A small convolutional network: 3x3 convolutions with ReLU and 2x2 max-pooling, global average, linear layer.

    Maps images (n, in_channels, height, width) to (n, n_out); each entry of ``widths`` halves height and width.

    Raises
    ------
    ValueError
        If ``widths`` is empty or a number of channels is not positive.
    """
    if not widths or min(in_channels, n_out, *widths) < 1:
        raise ValueError(
            f"channels must be positive, got in_channels={in_channels}, widths={list(widths)}, n_out={n_out}"
        )
    layers: list[nn.Module] = []
    for n_in, width in pairwise([in_channels, *widths]):
        convolution = nn.utils.skip_init(nn.Conv2d, n_in, width, 3, padding=1)
        layers += [_initialised(convolution, generator), nn.ReLU(), nn.MaxPool2d(2)]
    head = nn.utils.skip_init(nn.Linear, widths[-1], n_out)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), _initialised(head, generator))
