"""Oracles: scikit-learn's AUC, values by hand, dense Gaussian algebra, limiting cases, the simulator's laws."""

import csv
import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score

from companion import data
from companion.scientific_ml.disease_progression import (
    ADAS,
    CSF,
    VENTRICLES,
    Cohort,
    DiseaseProgressionModel,
    Forecast,
    LinearMixedModel,
    Truth,
    balanced_classification_accuracy,
    coverage_probability_accuracy,
    diagnosis_from_first_visit,
    ensemble,
    history_features,
    last_observed,
    leaderboard,
    load_tadpole,
    mean_absolute_error,
    mean_biomarkers,
    multiclass_auc,
    randomised_best,
    simulate_cohort,
    submissions,
    weighted_error_score,
)

LABELS = np.array([0, 0, 1, 1, 2, 2])
ROWS = np.array(
    [[0.8, 0.15, 0.05], [0.4, 0.5, 0.1], [0.3, 0.6, 0.1], [0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3]]
)
Y, GUESS = np.array([1.0, 2, 3, 4]), np.array([1.5, 2, 2, 5])
LOWER, UPPER = np.array([1, 1.5, 1.5, 4.5]), np.array([2, 2.5, 3.5, 5.5])


def rng(seed=0):
    return np.random.default_rng(seed)


@lru_cache
def large_cohort():
    return simulate_cohort(0, 4000, 0, adas_noise=0)


@lru_cache
def race():
    """A small cohort, and all forecasts for it."""
    cohort = simulate_cohort(3, 150, 60)
    return cohort, submissions(cohort, cohort.test[:, 0], cohort.times[cohort.test[:, 1]], 0, n_steps=150)


def forecast(m=5, seed=0):
    draws = rng(seed)
    p, a, v = draws.dirichlet(np.ones(3), m), draws.normal(20, 5, m), draws.normal(3, 1, m)
    return Forecast(p, a, a - 1, a + 2, v, v - 0.1, v + 0.2)


# --- the simulator ----------------------------------------------------------------------------------------------------


def test_without_noise_ADAS_is_the_curve_and_a_constant_of_the_person():
    cohort = large_cohort()
    rest = cohort.biomarkers[..., ADAS] - mean_biomarkers(cohort.latent_time)[..., ADAS]
    assert np.nanmax(np.nanmax(rest, 1) - np.nanmin(rest, 1)) < 1e-12
    assert np.nanstd(rest[:, 0]) == pytest.approx(2.5, rel=0.04)


def test_the_noise_of_ADAS_grows_with_the_dial_and_with_the_disease():
    quiet, loud, louder = (simulate_cohort(1, 3000, 0, adas_noise=noise) for noise in (0, 2, 6))
    first, second = (c.biomarkers[..., ADAS] - quiet.biomarkers[..., ADAS] for c in (loud, louder))
    np.testing.assert_allclose(second, 3 * first, rtol=1e-9, atol=1e-9)  # the same draws, scaled
    stage = quiet.latent_time
    for low, high in ((-20, -10), (3.5, 4.5), (14, 30)):
        inside = (stage > low) & (stage < high)
        expected = 0.7 * 6 * (0.5 + 1 / (1 + np.exp(-(stage[inside] - 4) / 2.8)))
        assert np.nanstd(second[inside] / expected) == pytest.approx(1, rel=0.08)


def test_stage_is_linear_in_time_with_the_stated_distribution():
    stage, times = large_cohort().latent_time, large_cohort().times
    speed = (stage[:, 1:] - stage[:, :1]) / times[1:]
    np.testing.assert_allclose(speed, speed[:, :1] * np.ones(7), rtol=1e-9)
    assert np.log(speed[:, 0]).mean() == pytest.approx(0, abs=0.025)
    assert np.log(speed[:, 0]).std() == pytest.approx(0.35, rel=0.05)
    assert stage[:, 0].min() > -11
    assert stage[:, 0].max() < 9


