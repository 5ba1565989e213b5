"""Critical learning periods of deep linear networks: pathways that compete, and tasks that follow each other.

Kleinman, Achille and Soatto, "Critical learning periods emerge even in deep linear networks", ICLR 2024
(arXiv 2308.12221).

Two pathways ``a`` and ``b``, each a product of ``D`` matrices, see the same input and add their outputs. They learn a
map with singular values ``S``. A mode of strength ``K`` in a pathway has strength ``p = K^(1/D)`` in each of its
matrices. Time ``t`` is the number of steps times the learning rate. Lists of weights start at the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from torch import Tensor
from tqdm import trange

Weights = list[Float[Tensor, "*batch n_out n_in"]]


def product(weights: Weights) -> Float[Tensor, "*batch n_out n_in"]:
    """``W_D ... W_1``, built from the output down."""
    return [*accumulate(reversed(weights), torch.matmul)][-1]


def _check_mode(S: float, strengths: Sequence[float], depth: int, name: str) -> None:
    """Raise unless the parameters describe a mode that two pathways of ``depth`` matrices can learn."""
    if depth < 1 or depth != int(depth):
        raise ValueError(f"depth must be a number of weight matrices, 1 or more, got {depth}")
    if not 0 < S < np.inf:
        raise ValueError(f"S must be positive and finite, got {S}")
    if len(strengths) != 2 or not all(0 < strength < np.inf for strength in strengths):
        raise ValueError(f"{name} must be two positive strengths, of a and of b, got {strengths}")


def pathway_dynamics(
    S: float,
    k0: tuple[float, float],
    depth: int,
    t: Float[np.ndarray, " times"],
    deficit: tuple[float, float] | None = None,
) -> Float[np.ndarray, "times 2"]:
    """Strengths ``K_a(t)``, ``K_b(t)`` of a mode that two pathways learn together.

    Solves ``dp_x/dt = p_x^(D-1) (S - p_a^D - p_b^D)``, with ``dp_b/dt = 0`` during the deficit.

    Parameters
    ----------
    S
        Singular value of the map to be learned.
    k0
        Initial strengths of the mode in ``a`` and in ``b``.
    depth
        Number ``D`` of matrices in each pathway.
    t
        Times, increasing, none negative.
    deficit
        Start and end of the time in which ``b`` does not learn. Its output still counts.

    Raises
    ------
    ValueError
        If ``S`` or a strength is not positive, ``depth`` is no whole number from 1, times do not increase, or the
        deficit is negative or ends before it starts.

    Notes
    -----
    Source: the paper's analysis of two pathways; definition of the deficit as in the authors' code.
    """
    _check_mode(S, k0, depth, "k0")
    t = np.asarray(t, dtype=float)
    if t.ndim != 1 or not t.size or not np.isfinite(t).all() or t[0] < 0 or (np.diff(t) <= 0).any():
        raise ValueError(f"t must hold increasing, finite times from 0 on, got {t}")
    start, end = deficit or (0.0, 0.0)
    if not 0 <= start <= end:
        raise ValueError(f"deficit must start at 0 or later and not end before its start, got {deficit}")
    p = np.array(k0, dtype=float) ** (1 / depth)
    result = np.tile(p, (len(t), 1))
    # One integration for each stretch: adaptive steps across the jump at an edge would smear it.
    for low, high in pairwise(np.unique(np.clip([0, start, end, t[-1]], 0, t[-1]))):
        learning = np.array([1.0, not start <= low < end])

        def flow(_: float, p: np.ndarray, learning: np.ndarray = learning) -> np.ndarray:
            return learning * p ** (depth - 1) * (S - (p**depth).sum())

        inside = (t > low) & (t <= high)
        moments = np.unique(np.append(t[inside], high))
        path = solve_ivp(flow, (low, high), p, method="LSODA", t_eval=moments, rtol=1e-10, atol=1e-12).y.T
        result[inside], p = path[: inside.sum()], path[-1]
    return result**depth


def final_shares(S: float, p_a: float, p_b: float, depth: int) -> tuple[float, float]:
    """Strengths ``(K_a, K_b)`` in which two pathways end that learn undisturbed from ``p_a`` and ``p_b``.

    They end on the line ``K_a + K_b = S``. Where on it, the conserved quantity says: ``p_a - p_b`` for one matrix,
    ``p_a / p_b`` for two, ``p_b^(2-D) - p_a^(2-D)`` for more.

    Parameters
    ----------
    S
        Singular value of the map to be learned.
    p_a, p_b
        Strengths of the mode in each matrix of ``a`` and of ``b``: ``K^(1/D)``.
    depth
        Number ``D`` of matrices in each pathway.

    Raises
    ------
    ValueError
        If ``S`` or a strength is not positive, ``depth`` is no whole number from 1, or ``p_a^D + p_b^D`` is not
        smaller than ``S``.

    Notes
    -----
    Derived from the equations of :func:`pathway_dynamics`; not in the paper.
    """
    _check_mode(S, (p_a, p_b), depth, "p_a and p_b")
    if not p_a**depth + p_b**depth < S:
        raise ValueError(f"p_a^D + p_b^D must be smaller than S = {S}, got {p_a=}, {p_b=} and D = {depth}")
    if depth == 1:
        k_b = (S - (p_a - p_b)) / 2
        return S - k_b, k_b
    if depth == 2:
        return S * p_a**2 / (p_a**2 + p_b**2), S * p_b**2 / (p_a**2 + p_b**2)
    large, small = max(p_a, p_b), min(p_a, p_b)
    conserved = small ** (2 - depth) - large ** (2 - depth)

    def weaker(p: float) -> float:
        """Strength of the weaker pathway when the stronger one has reached ``p``."""
        return (p ** (2 - depth) + conserved) ** (-depth / (depth - 2))

    p = brentq(lambda p: p**depth + weaker(p) - S, large, S ** (1 / depth), xtol=1e-15, rtol=1e-14)
    strengths = p**depth, weaker(p)
    return strengths if p_a >= p_b else strengths[::-1]


def descend(weights: Weights, slope: Callable[[Tensor], Tensor], lr: float) -> Weights:
    """One step of gradient descent on the factors of ``W = W_D ... W_1``, all of them at once.

    Parameters
    ----------
    weights
        The factors, input side first; not modified. Batch axes are trained side by side.
    slope
        Gradient of the loss with respect to the product, as a function of the product.
    lr
        Learning rate.

    Notes
    -----
    Factor ``l`` moves by ``-lr (W_D ... W_{l+1})ᵀ slope(W) (W_{l-1} ... W_1)ᵀ``.
    """
    whole, *above = [*accumulate(reversed(weights), torch.matmul)][::-1]
    *errors, last = accumulate(weights[:-1], lambda error, weight: error @ weight.mT, initial=slope(whole))
    gradients = [*(upper.mT @ error for upper, error in zip(above, errors, strict=True)), last]
    return [torch.sub(weight, gradient, alpha=lr) for weight, gradient in zip(weights, gradients, strict=True)]


class TwoPathwayNetwork:
    """Two deep linear networks side by side whose outputs add: ``y = (Ω_a + Ω_b) x``. A batch learns together.

    Parameters
    ----------
    depth
        Number of matrices in each pathway.
    n_in, n_hidden, n_out
        Widths of the layers of neurons.
    init
        ``("aligned", U, V, (K_a, K_b))``: the products start as ``K U Vᵀ`` with balanced factors and random hidden
        bases; the columns of ``U`` and ``V`` are the singular vectors of the target. ``("gaussian", std)``:
        independent entries.
    generator
        Source of randomness.
    batch
        Number of networks, with independent draws.

    Raises
    ------
    ValueError
        If a size is not positive, ``init`` is none of the two, a strength or ``std`` is not positive, or ``U`` and
        ``V`` do not fit the widths.

    Attributes
    ----------
    weights
        One tensor (batch, 2, n_out, n_in) for each layer, input side first, in float64. Axis 1 is the pathway.
    """

    def __init__(
        self, depth: int, n_in: int, n_hidden: int, n_out: int, init: tuple, generator: torch.Generator, batch: int = 1
    ) -> None:
        if min(depth, n_in, n_hidden, n_out, batch) < 1:
            raise ValueError(f"sizes must be positive, got {depth=}, {n_in=}, {n_hidden=}, {n_out=}, {batch=}")
        match init:
            case ("gaussian", std) if std > 0:
                shapes = pairwise([n_in, *[n_hidden] * (depth - 1), n_out])
                self.weights = [
                    std * torch.randn(batch, 2, after, before, generator=generator, dtype=torch.float64)
                    for before, after in shapes
                ]
            case ("aligned", u, v, k0) if len(k0) == 2 and min(k0) > 0:
                modes = u.shape[1]
                if u.shape != (n_out, modes) or v.shape != (n_in, modes) or (depth > 1 and n_hidden < modes):
                    raise ValueError(
                        f"U and V must have shapes {(n_out, modes)} and {(n_in, modes)}, got {tuple(u.shape)} and "
                        f"{tuple(v.shape)}, and n_hidden must be at least {modes}, got {n_hidden}"
                    )
                draws = torch.randn(depth - 1, batch, 2, n_hidden, modes, generator=generator, dtype=torch.float64)
                p = torch.tensor(k0, dtype=torch.float64)[:, None, None] ** (1 / depth)
                bases = [v.double(), *torch.linalg.qr(draws).Q, u.double()]
                self.weights = [
                    (p * after @ before.mT).expand(batch, 2, -1, -1).clone() for before, after in pairwise(bases)
                ]
            case _:
                raise ValueError(f"init must be ('aligned', U, V, (K_a, K_b)) or ('gaussian', std > 0), got {init}")

    def products(self) -> Float[Tensor, "batch 2 n_out n_in"]:
        """The end-to-end maps ``Ω_a`` and ``Ω_b``."""
        return product(self.weights)

    def strengths(self, u: Float[Tensor, "n_out modes"], v: Float[Tensor, "n_in modes"]) -> Tensor:
        """Strengths ``K = uᵀ Ω v`` of every mode in each pathway, of shape (batch, 2, modes)."""
        return torch.einsum("oa,bpoi,ia->bpa", u, self.products(), v)

    def step(
        self,
        target: Float[Tensor, "n_out n_in"],
        lr: float,
        gate: Bool[Tensor, "batch 2"],
        blocked_mode: tuple[int, Float[Tensor, "*batch n_out"], Float[Tensor, " n_in"]] | None = None,
    ) -> None:
        """One step of gradient descent on ``1/2 ‖target - Ω_a - Ω_b‖²``.

        Parameters
        ----------
        target
            The map to be learned.
        lr
            Learning rate.
        gate
            False where a pathway must not learn; its output still counts.
        blocked_mode
            Pathway and singular vectors ``u``, ``v`` of a mode that this pathway must not learn. ``u`` may differ
            between the members of the batch; zero blocks nothing.

        Raises
        ------
        ValueError
            If the target or the gate has the wrong shape, or ``lr`` is not positive.
        """
        batch, n_out, n_in = len(self.weights[0]), self.weights[-1].shape[-2], self.weights[0].shape[-1]
        if tuple(target.shape) != (n_out, n_in) or tuple(gate.shape) != (batch, 2):
            raise ValueError(
                f"target and gate must have shapes {(n_out, n_in)} and {(batch, 2)}, "
                f"got {tuple(target.shape)} and {tuple(gate.shape)}"
            )
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")

        def slope(products: Tensor) -> Tensor:
            error = gate[..., None, None] * (products.sum(1, keepdim=True) - target)
            if blocked_mode:
                pathway, u, v = blocked_mode
                u = u.expand(batch, n_out)
                along = torch.einsum("bo,boi,i->b", u, error[:, pathway], v)
                error[:, pathway] -= torch.einsum("b,bo,i->boi", along, u, v)
            return error

        self.weights = descend(self.weights, slope, lr)


def low_rank_target(n: int, rank: int, rng: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """A random matrix of the given rank whose entries have mean square 1: ``n A Bᵀ / ‖A Bᵀ‖``, A and B Gaussian.

    Raises
    ------
    ValueError
        If ``rank`` is not between 1 and ``n``.
    """
    if not 1 <= rank <= n:
        raise ValueError(f"rank must be between 1 and n = {n}, got {rank}")
    matrix = rng.standard_normal((n, rank)) @ rng.standard_normal((n, rank)).T
    return n * matrix / np.linalg.norm(matrix)


def draw_transfer(
    n: int, rank_pre: int, rank: int, n_obs: int, depth: int, seed: int, scale: float = 1e-3, relation="independent"
) -> tuple[Tensor, Tensor, Tensor, *tuple[Tensor, ...]]:
    """One draw of two matrix-completion tasks and of the network that learns them, in float32.

    Parameters
    ----------
    n
        Rows and columns of every matrix.
    rank_pre, rank
        Ranks of task 1 (pre-training) and of task 2.
    n_obs
        Number of observed entries; the positions are the same for both tasks.
    depth
        Number of factors.
    seed
        Of the draws, made in the order task 2, task 1, positions, weights layer by layer.
    scale
        Size of the initial product: factors have entries of standard deviation ``scale^(1/D) / sqrt(n)``.
    relation
        ``"independent"`` tasks, or the ``"same"`` task twice.

    Returns
    -------
    first, second
        Task 1 and task 2.
    observed
        1 where an entry is observed, 0 elsewhere.
    *weights
        The factors, input side first.

    Raises
    ------
    ValueError
        If a rank or ``n_obs`` does not fit ``n``, ``depth`` or ``scale`` is not positive, ``relation`` is unknown, or
        the same task is to have two ranks.
    """
    if not 1 <= n_obs <= n * n:
        raise ValueError(f"n_obs must be between 1 and n² = {n * n}, got {n_obs}")
    if depth < 1 or not scale > 0:
        raise ValueError(f"depth must be at least 1 and scale positive, got {depth=} and {scale=}")
    if relation not in ("independent", "same") or (relation == "same" and rank_pre != rank):
        raise ValueError(
            f"relation must be 'independent', or 'same' with equal ranks, got {relation!r}, {rank_pre=}, {rank=}"
        )
    rng = np.random.default_rng(seed)
    second, first = low_rank_target(n, rank, rng), low_rank_target(n, rank_pre, rng)
    observed = np.zeros(n * n)
    observed[rng.permutation(n * n)[:n_obs]] = 1
    std = scale ** (1 / depth) / n**0.5
    draws = [second if relation == "same" else first, second, observed.reshape(n, n)]
    draws += [std * rng.standard_normal((n, n)) for _ in range(depth)]
    return tuple(torch.tensor(draw, dtype=torch.float32) for draw in draws)


def complete(weights: Weights, target: Tensor, observed: Tensor, lr: float, steps: int) -> Weights:
    """Gradient descent on the observed entries: the loss is half the mean of ``(W - target)²`` over these.

    Parameters
    ----------
    weights
        Factors of ``W``, input side first; not modified.
    target, observed
        The matrix to complete, and 1 where it is observed (n, n), with any batch axes.
    lr, steps
        Learning rate and number of steps.

    Raises
    ------
    ValueError
        If ``lr`` is not positive or ``steps`` is negative.
    """
    if not lr > 0 or steps < 0:
        raise ValueError(f"lr must be positive and steps not negative, got {lr=} and {steps=}")
    share = observed / observed.sum((-2, -1), keepdim=True)
    for _ in trange(steps, leave=False):
        weights = descend(weights, lambda whole: share * (whole - target), lr)
    return weights


def completion_transfer(
    n: int,
    rank_pre: int,
    rank: int,
    n_obs: int,
    depth: int,
    lr: float,
    switch_steps: Sequence[int],
    continue_steps: int,
    seeds: Sequence[int],
    scale: float = 1e-3,
    relation: str = "independent",
    device: torch.device | str = "cpu",
) -> dict[str, Float[np.ndarray, "seeds switches *n"]]:
    """Pre-train on task 1, switch to task 2, and see how well task 2 is learned in the end.

    All seeds learn task 1 together; a copy is taken at each switch, and all copies learn task 2 together.

    Parameters
    ----------
    n, rank_pre, rank, n_obs, depth, scale, relation
        As for :func:`draw_transfer`.
    lr
        Learning rate.
    switch_steps
        Increasing numbers of pre-training steps.
    continue_steps
        Number of steps on task 2 after every switch.
    seeds
        One draw of tasks, positions and weights for each.
    device
        Where to compute.

    Returns
    -------
    dict
        ``"test_loss"``: mean squared error on all entries of task 2 at the end. ``"train_loss"``: the loss on its
        observed entries. ``"pretrain_test_loss"``: mean squared error on all entries of task 1 at the switch.
        ``"singular_values"``: those of the learned matrix, with an axis more.

    Raises
    ------
    ValueError
        As for :func:`draw_transfer`, and if there is no seed, or switches do not increase from 0 on.

    Notes
    -----
    Source: the paper's matrix-completion experiments; details as in the authors' code.
    """
    if not len(seeds) or not len(switch_steps) or any(b <= a for a, b in pairwise([-1, *switch_steps])):
        raise ValueError(f"seeds must not be empty and switch_steps increase from 0 on, got {seeds=}, {switch_steps=}")
    draws = [draw_transfer(n, rank_pre, rank, n_obs, depth, seed, scale, relation) for seed in seeds]
    first, second, observed, *weights = (torch.stack(parts).to(device) for parts in zip(*draws, strict=True))
    copies = []
    for before, now in pairwise([0, *switch_steps]):
        weights = complete(weights, first, observed, lr, now - before)
        copies.append(weights)
    weights = [torch.stack(layer) for layer in zip(*copies, strict=True)]  # (switches, seeds, n, n)
    at_switch = product(weights)
    learned = product(complete(weights, second, observed, lr, continue_steps))
    error = learned - second
    results = {
        "test_loss": error.square().mean((-2, -1)),
        "train_loss": 0.5 * (observed * error.square()).sum((-2, -1)) / n_obs,
        "pretrain_test_loss": (at_switch - first).square().mean((-2, -1)),
        "singular_values": torch.linalg.svdvals(learned),
    }
    return {name: values.transpose(0, 1).cpu().numpy() for name, values in results.items()}


def singular_value_velocity(W: Float[Tensor, "n n"], grad: Float[Tensor, "n n"], depth: int) -> Float[Tensor, " n"]:
    """Velocities ``dσ_r/dt = -D σ_r^(2-2/D) u_rᵀ grad v_r`` under gradient flow on ``D`` balanced factors.

    Parameters
    ----------
    W
        The product of the factors.
    grad
        Gradient of the loss with respect to ``W``.
    depth
        Number ``D`` of factors.

    Returns
    -------
    Tensor
        In the order of the singular values, largest first.

    Raises
    ------
    ValueError
        If the shapes differ, a value is not finite, or ``depth`` is smaller than 1.

    Notes
    -----
    Source: Arora, Cohen, Hu and Luo, "Implicit regularization in deep matrix factorization", NeurIPS 2019, Theorem 3.
    """
    if W.ndim != 2 or W.shape != grad.shape or not (W.isfinite().all() and grad.isfinite().all()):
        raise ValueError(f"W and grad must be finite matrices of one shape, got {tuple(W.shape)}, {tuple(grad.shape)}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    return -depth * s ** (2 - 2 / depth) * ((u.mT @ grad) * vh).sum(1)
