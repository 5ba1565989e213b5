"""Data sets. Those of the ``book`` profile ship with scikit-learn or are drawn; those of ``full`` are downloaded."""

from __future__ import annotations

import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pooch
import torch
from jaxtyping import Float, Int
from sklearn.datasets import fetch_openml, get_data_home, load_digits
from torch import Tensor

from companion import runtime

_OPENML = {  # name: (identifier on OpenML, shape of one image)
    "mnist": (554, (1, 28, 28)),
    "cifar10": (40927, (3, 32, 32)),
}
_CIFAR100 = (
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "md5:eb9058c3a382ffc7106e4002c42a8d85",
)
pooch.get_logger().setLevel("WARNING")  # what is downloaded is no news on a page


class DataUnavailable(RuntimeError):
    """A data set could not be downloaded."""


def digits(
    classes: Sequence[int] = range(10), per_class: Sequence[int] | int | None = None
) -> tuple[Float[Tensor, "n 64"], Int[Tensor, " n"]]:
    """Scikit-learn's 8x8 handwritten digits, as grey values in [0, 1], in the order of the data set.

    Parameters
    ----------
    classes
        The digits to keep; label i is the i-th of them.
    per_class
        How many samples of each class to keep, the first ones: one number, or one per class. None keeps all.

    Raises
    ------
    ValueError
        If a class is no digit or occurs twice, or has fewer samples than asked for.
    """
    classes = list(classes)
    if len(set(classes)) != len(classes) or not set(classes) <= set(range(10)):
        raise ValueError(f"classes must be different digits from 0 to 9, got {classes}")
    pixels, digit = load_digits(return_X_y=True)
    counts = [per_class] * len(classes) if isinstance(per_class, int | None) else list(per_class)
    if len(counts) != len(classes):
        raise ValueError(f"per_class must have one entry per class, got {len(counts)} for {len(classes)} classes")
    rows, labels = [], []
    for label, (value, count) in enumerate(zip(classes, counts, strict=True)):
        found = np.flatnonzero(digit == value)
        if count is not None and not 1 <= count <= len(found):
            raise ValueError(f"per_class must be between 1 and {len(found)} for digit {value}, got {count}")
        rows.append(found[:count])
        labels.append(np.full(len(rows[-1]), label))
    order = np.argsort(np.concatenate(rows))
    x = torch.from_numpy(pixels[np.concatenate(rows)[order]] / 16).float()
    return x, torch.from_numpy(np.concatenate(labels)[order])


