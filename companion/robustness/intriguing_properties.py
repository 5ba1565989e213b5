"""Adversarial error as a power law of the perturbation size, its cause in the logit differences, and two remedies.

Cubuk, Zoph, Schoenholz and Le, "Intriguing properties of adversarial examples", 2017 (arXiv 1711.02846).

A network maps inputs ``x``, with samples on the first axis, to logits ``h`` of ``N`` classes. An attack is any function
``attack(net, x, y, eps)`` that returns inputs of the same shape which try to leave the classes ``y``; those of
:mod:`companion.attacks` fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn import functional

from companion import attacks
from companion.training import fit, minibatches

Attack = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
_CHUNK = 2000  # inputs that go through a network at once, so that large networks fit a GPU


class PowerLaw(NamedTuple):
    """A fit ``error = prefactor * eps**exponent``, its R² in logarithms, and the number of points used."""

    exponent: float
    prefactor: float
    r2: float
    n_points: int


def logit_differences(logits: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes-1"]:
    r"""Gaps :math:`\Delta_{1j} = h_{(1)} - h_{(j)}` between the largest logit and the j-th largest, j = 2, ..., N.

    Raises
    ------
    ValueError
        If ``logits`` is not a finite matrix with at least two columns.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.isfinite().all():
        raise ValueError(f"logits must be a finite (n, N) matrix with N >= 2, got shape {tuple(logits.shape)}")
    ordered = logits.sort(dim=1, descending=True).values
    return ordered[:, :1] - ordered[:, 1:]


def random_logit_gap_distribution(n_classes: int, j: int) -> stats.distributions.rv_frozen:
    r"""Law of :math:`\Delta_{1j}` for independent logits, uniform on [0, 1]: Beta(j-1, N+2-j), frozen, from SciPy.

    The gap between two order statistics of N uniform variables has the law of a sum of the j-1 spacings between them.

    Raises
    ------
    ValueError
        Unless 2 <= ``j`` <= ``n_classes``.
    """
    if not 2 <= j <= n_classes:
        raise ValueError(f"j must be between 2 and n_classes={n_classes}, got {j}")
    return stats.beta(j - 1, n_classes + 2 - j)


def logits(net: nn.Module, x: Float[Tensor, "n *features"]) -> Float[Tensor, "n classes"]:
    """What the network says, without gradient."""
    with torch.no_grad():
        return torch.cat([net(part) for part in x.split(_CHUNK)])


def accuracy(
    net: nn.Module,
    x: Float[Tensor, "n *features"],
    y: Int[Tensor, " n"],
    attack: Attack | None = None,
    eps: float = 0.0,
) -> float:
    """Part of the inputs that the network assigns to the classes ``y``, after an attack if one is given.

    Raises
    ------
    ValueError
        If ``x`` and ``y`` are empty or differ in length, or the attack refuses ``eps``.
    """
    if not len(x) == len(y) > 0:
        raise ValueError(f"x and y must have one length, at least 1, got {len(x)} and {len(y)}")
    right = 0
    for inputs, classes in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        attacked = inputs if attack is None else attack(net, inputs, classes, eps)
        right += int((logits(net, attacked).argmax(1) == classes).sum())
    return right / len(x)


def adversarial_error(
    net: nn.Module, x: Float[Tensor, "n *features"], attack: Attack, eps_values: Sequence[float]
) -> Float[np.ndarray, " sizes"]:
    r"""Part of the inputs whose *predicted* class an attack changes: :math:`P_{adv}(\epsilon)` for every size.

    No labels are needed, and :math:`P_{adv}(0) = 0` for every network, trained or not.

    Raises
    ------
    ValueError
        If ``x`` is empty, or the attack refuses a size (the attacks of :mod:`companion.attacks`: negative ones).

    Source: the paper's adversarial error, with predictions in place of labels.
    """
    predicted = logits(net, x).argmax(1)
    return np.array([1 - accuracy(net, x, predicted, attack, float(eps)) for eps in eps_values])


