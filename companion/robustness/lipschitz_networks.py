"""Networks with a certified Lipschitz constant, by construction from a block LDLᵀ factorisation.

Juston, Sreenivas, Nottage and Soylemezoglu, "LDLT L-Lipschitz Network: Generalized Deep End-To-End Lipschitz Network
Construction", 2025 (arXiv 2512.05915). Baseline: SLL layers (Araujo et al., "A unified algebraic perspective on
Lipschitz neural networks", ICLR 2023).

The residual network ``w_0 = x``, ``w_k = σ(C_k w_{k-1} + b_k)``, ``y = A x + B w_n + b_y`` has ``n`` hidden layers of
widths ``d_1, ..., d_n``. All norms are Euclidean, and σ acts on each entry with slopes in [0, 1] unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn import datasets
from torch import Tensor, nn
from torch.func import jacrev
from torch.linalg import cholesky, solve_triangular
from torch.nn import functional as F

from companion import data, runtime, training

Matrix = Float[Tensor, "n_out n_in"]


# --- certificates -----------------------------------------------------------------------------------------------------


def _check_weights(A: Matrix | None, Cs: Sequence[Matrix], B: Matrix) -> None:
    if not Cs:
        raise ValueError("Cs is empty; the network needs at least one hidden layer")
    sizes = [Cs[0].shape[1], *(C.shape[0] for C in Cs)]
    expected = (B.shape[0], sizes[0])
    if [C.shape[1] for C in Cs] != sizes[:-1] or B.shape[1] != sizes[-1] or (A is not None and A.shape != expected):
        raise ValueError(
            f"A, Cs and B must fit together, got shapes {None if A is None else tuple(A.shape)}, "
            f"{[tuple(C.shape) for C in Cs]}, {tuple(B.shape)}"
        )


def lipschitz_lmi(
    A: Float[Tensor, "p d_0"] | None,
    Cs: Sequence[Matrix],
    B: Float[Tensor, "p d_n"],
    lipschitz: float,
    lambdas: Sequence[Float[Tensor, " d_k"]] | None = None,
    slopes: tuple[float, float] = (0.0, 1.0),
) -> Float[Tensor, "N N"]:
    """The cyclic tridiagonal matrix ``M`` of the certificate: if ``M ⪰ 0``, the network is ``lipschitz``-Lipschitz.

    Parameters
    ----------
    A, Cs, B
        Weights of the skip connection (None for a feed-forward network), the hidden layers and the output.
    lipschitz
        The constant to certify, positive.
    lambdas
        Diagonals of the multipliers ``Λ_k``, one per hidden layer, positive; None takes the identity.
    slopes
        Smallest and largest slope ``(m, l)`` of the activation.

    Returns
    -------
    Tensor
        Symmetric, with block sizes ``d_0, d_1, ..., d_n``.

    Raises
    ------
    ValueError
        If the weights do not fit together, ``lipschitz`` is not positive, a multiplier is not positive or has the
        wrong size, or ``slopes`` is not ordered.

    Notes
    -----
    Source: the paper's residual LMI; the blocks for general slopes follow from ``(Δw - mΔv)ᵀ Λ (lΔv - Δw) ≥ 0``.
    """
    _check_weights(A, Cs, B)
    lambdas = [C.new_ones(len(C)) for C in Cs] if lambdas is None else list(lambdas)
    if [tuple(v.shape) for v in lambdas] != [(len(C),) for C in Cs] or any(bool((v <= 0).any()) for v in lambdas):
        raise ValueError(
            f"lambdas must hold positive vectors of sizes {[len(C) for C in Cs]}, got {[v.tolist() for v in lambdas]}"
        )
    if not 0 < lipschitz < math.inf:
        raise ValueError(f"lipschitz must be positive and finite, got {lipschitz}")
    m, l = slopes
    if not m < l:
        raise ValueError(f"slopes must be (smallest, largest), got {slopes}")
    return _lmi(A, Cs, B, lipschitz**2, lambdas, m, l)


def _lmi(
    A: Matrix | None, Cs: Sequence[Matrix], B: Matrix, rho: float, lambdas: Sequence[Tensor], m: float, l: float
) -> Tensor:
    """``M`` for the squared constant ``rho``: affine in ``rho`` and in the multipliers, whatever their sign."""
    A = B.new_zeros(len(B), Cs[0].shape[1]) if A is None else A
    sizes = [A.shape[1], *map(len, Cs)]
    blocks = [[B.new_zeros(rows, columns) for columns in sizes] for rows in sizes]
    blocks[0][0] = rho * torch.eye(sizes[0]).to(B) - A.mT @ A
    for k, (C, diagonal) in enumerate(zip(Cs, lambdas, strict=True), start=1):
        scaled = diagonal[:, None] * C
        blocks[k - 1][k - 1] = blocks[k - 1][k - 1] + 2 * l * m * C.mT @ scaled
        blocks[k][k - 1] = -(l + m) * scaled
        blocks[k][k] = 2 * torch.diag(diagonal)
    blocks[-1][-1] = blocks[-1][-1] - B.mT @ B
    blocks[-1][0] = blocks[-1][0] - B.mT @ A
    for row, column in {(k, k - 1) for k in range(1, len(sizes))} | {(len(Cs), 0)}:
        blocks[column][row] = blocks[row][column].mT
    return torch.cat([torch.cat(row, 1) for row in blocks])


def block_ldl(M: Float[Tensor, "N N"], sizes: Sequence[int]) -> tuple[Float[Tensor, "N N"], list[Tensor]]:
    """Block factorisation ``M = L D Lᵀ``: ``L`` has identity blocks on its diagonal, ``D`` is block diagonal.

    ``M`` is positive definite if and only if every block ``D_k`` is.

    Parameters
    ----------
    M
        Symmetric matrix.
    sizes
        Sizes of its blocks.

    Returns
    -------
    L, blocks
        The unit lower triangular factor, and the list of the ``D_k``.

    Raises
    ------
    ValueError
        If ``sizes`` does not add up to the size of ``M``, or ``M`` is not symmetric.
    LinAlgError
        If a pivot block is singular.
    """
    if M.ndim != 2 or M.shape != (sum(sizes), sum(sizes)) or min(sizes) < 1:
        raise ValueError(f"sizes must add up to the size of M, got {list(sizes)} and shape {tuple(M.shape)}")
    if not torch.allclose(M, M.mT):
        raise ValueError(f"M must be symmetric, got an asymmetry of {float((M - M.mT).abs().max()):.3g}")
    L, rest, blocks, start = torch.eye(len(M)).to(M), M, [], 0
    for size in sizes:
        D, below = rest[:size, :size], rest[size:, :size]
        blocks.append(D)
        if len(below):
            factor = torch.linalg.solve(D, below.mT).mT
            L[start + size :, start : start + size] = factor
            rest = rest[size:, size:] - factor @ below.mT
        start += size
    return L, blocks


def lipsdp(A: Float[Tensor, "p d_0"] | None, Cs: Sequence[Matrix], B: Float[Tensor, "p d_n"]) -> float:
    """The least constant that the LMI certifies for given weights, over all diagonal multipliers.

    A semidefinite program in ``ρ = L²`` and the multipliers: minimise ``ρ`` subject to ``M(ρ, Λ) ⪰ 0``. Newton's method
    follows the path of ``ρ/μ - log det M`` as ``μ`` falls (``M ≻ 0`` implies ``Λ ≻ 0``). Every point of the path is
    feasible, so that the returned constant is certified, and at most 1e-6 above the optimum of ``ρ`` for weights of
    order one.

    Raises
    ------
    ValueError
        If the weights do not fit together or are not float64.

    Notes
    -----
    Source: the program of Fazlyab et al., "Efficient and accurate estimation of Lipschitz constants for deep neural
    networks", 2019, with the paper's corner block.
    """
    _check_weights(A, Cs, B)
    if B.dtype != torch.float64:
        raise ValueError(f"A, Cs and B must be float64 for a certificate, got {B.dtype}")
    widths = [len(C) for C in Cs]

    def lmi(v: Tensor) -> Tensor:
        return _lmi(A, Cs, B, v[0], v[1:].split(widths), 0.0, 1.0)

    # A strictly feasible start: multipliers from the output backwards, each large enough for what comes after it.
    load, start = B.mT @ B, []
    for C in reversed(Cs):
        strength = torch.linalg.matrix_norm(load, 2) + 1e-3
        start.insert(0, strength.expand(len(C)))
        pivot = 2 * strength * torch.eye(len(C)).to(B) - load
        load = strength**2 * C.mT @ torch.linalg.solve(pivot, C)
    v = torch.cat([B.new_zeros(1), *start])
    corner, d_0 = lmi(v), Cs[0].shape[1]
    schur = corner[:d_0, :d_0] - corner[:d_0, d_0:] @ torch.linalg.solve(corner[d_0:, d_0:], corner[d_0:, :d_0])
    v[0] = 1 - torch.linalg.eigvalsh(schur)[0]

    # M is affine in v: these are its derivatives, whatever v.
    basis = torch.vmap(lmi)(torch.eye(len(v)).to(v)) - lmi(torch.zeros_like(v))
    objective = torch.zeros_like(v)
    objective[0] = 1
    for mu in torch.logspace(0, -8, 9, dtype=v.dtype):
        for _ in range(100):
            ratios = torch.linalg.solve(lmi(v), basis)
            gradient = objective / mu - ratios.diagonal(dim1=1, dim2=2).sum(1)
            hessian = torch.einsum("iab,jba->ij", ratios, ratios)
            step = torch.linalg.solve(hessian, gradient)
            decrement = (gradient @ step).sqrt()
            v = v - step / (1 + decrement)  # this damping never leaves the feasible set
            if decrement < 0.1:
                break
    return float(v[0].sqrt())


def certified_radius(logits: Float[Tensor, "n classes"], lipschitz: float) -> Float[Tensor, " n"]:
    """Radius of the ball around each input on which the class with the largest logit cannot change.

    Half the gap between the two largest logits, over ``lipschitz/√2``: ``(f_(1) - f_(2)) / (√2 L)``, in units of the
    input. ``L`` is a joint constant of all logits; the difference of two of them is then ``√2 L``-Lipschitz.

    Raises
    ------
    ValueError
        If there are fewer than two classes or ``lipschitz`` is not positive.
    """
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError(f"logits must have shape (n, classes) with two classes or more, got {tuple(logits.shape)}")
    if not lipschitz > 0:
        raise ValueError(f"lipschitz must be positive, got {lipschitz}")
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return (first - second) / (math.sqrt(2) * lipschitz)


def empirical_lipschitz(f: Callable[[Float[Tensor, " d"]], Float[Tensor, " p"]], X: Float[Tensor, "n d"]) -> float:
    """Largest spectral norm of the Jacobian of ``f`` over the points ``X``: a lower bound of the Lipschitz constant.

    Raises
    ------
    ValueError
        If ``X`` is no non-empty matrix.
    """
    if X.ndim != 2 or not len(X):
        raise ValueError(f"X must hold points in its rows, got shape {tuple(X.shape)}")
    with torch.no_grad():
        return float(torch.linalg.matrix_norm(torch.vmap(jacrev(f))(X), 2).max())


# --- the construction -------------------------------------------------------------------------------------------------


def contraction(V: Matrix, alpha: float, side: Literal["left", "right"]) -> Matrix:
    """A matrix with spectral norm below 1, from any matrix ``V``, through a Cholesky factor.

    ``"left"``: ``chol(V Vᵀ + αI)⁻¹ V``. ``"right"``: ``V R⁻¹`` with ``RᵀR = VᵀV + αI`` and ``R`` upper triangular. Both
    have singular values ``s / √(s² + α)``, and ``α`` is no more than a scale: it acts like ``V / √α``.

    Raises
    ------
    ValueError
        If ``side`` is unknown or ``alpha`` is not positive.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    V = V / math.sqrt(alpha)
    return _contract(V) if side == "right" else _contract(V.mT).mT


