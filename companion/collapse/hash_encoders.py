"""Neural networks as hash encoders: activation patterns as binary codes, their collisions and what they reveal.

He, Lei, Ji and Tao, "Neural networks behave as hash encoders: An empirical study", 2021 (arXiv 2101.05490).

A ReLU network is affine on each region where its units keep their state. The states, on or off, of all hidden units
are the **neural code** of an input. The paper's two findings: inputs rarely share a code (determinism), and the code
alone tells the class (categorization). The settings of training and evaluation follow the authors' code,
https://github.com/LeavesLei/activation-code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from itertools import count

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.cluster import contingency_matrix
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from companion import models, training

Codes = UInt8[np.ndarray, "n m"]
KMEANS_SAMPLES = 10_000  # K-Means sees at most so many training codes; matters for the full profile only


def _checked(name: str, codes: ArrayLike) -> np.ndarray:
    """The codes as a matrix of bytes, or an error that names them."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.size == 0:
        raise ValueError(f"{name} must be a non-empty (samples, bits) matrix, got shape {codes.shape}")
    if not ((codes == 0) | (codes == 1)).all():
        raise ValueError(f"{name} must hold only 0 and 1, got values from {codes.min()} to {codes.max()}")
    return codes.astype(np.uint8)


def _distinct(codes: Codes) -> int:
    """Number of different rows; eight bits to a byte make the sort cheap."""
    return len(np.unique(np.packbits(codes, axis=1), axis=0))


# --- codes ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def neural_code(net: nn.Module, x: Float[Tensor, "n *features"]) -> Codes:
    """Which hidden units are on: 1 where the input of a ``nn.ReLU`` of ``net`` is positive, else 0.

    Parameters
    ----------
    net
        A network whose nonlinearities are ``nn.ReLU`` modules (of any depth; maps of convolutions are flattened). It
        is evaluated in eval mode, so that batch normalisation uses its running statistics; its modes are restored.
    x
        Inputs, on the device of ``net``.

    Returns
    -------
    ndarray
        One row per input; units in the order in which the network computes them. The output layer is not coded.

    Raises
    ------
    ValueError
        If ``net`` has no ``nn.ReLU``, or ``x`` is empty or not finite.

    Notes
    -----
    Source: the paper's neural code. The sign is taken before the ReLU: after it, "≥ 0" would always be true.
    """
    relus = [module for module in net.modules() if isinstance(module, nn.ReLU)]
    if not relus:
        raise ValueError("net must have at least one nn.ReLU module, got none; functional ReLUs cannot be seen")
    if len(x) == 0 or not x.isfinite().all():
        raise ValueError(f"x must hold at least one sample and only finite values, got shape {tuple(x.shape)}")
    bits: list[Tensor] = []
    modes = [(module, module.training) for module in net.modules()]
    hooks = [relu.register_forward_pre_hook(lambda _, z: bits.append((z[0] > 0).flatten(1))) for relu in relus]
    try:
        net.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return torch.cat(bits, 1).to(torch.uint8).cpu().numpy()


def redundancy_ratio(codes: Codes) -> float:
    """Part of the sample whose code is already taken: ``(n - number of distinct codes) / n``, in [0, 1 - 1/n].

    Zero means that no two samples share a linear region.

    Raises
    ------
    ValueError
        If ``codes`` is empty, no matrix, or not binary.

    Notes
    -----
    Source: the paper's redundancy ratio.
    """
    codes = _checked("codes", codes)
    return (len(codes) - _distinct(codes)) / len(codes)


def max_linear_regions(width: int, dim: int) -> int:
    """Most regions into which ``width`` hyperplanes cut a space of ``dim`` dimensions, an exact integer.

    No sample, however large, shows more codes of a network with one hidden layer.

    Raises
    ------
    ValueError
        If ``width`` or ``dim`` is negative.

    Notes
    -----
    Source: Zaslavsky's theorem, ``sum_i C(width, i)`` for ``i`` from 0 to ``min(dim, width)``.
    """
    if width < 0 or dim < 0:
        raise ValueError(f"width and dim must not be negative, got {width=} and {dim=}")
    return sum(math.comb(width, i) for i in range(min(width, dim) + 1))


def drop_constant_bits(train_codes: Codes, test_codes: Codes) -> tuple[Codes, Codes]:
    """Delete the bits that have one value on all of both samples, which say nothing; distances do not change.

    Raises
    ------
    ValueError
        If a sample is empty or not binary, or the two differ in their number of bits.
    """
    train_codes, test_codes = _checked("train_codes", train_codes), _checked("test_codes", test_codes)
    if train_codes.shape[1] != test_codes.shape[1]:
        raise ValueError(
            f"train_codes and test_codes must have equally many bits, got {train_codes.shape[1]} and "
            f"{test_codes.shape[1]}"
        )
    both = np.concatenate([train_codes, test_codes])
    varies = both.min(0) < both.max(0)
    return train_codes[:, varies], test_codes[:, varies]


