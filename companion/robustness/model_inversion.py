"""Generative model inversion: what a classifier gives away about its classes, and how to measure it.

Zhang, Jia, Pei, Wang, Li and Song, "The Secret Revealer: Generative Model-Inversion Attacks Against Deep Neural
Networks", CVPR 2020 (arXiv 1911.07135).

A classifier ``f`` of private classes is audited by its owner: a generator ``G`` and a critic ``D``, trained on public
data of the same kind, are the prior; the attack looks for the code ``z`` whose image ``G(z)`` both find convincing. The
module also draws faces of invented people to practise on, and trains classifiers with differential privacy. Fully
connected classifiers are lists of tensors ``[W_1, b_1, W_2, b_2, ...]``, which may carry leading axes (seeds, epochs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import ClassifierMixin
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from companion import models, training

Classifier = Callable[[Float[Tensor, "*runs_n_image"]], Float[Tensor, "*runs n classes"]]


def toy_faces(
    n_people: int, per_person: int, generator: torch.Generator
) -> tuple[Float[Tensor, "n 256"], Int[Tensor, " n"], Float[Tensor, "n_people 8"]]:
    """Drawn faces of invented people: 16x16 grey values in [0, 1], person after person.

    A person is eight traits, uniform in [-1, 1]: width and height of the face, hair line, distance and height of the
    eyes, length of the nose, width and curvature of the mouth. Photographs of one person differ in shift, contrast,
    light from the side, and pixel noise.

    Returns
    -------
    X, y, traits
        The images as rows, the person in each, and the traits of the people.

    Raises
    ------
    ValueError
        If a number is not positive.
    """
    if n_people < 1 or per_person < 1:
        raise ValueError(f"n_people and per_person must be at least 1, got {n_people=} and {per_person=}")
    traits = 2 * torch.rand(n_people, 8, generator=generator) - 1
    y = torch.arange(n_people).repeat_interleave(per_person)
    face_w, face_h, hair, eye_x, eye_y, nose, mouth, bend = traits[y].T[:, :, None, None]
    shift_x, shift_y, contrast, light = torch.randn(4, len(y), 1, 1, generator=generator)
    side = torch.linspace(-1, 1, 16)
    x, down = side[None, :] - 0.05 * shift_x, side[:, None] - 0.05 * shift_y

    head = torch.sigmoid(6 * (1 - (x / (0.62 + 0.12 * face_w)) ** 2 - (down / (0.80 + 0.08 * face_h)) ** 2))
    image = head * (0.75 - 0.45 * torch.sigmoid(10 * (-0.38 + 0.18 * hair - down)))
    eyes = ((x.abs() - (0.26 + 0.07 * eye_x)) / 0.11) ** 2 + ((down - (-0.12 + 0.08 * eye_y)) / 0.09) ** 2
    image = image - 0.65 * torch.exp(-eyes)
    image = image - 0.3 * torch.exp(-((x / 0.06) ** 2) - ((down - 0.12) / (0.14 + 0.05 * nose)) ** 2)
    mouth = 0.26 + 0.09 * mouth
    lips = (down - 0.46 - 0.3 * 0.35 * bend * (x / mouth) ** 2) / 0.07
    image = image - 0.6 * torch.exp(-(lips**2)) * torch.sigmoid(14 * (mouth - x.abs()))

    image = image * (1 + 0.1 * contrast) * (1 + 0.3 * 0.3 * light * side)
    image = image + 0.03 * torch.randn(image.shape, generator=generator)
    return image.clamp(0, 1).flatten(1), y, traits


def logits(parameters: Sequence[Tensor], x: Float[Tensor, "*runs n d"]) -> Float[Tensor, "*runs n classes"]:
    """Output of fully connected networks with ReLU, before the softmax; leading axes of all tensors broadcast."""
    for layer, (W, b) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        x = (F.relu(x) if layer else x) @ W.mT + b.unsqueeze(-2)
    return x


def mlp_gan(latent: int, hidden: int, pixels: int, generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
    """Untrained generator and critic for images that are rows: three linear layers each."""
    G = nn.Sequential(models.mlp([latent, hidden, hidden, pixels], generator=generator), nn.Sigmoid())
    D = models.mlp([pixels, hidden, hidden, 1], generator=generator, activation=lambda: nn.LeakyReLU(0.2))
    return G, D


def conv_gan(latent: int, width: int, generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
    """Untrained convolutional generator and critic for images of shape (1, 32, 32), after DCGAN, without batch norm.

    ``width`` is the number of channels next to the image; it doubles whenever the resolution is halved.
    """

    def layer(kind: type[nn.Module], n_in: int, n_out: int, **options: int) -> nn.Module:
        module = nn.utils.skip_init(kind, n_in, n_out, **options)
        nn.init.xavier_normal_(module.weight, generator=generator)
        nn.init.zeros_(module.bias)
        return module

    halve = dict(kernel_size=4, stride=2, padding=1)
    widths = [4 * width, 2 * width, width, 1]
    up: list[nn.Module] = [layer(nn.Linear, latent, widths[0] * 16), nn.Unflatten(-1, (widths[0], 4, 4))]
    for n_in, n_out in pairwise(widths):
        up += [nn.ReLU(), layer(nn.ConvTranspose2d, n_in, n_out, **halve)]
    down: list[nn.Module] = []
    for n_in, n_out in pairwise(widths[::-1]):
        down += [layer(nn.Conv2d, n_in, n_out, **halve), nn.LeakyReLU(0.2)]
    return nn.Sequential(*up, nn.Sigmoid()), nn.Sequential(*down, nn.Flatten(), layer(nn.Linear, widths[0] * 16, 1))


def _draw_codes(G: nn.Module, shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "*shape latent"]:
    """Standard normal codes for a generator that begins with a linear layer."""
    weight = next(G.parameters())
    return torch.randn(*shape, weight.shape[1], generator=generator).to(weight)


def gradient_penalty(
    D: Callable[[Tensor], Tensor], real: Float[Tensor, "n *image"], fake: Float[Tensor, "n *image"], mix: Tensor
) -> Float[Tensor, ""]:
    """Mean of ``(‖∇D‖ - 1)²`` at ``mix·real + (1-mix)·fake``, differentiable; ``mix`` broadcasts over images."""
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(D(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def train_wgan_gp(
    G: nn.Module,
    D: nn.Module,
    X: Float[Tensor, "n *image"],
    generator: torch.Generator,
    *,
    steps: int,
    critic_steps: int = 3,
    lr: float = 5e-4,
) -> None:
    """Train a generator and a critic in place on public images: Wasserstein GAN with gradient penalty 10.

    Adam with betas (0.5, 0.9), mini-batches of 64. Source: the paper's first stage; Gulrajani et al., 2017.

    Parameters
    ----------
    G, D
        Generator, which begins with a linear layer, and critic.
    X
        Public images.
    generator
        Source of mini-batches and codes.
    steps, critic_steps
        Steps of the generator, and of the critic before each.
    lr
        Learning rate of both.

    Raises
    ------
    ValueError
        If ``X`` holds fewer than 64 images or a value that is not finite, or a number is not positive.
    """
    if len(X) < 64 or not X.isfinite().all():
        raise ValueError(f"X must hold at least 64 finite images, got shape {tuple(X.shape)}")
    if steps < 1 or critic_steps < 1 or not lr > 0:
        raise ValueError(f"steps, critic_steps and lr must be positive, got {steps=}, {critic_steps=}, {lr=}")
    options = dict(lr=lr, betas=(0.5, 0.9))
    update_G, update_D = torch.optim.Adam(G.parameters(), **options), torch.optim.Adam(D.parameters(), **options)
    batches = training.minibatches(len(X), 64, generator)
    for _ in trange(steps, leave=False):
        for _ in range(critic_steps):
            real = X[next(batches)]
            with torch.no_grad():
                fake = G(_draw_codes(G, [64], generator))
            mix = torch.rand(64, *[1] * (X.ndim - 1), generator=generator).to(X)
            loss = D(fake).mean() - D(real).mean() + 10 * gradient_penalty(D, real, fake, mix)
            update_D.zero_grad()
            loss.backward()
            update_D.step()
        update_G.zero_grad()
        (-D(G(_draw_codes(G, [64], generator))).mean()).backward()
        update_G.step()


def _descend(
    loss: Callable[[Tensor], Tensor], x: Tensor, box: tuple[float, float], steps: int, lr: float, momentum: float
) -> Tensor:
    """Gradient descent with Nesterov momentum, clipped to a box after each step."""
    if steps < 0 or not lr > 0 or not 0 <= momentum < 1:
        raise ValueError(f"steps ≥ 0, lr > 0 and 0 ≤ momentum < 1 are needed, got {steps=}, {lr=}, {momentum=}")
    velocity = torch.zeros_like(x)
    for _ in range(steps):
        x.requires_grad_()
        (slope,) = torch.autograd.grad(loss(x), x)
        faster = momentum * velocity - lr * slope
        x = (x.detach() - momentum * velocity + (1 + momentum) * faster).clamp(*box)
        velocity = faster
    return x.detach()


def _check_labels(labels: Tensor, target: Classifier, images: Tensor) -> None:
    """Raise unless there are labels, and all are classes of the target."""
    if labels.numel() == 0:
        raise ValueError("labels is empty; name at least one class")
    with torch.no_grad():
        n_classes = target(images).shape[-1]
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"labels must be whole numbers from 0 to {n_classes - 1}, got {labels.unique().tolist()}")


def identity_loss(target: Classifier, images: Tensor, labels: Int[Tensor, "*runs n"]) -> Float[Tensor, ""]:
    """``-log f(image)_label``, summed: rows are independent, so no row's step depends on how many there are."""
    return F.cross_entropy(target(images).flatten(0, -2), labels.flatten(), reduction="sum")


