"""B-cosification: a trained network becomes, by a small change and a little fine-tuning, one that explains itself.

Arya, Rao, Böhle and Schiele, "B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable",
NeurIPS 2024 (arXiv 2411.00715).

A network here is an ``nn.Sequential`` whose first module maps images with values in [0, 1] to the normalised tensor
``z`` on which everything else acts. Its dynamic-linear summary is ``f(x) = W(x) z + b``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from companion.models import initialised
from companion.training import History, fit, minibatches

Images = Float[Tensor, "n 3 height width"]
Maps = Float[Tensor, "n height width"]

# --- modules that are linear maps chosen by their input ---------------------------------------------------------------


class Dynamic(nn.Module):
    """A module ``y = W(x) x``. While ``detach`` is on, gradients take ``W(x)`` for a constant."""

    detach = False

    def constant(self, factor: Tensor) -> Tensor:
        """``factor``, which is part of ``W(x)``, in the form in which gradients may see it."""
        return factor.detach() if self.detach else factor


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block, gradients of ``model`` are the rows of ``W(x)``; afterwards everything is as before."""
    before = {module: module.detach for module in model.modules() if isinstance(module, Dynamic)}
    try:
        for module in before:
            module.detach = True
        yield
    finally:
        for module, detach in before.items():
            module.detach = detach


class _Bcos(Dynamic):
    """What the two B-cos layers share: ``|w·x / ‖x‖|^(B-1) w·x``, with ``w`` at its own length or at length 1."""

    def _set(self, B: float, normalise_weights: bool) -> None:
        if not B >= 1:
            raise ValueError(f"B must be at least 1, got {B}")
        self.B, self.normalise_weights = B, normalise_weights

    def _weight(self) -> Tensor:
        if not self.normalise_weights:
            return self.weight
        return self.weight / self.weight.flatten(1).norm(dim=1).view(-1, *[1] * (self.weight.ndim - 1))

    def _response(self, linear: Tensor, squared_norm: Tensor) -> Tensor:
        if self.B == 1:
            return linear
        # The small constants keep slopes finite: of the root at empty patches, of the power at right angles for B < 2.
        scale = (linear * (squared_norm + 1e-6).rsqrt()).abs()
        return linear * self.constant(scale if self.B == 2 else (scale + 1e-6) ** (self.B - 1))


class BcosConv2d(_Bcos, nn.Conv2d):
    """B-cos convolution; ``‖x‖`` is the norm of the patch, zero padding included.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, bias
        As for ``nn.Conv2d``, except that there is no bias unless asked for.
    B
        Exponent; 1 is an ordinary convolution.
    normalise_weights
        True for the ``ŵ`` of B-cos networks trained from scratch. Converted layers keep the length of ``w``.

    Raises
    ------
    ValueError
        If ``B`` is smaller than 1.

    Notes
    -----
    Source: Böhle, Fritz and Schiele 2022 (the transform); the paper's Section 3 (weights without normalisation).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        B: float = 2.0,
        bias: bool = False,
        normalise_weights: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)
        self._set(B, normalise_weights)

    def forward(self, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n out h2 w2"]:
        linear = functional.conv2d(x, self._weight(), None, self.stride, self.padding)
        squares = functional.avg_pool2d(
            x.square().sum(1, keepdim=True), self.kernel_size, self.stride, self.padding, divisor_override=1
        )
        y = self._response(linear, squares)
        return y if self.bias is None else y + self.bias[:, None, None]


class BcosLinear(_Bcos, nn.Linear):
    """B-cos layer for vectors; parameters as for :class:`BcosConv2d`."""

    def __init__(
        self, in_features: int, out_features: int, B: float = 2.0, bias: bool = False, normalise_weights: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._set(B, normalise_weights)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        y = self._response(functional.linear(x, self._weight()), x.square().sum(-1, keepdim=True))
        return y if self.bias is None else y + self.bias


class UncenteredBatchNorm2d(nn.Module):
    """Batch normalisation that divides by the standard deviation and subtracts no mean: ``γ x / √(v + ε) (+ β')``.

    ``v`` is the *centred* variance, of the batch in training and its running average in evaluation.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, bias: bool = False) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features)) if bias else None
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n channels h w"]:
        v = self.running_var
        if self.training:
            v = (x - x.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3))
            samples = x.numel() // x.shape[1]
            with torch.no_grad():
                self.running_var.lerp_(v * samples / (samples - 1), self.momentum)
        y = x * (self.weight * (v + self.eps).rsqrt())[:, None, None]
        return y if self.bias is None else y + self.bias[:, None, None]