def fit_power_law(
    eps: Float[np.ndarray, " sizes"], error: Float[np.ndarray, " sizes"], low: float = 0.01, high: float = 0.3
) -> PowerLaw:
    """Least squares of log error on log ``eps``, over the points with ``low`` <= error <= ``high``.

    Parameters
    ----------
    eps, error
        Sizes of the perturbation, positive, and the error at each.
    low, high
        The window: below it there are too few errors to count, above it the curve saturates.

    Raises
    ------
    ValueError
        If ``eps`` and ``error`` are not vectors of one length, a size is not positive, the window is not inside
        (0, 1], or fewer than four points fall into it.
    """
    eps, error = np.asarray(eps, dtype=float), np.asarray(error, dtype=float)
    if eps.ndim != 1 or eps.shape != error.shape or not (eps > 0).all():
        raise ValueError(f"eps must hold positive sizes, one per error, got {eps.shape=} and {error.shape=}")
    if not 0 < low < high <= 1:
        raise ValueError(f"low and high must satisfy 0 < low < high <= 1, got {low=}, {high=}")
    inside = (low <= error) & (error <= high)
    if inside.sum() < 4:
        raise ValueError(f"error must have at least 4 values between {low} and {high}, got {inside.sum()}")
    line = stats.linregress(np.log(eps[inside]), np.log(error[inside]))
    with np.errstate(over="ignore"):  # a line that is almost vertical: the prefactor is infinite
        prefactor = float(np.exp(line.intercept))
    return PowerLaw(float(line.slope), prefactor, float(line.rvalue**2), int(inside.sum()))


def critical_epsilon(net: nn.Module, x: Float[Tensor, "n *features"]) -> Float[Tensor, " n"]:
    r"""Smallest perturbation, in the maximum norm, that changes the prediction if the network answers linearly.

    Class j overtakes the predicted class at :math:`\epsilon_j = \Delta_j / \|\nabla_x(h_{\hat y} - h_j)\|_1`; the
    smallest over j is returned. Exact for a linear network.

    Raises
    ------
    ValueError
        If ``x`` holds NaN or infinity.
    """
    if not x.isfinite().all():
        raise ValueError("x must be finite, got NaN or infinite values")

    def twice(sample: Float[Tensor, "*features"]) -> tuple[Tensor, Tensor]:
        h = net(sample[None])[0]
        return h, h  # one to differentiate, one to keep

    jacobian, h = vmap(jacrev(twice, has_aux=True), chunk_size=128)(x)
    jacobian, h = jacobian.detach().flatten(2), h.detach()
    top = h.argmax(1, keepdim=True)
    gap = h.gather(1, top) - h
    slope = (jacobian.take_along_dim(top[..., None], 1) - jacobian).abs().sum(-1)
    return (gap / slope).nan_to_num(nan=torch.inf, posinf=torch.inf).amin(1)  # 0/0: the predicted class itself