def test_ventricles_grow_at_the_stated_rate():
    cohort = large_cohort()
    volume, stage, times = cohort.biomarkers[..., VENTRICLES], cohort.latent_time, cohort.times
    speed = (stage[:, -1] - stage[:, 0]) / 5
    fine = np.linspace(0, 5, 2001)
    rate = 0.03 + 0.2 * speed[:, None] / (1 + np.exp(-(stage[:, :1] + speed[:, None] * fine) / 2.5))
    growth = np.trapezoid(rate, fine, axis=1)  # expected growth over five years, by quadrature
    error = volume[:, -1] - volume[:, 0] - growth
    known = ~np.isnan(error)
    assert error[known].mean() == pytest.approx(0, abs=5 * error[known].std() / known.sum() ** 0.5)
    assert error[known].std() == pytest.approx(math.hypot(5 * 0.02, 2**0.5 * 0.035), rel=0.05)
    step = mean_biomarkers(np.array([1.0, 1.0 + 1e-6]))[:, VENTRICLES]
    assert np.diff(step)[0] / 1e-6 == pytest.approx(0.03 + 0.2 / (1 + math.exp(-1 / 2.5)), rel=1e-4)
    assert times[-1] == 5


def test_diagnosis_follows_the_stage_with_the_stated_error():
    cohort = large_cohort()
    for stage, error in ((-1, 0), (4, 1)):
        near = np.abs(cohort.latent_time - stage) < 0.1
        seen = cohort.diagnosis[near & ~np.isnan(cohort.diagnosis)]
        assert (seen > error).mean() == pytest.approx(0.5, abs=0.1)  # half are beyond the threshold on the threshold
    sure = np.abs(cohort.latent_time - 1.5) < 0.2  # 2.5 years from both thresholds, 2.3 standard deviations
    assert np.nanmean((cohort.diagnosis[sure] == 1)[~np.isnan(cohort.diagnosis[sure])]) > 0.95


def test_what_is_missing_is_missing_at_the_stated_rates():
    cohort = large_cohort()
    missing = np.isnan(cohort.biomarkers)
    assert not missing[:, 0, ADAS].any()
    assert missing[:, 1:, ADAS].mean() == pytest.approx(0.12, abs=0.01)
    assert missing[:, 0, VENTRICLES].mean() == pytest.approx(0.15, abs=0.02)
    assert (~missing[:, 0, 4]).mean() == pytest.approx(0.55, abs=0.03)
    assert missing[:, 1:, CSF].all()
    assert (np.isnan(cohort.diagnosis) == missing[..., ADAS]).all()


def test_test_visits_alternate_and_are_not_open():
    cohort = simulate_cohort(0)
    assert cohort.training.sum() == 400
    assert not set(cohort.test[:, 0]) & set(np.flatnonzero(cohort.training))
    assert 190 <= len(cohort.test) <= 200
    assert {5, 6} == set(cohort.test[:, 1])
    assert (cohort.test[:, 1] > cohort.last_visit[cohort.test[:, 0]]).all()
    assert np.isfinite(cohort.truth.adas).all()
    assert np.isnan(cohort.truth.ventricles).any()  # no scan at that visit
    again = simulate_cohort(0)
    np.testing.assert_array_equal(cohort.biomarkers, again.biomarkers)


# --- the metrics ------------------------------------------------------------------------------------------------------


def test_metrics_of_the_hand_example():
    assert multiclass_auc(LABELS, ROWS) == pytest.approx(0.8541667, abs=5e-8)
    assert balanced_classification_accuracy(LABELS, ROWS.argmax(1)) == pytest.approx(0.625)
    hard = np.array([0, 1, 1, 1, 2, 1])
    assert multiclass_auc(LABELS, np.eye(3)[hard]) == pytest.approx(0.75)
    assert balanced_classification_accuracy(LABELS, hard) == pytest.approx(0.75)
    assert mean_absolute_error(Y, GUESS) == 0.625
    assert weighted_error_score(Y, GUESS, LOWER, UPPER) == pytest.approx(4 / 7)
    assert coverage_probability_accuracy(Y, LOWER, UPPER) == 0  # y = 1 is on the end of its interval


@given(seed=st.integers(0, 2**31), rounded=st.booleans())
def test_multiclass_auc_is_scikit_learn_s(seed, rounded):
    draws = rng(seed)
    labels, p = draws.integers(0, 3, 60), draws.dirichlet(np.ones(3), 60)
    labels[:3] = range(3)
    p = np.eye(3)[p.argmax(1)] if rounded else p  # one-hot: everything is tied
    assert multiclass_auc(labels, p) == pytest.approx(roc_auc_score(labels, p, multi_class="ovo"), abs=1e-12)
    order = draws.permutation(60)
    assert multiclass_auc(labels[order], 7 * p[order]) == pytest.approx(multiclass_auc(labels, p), abs=1e-12)


