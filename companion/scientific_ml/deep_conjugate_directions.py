"""Deep conjugate directions: an iterative solver whose search directions come from a convolutional network.

Kaneda, Akar, Chen, Kala, Hyde and Teran, "A deep conjugate direction method for iteratively solving linear systems",
ICML 2023 (arXiv 2205.10763).

The systems are Poisson equations ``A x = b`` on the fluid cells of a square (or cubic) box, symmetric and positive
definite. The grid spacing is 1. Fields are tensors with the axes of the grid last; matrices and vectors of the
classical solvers run over the fluid cells alone, in the order in which ``field[operator.fluid]`` lists them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.ndimage import label
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import splu
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from companion.models import initialised
from companion.training import Ensemble, fit, minibatches

Vector = Float[np.ndarray, " cells"]
Faces = list[Float[Tensor, "*faces"]]  # one tensor per axis, one entry longer than the grid along that axis


def open_to_outside(fluid: Bool[Tensor, "*grid"]) -> Bool[Tensor, "*grid"]:
    """The fluid cells from which a path through fluid cells leads out of the box; the others are closed pockets."""
    if fluid.dtype != torch.bool:
        raise ValueError(f"fluid must be boolean, got {fluid.dtype}")
    padded = np.pad(fluid.cpu().numpy(), 1, constant_values=True)
    parts, _ = label(padded)
    inside = (slice(1, -1),) * fluid.ndim
    return torch.from_numpy(parts == parts[(0,) * fluid.ndim])[inside].to(fluid.device) & fluid


class PoissonOperator:
    """Minus the discrete Laplacian on the fluid cells of a box: zero outside the box, no flux into solid cells.

    ``(A x)_i = d_i x_i - Σ_j x_j`` over the fluid neighbours ``j`` of ``i``, where ``d_i`` counts the neighbours that
    are fluid or outside. This is ``-div grad`` on staggered faces, where faces of solid cells are closed.

    Parameters
    ----------
    fluid
        True in fluid cells; a square or a cube.

    Raises
    ------
    ValueError
        If ``fluid`` is no boolean square or cube, or a part of the fluid has no way out of the box: there the pressure
        would be known only up to a constant, and the matrix be singular.
    """

    def __init__(self, fluid: Bool[Tensor, "*grid"]) -> None:
        if fluid.dtype != torch.bool or fluid.ndim not in (2, 3) or len(set(fluid.shape)) > 1:
            raise ValueError(f"fluid must be a boolean square or cube, got {fluid.dtype} of shape {tuple(fluid.shape)}")
        if not fluid.any() or not torch.equal(open_to_outside(fluid), fluid):
            raise ValueError(
                f"fluid must hold cells, each with a way out of the box; got {int(fluid.sum())} fluid cells"
            )
        self.fluid = fluid
        self.axes = range(-fluid.ndim, 0)
        ends = [torch.ones_like(fluid.narrow(axis, 0, 1)) for axis in self.axes]  # a layer of the outside
        padded = [torch.cat([end, fluid, end], axis) for axis, end in zip(self.axes, ends, strict=True)]
        n = len(fluid) + 1
        self.open = [p.narrow(k, 0, n) & p.narrow(k, 1, n) for k, p in zip(self.axes, padded, strict=True)]

    def gradient(self, x: Float[Tensor, "*batch_and_grid"]) -> Faces:
        """Differences across the open faces, along each axis; 0 on closed faces."""
        ends = [torch.zeros_like(x.narrow(axis, 0, 1)) for axis in self.axes]
        return [
            faces * torch.diff(x, dim=axis, prepend=end, append=end)
            for axis, faces, end in zip(self.axes, self.open, ends, strict=True)
        ]

    def divergence(self, faces: Faces) -> Float[Tensor, "*batch_and_grid"]:
        """What flows out of every cell through its faces."""
        return sum(torch.diff(flow, dim=axis) for axis, flow in zip(self.axes, faces, strict=True))

    def __call__(self, x: Float[Tensor, "*batch_and_grid"]) -> Float[Tensor, "*batch_and_grid"]:
        """``A x``, zero in solid cells; what ``x`` holds there does not matter."""
        return -self.divergence(self.gradient(x))

    @property
    def diagonal(self) -> Int[Tensor, "*grid"]:
        """The number ``d_i`` of open faces of every cell."""
        n = len(self.fluid)
        return sum(
            faces.narrow(axis, 0, n).int() + faces.narrow(axis, 1, n)
            for axis, faces in zip(self.axes, self.open, strict=True)
        )

    def to_sparse(self) -> csr_array:
        """The matrix over the fluid cells, assembled from pairs of neighbours."""
        fluid = self.fluid.cpu().numpy()
        number = np.full(fluid.shape, -1)
        number[fluid] = np.arange(fluid.sum())
        pairs = []
        for axis in self.axes:
            here, there = (np.delete(number, end, axis).ravel() for end in (-1, 0))
            both = (here >= 0) & (there >= 0)
            pairs.append(np.stack([here[both], there[both]]))
        rows, columns = np.concatenate(pairs, axis=1)
        half = csr_array((np.ones(len(rows)), (rows, columns)), shape=(fluid.sum(),) * 2)
        return csr_array(diags_array(self.diagonal.cpu().numpy()[fluid].astype(float)) - half - half.T)


# --- training data ----------------------------------------------------------------------------------------------------


def lanczos_ritz(
    operator: PoissonOperator, num_steps: int, generator: torch.Generator
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m *grid"]]:
    """Ritz values (ascending) and orthonormal Ritz vectors of ``num_steps`` Lanczos steps with full orthogonalisation.

    The start is ``A ξ`` with Gaussian ``ξ``. Float64.

    Raises
    ------
    ValueError
        If ``num_steps`` is not positive or exceeds the dimension of the Krylov space.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    fluid = operator.fluid
    xi = torch.randn(fluid.shape, generator=generator, dtype=torch.float64).to(fluid.device)
    basis = torch.zeros(num_steps, *fluid.shape, dtype=torch.float64, device=fluid.device)
    flat = basis.view(num_steps, -1)
    alpha, beta = torch.zeros(2, num_steps, dtype=torch.float64)
    w = operator(xi)
    for j in range(num_steps):
        beta[j] = w.norm()
        if beta[j] < 1e-10:
            raise ValueError(f"num_steps must not exceed the dimension of the Krylov space, {j}, got {num_steps}")
        basis[j] = w / beta[j]
        w = operator(basis[j])
        alpha[j] = (w * basis[j]).sum()
        for _ in range(2):  # once leaves rounding errors of the size of the Ritz vectors that have converged
            w = w - (flat[: j + 1].mT @ (flat[: j + 1] @ w.flatten())).view_as(w)
    values, coordinates = torch.linalg.eigh(torch.diag(alpha) + torch.diag(beta[1:], 1) + torch.diag(beta[1:], -1))
    return values, (coordinates.mT.to(flat) @ flat).view_as(basis)


