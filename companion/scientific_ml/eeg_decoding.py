"""Images from EEG: a simulator of evoked responses, linear and contrastive decoders, and the value of more trials.

Xu, Bruzadin Nunes, Jiang, Ryther, Pringle, Scotti, Delorme and Kneeland, "Alljoined-1.6M: A million-trial EEG-image
dataset for evaluating affordable brain-computer interfaces", 2025 (arXiv 2508.18571).

A trial ``X`` holds ``C`` channels and ``T`` samples; the image shown has an embedding ``e`` of ``D`` numbers. Times are
seconds after the onset of the image. Signals have no unit: one is the deviation of the noise of one source of noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from sklearn.covariance import ledoit_wolf
from sklearn.datasets import get_data_home
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from companion import data, models, runtime, training

Trials = Float[Tensor, "n channels samples"]

# --- the simulator ----------------------------------------------------------------------------------------------------


def pink_noise(
    n: int, channels: int, samples: int, generator: torch.Generator, exponent: float = 1.0
) -> Float[Tensor, "n channels samples"]:
    """Gaussian noise whose power falls as ``1/f^exponent``, of variance 1, independent over epochs and channels.

    Epochs are cut from periods twice as long, so that their ends do not match. The variance is that of the
    distribution: an epoch is never scaled by itself, which would take its slowest waves away. A power law has no
    unit, so the sampling rate does not matter.

    Raises
    ------
    ValueError
        If ``exponent`` is negative or not finite, or a size is not positive.
    """
    if not 0 <= exponent < math.inf:
        raise ValueError(f"exponent must be finite and not negative, got {exponent}")
    if min(n, channels, samples) < 1:
        raise ValueError(f"n, channels and samples must be positive, got {n=}, {channels=}, {samples=}")
    power = torch.arange(samples + 1.0) ** -exponent
    power[0] = 0
    spectrum = power.sqrt() * torch.randn(n, channels, samples + 1, generator=generator, dtype=torch.complex64)
    # Each frequency counts twice (with its conjugate), but for the highest, of which only the real part is used.
    variance = (2 * power[:-1].sum() + power[-1] / 2) / (2 * samples) ** 2
    return torch.fft.irfft(spectrum, 2 * samples)[..., :samples] / variance.sqrt()


@dataclass(frozen=True)
class EEGWorld:
    """A head: where electrodes are, what its sources do, and how the background is mixed.

    Attributes
    ----------
    electrodes
        Positions on the unit half-sphere: x right, y front, z up.
    times
        Of the samples, in seconds.
    leadfield, time_courses
        ``ℓ_s`` and ``τ_s``: what source ``s`` adds to each channel, and when.
    weights, constants
        ``w_s`` and ``c_s``: the amplitude of source ``s`` is ``tanh(w_s·e) + c_s``.
    mixing
        ``M``: the background is ``M`` times independent noise.
    exponent
        Of the spectrum of that noise: 1 for 1/f, 0 for white.
    """

    electrodes: Float[Tensor, "channels 3"]
    times: Float[Tensor, " samples"]
    leadfield: Float[Tensor, "channels sources"]
    time_courses: Float[Tensor, "sources samples"]
    weights: Float[Tensor, "sources dim"]
    constants: Float[Tensor, " sources"]
    mixing: Float[Tensor, "channels channels"]
    exponent: float = 1.0


def make_eeg_world(generator: torch.Generator, n_channels: int = 32, embedding_dim: int = 24) -> EEGWorld:
    """A head with 12 sources in its posterior half that answer between 90 and 420 ms, sampled at 100 Hz from -100 ms.

    Raises
    ------
    ValueError
        If ``n_channels`` or ``embedding_dim`` is not positive.
    """
    if min(n_channels, embedding_dim) < 1:
        raise ValueError(f"n_channels and embedding_dim must be positive, got {n_channels=}, {embedding_dim=}")
    i = torch.arange(n_channels)  # a Fibonacci half-sphere
    z, longitude = 1 - (i + 0.5) / n_channels, i * math.pi * (3 - 5**0.5)
    radius = (1 - z**2).sqrt()
    electrodes = torch.stack([radius * longitude.cos(), radius * longitude.sin(), z], 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    near = electrodes[torch.randint(n_channels, (12,), generator=generator)]
    sources = 0.8 * near + 0.05 * normal(12, 3)
    sources[:, 1] = -sources[:, 1].abs()
    signs = 2 * torch.randint(2, (12,), generator=generator) - 1
    times = (torch.arange(70) - 10) / 100
    peak = torch.linspace(0.09, 0.42, 12) + 0.01 * normal(12)
    width = 0.03 + 0.12 * peak
    scale = 0.7 + 0.3 * torch.rand(12, 1, generator=generator)
    background = (-(torch.cdist(electrodes, electrodes) ** 2) / (2 * 0.6**2)).exp() + 0.15 * torch.eye(n_channels)
    return EEGWorld(
        electrodes,
        times,
        leadfield=signs * (-(torch.cdist(electrodes, sources) ** 2) / (2 * 0.5**2)).exp(),
        time_courses=(-((times - peak[:, None]) ** 2) / (2 * width[:, None] ** 2)).exp(),
        weights=scale * normal(12, embedding_dim) / embedding_dim**0.5,
        constants=normal(12),
        mixing=torch.linalg.cholesky(background),
    )


def _baseline_corrected(x: Trials, times: Float[Tensor, " samples"]) -> Trials:
    """Trials less the mean before onset of each channel."""
    return x - x[..., times < 0].mean(-1, keepdim=True)


def evoked_response(world: EEGWorld, embeddings: Float[Tensor, "n dim"]) -> Trials:
    """What images evoke, without noise: ``Σ_s ℓ_s (tanh(w_s·e) + c_s) τ_s``, baseline-corrected.

    Raises
    ------
    ValueError
        If the embeddings are no finite matrix with the world's number of columns.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != world.weights.shape[1] or not embeddings.isfinite().all():
        raise ValueError(
            f"embeddings must be finite, of shape (n, {world.weights.shape[1]}), got shape {tuple(embeddings.shape)}"
        )
    amplitude = (embeddings @ world.weights.mT).tanh() + world.constants
    return _baseline_corrected(
        torch.einsum("cs,ns,st->nct", world.leadfield, amplitude, world.time_courses), world.times
    )