def test_multiclass_auc_of_a_known_sample():
    draws = rng(0)
    p = draws.dirichlet(np.ones(3), 300)
    labels = (p.cumsum(1) < draws.random((300, 1))).sum(1)
    assert multiclass_auc(labels, p) == pytest.approx(roc_auc_score(labels, p, multi_class="ovo"), abs=1e-12)
    assert multiclass_auc(labels, 1 - p) < 0.5 < multiclass_auc(labels, p)


@given(seed=st.integers(0, 2**31))
def test_balanced_accuracy_is_that_of_each_class_against_the_rest(seed):
    draws = rng(seed)
    labels, guess = draws.integers(0, 3, 30), draws.integers(0, 3, 30)
    labels[:3] = range(3)
    each = [balanced_accuracy_score(labels == c, guess == c) for c in range(3)]
    assert balanced_classification_accuracy(labels, guess) == pytest.approx(np.mean(each), abs=1e-12)
    sensitivity = recall_score(labels, guess, average="macro", zero_division=0)
    assert balanced_classification_accuracy(labels, guess) >= sensitivity / 2


def test_undefined_ratios_count_one_half():
    assert balanced_classification_accuracy(np.zeros(4), np.zeros(4)) == pytest.approx(np.mean([0.75, 0.75, 0.75]))


@given(seed=st.integers(0, 2**31), width=st.floats(0.1, 10))
def test_with_one_width_the_weighted_error_is_the_mean_error(seed, width):
    y, guess = rng(seed).normal(size=(2, 20))
    score = weighted_error_score(y, guess, guess - width / 2, guess + width / 2)
    assert score == pytest.approx(mean_absolute_error(y, guess), rel=1e-9)


def test_missing_targets_drop_out():
    hole = np.append(Y, np.nan)
    more = [np.append(a, b) for a, b in ((GUESS, 9), (LOWER, 8), (UPPER, 10))]
    assert mean_absolute_error(hole, more[0]) == 0.625
    assert weighted_error_score(hole, *more) == pytest.approx(4 / 7)
    assert coverage_probability_accuracy(hole, *more[1:]) == 0
    assert multiclass_auc(np.append(LABELS, np.nan), np.vstack([ROWS, ROWS[:1]])) == multiclass_auc(LABELS, ROWS)
    assert balanced_classification_accuracy(np.append(LABELS, np.nan), np.append(ROWS.argmax(1), 0)) == 0.625


def test_intervals_of_the_true_quartiles_cover_half():
    y = rng().normal(size=100_000)
    half = np.full_like(y, 0.67449)
    assert coverage_probability_accuracy(y, -half, half) < 0.006
    assert coverage_probability_accuracy(y, -9 * half, 9 * half) == 0.5


def test_the_luckiest_guesser_is_best_with_no_noise():
    y, guess = rng().normal(size=(2, 300))
    assert randomised_best(y, guess, rng(), copies=1, sd=0) == mean_absolute_error(y, guess)
    few, many = (randomised_best(y, y, rng(1), copies=copies) for copies in (1, 400))
    assert many < few
    assert few == pytest.approx(2 * (2 / math.pi) ** 0.5, rel=0.15)  # the mean of |N(0, 2²)|


# --- ensembles and the leaderboard ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "median"])
def test_an_ensemble_of_one_is_itself_and_order_does_not_matter(how):
    one, others = forecast(), [forecast(seed=seed) for seed in range(4)]
    alone = ensemble([one], how)
    np.testing.assert_allclose(alone.probabilities, one.probabilities, rtol=1e-12)
    np.testing.assert_array_equal(alone.adas_upper, one.adas_upper)
    np.testing.assert_allclose(ensemble(others, how).adas, ensemble(others[::-1], how).adas, rtol=1e-12)
    np.testing.assert_allclose(ensemble(others, how).probabilities.sum(1), 1, rtol=1e-12)


@given(seed=st.integers(0, 1000), wild=st.sampled_from([1e3, 1e6, 1e12]))
def test_a_median_does_not_see_how_wild_an_outlier_is(seed, wild):
    good = [forecast(seed=seed + k) for k in range(2)]
    outlier = [replace(good[0], adas=good[0].adas + size, adas_lower=good[0].adas_lower - size) for size in (1e3, wild)]
    first, second = (ensemble([*good, one], "median") for one in outlier)
    np.testing.assert_array_equal(first.adas, second.adas)
    np.testing.assert_array_equal(first.adas_lower, second.adas_lower)
    far = ensemble([*good, outlier[1]], "mean").adas
    assert np.abs(far - ensemble(good, "mean").adas).min() > 100


