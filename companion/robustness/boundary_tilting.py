"""Boundary tilting: the strength of the adversarial examples of a linear classifier is an angle.

Tanay and Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", 2016 (arXiv 1608.07690),
in the notation of the same authors' "A New Angle on L2 Regularization", 2018 (arXiv 1806.11186).

A linear classifier decides by the sign of ``w·x + b``. Its mirror images are what a point must become to be given the
other class with the same confidence. How far away they lie depends, for given data, only on the deviation angle
between ``w`` and the line that joins the two class means, the normal of the nearest centroid classifier. Angles are in
degrees, distances in the units of the data. Labels are any two numbers; the larger one is class +1.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array
from scipy.special import ndtr
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.svm import SVC

# LinearSVC would be faster, but it penalises the bias too, and this changes the angle.
linear_svm = partial(SVC, kernel="linear", tol=1e-4, max_iter=200_000)
Split = tuple[Float[Array, "n d"], Int[Array, " n"], Float[Array, "m d"], Int[Array, " m"]]


def _check_normal(w: Array, X: Array, b: float = 0.0) -> None:
    """Raise unless ``w`` and ``b`` are a classifier of the rows of ``X``."""
    if X.ndim != 2 or w.shape != X.shape[1:]:
        raise ValueError(f"w must have one entry per column of X, got w of shape {w.shape} and X of shape {X.shape}")
    if not all(np.isfinite(array).all() for array in (w, X, b)):
        raise ValueError("w, b and X must be finite, got NaN or infinite values")
    if not w.any():
        raise ValueError("w must not be zero: a classifier needs a direction, got a vector of zeros")


def _classes(X: Float[Array, "n d"], y: Int[Array, " n"]) -> tuple[Array, Array]:
    """The rows of class -1 and those of class +1."""
    if y.shape != X.shape[:1]:
        raise ValueError(f"y must have one label per row of X, got y of shape {y.shape} and X of shape {X.shape}")
    values = np.unique(y)
    if len(values) != 2:
        raise ValueError(f"y must hold exactly two different labels, got {len(values)}")
    return X[y == values[0]], X[y == values[1]]


def _components(w: Array, X: Array, y: Array) -> tuple[Float[Array, " d"], float, Float[Array, " d"]]:
    """The unit normal ``ẑ`` of the nearest centroid classifier, ``w·ẑ``, and what ``w`` has perpendicular to ``ẑ``."""
    _check_normal(w, X)
    negative, positive = _classes(X, y)
    z = positive.mean(0) - negative.mean(0)
    if not z.any():
        raise ValueError("X has the same mean in both classes of y; without two centroids there is no angle")
    z = z / np.linalg.norm(z)
    return z, w @ z, w - (w @ z) * z


def deviation_angle(w: Float[Array, " d"], X: Float[Array, "n d"], y: Int[Array, " n"]) -> float:
    r"""Angle :math:`\theta` in degrees, from 0 to 180, between ``w`` and the line from class mean to class mean.

    Parameters
    ----------
    w
        Normal of the boundary, of any length, pointing to the class with the larger label.
    X, y
        Data and their two labels.

    Raises
    ------
    ValueError
        If ``w`` is zero, shapes do not match, a value is not finite, ``y`` has not two labels, or the means coincide.

    Notes
    -----
    Source: abstract. The arctangent of the two components of ``w`` keeps its digits at every angle; an arccosine would
    lose half of them near zero.
    """
    _, along, across = _components(w, X, y)
    return float(np.degrees(np.arctan2(np.linalg.norm(across), along)))


def adversarial_strength(w: Float[Array, " d"], X: Float[Array, "n d"], y: Int[Array, " n"]) -> float:
    r"""Strength :math:`1/\cos\theta`: how much closer mirror images are than those of the nearest centroid classifier.

    It is 1 for the nearest centroid classifier, and infinite at 90 degrees (to rounding).

    Raises
    ------
    ValueError
        As :func:`deviation_angle`, and if the angle exceeds 90 degrees.
    """
    _, along, _ = _components(w, X, y)
    cosine = along / np.linalg.norm(w)
    if cosine < -1e-15:
        raise ValueError(
            f"w must point to the class with the larger label, got an angle of {deviation_angle(w, X, y):.4g} degrees"
        )
    return float(1 / cosine) if cosine > 1e-15 else float("inf")


def _signed_distance(X: Array, w: Array, b: float) -> Float[Array, " n"]:
    """Euclidean distance to the boundary, positive on the side that ``w`` points to."""
    _check_normal(w, X, b)
    return (X @ w + b) / np.linalg.norm(w)


def adversarial_distance(w: Float[Array, " d"], b: float, X: Float[Array, "n d"], y: Int[Array, " n"]) -> float:
    r"""Mean signed distance to the boundary, half the gap of the classes: :math:`\frac12(E[d|+1] - E[d|-1])`.

    Computed from the distances, each class averaged by itself, so that its equality with
    :math:`\frac12\lVert j-i\rVert\cos\theta` can be tested.

    Raises
    ------
    ValueError
        As :func:`deviation_angle`, except that means may coincide.
    """
    distance = _signed_distance(X, w, b)
    negative, positive = _classes(distance, y)
    return float(positive.mean() - negative.mean()) / 2


def mirror_image(X: Float[Array, "n d"], w: Float[Array, " d"], b: float) -> Float[Array, "n d"]:
    r"""Reflection at the boundary, :math:`x - 2\,d(x)\,\hat w`: as confident as ``x``, in the other class.

    Raises
    ------
    ValueError
        If ``w`` is zero, shapes do not match, or a value is not finite.
    """
    return X - 2 * np.outer(_signed_distance(X, w, b), w / np.linalg.norm(w))


def projected_image(X: Float[Array, "n d"], w: Float[Array, " d"], b: float) -> Float[Array, "n d"]:
    r"""Nearest point of the boundary, :math:`x - d(x)\,\hat w`; errors as for :func:`mirror_image`."""
    return X - np.outer(_signed_distance(X, w, b), w / np.linalg.norm(w))


def tilt(w_hat: Float[Array, " d"], direction: Float[Array, " d"], degrees: float) -> Float[Array, " d"]:
    """Unit normal that is rotated from ``w_hat`` towards ``direction`` by an angle, in the plane of the two.

    Raises
    ------
    ValueError
        If the vectors differ in shape, one is zero or not finite, or they are parallel.
    """
    _check_normal(w_hat, direction[None])
    w_hat = w_hat / np.linalg.norm(w_hat)
    across = direction - (direction @ w_hat) * w_hat
    if np.linalg.norm(across) <= 1e-12 * np.linalg.norm(direction):
        raise ValueError("direction must not be zero or parallel to w_hat: the two must span a plane")
    angle = np.radians(degrees)
    return np.cos(angle) * w_hat + np.sin(angle) * across / np.linalg.norm(across)


def tilted_gaussian_error(
    theta_degrees: Float[Array, "*angles"] | float, delta: float, sigma_1: float, sigma_2: float
) -> Float[Array, "*angles"]:
    r"""Error of a tilted boundary between two Gaussian classes, :math:`\Phi(-\delta/\sqrt{σ_1^2+σ_2^2\tan^2\theta})`.

    Parameters
    ----------
    theta_degrees
        Tilting angle, from 0 to less than 90.
    delta, sigma_1
        Half the distance between the class means, and the standard deviation along the line that joins them.
    sigma_2
        Standard deviation along the direction of the tilt.

    Raises
    ------
    ValueError
        If an angle lies outside [0, 90), ``delta`` or ``sigma_1`` is not positive, or ``sigma_2`` is negative.
    """
    theta = np.asarray(theta_degrees, dtype=float)
    if not ((theta >= 0) & (theta < 90)).all():
        raise ValueError(f"theta_degrees must lie in [0, 90), got {theta_degrees}")
    if not (delta > 0 and sigma_1 > 0 and sigma_2 >= 0):
        raise ValueError(
            f"delta and sigma_1 must be positive and sigma_2 not negative, got {delta=}, {sigma_1=}, {sigma_2=}"
        )
    return ndtr(-delta / np.hypot(sigma_1, sigma_2 * np.tan(np.radians(theta))))


def tilting_plane(
    w: Float[Array, " d"], X: Float[Array, "n d"], y: Int[Array, " n"]
) -> tuple[Float[Array, "n 2"], Float[Array, "2 d"]]:
    r"""Coordinates of the data in the plane of ``ẑ`` and ``w``, and its orthonormal basis :math:`(\hat z,\hat n)`.

    The boundary is the line :math:`u\cos\theta + v\sin\theta + b/\lVert w\rVert = 0`; distances to it are true.

    Raises
    ------
    ValueError
        As :func:`deviation_angle`, and if ``w`` is parallel to ``ẑ``: then there is no tilting plane.
    """
    z, _, across = _components(w, X, y)
    if np.linalg.norm(across) < 1e-12 * np.linalg.norm(w):
        raise ValueError("w is parallel to the normal of the nearest centroid classifier: there is no tilting plane")
    basis = np.stack([z, across / np.linalg.norm(across)])
    return X @ basis.T, basis


def noisy_pair(
    images: Float[Array, "n d"],
    labels: Int[Array, " n"],
    pair: tuple[int, int],
    *,
    train_size: float,
    noise: float,
    flipped: float,
    seed: int,
) -> Split:
    """Two classes with noisy pixels, split at random into training and test data, and wrong training labels.

    Parameters
    ----------
    images, labels
        Inputs and their classes.
    pair
        The two classes to keep; the first becomes -1, the second +1.
    train_size
        Part (a float) or number (an int) of the images to train on; both classes keep their shares.
    noise
        Standard deviation of Gaussian noise that is added to every pixel.
    flipped
        Fraction of the training labels, rounded to a number of images, that change sign. Test labels stay.
    seed
        Of noise, split and flips.

    Returns
    -------
    X, y, X_test, y_test
        Training and test data with labels ±1.

    Raises
    ------
    ValueError
        If a class is missing or named twice, ``noise`` is negative, or ``flipped`` lies outside [0, 1].
    """
    if pair[0] == pair[1] or not np.isin(pair, labels).all():
        raise ValueError(f"pair must name two different classes of labels, got {pair}")
    if not noise >= 0 or not 0 <= flipped <= 1:
        raise ValueError(f"noise must not be negative and flipped lie in [0, 1], got {noise=}, {flipped=}")
    rng = np.random.default_rng(seed)
    kept = np.isin(labels, pair)
    x, y = images[kept], np.where(labels[kept] == pair[1], 1, -1)
    x = x + noise * rng.standard_normal(x.shape)
    x, x_test, y, y_test = train_test_split(x, y, train_size=train_size, stratify=y, random_state=seed)
    y[rng.choice(len(y), round(flipped * len(y)), replace=False)] *= -1
    return x, y, x_test, y_test


def _check_Cs(Cs: Sequence[float]) -> None:
    if not len(Cs) or not min(Cs) > 0:
        raise ValueError(f"Cs must hold at least one value, all positive, got {list(Cs)}")


def regularisation_path(
    X: Float[Array, "n d"],
    y: Int[Array, " n"],
    X_test: Float[Array, "m d"],
    y_test: Int[Array, " m"],
    Cs: Sequence[float],
) -> dict[str, Array]:
    """Linear support vector machines from strong to weak regularisation, and their angles on the training data.

    Parameters
    ----------
    X, y, X_test, y_test
        Training and test data, both with the same two labels.
    Cs
        Weights of the summed hinge loss against half the squared norm of ``w``.

    Returns
    -------
    dict of ndarray
        ``C``, ``angle`` (degrees), ``strength``, ``train_error``, ``test_error``, ``distance`` (adversarial) and
        ``converged``, each with one entry per value of ``Cs``; ``w`` (Cs, d) and ``b`` (Cs,).

    Raises
    ------
    ValueError
        If ``Cs`` is empty or holds a value that is not positive, ``y_test`` holds a label that ``y`` lacks, and as
        :func:`deviation_angle`.
    """
    _check_Cs(Cs)
    if not np.isin(y_test, y).all():
        raise ValueError(f"y_test must hold labels of y, got {np.unique(y_test)} for {np.unique(y)}")
    rows = []
    for C in Cs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # reported as "converged" instead
            svm = linear_svm(C=C).fit(X, y)
        w, b = svm.coef_[0], svm.intercept_[0]
        rows.append(
            {
                "C": C,
                "angle": deviation_angle(w, X, y),
                "strength": adversarial_strength(w, X, y),
                "train_error": 1 - svm.score(X, y),
                "test_error": 1 - svm.score(X_test, y_test),
                "distance": adversarial_distance(w, b, X, y),
                "converged": svm.fit_status_ == 0,
                "w": w,
                "b": b,
            }
        )
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def cross_validated_error(
    X: Float[Array, "n d"], y: Int[Array, " n"], Cs: Sequence[float], folds: int = 5
) -> Float[Array, " Cs"]:
    """Error of the support vector machine on held-out folds of the training data, for every value of ``Cs``.

    Raises
    ------
    ValueError
        If ``Cs`` is empty or holds a value that is not positive, or there are fewer than two ``folds``.
    """
    _check_Cs(Cs)
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search = GridSearchCV(linear_svm(), {"C": list(Cs)}, cv=folds, refit=False).fit(X, y)
    return 1 - search.cv_results_["mean_test_score"]