# --- what the codes tell about the class ------------------------------------------------------------------------------


def clustering_accuracy(
    clusters: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], matching: str = "majority"
) -> float:
    """Part of the samples whose cluster stands for their label.

    Parameters
    ----------
    clusters, labels
        Cluster and label of each sample, as integers.
    matching
        ``"majority"``: each cluster stands for its most frequent label, and several may stand for one (the paper's
        measure). ``"hungarian"``: at most one cluster per label, in the best way; never larger.

    Raises
    ------
    ValueError
        If the two are empty or differ in length, or ``matching`` is unknown.
    """
    clusters, labels = np.asarray(clusters), np.asarray(labels)
    if clusters.shape != labels.shape or clusters.ndim != 1 or not len(labels):
        raise ValueError(
            f"clusters and labels must be vectors of one length, not 0, got shapes {clusters.shape} and {labels.shape}"
        )
    if matching not in ("majority", "hungarian"):
        raise ValueError(f"matching must be 'majority' or 'hungarian', got {matching!r}")
    counts = contingency_matrix(labels, clusters)  # label by cluster
    if matching == "majority":
        return counts.max(0).sum() / len(labels)
    return counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels)


def categorization(
    train_codes: Codes,
    train_labels: Int[np.ndarray, " n"],
    test_codes: Codes,
    test_labels: Int[np.ndarray, " n_test"],
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy of three simple methods that see nothing but the codes.

    Parameters
    ----------
    train_codes, train_labels
        What the methods are fitted to. Constant bits are deleted first.
    test_codes, test_labels
        What they are scored on.
    seed
        Of the starts of K-Means.

    Returns
    -------
    dict
        ``"kmeans_train"`` and ``"kmeans_test"``: K-Means with one cluster per class, fitted without labels to the
        training codes, each cluster standing for its majority label in the sample that is scored. ``"knn"``: the
        nine nearest neighbours in Hamming distance, on the test codes. ``"logistic"``: multinomial logistic
        regression, on the test codes.

    Raises
    ------
    ValueError
        If codes and labels differ in length, codes are not binary, or all bits are constant.
    """
    train_codes, test_codes = drop_constant_bits(train_codes, test_codes)
    for name, codes, labels in (("train", train_codes, train_labels), ("test", test_codes, test_labels)):
        if len(codes) != len(labels):
            raise ValueError(f"{name}_labels must have one entry per code, got {len(labels)} for {len(codes)} codes")
    if not train_codes.shape[1]:
        raise ValueError("train_codes and test_codes must differ in at least one bit, got constant codes")
    sample, sample_labels = train_codes[:KMEANS_SAMPLES], train_labels[:KMEANS_SAMPLES]
    clusters = min(len(np.unique(train_labels)), _distinct(sample))
    kmeans = KMeans(clusters, n_init=4, random_state=seed).fit(sample)
    knn = KNeighborsClassifier(9, metric="hamming", algorithm="brute").fit(train_codes, train_labels)
    logistic = LogisticRegression(max_iter=1000).fit(train_codes, train_labels)
    return {
        "kmeans_train": clustering_accuracy(kmeans.labels_, sample_labels),
        "kmeans_test": clustering_accuracy(kmeans.predict(test_codes), test_labels),
        "knn": knn.score(test_codes, test_labels),
        "logistic": logistic.score(test_codes, test_labels),
    }


def expressivity_regime(rr_train: float, mean_accuracy: float) -> str:
    """The region of the activation hash phase chart: ``"under-"``, ``"critically-"`` or ``"sufficiently-expressive"``.

    Parameters
    ----------
    rr_train
        Redundancy ratio of the training sample.
    mean_accuracy
        Mean of K-Means (training sample), K-NN and logistic regression (test sample).

    Raises
    ------
    ValueError
        If one of the two does not lie in [0, 1].

    Notes
    -----
    The paper names the regimes; the thresholds are this book's.
    """
    if not (0 <= rr_train <= 1 and 0 <= mean_accuracy <= 1):
        raise ValueError(f"rr_train and mean_accuracy must lie in [0, 1], got {rr_train=} and {mean_accuracy=}")
    if rr_train >= 0.5 or mean_accuracy < 0.65:
        return "under-expressive"
    if rr_train <= 0.02 and mean_accuracy >= 0.85:
        return "sufficiently-expressive"
    return "critically-expressive"


# --- the network and its training -------------------------------------------------------------------------------------


def hash_network(n_in: int, width: int, n_out: int, generator: torch.Generator) -> nn.Sequential:
    """The block of the authors' code: linear, batch normalisation, ReLU, linear. Its code has ``width`` bits.

    Raises
    ------
    ValueError
        If one of the sizes is not positive.
    """
    linear, relu, head = models.mlp([n_in, width, n_out], generator=generator)
    return nn.Sequential(linear, nn.BatchNorm1d(width), relu, head)


@torch.no_grad()
def centred(net: nn.Sequential, x: Float[Tensor, "n d"]) -> nn.Sequential:
    """A copy of ``net`` whose batch normalisation knows the mean and variance of ``x``; no weight is touched.

    Every hyperplane of a network with one hidden layer then passes through the mean of ``x``.

    Raises
    ------
    ValueError
        If ``x`` has fewer than two samples, or one that is not finite.
    """
    if len(x) < 2 or not x.isfinite().all():
        raise ValueError(f"x must hold at least two samples and only finite values, got shape {tuple(x.shape)}")
    copy = deepcopy(net).train()
    for module in copy.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
            module.momentum = None  # the plain average over batches, of which there is one
    copy(x)
    return copy.eval()


def train(
    nets: Sequence[nn.Module],
    x: Float[Tensor, "members n d"],
    y: Int[Tensor, "members n"],
    *,
    epochs: Sequence[int],
    generator: torch.Generator,
    weight_decay: float = 1e-6,
    batch_size: int = 64,
) -> dict[int, list[nn.Module]]:
    """Train networks of one architecture side by side, each on its own sample, and return copies on the way.

    Adam on the cross entropy; learning rate 0.01, divided by ten every 20 epochs. An incomplete last batch is left
    out: batch normalisation could do nothing with a batch of one.

    Parameters
    ----------
    nets
        The members, before training; not modified.
    x, y
        Sample and labels of each member, in an order of its own: batches take the same rows of all.
    epochs
        When to keep copies, in increasing order; 0 is before training, the last ends it.
    generator
        Order of the samples.
    weight_decay
        Added to the gradient as a multiple of the weights.
    batch_size
        Samples per step; at most the whole sample.

    Returns
    -------
    dict
        For every entry of ``epochs`` the members at that time, in eval mode.

    Raises
    ------
    ValueError
        If ``nets``, ``x`` and ``y`` do not fit, a member has fewer than two samples or one that is not finite,
        ``epochs`` is empty, negative or not increasing, ``weight_decay`` is negative, or ``batch_size`` is below 2.

    Notes
    -----
    Source: settings of the authors' code, but for its early stopping.
    """
    if not nets or len(nets) != len(x) or x.shape[:2] != y.shape:
        raise ValueError(f"x and y must hold one sample per net, got {len(nets)} nets, {x.shape=} and {y.shape=}")
    if not epochs or epochs[0] < 0 or sorted(set(epochs)) != list(epochs):
        raise ValueError(f"epochs must be increasing and not negative, got {epochs}")
    if x.shape[1] < 2 or not x.isfinite().all():
        raise ValueError(f"x must hold at least two samples per net and only finite values, got {x.shape=}")
    if not weight_decay >= 0 or batch_size < 2:
        raise ValueError(
            f"weight_decay must not be negative and batch_size at least 2, got {weight_decay=}, {batch_size=}"
        )
    n_samples = x.shape[1]
    batch_size = min(batch_size, n_samples)
    per_epoch = n_samples // batch_size
    ensemble = training.Ensemble(deepcopy(list(nets)))
    batches, finished = training.minibatches(n_samples, batch_size, generator), count()
    kept: dict[int, list[nn.Module]] = {}

    def snapshot(epoch: int) -> None:
        if epoch in epochs:
            kept[epoch] = [net.eval() for net in ensemble.members()]

    def loss(_: int) -> Float[Tensor, ""]:
        rows = next(batches).to(x.device)
        logits = ensemble.each(x[:, rows])
        total = nn.functional.cross_entropy(logits.flatten(0, 1), y[:, rows].flatten(), reduction="sum")
        return total / batch_size  # the sum over members of their mean losses

    def record() -> dict[str, Tensor]:
        if epoch := next(finished):  # the first record is made when the statistics have already seen a batch
            snapshot(epoch)
        return {}

    snapshot(0)
    if epochs[-1]:
        ensemble.train()
        training.fit(
            loss,
            ensemble.parameters.values(),
            steps=epochs[-1] * per_epoch,
            lr=0.01,
            optimizer=partial(torch.optim.Adam, weight_decay=weight_decay, fused=True),
            schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=20 * per_epoch, gamma=0.1),
            record=record,
            record_every=per_epoch,
        )
    return kept