def test_the_median_of_probabilities_is_scaled_again():
    columns = np.array([[0.6, 0.3, 0.1], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6]])
    pooled = ensemble([replace(forecast(1), probabilities=row[None]) for row in columns], "median")
    np.testing.assert_allclose(pooled.probabilities, 1 / 3)  # the medians are 0.3 each and sum to 0.9


def test_leaderboard_ranks_and_columns():
    truth = Truth(LABELS.astype(float), np.arange(6.0), np.append(np.arange(5.0), np.nan))
    perfect = np.eye(3)[LABELS]

    def entry(p, shift):
        a, v = truth.adas + shift, np.arange(6.0) + 2 * shift
        return Forecast(p, a, a - 1, a + 1, v, v - 1, v + 1)

    table = leaderboard({"a": entry(perfect, 0.5), "b": entry(ROWS, 0.1), "c": entry(perfect, 0.5)}, truth)
    assert len(table) == 9
    np.testing.assert_allclose(table["MAUC"], [1, 0.8541667, 1], atol=1e-7)
    np.testing.assert_allclose(table["ADAS MAE"], [0.5, 0.1, 0.5])
    np.testing.assert_allclose(table["ventricle MAE"], [1, 0.2, 1])
    np.testing.assert_allclose(table["mean rank"], [(1 + 2 + 2) / 3, (3 + 1 + 1) / 3, (1 + 2 + 2) / 3])


# --- mixed effects ----------------------------------------------------------------------------------------------------


def longitudinal(n=60, seed=0):
    draws = rng(seed)
    who = np.repeat(np.arange(n), draws.integers(2, 7, n))
    t = draws.uniform(0, 5, len(who))
    b = draws.multivariate_normal([0, 0], [[4, 0.5], [0.5, 0.3]], n)
    return t, 10 + 1.5 * t + b[who, 0] + b[who, 1] * t + draws.normal(size=len(who)), who


def dense_likelihood(t, y, who, beta, D, s2):
    total = 0
    for k in np.unique(who):
        Z = np.stack([np.ones((who == k).sum()), t[who == k]], axis=1)
        total += multivariate_normal(Z @ beta, Z @ D @ Z.T + s2 * np.eye(len(Z))).logpdf(y[who == k])
    return total


def test_effects_are_the_formulas_with_the_covariance_of_the_observations():
    t, y, who = longitudinal()
    model = LinearMixedModel().fit(t, y, who, rounds=3000)
    D, s2 = model.covariance, model.noise_variance
    parts = []
    for k in range(60):
        Z = np.stack([np.ones((who == k).sum()), t[who == k]], axis=1)
        parts.append((Z, np.linalg.inv(Z @ D @ Z.T + s2 * np.eye(len(Z))), y[who == k]))
    beta = np.linalg.solve(sum(Z.T @ V @ Z for Z, V, _ in parts), sum(Z.T @ V @ v for Z, V, v in parts))
    b = [D @ Z.T @ V @ (v - Z @ beta) for Z, V, v in parts]
    C = [D - D @ Z.T @ V @ Z @ D for Z, V, _ in parts]
    np.testing.assert_allclose(model.fixed_effects, beta, rtol=1e-6)
    np.testing.assert_allclose(model.random_effects, b, atol=1e-4)
    np.testing.assert_allclose(model.posterior_covariance, C, atol=1e-4)


def test_em_climbs_to_the_maximum_of_the_likelihood():
    t, y, who = longitudinal(40)
    fits = [LinearMixedModel().fit(t, y, who, rounds=rounds) for rounds in (1, 2, 4, 8, 16, 32, 2000)]
    climb = [dense_likelihood(t, y, who, m.fixed_effects, m.covariance, m.noise_variance) for m in fits]
    assert (np.diff(climb) > -1e-9).all()

    def negative(x):
        root = np.array([[math.exp(x[2]), 0], [x[3], math.exp(x[4])]])
        return -dense_likelihood(t, y, who, x[:2], root @ root.T, math.exp(x[5]))

    found = minimize(negative, [10, 1.5, 0.5, 0, -0.5, 0], method="BFGS", options={"gtol": 1e-3})
    assert climb[-1] == pytest.approx(-found.fun, abs=1e-3)
    root = np.array([[math.exp(found.x[2]), 0], [found.x[3], math.exp(found.x[4])]])
    np.testing.assert_allclose(fits[-1].covariance, root @ root.T, atol=2e-2)


