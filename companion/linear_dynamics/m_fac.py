"""M-FAC: products with the inverse of an empirical Fisher matrix, without ever forming a matrix of its size.

Frantar, Kurtic and Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS 2021
(arXiv 2107.03356).

The Hessian of a loss with ``d`` weights is approximated by ``F = λ I + 1/m Σ g_i g_iᵀ``, with ``m`` gradients ``g_i``
(the rows of ``G``) and a damping ``λ > 0``. All classes here compute with ``F⁻¹`` exactly, up to rounding, and none
stores ``d × d`` numbers. Gradients and weights are flat vectors; matrices multiply columns of shape ``(d, 1)``, not
vectors, because PyTorch's FLOP counter sees only the former.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def _check_gradients(gradients: Tensor, damping: float) -> None:
    """Raise unless ``gradients`` is a finite matrix of floats and ``damping`` is positive."""
    if not gradients.is_floating_point() or gradients.ndim != 2 or not gradients.isfinite().all():
        shape = tuple(gradients.shape)
        raise ValueError(f"gradients must be a finite (m, d) matrix of floats, got {gradients.dtype} of shape {shape}")
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be positive and finite, got {damping}")


def _check_vector(name: str, x: Tensor, dim: int) -> None:
    """Raise unless ``x`` is a finite vector with ``dim`` entries."""
    if tuple(x.shape) != (dim,) or not x.isfinite().all():
        raise ValueError(f"{name} must be a finite vector of shape ({dim},), got shape {tuple(x.shape)}")


def sherman_morrison(
    gradients: Float[Tensor, "m d"], damping: float
) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
    """Factors ``v_i`` and ``q_i`` with ``F⁻¹ = I/λ - Σ v_i v_iᵀ / q_i``, one gradient after the other.

    ``v_i`` is the inverse of the first ``i - 1`` terms times ``g_i``, and ``q_i = m + g_iᵀ v_i``. The cost is
    ``2 d m²`` operations. Source: the paper's static algorithm.

    Parameters
    ----------
    gradients
        The gradients, as rows.
    damping
        ``λ``, positive.
    """
    m = len(gradients)
    v, q = gradients / damping, gradients.new_empty(m)
    for i in range(m):
        g, before = gradients[i, :, None], v[:i]
        coefficients = before @ g / q[:i, None]
        v[i] -= (coefficients.mT @ before)[0]
        q[i] = m + (v[i, None] @ g)[0, 0]
    return v, q


class StaticInverseFisher:
    """The inverse Fisher matrix of a fixed set of gradients: the paper's algorithm for pruning.

    Parameters
    ----------
    gradients
        ``m`` gradients of ``d`` entries each; set-up takes ``2 d m²`` operations.
    damping
        ``λ``, positive.

    Attributes
    ----------
    v, q
        The factors from :func:`sherman_morrison`, of shapes (m, d) and (m,).

    Raises
    ------
    ValueError
        If ``gradients`` is not a finite matrix of floats, or ``damping`` is not positive.
    """

    def __init__(self, gradients: Float[Tensor, "m d"], damping: float) -> None:
        _check_gradients(gradients, damping)
        self.damping = damping
        self.v, self.q = sherman_morrison(gradients, damping)

    def ihvp(self, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """``F⁻¹ x`` in ``4 d m`` operations. Raises ValueError if ``x`` does not fit."""
        _check_vector("x", x, self.v.shape[1])
        return x / self.damping - (self.v.mT @ (self.v @ x[:, None] / self.q[:, None]))[:, 0]

    def diagonal(self) -> Float[Tensor, " d"]:
        """The diagonal of ``F⁻¹``."""
        return 1 / self.damping - (self.v.square() / self.q[:, None]).sum(0)

    def columns(self, indices: Sequence[int]) -> Float[Tensor, "d k"]:
        """Columns of ``F⁻¹``, in ``O(d m)`` operations each. Raises ValueError if an index does not exist."""
        d = self.v.shape[1]
        if not all(0 <= index < d for index in indices):
            raise ValueError(f"indices must lie between 0 and {d - 1}, got {list(indices)}")
        indices = torch.as_tensor(indices, dtype=torch.long, device=self.v.device)
        result = -self.v.mT @ (self.v[:, indices] / self.q[:, None])
        result[indices, torch.arange(len(indices), device=self.v.device)] += 1 / self.damping
        return result

    def element(self, i: int, j: int) -> float:
        """One entry of ``F⁻¹``, in ``O(m)`` operations. Raises ValueError if an index does not exist."""
        d = self.v.shape[1]
        if not (0 <= i < d and 0 <= j < d):
            raise ValueError(f"i and j must lie between 0 and {d - 1}, got {i} and {j}")
        return float((i == j) / self.damping - (self.v[:, i] * self.v[:, j] / self.q).sum())


class BlockInverseFisher:
    """The inverse of the block-diagonal part of the Fisher matrix, in consecutive blocks of coordinates.

    A block is a matrix of its own and is inverted as such, in float64: as long as blocks are smaller than ``m``, this
    is cheaper than ``m`` factors for each of them. It stores ``d`` times ``block_size`` numbers.

    Parameters
    ----------
    gradients, damping
        As for :class:`StaticInverseFisher`.
    block_size
        Number of coordinates in a block; the last block may be smaller.

    Raises
    ------
    ValueError
        As for :class:`StaticInverseFisher`, and if ``block_size`` is smaller than 1.
    """

    def __init__(self, gradients: Float[Tensor, "m d"], damping: float, block_size: int) -> None:
        _check_gradients(gradients, damping)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size, self.dim = block_size, gradients.shape[1]
        blocks = self._blocks(gradients.double()).movedim(1, 0)
        fisher = blocks.mT @ blocks / len(gradients)
        fisher.diagonal(dim1=1, dim2=2).add_(damping)
        self.inverse = torch.linalg.inv(fisher).to(gradients)

    def _blocks(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch blocks size"]:
        """Cut the last axis into blocks; zeros fill the last one, and change nothing in the others' results."""
        padded = torch.nn.functional.pad(x, (0, -self.dim % self.block_size))
        return padded.unflatten(-1, (-1, self.block_size))

    def ihvp(self, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """``F⁻¹ x`` of the block-diagonal ``F``. Raises ValueError if ``x`` does not fit."""
        _check_vector("x", x, self.dim)
        return (self.inverse @ self._blocks(x)[..., None]).flatten()[: self.dim]

    def diagonal(self) -> Float[Tensor, " d"]:
        """The diagonal of ``F⁻¹``."""
        return self.inverse.diagonal(dim1=1, dim2=2).flatten()[: self.dim]


class DynamicInverseFisher:
    """The inverse Fisher matrix of the latest gradients: the paper's algorithm for optimisation.

    The factors of the static algorithm are combinations of gradients, and their coefficients depend on scalar products
    alone: the triangular factors of ``A = G Gᵀ/λ + m I`` are the recursion. So only ``G`` and ``m × m`` matrices are
    stored. A new gradient replaces the oldest one, in ``2 d m + m³/3`` operations; the order of rows does not matter.
    Rows that are still zero contribute nothing; the divisor of ``F`` is the size of the window from the start.

    Parameters
    ----------
    window
        Number ``m`` of gradients.
    dim
        Number ``d`` of weights.
    damping
        ``λ``, positive.
    dtype, device
        Of the stored gradients; the ``m × m`` matrices are always in float64.

    Raises
    ------
    ValueError
        If ``window`` or ``dim`` is smaller than 1 or ``damping`` is not positive.
    """

    def __init__(
        self,
        window: int,
        dim: int,
        damping: float,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
    ) -> None:
        if window < 1 or dim < 1:
            raise ValueError(f"window and dim must be at least 1, got {window=} and {dim=}")
        self.damping, self._pushes = damping, 0
        self._gradients = torch.zeros(window, dim, dtype=dtype, device=device)
        _check_gradients(self._gradients, damping)
        self._gram = torch.zeros(window, window, dtype=torch.float64, device=device)
        self._factor()

    def _factor(self) -> None:
        """Cholesky factor ``C`` of ``A``: no pivoting, so that ``L = C / diag(C)`` and ``q = diag(C)²``."""
        window = len(self._gram)
        a = self._gram / self.damping + window * torch.eye(window, dtype=torch.float64, device=self._gram.device)
        self._cholesky = torch.linalg.cholesky(a)

    @property
    def num_gradients(self) -> int:
        """How many gradients the window holds."""
        return min(self._pushes, len(self._gradients))

    def push(self, g: Float[Tensor, " d"]) -> None:
        """Put ``g`` in the place of the oldest gradient.

        Raises
        ------
        ValueError
            If ``g`` does not fit.
        torch.linalg.LinAlgError
            If rounding makes ``A`` indefinite, in float32 with gradients that are large beside ``sqrt(λ)``. Use
            float64 or more damping.
        """
        _check_vector("g", g, self._gradients.shape[1])
        slot = self._pushes % len(self._gradients)
        self._gradients[slot] = g
        products = (self._gradients @ self._gradients[slot, :, None])[:, 0].double()
        self._gram[slot] = self._gram[:, slot] = products
        self._pushes += 1
        self._factor()

    def ihvp(self, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """``F⁻¹ x`` in ``4 d m + 2 m²`` operations. Raises ValueError if ``x`` does not fit."""
        _check_vector("x", x, self._gradients.shape[1])
        products = (self._gradients @ x[:, None]).double()
        coefficients = torch.cholesky_solve(products, self._cholesky).to(x)
        return x / self.damping - (self._gradients.mT @ coefficients)[:, 0] / self.damping**2

    def push_ihvp(self, g: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Put ``g`` into the window and return ``F⁻¹ g``."""
        self.push(g)
        return self.ihvp(g)


def empirical_fisher_gradients(
    loss_fn: Callable[[Tensor, Tensor, Tensor], Float[Tensor, ""]],
    params: Float[Tensor, " d"],
    X: Float[Tensor, "n *features"],
    y: Tensor,
    num_gradients: int,
    batch_size: int,
    generator: torch.Generator,
) -> Float[Tensor, "m d"]:
    """Gradients of the loss on ``num_gradients`` disjoint random batches.

    Parameters
    ----------
    loss_fn
        ``loss_fn(params, X, y)`` is the mean loss over a batch.
    params
        All weights, as one vector.
    X, y
        Inputs and targets, first axis over samples.
    num_gradients, batch_size
        Number ``m`` of gradients and samples in each. At an optimum the mean over a large batch is nearly zero.
    generator
        Chooses the samples, without replacement.

    Raises
    ------
    ValueError
        If ``X`` and ``y`` differ in length or hold too few samples, or a number is smaller than 1.
    """
    if len(X) != len(y):
        raise ValueError(f"X and y must have the same length, got {len(X)} and {len(y)}")
    if num_gradients < 1 or batch_size < 1 or num_gradients * batch_size > len(X):
        raise ValueError(
            f"num_gradients and batch_size must be positive and their product at most {len(X)}, the number of samples, "
            f"got {num_gradients=} and {batch_size=}"
        )
    chosen = torch.randperm(len(X), generator=generator)[: num_gradients * batch_size].to(X.device)
    chosen = chosen.view(num_gradients, batch_size)
    # in chunks, so that the activations of many batches need not fit into memory at once
    return torch.vmap(torch.func.grad(loss_fn), in_dims=(None, 0, 0), chunk_size=64)(params, X[chosen], y[chosen])


def prune_one_shot(
    weights: Float[Tensor, " d"],
    prunable_mask: Bool[Tensor, " d"],
    sparsity: float,
    gradient_fn: Callable[[Float[Tensor, " d"]], Float[Tensor, "m d"]],
    damping: float,
    block_size: int | None = None,
    num_recomputations: int = 1,
    statistic: str = "mfac",
) -> tuple[Float[Tensor, " d"], Bool[Tensor, " d"]]:
    """Remove the weights whose loss costs least, without training in between.

    Parameters
    ----------
    weights
        All weights, as one vector; not modified.
    prunable_mask
        True where a weight may be removed.
    sparsity
        Part of the prunable weights to remove, in [0, 1).
    gradient_fn
        Gradients at the given weights, one per row; called once in each round.
    damping
        ``λ``, positive.
    block_size
        Number of consecutive surviving weights in a block of the Fisher matrix; None takes the full matrix.
    num_recomputations
        Number of rounds. The kept part falls geometrically, and each round takes new gradients.
    statistic
        ``"mfac"``: remove the smallest ``w_k² / 2[F⁻¹]_kk`` and correct the other weights (Optimal Brain Surgeon).
        ``"diagonal"``: the smallest ``w_k² F_kk``. ``"magnitude"``: the smallest ``|w_k|``. Both correct nothing.

    Returns
    -------
    weights
        The new weights, zero where removed.
    keep_mask
        False where removed; weights that may not be removed are kept.

    Raises
    ------
    ValueError
        If shapes do not fit, or ``sparsity``, ``num_recomputations`` or ``statistic`` is out of range.
    """
    if weights.ndim != 1 or prunable_mask.shape != weights.shape or prunable_mask.dtype != torch.bool:
        raise ValueError(
            "weights must be a vector and prunable_mask a boolean one of its shape, "
            f"got {tuple(weights.shape)} and {prunable_mask.dtype} of shape {tuple(prunable_mask.shape)}"
        )
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    if num_recomputations < 1:
        raise ValueError(f"num_recomputations must be at least 1, got {num_recomputations}")
    if statistic not in ("mfac", "magnitude", "diagonal"):
        raise ValueError(f"statistic must be 'mfac', 'magnitude' or 'diagonal', got {statistic!r}")
    weights = weights.clone()
    alive = prunable_mask.nonzero()[:, 0]  # a removed weight leaves the Fisher matrix of later rounds
    prunable = len(alive)
    for step in range(1, num_recomputations + 1):
        w = weights[alive]
        count = len(alive) - round(prunable * (1 - sparsity) ** (step / num_recomputations))
        if statistic != "magnitude":
            gradients = gradient_fn(weights)
            if gradients.ndim != 2 or gradients.shape[1] != len(weights):
                raise ValueError(f"gradient_fn must return (m, {len(weights)}), got shape {tuple(gradients.shape)}")
            gradients = gradients[:, alive]
        if statistic == "magnitude":
            order = w.abs().argsort()
        elif statistic == "diagonal":
            order = (w.square() * gradients.square().mean(0)).argsort()
        else:
            full = block_size is None
            inverse = (
                StaticInverseFisher(gradients, damping) if full else BlockInverseFisher(gradients, damping, block_size)
            )
            diagonal = inverse.diagonal()
            order = (w.square() / (2 * diagonal)).argsort()
            target = torch.zeros_like(w)
            target[order[:count]] = -w[order[:count]] / diagonal[order[:count]]
            w += inverse.ihvp(target)
        w[order[:count]] = 0  # last, since the corrections of the others have moved it
        weights[alive] = w
        alive = alive[order[count:].sort().values]
    keep_mask = ~prunable_mask
    keep_mask[alive] = True
    return weights, keep_mask


class MFAC(torch.optim.Optimizer):
    """Stochastic gradient descent along ``F⁻¹ g``, with the latest gradients as Fisher matrix.

    ``u = F⁻¹ g`` after ``g`` has entered the window, ``v ← β v + (1 - β) u``, ``w ← w - lr v``. A lone gradient gives
    ``u ≈ m g / ‖g‖²``: a sensible ``lr`` scales like ``1/m``. Source: the paper's Section on optimisation and the
    authors' code.

    Parameters
    ----------
    params
        Parameters, or groups of them; each group has a window of its own. A missing gradient counts as zero.
    lr
        Learning rate.
    momentum
        ``β``, in [0, 1).
    weight_decay
        Multiple of the weights that is added to the gradient before it enters the window.
    window
        Number ``m`` of gradients.
    damping
        ``λ``, positive.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        window: int = 1024,
        damping: float = 1e-5,
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0:
            raise ValueError(f"lr and weight_decay must not be negative, got {lr=} and {weight_decay=}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        if window < 1 or not damping > 0:
            raise ValueError(f"window and damping must be positive, got {window=} and {damping=}")
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, window=window, damping=damping)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Make one step; ``closure``, if given, computes the gradients anew and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, state = group["params"], self.state[group["params"][0]]
            slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            g = torch.cat([(s + group["weight_decay"] * p).flatten() for s, p in zip(slopes, params, strict=True)])
            if not state:
                state["fisher"] = DynamicInverseFisher(group["window"], len(g), group["damping"], g.dtype, g.device)
                state["velocity"] = torch.zeros_like(g)
            update = state["fisher"].push_ihvp(g)
            state["velocity"] = group["momentum"] * state["velocity"] + (1 - group["momentum"]) * update
            pieces = state["velocity"].split([p.numel() for p in params])
            for p, piece in zip(params, pieces, strict=True):
                p -= group["lr"] * piece.view_as(p)
        return loss
