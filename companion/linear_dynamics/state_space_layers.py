"""Linear state-space layers: a recurrent network, a convolution and a differential equation in one.

Gu, Johnson, Goel, Saab, Dao, Rudra and Ré, "Combining Recurrent, Convolutional, and Continuous-time Models with Linear
State-Space Layers", NeurIPS 2021 (arXiv 2110.13985).

A layer simulates ``dx/dt = A x + B u``, ``y = C x + D u`` with a state of order ``N``, one input and ``M`` outputs
(channels). Sampled with step ``Δt`` it becomes ``x_k = Ā x_{k-1} + B̄ u_k``, ``y_k = C x_k + D u_k``, from a state of
zero: each input enters before the state is read out. Time is in the units of ``A``; sequences have ``L`` samples.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.io import wavfile
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu
from tqdm import trange

from companion import data, runtime
from companion.models import mlp
from companion.training import minibatches

F64 = torch.float64
SPOKEN_WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
_SAMPLE_RATE = 16_000
_SPEECH_COMMANDS = (
    "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    "md5:6b74f3901214cb2c2934e98196829835",  # the checksum that torchaudio expects for this address
)
_DYNAMICS = ("log_step", "scale", "diagonal", "tridiagonal")  # what the paper's LSSL trains and LSSL-fixed keeps

# --- memory: the HiPPO matrices and their structure -------------------------------------------------------------------


def _degrees(order: int) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Degrees ``n`` of the Legendre polynomials below ``order``, and ``r_n = sqrt(2n + 1)``."""
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    n = torch.arange(order, dtype=F64)
    return n, (2 * n + 1).sqrt()


def hippo_legs(order: int) -> tuple[Float[Tensor, "N N"], Float[Tensor, " N"]]:
    """Matrices ``A`` and ``B`` of HiPPO-LegS (scaled Legendre), in float64.

    The time-varying system ``dx/dt = (A x + B u) / t`` keeps the exact projection of all of ``u`` on ``[0, t]`` on the
    first ``N`` orthonormal Legendre polynomials. The layer uses ``A`` and ``B`` without the ``1/t``.

    Raises
    ------
    ValueError
        If ``order`` is smaller than 1.

    Notes
    -----
    Source: Section 4 of the paper, from HiPPO (arXiv 2008.07669).
    """
    n, r = _degrees(order)
    return -torch.outer(r, r).tril(-1) - torch.diag(n + 1), r


def hippo_legt(order: int, window: float = 1.0) -> tuple[Float[Tensor, "N N"], Float[Tensor, " N"]]:
    """Matrices ``A`` and ``B`` of HiPPO-LegT (translated Legendre), in float64: a memory of the last ``window`` θ.

    ``u(t - θ + θs)`` is close to ``Σ_n x_n(t) r_n P_n(2s - 1)`` for ``s`` from 0 to 1.

    Raises
    ------
    ValueError
        If ``order`` is smaller than 1 or ``window`` is not positive.

    Notes
    -----
    Source: Section 4 of the paper, from HiPPO (arXiv 2008.07669).
    """
    n, r = _degrees(order)
    if not window > 0 or not math.isfinite(window):
        raise ValueError(f"window must be positive and finite, got {window}")
    parity = (-1.0) ** (n[:, None] - n)
    return -torch.outer(r, r) * torch.where(n[:, None] >= n, 1.0, parity) / window, r / window


def hippo_structure(measure: str, order: int) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, "3 N"]]:
    """The few numbers that make up the HiPPO matrices: ``quasiseparable(*hippo_structure(...))`` is ``A``.

    Parameters
    ----------
    measure
        ``"legs"``, or ``"legt"`` with window 1.
    order
        Size ``N``.

    Returns
    -------
    scale, diagonal, tridiagonal
        Arguments of :func:`quasiseparable`, ``5N`` numbers.

    Raises
    ------
    ValueError
        If the measure is unknown or ``order`` is smaller than 1.
    """
    n, r = _degrees(order)
    zero, one = torch.zeros_like(n), torch.ones_like(n)
    if measure == "legs":
        return r, -n / (2 * n + 1), torch.stack([-one, one, zero])
    if measure == "legt":
        middle = zero.clone()
        middle[0] += 0.5
        middle[-1] += 0.5
        return r, zero, torch.stack([-one / 2, middle, one / 2])
    raise ValueError(f"measure must be 'legs' or 'legt' to have this structure, got {measure!r}")