def test_predictions_are_calibrated_and_strangers_get_the_population():
    t, y, who = longitudinal(400, seed=1)
    last = np.append(np.diff(who) > 0, True)
    model = LinearMixedModel().fit(t[~last], y[~last], who[~last], rounds=200)
    mean, sd = model.predict(who[last], t[last])
    z = (y[last] - mean) / sd
    assert z.std() == pytest.approx(1, abs=0.1)
    mean, sd = model.predict(np.array([-5, 399, 10_000]), np.array([2.0, 2.0, 2.0]))
    assert mean[0] == mean[2] == pytest.approx(model.fixed_effects @ [1, 2])
    assert sd[0] == sd[2] > sd[1]
    assert mean[1] != mean[0]


def test_without_noise_everyone_keeps_their_own_line():
    t, who = np.tile(np.arange(5.0), 30), np.repeat(np.arange(30), 5)
    slopes = rng().normal(size=30)
    model = LinearMixedModel().fit(t, 3 + slopes[who] * t + 1e-4 * rng(1).normal(size=150), who, rounds=100)
    np.testing.assert_allclose(model.predict(np.arange(30), np.full(30, 9.0))[0], 3 + 9 * slopes, atol=5e-3)


# --- the progression model --------------------------------------------------------------------------------------------


@lru_cache
def clock():
    cohort = simulate_cohort(5, 250, 0, adas_noise=2)
    return cohort, DiseaseProgressionModel(300).fit(cohort.times, cohort.biomarkers)


def test_the_clock_is_found_without_diagnoses():
    cohort, model = clock()
    assert np.corrcoef(model.latent_time.ravel(), cohort.latent_time.ravel())[0, 1] > 0.95
    np.testing.assert_allclose(model.latent_time, model.onset[:, None] + model.speed[:, None] * cohort.times)
    np.testing.assert_allclose(model.stage(np.array([7]), np.array([2.5])), model.onset[7] + 2.5 * model.speed[7])


def test_forecasts_explain_the_visits_and_run_along_the_signs():
    cohort, model = clock()
    who, visit = np.nonzero(~np.isnan(cohort.biomarkers).any(-1) | ~np.isnan(cohort.biomarkers[..., VENTRICLES]))
    fitted = model.forecast(who, cohort.times[visit])
    seen = cohort.biomarkers[who, visit]
    explained = 1 - np.nanvar(seen - fitted, axis=0) / np.nanvar(seen, axis=0)
    assert (explained[:4] > 0.8).all()
    along = np.diff(model.curves(np.linspace(-10, 10, 50)), axis=0)
    assert (along * np.array([1, -1, 1, -1, -1, 1]) >= 0).all()
    rise = np.diff(model.forecast(np.array([3, 3]), np.array([0.0, 4.0])), axis=0)[0]
    expected = np.diff(model.curves(model.stage(np.array([3, 3]), np.array([0.0, 4.0]))), axis=0)[0]
    np.testing.assert_allclose(rise, expected, rtol=1e-9)  # a person's level does not change


def test_a_person_never_measured_stands_at_the_prior():
    cohort = simulate_cohort(6, 60, 0)
    x = cohort.biomarkers.copy()
    x[10] = np.nan
    model = DiseaseProgressionModel(50).fit(cohort.times, x)
    assert model.onset[10] == 0
    assert model.speed[10] == 1
    np.testing.assert_allclose(model.forecast(np.array([10]), np.array([3.0])), model.curves(np.array([3.0])))


def test_fitting_changes_no_input_and_needs_no_luck():
    cohort = simulate_cohort(6, 60, 0)
    before, state = cohort.biomarkers.copy(), torch.get_rng_state()
    one, two = (DiseaseProgressionModel(20).fit(cohort.times, cohort.biomarkers) for _ in range(2))
    np.testing.assert_array_equal(one.latent_time, two.latent_time)
    np.testing.assert_array_equal(before, cohort.biomarkers)
    assert torch.equal(state, torch.get_rng_state())


# --- features and submissions -----------------------------------------------------------------------------------------


