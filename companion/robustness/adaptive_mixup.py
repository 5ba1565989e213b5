"""AdaMixUp: mixing policies that are learned so that mixed examples stay off the data of other classes.

Guo, Mao and Zhang, "MixUp as Locally Linear Out-Of-Manifold Regularization", AAAI 2019 (arXiv 1809.02499). Details that
the abstract leaves open follow the released code (github.com/SITE5039/AdaMixUp).

A pair of examples is mixed to ``γ x1 + (1-γ) x2`` with the label ``γ y1 + (1-γ) y2``. MixUp draws ``γ`` from one fixed
distribution; AdaMixUp learns, for each pair, an interval ``[α, α+Δ]`` to draw it from. Everything here is written for
one network and one batch; :func:`fit` trains several seeds side by side through ``torch.func.vmap``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F

from companion import models, training

METHODS = ("erm", "mixup", "mixup_clean", "no_discriminator", "adamixup", "adamixup_joint")


def target(per_class: int, generator: torch.Generator) -> tuple[Float[Tensor, "n 2"], Int[Tensor, " n"]]:
    """A disc (class 0) inside two rings of radius 1 and 2 (classes 1 and 2); chords of a ring cross what lies inside.

    The radius has noise of standard deviation 0.08, and each coordinate further noise of 0.05.

    Raises
    ------
    ValueError
        If ``per_class`` is smaller than 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    y = torch.arange(3).repeat_interleave(per_class)
    radius = y + 0.08 * torch.randn(len(y), generator=generator)
    angle = 2 * torch.pi * torch.rand(len(y), generator=generator)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    return radius[:, None] * circle + 0.05 * torch.randn(len(y), 2, generator=generator), y


def _blend(a: Tensor, b: Tensor, gamma: Float[Tensor, "n 1"]) -> Tensor:
    """``γ a + (1-γ) b``, row by row, for rows of any shape."""
    gamma = gamma.view(-1, *[1] * (a.ndim - 1))
    return gamma * a + (1 - gamma) * b


def mixup(
    x: Float[Tensor, "n *features"],
    y_onehot: Float[Tensor, "n classes"],
    gamma: Float[Tensor, "n *one"],
    index: Int[Tensor, " n"],
) -> tuple[Float[Tensor, "n *features"], Float[Tensor, "n classes"]]:
    """Mix every example with a partner, inputs and labels alike.

    Parameters
    ----------
    x, y_onehot
        Inputs, and labels as distributions over classes.
    gamma
        The weight of the example itself, one per pair, in [0, 1]; shape (n,) or (n, 1).
    index
        For each example its partner's row.

    Raises
    ------
    ValueError
        If the numbers of rows differ or ``gamma`` leaves [0, 1].
    """
    n = len(x)
    if len(y_onehot) != n or tuple(index.shape) != (n,):
        raise ValueError(
            f"y_onehot and index must have one row for each of the {n} of x, "
            f"got shapes {tuple(y_onehot.shape)} and {tuple(index.shape)}"
        )
    if tuple(gamma.shape) not in ((n,), (n, 1)) or not ((gamma >= 0) & (gamma <= 1)).all():
        raise ValueError(
            f"gamma must hold one number in [0, 1] for each of {n} pairs, got shape {tuple(gamma.shape)} with values "
            f"from {gamma.min():g} to {gamma.max():g}"
        )
    return _blend(x, x[index], gamma), _blend(y_onehot, y_onehot[index], gamma)


