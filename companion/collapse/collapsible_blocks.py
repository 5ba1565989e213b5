"""Collapsible linear blocks: train a wide linear block, run the narrow convolution that it equals; super-resolution.

Bhardwaj et al., "Collapsible Linear Blocks for Super-Efficient Super Resolution", MLSys 2022 (arXiv 2103.09404).
Network, training and the count of operations follow the authors' code (github.com/ARM-software/sesr).

A linear block maps ``c`` to ``r`` channels with a k x k convolution (weights ``A``, biases ``a``), then to ``o``
channels with a 1 x 1 convolution (``B``, ``b``). Nothing stands between the two, so that both together are one k x k
convolution with weights ``W`` and biases ``beta``. Images are grey, with values in [0, 1].
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from companion import models, training

Pairs = list[tuple[Float[Tensor, "n 1 h w"], Float[Tensor, "n 1 sh sw"]]]  # batches: small images, true large ones


# --- the block --------------------------------------------------------------------------------------------------------


def collapse_linear_block(
    expand_weight: Float[Tensor, "r c k k"],
    expand_bias: Float[Tensor, " r"],
    project_weight: Float[Tensor, "o r"],
    project_bias: Float[Tensor, " o"],
    residual: bool = False,
) -> tuple[Float[Tensor, "o c k k"], Float[Tensor, " o"]]:
    """The one convolution that a linear block equals, everywhere up to the border; differentiable.

    Parameters
    ----------
    expand_weight, expand_bias
        ``A`` and ``a`` of the k x k convolution, which pads its input with zeros to keep the size; k is odd.
    project_weight, project_bias
        ``B`` and ``b`` of the 1 x 1 convolution.
    residual
        Whether the block's input is added to its output; then o = c.

    Returns
    -------
    W, beta
        ``W = B A`` (sum over the r channels between), plus 1 in the centre of the kernels from a channel to itself
        with ``residual``; ``beta = B a + b``.

    Raises
    ------
    ValueError
        If shapes do not fit, the kernel is not square and odd, or a residual meets c != o.

    Notes
    -----
    Source: the paper's Algorithms 1 and 2 (collapse of the block, collapse of the residual), as one sum.
    """
    r, c, k, width = expand_weight.shape
    o = len(project_weight)
    if k != width or k % 2 == 0:
        raise ValueError(f"expand_weight must have square kernels of odd size, got {k} x {width}")
    if project_weight.shape != (o, r) or expand_bias.shape != (r,) or project_bias.shape != (o,):
        raise ValueError(
            f"with {r} channels between, the shapes of expand_bias, project_weight and project_bias must be ({r},), "
            f"(o, {r}) and (o,), got {[tuple(v.shape) for v in (expand_bias, project_weight, project_bias)]}"
        )
    if residual and c != o:
        raise ValueError(f"residual=True needs as many output as input channels, got {c} in and {o} out")
    weight = torch.einsum("or,rckl->ockl", project_weight, expand_weight)
    if residual:
        centre = F.pad(weight.new_ones(1, 1), [k // 2] * 4)
        weight = weight + torch.eye(c, dtype=weight.dtype, device=weight.device)[:, :, None, None] * centre
    return weight, project_weight @ expand_bias + project_bias


def collapse_by_probing(convs: Sequence[nn.Conv2d]) -> Float[Tensor, "o c k k"]:
    """The weights of one convolution that equals a chain of them, found by feeding it unit impulses; differentiable.

    Biases and padding of the chain are ignored. With ``same`` padding the chain is that one convolution up to the
    border if only its first kernels are larger than 1 x 1, and inside the image in any case. Kernels of sizes ``k_i``
    give one of size ``sum(k_i - 1) + 1``.

    Raises
    ------
    ValueError
        If ``convs`` is empty, its channels do not fit, or a stride, dilation or number of groups is not 1.

    Notes
    -----
    Source: the paper's Algorithm 1.
    """
    if not convs:
        raise ValueError("convs is empty; a chain needs at least one convolution")
    for before, after in pairwise(convs):
        if before.out_channels != after.in_channels:
            raise ValueError(f"convs must fit together, got {before.out_channels} channels into {after.in_channels}")
    for conv in convs:
        if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.groups != 1:
            raise ValueError(f"convs must have stride, dilation and groups 1, got {conv}")
    height, width = (sum(conv.kernel_size[axis] - 1 for conv in convs) for axis in (0, 1))
    first = convs[0].weight
    impulses = torch.eye(convs[0].in_channels, dtype=first.dtype, device=first.device)[:, :, None, None]
    response = F.pad(impulses, [width, width, height, height])
    for conv in convs:
        response = F.conv2d(response, conv.weight)
    return response.flip(2, 3).transpose(0, 1)  # "convolution" slides the kernel unflipped; an impulse shows it flipped


def collapsed_gradient(
    expand_weight: Float[Tensor, "r c k k"],
    expand_bias: Float[Tensor, " r"],
    project_weight: Float[Tensor, "o r"],
    weight_gradient: Float[Tensor, "o c k k"],
    bias_gradient: Float[Tensor, " o"],
) -> Float[Tensor, "o c k k"]:
    """What stands in for the gradient ``G`` of ``W`` when gradient descent moves ``A``, ``a``, ``B`` and ``b`` instead.

    A step of length ``lr`` changes ``W`` by ``-lr`` times this, up to terms of order ``lr²``:
    ``B Bᵀ G + G <A, A> + g (a · A)``, with the gradient ``g`` of ``beta``. A residual is constant and changes nothing.

    Notes
    -----
    Source: the paper's theory treats one scalar weight; this is the same first-order expansion for a block.
    """
    on_project = torch.einsum("ockl,rckl->or", weight_gradient, expand_weight) + torch.outer(bias_gradient, expand_bias)
    on_expand = torch.einsum("or,ockl->rckl", project_weight, weight_gradient)
    return torch.einsum("or,rckl->ockl", on_project, expand_weight) + torch.einsum(
        "or,rckl->ockl", project_weight, on_expand
    )


class CollapsibleLinearBlock(nn.Module):
    """A k x k convolution to ``expansion`` channels and a 1 x 1 convolution back, with an optional short residual.

    Parameters
    ----------
    in_channels, out_channels, kernel_size
        Those of the narrow convolution that the block collapses to.
    expansion
        Number r of channels between the two. None gives the baseline, an ordinary convolution: r = o, with the second
        convolution fixed to the identity.
    residual
        Whether the input is added to the output.
    mode
        How ``forward`` computes: ``"expanded"`` runs both convolutions, ``"collapsed"`` one, with weights that it
        collapses on every call. Outputs and gradients are the same. May be changed at any time.
    generator
        Source of the initial weights and biases, uniform in ±1/sqrt(fan-in).

    Raises
    ------
    ValueError
        If a number of channels is not positive, ``kernel_size`` is even, ``mode`` is unknown, or a residual meets
        different numbers of channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        expansion: int | None = 256,
        residual: bool = False,
        mode: str = "collapsed",
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        r = out_channels if expansion is None else expansion
        if min(in_channels, out_channels, r) < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                "channels must be positive and kernel_size odd, "
                f"got {in_channels=}, {out_channels=}, {expansion=}, {kernel_size=}"
            )
        if mode not in ("collapsed", "expanded"):
            raise ValueError(f"mode must be 'collapsed' or 'expanded', got {mode!r}")
        if residual and in_channels != out_channels:
            raise ValueError(f"residual=True needs equal numbers of channels, got {in_channels=}, {out_channels=}")
        expand = nn.utils.skip_init(nn.Conv2d, in_channels, r, kernel_size, padding=kernel_size // 2)
        project = nn.utils.skip_init(nn.Conv2d, r, out_channels, 1)
        self.expand, self.project = (models.initialised(conv, generator) for conv in (expand, project))
        self.expansion, self.residual, self.mode = expansion, residual, mode
        if expansion is None:
            nn.init.dirac_(self.project.weight)
            nn.init.zeros_(self.project.bias)
            self.project.requires_grad_(False)

    def kernel(self) -> tuple[Float[Tensor, "o c k k"], Float[Tensor, " o"]]:
        """Collapsed weights and biases, as :func:`collapse_linear_block` gives them."""
        expand, project = self.expand, self.project
        return collapse_linear_block(expand.weight, expand.bias, project.weight.flatten(1), project.bias, self.residual)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h w"]:
        if self.mode == "collapsed":
            return F.conv2d(x, *self.kernel(), padding=self.expand.padding)
        y = self.project(self.expand(x))
        return y + x if self.residual else y

    def to_conv(self) -> nn.Conv2d:
        """An ordinary convolution with a copy of the collapsed weights."""
        weight, bias = self.kernel()
        o, c, k, _ = weight.shape
        conv = nn.utils.skip_init(nn.Conv2d, c, o, k, padding=k // 2, dtype=weight.dtype, device=weight.device)
        conv.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        return conv


# --- the network ------------------------------------------------------------------------------------------------------


def _convolutions(features: int, blocks: int, scale: int) -> list[tuple[int, int, int]]:
    """Input channels, output channels and kernel size of every convolution of the collapsed network."""
    if min(features, blocks, scale) < 1:
        raise ValueError(f"features, blocks and scale must be positive, got {features=}, {blocks=}, {scale=}")
    return [(1, features, 5), *[(features, features, 3)] * blocks, (features, scale**2, 5)]


class SESR(nn.Module):
    """The super-resolution network SESR-M: a 5 x 5 block, m blocks of 3 x 3 with PReLU, a 5 x 5 block, depth-to-space.

    Maps grey images (n, 1, h, w) to (n, 1, s h, s w). Two long residuals lead from the first block to the input of the
    last, and from the image to the output. Values may leave [0, 1]; clamp before judging.

    Parameters
    ----------
    features, blocks, expansion, scale
        Channels f, number m of 3 x 3 blocks, channels r inside every block (None: ordinary convolutions), factor s.
    short_residual
        Whether the 3 x 3 blocks have their residual.
    mode
        Of all blocks, see :class:`CollapsibleLinearBlock`.
    generator
        Source of the initial weights.

    Raises
    ------
    ValueError
        If a size is not positive, or ``mode`` is unknown.

    Notes
    -----
    Source: the paper's Figure of the architecture and the authors' ``models/sesr.py``. For s = 4 these use two
    depth-to-space operations; that is one of factor 4 with the channels in another order.
    """

    def __init__(
        self,
        features: int = 16,
        blocks: int = 5,
        expansion: int | None = 256,
        scale: int = 2,
        short_residual: bool = True,
        mode: str = "collapsed",
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.scale = scale
        shapes = _convolutions(features, blocks, scale)
        residual = [False, *[short_residual] * blocks, False]
        self.blocks = nn.ModuleList(
            CollapsibleLinearBlock(*shape, expansion, short, mode, generator=generator)
            for shape, short in zip(shapes, residual, strict=True)
        )
        self.activations = nn.ModuleList(nn.PReLU(features) for _ in range(blocks))

    def forward(self, x: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n 1 sh sw"]:
        head, *body, tail = self.blocks
        first = h = head(x - 0.5)
        for block, activation in zip(body, self.activations, strict=True):
            h = activation(block(h))
        return F.pixel_shuffle(tail(h + first) + x, self.scale)

    def rescale(self, scale: int, generator: torch.Generator) -> SESR:
        """A network for another factor: a copy with a new last block, which alone depends on the factor.

        Raises
        ------
        ValueError
            If ``scale`` is not positive.

        Notes
        -----
        Source: the paper trains its networks for a factor of 4 from those for 2.
        """
        other = copy.deepcopy(self)
        last = self.blocks[-1]
        *_, shape = _convolutions(len(self.activations[0].weight), len(self.activations), scale)
        other.scale = scale
        other.blocks[-1] = CollapsibleLinearBlock(*shape, last.expansion, mode=last.mode, generator=generator).to(
            last.expand.weight
        )
        return other

    def collapse(self) -> SESR:
        """The network for inference: a copy in which every block is an ordinary convolution."""
        narrow = copy.deepcopy(self)
        narrow.blocks = nn.ModuleList(block.to_conv() for block in self.blocks)
        return narrow


def count_parameters(features: int, blocks: int, scale: int) -> int:
    """Weights of the collapsed network, ``25 f + 9 m f² + 25 f s²``; biases and PReLU slopes not counted.

    Raises
    ------
    ValueError
        If a size is not positive.
    """
    return sum(c * o * k**2 for c, o, k in _convolutions(features, blocks, scale))


def count_macs(height: int, width: int, features: int, blocks: int, scale: int) -> int:
    """Multiply-accumulate operations of the collapsed network for one ``height`` x ``width`` image that goes *in*.

    Raises
    ------
    ValueError
        If a size is not positive.
    """
    if min(height, width) < 1:
        raise ValueError(f"height and width must be positive, got {height} x {width}")
    return height * width * count_parameters(features, blocks, scale)


def training_macs(batch: int, patch: int, features: int, blocks: int, scale: int, expansion: int, mode: str) -> int:
    """Multiply-accumulate operations of one forward pass in training.

    In the collapsed mode they include the collapse by probing as the paper does it: c impulses a block, and an output
    of k x k pixels for each.

    Parameters
    ----------
    batch, patch
        Number of images, and their height and width in pixels before the enlargement.
    features, blocks, scale, expansion, mode
        As for :class:`SESR`.

    Raises
    ------
    ValueError
        If a size is not positive, or ``mode`` is unknown.
    """
    if min(batch, patch, expansion) < 1:
        raise ValueError(f"batch, patch and expansion must be positive, got {batch=}, {patch=}, {expansion=}")
    shapes = _convolutions(features, blocks, scale)
    wide = [expansion * (k**2 * c + o) for c, o, k in shapes]  # per pixel
    if mode == "expanded":
        return batch * patch**2 * sum(wide)
    if mode == "collapsed":
        collapse = sum(c * k**2 * block for (c, _, k), block in zip(shapes, wide, strict=True))
        return batch * count_macs(patch, patch, features, blocks, scale) + collapse
    raise ValueError(f"mode must be 'collapsed' or 'expanded', got {mode!r}")


# --- training and judging ---------------------------------------------------------------------------------------------


def psnr(prediction: Float[Tensor, "n 1 h w"], target: Float[Tensor, "n 1 h w"], shave: int = 2) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of every image in dB, for grey values in [0, 1], without a border of ``shave`` pixels.

    Raises
    ------
    ValueError
        If shapes differ, or nothing is left inside the border.
    """
    if prediction.shape != target.shape or not 0 <= 2 * shave < min(target.shape[-2:]):
        raise ValueError(
            "prediction and target must have one shape, larger than twice the border, "
            f"got {tuple(prediction.shape)}, {tuple(target.shape)} and {shave=}"
        )
    inside = (..., slice(shave, target.shape[-2] - shave), slice(shave, target.shape[-1] - shave))
    return -10 * (prediction - target)[inside].square().mean((1, 2, 3)).log10()


def mean_psnr(network: Callable[[Tensor], Tensor], pairs: Pairs) -> Float[Tensor, ""]:
    """PSNR in dB of what a network makes of the small images, clamped to [0, 1], averaged over all images."""
    with torch.no_grad():
        return torch.cat([psnr(network(x).clamp(0, 1), y) for x, y in pairs]).mean()


def train(
    network: SESR,
    large: Float[Tensor, "n 1 h w"],
    test: Pairs,
    *,
    steps: int,
    batch: int,
    crop: int,
    lr: float,
    optimizer: Callable[..., torch.optim.Optimizer],
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None,
    record_every: int,
    generator: torch.Generator,
) -> tuple[SESR, training.History]:
    """Train a copy of ``network`` on the mean absolute error of mini-batches.

    Every mini-batch is cut out of its images at one random place, turned by a multiple of 90 degrees and mirrored or
    not, then shrunk by the factor of the network.

    Parameters
    ----------
    network
        Where to start; not modified.
    large
        Images after the enlargement.
    test
        Where to measure PSNR.
    steps, lr, optimizer, schedule, record_every
        As for :func:`companion.training.fit`.
    batch, crop
        Number of images in a mini-batch, and the side in pixels of what is cut out of them.
    generator
        Source of the mini-batches.

    Returns
    -------
    network
        The trained copy.
    history
        ``"step"``, ``"loss"``, ``"psnr"`` in dB, and ``"cpu"``, the CPU seconds spent on training (not on measuring)
        so far.

    Raises
    ------
    ValueError
        If ``batch`` does not lie between 1 and n, ``crop`` is larger than the images or no multiple of the factor, or
        for the reasons of :func:`companion.training.fit`.
    """
    if not 1 <= crop <= min(large.shape[-2:]):
        raise ValueError(f"crop must be between 1 and the smaller side of large, got {crop} of {tuple(large.shape)}")
    network = copy.deepcopy(network)
    batches = training.minibatches(len(large), batch, generator)
    device = next(network.parameters()).device
    started, measuring = time.process_time(), 0.0

    def loss(step: int) -> Float[Tensor, ""]:
        top, left = (int(torch.randint(side - crop + 1, (), generator=generator)) for side in large.shape[-2:])
        turns, mirrored = torch.randint(4, (2,), generator=generator).tolist()
        y = large[next(batches), :, top : top + crop, left : left + crop].to(device).rot90(turns, (2, 3))
        y = y.mT if mirrored % 2 else y
        return F.l1_loss(network(shrink(y, network.scale)), y)

    def record() -> dict[str, Tensor]:
        nonlocal measuring
        now = time.process_time()
        row = {"cpu": torch.tensor(now - started - measuring), "psnr": mean_psnr(network, test).cpu()}
        measuring += time.process_time() - now
        return row

    history = training.fit(
        loss,
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        steps=steps,
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        record=record,
        record_every=record_every,
    )
    return network, history


# --- images -----------------------------------------------------------------------------------------------------------


def shrink(large: Float[Tensor, "n 1 h w"], scale: int) -> Float[Tensor, "n 1 {h}/{scale} {w}/{scale}"]:
    """Images reduced by the factor ``scale``: bicubic with antialiasing, as in the benchmarks; clamped to [0, 1].

    Raises
    ------
    ValueError
        If ``scale`` is not positive or does not divide height and width.
    """
    if scale < 1 or large.shape[-2] % scale or large.shape[-1] % scale:
        raise ValueError(f"large must have sides divisible by {scale=}, a positive number, got {tuple(large.shape)}")
    return F.interpolate(large, scale_factor=1 / scale, mode="bicubic", antialias=True).clamp(0, 1)


def luminance(rgb: UInt8[Tensor, "3 h w"]) -> Float[Tensor, "1 h w"]:
    """Luma of a photograph (Y of YCbCr, ITU-R BT.601), as the benchmarks judge it: from 16/255 to 235/255.

    Raises
    ------
    ValueError
        If ``rgb`` does not have three channels.
    """
    if rgb.ndim != 3 or len(rgb) != 3:
        raise ValueError(f"rgb must have the shape (3, height, width), got {tuple(rgb.shape)}")
    weights = torch.tensor([65.481, 128.553, 24.966]) / 255
    return (torch.einsum("c,chw->hw", weights, rgb.float()) + 16)[None] / 255


def random_patches(
    images: Iterable[Float[Tensor, "1 h w"]], per_image: int, size: int, generator: torch.Generator
) -> Float[Tensor, "n 1 size size"]:
    """Square patches at random places of every image, ``per_image`` of each.

    Raises
    ------
    ValueError
        If an image is smaller than ``size``.
    """
    patches = []
    for image in images:
        height, width = image.shape[-2:]
        if min(height, width) < size:
            raise ValueError(f"size must be at most that of every image, got {size} for {height} x {width}")
        tops = torch.randint(height - size + 1, (per_image,), generator=generator).tolist()
        lefts = torch.randint(width - size + 1, (per_image,), generator=generator).tolist()
        corners = zip(tops, lefts, strict=True)
        # Stacked image by image: a list of slices would keep every whole image in memory.
        patches.append(torch.stack([image[:, top : top + size, left : left + size] for top, left in corners]))
    return torch.cat(patches)