class DynamicLayerNorm(Dynamic):
    """``nn.LayerNorm`` over the last axis whose division by the standard deviation is part of ``W(x)``."""

    def __init__(self, features: int, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        centred = x - x.mean(-1, keepdim=True)
        y = self.weight * centred * self.constant((centred.square().mean(-1, keepdim=True) + self.eps).rsqrt())
        return y if self.bias is None else y + self.bias


class DynamicGELU(Dynamic):
    """GELU as a gate: ``Φ(x) x``, with the normal distribution function ``Φ(x)`` as part of ``W(x)``."""

    def forward(self, x: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return x * self.constant(torch.special.ndtr(x))


class Attention(Dynamic):
    """Self-attention over tokens; the attention matrix, all that queries and keys are for, is part of ``W(x)``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.out((self.constant(attention) @ v).transpose(1, 2).flatten(2))


class PromptScores(Dynamic):
    """Cosine of an embedding with each of several texts; the length of the embedding is part of ``W(x)``."""

    def __init__(self, texts: Float[Tensor, "prompts d"]) -> None:
        super().__init__()
        self.register_buffer("texts", functional.normalize(texts.detach(), dim=1))

    def forward(self, embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n prompts"]:
        return embedding @ self.texts.mT / self.constant(embedding.norm(dim=1, keepdim=True))


# --- the other parts of a network -------------------------------------------------------------------------------------


def add_inverse(x: Images) -> Float[Tensor, "n 6 height width"]:
    """Append ``1 - x`` to colour images in [0, 1], so that a dark pixel is an input as large as a bright one.

    Raises
    ------
    ValueError
        If ``x`` is not a batch of images with three channels.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"x must be images (n, 3, height, width), got shape {tuple(x.shape)}")
    return torch.cat([x, 1 - x], 1)


class Normalise(nn.Module):
    """``z = (x - μ)/σ`` for each colour; with ``inverse``, the same for ``[x, 1-x]``, which is ``[z, -z]``."""

    def __init__(self, mean: Float[Tensor, " 3"], std: Float[Tensor, " 3"], inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.register_buffer("mean", torch.cat([mean, 1 - mean]) if inverse else mean)
        self.register_buffer("std", torch.cat([std, std]) if inverse else std)

    def forward(self, x: Images) -> Float[Tensor, "n channels height width"]:
        return ((add_inverse(x) if self.inverse else x) - self.mean[:, None, None]) / self.std[:, None, None]


class LogitBias(nn.Module):
    """A constant on all logits, the only bias that a converted network keeps: no part of ``W(x)``."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, logits: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes"]:
        return logits + self.value


class Residual(nn.Sequential):
    """``x`` plus what the modules make of it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Positions(nn.Module):
    """Add sine and cosine codes of row and column to a grid of tokens and flatten it; larger grids repeat them."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        angles = torch.arange(side)[:, None] / 1e4 ** (torch.arange(width // 4) / (width // 4))
        code = torch.cat([angles.sin(), angles.cos()], 1).T
        rows, columns = code[:, :, None].expand(-1, -1, side), code[:, None].expand(-1, side, -1)
        self.register_buffer("code", torch.cat([rows, columns]))

    def forward(self, x: Float[Tensor, "n width rows columns"]) -> Float[Tensor, "n tokens width"]:
        tiles = [size // side for size, side in zip(x.shape[2:], self.code.shape[1:], strict=True)]
        return (x + self.code.repeat(1, *tiles)).flatten(2).mT


class TokenMean(nn.Module):
    """Mean over tokens."""

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n width"]:
        return x.mean(1)


def _drawn(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """The network with PyTorch's default weights in its convolutions and linear layers, from ``generator``."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            initialised(module, generator)
    return network


class ContrastivePair(nn.Module):
    """An image tower and a text tower that share an embedding space; the texts are "a <colour> <digit>".

    The text tower adds an embedding of the colour and one of the digit: it can name pairs that it has never seen.
    """

    def __init__(self, tower: nn.Sequential, d: int, n_colours: int, n_digits: int, generator: torch.Generator) -> None:
        super().__init__()
        self.tower = tower
        self.colours = nn.Parameter(torch.randn(n_colours, d, generator=generator))
        self.digits = nn.Parameter(torch.randn(n_digits, d, generator=generator))

    def texts(self) -> Float[Tensor, "prompts d"]:
        """Embeddings of length 1 of all prompts; prompt ``n_colours · digit + colour`` names digit and colour."""
        return functional.normalize((self.digits[:, None] + self.colours).flatten(0, 1), dim=1)

    def forward(self, x: Images) -> Float[Tensor, "n prompts"]:
        return functional.normalize(self.tower(x), dim=1) @ self.texts().mT


def cnn(n_out: int, *, width: int, normalise: nn.Module, generator: torch.Generator) -> nn.Sequential:
    """An ordinary network: four 3x3 convolutions with batch norm and ReLU, the second of stride 2, mean, linear."""
    layers: list[nn.Module] = [normalise]
    for n_in, out, stride in ((3, width, 1), (width, 2 * width, 2), *[(2 * width, 2 * width, 1)] * 2):
        convolution = nn.utils.skip_init(nn.Conv2d, n_in, out, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(out), nn.ReLU()]
    head = nn.utils.skip_init(nn.Linear, 2 * width, n_out)
    return _drawn(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), generator)


def vit(
    n_out: int, *, size: int, patch: int, width: int, heads: int, blocks: int, normalise: nn.Module,
    generator: torch.Generator,
) -> nn.Sequential:  # fmt: skip
    """An ordinary vision transformer for images of ``size`` pixels, with mean pooling and fixed position codes.

    ``width`` is that of the tokens, the hidden layers of the blocks have twice as many units.
    """
    with torch.device("meta"):  # the weights come from the generator, below
        layers: list[nn.Module] = [nn.Conv2d(3, width, patch, stride=patch)]
        for _ in range(blocks):
            hidden = [nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)]
            layers += [Residual(nn.LayerNorm(width), Attention(width, heads)), Residual(nn.LayerNorm(width), *hidden)]
        network = nn.Sequential(*layers, nn.LayerNorm(width), TokenMean(), nn.Linear(width, n_out)).to_empty(
            device="cpu"
        )
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    embedding, *rest = _drawn(network, generator)
    return nn.Sequential(normalise, embedding, Positions(width, size // patch), *rest)


# --- conversion -------------------------------------------------------------------------------------------------------


def _with_weights(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer made on the meta device, where no random weights are drawn, with copies of these."""
    layer.weight = nn.Parameter(weight.detach().clone())
    if layer.bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _converted(module: nn.Module, B: float, bias: bool) -> nn.Module:
    """The B-cos counterpart of a module; containers are converted child by child."""
    keep = bias and getattr(module, "bias", None) is not None
    match module:
        case nn.Conv2d():
            if module.groups != 1 or module.dilation != (1, 1):
                raise TypeError(f"a convolution must have one group and no dilation, got {module}")
            shape = module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding
            with torch.device("meta"):
                layer = BcosConv2d(*shape, B=B, bias=keep)
            return _with_weights(layer, module.weight, module.bias)
        case nn.Linear():
            with torch.device("meta"):
                layer = BcosLinear(module.in_features, module.out_features, B=B, bias=keep)
            return _with_weights(layer, module.weight, module.bias)
        case nn.BatchNorm2d():
            layer = UncenteredBatchNorm2d(module.num_features, module.eps, module.momentum, bias=bias)
            layer.running_var = module.running_var.clone()
            shift = module.weight * module.running_mean * (module.running_var + module.eps).rsqrt()
            return _with_weights(layer, module.weight, module.bias - shift)
        case nn.LayerNorm():
            return _with_weights(DynamicLayerNorm(len(module.weight), module.eps, keep), module.weight, module.bias)
        case nn.GELU():
            return DynamicGELU()
        case nn.MaxPool2d():
            return nn.AvgPool2d(module.kernel_size, module.stride, module.padding)
        case Attention():  # queries, keys and values stay linear
            layer = deepcopy(module)
            layer.out = _converted(module.out, B, bias)
            if not bias:
                layer.qkv.bias = None
            return layer
        case (
            nn.ReLU()
            | nn.AvgPool2d()
            | nn.AdaptiveAvgPool2d()
            | nn.Flatten()
            | nn.Identity()
            | Positions()
            | TokenMean()
        ):
            return deepcopy(module)
    if not any(module.children()) or next(module.parameters(recurse=False), None) is not None:
        raise TypeError(f"net holds a module that has no B-cos counterpart: {module}")
    container = deepcopy(module)
    for name, child in module.named_children():
        container.add_module(name, _converted(child, B, bias))
    return container


def b_cosify(net: nn.Sequential, B: float = 2.0, bias: bool = False, logit_bias: float = 0.0) -> nn.Sequential:
    """Convert a trained network, convolutional or transformer, to a B-cos network with the same weights.

    Input ``[z, -z]`` with first weights ``[W, -W]/2``; B-cos layers for linear ones; norms that subtract no batch mean;
    average for maximum pooling; and the head before the global pooling. With ``B=1, bias=True`` and no maximum pooling
    the result computes the same function as ``net`` in evaluation. It is in the same mode as ``net``.

    Parameters
    ----------
    net
        ``Normalise``, a convolution, any layers known here or containers of such, global mean pooling
        (``AdaptiveAvgPool2d(1)`` and ``Flatten``, or ``TokenMean``), ``Linear``. Not modified.
    B
        Exponent of all B-cos layers.
    bias
        Whether biases, and the means of batch norms, are kept. They spoil the dynamic-linear summary.
    logit_bias
        Constant on all logits.

    Raises
    ------
    ValueError
        If ``B`` is smaller than 1.
    TypeError
        If ``net`` is not built as described, or holds a module without a B-cos counterpart.

    Notes
    -----
    Source: the paper's Section 3.
    """
    layers = list(net) if isinstance(net, nn.Sequential) else []
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.AdaptiveAvgPool2d | TokenMean)]
    ends = [type(layers[i]) for i in (0, 1, -1)] if len(layers) > 2 else []
    if ends != [Normalise, nn.Conv2d, nn.Linear] or len(pools) != 1:
        raise TypeError(f"net must be a Sequential of Normalise, Conv2d, ..., one global mean, Linear, got {net}")
    encode, first, *body, head = layers
    stem, at = deepcopy(first), pools[0] - 2
    stem.weight = nn.Parameter(torch.cat([first.weight, -first.weight], 1).detach() / 2)
    stem.in_channels = 6
    if isinstance(body[at], nn.AdaptiveAvgPool2d):  # the mean of what a 1x1 convolution says of every place
        with torch.device("meta"):
            pointwise = nn.Conv2d(head.in_features, head.out_features, 1, bias=head.bias is not None)
        head = _with_weights(pointwise, head.weight[:, :, None, None], head.bias)
    body.insert(at, head)
    inputs = Normalise(encode.mean, encode.std, inverse=True)
    converted = nn.Sequential(inputs, *(_converted(layer, B, bias) for layer in (stem, *body)), LogitBias(logit_bias))
    return converted.train(net.training)


def b_cos_from_scratch(net: nn.Sequential, logit_bias: float) -> nn.Sequential:
    """The B-cos network (B = 2) of the architecture of an untrained ``net``, in the form that is trained from scratch.

    Weights have unit length, and the transform is the only nonlinearity between layers: no ReLU, no GELU.

    Raises
    ------
    TypeError
        As for :func:`b_cosify`.
    """
    network = b_cosify(net, logit_bias=logit_bias)
    for module in list(network.modules()):
        if isinstance(module, _Bcos):
            module.normalise_weights = True
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU | DynamicGELU):
                module.add_module(name, nn.Identity())
    return network


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    network: nn.Module,
    draw: Callable[[], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Float[Tensor, ""]],
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    generator: torch.Generator,
    one_cycle: bool = False,
    record: Callable[[], Mapping[str, Tensor]] | None = None,
) -> History:
    """Train a network in place with Adam, on data drawn anew for every epoch, and leave it in evaluation mode.

    Parameters
    ----------
    network
        Any of the networks here.
    draw
        Makes the images and the targets of an epoch, the same number in every epoch.
    loss
        Loss of outputs and targets.
    epochs, lr, batch_size
        Passes through the data, largest learning rate, images in a batch; an incomplete last batch is dropped.
    generator
        Source of the order of the images.
    one_cycle
        Whether the learning rate first rises (``OneCycleLR``); without, it falls along half a cosine.
    record
        As for :func:`companion.training.fit`, called before the first step and after every epoch.

    Raises
    ------
    ValueError
        If ``batch_size`` does not lie between 1 and the number of images.
    """
    network.to(memory_format=torch.channels_last)  # a fourth faster on a CPU
    epoch = [draw()]
    order = minibatches(len(epoch[0][0]), batch_size, generator)
    steps = len(epoch[0][0]) // batch_size

    def objective(step: int) -> Float[Tensor, ""]:
        if step and step % steps == 0:
            epoch[0] = draw()
        network.train()
        rows = next(order)
        images, targets = (part[rows] for part in epoch[0])
        return loss(network(images.contiguous(memory_format=torch.channels_last)), targets)

    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=lr, total_steps=epochs * steps)
    history = fit(
        objective,
        network.parameters(),
        steps=epochs * steps,
        lr=lr,
        optimizer=partial(torch.optim.Adam, fused=True),
        cosine_to=0,
        schedule=cycle if one_cycle else None,
        record=record,
        record_every=steps,
    )
    network.eval()
    return history


# --- explanations -----------------------------------------------------------------------------------------------------


def input_gradient(
    model: nn.Sequential, x: Images, target: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n channels height width"], Float[Tensor, "n channels height width"]]:
    """The normalised input ``z`` of the model, and the gradient of each image's target logit with respect to it.

    In explanation mode the gradient is the row of ``W(x)`` that belongs to the target.

    Raises
    ------
    ValueError
        If the model is in training mode (where an image's logit depends on its batch), or there is not one target,
        an integer, for each image.
    """
    if model.training:
        raise ValueError("model must be in evaluation mode; call model.eval() first")
    if target.shape != x.shape[:1] or target.is_floating_point():
        raise ValueError(f"target must hold {len(x)} integers, got {target.dtype} of shape {tuple(target.shape)}")
    z = model[0](x).detach().requires_grad_()
    logits = model[1:](z)
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), z)
    return z.detach(), gradient


def input_times_gradient(model: nn.Sequential, x: Images, target: Int[Tensor, " n"]) -> Maps:
    """Plain gradient times input, summed over channels: the explanation of a network that is not dynamic-linear."""
    z, gradient = input_gradient(model, x, target)
    return (z * gradient).sum(1)


def contribution_map(model: nn.Sequential, x: Images, target: Int[Tensor, " n"]) -> Maps:
    """What every pixel contributes to the target logit: ``[W(x)]_target ⊙ z``, summed over channels.

    Without position codes and without biases but the last, the map sums to the logit minus that bias.

    Parameters
    ----------
    model
        A converted network, in evaluation mode.
    x
        Images in [0, 1].
    target
        For each image the index of the logit to explain.

    Raises
    ------
    ValueError
        As for :func:`input_gradient`.
    """
    with explanation_mode(model):
        return input_times_gradient(model, x, target)


def integrated_gradients(model: nn.Sequential, x: Images, target: Int[Tensor, " n"], steps: int = 16) -> Maps:
    """Integrated gradients from the black image, by the midpoint rule, summed over channels.

    Raises
    ------
    ValueError
        As for :func:`input_gradient`, and if ``steps`` is smaller than 1.

    Notes
    -----
    Source: Sundararajan, Taly and Yan 2017.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    slope = sum(input_gradient(model, (k + 0.5) / steps * x, target)[1] for k in range(steps)) / steps
    with torch.no_grad():
        return ((model[0](x) - model[0](torch.zeros_like(x))) * slope).sum(1)


def explanation_image(
    z: Float[Tensor, "6 height width"], W: Float[Tensor, "6 height width"]
) -> Float[Tensor, "height width 4"]:
    """Draw a row of ``W(x)`` in colour: red, green, blue and opacity in [0, 1].

    A colour channel is the share of its weight in the weight of the pair, negative weights counted as none. Opacity is
    the length of the weight vector where the contribution is positive; the largest half per cent is cut.

    Raises
    ------
    ValueError
        If the shapes are not both (6, height, width).

    Notes
    -----
    Source: the authors' code of B-cos networks, without its smoothing.
    """
    if z.shape != W.shape or z.ndim != 3 or len(z) != 6:
        raise ValueError(f"z and W must be of one shape (6, height, width), got {tuple(z.shape)} and {tuple(W.shape)}")
    weight = (W / W.abs().amax(0).clamp_min(1e-12)).clamp_min(0)
    colour = weight[:3] / (weight[:3] + weight[3:]).clamp_min(1e-12)
    opacity = W.norm(dim=0) * ((z * W).sum(0) > 0)
    opacity = (opacity / opacity.quantile(0.995).clamp_min(1e-12)).clamp_max(1)
    return torch.cat([colour, opacity[None]]).movedim(0, -1)


def make_grids(
    images: Float[Tensor, "m 3 height width"],
    labels: Int[Tensor, " m"],
    confidence: Float[Tensor, " m"],
    n: int,
    n_grids: int,
    generator: torch.Generator,
    pool: int = 25,
) -> tuple[Float[Tensor, "n_grids 3 n*height n*width"], Int[Tensor, "n_grids n*n"]]:
    """Mosaics of ``n × n`` images of distinct classes, and the classes of the cells, row by row.

    Parameters
    ----------
    images, labels
        Images to draw from, and their classes.
    confidence
        Probability that a classifier gives to the class of each image.
    n, n_grids
        Images along a side of a mosaic, and number of mosaics.
    generator
        Source of randomness.
    pool
        Images are drawn from this many of each class: those of highest confidence.

    Raises
    ------
    ValueError
        If the numbers of images, labels and confidences differ, there are fewer than ``n²`` classes, or ``n``,
        ``n_grids`` or ``pool`` is not positive.
    """
    if not len(images) == len(labels) == len(confidence):
        raise ValueError(f"images, labels, confidence differ: {len(images)}, {len(labels)}, {len(confidence)} entries")
    if min(n, n_grids, pool) < 1:
        raise ValueError(f"n, n_grids and pool must be positive, got {n=}, {n_grids=}, {pool=}")
    classes = labels.unique()
    if len(classes) < n * n:
        raise ValueError(f"labels must hold at least n² = {n * n} classes, got {len(classes)}")
    order = confidence.argsort(descending=True)
    pools = [order[labels[order] == c][:pool] for c in classes]
    chosen = torch.rand(n_grids, len(classes), generator=generator).argsort(1)[:, : n * n]
    draw = torch.rand(n_grids, n * n, generator=generator)
    size = torch.tensor([len(members) for members in pools])[chosen]
    members = nn.utils.rnn.pad_sequence(pools, batch_first=True).cpu()[chosen, (draw * size).long()]
    cells = images[members].unflatten(1, (n, n)).permute(0, 3, 1, 4, 2, 5)  # grid, colour, row, y, column, x
    return cells.flatten(4).flatten(2, 3), classes.cpu()[chosen].to(labels)


def grid_pointing_game(
    attribute: Callable[[Images, Int[Tensor, " n"]], Maps], grids: Images, labels: Int[Tensor, "n n*n"], n: int
) -> Float[Tensor, "n n*n"]:
    """Share of the positive attribution to the class of a cell that lies in this cell; chance is ``1/n²``.

    Parameters
    ----------
    attribute
        Maps mosaics and one target for each to attribution maps.
    grids, labels
        Mosaics and the classes of their cells, from :func:`make_grids`.
    n
        Cells along a side.

    Raises
    ------
    ValueError
        If there are not ``n²`` labels for each mosaic, or ``n`` does not divide its sides.

    Notes
    -----
    Source: Böhle, Fritz and Schiele 2021. A map without positive entries scores 0.
    """
    if labels.shape != (len(grids), n * n) or grids.shape[-1] % n or grids.shape[-2] % n:
        raise ValueError(
            f"grids of {n} x {n} cells need sides divisible by {n} and labels of shape {(len(grids), n * n)}, "
            f"got grids {tuple(grids.shape)} and labels {tuple(labels.shape)}"
        )
    scores = []
    for cell in range(n * n):
        pairs = zip(grids.split(64), labels[:, cell].split(64), strict=True)  # parts, to bound the memory
        positive = torch.cat([attribute(part, target).detach().clamp_min(0) for part, target in pairs])
        row, column = divmod(cell, n)
        inside = positive.unflatten(2, (n, -1)).unflatten(1, (n, -1))[:, row, :, column].sum((1, 2))
        scores.append(inside / positive.sum((1, 2)).clamp_min(torch.finfo(positive.dtype).tiny))
    return torch.stack(scores, 1)


# --- data -------------------------------------------------------------------------------------------------------------

COLOURS = {"red": (1.0, 0.2, 0.2), "green": (0.2, 1.0, 0.2), "blue": (0.3, 0.4, 1.0), "yellow": (1.0, 0.9, 0.2)}


def coloured_digits(
    ink: Float[Tensor, "n 1 side side"], colours: Int[Tensor, " n"], canvas: int, generator: torch.Generator
) -> Float[Tensor, "n 3 canvas canvas"]:
    """Paint digits in colour at a random place on a noisy canvas of a random dark colour.

    Parameters
    ----------
    ink
        Square grey images in [0, 1], 1 where the digit is.
    colours
        For each image the number of its entry in ``COLOURS``.
    canvas
        Pixels along a side.
    generator
        Source of places, backgrounds and noise.

    Raises
    ------
    ValueError
        If ``ink`` does not hold square images, there is not one colour for each, or the canvas is smaller than they.
    """
    if ink.ndim != 4 or ink.shape[1] != 1 or ink.shape[2] != ink.shape[3] or colours.shape != ink.shape[:1]:
        raise ValueError(
            f"ink must be (n, 1, side, side) and colours (n,), got {tuple(ink.shape)} and {tuple(colours.shape)}"
        )
    n, margin = len(ink), canvas - ink.shape[-1]
    if margin < 0:
        raise ValueError(f"canvas must be at least {ink.shape[-1]} pixels, got {canvas}")
    padded = functional.pad(ink[:, 0], (margin,) * 4)
    rows, columns = (torch.randint(margin + 1, (n, 1), generator=generator) + torch.arange(canvas) for _ in range(2))
    ink = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None]][:, None]
    paint = torch.tensor(list(COLOURS.values()))[colours][:, :, None, None]
    background = 0.35 * torch.rand(n, 3, 1, 1, generator=generator)
    noise = 0.04 * torch.randn(n, 3, canvas, canvas, generator=generator)
    return (ink * paint + (1 - ink) * background + noise).clamp(0, 1)