def quasiseparable(
    scale: Float[Tensor, " N"], diagonal: Float[Tensor, " N"], tridiagonal: Float[Tensor, "3 N"]
) -> Float[Tensor, "N N"]:
    """The structured matrix ``A = -P (D0 + T⁻¹) P`` with diagonal ``P`` and ``D0`` and tridiagonal ``T``.

    Parameters
    ----------
    scale, diagonal
        Diagonals of ``P`` and ``D0``.
    tridiagonal
        Rows: the entries of ``T`` left of, on and right of the diagonal. Entry ``n`` stands in row ``n`` of ``T``, so
        the first one on the left and the last one on the right are not used.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: Section 4 and the official code's ``TriDInverseAdaptiveTransition``.
    """
    if scale.ndim != 1 or diagonal.shape != scale.shape or tridiagonal.shape != (3, *scale.shape):
        raise ValueError(
            "scale, diagonal and tridiagonal must have shapes (N,), (N,) and (3, N), got "
            f"{tuple(scale.shape)}, {tuple(diagonal.shape)} and {tuple(tridiagonal.shape)}"
        )
    left, middle, right = tridiagonal
    t = torch.diag(left[1:], -1) + torch.diag(middle) + torch.diag(right[:-1], 1)
    return -scale[:, None] * (torch.diag(diagonal) + torch.linalg.inv(t)) * scale


def off_diagonal_rank(A: Float[Tensor, "N N"]) -> int:
    """Largest rank of a block of ``A`` that lies strictly below or strictly above the diagonal.

    At most ``r`` for an ``r``-quasiseparable matrix. Source: Section 4.

    Raises
    ------
    ValueError
        If ``A`` is no square matrix with at least two rows.
    """
    if A.ndim != 2 or A.shape[0] != A.shape[1] or len(A) < 2:
        raise ValueError(f"A must be square with at least two rows, got shape {tuple(A.shape)}")
    # the largest blocks are A[i:, :i] and A[:i, i:]; every other one is a part of these
    blocks = [block for i in range(1, len(A)) for block in (A[i:, :i], A[:i, i:])]
    return max(int(torch.linalg.matrix_rank(block)) for block in blocks)