def entropy_regularized_loss(
    logits: Float[Tensor, "n classes"], y: Int[Tensor, " n"], weight: float
) -> Float[Tensor, ""]:
    r"""Mean cross-entropy plus ``weight`` times the mean entropy :math:`H(p) = -\sum_j p_j \log p_j` of the prediction.

    Raises
    ------
    ValueError
        If ``weight`` is negative or not finite.

    Source: the paper's entropy regularisation.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be finite and not negative, got {weight}")
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    return functional.nll_loss(log_p, y) + weight * entropy


def train(
    net: nn.Module,
    x: Float[Tensor, "n *features"],
    y: Int[Tensor, " n"],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    eps_max: float = 0.0,
    entropy_weight: float = 0.0,
) -> nn.Module:
    """Train ``net`` in place with Adam, and return it in evaluation mode.

    Parameters
    ----------
    net, x, y
        Network, inputs and labels.
    epochs, batch_size, lr
        Passes over the data, inputs per step, learning rate. The rate is constant: with the same initial weights and
        generator, a run with fewer epochs is the beginning of one with more.
    generator
        Source of the order of the batches and of the sizes of the attacks.
    eps_max
        If positive, every batch is replaced by FGSM examples of it, of a size uniform in [0, ``eps_max``] for each.
    entropy_weight
        Weight of the entropy of the prediction, see :func:`entropy_regularized_loss`.

    Raises
    ------
    ValueError
        If ``eps_max`` or ``entropy_weight`` is negative, ``epochs`` or ``lr`` is not positive, or ``batch_size`` is not
        between 1 and the number of inputs.
    """
    if epochs < 1 or not 1 <= batch_size <= len(x):
        raise ValueError(f"epochs must be positive and batch_size in [1, {len(x)}], got {epochs=}, {batch_size=}")
    if not 0 <= eps_max < math.inf:
        raise ValueError(f"eps_max must be finite and not negative, got {eps_max}")
    batches = minibatches(len(x), batch_size, generator)

    def loss(_: int) -> Tensor:
        rows = next(batches)
        inputs, labels = x[rows], y[rows]
        if eps_max:
            inputs = attacks.fgsm(net, inputs, labels, eps_max * torch.rand(len(rows), generator=generator).to(x))
        return entropy_regularized_loss(net(inputs), labels, entropy_weight)

    steps = epochs * (len(x) // batch_size)
    fit(loss, net.train().parameters(), steps=steps, lr=lr, optimizer=partial(torch.optim.Adam, fused=True))
    return net.eval()


class ArchitectureController:
    r"""A policy over architectures that learns from rewards: independent categorical decisions and REINFORCE.

    Decision k has logits :math:`\theta_k`, probabilities :math:`p = \mathrm{softmax}\,\theta_k`, and is updated by
    :math:`\theta_k \leftarrow \theta_k + \alpha\,\overline{(R - b)(e_a - p)}`, the mean over a batch of children with
    rewards R, where b is a moving average of R and :math:`e_a` the one-hot vector of the option taken.

    Parameters
    ----------
    choices
        Number of options of each decision.
    lr, baseline_decay
        Learning rate α, and the part of b that an update keeps.
    seed
        Of the controller's own random numbers.

    Raises
    ------
    ValueError
        If there is no decision or one without options, ``lr`` is not positive, or the decay is not in [0, 1).

    Source: Williams (1992); the paper searches as Zoph and Le (2017), with a recurrent controller.
    """

    def __init__(self, choices: Sequence[int], lr: float = 3.0, baseline_decay: float = 0.8, seed: int = 0) -> None:
        if not choices or min(choices) < 1:
            raise ValueError(f"choices must hold a positive number of options per decision, got {list(choices)}")
        if not lr > 0 or not 0 <= baseline_decay < 1:
            raise ValueError(f"lr must be positive and baseline_decay in [0, 1), got {lr=}, {baseline_decay=}")
        self.theta = [np.zeros(n) for n in choices]
        self.lr, self.baseline_decay, self.baseline = lr, baseline_decay, None
        self._rng = np.random.default_rng(seed)

    def probabilities(self) -> list[np.ndarray]:
        """Probability of every option, for each decision."""
        exponentials = [np.exp(theta - theta.max()) for theta in self.theta]
        return [value / value.sum() for value in exponentials]

    def sample(self) -> tuple[int, ...]:
        """One option for each decision, drawn from the policy."""
        return tuple(int(self._rng.choice(len(p), p=p)) for p in self.probabilities())

    def update(self, actions: Sequence[tuple[int, ...]], rewards: Sequence[float]) -> None:
        """Learn from children: what was chosen for each, and its reward.

        Raises
        ------
        ValueError
            If there are no children, numbers of actions and rewards differ, or a reward is not finite.
        """
        if not len(actions) == len(rewards) > 0 or not np.isfinite(rewards).all():
            raise ValueError(f"rewards must be finite, one for each of {len(actions)} actions, got {list(rewards)}")
        if self.baseline is None:  # the first rewards are all that is known of the scale
            self.baseline = float(np.mean(rewards))
        advantage = np.array(rewards) - self.baseline
        for k, p in enumerate(self.probabilities()):
            taken = np.eye(len(p))[[action[k] for action in actions]]
            self.theta[k] = self.theta[k] + self.lr * (advantage[:, None] * (taken - p)).mean(0)
        self.baseline = self.baseline_decay * self.baseline + (1 - self.baseline_decay) * float(np.mean(rewards))

    def best(self) -> tuple[int, ...]:
        """The most probable option of each decision."""
        return tuple(int(theta.argmax()) for theta in self.theta)
