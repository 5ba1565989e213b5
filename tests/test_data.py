"""Data sets against scikit-learn, and downloads against a server that fails."""

import gzip
import hashlib
import http.server
import io
import json
import pickle
import shutil
import tarfile
import threading
from functools import partial
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import _openml, load_digits
from sklearn.decomposition import PCA

from companion import data


def test_digits_are_scikit_learns():
    x, labels = data.digits()
    pixels, digit = load_digits(return_X_y=True)
    np.testing.assert_array_equal(x * 16, pixels)
    np.testing.assert_array_equal(labels, digit)


def test_digits_of_some_classes_are_the_first_ones():
    x, labels = data.digits([7, 1], per_class=[3, 5])
    pixels, digit = load_digits(return_X_y=True)
    assert labels.bincount().tolist() == [3, 5]
    np.testing.assert_array_equal(x[labels == 0] * 16, pixels[digit == 7][:3])
    np.testing.assert_array_equal(x[labels == 1] * 16, pixels[digit == 1][:5])


def test_mixture_has_the_moments_it_was_asked_for(generator):
    means = torch.tensor([[0.0, 5.0, -1.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    x, labels = data.gaussian_mixture(means, 40_000, 0.5, generator)
    for label in (0, 1):
        torch.testing.assert_close(x[labels == label].mean(0), means[label], atol=0.01, rtol=0)
        torch.testing.assert_close(x[labels == label].T.cov(), 0.25 * torch.eye(3).double(), atol=0.01, rtol=0)


def test_whitened_data_have_unit_covariance_and_span_the_principal_components():
    x = data.digits()[0].double()
    white = data.whiten(x, 12)
    torch.testing.assert_close(white.T @ white / len(x), torch.eye(12).double(), atol=1e-10, rtol=0)
    reference = PCA(12, whiten=True).fit_transform(x)  # scikit-learn divides by n - 1
    correlation = np.abs((white.numpy() * reference).sum(0)) / np.sqrt(len(x) * (len(x) - 1))
    np.testing.assert_allclose(correlation, 1, atol=1e-6)


def test_bad_input_is_named(generator):
    with pytest.raises(ValueError, match=r"classes must be different digits from 0 to 9, got \[3, 3\]"):
        data.digits([3, 3])
    with pytest.raises(ValueError, match="between 1 and 178 for digit 0, got 200"):
        data.digits([0], per_class=200)
    with pytest.raises(ValueError, match="one entry per class, got 1 for 2"):
        data.digits([0, 1], per_class=[5])
    with pytest.raises(ValueError, match="means must be a finite"):
        data.gaussian_mixture(torch.full((2, 2), torch.nan), 5, 1.0, generator)
    with pytest.raises(ValueError, match=r"std=0\.0"):
        data.gaussian_mixture(torch.zeros(2, 2), 5, 0.0, generator)
    with pytest.raises(ValueError, match="x holds NaN"):
        data.whiten(torch.full((4, 2), torch.nan), 1)
    with pytest.raises(ValueError, match="between 1 and the rank of x, 1, got 2"):
        data.whiten(torch.arange(8.0).view(4, 2), 2)
    with pytest.raises(ValueError, match="name must be one of mnist, cifar10, cifar100, got 'imagenet'"):
        data.images("imagenet")


@pytest.mark.parametrize(
    ("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32)), ("cifar100", (3, 32, 32))]
)
def test_smoke_profile_downloads_nothing(monkeypatch, name, shape):
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    for download in ("fetch_openml", "download"):
        monkeypatch.setattr(data, download, lambda *_, **__: pytest.fail("a download was tried"))
    x, labels = data.images(name)
    assert x.shape[1:] == shape
    assert 0 <= x.min() < x.max() <= 1
    assert len(x) == len(labels)


class OpenMLStandIn(http.server.BaseHTTPRequestHandler):
    """A local OpenML with a data set of three 28x28 images; it breaks off in the middle of the file when told to."""

    breaks_off = False

    def do_GET(self):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 784))
        names = [f"pixel{i}" for i in range(784)]
        arff = "@RELATION stand_in\n" + "".join(f"@ATTRIBUTE {name} REAL\n" for name in names)
        arff += "@ATTRIBUTE class {0,1,7}\n@DATA\n"
        arff += "".join(",".join(map(str, row)) + f",{label}\n" for row, label in zip(pixels, "701", strict=True))
        checksum = hashlib.md5(arff.encode()).hexdigest()
        features = [
            {"index": str(i), "name": n, "data_type": "numeric", "is_target": "false"} for i, n in enumerate(names)
        ]
        features.append({"index": "784", "name": "class", "data_type": "nominal", "is_target": "true"})
        for feature in features:
            feature.update(is_ignore="false", is_row_identifier="false", number_of_missing_values="0")
        description = {
            **{"id": "554", "name": "mnist_784", "version": "1", "format": "ARFF", "status": "active", "file_id": "9"},
            **{"default_target_attribute": "class", "md5_checksum": checksum, "processing_date": ""},
            "url": "https://www.openml.org/data/v1/download/9/stand_in.arff",
        }
        if "features" in self.path:
            body = json.dumps({"data_features": {"feature": features}}).encode()
        elif "qualities" in self.path:
            body = json.dumps({"data_qualities": {"quality": [{"name": "NumberOfInstances", "value": "3"}]}}).encode()
        elif "json/data/" in self.path:
            body = json.dumps({"data_set_description": description}).encode()
        else:
            body = gzip.compress(arff.encode())
        compressed = body[:2] == b"\x1f\x8b"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if compressed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if compressed and self.breaks_off else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def openml(monkeypatch, tmp_path):
    monkeypatch.setenv("BOOK_PROFILE", "full")
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OpenMLStandIn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(
            _openml, "urlopen", lambda request: urlopen(address + urlsplit(request.full_url).path, timeout=10)
        )
        monkeypatch.setattr(OpenMLStandIn, "breaks_off", False)
        yield tmp_path
        server.shutdown()


def test_full_profile_downloads_and_scales(openml):
    x, labels = data.images("mnist")
    assert x.shape == (3, 1, 28, 28)
    np.testing.assert_allclose(x.view(3, -1) * 255, np.random.default_rng(0).integers(0, 256, (3, 784)), atol=1e-4)
    assert labels.tolist() == [7, 0, 1]


def test_a_download_that_breaks_off_leaves_nothing_and_says_the_way_out(openml, monkeypatch):
    monkeypatch.setattr(OpenMLStandIn, "breaks_off", True)
    with (
        pytest.warns(RuntimeWarning, match="Invalid cache"),
        pytest.raises(data.DataUnavailable, match=r"'mnist' \(OpenML 554\) could not be.*BOOK_PROFILE=book"),
    ):
        data.images("mnist")
    assert not list(openml.iterdir())
    monkeypatch.setattr(OpenMLStandIn, "breaks_off", False)
    assert len(data.images("mnist")[0]) == 3
    assert [path.name for path in openml.iterdir()] == ["linear_lens_mnist.npz"]


def test_a_data_set_is_downloaded_once(openml, monkeypatch):
    first = data.images("mnist")
    monkeypatch.setattr(data, "fetch_openml", lambda **_: pytest.fail("it was downloaded again"))
    assert all(torch.equal(again, before) for again, before in zip(data.images("mnist"), first, strict=True))


@pytest.fixture
def cifar100(monkeypatch, tmp_path):
    """A local archive like CIFAR-100's, with two images for training and one for testing; and where it is kept."""
    monkeypatch.setenv("BOOK_PROFILE", "full")
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "kept"))
    served = tmp_path / "served"
    served.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072)).astype(np.uint8)
    parts = {
        "train": {"data": pixels[:2], "fine_labels": [99, 3], "coarse_labels": [0, 0]},
        "test": {"data": pixels[2:], "fine_labels": [7], "coarse_labels": [0]},
    }
    with tarfile.open(served / "cifar.tar.gz", "w:gz") as archive:
        for name, content in parts.items():
            body = pickle.dumps(content)
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    digest = hashlib.md5((served / "cifar.tar.gz").read_bytes()).hexdigest()
    handler = partial(QuietFiles, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/cifar.tar.gz"
        monkeypatch.setattr(data, "_CIFAR100", (address, f"md5:{digest}"))
        yield pixels, tmp_path / "kept", address
        server.shutdown()


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_cifar100_comes_from_its_archive(cifar100, capfd):
    x, labels = data.images("cifar100")
    np.testing.assert_allclose(x.view(3, -1) * 255, cifar100[0], atol=1e-4)
    assert x.shape == (3, 3, 32, 32)
    assert labels.tolist() == [99, 3, 7]
    assert capfd.readouterr().err == ""


def test_another_file_than_the_expected_one_is_refused_and_not_kept(cifar100, monkeypatch):
    _, kept, address = cifar100
    monkeypatch.setattr(data, "_CIFAR100", (address, "md5:" + "0" * 32))
    with pytest.raises(data.DataUnavailable, match=r"'cifar100' could not be downloaded.*BOOK_PROFILE=book"):
        data.images("cifar100")
    monkeypatch.setattr(data, "_CIFAR100", (address + ".gone", None))
    with pytest.raises(data.DataUnavailable, match=r"'cifar100' could not be downloaded.*404"):
        data.images("cifar100")
    assert not list(kept.iterdir())


def test_flip_and_crop_moves_every_image_by_itself(generator):
    image = torch.arange(1.0, 65).view(1, 1, 1, 8, 8).expand(2, 150, 3, 8, 8)
    moved = data.flip_and_crop(image, generator)
    assert moved.shape == image.shape
    padded, windows = torch.nn.functional.pad(image[0, 0, 0], (4, 4, 4, 4)), {}
    for i in range(9):
        for j in range(9):
            window = padded[i : i + 8, j : j + 8]
            windows[tuple(window.flatten().tolist())] = (i, j, False)
            windows[tuple(window.flip(1).flatten().tolist())] = (i, j, True)
    seen = set()
    for channels in moved.flatten(0, 1):
        assert (channels == channels[0]).all()
        seen.add(windows[tuple(channels[0].flatten().tolist())])
    assert {flip for *_, flip in seen} == {True, False}
    assert {i for i, *_ in seen} == {j for _, j, _ in seen} == set(range(9))
    with pytest.raises(ValueError, match=r"x must be a batch of images .* got shape \(8, 8\)"):
        data.flip_and_crop(image[0, 0, 0], generator)


def test_shapes_are_grey_images_with_edges(generator):
    images = data.shapes(20, (24, 32), generator)
    assert images.shape == (20, 1, 24, 32)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images, data.shapes(20, (24, 32), torch.Generator().manual_seed(0)))
    jumps = images.diff(dim=-1).abs()
    assert jumps.median() < 0.02 < 0.3 < jumps.max()  # smooth but for the edges
    with pytest.raises(ValueError, match=r"n and size must be positive, got n=1 and size=\(8, 0\)"):
        data.shapes(1, (8, 0), generator)


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_photographs_are_unpacked_once_and_whole(monkeypatch, tmp_path, kind):
    monkeypatch.setenv("BOOK_PROFILE", "full")
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "kept"))
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    folder = tmp_path / "served" / "pictures"
    folder.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "one.png")
    shutil.make_archive(tmp_path / "served" / "a", "zip" if kind == "zip" else "gztar", folder.parent, "pictures")
    (archive,) = (tmp_path / "served").glob("a.*")
    archive.rename(archive.with_name(f"a.{kind}"))
    handler = partial(QuietFiles, directory=str(folder.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(data, "_PHOTOGRAPHS", {"bsd100": (address + "gone", "pictures/*.png")})
        with pytest.raises(data.DataUnavailable, match=r"'bsd100' could not be.*BOOK_PROFILE=book"):
            list(data.photographs("bsd100"))
        assert not list((tmp_path / "kept").iterdir())
        monkeypatch.setattr(data, "_PHOTOGRAPHS", {"bsd100": (f"{address}a.{kind}", "pictures/*.png")})
        (picture,) = data.photographs("bsd100")
        np.testing.assert_array_equal(picture, pixels.transpose(2, 0, 1))
        server.shutdown()
    assert len(list(data.photographs("bsd100"))) == 1  # from the folder that is kept
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["linear_lens_bsd100"]


def test_photographs_of_the_smoke_profile_are_drawn(monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    pictures = list(data.photographs("bsd100"))
    assert {(picture.dtype, *picture.shape) for picture in pictures} == {(torch.uint8, 3, 70, 86)}
    with pytest.raises(ValueError, match="name must be one of div2k_train, div2k_valid, bsd100, got 'cats'"):
        data.photographs("cats")