class PolicyRegion(nn.Module):
    """The policy region generator: for a pair of examples, the interval ``[α, α+Δ]`` that ``γ`` is drawn from.

    ``(α, Δ, α') = softmax(g(x1, x2))``, so the interval lies in [0, 1]. The last layer starts close to zero (standard
    deviation 1e-3), and with it every interval close to [1/3, 2/3].

    Parameters
    ----------
    d
        Number of features of one example (after ``trunk``).
    hidden
        Width of the two hidden layers of ``g``.
    generator
        Source of the initial weights.
    trunk
        Applied to each example before ``g``; None leaves examples as they are.

    Raises
    ------
    ValueError
        If ``d`` or ``hidden`` is smaller than 1.
    """

    def __init__(self, d: int, hidden: int = 64, *, generator: torch.Generator, trunk: nn.Module | None = None) -> None:
        super().__init__()
        if d < 1 or hidden < 1:
            raise ValueError(f"d and hidden must be at least 1, got {d=} and {hidden=}")
        self.trunk = trunk or nn.Identity()
        self.g = models.mlp([2 * d, hidden, hidden, 3], generator=generator)
        nn.init.normal_(self.g[-1].weight, std=1e-3, generator=generator)
        nn.init.zeros_(self.g[-1].bias)

    def forward(
        self, x1: Float[Tensor, "n *features"], x2: Float[Tensor, "n *features"]
    ) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
        """The lower end ``α`` and the length ``Δ`` of the interval of every pair."""
        shares = self.g(torch.cat([self.trunk(x1), self.trunk(x2)], -1)).softmax(-1)
        return shares[:, :1], shares[:, 1:2]

    def sample(
        self, x1: Float[Tensor, "n *features"], x2: Float[Tensor, "n *features"], epsilon: Float[Tensor, "n 1"]
    ) -> Float[Tensor, "n 1"]:
        """``γ = α + ε Δ``: a draw from the interval, differentiable in the policy, for ``ε`` uniform in (0, 1)."""
        alpha, delta = self(x1, x2)
        return alpha + epsilon * delta


