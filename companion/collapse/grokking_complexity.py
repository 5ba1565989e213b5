"""Local complexity: how many neurons bend a network near a point, and how that number moves while networks grok.

Humayun, Balestriero and Baraniuk, "Deep Networks Always Grok and Here is Why", ICML 2024 (arXiv 2402.15555). Measure
and defaults follow the authors' code (AhmedImtiazPrio/grok-adversarial).

A network with piecewise linear activations is affine on each region of a partition of its input space; a region is one
pattern of signs of all pre-activations ``z``. A *frame* holds ``P`` orthonormal rows ``v_p``. The neighbourhood of
``x`` is the convex hull of its ``2P`` vertices ``x ± r v_p``, a cross-polytope of radius ``r``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from tqdm import trange

_ACTIVATIONS = (nn.ReLU, nn.GELU)
_ROWS = 4096  # inputs that pass through a network at a time, which bounds the memory


def orthonormal_frame(dim: int, num_vectors: int, generator: torch.Generator) -> Float[Tensor, "P dim"]:
    """``num_vectors`` orthonormal rows whose span is uniformly distributed.

    Raises
    ------
    ValueError
        If ``num_vectors`` is not between 1 and ``dim``.
    """
    if not 1 <= num_vectors <= dim:
        raise ValueError(f"num_vectors must be between 1 and dim={dim}, got {num_vectors}")
    return torch.linalg.qr(torch.randn(dim, num_vectors, generator=generator)).Q.mT


def _at_activations(net: nn.Module, x: Tensor, reduce: Callable[[Float[Tensor, "n units"]], Tensor]) -> list[Tensor]:
    """``reduce(z)`` for the pre-activations ``z`` of each layer, in the order of the forward pass."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: found.append(reduce(inputs[0].flatten(1))))
        for module in net.modules()
        if isinstance(module, _ACTIVATIONS)
    ]
    if not hooks:
        raise ValueError(f"net must contain nn.ReLU or nn.GELU modules, whose inputs are counted, got {net}")
    modes = {module: module.training for module in net.modules()}
    net.eval()  # in training mode batch normalisation would mix the vertices of one batch
    try:
        with torch.no_grad():
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def activation_pattern(net: nn.Module, x: Float[Tensor, "n *features"]) -> Bool[Tensor, "n neurons"]:
    """Which neurons are on (``z > 0``), all layers side by side: the points of one pattern are one linear region.

    Raises
    ------
    ValueError
        If ``net`` has no module ``nn.ReLU`` or ``nn.GELU``.
    """
    return torch.cat(_at_activations(net, x, lambda z: z > 0), dim=1)


def _vertices(x: Tensor, frame: Tensor, radius: float) -> Float[Tensor, "n vertices *features"]:
    """The vertices ``x ± r v_p`` of each neighbourhood."""
    features = x.shape[1:].numel()
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
    if frame.ndim != 2 or frame.shape[1] != features:
        raise ValueError(f"frame must have one column for each of {features} features, got shape {tuple(frame.shape)}")
    return x[:, None] + radius * torch.cat([frame, -frame]).view(-1, *x.shape[1:])