def gaussian_mixture(
    means: Float[Tensor, "classes d"], per_class: int, std: float, generator: torch.Generator
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """Samples of isotropic Gaussians with the given means, class after class, and their labels.

    Raises
    ------
    ValueError
        If ``means`` is not a finite matrix, or ``per_class`` or ``std`` is not positive.
    """
    if means.ndim != 2 or not means.isfinite().all():
        raise ValueError(f"means must be a finite (classes, d) matrix, got shape {tuple(means.shape)}")
    if per_class < 1 or not std > 0:
        raise ValueError(f"per_class and std must be positive, got {per_class=} and {std=}")
    labels = torch.arange(len(means)).repeat_interleave(per_class)
    noise = torch.randn(len(labels), means.shape[1], generator=generator, dtype=means.dtype)
    return means[labels] + std * noise, labels


def whiten(x: Float[Tensor, "n d"], n_components: int) -> Float[Tensor, "n {n_components}"]:
    """Centre ``x`` and project it to its leading principal components, each scaled to mean square 1.

    Raises
    ------
    ValueError
        If ``x`` holds NaN or infinity, or its centred rank is smaller than ``n_components``.
    """
    if not x.isfinite().all():
        raise ValueError("x holds NaN or infinite values; remove them first")
    centred = x - x.mean(0)
    left, strength, _ = torch.linalg.svd(centred, full_matrices=False)
    rank = int((strength > strength[0] * max(x.shape) * torch.finfo(x.dtype).eps).sum())
    if not 1 <= n_components <= rank:
        raise ValueError(f"n_components must be between 1 and the rank of x, {rank}, got {n_components}")
    return left[:, :n_components] * len(x) ** 0.5


def images(name: str) -> tuple[Float[Tensor, "n channels height width"], Int[Tensor, " n"]]:
    """A data set of the ``full`` profile: ``"mnist"`` or ``"cifar10"`` from OpenML, ``"cifar100"`` from its authors.

    Pixels are scaled to [0, 1]; images are in the order of the source, those for training first. In the ``smoke``
    profile nothing is downloaded: scikit-learn's digits, enlarged to the shape of the data set, stand in for it.
    Downloads are kept in ``SCIKIT_LEARN_DATA`` (default ``~/scikit_learn_data``); a download that breaks off leaves
    nothing behind.

    Raises
    ------
    ValueError
        If the name is unknown.
    DataUnavailable
        If the data set cannot be had.
    """
    if name not in (names := (*_OPENML, "cifar100")):
        raise ValueError(f"name must be one of {', '.join(names)}, got {name!r}")
    data_id, shape = _OPENML.get(name, (None, (3, 32, 32)))
    if runtime.profile() == "smoke":
        small, labels = digits()
        enlarged = torch.nn.functional.interpolate(small.view(-1, 1, 8, 8), shape[1:], mode="bilinear")
        return enlarged.repeat(1, shape[0], 1, 1), labels
    if name == "cifar100":
        return _cifar100()
    folder = Path(get_data_home())
    kept = folder / f"linear_lens_{name}.npz"
    if not kept.exists():
        # Downloaded and parsed in a folder of its own, then moved as a whole: nothing half-written can stay.
        with TemporaryDirectory(dir=folder) as fresh:
            pixels, labels = _download(name, data_id, fresh)
            np.savez(Path(fresh, kept.name), pixels=pixels.astype(np.uint8), labels=labels.astype(np.int64))
            os.replace(Path(fresh, kept.name), kept)
    with np.load(kept) as arrays:
        x = torch.from_numpy(arrays["pixels"].reshape(-1, *shape)).float() / 255
        return x, torch.from_numpy(arrays["labels"])


def _download(name: str, data_id: int, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of an OpenML data set."""
    try:
        return fetch_openml(
            data_id=data_id, data_home=folder, as_frame=False, parser="pandas", return_X_y=True, n_retries=1
        )
    except Exception as error:  # scikit-learn passes on what the network, the server and the file raise
        raise _unavailable(f"{name!r} (OpenML {data_id})", error) from error


def _unavailable(what: str, error: Exception) -> DataUnavailable:
    return DataUnavailable(
        f"the data set {what} could not be downloaded: {error}. Connect to the internet, or set BOOK_PROFILE=book, "
        "which needs no download."
    )


def download(name: str, url: str, known_hash: str | None) -> Path:
    """One file of a data set, downloaded once and kept beside the others in ``SCIKIT_LEARN_DATA``.

    Parameters
    ----------
    name
        Name of the data set, for the error.
    url
        Address of the file.
    known_hash
        ``"md5:…"`` or a SHA-256 of the file; None accepts any content.

    Raises
    ------
    DataUnavailable
        If the file cannot be had or is not the expected one; nothing half-downloaded stays.
    """
    try:
        return Path(pooch.retrieve(url, known_hash, path=get_data_home()))
    except Exception as error:  # of the network, the server or the hash
        raise _unavailable(repr(name), error) from error


def _cifar100() -> tuple[Float[Tensor, "60000 3 32 32"], Int[Tensor, " 60000"]]:
    """Images and fine labels from the archive of the authors; the hash makes its pickles safe to read."""
    pixels, labels = [], []
    with tarfile.open(download("cifar100", *_CIFAR100)) as archive:
        for part in ("train", "test"):
            content = pickle.load(archive.extractfile(f"cifar-100-python/{part}"), encoding="latin1")
            pixels.append(content["data"])
            labels += content["fine_labels"]
    return torch.from_numpy(np.concatenate(pixels)).view(-1, 3, 32, 32).float() / 255, torch.tensor(labels)