class AdaMixUp(nn.Module):
    """The networks of AdaMixUp and the terms of its loss.

    Parameters
    ----------
    classifier
        Maps examples to logits of the classes.
    policy
        The policy region generator; None draws ``γ`` from all of [0, 1], which is MixUp with Beta(1, 1).
    discriminator
        Maps examples to one logit, positive for "real example"; None leaves its term out.
    stop_gradient
        Whether the classifier's loss on mixed examples is kept from the policy. The released code does not keep it.
    terms
        What the classifier is shown: clean examples (``"data"``), mixed ones (``"mix"``), or both.

    Raises
    ------
    ValueError
        If ``terms`` is empty or names anything else.
    """

    def __init__(
        self,
        classifier: nn.Module,
        policy: PolicyRegion | None = None,
        discriminator: nn.Module | None = None,
        stop_gradient: bool = True,
        terms: tuple[str, ...] = ("data", "mix"),
    ) -> None:
        super().__init__()
        if not terms or not set(terms) <= {"data", "mix"}:
            raise ValueError(f"terms must name 'data', 'mix' or both, got {terms}")
        self.classifier, self.policy, self.discriminator = classifier, policy, discriminator
        self.stop_gradient, self.terms = stop_gradient, terms

    def gamma(self, x1: Tensor, x2: Tensor, epsilon: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
        """The mixing weights of pairs, for ``epsilon`` uniform in (0, 1)."""
        return epsilon if self.policy is None else self.policy.sample(x1, x2, epsilon)

    def forward(
        self,
        x1: Float[Tensor, "n *features"],
        y1: Float[Tensor, "n classes"],
        x2: Float[Tensor, "n *features"],
        y2: Float[Tensor, "n classes"],
        x_unseen: Float[Tensor, "m *features"],
        epsilon: Float[Tensor, "n 1"],
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms of the loss: those of ``terms`` and, with a discriminator, ``intrusion``; AdaMixUp adds them up.

        Parameters
        ----------
        x1, y1, x2, y2
            The pairs, with one-hot labels. The clean term is that of ``x1``.
        x_unseen
            Real examples that take part in no pair, shown to the discriminator only.
        epsilon
            Uniform in (0, 1): where in its interval each ``γ`` lies.
        """
        gamma = self.gamma(x1, x2, epsilon)
        heard = gamma.detach() if self.stop_gradient else gamma
        batches = {"data": (x1, y1), "mix": (_blend(x1, x2, heard), _blend(y1, y2, heard))}
        # The classifier sees what it is trained on and nothing else: batch normalisation would take it in.
        inputs, targets = zip(*(batches[term] for term in self.terms), strict=True)
        logits = self.classifier(torch.cat(inputs)).split(len(x1))
        losses = {term: F.cross_entropy(*pair) for term, *pair in zip(self.terms, logits, targets, strict=True)}
        if self.discriminator is not None:
            logits = self.discriminator(torch.cat([x1, x_unseen, _blend(x1, x2, gamma)]))[:, 0]
            real = torch.arange(len(logits), device=logits.device) < len(x1) + len(x_unseen)
            losses["intrusion"] = F.binary_cross_entropy_with_logits(logits, real.to(logits.dtype))
        return losses


Networks = tuple[nn.Module, PolicyRegion, nn.Module]  # classifier, policy, discriminator


def mlps(d: int, n_classes: int, hidden: int, generator: torch.Generator) -> Networks:
    """Classifier, policy and discriminator as separate perceptrons, with two hidden layers each.

    Raises
    ------
    ValueError
        If there are fewer than two classes, or ``d`` or ``hidden`` is smaller than 1.
    """
    if n_classes < 2:
        raise ValueError(f"n_classes must be at least 2, got {n_classes}")
    classifier = models.mlp([d, hidden, hidden, n_classes], generator=generator)
    policy = PolicyRegion(d, hidden, generator=generator)
    return classifier, policy, models.mlp([d, hidden, hidden, 1], generator=generator)


def _conv(n_in: int, n_out: int, size: int, stride: int = 1) -> nn.Module:
    return nn.utils.skip_init(nn.Conv2d, n_in, n_out, size, stride=stride, padding=size // 2, bias=False)


class _Block(nn.Module):
    """A pre-activation residual block."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(n_in), nn.ReLU())
        self.residual = nn.Sequential(
            _conv(n_in, n_out, 3, stride), nn.BatchNorm2d(n_out), nn.ReLU(), _conv(n_out, n_out, 3)
        )
        self.shortcut = _conv(n_in, n_out, 1, stride) if (stride, n_in) != (1, n_out) else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.activate(x)
        return self.residual(z) + (x if self.shortcut is None else self.shortcut(z))


def resnets(channels: int, n_classes: int, width: int, generator: torch.Generator) -> Networks:
    """The paper's networks: pre-activation ResNet-18 (``width`` 64), one trunk for classifier and discriminator.

    The policy has a trunk of its own, of the same form. Source: the released code.

    Raises
    ------
    ValueError
        If a number is smaller than 1.
    """
    if min(channels, n_classes, width) < 1:
        raise ValueError(f"channels, n_classes and width must be at least 1, got {channels=}, {n_classes=}, {width=}")
    widths = [width * 2**stage for stage in range(4)]

    def trunk() -> nn.Module:
        pairs = zip([width, *widths], widths, strict=False)
        blocks = [
            block
            for stage, (n_in, n_out) in enumerate(pairs)
            for block in (_Block(n_in, n_out, 1 if stage == 0 else 2), _Block(n_out, n_out, 1))
        ]
        net = nn.Sequential(_conv(channels, width, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                models.initialised(layer, generator)
        return net

    shared, d = trunk(), widths[-1]
    heads = [nn.Sequential(shared, models.mlp([d, n_out], generator=generator)) for n_out in (n_classes, 1)]
    return heads[0], PolicyRegion(d, generator=generator, trunk=trunk()), heads[1]


def fit(
    method: str,
    x: Float[Tensor, "members n *features"],
    y: Int[Tensor, "members n"],
    build: Callable[[torch.Generator], Networks],
    *,
    seeds: list[int],
    steps: int,
    lr: float,
    batch_size: int,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    cosine_to: float = 1.0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    record_every: int | None = None,
) -> list[list[AdaMixUp]]:
    """Train one network per member, all members side by side; every method starts from the same classifiers.

    Parameters
    ----------
    method
        ``"erm"``: clean examples only. ``"mixup"``: mixed examples only, ``γ`` uniform in (0, 1). ``"mixup_clean"``:
        both. ``"adamixup"``: with policy and discriminator. ``"adamixup_joint"``: the same, but the classifier's loss
        reaches the policy. ``"no_discriminator"``: a policy that is never taught.
    x, y
        A training set for each member, and its labels.
    build
        Makes the three networks of a member from a generator: a partial of :func:`mlps` or :func:`resnets`.
    seeds
        One per member, for the initial weights.
    steps, lr, batch_size, optimizer, cosine_to
        As for :func:`companion.training.fit`; each step draws ``batch_size`` pairs and as many unseen examples, with
        replacement.
    augment
        Applied to every batch; None for nothing.
    record_every
        Number of steps between two records; None keeps start and end.

    Returns
    -------
    list
        At each record (the first before training) the networks of all members.

    Raises
    ------
    ValueError
        If the method is unknown, shapes do not fit, ``x`` is not finite, or ``batch_size``, ``steps`` or ``lr`` is not
        positive.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if tuple(y.shape) != tuple(x.shape[:2]) or len(x) != len(seeds):
        raise ValueError(
            f"x, y and seeds must agree in members and examples, got shapes {tuple(x.shape)} and {tuple(y.shape)} and "
            f"{len(seeds)} seeds"
        )
    if not x.isfinite().all():
        raise ValueError("x holds NaN or infinite values; remove them first")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    terms = {"erm": ("data",), "mixup": ("mix",)}.get(method, ("data", "mix"))
    members = []
    for seed in seeds:
        classifier, policy, discriminator = build(torch.Generator().manual_seed(seed))
        if method in ("erm", "mixup", "mixup_clean"):
            policy = discriminator = None
        elif method == "no_discriminator":
            discriminator = None
        members.append(AdaMixUp(classifier, policy, discriminator, method != "adamixup_joint", terms).to(x.device))
    parameters, buffers = stack_module_state(members)

    def member_loss(parameters: dict, buffers: dict, *batch: Tensor) -> Tensor:
        # A shared trunk is one module under two names. To tie them again would leave vmap's tensors behind in it.
        return sum(functional_call(members[0], (parameters, buffers), batch, tie_weights=False).values())

    generator = torch.Generator().manual_seed(seeds[0])
    labels = F.one_hot(y).to(x.dtype)
    row = torch.arange(len(x), device=x.device)[:, None]

    def loss(_: int) -> Float[Tensor, " members"]:
        picked = torch.randint(x.shape[1], (3, len(x), batch_size), generator=generator).to(x.device)
        x1, x2, unseen = (x[row, index] if augment is None else augment(x[row, index], generator) for index in picked)
        epsilon = torch.rand(len(x), batch_size, 1, generator=generator).to(x)
        batch = x1, labels[row, picked[0]], x2, labels[row, picked[1]], unseen, epsilon
        return torch.vmap(member_loss)(parameters, buffers, *batch)

    records: list[list[AdaMixUp]] = []

    def keep() -> dict[str, Tensor]:
        records.append(copy.deepcopy(members))
        for number, member in enumerate(records[-1]):
            state = {key: value[number] for key, value in {**parameters, **buffers}.items()}
            member.load_state_dict(state, strict=False)  # a shared trunk is listed under one of its two names
            member.eval()
        return {}

    training.fit(
        loss,
        parameters.values(),
        **dict(steps=steps, lr=lr, optimizer=optimizer, cosine_to=cosine_to),
        record=keep,
        record_every=record_every or steps,
    )
    return records


def intrudes(
    x_mixed: Float[Tensor, "m d"],
    y_mixed: Float[Tensor, "m classes"],
    x: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    radius: float,
) -> Bool[np.ndarray, " m"]:
    """Which mixed points intrude: the nearest training point is near and the label denies it.

    A mixed point intrudes if the nearest training point is closer than ``radius`` and its label has less than half of
    the mass of the mixed label. (For two parents of one class their label has all of it.)

    Raises
    ------
    ValueError
        If ``radius`` is not positive, or inputs and labels differ in number.
    """
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
    if len(x_mixed) != len(y_mixed) or len(x) != len(y):
        raise ValueError(
            "y_mixed and y must have as many rows as x_mixed and x, got "
            f"{len(y_mixed)} for {len(x_mixed)} and {len(y)} for {len(x)}"
        )
    distance, nearest = NearestNeighbors(n_neighbors=1).fit(x.numpy()).kneighbors(x_mixed.numpy())
    mass = y_mixed.numpy()[np.arange(len(y_mixed)), y.numpy()[nearest[:, 0]]]
    return (distance[:, 0] < radius) & (mass < 0.5)


def intrusion_rate(x_mixed: Tensor, y_mixed: Tensor, x: Tensor, y: Tensor, radius: float) -> float:
    """The share of mixed points for which :func:`intrudes` holds."""
    return float(intrudes(x_mixed, y_mixed, x, y, radius).mean())


def label_conflict(
    x_stream: Float[Tensor, "m d"],
    y_stream: Float[Tensor, "m classes"],
    x: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    radius: float,
) -> Float[Tensor, " n"]:
    """For every training point, the mass ``κ`` that the labels seen around it give to other classes than its own.

    ``x_stream`` and ``y_stream`` are what a classifier is trained with; the mean label within ``radius`` counts. NaN
    where nothing lies within ``radius``.

    Raises
    ------
    ValueError
        If ``radius`` is not positive.
    """
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
    near = (torch.cdist(x, x_stream) < radius).to(y_stream.dtype)
    return 1 - (near @ y_stream).gather(1, y[:, None])[:, 0] / near.sum(1)


@torch.no_grad()
def linearity_deviation(
    classifier: nn.Module, x: Float[Tensor, "n *features"], n_pairs: int, generator: torch.Generator
) -> float:
    """``Λ``: how far predictions on segments between examples are from linear, between 0 and 2.

    The mean over random pairs and ``γ`` uniform in (0, 1) of ``‖f(γ x1 + (1-γ) x2) - γ f(x1) - (1-γ) f(x2)‖₁``, where
    ``f`` is the softmax of the classifier.

    Raises
    ------
    ValueError
        If ``n_pairs`` is smaller than 1.
    """
    if n_pairs < 1:
        raise ValueError(f"n_pairs must be at least 1, got {n_pairs}")
    x1, x2 = x[torch.randint(len(x), (2, n_pairs), generator=generator).to(x.device)]
    gamma = torch.rand(n_pairs, 1, generator=generator).to(x)
    mixed, first, second = (classifier(points).softmax(-1) for points in (_blend(x1, x2, gamma), x1, x2))
    return float((mixed - _blend(first, second, gamma)).abs().sum(1).mean())


def mixing_strength(gamma: Float[Tensor, "*n"]) -> float:
    """The mean of ``2 min(γ, 1-γ)``: 0 where nothing is mixed, 1 where everything is halved, 1/2 for uniform ``γ``.

    Raises
    ------
    ValueError
        If ``gamma`` leaves [0, 1] or is empty.
    """
    if not gamma.numel() or not ((gamma >= 0) & (gamma <= 1)).all():
        raise ValueError(f"gamma must hold numbers in [0, 1], got {gamma.numel()} numbers")
    return float(2 * torch.minimum(gamma, 1 - gamma).mean())
