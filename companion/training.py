"""A plain training loop, mini-batches, and ensembles: all seeds of a network trained at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from tqdm import trange

History = dict[str, Tensor]


def fit(
    loss: Callable[[int], Float[Tensor, " *members"]],
    parameters: Iterable[Tensor],
    *,
    steps: int,
    lr: float,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    cosine_to: float = 1.0,
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    clip: float = math.inf,
    record: Callable[[], Mapping[str, Tensor]] | None = None,
    record_every: int = 1,
) -> History:
    """Minimise ``loss`` and return what was recorded on the way.

    Parameters
    ----------
    loss
        Called with the number of the step, from 0; returns the loss to differentiate. The losses of an ensemble's
        members may come as one tensor: their sum is minimised, which trains each member as if it were alone (for
        optimisers that treat every entry by itself, as SGD and Adam do).
    parameters
        The tensors to train, in place.
    steps, lr, optimizer
        Number of steps, learning rate, and the optimiser's class or a partial of it.
    cosine_to
        The learning rate falls along half a cosine to this fraction of ``lr``; 1 keeps it constant.
    schedule
        Makes a scheduler of the learning rate, which moves on after every step; it takes the place of ``cosine_to``.
    clip
        A gradient of a larger norm is scaled to this one before the step; each member of an ensemble has its own norm.
    record
        Called without gradient before the first step and then after every ``record_every`` steps.

    Returns
    -------
    History
        ``"step"``, ``"loss"`` (the loss seen by the last step before the record) and every key of ``record``,
        stacked over records.

    Raises
    ------
    ValueError
        If ``steps`` or ``record_every`` is smaller than 1, or ``lr`` or ``clip`` is not positive.
    FloatingPointError
        If the loss stops being finite.
    """
    if steps < 1 or record_every < 1 or not lr > 0 or not clip > 0:
        raise ValueError(
            "steps and record_every must be at least 1, lr and clip positive, "
            f"got {steps=}, {record_every=}, {lr=}, {clip=}"
        )
    parameters = list(parameters)
    update = optimizer(parameters, lr=lr)
    rate = schedule(update) if schedule else CosineAnnealingLR(update, steps, eta_min=cosine_to * lr)
    rows: list[dict[str, Tensor]] = []

    def keep(step: int, value: Tensor) -> None:
        with torch.no_grad():
            rows.append({"step": torch.tensor(step), "loss": value.detach().clone(), **(record() if record else {})})

    for step in trange(steps, leave=False):
        update.zero_grad()
        value = loss(step)
        if step == 0:
            keep(0, value)
        value.sum().backward()
        if clip < math.inf:
            _clip([parameter.grad for parameter in parameters if parameter.grad is not None], clip, value.shape)
        update.step()
        rate.step()
        if (step + 1) % record_every == 0 or step + 1 == steps:
            if not value.isfinite().all():
                raise FloatingPointError(f"the loss is {value.tolist()} at step {step}; try a smaller lr than {lr}")
            keep(step + 1, value)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _clip(gradients: list[Tensor], largest: float, members: torch.Size) -> None:
    """Scale the gradients of each member, whose axes come first, to a norm of at most ``largest``, in place."""
    squares = [gradient.reshape(*members, -1).square().sum(-1) for gradient in gradients]
    scale = (largest / torch.stack(squares).sum(0).sqrt()).clamp(max=1)
    for gradient in gradients:
        gradient *= scale.view(*members, *[1] * (gradient.ndim - len(members)))


def minibatches(n_samples: int, batch_size: int, generator: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
    """Indices of mini-batches without end: a new permutation every epoch, an incomplete last batch dropped.

    Raises
    ------
    ValueError
        If ``batch_size`` is not between 1 and ``n_samples``.
    """
    if not 1 <= batch_size <= n_samples:
        raise ValueError(f"batch_size must be between 1 and n_samples={n_samples}, got {batch_size}")
    while True:
        order = torch.randperm(n_samples, generator=generator)
        yield from order[: n_samples - n_samples % batch_size].split(batch_size)


class Ensemble:
    """Networks of one architecture, evaluated and trained together through ``torch.func.vmap``.

    What sets members apart must be a parameter or a buffer: all else is taken from the first one.

    Parameters
    ----------
    networks
        One per seed. Their parameters and buffers are copied into ``parameters`` and ``buffers``, with a first axis
        over members; a tensor that two layers share stays shared.

    Raises
    ------
    ValueError
        If there is no network.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        if not networks:
            raise ValueError("networks is empty; an ensemble needs at least one network")
        self.parameters, self.buffers = stack_module_state(list(networks))
        self._architecture = networks[0]

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: tuple[Tensor, ...]) -> Tensor:
        return functional_call(self._architecture, (parameters, buffers), x)

    def __call__(self, *x: Float[Tensor, "n *features"]) -> Float[Tensor, "members n *outputs"]:
        """Outputs of every member for the same inputs."""
        return torch.vmap(self._one, in_dims=(0, 0, None))(self.parameters, self.buffers, x)

    def each(self, *x: Float[Tensor, "members n *features"]) -> Float[Tensor, "members n *outputs"]:
        """Outputs of every member for inputs of its own."""
        return torch.vmap(self._one)(self.parameters, self.buffers, x)

    def train(self, mode: bool = True) -> None:
        """Put all members into training mode, or into evaluation mode."""
        self._architecture.train(mode)

    def members(self) -> list[nn.Module]:
        """Copies of the networks with their present parameters and buffers."""
        copies = [deepcopy(self._architecture) for _ in next(iter(self.parameters.values()))]
        for k, network in enumerate(copies):
            state = {name: value[k].detach() for name, value in {**self.parameters, **self.buffers}.items()}
            network.load_state_dict(state, strict=False)  # a shared tensor has one name here and several there
        return copies