def _shifted(V: Matrix) -> Float[Tensor, "n_out n_out"]:
    return torch.eye(len(V), dtype=V.dtype, device=V.device) + V @ V.mT


def _contract(V: Matrix) -> Matrix:
    """The right contraction with α = 1."""
    return solve_triangular(cholesky(_shifted(V.mT)).mT, V, upper=True, left=False)


def _expand(N: Matrix) -> Matrix:
    """The matrix ``V`` whose right contraction with α = 1 is ``N``."""
    gap = torch.eye(N.shape[1], dtype=N.dtype, device=N.device) - N.mT @ N
    return solve_triangular(cholesky(gap).mT, N, upper=True, left=False)


def _over(N: Matrix, K: Tensor) -> Matrix:
    """``N K⁻¹`` for a lower triangular ``K``."""
    return solve_triangular(K, N, upper=False, left=False)


def _output_factors(S: Tensor, H: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower factors of ``S`` and of ``P = D_n' + Hᵀ S⁻¹ H``, with ``D_n' = (K Kᵀ)⁻¹``, and ``Y = chol(S)⁻¹ H``."""
    factor = cholesky(S)
    Y = solve_triangular(factor, H, upper=False)
    return factor, cholesky(torch.cholesky_inverse(K) + Y.mT @ Y), Y


def _free(n_out: int, n_in: int, generator: torch.Generator) -> nn.Parameter:
    """Free parameters with independent entries of variance 1/fan-in."""
    return nn.Parameter(torch.randn(n_out, n_in, generator=generator) / math.sqrt(n_in))


def _hidden_biases(hidden: Sequence[int], generator: torch.Generator) -> nn.ParameterList:
    return nn.ParameterList([0.1 * torch.randn(width, generator=generator) for width in hidden])


def _check_architecture(d_in: int, hidden: Sequence[int], d_out: int, lipschitz: float = 1.0) -> None:
    if not hidden:
        raise ValueError("hidden is empty; the network needs at least one hidden layer")
    if min(d_in, *hidden, d_out) < 1:
        raise ValueError(f"sizes must be positive, got d_in={d_in}, hidden={list(hidden)}, d_out={d_out}")
    if not 0 < lipschitz < math.inf:
        raise ValueError(f"lipschitz must be positive and finite, got {lipschitz}")


class LDLTResidual(nn.Module):
    """``y = A x + B w_n + b_y`` around ``n`` hidden layers, ``lipschitz``-Lipschitz for any values of its parameters.

    Parameters
    ----------
    d_in, hidden, d_out
        Widths of the input, of every hidden layer, and of the output.
    lipschitz
        The certified constant.
    activation
        Acts on each entry, with slopes in [0, 1]; this is not checked.
    generator
        Source of the initial parameters.

    Raises
    ------
    ValueError
        If ``hidden`` is empty, a size is smaller than 1, or ``lipschitz`` is not positive.

    Notes
    -----
    Every factor ``V`` has a scale ``α``, stored as its logarithm. Source: the paper's block LDLᵀ parameterisation; the
    closed form of ``B`` completes the square in its last block.
    """

    def __init__(
        self,
        d_in: int,
        hidden: Sequence[int],
        d_out: int,
        lipschitz: float = 1.0,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        _check_architecture(d_in, hidden, d_out, lipschitz)
        self.lipschitz, self.activation = lipschitz, activation
        shapes = [(d_out, d_in), *((n_out, n_in) for n_in, n_out in pairwise([d_in, *hidden])), (d_out, hidden[-1])]
        self.V = nn.ParameterList([_free(*shape, generator) for shape in shapes])
        self.log_alpha = nn.Parameter(torch.zeros(len(shapes)))
        self.biases = _hidden_biases(hidden, generator)
        self.b_y = nn.Parameter(torch.zeros(d_out))

    def weights(self) -> tuple[Matrix, list[Matrix], Matrix]:
        """The weights ``A``, ``[C_1, ..., C_n]`` and ``B`` that the free parameters stand for."""
        V_A, *Vs, V_B = [V * torch.exp(-s / 2) for V, s in zip(self.V, self.log_alpha, strict=True)]
        A = self.lipschitz * _contract(V_A.mT).mT
        K = cholesky(_shifted(V_A.mT)) / self.lipschitz  # K Kᵀ is the inverse of D_0
        S, Cs = torch.eye(len(A), dtype=A.dtype, device=A.device), []
        G = A  # A Γ_k
        for V in Vs:
            GK = G @ K
            S = S + GK @ GK.mT
            N = _contract(V)
            Cs.append(math.sqrt(2) * _over(N, K))
            G = math.sqrt(2) * GK @ N.mT
            K = cholesky(_shifted(V)) / math.sqrt(2)  # K Kᵀ is the inverse of D_k, by Woodbury
        S_factor, P_factor, Y = _output_factors(S, G, K)
        return A, Cs, solve_triangular(S_factor.mT, _contract(V_B) @ P_factor.mT - Y, upper=True)

    @torch.no_grad()
    def set_weights(self, A: Matrix, Cs: Sequence[Matrix], B: Matrix) -> None:
        """Choose the free parameters that give these weights; the inverse of :meth:`weights`.

        Raises
        ------
        ValueError
            If the weights do not fit this network, or are not strictly feasible with ``Λ = I``.
        """
        shapes = [tuple(W.shape) for W in (A, *Cs, B)]
        if shapes != [tuple(V.shape) for V in self.V]:
            raise ValueError(f"A, Cs and B must have shapes {[tuple(V.shape) for V in self.V]}, got {shapes}")
        try:
            Vs = [_expand(A.mT / self.lipschitz).mT]
            K = cholesky(_shifted(Vs[0].mT)) / self.lipschitz
            S, G = torch.eye(len(A)).to(A), A
            for C in Cs:
                GK = G @ K
                S = S + GK @ GK.mT
                N = C @ K / math.sqrt(2)
                G = math.sqrt(2) * GK @ N.mT
                Vs.append(_expand(N))
                K = cholesky(_shifted(Vs[-1])) / math.sqrt(2)
            S_factor, P_factor, Y = _output_factors(S, G, K)
            Vs.append(_expand(solve_triangular(P_factor.mT, S_factor.mT @ B + Y, upper=True, left=False)))
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"A, Cs and B do not satisfy the LMI strictly for lipschitz={self.lipschitz}") from error
        for parameter, V in zip(self.V, Vs, strict=True):
            parameter.copy_(V)
        self.log_alpha.zero_()

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        A, Cs, B = self.weights()
        w = x
        for C, b in zip(Cs, self.biases, strict=True):
            w = self.activation(F.linear(w, C, b))
        return F.linear(x, A) + F.linear(w, B, self.b_y)


class LDLTFeedForward(nn.Module):
    """A feed-forward network that is ``lipschitz``-Lipschitz for any values of its parameters.

    The case ``A = 0`` of :class:`LDLTResidual`, with the same parameters, errors and source.
    """

    def __init__(
        self,
        d_in: int,
        hidden: Sequence[int],
        d_out: int,
        lipschitz: float = 1.0,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        _check_architecture(d_in, hidden, d_out, lipschitz)
        self.lipschitz, self.activation = lipschitz, activation
        self.V = nn.ParameterList([_free(n_out, n_in, generator) for n_in, n_out in pairwise([d_in, *hidden, d_out])])
        self.log_alpha = nn.Parameter(torch.zeros(len(self.V)))
        self.biases = nn.ParameterList([*_hidden_biases(hidden, generator), torch.zeros(d_out)])

    def weights(self) -> list[Matrix]:
        """The weights ``[C_1, ..., C_{n+1}]`` of all layers; the last one has no activation."""
        *Vs, V_last = [V * torch.exp(-s / 2) for V, s in zip(self.V, self.log_alpha, strict=True)]
        K = torch.eye(Vs[0].shape[1], dtype=V_last.dtype, device=V_last.device) / self.lipschitz
        Cs = []
        for V in Vs:
            Cs.append(math.sqrt(2) * _over(_contract(V), K))
            K = cholesky(_shifted(V)) / math.sqrt(2)
        return [*Cs, _over(_contract(V_last), K)]

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return _layers(x, self.weights(), self.biases, self.activation)


def _layers(x: Tensor, weights: Sequence[Matrix], biases: Sequence[Tensor], activation: Callable) -> Tensor:
    for W, b in zip(weights[:-1], biases[:-1], strict=True):
        x = activation(F.linear(x, W, b))
    return F.linear(x, weights[-1], biases[-1])


# --- baselines --------------------------------------------------------------------------------------------------------


class SLLBlock(nn.Module):
    """``x - 2 W T⁻¹ relu(Wᵀ x + b)`` with ``T_ii = Σ_j |WᵀW|_ij q_j / q_i``: a 1-Lipschitz map of R^d to itself.

    Parameters
    ----------
    d, m
        Width of the input and of the hidden layer.
    generator
        Source of the initial parameters.

    Raises
    ------
    ValueError
        If a size is smaller than 1.

    Notes
    -----
    Source: Araujo et al., 2023.
    """

    def __init__(self, d: int, m: int, *, generator: torch.Generator) -> None:
        super().__init__()
        _check_architecture(d, [m], d)
        self.W = _free(d, m, generator)
        self.log_q = nn.Parameter(torch.zeros(m))
        self.b = nn.Parameter(0.1 * torch.randn(m, generator=generator))

    def scales(self) -> Float[Tensor, " m"]:
        """The diagonal of ``T``."""
        q = self.log_q.exp()
        return (self.W.mT @ self.W).abs() @ q / q

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return x - 2 * (torch.relu(x @ self.W + self.b) / self.scales()) @ self.W.mT


class _Contraction(nn.Module):
    """A linear layer of norm below 1, made as those of LDLT are."""

    def __init__(self, d_in: int, d_out: int, generator: torch.Generator) -> None:
        super().__init__()
        self.V, self.b = _free(d_out, d_in, generator), nn.Parameter(torch.zeros(d_out))
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _contract(self.V * torch.exp(-self.log_alpha / 2)), self.b)


class SLLNet(nn.Module):
    """Zeros appended to the input, ``depth`` SLL blocks, and a readout: 1-Lipschitz.

    Parameters
    ----------
    d_in, d_out
        Number of inputs and outputs.
    width, m, depth
        Width of the blocks, of their hidden layers, and number of blocks.
    head
        Whether the readout is a trained linear contraction; without it the first ``d_out`` coordinates are read.
    generator
        Source of the initial parameters.

    Raises
    ------
    ValueError
        If ``width < d_in``, ``width < d_out`` without a head, or a size is smaller than 1.
    """

    lipschitz = 1.0

    def __init__(
        self, d_in: int, width: int, m: int, depth: int, d_out: int, *, head: bool = True, generator: torch.Generator
    ) -> None:
        super().__init__()
        _check_architecture(d_in, [m] * depth, d_out)
        if width < d_in or (width < d_out and not head):
            raise ValueError(f"width must be at least d_in={d_in}, and {d_out=} without a head, got {width}")
        self.blocks = nn.Sequential(*[SLLBlock(width, m, generator=generator) for _ in range(depth)])
        self.readout = _Contraction(width, d_out, generator) if head else nn.Identity()
        self.padding, self.d_out = width - d_in, d_out

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.readout(self.blocks(F.pad(x, (0, self.padding))))[..., : self.d_out]


class SpectralNormNet(nn.Module):
    """A feed-forward ReLU network whose matrices are divided by their exact spectral norms: 1-Lipschitz.

    Raises
    ------
    ValueError
        If ``hidden`` is empty or a size is smaller than 1.
    """

    lipschitz = 1.0

    def __init__(self, d_in: int, hidden: Sequence[int], d_out: int, *, generator: torch.Generator) -> None:
        super().__init__()
        _check_architecture(d_in, hidden, d_out)
        self.V = nn.ParameterList([_free(n_out, n_in, generator) for n_in, n_out in pairwise([d_in, *hidden, d_out])])
        self.biases = nn.ParameterList([*_hidden_biases(hidden, generator), torch.zeros(d_out)])

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return _layers(x, [V / torch.linalg.matrix_norm(V, 2) for V in self.V], self.biases, torch.relu)


# --- training and data ------------------------------------------------------------------------------------------------

Loss = Callable[[Float[Tensor, "members n p"], Tensor], Float[Tensor, " members"]]


def squared_error(outputs: Float[Tensor, "members n p"], y: Float[Tensor, "members n p"]) -> Float[Tensor, " members"]:
    """Mean squared error of every member."""
    return (outputs - y).square().mean((1, 2))


def margin_loss(margin: float, temperature: float) -> Loss:
    """Cross-entropy of ``(f - margin · onehot(y)) / temperature``, the mean over the samples of every member.

    The right logit must win by ``margin`` before the loss becomes small, and a small temperature lets a network whose
    logits are bound by its constant say so.

    Raises
    ------
    ValueError
        If ``margin`` is negative or ``temperature`` is not positive.
    """
    if margin < 0 or not temperature > 0:
        raise ValueError(f"margin must not be negative and temperature positive, got {margin=}, {temperature=}")

    def loss(outputs: Float[Tensor, "members n classes"], y: Int[Tensor, "members n"]) -> Float[Tensor, " members"]:
        shifted = (outputs - margin * F.one_hot(y, outputs.shape[-1])) / temperature
        return F.cross_entropy(shifted.movedim(-1, 1), y, reduction="none").mean(1)

    return loss


def train(
    members: Sequence[nn.Module],
    loss: Loss,
    x: Float[Tensor, "members n d"],
    y: Tensor,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    generator: torch.Generator,
    record: Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]] | None = None,
    record_every: int = 1,
) -> tuple[list[nn.Module], training.History]:
    """Train networks of one architecture side by side, each on its own data, by Adam with a cosine to zero.

    Parameters
    ----------
    members
        The networks; not modified.
    loss
        Maps outputs and targets of all members to their losses.
    x, y
        Inputs and targets of every member.
    steps, lr, batch_size
        Number of steps, initial learning rate, and samples per step: the same rows of every member's data.
    generator
        Source of the order of the samples.
    record, record_every
        What to keep on the way, see :func:`companion.training.fit`; ``record`` is given the function that maps inputs
        of all members to their outputs.

    Returns
    -------
    trained, history
        Trained copies of the members, and what was recorded.

    Raises
    ------
    ValueError
        If ``x``, ``y`` and ``members`` differ in number.
    """
    if not len(members) == len(x) == len(y) or x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"x and y must hold samples for each of {len(members)} members, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    ensemble = training.Ensemble(members)
    batches = training.minibatches(x.shape[1], batch_size, generator)

    def batch_loss(_: int) -> Tensor:
        rows = next(batches)
        return loss(ensemble.each(x[:, rows]), y[:, rows])

    history = training.fit(
        batch_loss,
        ensemble.parameters.values(),
        steps=steps,
        lr=lr,
        optimizer=partial(torch.optim.Adam, fused=True),
        cosine_to=0.0,
        record=None if record is None else lambda: record(ensemble.each),
        record_every=record_every,
    )
    return ensemble.members(), history


def checkerboard(n: int, rng: np.random.Generator) -> tuple[Float[Tensor, "n 2"], Int[Tensor, " n"]]:
    """Points uniform in [-2, 2]², labelled by the colour of their square of side 1."""
    x = rng.uniform(-2, 2, (n, 2))
    return torch.tensor(x).float(), torch.tensor(np.floor(x).sum(1) % 2).long()


def rings(n: int, rng: np.random.Generator) -> tuple[Float[Tensor, "n 2"], Int[Tensor, " n"]]:
    """Points on four circles of radius 0.5, 1, 1.5, 2 with Gaussian noise of 0.08 on the radius, labelled 0 to 3."""
    y, angle = rng.integers(0, 4, n), rng.uniform(0, 2 * np.pi, n)
    radius = 0.5 * (y + 1) + 0.08 * rng.standard_normal(n)
    return torch.tensor(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)).float(), torch.tensor(y)


_BUNDLED = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
}
_OPENML = {  # UCI sets with numeric features, and their identifiers on OpenML
    "balance-scale": 11, "banknote-authentication": 1462, "diabetes": 37, "ecoli": 39, "glass": 41,
    "heart-statlog": 53, "ionosphere": 59, "optdigits": 28, "page-blocks": 30, "pendigits": 32,
    "satimage": 182, "seeds": 1499, "segment": 36, "sonar": 40, "spambase": 44,
    "vehicle": 54, "vertebra-column": 1523, "waveform-5000": 60, "wdbc": 1510, "yeast": 181,
}  # fmt: skip
OPENML_SETS = tuple(_OPENML)


def uci(name: str) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """A UCI data set: ``"iris"``, ``"wine"``, ``"cancer"``, ``"digits"`` (scikit-learn) or one of :data:`OPENML_SETS`.

    In the ``smoke`` profile nothing is downloaded: iris stands in. Downloads are kept in ``SCIKIT_LEARN_DATA``.

    Raises
    ------
    ValueError
        If the name is unknown.
    DataUnavailable
        If the data set cannot be downloaded; nothing half-downloaded stays.
    """
    if name not in _BUNDLED and name not in _OPENML:
        raise ValueError(f"name must be one of {', '.join([*_BUNDLED, *_OPENML])}, got {name!r}")
    if name in _BUNDLED or runtime.profile() == "smoke":
        x, y = _BUNDLED.get(name, datasets.load_iris)(return_X_y=True)
        return torch.tensor(x).float(), torch.tensor(y)
    x, y = data.table(f"uci_{name}", _OPENML[name])
    return torch.from_numpy(x), torch.from_numpy(np.unique(y, return_inverse=True)[1])