def gmi_attack(
    G: nn.Module,
    D: nn.Module,
    target: Classifier,
    labels: Int[Tensor, "*runs n"],
    generator: torch.Generator,
    *,
    lam: float = 100.0,
    steps: int = 200,
    lr: float = 2e-4,
    momentum: float = 0.9,
    clip: float = 1.5,
    restarts: int = 1,
) -> tuple[Float[Tensor, "*runs_n_image"], Float[Tensor, "*runs n latent"]]:
    """Reconstruct one image per label: minimise ``-D(G(z)) - λ log f(G(z))_label`` over the code ``z``.

    The classifier under audit is only evaluated, never changed.

    Parameters
    ----------
    G, D
        Generator and critic, trained on public images.
    target
        The classifier under audit: images to logits. It sees the axes of ``labels``, then those of an image.
    labels
        The wanted classes.
    generator
        Source of the first codes, standard normal.
    lam
        Weight ``λ`` of the identity; 0 leaves the prior alone.
    steps, lr, momentum, clip
        Steps of Nesterov descent on the loss summed over rows; codes are clipped to ±``clip`` after each.
    restarts
        Starts per label; the one to which the target gives the highest probability of the label is kept.

    Raises
    ------
    ValueError
        If ``labels`` is empty or holds no class of the target, or a number is out of range.

    Notes
    -----
    Source: the paper's second stage.
    """
    if not lam >= 0 or not clip > 0 or restarts < 1:
        raise ValueError(f"lam ≥ 0, clip > 0 and restarts ≥ 1 are needed, got {lam=}, {clip=}, {restarts=}")
    rows = labels.repeat_interleave(restarts, -1)
    z = _draw_codes(G, rows.shape, generator)
    _check_labels(labels, target, G(z))

    def loss(z: Tensor) -> Tensor:
        image = G(z)
        return lam * identity_loss(target, image, rows) - D(image).sum()

    z = _descend(loss, z, (-clip, clip), steps, lr, momentum)
    with torch.no_grad():
        score = target(G(z)).log_softmax(-1).gather(-1, rows[..., None]).reshape(*labels.shape, restarts)
        z = z.reshape(*labels.shape, restarts, -1)
        z = z.take_along_dim(score.argmax(-1)[..., None, None], -2).squeeze(-2)
        return G(z), z


