"""Oracles: hand values, scikit-learn's centroid and discriminant classifiers, SciPy, sampling, and invariances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, ortho_group
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import NearestCentroid
from sklearn.svm import SVC

from companion import data
from companion.robustness.boundary_tilting import (
    adversarial_distance,
    adversarial_strength,
    cross_validated_error,
    deviation_angle,
    linear_svm,
    mirror_image,
    noisy_pair,
    projected_image,
    regularisation_path,
    tilt,
    tilted_gaussian_error,
    tilting_plane,
)

HAND_X = np.array([[-1.0, 0], [-1, 2], [1, 0], [1, 2]])
HAND_Y = np.array([-1, -1, 1, 1])
HAND_W, HAND_B = np.array([1.0, 1.0]), -1.0
seeds = st.integers(0, 2**31)


def random_problem(seed, n=30, d=5):
    rng = np.random.default_rng(seed)
    y = np.where(np.arange(n) < n // 3, -1, 1)  # not balanced
    X = rng.standard_normal((n, d)) + 2 * np.outer(y == 1, rng.standard_normal(d))
    return X, y, rng.standard_normal(d), float(rng.standard_normal()), rng


def digits(pair=(3, 7)):
    x, y = data.digits()
    return noisy_pair(
        x.double().numpy(), y.numpy(), pair, train_size=0.6, noise=0.03, flipped=0.05, seed=0
    )  # 8x8, quick


# --- the angle and its distance ---------------------------------------------------------------------------------------


def test_hand_case():
    assert deviation_angle(HAND_W, HAND_X, HAND_Y) == pytest.approx(45, abs=1e-12)
    assert adversarial_strength(HAND_W, HAND_X, HAND_Y) == pytest.approx(2**0.5, abs=1e-12)
    assert adversarial_distance(HAND_W, HAND_B, HAND_X, HAND_Y) == pytest.approx(0.5**0.5, abs=1e-12)
    np.testing.assert_allclose(mirror_image(HAND_X[3:], HAND_W, HAND_B), [[-1, 0]], atol=1e-12)
    np.testing.assert_allclose(projected_image(HAND_X[3:], HAND_W, HAND_B), [[0, 1]], atol=1e-12)


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_the_angle_is_invariant_to_translation_rotation_and_scale(seed, scale):
    X, y, w, _, rng = random_problem(seed)
    angle = deviation_angle(w, X, y)
    rotation = ortho_group.rvs(5, random_state=rng)
    assert deviation_angle(w, X + rng.standard_normal(5), y) == pytest.approx(angle, abs=1e-6)
    assert deviation_angle(rotation @ w, X @ rotation.T, y) == pytest.approx(angle, abs=1e-6)
    assert deviation_angle(w, scale * X, y) == pytest.approx(angle, abs=1e-6)
    assert deviation_angle(scale * w, X, y) == pytest.approx(angle, abs=1e-6)
    assert deviation_angle(-w, X, y) == pytest.approx(180 - angle, abs=1e-6)
    assert deviation_angle(w, X, y + 7) == pytest.approx(angle, abs=1e-12)


@given(seed=seeds)
def test_the_adversarial_distance_is_the_cosine_of_the_angle(seed):
    X, y, w, b, _ = random_problem(seed)
    gap = np.linalg.norm(X[y == 1].mean(0) - X[y == -1].mean(0))
    formula = gap * np.cos(np.radians(deviation_angle(w, X, y))) / 2
    assert adversarial_distance(w, b, X, y) == pytest.approx(formula, abs=1e-9)
    assert adversarial_distance(w, b + 3, X, y) == pytest.approx(formula, abs=1e-9)
    assert adversarial_distance(w, b, X, y) <= gap / 2 + 1e-9


def test_the_strength_compares_distances_with_those_of_the_nearest_centroid_classifier():
    X, y, *_ = digits()
    w = LogisticRegression().fit(X, y).coef_[0]
    i, j = NearestCentroid().fit(X, y).centroids_
    ratio = adversarial_distance(j - i, 0.0, X, y) / adversarial_distance(w, 0.0, X, y)
    assert adversarial_strength(w, X, y) == pytest.approx(ratio, rel=1e-12)
    assert adversarial_strength(j - i, X, y) == pytest.approx(1, abs=1e-12)
    assert deviation_angle(j - i, X, y) < 1e-9  # an arccosine would give about 1e-6


def test_the_strength_at_and_beyond_ninety_degrees():
    assert adversarial_strength(np.array([0.0, 1.0]), HAND_X, HAND_Y) == np.inf
    assert deviation_angle(np.array([0.0, 1.0]), HAND_X, HAND_Y) == 90
    with pytest.raises(ValueError, match="135 degrees"):
        adversarial_strength(np.array([-1.0, 1.0]), HAND_X, HAND_Y)


@given(seed=seeds)
def test_mirror_images(seed):
    X, _, w, b, _ = random_problem(seed)
    before, image, halfway = X.copy(), mirror_image(X, w, b), projected_image(X, w, b)
    np.testing.assert_allclose(mirror_image(image, w, b), X, atol=1e-9)
    np.testing.assert_allclose(image @ w + b, -(X @ w + b), atol=1e-9)
    np.testing.assert_allclose(halfway @ w + b, 0, atol=1e-9)
    np.testing.assert_allclose(halfway, (X + image) / 2, atol=1e-9)
    lengths = np.linalg.norm(image[1:] - image[0], axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(X[1:] - X[0], axis=1), atol=1e-9)
    np.testing.assert_array_equal(X, before)


# --- tilting ----------------------------------------------------------------------------------------------------------


@given(seed=seeds, degrees=st.floats(0, 180))
def test_tilt_turns_by_the_angle_in_the_plane(seed, degrees):
    _, _, w, _, rng = random_problem(seed)
    direction = rng.standard_normal(5)
    turned = tilt(w, direction, degrees)
    assert np.linalg.norm(turned) == pytest.approx(1, abs=1e-12)
    assert turned @ w / np.linalg.norm(w) == pytest.approx(np.cos(np.radians(degrees)), abs=1e-9)
    assert np.linalg.matrix_rank(np.stack([w, direction, turned]), tol=1e-9) == 2
    assert turned @ (direction - direction @ w / (w @ w) * w) >= -1e-9  # towards the direction, not away


@pytest.mark.parametrize(("sigma_2", "error"), [(0.1, 0.0939340), (0.3, 0.2877625), (1.0, 0.4308103)])
def test_error_of_a_tilted_boundary(sigma_2, error):
    assert tilted_gaussian_error(85, 2, 1, sigma_2) == pytest.approx(error, abs=1e-7)
    spread = np.hypot(np.cos(np.radians(85)), sigma_2 * np.sin(np.radians(85)))
    assert norm.cdf(0, 2 * np.cos(np.radians(85)), spread) == pytest.approx(error, abs=1e-7)


def test_error_of_a_tilted_boundary_is_that_of_samples():
    rng, truth = np.random.default_rng(0), np.repeat([-1, 1], 100_000)
    x = rng.standard_normal((len(truth), 3)) * [0.7, 0.2, 1]
    x[:, 0] += 1.1 * truth
    thetas = np.array([0, 50, 75, 85])
    predicted = tilted_gaussian_error(thetas, 1.1, 0.7, 0.2)
    measured = [np.mean(np.sign(x @ tilt(np.eye(3)[0], np.eye(3)[1], theta)) != truth) for theta in thetas]
    error = np.sqrt(predicted * (1 - predicted) / len(truth))
    assert (np.abs(measured - predicted) < 4 * error).all()


def test_a_tilt_without_variance_is_free():
    thetas = np.linspace(0, 89.999, 7)
    np.testing.assert_allclose(tilted_gaussian_error(thetas, 2, 1, 0), norm.cdf(-2), rtol=1e-12)
    assert (np.diff(tilted_gaussian_error(thetas, 2, 1, 0.1)) > 0).all()


def test_discriminant_analysis_has_the_angle_of_proposition_3():
    m, covariance = np.array([2, 0.1]), np.diag([1, 1e-4])
    y = np.repeat([-1, 1], 100_000)
    X = np.random.default_rng(0).standard_normal((len(y), 2)) * [1, 1e-2] + np.outer(y, m) / 2
    w = np.linalg.solve(covariance, m)
    exact = deviation_angle(w, np.stack([-m, m]), np.array([0, 1]))
    assert exact == pytest.approx(87.0230, abs=1e-4)
    fitted = LinearDiscriminantAnalysis(solver="lsqr").fit(X, y)
    assert deviation_angle(fitted.coef_[0], X, y) == pytest.approx(exact, abs=0.5)


# --- the tilting plane ------------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_tilting_plane(seed):
    X, y, w, b, _ = random_problem(seed)
    coordinates, basis = tilting_plane(w, X, y)
    np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-9)
    np.testing.assert_allclose(coordinates, X @ basis.T, atol=1e-9)
    theta = np.radians(deviation_angle(w, X, y))
    in_plane = coordinates @ [np.cos(theta), np.sin(theta)] + b / np.linalg.norm(w)
    np.testing.assert_allclose(in_plane, (X @ w + b) / np.linalg.norm(w), atol=1e-7)
    means = [coordinates[y == label].mean(0) for label in (-1, 1)]
    assert means[1][1] == pytest.approx(means[0][1], abs=1e-9)  # the centroids differ along ẑ alone


# --- digits -----------------------------------------------------------------------------------------------------------


def test_regularisation_path_agrees_with_scikit_learn_and_bends_away_from_the_centroids():
    X, y, X_test, y_test = digits()
    path = regularisation_path(X, y, X_test, y_test, [1e-3, 1, 1e2])
    svm = SVC(kernel="linear", C=1.0, tol=1e-6).fit(X, y)
    np.testing.assert_allclose(path["w"][1], svm.coef_[0], atol=1e-3)
    assert path["train_error"][1] == pytest.approx(np.mean(svm.predict(X) != y), abs=1e-12)
    assert path["test_error"][1] == pytest.approx(np.mean(svm.predict(X_test) != y_test), abs=1e-12)
    assert path["converged"].all()
    assert (np.diff(path["angle"]) > 10).all()
    np.testing.assert_allclose(path["strength"], 1 / np.cos(np.radians(path["angle"])), rtol=1e-9)
    for k in range(3):
        assert path["distance"][k] == pytest.approx(adversarial_distance(path["w"][k], 0.0, X, y), abs=1e-12)
    swapped = regularisation_path(X[::-1], y[::-1], X_test, y_test, [1])
    assert swapped["angle"][0] == pytest.approx(path["angle"][1], abs=0.2)  # to the solver's tolerance


def test_strong_regularisation_of_balanced_classes_is_the_nearest_centroid_direction():
    X, y, *_ = random_problem(3, n=30)
    X, y = np.concatenate([X[:10], X[-10:]]), np.concatenate([y[:10], y[-10:]])
    w = regularisation_path(X, y, X, y, [1e-6])["w"][0]
    np.testing.assert_allclose(w, 1e-6 * (y @ X), rtol=1e-9)
    assert deviation_angle(w, X, y) < 1e-6


def test_a_fit_that_stops_early_is_reported(monkeypatch):
    monkeypatch.setitem(linear_svm.keywords, "max_iter", 3)
    assert not regularisation_path(*digits(), [1e2])["converged"][0]


def test_cross_validation_agrees_with_scikit_learn():
    X, y, *_ = digits()
    scores = [cross_val_score(SVC(kernel="linear", C=C, tol=1e-4), X, y, cv=4).mean() for C in (1e-2, 1)]
    np.testing.assert_allclose(cross_validated_error(X, y, [1e-2, 1], folds=4), 1 - np.array(scores), atol=1e-12)


@pytest.mark.parametrize(("k", "rel"), [(2, 1e-9), (3, 1e-3)])  # 1/k² is exact for powers of two alone
def test_resolution_changes_nothing(k, rel):
    x, y = data.digits((3, 7))
    x, y = x.double().numpy(), y.numpy()
    large = np.kron(x.reshape(-1, 8, 8), np.ones((1, k, k))).reshape(len(x), -1)
    w, w_large = linear_svm(C=0.1).fit(x, y).coef_[0], linear_svm(C=0.1 / k**2).fit(large, y).coef_[0]
    assert deviation_angle(w_large, large, y) == pytest.approx(deviation_angle(w, x, y), rel=rel)
    assert np.abs(w_large).sum() == pytest.approx(np.abs(w).sum(), rel=rel)


def test_noisy_pair():
    x, y = data.digits()
    x, y = x.double().numpy(), y.numpy()
    options = dict(train_size=0.6, noise=0.1, seed=1)
    X, labels, X_test, labels_test = noisy_pair(x, y, (3, 7), flipped=0.05, **options)
    clean_X, clean, clean_X_test, clean_test = noisy_pair(x, y, (3, 7), flipped=0.0, **options)
    assert (labels != clean).sum() == round(0.05 * len(clean))
    np.testing.assert_array_equal(X, clean_X)
    np.testing.assert_array_equal(X_test, clean_X_test)
    np.testing.assert_array_equal(labels_test, clean_test)
    quiet, quiet_labels, *_ = noisy_pair(x, y, (3, 7), flipped=0, train_size=0.6, noise=0, seed=1)
    assert (X - quiet).std() == pytest.approx(0.1, rel=0.02)
    rows = {row.tobytes(): label for row, label in zip(x, y, strict=True)}
    assert [rows[row.tobytes()] for row in quiet] == [3 if label == -1 else 7 for label in quiet_labels]
    assert len(noisy_pair(x, y, (3, 7), flipped=0, train_size=50, noise=0, seed=1)[0]) == 50
    other = noisy_pair(x, y, (3, 7), flipped=0.05, **{**options, "seed": 2})[0]
    assert not np.array_equal(X, other)


# --- what a reader can get wrong --------------------------------------------------------------------------------------

ZERO, NAN = np.zeros(2), np.array([1, np.nan])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deviation_angle(ZERO, HAND_X, HAND_Y), "w must not be zero"),
        (lambda: deviation_angle(NAN, HAND_X, HAND_Y), "finite"),
        (lambda: deviation_angle(np.ones(3), HAND_X, HAND_Y), r"\(3,\).*\(4, 2\)"),
        (lambda: deviation_angle(HAND_W, HAND_X, HAND_Y[:3]), r"\(3,\).*\(4, 2\)"),
        (lambda: deviation_angle(HAND_W, HAND_X, np.arange(4)), "two different labels, got 4"),
        (lambda: deviation_angle(HAND_W, HAND_X, np.ones(4)), "two different labels, got 1"),
        (lambda: deviation_angle(HAND_W, HAND_X, np.array([1, 0, 0, 1])), "same mean"),
        (lambda: adversarial_strength(ZERO, HAND_X, HAND_Y), "w must not be zero"),
        (lambda: adversarial_distance(HAND_W, np.nan, HAND_X, HAND_Y), "finite"),
        (lambda: adversarial_distance(HAND_W, 0.0, HAND_X, np.ones(4)), "two different labels"),
        (lambda: mirror_image(np.full((2, 2), np.inf), HAND_W, HAND_B), "finite"),
        (lambda: mirror_image(HAND_X[0], HAND_W, HAND_B), r"X of shape \(2,\)"),
        (lambda: projected_image(HAND_X, ZERO, HAND_B), "w must not be zero"),
        (lambda: tilt(HAND_W, 3 * HAND_W, 10), "parallel"),
        (lambda: tilt(HAND_W, ZERO, 10), "parallel"),
        (lambda: tilt(HAND_W, np.ones(3), 10), r"\(2,\)"),
        (lambda: tilted_gaussian_error(90, 2, 1, 1), r"\[0, 90\), got 90"),
        (lambda: tilted_gaussian_error(np.array([0, np.nan]), 2, 1, 1), r"\[0, 90\)"),
        (lambda: tilted_gaussian_error(10, 2, 1, -1), "sigma_2=-1"),
        (lambda: tilted_gaussian_error(10, 0, 1, 1), "delta=0"),
        (lambda: tilting_plane(np.array([2.0, 0.0]), HAND_X, HAND_Y), "no tilting plane"),
        (lambda: regularisation_path(HAND_X, HAND_Y, HAND_X, HAND_Y, []), r"Cs .*got \[\]"),
        (lambda: regularisation_path(HAND_X, HAND_Y, HAND_X, HAND_Y, [1, 0]), r"positive, got \[1, 0\]"),
        (lambda: regularisation_path(HAND_X, HAND_Y, HAND_X, 2 * HAND_Y, [1]), "y_test must hold labels of y"),
        (lambda: cross_validated_error(HAND_X, HAND_Y, [-1]), r"positive, got \[-1\]"),
        (lambda: cross_validated_error(HAND_X, HAND_Y, [1], folds=1), "folds must be at least 2, got 1"),
        (lambda: noisy_pair(HAND_X, HAND_Y, (1, 5), train_size=2, noise=0, flipped=0, seed=0), r"pair .*\(1, 5\)"),
        (lambda: noisy_pair(HAND_X, HAND_Y, (1, 1), train_size=2, noise=0, flipped=0, seed=0), r"pair .*\(1, 1\)"),
        (lambda: noisy_pair(HAND_X, HAND_Y, (-1, 1), train_size=2, noise=-1, flipped=0, seed=0), "noise=-1"),
        (lambda: noisy_pair(HAND_X, HAND_Y, (-1, 1), train_size=2, noise=0, flipped=2, seed=0), "flipped=2"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