def small(values, times=(0, 0.5, 1.0, 2.0)):
    """One person with these ADAS values, and nothing else."""
    x = np.full((1, len(times), 6), np.nan)
    x[0, :, ADAS] = values
    ones = np.ones((1, len(times)))
    return Cohort(np.array(times), np.array([70.0]), x, ones, ones * np.nan, np.array([2]), np.array([[0, 3]]))


def test_features_by_hand():
    row = history_features(small([10, np.nan, 14, 99]), np.array([0]), np.array([2]))[0]
    slope = (-0.5 * -2 + 0.5 * 2) / (0.5 + 0.5)
    np.testing.assert_allclose(row[:6], [70, 14, 12, 14, 10, slope])
    assert np.isnan(row[6:21]).all()  # nothing else was measured
    np.testing.assert_array_equal(row[21:24], [0, 1, 0])
    assert len(row) == 26
    short = history_features(small([10, np.nan, 14, 99]), np.array([0]), np.array([1]), summaries=False, csf=False)[0]
    np.testing.assert_array_equal(short[[0, 1, 5, 6, 7]], [70, 10, 0, 1, 0])
    assert len(short) == 8


def test_the_slope_is_that_of_least_squares_but_shrunken():
    t, y = np.arange(6.0), rng().normal(size=6)
    slope = history_features(small(y, tuple(t)), np.array([0]), np.array([5]))[0, 5]
    assert slope == pytest.approx(np.polyfit(t, y, 1)[0] * 17.5 / 18)


def test_nothing_later_than_the_cut_leaks():
    cohort, before = race()
    tampered = cohort.biomarkers.copy(), cohort.diagnosis.copy()
    later = ~cohort.visible
    tampered[0][later], tampered[1][later] = 1e3, 2
    other = replace(cohort, biomarkers=tampered[0], diagnosis=tampered[1])
    after = submissions(other, cohort.test[:, 0], cohort.times[cohort.test[:, 1]], 0, n_steps=150)
    for name in before:
        for field in ("probabilities", "adas", "adas_upper", "ventricles", "ventricles_lower"):
            np.testing.assert_array_equal(getattr(before[name], field), getattr(after[name], field), err_msg=name)


def test_all_nine_make_sense():
    cohort, forecasts = race()
    assert len(forecasts) == 9
    table = dict(zip(forecasts, leaderboard(forecasts, cohort.truth)["MAUC"], strict=True))
    for name, one in forecasts.items():
        np.testing.assert_allclose(one.probabilities.sum(1), 1, rtol=1e-9)
        assert (one.adas_lower < one.adas).all()
        assert (one.ventricles < one.ventricles_upper).all()
        assert table[name] > 0.75
    for less in ("LinearCrossSect", "LinearNoCSF"):  # what they do not see makes a difference
        assert np.abs(forecasts[less].probabilities - forecasts["Linear"].probabilities).max() > 1e-3
    part = forecasts["Linear"][:7]
    np.testing.assert_array_equal(part.adas, forecasts["Linear"].adas[:7])


def test_the_last_value_is_right_where_nothing_changes():
    cohort = simulate_cohort(2, 60, 30)
    still = cohort.biomarkers.copy()
    still[:] = still[:, :1].copy()
    still[..., VENTRICLES] = rng().normal(3, 1, (90, 1))
    flat = replace(cohort, biomarkers=still, diagnosis=np.tile(cohort.diagnosis[:, :1], (1, 8)))
    last = submissions(flat, flat.test[:, 0], flat.times[flat.test[:, 1]], 0, n_steps=1)["LastVisit"]
    assert mean_absolute_error(flat.truth.adas, last.adas) == 0
    assert mean_absolute_error(flat.truth.ventricles, last.ventricles) == 0
    assert multiclass_auc(flat.truth.diagnosis, last.probabilities) == 1


def test_last_observed_looks_back_over_holes_but_not_ahead():
    values = np.array([[1, np.nan, 3, 4], [np.nan, np.nan, np.nan, 4], [5, 6, np.nan, np.nan]])
    np.testing.assert_array_equal(last_observed(values, np.array([1, 2, 3])), [1, np.nan, 6])
    np.testing.assert_array_equal(last_observed(values, np.array([2, 3, 1])), [3, 4, 6])  # the last one counts
    np.testing.assert_array_equal(last_observed(values, np.array([-1, -1, -1])), [np.nan] * 3)  # nothing is open