def emi_attack(
    target: Classifier,
    labels: Int[Tensor, "*runs n"],
    shape: Sequence[int],
    *,
    steps: int = 200,
    lr: float = 0.1,
    momentum: float = 0.9,
) -> Float[Tensor, "*runs_n_shape"]:
    """The earlier attack, without a prior: minimise ``-log f(x)_label`` over the pixels ``x``, from the black image.

    Parameters
    ----------
    target, labels, steps, lr, momentum
        As for :func:`gmi_attack`; pixels are clipped to [0, 1] after each step.
    shape
        Shape of one image.

    Raises
    ------
    ValueError
        As for :func:`gmi_attack`.

    Notes
    -----
    Source: the paper's baseline, existing model inversion (Fredrikson et al., 2015).
    """
    x = torch.zeros(*labels.shape, *shape, device=labels.device)
    _check_labels(labels, target, x)
    return _descend(lambda x: identity_loss(target, x, labels), x, (0, 1), steps, lr, momentum)


def attack_metrics(
    images: Float[Tensor, "n *image"],
    labels: Int[Tensor, " n"],
    judge: ClassifierMixin,
    X_private: Float[Tensor, "m *image"],
    y_private: Int[Tensor, " m"],
) -> dict[str, float]:
    """How often an independent judge recognises the wanted class, and how far the nearest private image of it is.

    Parameters
    ----------
    images, labels
        Reconstructions and the classes they were made for.
    judge
        A classifier that had no part in the attack.
    X_private, y_private
        The private images and their classes.

    Returns
    -------
    dict
        ``"accuracy"``: part of the images that the judge assigns to their label. ``"knn_distance"``: mean Euclidean
        distance to the nearest private image of the label.

    Raises
    ------
    ValueError
        If ``images`` and ``labels`` differ in number, or a label has no private image.
    """
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"images and labels must be of one length, got {len(images)} and {len(labels)}")
    own = labels[:, None] == y_private
    if not own.any(1).all():
        raise ValueError(f"labels must occur in y_private, got {labels[~own.any(1)].unique().tolist()}")
    rows = images.flatten(1)
    distance = torch.cdist(rows, X_private.flatten(1)).masked_fill(~own, math.inf).min(1).values
    guess = torch.as_tensor(judge.predict(rows.cpu().numpy()), device=labels.device)
    return {"accuracy": float((guess == labels).float().mean()), "knn_distance": float(distance.mean())}