def legs_matvec(v: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N"]:
    """``A v`` for the matrix of :func:`hippo_legs` in O(N): one cumulative sum, and no matrix.

    Raises
    ------
    ValueError
        If ``v`` has no entries.
    """
    n, r = (vector.to(v) for vector in _degrees(v.shape[-1]))
    return n * v - r * (r * v).cumsum(-1)


def legs_solve(b: Float[Tensor, "*batch N"], step: float) -> Float[Tensor, "*batch N"]:
    """Solution ``x`` of ``(I - step A) x = b`` for the matrix of :func:`hippo_legs` in O(N).

    Forward substitution, in which one running sum stands for all that is already solved.

    Raises
    ------
    ValueError
        If ``b`` has no entries or ``step`` is negative.
    """
    if not step >= 0:
        raise ValueError(f"step must not be negative, got {step}")
    n, r = (vector.to(b) for vector in _degrees(b.shape[-1]))
    total, x = torch.zeros_like(b[..., 0]), []
    for b_n, n_n, r_n in zip(b.unbind(-1), n, r, strict=True):
        x.append((b_n - step * r_n * total) / (1 + step * (n_n + 1)))
        total = total + r_n * x[-1]
    return torch.stack(x, -1)


# --- three views of one model -----------------------------------------------------------------------------------------


def discretize(
    A: Float[Tensor, "N N"], B: Float[Tensor, " N"], step: float | Float[Tensor, " H"], alpha: float = 0.5
) -> tuple[Float[Tensor, "*H N N"], Float[Tensor, "*H N"]]:
    """The recurrence ``(Ā, B̄)`` that a system becomes when it is sampled: generalised bilinear transform.

    ``Ā = (I - αΔt A)⁻¹ (I + (1-α)Δt A)`` and ``B̄ = (I - αΔt A)⁻¹ Δt B``.

    Parameters
    ----------
    A, B
        The system.
    step
        Step ``Δt``: a number, or one for each of ``H`` features, which gives the results a first axis.
    alpha
        0 is Euler's method, 1/2 the bilinear transform, 1 backward Euler.

    Raises
    ------
    ValueError
        If the shapes do not fit, a step is not positive, or ``alpha`` lies outside [0, 1].

    Notes
    -----
    Source: Section 2 of the paper.
    """
    if A.ndim != 2 or A.shape[0] != A.shape[1] or B.shape != A.shape[:1]:
        raise ValueError(f"A must be (N, N) and B (N,), got shapes {tuple(A.shape)} and {tuple(B.shape)}")
    step = torch.as_tensor(step, dtype=A.dtype, device=A.device)
    if not (step > 0).all() or not step.isfinite().all():
        raise ValueError(f"step must be positive and finite, got {step.tolist()}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    step, one = step[..., None, None], torch.eye(len(A), dtype=A.dtype, device=A.device)
    right = torch.cat([one + (1 - alpha) * step * A, step * B[:, None]], -1)
    solved = torch.linalg.solve(one - alpha * step * A, right)
    return solved[..., :-1], solved[..., -1]


def krylov(A_bar: Float[Tensor, "*H N N"], B_bar: Float[Tensor, "*H N"], length: int) -> Float[Tensor, "*H N {length}"]:
    """The Krylov matrix ``(B̄, ĀB̄, Ā²B̄, ...)``: times ``C`` it is the layer's convolution kernel.

    Each round doubles the columns and squares the power, so there are about ``log2(length)`` rounds.

    Raises
    ------
    ValueError
        If ``length`` is smaller than 1 or the shapes do not fit.

    Notes
    -----
    Source: Section 3 (the Krylov function). Theorem 2's faster algorithm is unstable in floating point, as the paper
    says itself; its official code uses this one.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if A_bar.ndim < 2 or A_bar.shape[-2] != A_bar.shape[-1] or B_bar.shape != A_bar.shape[:-1]:
        raise ValueError(
            f"A_bar must be (..., N, N) and B_bar (..., N), got shapes {tuple(A_bar.shape)} and {tuple(B_bar.shape)}"
        )
    columns, power = B_bar[..., None], A_bar
    while (known := columns.shape[-1]) < length:
        columns = torch.cat([columns, power @ columns[..., : length - known]], -1)
        if 2 * known < length:
            power = power @ power
    return columns


def causal_convolution(u: Float[Tensor, "*batch L"], kernel: Float[Tensor, "*batch L"]) -> Float[Tensor, "*batch L"]:
    """``y_k = Σ_{j<=k} kernel_j u_{k-j}`` by FFT; zeros are appended so that the end does not wrap into the start.

    Raises
    ------
    ValueError
        If the two differ in length.
    """
    length = u.shape[-1]
    if kernel.shape[-1] != length:
        raise ValueError(f"kernel must have the length of u, {length}, got {kernel.shape[-1]}")
    return torch.fft.irfft(torch.fft.rfft(u, 2 * length) * torch.fft.rfft(kernel, 2 * length), 2 * length)[..., :length]


def simulate(
    A_bar: Float[Tensor, "N N"],
    B_bar: Float[Tensor, " N"],
    C: Float[Tensor, "M N"],
    D: Float[Tensor, " M"],
    u: Float[Tensor, " L"],
    x0: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, "L M"], Float[Tensor, "L N"]]:
    """The recurrent view: outputs ``y_k = C x_k + D u_k`` and states ``x_k = Ā x_{k-1} + B̄ u_k`` of every step.

    Parameters
    ----------
    A_bar, B_bar
        From :func:`discretize`, for one step size.
    C, D
        Read-out of ``M`` channels.
    u
        Input sequence.
    x0
        State before the first input; zero by default.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    order = len(B_bar)
    if A_bar.shape != (order, order) or C.ndim != 2 or C.shape[1] != order or D.shape != C.shape[:1] or u.ndim != 1:
        shapes = ", ".join(str(tuple(argument.shape)) for argument in (A_bar, B_bar, C, D, u))
        raise ValueError(f"A_bar, B_bar, C, D, u must be (N, N), (N,), (M, N), (M,), (L,), got shapes {shapes}")
    x = torch.zeros_like(B_bar) if x0 is None else x0
    if x.shape != (order,):
        raise ValueError(f"x0 must have shape ({order},), got {tuple(x.shape)}")
    states = []
    for drive in u[:, None] * B_bar:
        x = torch.addmv(drive, A_bar, x)
        states.append(x)
    x = torch.stack(states)
    return x @ C.mT + u[:, None] * D, x


def picard_layers(
    f: Callable[[Tensor, Tensor], Tensor], x0: float, horizon: float, steps: int, depth: int
) -> tuple[Float[Tensor, " steps+1"], list[Float[Tensor, " steps+1"]]]:
    """A stack of order-1 layers that solves ``dx/dt = -x + f(t, x)`` by Picard iteration.

    Layer ``ℓ`` is the linear system ``dx/dt = -x + u`` (bilinear transform), fed with ``u(t) = f(t, x^(ℓ-1)(t))``: a
    position-wise nonlinearity between linear layers. Its input over a step is the mean of both ends.

    Parameters
    ----------
    f
        Takes times and states of equal shape.
    x0
        Initial state; ``x^(0)`` is this constant.
    horizon, steps
        The final time, and the number of steps to it.
    depth
        Number of layers.

    Returns
    -------
    t
        Times from 0 to ``horizon``, float64.
    layers
        ``[x^(0), ..., x^(depth)]`` at these times.

    Raises
    ------
    ValueError
        If ``horizon`` or ``steps`` is not positive, or ``depth`` is negative.

    Notes
    -----
    Source: Lemma 3.2.
    """
    if not horizon > 0 or steps < 1 or depth < 0:
        raise ValueError(
            f"horizon and steps must be positive and depth not negative, got {horizon=}, {steps=}, {depth=}"
        )
    t = torch.linspace(0, horizon, steps + 1, dtype=F64)
    one, start = torch.ones(1, dtype=F64), torch.full((1,), x0, dtype=F64)
    A_bar, B_bar = discretize(-one[:, None], one, horizon / steps)
    layers = [start.expand(steps + 1)]
    for _ in range(depth):
        force = f(t, layers[-1])
        _, x = simulate(A_bar, B_bar, one[:, None], 0 * one, (force[1:] + force[:-1]) / 2, start)
        layers.append(torch.cat([start, x[:, 0]]))
    return t, layers


# --- the layer, and a network of them ---------------------------------------------------------------------------------


class LinearStateSpaceLayer(nn.Module):
    """``H`` state-space models side by side, one for each feature, then GELU and a linear map across features.

    All share ``A`` and ``B``; each has its own step ``Δt_h``, drawn log-uniformly, and its own ``C_h`` and ``D_h``.

    Parameters
    ----------
    features, order, channels
        Numbers ``H`` of features, ``N`` of states and ``M`` of outputs of each feature.
    measure
        ``"legs"``, ``"legt"`` (window 1), or ``"random"``: a Gaussian ``A`` of standard deviation ``1/N``, ``B = 1``.
    step_range
        Smallest and largest ``Δt``, in the time units of ``A``.
    train_dynamics
        Whether to train ``A`` (as a :func:`quasiseparable` matrix) and ``Δt`` besides the rest (the paper's LSSL), or
        to keep them (LSSL-fixed).
    generator
        Source of the initial values.

    Raises
    ------
    ValueError
        If a number is not positive, the measure is unknown or has no trainable structure, or the range is empty.

    Notes
    -----
    Source: Sections 3 and 5. The system is discretised in float64 (``α = 1/2``) and only then cast. With fixed dynamics
    the Krylov matrix is computed once for each length and rate.
    """

    def __init__(
        self,
        features: int,
        order: int,
        channels: int = 1,
        *,
        generator: torch.Generator,
        measure: str = "legs",
        step_range: tuple[float, float] = (1e-3, 1e-1),
        train_dynamics: bool = False,
    ) -> None:
        super().__init__()
        if min(features, order, channels) < 1:
            raise ValueError(f"features, order and channels must be positive, got {features=}, {order=}, {channels=}")
        if measure not in ("legs", "legt", "random") or (measure == "random" and train_dynamics):
            raise ValueError(f"measure must be 'legs', 'legt' or (untrained) 'random', got {measure!r}")
        low, high = step_range
        if not 0 < low <= high < math.inf:
            raise ValueError(f"step_range must be two positive numbers in order, got {step_range}")

        uniform = torch.rand(features, generator=generator, dtype=F64)
        dynamics = {"log_step": math.log(low) + uniform * math.log(high / low)}
        if measure == "random":
            dynamics["A"] = torch.randn(order, order, generator=generator, dtype=F64) / order
            self.register_buffer("B", torch.ones(order, dtype=F64))
        else:
            dynamics |= zip(_DYNAMICS[1:], hippo_structure(measure, order), strict=True)
            self.register_buffer("B", dynamics["scale"].clone())
        for name, value in dynamics.items():
            if train_dynamics:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.C = nn.Parameter(torch.randn(features, channels, order, generator=generator) / order**0.5)
        self.D = nn.Parameter(torch.randn(features, channels, generator=generator))
        self.mix = mlp([features * channels, features], generator=generator)
        self.measure, self.train_dynamics = measure, train_dynamics
        self._kept: dict[tuple, tuple[Tensor, ...]] = {}
        self.register_load_state_dict_post_hook(_forget)

    def _keep(self, compute: Callable[..., tuple[Tensor, ...]], *arguments: float) -> tuple[Tensor, ...]:
        """What ``compute`` returns, kept for the next call while the dynamics cannot change."""
        if self.train_dynamics:
            return compute(*arguments)
        key = (compute.__name__, self.C.device, self.C.dtype, *arguments)
        if key not in self._kept:
            self._kept[key] = compute(*arguments)
        return self._kept[key]

    def _discrete(self, rate: float) -> tuple[Tensor, Tensor]:
        A = self.A if self.measure == "random" else quasiseparable(self.scale, self.diagonal, self.tridiagonal)
        return discretize(A.double(), self.B.double(), rate * self.log_step.exp().double())

    def _krylov(self, length: int, rate: float) -> tuple[Tensor]:
        return (krylov(*self._discrete(rate), length).to(self.C.dtype),)

    def forward(self, u: Float[Tensor, "batch L H"], rate: float = 1.0) -> Float[Tensor, "batch L H"]:
        """The convolutional view.

        Parameters
        ----------
        u
            Sequences of feature vectors.
        rate
            Factor on every ``Δt``: 2 for sequences with half as many samples per unit of time as in training.

        Raises
        ------
        ValueError
            If ``u`` has another number of features, or ``rate`` is not positive.
        """
        if u.ndim != 3 or u.shape[-1] != len(self.C):
            raise ValueError(f"u must have shape (batch, L, {len(self.C)}), got {tuple(u.shape)}")
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        (matrix,) = self._keep(self._krylov, u.shape[1], rate)
        signal = u.mT[:, :, None]  # batch, H, one channel, L
        y = causal_convolution(signal, self.C @ matrix) + self.D[..., None] * signal
        return self.mix(gelu(y).flatten(1, 2).mT)

    def step(
        self, u_k: Float[Tensor, "batch H"], state: Float[Tensor, "batch H N"] | None = None
    ) -> tuple[Float[Tensor, "batch H"], Float[Tensor, "batch H N"]]:
        """The recurrent view: output and new state after one more sample; no state is a state of zero.

        Raises
        ------
        ValueError
            If ``u_k`` has another number of features.
        """
        if u_k.ndim != 2 or u_k.shape[-1] != len(self.C):
            raise ValueError(f"u_k must have shape (batch, {len(self.C)}), got {tuple(u_k.shape)}")
        A_bar, B_bar = (matrix.to(self.C.dtype) for matrix in self._keep(self._discrete, 1.0))
        drive = B_bar * u_k[..., None]
        state = drive if state is None else torch.einsum("hnk,bhk->bhn", A_bar, state) + drive
        y = torch.einsum("hmn,bhn->bhm", self.C, state) + self.D * u_k[..., None]
        return self.mix(gelu(y).flatten(1)), state


def _forget(layer: LinearStateSpaceLayer, _: object) -> None:
    """Drop what was computed from dynamics that have just been replaced."""
    layer._kept.clear()


class StateSpaceClassifier(nn.Module):
    """A classifier of sequences: linear map, residual blocks ``z + layer(LayerNorm(z))``, mean over time, linear map.

    Parameters
    ----------
    inputs, features, order, depth, classes
        Numbers of input channels, of features ``H``, of states ``N``, of blocks, and of classes.
    generator
        Source of the initial values.
    **options
        Further arguments of :class:`LinearStateSpaceLayer`.

    Raises
    ------
    ValueError
        If a number is not positive.
    """

    def __init__(
        self, inputs: int, features: int, order: int, depth: int, classes: int, *, generator: torch.Generator, **options
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.encoder = mlp([inputs, features], generator=generator)
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(depth))
        self.layers = nn.ModuleList(
            LinearStateSpaceLayer(features, order, generator=generator, **options) for _ in range(depth)
        )
        self.head = mlp([features, classes], generator=generator)

    def forward(self, u: Float[Tensor, "batch L inputs"], rate: float = 1.0) -> Float[Tensor, "batch classes"]:
        """Scores of the classes; ``rate`` as for the layer."""
        z = self.encoder(u)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            z = z + layer(norm(z), rate)
        return self.head(z.mean(1))


def train_classifier(
    model: nn.Module,
    u: Float[Tensor, "samples L inputs"],
    labels: Int[Tensor, " samples"],
    *,
    epochs: int,
    lr: float,
    generator: torch.Generator,
    batch: int = 32,
    weight_decay: float = 0.0,
) -> None:
    """Train a classifier of sequences in place: AdamW, one cycle of the learning rate, gradients clipped to norm 1.

    The dynamics of a :class:`LinearStateSpaceLayer`, where they are trained, take steps of a tenth of ``lr``, since a
    small change of ``A`` changes every later state, and do not decay: zero is no simpler memory.

    Parameters
    ----------
    model
        Any classifier; its parameters are changed.
    u, labels
        Training sequences and their classes.
    epochs, lr, batch
        Passes over the data, the largest learning rate, and the size of mini-batches.
    generator
        Source of the order of the samples.
    weight_decay
        Decoupled decay of the weights; 0 is Adam.

    Raises
    ------
    ValueError
        If the labels do not match the sequences, or a number is not positive.
    """
    if len(labels) != len(u):
        raise ValueError(f"labels must be one per sequence, {len(u)}, got {len(labels)}")
    if epochs < 1 or not lr > 0 or not 1 <= batch <= len(u):
        raise ValueError(
            f"epochs, lr and batch must be positive, batch at most {len(u)}, got {epochs=}, {lr=}, {batch=}"
        )
    batches = minibatches(len(u), batch, generator)
    steps = epochs * (len(u) // batch)
    groups: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        groups[name.rpartition(".")[2] in _DYNAMICS].append(parameter)
    decays = {False: weight_decay, True: 0.0}
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decays[dynamics]} for dynamics, group in groups.items()], fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, lr / 10], total_steps=steps)
    for _ in trange(steps, leave=False):
        rows = next(batches)
        optimizer.zero_grad()
        cross_entropy(model(u[rows]), labels[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


# --- a task that needs order ------------------------------------------------------------------------------------------


def tone_words(
    samples: int, length: int, generator: torch.Generator
) -> tuple[Float[Tensor, "samples {length} 1"], Int[Tensor, " samples"]]:
    """Words of two tones with three pitches each: 9 classes that differ in pitch and order. Our stand-in for speech.

    The signal lives on the time interval [0, 1]. Each tone has a Gaussian envelope of width 0.07 at about 0.2 or 0.75,
    a frequency of 5, 9 or 14 with 5 % of jitter, a random phase and an amplitude between 0.7 and 1.3. A random
    background of frequencies up to 16 is added. All content lies well below the Nyquist frequency of 64 samples.

    Returns
    -------
    u
        Signals at ``length`` equidistant times.
    label
        ``3 i + j`` for pitch ``i`` followed by pitch ``j``.

    Raises
    ------
    ValueError
        If ``samples`` or ``length`` is not positive.
    """
    if samples < 1 or length < 1:
        raise ValueError(f"samples and length must be positive, got {samples=}, {length=}")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(samples, *shape, generator=generator)

    def gauss(*shape: int) -> Tensor:
        return torch.randn(samples, *shape, generator=generator)

    t = torch.arange(length) / length
    pitch = torch.randint(3, (samples, 2), generator=generator)
    frequency = torch.tensor([5.0, 9.0, 14.0])[pitch] * (1 + 0.05 * gauss(2))
    centre = torch.tensor([0.2, 0.75]) + torch.tensor([0.05, 0.08]) * (2 * uniform(2) - 1)
    amplitude, phase = 0.7 + 0.6 * uniform(2), 2 * math.pi * uniform(2)
    envelope = amplitude[..., None] * torch.exp(-0.5 * ((t - centre[..., None]) / 0.07) ** 2)
    tones = envelope * torch.sin(2 * math.pi * frequency[..., None] * t + phase[..., None])
    waves = torch.sin(2 * math.pi * (torch.arange(1, 17)[:, None] * t + uniform(16)[..., None]))
    background = 0.15 / 4 * (gauss(16)[..., None] * waves).sum(1)
    signal = 2 * (tones.sum(1) + background)  # a factor 2 gives them a standard deviation of order one
    return signal[..., None], 3 * pitch[:, 0] + pitch[:, 1]


# --- spoken words -----------------------------------------------------------------------------------------------------


def speech_commands() -> tuple[Float[Tensor, "samples 16000 1"], Int[Tensor, " samples"]]:
    """Raw recordings of :data:`SPOKEN_WORDS`, one second at 16 kHz, from Speech Commands 0.02 (2.3 GB to download).

    In the ``smoke`` profile nothing is downloaded: an archive with a few synthetic sounds stands in for the data set.

    Returns
    -------
    u
        Waveforms, between -1 and 1, in the order of the archive.
    label
        Position in :data:`SPOKEN_WORDS`.

    Raises
    ------
    companion.data.DataUnavailable
        If the data set cannot be had.

    Notes
    -----
    Source: Warden, "Speech Commands", 2018 (arXiv 1804.03209). Ten words, and only recordings that last a whole second,
    as in the paper's experiment on raw speech.
    """
    if runtime.profile() == "smoke":
        with TemporaryDirectory() as folder:
            return _read_speech(_speech_stand_in(Path(folder, "speech.tar.gz")))
    return _read_speech(data.download("speech_commands", *_SPEECH_COMMANDS))


def _read_speech(archive: Path) -> tuple[Float[Tensor, "samples 16000 1"], Int[Tensor, " samples"]]:
    """Read from front to back: a compressed archive cannot be entered in the middle."""
    waves, labels = [], []
    with tarfile.open(archive) as files:
        for member in files:
            path = PurePosixPath(member.name)
            if path.suffix != ".wav" or path.parent.name not in SPOKEN_WORDS:
                continue  # other words, background noise, lists
            _, wave = wavfile.read(io.BytesIO(files.extractfile(member).read()))
            if len(wave) == _SAMPLE_RATE:
                waves.append(wave)
                labels.append(SPOKEN_WORDS.index(path.parent.name))
    return torch.from_numpy(np.stack(waves))[..., None].float() / 2**15, torch.tensor(labels)


def _speech_stand_in(archive: Path) -> Path:
    """Write an archive like that of Speech Commands: a pitch for every word, a recording cut short, and noise."""
    rng, t = np.random.default_rng(0), np.arange(_SAMPLE_RATE) / _SAMPLE_RATE
    sounds = {"_background_noise_/noise.wav": rng.normal(size=_SAMPLE_RATE), "yes/short.wav": np.sin(3000 * t[:-1])}
    for k, word in enumerate(SPOKEN_WORDS):
        for n in range(4):
            sounds[f"{word}/{n}.wav"] = np.sin(2 * np.pi * (100 * (k + 1) * t + rng.random()))
    with tarfile.open(archive, "w:gz", compresslevel=1) as files:
        for name, sound in sounds.items():
            wavfile.write(content := io.BytesIO(), _SAMPLE_RATE, (2**12 * sound).astype(np.int16))
            member = tarfile.TarInfo(f"./{name}")
            member.size = content.getbuffer().nbytes
            files.addfile(member, content)
    return archive