def simulate_trials(
    world: EEGWorld,
    embeddings: Float[Tensor, "n dim"],
    noise_level: float,
    generator: torch.Generator,
    n_average: int = 1,
) -> Trials:
    """Evoked responses in spatially mixed 1/f noise, baseline-corrected.

    Parameters
    ----------
    world, embeddings
        The head, and the images it sees, one per trial.
    noise_level
        ``κ``, the grade of the hardware: the factor of the background.
    generator
        Of the noise. Two grades with equal generators have the same noise, scaled.
    n_average
        Each trial is the mean of so many repeats: exact for Gaussian noise, which it divides by the root.

    Raises
    ------
    ValueError
        As for :func:`evoked_response`, and if ``noise_level`` is negative or ``n_average`` is smaller than 1.
    """
    if not 0 <= noise_level < math.inf or n_average < 1:
        raise ValueError(
            f"noise_level must be finite and not negative, n_average at least 1, got {noise_level=}, {n_average=}"
        )
    evoked = evoked_response(world, embeddings)
    noise = world.mixing @ pink_noise(*evoked.shape, generator, world.exponent)
    return evoked + noise_level / n_average**0.5 * _baseline_corrected(noise, world.times)


def trial_snr(evoked: Trials, trials: Trials) -> float:
    """Variance of the evoked responses over trials divided by that of the noise, both averaged over channels and time.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if evoked.shape != trials.shape:
        raise ValueError(f"evoked and trials must have one shape, got {tuple(evoked.shape)} and {tuple(trials.shape)}")
    return float(evoked.var(0).mean() / (trials - evoked).var(0).mean())


# --- from trials to features ------------------------------------------------------------------------------------------


def time_bins(
    x: Trials, times: Float[Tensor, " samples"], width: int = 3
) -> tuple[Float[Tensor, "n channels bins"], Float[Tensor, " bins"]]:
    """Means over bins of ``width`` samples, one of which starts at onset, and the times at which the bins start.

    Raises
    ------
    ValueError
        If ``width`` is not between 1 and the number of samples, or ``times`` does not fit.
    """
    if times.shape != x.shape[-1:] or not 1 <= width <= len(times):
        raise ValueError(
            f"times must hold the {x.shape[-1]} samples of x and width fit in, got {len(times)} times, {width=}"
        )
    first = int((times < 0).sum()) % width
    return x[..., first:].unfold(-1, width, width).mean(-1), times[first:].unfold(-1, width, width)[:, 0]


def condition_residuals(x: Trials, condition: Int[Tensor, " n"]) -> Trials:
    """Trials less the mean of all trials of the same condition: what the condition does not explain.

    Raises
    ------
    ValueError
        If there is not one condition per trial.
    """
    if condition.shape != x.shape[:1]:
        raise ValueError(f"condition must hold one number for each of {len(x)} trials, got {tuple(condition.shape)}")
    groups, index, count = condition.unique(return_inverse=True, return_counts=True)
    sums = x.new_zeros(len(groups), *x.shape[1:]).index_add_(0, index, x)
    return x - (sums / count[:, None, None])[index]


def noise_whitener(residuals: Trials) -> Float[Tensor, "channels channels"]:
    """``Σ^(-1/2)``, the symmetric root, with the Ledoit-Wolf covariance of the channels over all trials and samples.

    Multivariate noise normalisation (MVNN). Hand in residuals of *training* trials only.

    Raises
    ------
    ValueError
        If the residuals are not finite with three axes, or a covariance is singular.
    """
    if residuals.ndim != 3 or not residuals.isfinite().all():
        raise ValueError(f"residuals must be finite, of shape (n, channels, samples), got {tuple(residuals.shape)}")
    rows = residuals.movedim(1, -1).flatten(0, 1)
    covariance, _ = ledoit_wolf(rows.double().numpy())
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    if not values[0] > 0:
        raise ValueError("residuals have a singular covariance; each condition needs more than one trial")
    return (vectors * values.rsqrt() @ vectors.mT).to(residuals)


# --- decoders ---------------------------------------------------------------------------------------------------------


def _check_pairs(x: Tensor, e: Tensor) -> None:
    """Raise unless trials and embeddings pair up."""
    if len(x) != len(e) or len(x) < 8 or not x.isfinite().all() or not e.isfinite().all():
        raise ValueError(
            f"X and E must be finite and pair up, 8 trials or more, got {tuple(x.shape)} and {tuple(e.shape)}"
        )


class RidgeDecoder:
    """Linear map from trials to embeddings, ``ê = ē + Wᵀ(vec X - x̄)`` with ``W = (XcᵀXc + λI)⁻¹XcᵀEc``.

    Attributes
    ----------
    penalty
        ``λ``: the best of 10 to 10⁶ on the last eighth of the trials. The fit then uses all of them.
    """

    penalties = 10.0 ** torch.arange(1, 7, dtype=torch.float64)

    def fit(self, X: Float[Tensor, "n *features"], E: Float[Tensor, "n dim"]) -> RidgeDecoder:
        """Fit in float64 and return the decoder.

        Raises
        ------
        ValueError
            If the numbers of trials differ or are below 8, or a value is not finite.
        """
        _check_pairs(X, E)
        x, e = X.flatten(1).double(), E.double()
        kept = len(x) - len(x) // 8
        candidates = self._solve(x[:kept], e[:kept], self.penalties.to(x.device))
        error = (self._predict(x[kept:], *candidates) - e[kept:]).square().mean((1, 2))
        self.penalty = float(self.penalties[error.argmin()])
        self.solution = self._solve(x, e, x.new_tensor([self.penalty]))
        return self

    def predict(self, X: Float[Tensor, "n *features"]) -> Float[Tensor, "n dim"]:
        """Embeddings, in the type of ``X``."""
        return self._predict(X.flatten(1).double(), *self.solution)[0].to(X)

    @staticmethod
    def _solve(x: Tensor, e: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor, Float[Tensor, "penalties p dim"]]:
        """Both means, and the weights for every penalty."""
        x_mean, e_mean = x.mean(0), e.mean(0)
        xc, ec = x - x_mean, e - e_mean
        ridge = penalties[:, None, None] * torch.eye(x.shape[1]).to(x)
        return x_mean, e_mean, torch.linalg.solve(xc.mT @ xc + ridge, xc.mT @ ec)

    @staticmethod
    def _predict(x: Tensor, x_mean: Tensor, e_mean: Tensor, weights: Tensor) -> Float[Tensor, "penalties n dim"]:
        return e_mean + (x - x_mean) @ weights


def info_nce(f: Float[Tensor, "n dim"], e: Float[Tensor, "n dim"], scale: Tensor) -> Float[Tensor, ""]:
    """Symmetric contrastive loss: each trial must find its image among those of the batch, and each image its trial.

    Rows are scaled to norm 1; ``scale`` is the factor of their cosines. Source: Radford et al. 2021.
    """
    logits = scale * F.normalize(f) @ F.normalize(e).mT
    identity = torch.arange(len(f), device=f.device)
    return (F.cross_entropy(logits, identity) + F.cross_entropy(logits.mT, identity)) / 2


class ContrastiveDecoder(nn.Module):
    """A small convolutional network from trials to embeddings: space first, then time; for :func:`info_nce`."""

    def __init__(self, n_channels: int, n_samples: int, embedding_dim: int, *, generator: torch.Generator) -> None:
        super().__init__()
        if n_samples < 5:
            raise ValueError(f"n_samples must be at least 5, the length of the filters, got {n_samples}")
        space, time, hidden, out = (
            models.initialised(layer, generator)
            for layer in (
                nn.utils.skip_init(nn.Conv1d, n_channels, 32, 1),
                nn.utils.skip_init(nn.Conv1d, 32, 48, 5),
                nn.utils.skip_init(nn.Linear, 48 * (n_samples - 4), 64),
                nn.utils.skip_init(nn.Linear, 64, embedding_dim),
            )
        )
        self.network = nn.Sequential(
            space, time, nn.GELU(), nn.Dropout(0.3), nn.Flatten(), hidden, nn.GELU(), nn.Dropout(0.3), out
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Trials) -> Float[Tensor, "n dim"]:
        return self.network(x)

    def fit(self, X: Trials, E: Float[Tensor, "n dim"], seed: int, epochs: int = 8) -> ContrastiveDecoder:
        """Train with AdamW and a one-cycle schedule on batches of 256, and return the network in evaluation mode.

        Raises
        ------
        ValueError
            If the numbers of trials differ or are below 8, a value is not finite, or ``epochs`` is smaller than 1.
        """
        _check_pairs(X, E)
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        batch = min(256, len(X))
        batches = training.minibatches(len(X), batch, torch.Generator().manual_seed(seed))
        device, steps = self.log_scale.device, epochs * (len(X) // batch)

        def loss(_: int) -> Tensor:
            rows = next(batches)
            return info_nce(self(X[rows].to(device)), E[rows].to(device), self.log_scale.exp())

        with torch.random.fork_rng():
            torch.manual_seed(seed)  # dropout draws from PyTorch's global generator
            self.train()
            training.fit(
                loss,
                self.parameters(),
                steps=steps,
                lr=2e-3,
                optimizer=partial(AdamW, weight_decay=0.05),
                schedule=partial(OneCycleLR, max_lr=2e-3, total_steps=steps),
                record_every=steps,
            )
        return self.eval()

    @torch.no_grad()
    def predict(self, X: Trials) -> Float[Tensor, "n dim"]:
        """Directions of embeddings; their lengths mean nothing."""
        return self(X.to(self.log_scale.device)).cpu()


def lda_auc(
    x: Trials, y: Int[Tensor, " n"], x_test: Float[Tensor, "m channels samples"], y_test: Int[Tensor, " m"]
) -> Float[Tensor, " samples"]:
    """Area under the ROC curve of a linear discriminant at each time, for labels 0 and 1.

    The discriminant is ``Σ_t⁻¹(μ₁ - μ₀)`` with the covariance within classes over training trials. The area is the
    share of pairs of test trials that are in the right order.

    Raises
    ------
    ValueError
        If labels are other than 0 and 1, or one of them is missing.
    """
    for name, labels in (("y", y), ("y_test", y_test)):
        if labels.unique().tolist() != [0, 1]:
            raise ValueError(f"{name} must hold labels 0 and 1, both of them, got {labels.unique().tolist()}")
    difference = x[y == 1].mean(0) - x[y == 0].mean(0)
    residuals = condition_residuals(x, y).permute(2, 0, 1).contiguous()
    direction = torch.linalg.solve(residuals.mT @ residuals / len(x), difference.mT)
    score = torch.einsum("nct,tc->nt", x_test, direction)
    return (score[y_test == 1][:, None] > score[y_test == 0]).double().mean((0, 1))


# --- scores -----------------------------------------------------------------------------------------------------------


def retrieval_accuracy(predicted: Float[Tensor, "n dim"], gallery: Float[Tensor, "n dim"], k: int) -> float:
    """Share of rows whose own image is among the ``k`` most similar of the gallery.

    Both sets are centred, each by its own mean, and compared by the cosine. Ties count against the true image, so
    that a constant prediction scores nothing. Chance is ``k/n``.

    Raises
    ------
    ValueError
        If the shapes differ, a value is not finite, or ``k`` is not between 1 and the number of rows.
    """
    if predicted.shape != gallery.shape or not predicted.isfinite().all() or not gallery.isfinite().all():
        raise ValueError(
            "predicted and gallery must be finite and have one shape, "
            f"got {tuple(predicted.shape)} and {tuple(gallery.shape)}"
        )
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k must be between 1 and the {len(gallery)} rows of the gallery, got {k}")
    similarity = cosine_similarity(predicted, gallery)
    rivals = (similarity >= similarity.diagonal()[:, None]).sum(1) - 1  # less the true one itself
    return float((rivals < k).double().mean())


def cosine_similarity(predicted: Float[Tensor, "n dim"], gallery: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    """Cosines between the rows of two sets, each centred by its own mean; 0 where a row is the mean."""
    predicted, gallery = (F.normalize((rows - rows.mean(0)).double()) for rows in (predicted, gallery))
    return predicted @ gallery.mT


def _check_curve(n_trials: Sequence[float], *accuracies: Sequence[float]) -> None:
    """Raise unless the numbers describe measured curves."""
    n = np.asarray(n_trials, dtype=float)
    if n.ndim != 1 or len(n) < 2 or not (n > 0).all() or not (np.diff(n) > 0).all():
        raise ValueError(f"n_trials must hold two or more increasing positive numbers, got {n.tolist()}")
    for accuracy in accuracies:
        if np.shape(accuracy) != n.shape or not np.isfinite(accuracy).all():
            raise ValueError(f"accuracy must hold a finite value for each of {len(n)} n_trials, got {accuracy}")


def log_linear_fit(n_trials: Sequence[float], accuracy: Sequence[float]) -> tuple[float, float, float]:
    """Least squares of ``accuracy = c + m log₂ N``: the slope ``m`` per doubling, ``c``, and R².

    Raises
    ------
    ValueError
        If the trials are not increasing positive numbers, or there is not one finite accuracy for each.
    """
    _check_curve(n_trials, accuracy)
    log_n, accuracy = np.log2(n_trials), np.asarray(accuracy, dtype=float)
    slope, intercept = np.polyfit(log_n, accuracy, 1)
    residual = accuracy - intercept - slope * log_n
    return float(slope), float(intercept), float(1 - residual.var() / accuracy.var()) if accuracy.var() else math.nan


def data_multiplier(
    n_trials: Sequence[float], accuracy_a: Sequence[float], accuracy_b: Sequence[float], accuracy: float
) -> float:
    """Trials that ``b`` needs for an accuracy, over those that ``a`` needs: ``N_b/N_a``.

    Each curve is replaced by its running best, so that it rises, and interpolated linearly in ``log₂ N``. NaN where a
    curve starts above the accuracy or never gets there.

    Raises
    ------
    ValueError
        As for :func:`log_linear_fit`.
    """
    _check_curve(n_trials, accuracy_a, accuracy_b)
    log_n, needed = np.log2(n_trials), []
    for curve in (accuracy_a, accuracy_b):
        levels, first = np.unique(np.maximum.accumulate(curve), return_index=True)
        needed.append(np.interp(accuracy, levels, log_n[first], left=math.nan, right=math.nan))
    return float(2 ** (needed[1] - needed[0]))


# --- the recordings of the full profile -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """Trials of one person and CLIP embeddings of the images; test trials are averaged over repeats of an image."""

    x: Trials
    e: Float[Tensor, "n dim"]
    x_test: Float[Tensor, "images channels samples"]
    e_test: Float[Tensor, "images dim"]


def recording(name: str, subject: int) -> Recording:
    """One subject of ``"alljoined"`` (consumer grade) or ``"things_eeg2"`` (research grade), whitened by its authors.

    Nothing is downloaded but CLIP: put the files into a folder of that name in ``SCIKIT_LEARN_DATA`` (default
    ``~/scikit_learn_data``). For Alljoined the folder ``preprocessed_eeg`` and the unpacked ``stimuli.zip`` of the
    dataset Alljoined/Alljoined-1.6M on Hugging Face; for THINGS-EEG2 the folders ``sub-01`` … of the preprocessed data
    and ``images_set`` from osf.io/3jk45. The packages open_clip_torch and, for Alljoined, pyarrow are needed. In the
    ``smoke`` profile simulated trials stand in.

    Raises
    ------
    ValueError
        If the name is unknown.
    DataUnavailable
        If a file, a package or CLIP cannot be had.
    """
    if name not in ("alljoined", "things_eeg2"):
        raise ValueError(f"name must be 'alljoined' or 'things_eeg2', got {name!r}")
    if runtime.profile() == "smoke":
        generator = torch.Generator().manual_seed(subject)
        world, e = make_eeg_world(generator), torch.randn(320, 24, generator=generator)
        x = simulate_trials(world, e, 1.0, generator)
        return Recording(x[:300], e[:300], x[300:], e[300:])
    folder = Path(get_data_home(), name)
    try:
        parts = [
            (_alljoined if name == "alljoined" else _things)(folder, f"sub-{subject:02d}", part) for part in (0, 1)
        ]
        e, (x_test, paths) = _clip(parts[0][1]), parts[1]
        images, index = np.unique(paths, return_inverse=True)
        means = x_test - condition_residuals(x_test, torch.from_numpy(index))  # of each trial's image
        first = np.unique(index, return_index=True)[1]
        return Recording(parts[0][0], e, means[first], _clip(images))
    except Exception as error:  # of files, packages and the network
        raise data.DataUnavailable(
            f"subject {subject} of {name!r} could not be read from {folder}: {error}. See the documentation of "
            "`recording` for the files it needs, or set BOOK_PROFILE=book, which needs none."
        ) from error


def _alljoined(folder: Path, subject: str, test: int) -> tuple[Trials, Sequence[str]]:
    """Trials, and the path of the image that each of them showed."""
    import pandas as pd

    eeg = folder / "preprocessed_eeg" / subject
    x = np.load(eeg / f"preprocessed_eeg_{('training', 'test')[test]}_flat.npy", allow_pickle=True)
    rows = pd.read_parquet(eeg / "experiment_metadata.parquet")
    rows = rows[~rows.dropped.astype(bool) & (rows.partition == ("stim_train", "stim_test")[test])]
    trials = torch.from_numpy(x["preprocessed_eeg_data"]).float()
    if len(rows) != len(trials):
        raise ValueError(f"{eeg} holds {len(trials)} trials and {len(rows)} rows of metadata")
    return trials, [str(folder / path) for path in rows.image_path]


def _things(folder: Path, subject: str, test: int) -> tuple[Trials, Sequence[str]]:
    """The same for THINGS-EEG2, whose trials are stored by image and repeat."""
    part = ("training", "test")[test]
    x = np.load(folder / subject / f"preprocessed_eeg_{part}.npy", allow_pickle=True)
    x = x if isinstance(x, dict) else x.item()
    trials = torch.from_numpy(x["preprocessed_eeg_data"]).float()  # (images, repeats, channels, samples)
    paths = sorted(map(str, (folder / "images_set" / f"{part}_images").rglob("*.jpg")))
    if len(paths) != len(trials):
        raise ValueError(f"{subject} has {len(trials)} {part} images and images_set {len(paths)}")
    return trials.flatten(0, 1), np.repeat(paths, trials.shape[1])


@torch.no_grad()
def _clip(paths: Sequence[str]) -> Float[Tensor, "n 1024"]:
    """Embeddings of images by CLIP ViT-H/14, each computed once."""
    import open_clip

    network, _, prepare = open_clip.create_model_and_transforms("ViT-H-14", pretrained="laion2b_s32b_b79k")
    network.to(runtime.device()).eval()
    unique, index = np.unique(paths, return_inverse=True)
    found = []
    for start in range(0, len(unique), 64):
        batch = torch.stack([prepare(Image.open(path)) for path in unique[start : start + 64]])
        found.append(network.encode_image(batch.to(runtime.device())).cpu())
    return torch.cat(found)[torch.from_numpy(index)]