def predictive_power(
    joint: Float[np.ndarray, "inputs classes"], model: Float[np.ndarray, "inputs classes"]
) -> tuple[Float[np.ndarray, " classes"], Float[np.ndarray, " classes"]]:
    """Predictive power ``U_f(y)`` and vulnerability ``S_f(y)`` of a model, on finitely many inputs, in nats.

    ``U`` is the mean over ``p(x|y)`` of ``log p_f(y|x) - log p_f(y)``; ``S`` is ``-KL(p(x|y) ‖ p_f(x|y))``, with the
    model's inverse ``p_f(x|y) = p_f(y|x) p(x) / p_f(y)``.

    Parameters
    ----------
    joint
        ``p(x, y)``: positive, with sum 1.
    model
        ``p_f(y|x)``: positive, every row with sum 1.

    Raises
    ------
    ValueError
        If an argument is not positive or not normalised, or the shapes differ.

    Notes
    -----
    Source: the paper's theorem on predictive power and vulnerability.
    """
    if joint.shape != model.shape or joint.ndim != 2:
        raise ValueError(f"joint and model must be matrices of one shape, got {joint.shape} and {model.shape}")
    for name, array, total in (("joint", joint, joint.sum()), ("rows of model", model, model.sum(1))):
        if not (array > 0).all() or not np.allclose(total, 1, rtol=0, atol=1e-9):
            raise ValueError(f"{name} must be positive with sum 1, got a least entry {array.min()} and sums {total}")
    p_x, p_x_given_y = joint.sum(1), joint / joint.sum(0)
    p_f_y = p_x @ model
    U = (p_x_given_y * np.log(model / p_f_y)).sum(0)
    inverse = model * p_x[:, None] / p_f_y
    S = -(p_x_given_y * np.log(p_x_given_y / inverse)).sum(0)
    return U, S


