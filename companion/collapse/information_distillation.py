"""Information multi-distillation: lightweight super-resolution, with one network for images of any size and scale.

Hui, Gao, Yang and Wang, "Lightweight Image Super-Resolution with Information Multi-distillation Network", ACM
Multimedia 2019 (arXiv 1909.11856). Architecture and cropping follow the authors' code (github.com/Zheng222/IMDN).

Images are batches (n, channels, height, width) with values in [0, 1]. A network has ``features`` channels inside; every
split distils a quarter of them, ``d``, and refines the others, ``r``. φ is the leaky ReLU with slope 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.nn import functional as F

from companion import models

SLOPE = 0.05  # of φ
_LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)  # ITU-R BT.601
_WINDOW = 11  # side of the Gaussian window of SSIM, in pixels


def _check_images(name: str, x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name} must have four axes (n, channels, height, width), got shape {tuple(x.shape)}")


def _conv(n_in: int, n_out: int, size: int, generator: torch.Generator, stride: int = 1) -> nn.Conv2d:
    """A convolution with "same" padding and PyTorch's default weights, uniform in ±1/sqrt(fan-in)."""
    layer = nn.utils.skip_init(nn.Conv2d, n_in, n_out, size, stride=stride, padding=size // 2)
    return models.initialised(layer, generator)


def channel_contrast(x: Float[Tensor, "n c h w"], eps: float = 0.0) -> Float[Tensor, "n c 1 1"]:
    """Mean plus standard deviation of every channel over the image: ``z_c = μ_c + σ_c``.

    Parameters
    ----------
    x
        Feature maps.
    eps
        Lower end for the variance. The square root has no finite slope at 0, so a constant channel needs a positive
        one when gradients are wanted.

    Raises
    ------
    ValueError
        If ``x`` does not have four axes.

    Notes
    -----
    Source: the paper's contrast-aware channel attention. σ is the population's: the sum is divided by h·w.
    """
    _check_images("x", x)
    mean = x.mean((2, 3), keepdim=True)
    variance = (x - mean).square().mean((2, 3), keepdim=True)
    return mean + variance.clamp(min=eps).sqrt()


class ContrastAwareChannelAttention(nn.Module):
    """Multiply every channel by a gate in (0, 1) that a small network computes from the channels' descriptors.

    Parameters
    ----------
    channels
        Number of channels.
    reduction
        The hidden layer has ``channels // reduction`` units, at least one.
    descriptor
        ``"contrast"``: mean plus standard deviation, the paper's. ``"mean"``: squeeze and excitation.
    generator
        Source of the initial weights.

    Raises
    ------
    ValueError
        If ``channels`` or ``reduction`` is not positive or the descriptor is unknown.
    """

    def __init__(
        self, channels: int, reduction: int = 16, descriptor: str = "contrast", *, generator: torch.Generator
    ) -> None:
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(f"channels and reduction must be positive, got {channels=} and {reduction=}")
        if descriptor not in ("contrast", "mean"):
            raise ValueError(f"descriptor must be 'contrast' or 'mean', got {descriptor!r}")
        hidden = max(channels // reduction, 1)
        self.descriptor = descriptor
        self.squeeze = _conv(channels, hidden, 1, generator)
        self.excite = _conv(hidden, channels, 1, generator)

    def gates(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c 1 1"]:
        """The gate of every channel: ``sigmoid(W_2 ReLU(W_1 z + b_1) + b_2)``."""
        z = channel_contrast(x, eps=1e-12) if self.descriptor == "contrast" else x.mean((2, 3), keepdim=True)
        return torch.sigmoid(self.excite(F.relu(self.squeeze(z))))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x * self.gates(x)


class InformationMultiDistillationBlock(nn.Module):
    """Keep a quarter of the channels, refine the others, three times over; weigh, fuse and add to the input.

    Parameters
    ----------
    channels
        Number of channels, a multiple of four.
    attention
        ``"contrast"`` or ``"mean"`` (see :class:`ContrastAwareChannelAttention`), or None for no weighing.
    reduction
        Of the attention.
    generator
        Source of the initial weights.

    Raises
    ------
    ValueError
        If ``channels`` is not a positive multiple of four.

    Notes
    -----
    Source: the paper's IMDB; the last convolution of the refinement has no activation.
    """

    def __init__(
        self,
        channels: int = 64,
        attention: str | None = "contrast",
        reduction: int = 16,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if channels < 4 or channels % 4:
            raise ValueError(f"channels must be a positive multiple of 4, to distil a quarter of them, got {channels}")
        self.d = channels // 4
        r = channels - self.d
        widths = [(channels, channels), (r, channels), (r, channels), (r, self.d)]
        self.refine = nn.ModuleList(_conv(n_in, n_out, 3, generator) for n_in, n_out in widths)
        self.attention = nn.Identity()
        if attention is not None:
            self.attention = ContrastAwareChannelAttention(channels, reduction, attention, generator=generator)
        self.fuse = _conv(channels, channels, 1, generator)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        *refine, last = self.refine
        distilled, rest = [], x
        for conv in refine:
            kept, rest = F.leaky_relu(conv(rest), SLOPE).tensor_split([self.d], dim=1)
            distilled.append(kept)
        distilled.append(last(rest))
        return self.fuse(self.attention(torch.cat(distilled, dim=1))) + x


class ResidualBlock(nn.Module):
    """The plain block that the baselines are built from: two 3x3 convolutions of full width, added to the input.

    Raises
    ------
    ValueError
        If ``channels`` is not positive.
    """

    def __init__(self, channels: int, *, generator: torch.Generator) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        self.first, self.second = (_conv(channels, channels, 3, generator) for _ in range(2))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return self.second(F.leaky_relu(self.first(x), SLOPE)) + x


class IMDN(nn.Module):
    """The information multi-distillation network: enlarges an image ``scale`` times, or restores one of any scale.

    Parameters
    ----------
    in_channels
        Channels of the image: 3 for colour, 1 for grey.
    features, blocks
        Channels inside the network and number ``K`` of its blocks.
    scale
        How many times the output is higher and wider than the input.
    generator
        Source of the initial weights.
    any_scale
        True for IMDN_AS: the input already has the wanted size, two convolutions of stride 2 shrink it four times and
        the pixel shuffle brings the size back. Needs ``scale=4``.
    attention, reduction
        Of the blocks.
    image_residual
        Add the input to the output, for ``any_scale`` only. Not in the paper.

    Raises
    ------
    ValueError
        If a size is not positive, ``any_scale`` comes with another ``scale`` than 4, or ``image_residual`` without
        ``any_scale``; when called, if the input of ``any_scale`` has a side that is no multiple of 4.
    """

    def __init__(
        self,
        in_channels: int = 3,
        features: int = 64,
        blocks: int = 6,
        scale: int = 4,
        *,
        generator: torch.Generator,
        any_scale: bool = False,
        attention: str | None = "contrast",
        reduction: int = 16,
        image_residual: bool = False,
    ) -> None:
        super().__init__()
        if min(in_channels, blocks, scale) < 1:
            raise ValueError(f"in_channels, blocks and scale must be positive, got {in_channels=}, {blocks=}, {scale=}")
        if any_scale and scale != 4:
            raise ValueError(f"scale must be 4 for any_scale, whose head shrinks the image four times, got {scale}")
        if image_residual and not any_scale:
            raise ValueError("image_residual must be False unless any_scale: input and output differ in size")
        self.any_scale, self.attention, self.image_residual = any_scale, attention, image_residual
        self.head: nn.Module = _conv(in_channels, features, 3, generator, stride=2 if any_scale else 1)
        if any_scale:
            second = _conv(features, features, 3, generator, stride=2)
            self.head = nn.Sequential(self.head, nn.LeakyReLU(SLOPE), second)
        self.body = nn.ModuleList(
            InformationMultiDistillationBlock(features, attention, reduction, generator=generator)
            for _ in range(blocks)
        )
        self.collect = _conv(blocks * features, features, 1, generator)
        self.smooth = _conv(features, features, 3, generator)
        self.enlarge = nn.Sequential(_conv(features, in_channels * scale**2, 3, generator), nn.PixelShuffle(scale))

    def forward(self, image: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c sh sw"]:
        if self.any_scale and (image.shape[-1] % 4 or image.shape[-2] % 4):
            raise ValueError(
                f"image must have height and width divisible by 4, got {tuple(image.shape)}; use adaptive_crop_forward"
            )
        first = x = self.head(image)
        outputs = []
        for block in self.body:
            x = block(x)
            outputs.append(x)
        collected = F.leaky_relu(self.collect(torch.cat(outputs, dim=1)), SLOPE)
        restored = self.enlarge(self.smooth(collected) + first)
        return restored + image if self.image_residual else restored

    def receptive_radius(self) -> float:
        """Distance in input pixels beyond which no pixel matters for an output pixel; infinite with attention.

        A 3x3 convolution adds 1: the head, four in each block, two at the end. Behind two strides of 2 each of these
        counts four times, the head itself adds 3, and an output pixel may lie 3 to the right of its grid point.
        """
        if self.attention is not None:
            return math.inf
        after_head = 4 * len(self.body) + 2
        return 4 * after_head + 6 if self.any_scale else after_head + 1


def _patch_side(name: str, side: int, shave: int, multiple: int) -> int:
    """Length of a patch along a side of the image."""
    patch = side // 2 + shave
    patch -= patch % multiple
    if not side - side // 2 <= patch <= side:
        raise ValueError(
            f"shave={shave} does not fit an image of {name} {side}: the patches have {patch}, "
            f"and must have at least {side - side // 2} and at most {side}"
        )
    return patch


def adaptive_crop_forward(
    model: Callable[[Float[Tensor, "n4 c h_p w_p"]], Float[Tensor, "*members n4 c sh_p sw_p"]],
    x: Float[Tensor, "n c h w"],
    shave: int = 32,
    scale: int = 1,
    multiple: int = 4,
) -> Float[Tensor, "*members n c sh sw"]:
    """Run ``model`` on four overlapping corner patches and put the results together, without their overlaps.

    Parameters
    ----------
    model
        Maps images to images ``scale`` times as large; an :class:`~companion.training.Ensemble` may do so.
    x
        Images of any size.
    shave
        How far a patch reaches across the middle of the image, in input pixels, before rounding.
    scale
        How much larger the output is.
    multiple
        Sides of patches are rounded down to multiples of this number.

    Raises
    ------
    ValueError
        If ``x`` does not have four axes, ``shave`` is negative, ``scale`` or ``multiple`` is not positive, or patches
        of this size do not cover the image or do not fit into it.

    Notes
    -----
    Source: the paper's adaptive cropping strategy. Equal to ``model(x)`` if the true overlap is at least the receptive
    radius, nothing in the model is global, and the patches start at multiples of its stride.
    """
    _check_images("x", x)
    if shave < 0 or scale < 1 or multiple < 1:
        raise ValueError(f"shave must be 0 or more, scale and multiple positive, got {shave=}, {scale=}, {multiple=}")
    height, width = x.shape[-2:]
    h_p, w_p = _patch_side("height", height, shave, multiple), _patch_side("width", width, shave, multiple)
    patches = [
        x[..., rows, columns] for rows in (slice(h_p), slice(-h_p, None)) for columns in (slice(w_p), slice(-w_p, None))
    ]
    corners = model(torch.cat(patches)).chunk(4, dim=-4)
    top, left = scale * (height // 2), scale * (width // 2)
    bottom, right = scale * height - top, scale * width - left
    halves = [
        torch.cat([corners[k][..., rows, :left], corners[k + 1][..., rows, -right:]], dim=-1)
        for k, rows in ((0, slice(top)), (2, slice(-bottom, None)))
    ]
    return torch.cat(halves, dim=-2)


def resize_then_restore(hr: Float[Tensor, "n c h w"], scale_factor: float) -> Float[Tensor, "n c h w"]:
    """Shrink images ``scale_factor`` times and bring them back to their size, both by bicubic interpolation.

    The sides of the small image are rounded. This is the input of the any-scale network, whose target is ``hr``.

    Raises
    ------
    ValueError
        If ``hr`` does not have four axes or ``scale_factor`` is smaller than 1 or leaves no pixel.
    """
    _check_images("hr", hr)
    if not 1 <= scale_factor <= min(hr.shape[-2:]):
        raise ValueError(f"scale_factor must be between 1 and the smaller side of hr, got {scale_factor}")
    small = [round(side / scale_factor) for side in hr.shape[-2:]]
    lr = F.interpolate(hr, small, mode="bicubic", antialias=True)
    return F.interpolate(lr, hr.shape[-2:], mode="bicubic")


def _compared(
    restored: Float[Tensor, "*members n c h w"], hr: Float[Tensor, "n c h w"], border: int, smallest: int
) -> tuple[Float[Tensor, "*members n hi wi"], Float[Tensor, "n hi wi"]]:
    """What is compared of two batches of images: luma inside the border, the restored one clamped to [0, 1]."""
    if restored.shape[-4:] != hr.shape or hr.shape[1] not in (1, 3):
        raise ValueError(
            f"restored and hr must have one shape with 1 or 3 channels, got {tuple(restored.shape)}, {tuple(hr.shape)}"
        )
    if border < 0 or min(hr.shape[-2:]) - 2 * border < smallest:
        raise ValueError(
            f"border must be 0 or more and leave at least {smallest} pixels of {tuple(hr.shape)}, got {border}"
        )

    def luma(image: Tensor) -> Tensor:
        inside = image[..., border : hr.shape[-2] - border, border : hr.shape[-1] - border]
        if hr.shape[1] == 1:
            return inside.squeeze(-3)
        return 16 / 255 + (inside * inside.new_tensor(_LUMA)[:, None, None]).sum(-3)

    return luma(restored.clamp(0, 1)), luma(hr)


def psnr(
    restored: Float[Tensor, "*members n c h w"], hr: Float[Tensor, "n c h w"], border: int
) -> Float[Tensor, "*members n"]:
    """Peak signal-to-noise ratio of every image in dB, as super-resolution reports it.

    Values are clamped to [0, 1], colour is reduced to luma (Y of YCbCr), and ``border`` pixels are left out at every
    side.

    Raises
    ------
    ValueError
        If the shapes differ, there are neither 1 nor 3 channels, or the border leaves nothing.
    """
    y, truth = _compared(restored, hr, border, 1)
    return -10 * (y - truth).square().mean((-2, -1)).log10()


def ssim(
    restored: Float[Tensor, "*members n c h w"], hr: Float[Tensor, "n c h w"], border: int
) -> Float[Tensor, "*members n"]:
    """Structural similarity of every image, 1 for equal ones, with the Gaussian window of its authors.

    Clamped, reduced to luma and cropped as in :func:`psnr`; the window has 11x11 pixels and a standard deviation of
    1.5.

    Raises
    ------
    ValueError
        If the shapes differ, there are neither 1 nor 3 channels, or the border leaves less than one window.

    Notes
    -----
    Source: Wang, Bovik, Sheikh and Simoncelli, IEEE Transactions on Image Processing 13 (2004), as in scikit-image.
    """
    y, truth = _compared(restored, hr, border, _WINDOW)
    options = {"data_range": 1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(y.flatten(0, -3).cpu().numpy(), truth.expand_as(y).flatten(0, -3).cpu().numpy(), strict=True)
    return y.new_tensor([structural_similarity(one, other, **options) for one, other in pairs]).view(y.shape[:-2])