def test_the_first_visit_is_all_that_counts_and_csf_is_used_if_asked_for():
    cohort = simulate_cohort(0, 200, 60)
    with_csf, without = (diagnosis_from_first_visit(cohort, csf) for csf in (True, False))
    x = cohort.biomarkers.copy()
    x[~cohort.training, 1:] = -99
    np.testing.assert_array_equal(diagnosis_from_first_visit(replace(cohort, biomarkers=x), True), with_csf)
    x[:, 0, CSF] *= rng().uniform(0.5, 2, (260, 1))
    changed = replace(cohort, biomarkers=x)
    np.testing.assert_array_equal(diagnosis_from_first_visit(changed, False), without)
    assert np.abs(diagnosis_from_first_visit(changed, True) - with_csf).max() > 0.01


# --- the challenge's data ---------------------------------------------------------------------------------------------


def write_table(path):
    """Three people as in the challenge's file: one to forecast, one who never went on, one who joined later."""
    header = "RID,VISCODE,COLPROT,DX,ADAS13,MMSE,Ventricles,Hippocampus,ICV_bl,AGE"
    names = [*header.split(","), "ABETA_UPENNBIOMK9_04_19_17", "TAU_UPENNBIOMK9_04_19_17"]
    body = [
        [2, "bl", "ADNI1", "MCI", 10, 28, 20_000, 5000, 1_000_000, 70, "<80", 200],
        [2, "m12", "ADNI1", "NL to MCI", 12, 27, 21_000, 4900, 1_000_000, 70, " ", " "],
        [2, "m03", "ADNI1", "MCI", 99, 9, 1, 1, 1_000_000, 70, "", ""],
        [2, "m48", "ADNI2", "MCI to Dementia", 30, 20, "", 4000, 1_000_000, 70, "", ""],
        [7, "bl", "ADNI1", "NL", 5, 30, 15_000, 5000, 1_000_000, 75, ">1700", 150],
        [10, "bl", "ADNI2", "Dementia", 30, 20, 30_000, 4000, 1_000_000, 80, 100, 300],
    ]
    for k in range(2):  # as many again of the first kind: two thirds of them are drawn
        body += [[100 + k, *row[1:]] for row in body[:4]]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *body])


def test_tadpole_is_read_and_split(tmp_path):
    path = tmp_path / "TADPOLE_D1_D2.csv"
    write_table(path)
    cohort = load_tadpole(path, 0)
    assert cohort.biomarkers.shape == (5, 13, 6)
    assert (~cohort.training).sum() == 2
    assert cohort.training[1:3].all()  # people 7 and 10
    np.testing.assert_array_equal(cohort.test[:, 1], [6, 6])  # year 4
    np.testing.assert_array_equal(cohort.last_visit[cohort.test[:, 0]], 2)  # month 12
    np.testing.assert_array_equal(cohort.biomarkers[0, 0], [10, 28, 2, 0.5, 80, 200])
    np.testing.assert_array_equal(cohort.diagnosis[0, [0, 2, 6]], [1, 1, 2])
    np.testing.assert_array_equal(cohort.truth.diagnosis, [2, 2])
    assert np.isnan(cohort.truth.ventricles).all()
    assert cohort.age[1] == 75
    assert cohort.biomarkers[1, 0, 4] == 1700
    other = [set(load_tadpole(path, seed).test[:, 0]) for seed in range(8)]
    assert len({frozenset(drawn) for drawn in other}) > 1