def local_complexity(
    net: nn.Module, x: Float[Tensor, "n *features"], frame: Float[Tensor, "P d"], radius: float
) -> Int[Tensor, "n layers"]:
    """Number of neurons in each layer whose sign is not the same on all vertices ``x ± r v_p``.

    The local complexity LC(x) is the sum over layers. Every unit of a convolution's maps is a neuron; the output layer,
    which no activation follows, is not counted. For ReLU, LC(x) = 0 proves that ``net`` is affine on the convex hull of
    the vertices. For GELU a change of sign marks the place where a neuron bends most.

    Parameters
    ----------
    net
        A network whose activations are modules ``nn.ReLU`` or ``nn.GELU``; measured in evaluation mode.
    x
        Centres of the neighbourhoods.
    frame
        Orthonormal rows ``v_p``, shared by all points; ``d`` is the number of features of one input.
    radius
        Distance ``r`` of the vertices from their centre.

    Raises
    ------
    ValueError
        If ``radius`` is not positive, ``frame`` has another width than ``d``, or ``net`` has no activation to count.

    Notes
    -----
    Source: the paper's definition of local complexity. As in the authors' code the centre itself is no vertex.
    """

    def cut(z: Float[Tensor, "vertices units"]) -> Int[Tensor, " centres"]:
        z = z.unflatten(0, (-1, 2 * len(frame)))
        return ((z.amax(1) > 0) & (z.amin(1) <= 0)).sum(1)

    chunks = x.split(max(1, _ROWS // max(1, 2 * len(frame))))
    counts = [_at_activations(net, _vertices(centres, frame, radius).flatten(0, 1), cut) for centres in chunks]
    return torch.cat([torch.stack(layers, dim=1) for layers in counts])


def affinity_gap(
    net: nn.Module,
    x: Float[Tensor, "n *features"],
    frame: Float[Tensor, "P d"],
    radius: float,
    generator: torch.Generator,
) -> Float[Tensor, " n"]:
    """How far ``net`` is from affine on each neighbourhood: largest ``|f(Σ c_i u_i) - Σ c_i f(u_i)|`` of 16 tries.

    The ``u_i`` are the vertices, the weights ``c`` uniform on the simplex. An affine map has gap 0, up to rounding.

    Parameters
    ----------
    net, x, frame, radius
        As for :func:`local_complexity`.
    generator
        Source of the weights.

    Raises
    ------
    ValueError
        If ``radius`` or ``frame`` is not as :func:`local_complexity` needs it.
    """
    vertices = _vertices(x, frame, radius)
    weights = torch.empty(len(x), 16, vertices.shape[1], dtype=x.dtype).exponential_(generator=generator).to(x.device)
    weights /= weights.sum(-1, keepdim=True)
    with torch.no_grad():
        inside = (weights @ vertices.flatten(2)).view(-1, *x.shape[1:])
        values = net(vertices.flatten(0, 1)).unflatten(0, vertices.shape[:2])
        return (net(inside).unflatten(0, weights.shape[:2]) - weights @ values).abs().amax((1, 2))


def decision_boundary_points(
    net: nn.Module, a: Float[Tensor, "n *features"], b: Float[Tensor, "n *features"], iterations: int = 30
) -> tuple[Float[Tensor, "m *features"], Bool[Tensor, " n"]]:
    """Points on the decision boundary, found by bisection between inputs that ``net`` classifies differently.

    Parameters
    ----------
    net
        A classifier.
    a, b
        Pairs of inputs.
    iterations
        Number of halvings of the segment from ``a`` to ``b``.

    Returns
    -------
    points
        For each pair whose predictions differ, a point on the edge of the decision region of ``a``'s class, inside it.
    mask
        Which pairs these are.

    Raises
    ------
    ValueError
        If ``a`` and ``b`` differ in shape or ``iterations`` is not positive.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    with torch.no_grad():
        mask = net(a).argmax(1) != net(b).argmax(1)
        inside, outside = a[mask], b[mask]
        if mask.any():
            label = net(inside).argmax(1)
            for _ in range(iterations):
                middle = (inside + outside) / 2
                same = (net(middle).argmax(1) == label).view(-1, *[1] * (a.ndim - 1))
                inside, outside = torch.where(same, middle, inside), torch.where(same, outside, middle)
    return inside, mask


def _stack_outputs(
    network: nn.Sequential, stacked: Mapping[str, Float[Tensor, "E *shape"]], x: Float[Tensor, "E n *features"]
) -> Float[Tensor, "E n *outputs"]:
    """Outputs of every network for its own inputs, layer by layer; vmap would do, but an MLP is faster without it."""
    for name, layer in network.named_children():
        own = {key.removeprefix(f"{name}."): value for key, value in stacked.items() if key.startswith(f"{name}.")}
        if isinstance(layer, _ACTIVATIONS):
            x = layer(x)
        elif isinstance(layer, nn.Linear):
            x = torch.baddbmm(own["bias"][:, None], x, own["weight"].mT)
        else:
            x = torch.vmap(partial(functional_call, layer))(own, x)
    return x


def train_stack(
    networks: Sequence[nn.Sequential],
    x: Float[Tensor, "E n *features"],
    y: Shaped[Tensor, "E n *targets"],
    *,
    loss: Callable[[Tensor, Tensor], Float[Tensor, " E"]],
    optimizer: Callable[..., torch.optim.Optimizer],
    batch_size: int | None,
    record_at: Collection[int],
    record: Callable[[], Mapping[str, Tensor]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Train ``E`` networks of one architecture at once, each on its own data, and record at chosen steps.

    The *sum* of the losses is minimised. Networks then do not interact, and an optimiser that treats every entry by
    itself (SGD, AdamW) takes the steps of ``E`` separate runs; a mean would shrink the gradients against AdamW's eps.

    Parameters
    ----------
    networks
        Trained in place, up to the last step of ``record_at``. Their parameters become views of stacked ones, so that
        ``record`` sees each network as it is. Linear layers need biases; buffers (batch normalisation) are refused.
    x, y
        Inputs and targets of each network.
    loss
        Maps outputs (E, batch, ...) and targets to one loss for each network.
    optimizer
        The optimiser's class, or a partial of it.
    batch_size
        Samples per step, drawn with replacement for each network by itself; None takes all of them, in order.
    record_at
        Numbers of steps after which to record; 0 is the start.
    record
        Called without gradient.
    generator
        Source of the batches.

    Returns
    -------
    dict
        ``"step"`` and every key of ``record``, stacked over records, and ``"loss"`` (steps, E), the loss that each step
        saw.

    Raises
    ------
    TypeError
        If a network is no ``nn.Sequential``.
    ValueError
        If there is no network, one has buffers, ``x`` and ``y`` do not start with (E, n), ``batch_size`` is smaller
        than 1, or ``record_at`` holds a negative number or none.
    """
    if not all(isinstance(network, nn.Sequential) for network in networks):
        raise TypeError(f"networks must be nn.Sequential, got {[type(network).__name__ for network in networks]}")
    if not networks or any(True for network in networks for _ in network.buffers()):
        raise ValueError(f"networks must hold at least one network, and none with buffers, got {list(networks)}")
    if len(x) != len(networks) or x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"x and y must start with (networks, samples) for {len(networks)} networks, "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be None or at least 1, got {batch_size}")
    if not record_at or min(record_at) < 0:
        raise ValueError(f"record_at must hold numbers of steps, none negative, got {sorted(record_at)}")
    stacked, _ = stack_module_state(list(networks))
    for e, network in enumerate(networks):
        for name, parameter in network.named_parameters():
            parameter.data = stacked[name].detach()[e]
    update = optimizer(list(stacked.values()))
    members = torch.arange(len(networks), device=x.device)[:, None]
    rows, losses = [], []
    last = max(record_at)
    for step in trange(last + 1, leave=False):
        if step in record_at:
            with torch.no_grad():
                rows.append({"step": torch.tensor(step), **record()})
        if step == last:
            break
        inputs, targets = x, y
        if batch_size is not None:
            batch = torch.randint(x.shape[1], (len(x), batch_size), generator=generator).to(x.device)
            inputs, targets = x[members, batch], y[members, batch]
        values = loss(_stack_outputs(networks[0], stacked, inputs), targets)
        update.zero_grad()
        values.sum().backward()
        update.step()
        losses.append(values.detach())
    history = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return history | {"loss": torch.stack(losses) if losses else x.new_zeros(0, len(x))}