def clipped_gradients(
    parameters: Sequence[Tensor], x: Float[Tensor, "*runs n d"], y: Int[Tensor, "*runs n"], clip: float
) -> list[Tensor]:
    """Sum over records of the gradient of the cross-entropy, each record's first scaled to norm ``clip`` or less.

    For a network with one hidden layer. A record's gradient is an outer product in each layer, so its norm follows from
    the norms of the factors: ``‖δ₂‖² (‖h‖² + 1) + ‖δ₁‖² (‖x‖² + 1)``, and no record needs a gradient of its own.

    Raises
    ------
    ValueError
        If ``clip`` is not positive.
    """
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    W1, b1, W2, b2 = parameters
    h = F.relu(x @ W1.mT + b1.unsqueeze(-2))
    delta2 = (h @ W2.mT + b2.unsqueeze(-2)).softmax(-1) - F.one_hot(y, W2.shape[-2])
    delta1 = (delta2 @ W2) * (h > 0)
    squares = [array.square().sum(-1) for array in (delta2, h, delta1, x)]
    norm = (squares[0] * (squares[1] + 1) + squares[2] * (squares[3] + 1)).sqrt()
    scale = (clip / norm.clamp(min=clip)).unsqueeze(-1)
    delta1, delta2 = scale * delta1, scale * delta2
    return [delta1.mT @ x, delta1.sum(-2), delta2.mT @ h, delta2.sum(-2)]


def dp_train(
    X: Float[Tensor, "runs n d"],
    y: Int[Tensor, "runs n"],
    n_classes: int,
    generator: torch.Generator,
    *,
    noise_multiplier: float,
    clip: float = 1.0,
    steps: int = 150,
    lr: float = 1.0,
) -> list[Tensor]:
    """Train classifiers with 64 hidden units by noisy gradient descent on all records, one for each run.

    Each step adds normal noise of standard deviation ``noise_multiplier * clip`` to the sum of clipped gradients, and
    divides by the number of records; momentum is 0.9. What privacy of single records this gives, :func:`zcdp_epsilon`
    says.

    Parameters
    ----------
    X, y
        Private images and classes of every run (seed).
    n_classes
        Number of classes.
    generator
        Source of initial weights and noise.
    noise_multiplier
        ``σ``; 0 trains with clipped gradients alone.
    clip
        Largest norm ``C`` of one record's gradient.
    steps, lr
        Number of steps and learning rate.

    Returns
    -------
    list of Tensor
        ``[W_1, b_1, W_2, b_2]`` with a first axis over runs, for :func:`logits`.

    Raises
    ------
    ValueError
        If the shapes do not fit, a label is no class, or a number is out of range.

    Notes
    -----
    Source: differentially private gradient descent as in Abadi et al., 2016, without subsampling.
    """
    if X.ndim != 3 or y.shape != X.shape[:2]:
        raise ValueError(f"X must be (runs, n, d) and y (runs, n), got {tuple(X.shape)} and {tuple(y.shape)}")
    if y.min() < 0 or y.max() >= n_classes:
        raise ValueError(f"y must lie between 0 and {n_classes - 1}, got {y.min()} to {y.max()}")
    if not noise_multiplier >= 0 or steps < 1 or not lr > 0:
        raise ValueError(f"noise ≥ 0, steps ≥ 1 and lr > 0 are needed, got {noise_multiplier=}, {steps=}, {lr=}")
    networks = [models.mlp([X.shape[-1], 64, n_classes], generator=generator) for _ in X]
    parameters = [p.detach() for p in training.Ensemble(networks).parameters.values()]
    velocity = [torch.zeros_like(p) for p in parameters]
    for _ in range(steps):
        for k, total in enumerate(clipped_gradients(parameters, X, y, clip)):
            noise = noise_multiplier * clip * torch.randn(total.shape, generator=generator)
            velocity[k] = 0.9 * velocity[k] + (total + noise) / X.shape[1]
        parameters = [p - lr * v for p, v in zip(parameters, velocity, strict=True)]
    return parameters


def zcdp_epsilon(steps: int, noise_multiplier: float, delta: float) -> float:
    """``ε`` of (ε, δ)-differential privacy after noisy full-batch steps, for adding or removing one record.

    Zero-concentrated privacy ``ρ = T/(2σ²)`` adds up over steps, and ``ε = ρ + 2 sqrt(ρ log(1/δ))``. Infinite without
    noise. Source: Bun and Steinke, 2016.

    Raises
    ------
    ValueError
        If ``steps`` is smaller than 1, the noise negative, or ``delta`` not between 0 and 1.
    """
    if steps < 1 or not noise_multiplier >= 0 or not 0 < delta < 1:
        raise ValueError(f"steps ≥ 1, noise ≥ 0, 0 < delta < 1 are needed, got {steps=}, {noise_multiplier=}, {delta=}")
    if noise_multiplier == 0:
        return math.inf
    rho = steps / (2 * noise_multiplier**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))