def test_who_is_forecast_and_from_which_visits(tmp_path):
    """People of five kinds, three of each: only two kinds are forecast, from ADNI-1 to what comes after it."""
    kinds = [
        [("bl", "ADNI1", "NL"), ("m12", "ADNI1", "CN"), ("m36", "ADNIGO", "NL")],
        [("bl", "ADNI1", "NL"), ("m06", "ADNIGO", "NL"), ("m12", "ADNI1", "NL"), ("m24", "ADNI2", "NL")],
        [("bl", "ADNI1", "MCI"), ("m12", "ADNI1", "MCI to AD"), ("m24", "ADNI2", "AD")],  # ill in ADNI-1 already
        [("bl", "ADNI1", "MCI"), ("m24", "ADNI2", "MCI")],  # one visit in ADNI-1
        [("bl", "ADNI1", "NL"), ("m12", "ADNI1", "NL"), ("m24", "ADNI2", "")],  # not diagnosed later
    ]
    names = ["RID", "VISCODE", "COLPROT", "DX", "ADAS13", "MMSE", "Ventricles", "Hippocampus", "ICV_bl", "AGE"]
    names += ["ABETA_UPENNBIOMK9_04_19_17", "TAU_UPENNBIOMK9_04_19_17"]
    rows = [
        [rid, *visit, 10, 28, 20_000, 5000, 1_000_000, 70, 100, 200]
        for rid, visits in enumerate(kind for kind in kinds for _ in range(3))
        for visit in visits
    ]
    path = tmp_path / "TADPOLE_D1_D2.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    cohort = load_tadpole(path, 0)
    drawn = np.flatnonzero(~cohort.training)
    assert len(drawn) == 4  # two thirds of six
    assert drawn.max() < 6
    np.testing.assert_array_equal(cohort.last_visit[drawn], 2)  # month 12
    np.testing.assert_array_equal(cohort.test, [(k, 5 if k < 3 else 4) for k in drawn])
    np.testing.assert_array_equal(cohort.diagnosis[[0, 0, 6, 6, 6], [0, 2, 0, 2, 4]], [0, 0, 1, 2, 2])
    assert np.isfinite(cohort.biomarkers[:, 0, CSF]).all()
    assert np.isnan(cohort.biomarkers[:, 1:, CSF]).all()  # CSF of the first visit only


def test_without_the_file_the_way_out_is_named(tmp_path, monkeypatch):
    with pytest.raises(data.DataUnavailable, match=r"TADPOLE.*BOOK_PROFILE=book"):
        load_tadpole(tmp_path / "absent.csv", 0)
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    assert load_tadpole(tmp_path / "absent.csv", 0).training.sum() == 60


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate_cohort(0, adas_noise=-1), "adas_noise"),
        (lambda: simulate_cohort(0, n_train=0), "n_train"),
        (lambda: multiclass_auc(LABELS[:5], ROWS), "shapes"),
        (lambda: multiclass_auc(np.zeros(6), ROWS), "each of the classes"),
        (lambda: multiclass_auc(LABELS, -ROWS), "probabilities"),
        (lambda: balanced_classification_accuracy(LABELS, LABELS + 1), "classes from 0 to 2"),
        (lambda: mean_absolute_error(Y, GUESS[:3]), "shapes"),
        (lambda: mean_absolute_error(Y, GUESS * np.nan), "predictions hold NaN"),
        (lambda: mean_absolute_error(Y * np.nan, GUESS), "all NaN"),
        (lambda: weighted_error_score(Y, GUESS, UPPER, LOWER), "upper must lie above lower"),
        (lambda: weighted_error_score(Y, GUESS, LOWER, UPPER[:2]), "shapes"),
        (lambda: coverage_probability_accuracy(Y, LOWER, LOWER), "upper must lie above lower"),
        (lambda: randomised_best(Y, GUESS, rng(), copies=0), "copies"),
        (lambda: randomised_best(Y, GUESS, rng(), sd=-1.0), "sd"),
        (lambda: ensemble([], "mean"), "empty"),
        (lambda: ensemble([forecast()], "mode"), "how"),
        (lambda: leaderboard({}, Truth(Y, Y, Y)), "empty"),
        (lambda: LinearMixedModel().fit(Y, Y, np.arange(3)), "shape"),
        (lambda: LinearMixedModel().fit(Y, Y * np.nan, np.arange(4)), "NaN"),
        (lambda: LinearMixedModel().fit(Y, Y, np.zeros(4, int)), "two subjects"),
        (lambda: LinearMixedModel().fit(Y, Y, np.arange(4), rounds=0), "rounds"),
        (lambda: LinearMixedModel().fit(Y, Y, np.arange(4)).predict(np.arange(2), Y), "shape"),
        (lambda: DiseaseProgressionModel(0), "n_steps"),
        (lambda: DiseaseProgressionModel().fit(Y, np.zeros((5, 4, 5))), "biomarkers must have shape"),
        (lambda: DiseaseProgressionModel().fit(Y, np.full((5, 4, 6), np.nan)), "never measured"),
        (lambda: history_features(small(Y), np.array([0, 0]), np.array([1])), "shape"),
        (lambda: history_features(small(Y), np.array([1]), np.array([1])), "subject must be below 1"),
        (lambda: history_features(small(Y), np.array([0]), np.array([4])), "last_visit below 4"),
        (lambda: submissions(small(Y), np.array([0]), np.array([1.0, 2.0]), 0), "subject and time"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
