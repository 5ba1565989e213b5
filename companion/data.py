"""Data sets. Those of the ``book`` profile ship with scikit-learn or are drawn; those of ``full`` are downloaded."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pooch
import torch
from jaxtyping import Float, Int, Num, Shaped, UInt8
from PIL import Image
from sklearn.datasets import fetch_openml, get_data_home, load_digits
from torch import Tensor
from torch.nn import functional

from companion import runtime

_OPENML = {  # name: (identifier on OpenML, shape of one image)
    "mnist": (554, (1, 28, 28)),
    "cifar10": (40927, (3, 32, 32)),
}
_CIFAR100 = (
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "md5:eb9058c3a382ffc7106e4002c42a8d85",
)
_PHOTOGRAPHS = {  # name: (address of the archive, where its images are)
    "div2k_train": ("https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_train_HR.zip", "DIV2K_train_HR/*.png"),
    "div2k_valid": ("https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip", "DIV2K_valid_HR/*.png"),
    "bsd100": (
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/BSDS300-images.tgz",
        "BSDS300/images/test/*.jpg",
    ),
}
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
        enlarged = functional.interpolate(small.view(-1, 1, 8, 8), shape[1:], mode="bilinear")
        return enlarged.repeat(1, shape[0], 1, 1), labels
    if name == "cifar100":
        return _cifar100()
    pixels, labels = table(name, data_id, np.uint8)
    return torch.from_numpy(pixels.reshape(-1, *shape)).float() / 255, torch.from_numpy(labels.astype(np.int64))


def table(name: str, data_id: int, dtype: type = np.float32) -> tuple[Num[np.ndarray, "n d"], Shaped[np.ndarray, " n"]]:
    """Numeric features and labels (as text) of a data set of OpenML, downloaded once and kept as a whole.

    Parameters
    ----------
    name
        Name of the data set, for the kept file and the error.
    data_id
        Its number on OpenML.
    dtype
        Of the features.

    Raises
    ------
    DataUnavailable
        If the data set cannot be had; a download that breaks off leaves nothing behind.
    """
    folder = Path(get_data_home())
    kept = folder / f"linear_lens_{name}.npz"
    if not kept.exists():
        # Downloaded and parsed in a folder of its own, then moved as a whole: nothing half-written can stay.
        with TemporaryDirectory(dir=folder) as fresh:
            try:
                x, y = fetch_openml(
                    data_id=data_id, data_home=fresh, as_frame=False, parser="pandas", return_X_y=True, n_retries=1
                )
            except Exception as error:  # scikit-learn passes on what the network, the server and the file raise
                raise _unavailable(f"{name!r} (OpenML {data_id})", error) from error
            np.savez(Path(fresh, kept.name), x=x.astype(dtype), y=y.astype(str))
            os.replace(Path(fresh, kept.name), kept)
    with np.load(kept) as arrays:
        return arrays["x"], arrays["y"]


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


def flip_and_crop(
    x: Float[Tensor, "*batch channels height width"], generator: torch.Generator
) -> Float[Tensor, "*batch channels height width"]:
    """Augment images: each is mirrored with probability 1/2 and shifted by up to 4 pixels, with zeros at the margin.

    Raises
    ------
    ValueError
        If ``x`` has fewer than four axes.
    """
    if x.ndim < 4:
        raise ValueError(f"x must be a batch of images (..., channels, height, width), got shape {tuple(x.shape)}")
    flat = x.flatten(0, -4)
    n, channels, height, width = flat.shape
    rows, columns = (torch.randint(9, (n, 1), generator=generator) + torch.arange(s) for s in (height, width))
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None]
    padded = functional.pad(flat, (4, 4, 4, 4))
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None]].view_as(x)


def shapes(n: int, size: tuple[int, int], generator: torch.Generator) -> Float[Tensor, "n 1 height width"]:
    """Grey images of six ellipses and rectangles on a slanted background, with antialiased edges.

    Everything is drawn on a grid four times as fine, so that the edges lie at sub-pixel places; the shorter side of
    the image spans [-1, 1].

    Raises
    ------
    ValueError
        If ``n`` or a side of ``size`` is not positive.
    """
    if n < 1 or min(size) < 1:
        raise ValueError(f"n and size must be positive, got {n=} and {size=}")
    y, x = torch.meshgrid(*(torch.linspace(-side, side, 4 * side) / min(size) for side in size), indexing="ij")

    def uniform(low: float, high: float) -> Float[Tensor, "n 1 1"]:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    image = uniform(0, 1) + uniform(-0.15, 0.15) * x + uniform(-0.15, 0.15) * y
    for _ in range(6):
        ellipse, angle = uniform(0, 1) < 0.5, uniform(0, math.pi)
        right, down = x - uniform(-1, 1) * size[1] / min(size), y - uniform(-1, 1) * size[0] / min(size)
        u = (angle.cos() * right + angle.sin() * down) / uniform(0.1, 0.7)
        v = (angle.cos() * down - angle.sin() * right) / uniform(0.1, 0.7)
        inside = torch.where(ellipse, u.square() + v.square() < 1, torch.maximum(u.abs(), v.abs()) < 1)
        image = torch.where(inside, uniform(0, 1) + uniform(-0.075, 0.075) * u, image)
    return functional.avg_pool2d(image.clamp(0, 1)[:, None], 4)


def photographs(name: str) -> Iterator[UInt8[Tensor, "3 height width"]]:
    """Photographs of the ``full`` profile, one by one, each of its own size.

    ``"div2k_train"`` (800, 3.5 GB) and ``"div2k_valid"`` (100, 0.4 GB) from the makers of DIV2K, ``"bsd100"`` (100)
    from those of BSDS300. They are downloaded once and kept in ``SCIKIT_LEARN_DATA``. In the ``smoke`` profile nothing
    is downloaded: eight images of drawn shapes stand in for them.

    Raises
    ------
    ValueError
        If the name is unknown.
    DataUnavailable
        If the archive cannot be had.
    """
    if name not in _PHOTOGRAPHS:
        raise ValueError(f"name must be one of {', '.join(_PHOTOGRAPHS)}, got {name!r}")
    return _drawn() if runtime.profile() == "smoke" else _photographs(name)


def _drawn() -> Iterator[UInt8[Tensor, "3 70 86"]]:
    drawn = shapes(8, (70, 86), torch.Generator().manual_seed(0))
    yield from (255 * drawn).byte().expand(-1, 3, -1, -1)


def _photographs(name: str) -> Iterator[UInt8[Tensor, "3 height width"]]:
    url, pattern = _PHOTOGRAPHS[name]
    kept = Path(get_data_home(), f"linear_lens_{name}")
    if not kept.exists():
        archive = download(name, url, None)
        with TemporaryDirectory(dir=kept.parent) as fresh:  # moved as a whole: nothing half-unpacked can stay
            unpacked = Path(fresh, "images")
            shutil.unpack_archive(archive, unpacked, **({} if archive.suffix == ".zip" else {"filter": "data"}))
            os.replace(unpacked, kept)
        archive.unlink()
    for path in sorted(kept.glob(pattern)):
        with Image.open(path) as picture:
            yield torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0)