def ritz_dataset(
    vectors: Float[Tensor, "m *grid"], num: int, generator: torch.Generator, boost: float = 9.0
) -> Float[Tensor, "num 1 *grid"]:
    """Right-hand sides of norm 1: Gaussian combinations of Ritz vectors, ``boost`` times as much of the lower half.

    Raises
    ------
    ValueError
        If ``num`` or ``boost`` is not positive, or there are fewer than two vectors.
    """
    if num < 1 or not boost > 0 or len(vectors) < 2:
        raise ValueError(f"num, boost must be positive and vectors at least 2, got {num=}, {boost=}, {len(vectors)=}")
    c = torch.randn(num, len(vectors), generator=generator, dtype=vectors.dtype)
    c[:, : len(vectors) // 2] *= boost
    b = functional.normalize(c).to(vectors.device) @ vectors.flatten(1)  # the vectors are orthonormal
    return b.view(num, 1, *vectors.shape[1:])


# --- network and training ---------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.relu(self.first(x)))


class DirectionNetwork(nn.Module):
    """A convolutional network ``f(b)`` shaped like a multigrid cycle, without biases: ``f(c b) = c f(b)`` for c > 0.

    Residual blocks and average pooling on the way down, nearest-neighbour upsampling and shortcuts on the way up.
    Upsampled values are multiplied by 4: on a grid twice as coarse the inverse of the Laplacian is 4 times as large.

    Parameters
    ----------
    channels, levels
        Channels of every layer, and how often the grid is halved; its sides must be divisible by ``2^levels``.
    dims
        2 or 3, the dimension of the grid.
    generator
        Source of the initial weights.

    Raises
    ------
    ValueError
        If ``channels`` or ``levels`` is not positive, or ``dims`` is neither 2 nor 3; on evaluation, if the grid cannot
        be halved ``levels`` times.
    """

    def __init__(self, channels: int = 8, levels: int = 3, dims: int = 2, *, generator: torch.Generator) -> None:
        super().__init__()
        if min(channels, levels) < 1 or dims not in (2, 3):
            raise ValueError(
                f"channels and levels must be positive and dims 2 or 3, got {channels=}, {levels=}, {dims=}"
            )

        def convolution(n_in: int, n_out: int, size: int = 3) -> nn.Module:
            kind = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
            layer = nn.utils.skip_init(kind, n_in, n_out, size, padding=size // 2, bias=False)
            return initialised(layer, generator)

        def block() -> nn.Module:
            return _Residual(convolution(channels, channels), convolution(channels, channels))

        self.first = convolution(1, channels)
        self.down = nn.ModuleList(block() for _ in range(levels))
        self.middle = nn.ModuleList(convolution(channels, channels) for _ in range(2))
        self.up = nn.ModuleList(block() for _ in range(levels))
        self.last = convolution(channels, 1, 1)
        self.pool = {2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](2)

    def forward(self, b: Float[Tensor, "batch 1 *grid"]) -> Float[Tensor, "batch 1 *grid"]:
        if b.shape[-1] % 2 ** len(self.down):
            raise ValueError(f"b must have sides divisible by {2 ** len(self.down)}, got shape {tuple(b.shape)}")
        x, kept = self.first(b), []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = self.pool(x)
        for convolution in self.middle:
            x = x + functional.relu(convolution(x))
        for block in self.up:
            x = block(4 * functional.interpolate(x, scale_factor=2) + kept.pop())
        return self.last(x)


def direction_loss(
    operator: PoissonOperator, f: Float[Tensor, "*batch_and_grid"], b: Float[Tensor, "*batch_and_grid"]
) -> Float[Tensor, "*batch"]:
    """Squared residual ``|b - α A f|²`` after one step along the direction ``f``, of the length of the line search.

    ``α = fᵀb / fᵀAf`` stands for the constant that ``f ≈ A⁻¹b`` leaves open, so that no solution is needed and the
    scale of ``f`` does not matter. For ``b`` of norm 1 the loss is 0 for the exact direction.

    Raises
    ------
    ValueError
        If ``f`` and ``b`` differ in shape.

    Notes
    -----
    Source: the paper's loss (abstract: the difference between an input and the matrix times the network's output, with
    the unspecified constant accounted for).
    """
    if f.shape != b.shape:
        raise ValueError(f"f must have the shape of b, {tuple(b.shape)}, got {tuple(f.shape)}")
    image, axes = operator(f), tuple(operator.axes)
    alpha = (f * b).sum(axes, keepdim=True) / (f * image).sum(axes, keepdim=True)
    return (b - alpha * image).square().sum(axes)


def train_direction_network(
    operator: PoissonOperator,
    data: Float[Tensor, "num 1 *grid"],
    networks: Sequence[DirectionNetwork],
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    batch_size: int = 8,
    lr: float = 6e-3,
) -> tuple[list[DirectionNetwork], Float[Tensor, "steps networks"]]:
    """Train networks side by side on right-hand sides alone: Adam, one-cycle learning rate, gradient norm clipped at 1.

    Parameters
    ----------
    operator, data
        The one system of the training, and right-hand sides of norm 1 for it.
    networks, generators
        The networks (copied, not modified), and for each the source of its batches.
    steps, batch_size, lr
        Number of steps (10 or more), right-hand sides in a batch, and the peak of the learning rate.

    Returns
    -------
    networks
        The trained networks.
    losses
        Mean loss of the batch at every step.

    Raises
    ------
    ValueError
        If there are not as many generators as networks, or fewer than 10 steps.
    """
    if len(networks) != len(generators):
        raise ValueError(f"generators must hold one per network, got {len(generators)} for {len(networks)}")
    if steps < 10:
        raise ValueError(f"steps must be at least 10, for a fifth of them warms up, got {steps}")
    ensemble = Ensemble(networks)
    batches = [minibatches(len(data), batch_size, generator) for generator in generators]

    def loss(_: int) -> Float[Tensor, " networks"]:
        b = torch.stack([data[next(batch)] for batch in batches])
        return direction_loss(operator, ensemble.each(b), b).mean((1, 2))

    history = fit(
        loss,
        ensemble.parameters.values(),
        steps=steps,
        lr=lr,
        schedule=lambda update: OneCycleLR(update, lr, total_steps=steps, pct_start=0.2),
        clip=1.0,
    )
    return ensemble.members(), history["loss"][1:]


# --- solvers ----------------------------------------------------------------------------------------------------------


def _check_solve(b: Tensor | Vector, tol: float, max_iter: int) -> None:
    """Raise unless there is something to solve."""
    largest = float(abs(b).max())
    if not 0 < largest < float("inf"):
        raise ValueError(f"b must be finite and not 0 everywhere, got a largest entry of {largest}")
    if not tol > 0 or max_iter < 1:
        raise ValueError(f"tol must be positive and max_iter at least 1, got {tol=}, {max_iter=}")


def deep_conjugate_direction(
    operator: PoissonOperator,
    b: Float[Tensor, "*grid"],
    propose: Callable[[Float[Tensor, "*grid"]], Float[Tensor, "*grid"]],
    tol: float,
    max_iter: int,
    num_orthogonal: int = 2,
) -> tuple[Float[Tensor, "*grid"], list[float]]:
    """Solve ``A x = b`` along proposed directions, each made A-orthogonal to the latest ones, with exact line search.

    Parameters
    ----------
    operator, b
        The system; ``b`` is 0 in solid cells. Float64 is needed for tolerances below about 1e-6.
    propose
        Maps the residual, scaled to norm 1, to a direction: a network, or anything else. Its scale and sign do not
        matter, and neither does what it returns in solid cells. The identity gives conjugate gradients.
    tol, max_iter
        Stop when the residual falls below ``tol`` times that of ``x = 0``, or after ``max_iter`` iterations.
    num_orthogonal
        Number of earlier directions to which a new one is made A-orthogonal; the paper takes 2.

    Returns
    -------
    x
        The last iterate, 0 in solid cells.
    relative_residuals
        ``|b - A x| / |b|`` before the first iteration and after each.

    Raises
    ------
    ValueError
        If ``b`` does not fit or is 0 or not finite, a number is out of range, or a proposal is 0 or not finite.

    Notes
    -----
    Source: the paper's algorithm, in the form of its published code. The error in the A-norm never increases.
    """
    _check_solve(b, tol, max_iter)
    if b.shape != operator.fluid.shape or b[~operator.fluid].any():
        raise ValueError(f"b must have the grid's shape and be 0 in solid cells, got shape {tuple(b.shape)}")
    if num_orthogonal < 0:
        raise ValueError(f"num_orthogonal must not be negative, got {num_orthogonal}")
    x, r, residuals = torch.zeros_like(b), b, [1.0]
    latest = deque(maxlen=num_orthogonal)
    while residuals[-1] >= tol and len(residuals) <= max_iter:
        p = propose(r / r.norm()) * operator.fluid
        for q, image, energy in latest:
            p = p - (p * image).sum() / energy * q
        image = operator(p)
        energy = (p * image).sum()
        if not 0 < energy < float("inf"):
            raise ValueError(f"propose must return a finite direction, not 0, got one with pᵀAp = {float(energy)}")
        latest.append((p, image, energy))
        x = x + (r * p).sum() / energy * p
        r = b - operator(x)  # anew each time: an updated residual drifts away from the true one
        residuals.append(float(r.norm() / b.norm()))
    return x, residuals


def _conjugate_gradients(
    apply: Callable,
    b: Tensor | Vector,
    x: Tensor | Vector,
    precondition: Callable,
    deflate: Callable,
    tol: float,
    max_iter: int,
) -> tuple[Tensor | Vector, list[float]]:
    """The loop that all classical variants share; torch and NumPy alike."""
    _check_solve(b, tol, max_iter)
    r, p, rho, size = b - apply(x), 0.0, 1.0, float((b * b).sum()) ** 0.5
    residuals = [float((r * r).sum()) ** 0.5 / size]
    while residuals[-1] >= tol and len(residuals) <= max_iter:
        z = precondition(r)
        rho, previous = (r * z).sum(), rho
        p = deflate(z) + rho / previous * p
        image = apply(p)
        alpha = rho / (p * image).sum()
        x, r = x + alpha * p, r - alpha * image
        residuals.append(float((r * r).sum()) ** 0.5 / size)
    return x, residuals


def conjugate_gradient(
    matrix: PoissonOperator | csr_array,
    b: Tensor | Vector,
    tol: float,
    preconditioner: Callable = lambda r: r,
    max_iter: int = 10_000,
) -> tuple[Tensor | Vector, list[float]]:
    """Preconditioned conjugate gradients from 0; ``x`` and relative residuals as in :func:`deep_conjugate_direction`.

    ``b`` is a field for an operator and a vector over the fluid cells for a sparse matrix. ``preconditioner`` maps a
    residual to an approximate solution, linearly and symmetrically; the identity gives plain conjugate gradients.

    Raises
    ------
    ValueError
        If ``b`` is 0 or not finite, ``tol`` is not positive, or ``max_iter`` is smaller than 1.
    """
    apply = matrix if callable(matrix) else matrix.__matmul__
    return _conjugate_gradients(apply, b, 0 * b, preconditioner, lambda z: z, tol, max_iter)


def deflated_conjugate_gradient(
    matrix: csr_array, b: Vector, W: Float[np.ndarray, "cells k"], tol: float, max_iter: int = 10_000
) -> tuple[Vector, list[float]]:
    """Conjugate gradients in the A-orthogonal complement of the columns of ``W``, where the solution is known at once.

    Raises
    ------
    ValueError
        As for :func:`conjugate_gradient`, and if ``W`` has not one row per cell or dependent columns.
    """
    if W.ndim != 2 or len(W) != len(b) or np.linalg.matrix_rank(W) < W.shape[1]:
        raise ValueError(f"W must have {len(b)} rows and independent columns, got shape {W.shape}")
    image = matrix @ W
    energy = np.linalg.inv(W.T @ image)  # small: one row and column for each column of W
    start = W @ (energy @ (W.T @ b))
    return _conjugate_gradients(
        matrix.__matmul__, b, start, lambda r: r, lambda z: z - W @ (energy @ (image.T @ z)), tol, max_iter
    )


def incomplete_cholesky(matrix: csr_array) -> csr_array:
    """The lower factor ``L`` of ``A ≈ L Lᵀ`` with entries only where ``A`` has them: IC(0).

    Raises
    ------
    ValueError
        If ``matrix`` is not square, or a pivot is not positive.
    """
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square, got shape {matrix.shape}")
    given = csr_array(matrix)
    starts, columns, entries = (part.tolist() for part in (given.indptr, given.indices, given.data))
    rows: list[dict[int, float]] = []  # Python's own lists: NumPy is slow at single numbers
    for i, (start, end) in enumerate(pairwise(starts)):
        row: dict[int, float] = {}
        rows.append(row)
        for j, entry in sorted(zip(columns[start:end], entries[start:end], strict=True)):
            if j > i:
                break
            rest = entry - sum(value * rows[j].get(k, 0.0) for k, value in row.items())
            if j == i and not rest > 0:
                raise ValueError(f"matrix has no incomplete factor: pivot {i} is {rest:g}, it must be positive")
            row[j] = rest**0.5 if j == i else rest / rows[j][j]
    i, j, value = zip(*((i, j, value) for i, row in enumerate(rows) for j, value in row.items()), strict=True)
    return csr_array((value, (i, j)), shape=matrix.shape)


def multigrid(operator: PoissonOperator) -> Callable[[Vector], Vector]:
    """A symmetric V-cycle of smoothed aggregation, as a preconditioner for vectors over the fluid cells.

    Blocks of ``3^d`` cells become one cell of the next level; the constant on a block, smoothed by one damped Jacobi
    step, is interpolated; one such step smooths before and after. The coarsest level is solved exactly.

    Notes
    -----
    Source: Vaněk, Mandel and Brezina, "Algebraic multigrid by smoothed aggregation", 1996. Not in the paper.
    """
    matrix, cells = operator.to_sparse(), operator.fluid.cpu().nonzero().numpy()
    levels = []
    while len(cells) > 200:
        cells, block = np.unique(cells // 3, axis=0, return_inverse=True)
        constant = csr_array((np.ones(len(block)), (np.arange(len(block)), block)))
        damping = 2 / 3 / matrix.diagonal()
        interpolate = csr_array(constant - diags_array(damping) @ (matrix @ constant))
        levels.append((matrix, damping, interpolate))
        matrix = csr_array(interpolate.T @ matrix @ interpolate)
    coarsest = splu(matrix.tocsc())

    def cycle(r: Vector, level: int = 0) -> Vector:
        if level == len(levels):
            return coarsest.solve(r)
        matrix, damping, interpolate = levels[level]
        x = damping * r
        x = x + interpolate @ cycle(interpolate.T @ (r - matrix @ x), level + 1)
        return x + damping * (r - matrix @ x)

    return cycle


# --- where the systems come from: smoke -------------------------------------------------------------------------------


def _sample(field: Float[Tensor, "*grid"], index: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape"]:
    """The field between its entries, multilinear, at fractional indices; the border's values beyond the border."""
    last = torch.tensor(field.shape, device=field.device) - 1
    place = (2 * index / last - 1).flip(-1)  # grid_sample counts from -1 to 1, the last axis first
    mode = dict(mode="bilinear", padding_mode="border", align_corners=True)
    return functional.grid_sample(field[None, None], place[None], **mode)[0, 0]


def _offset(fluid: Tensor, axis: int | None = None) -> Float[Tensor, " d"]:
    """Where entry 0 of a field lies, in cells from the corner of the box: of cells, or of the faces across ``axis``."""
    return torch.tensor(
        [0.0 if k == axis else 0.5 for k in range(fluid.ndim)], dtype=torch.float64, device=fluid.device
    )


def advect(
    field: Float[Tensor, "*grid"], offset: Float[Tensor, " d"], velocity: Faces, dt: float
) -> Float[Tensor, "*grid"]:
    """The field after it was carried along for a time ``dt``: each point takes the value from where it came.

    Semi-Lagrangian, hence stable for every ``dt``, and within the range of the old values. Lengths are in cells;
    ``offset`` is the place of the field's first entry.

    Raises
    ------
    ValueError
        If ``offset`` or ``velocity`` does not have one part per axis of ``field``.
    """
    if not len(offset) == len(velocity) == field.ndim:
        raise ValueError(f"offset and velocity must have {field.ndim} parts, got {len(offset)} and {len(velocity)}")
    axes = [torch.arange(size, dtype=field.dtype, device=field.device) for size in field.shape]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) + offset
    speed = [_sample(flow, place - _offset(field, axis)) for axis, flow in enumerate(velocity)]
    return _sample(field, place - dt * torch.stack(speed, dim=-1) - offset)


def project(operator: PoissonOperator, velocity: Faces, solve: Callable[[Tensor], Tensor]) -> Faces:
    """Subtract the gradient of the pressure ``p`` with ``A p = -div u``: what is left has no divergence.

    Flow through closed faces is removed first. ``solve`` maps a right-hand side to a solution.

    Raises
    ------
    ValueError
        If ``velocity`` does not have the shapes of the operator's faces.
    """
    shapes = [tuple(faces.shape) for faces in operator.open]
    if [tuple(flow.shape) for flow in velocity] != shapes:
        raise ValueError(f"velocity must have shapes {shapes}, got {[tuple(flow.shape) for flow in velocity]}")
    velocity = [faces * flow for faces, flow in zip(operator.open, velocity, strict=True)]
    pressure = solve(-operator.divergence(velocity))
    return [flow - slope for flow, slope in zip(velocity, operator.gradient(pressure), strict=True)]


def plume_step(
    operator: PoissonOperator,
    density: Float[Tensor, "*grid"],
    velocity: Faces,
    source: Bool[Tensor, "*grid"],
    solve: Callable[[Tensor], Tensor],
    buoyancy: float = 0.2,
) -> tuple[Float[Tensor, "*grid"], Faces]:
    """One unit of time of hot smoke in an incompressible gas without viscosity: carry, add smoke, lift, project.

    The first axis points up. ``density`` is kept at 1 in the cells of ``source``; ``buoyancy`` is the acceleration of
    smoke of density 1, in cells per unit of time squared. Returns the new density and velocity.

    Raises
    ------
    ValueError
        If ``density`` or ``source`` does not fit the grid, a source is solid, or as for :func:`project`.
    """
    fluid = operator.fluid
    if density.shape != fluid.shape or source.shape != fluid.shape or source[~fluid].any():
        raise ValueError(
            f"density and source must have the grid's shape {tuple(fluid.shape)} and source lie in the fluid, "
            f"got shapes {tuple(density.shape)} and {tuple(source.shape)}"
        )
    density = (advect(density, _offset(fluid), velocity, 1.0) * fluid).masked_fill(source, 1.0)
    velocity = [advect(flow, _offset(fluid, axis), velocity, 1.0) for axis, flow in enumerate(velocity)]
    lift = functional.pad(density, (0, 0) * (fluid.ndim - 1) + (1, 1))
    velocity[0] = velocity[0] + buoyancy * (lift[1:] + lift[:-1]) / 2
    return density, project(operator, velocity, solve)
