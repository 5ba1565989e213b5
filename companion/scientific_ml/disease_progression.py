"""Forecasting Alzheimer's disease: a simulated cohort, the metrics of a challenge, nine forecasters, their ensembles.

Marinescu et al., "The Alzheimer's Disease Prediction Of Longitudinal Evolution (TADPOLE) Challenge: Results after
1 Year Follow-up", MELBA 2021:019 (arXiv 2002.03419).

``n`` subjects have up to ``T`` visits at common ``times`` (years after the first), where ``B`` biomarkers are measured;
what was not measured is NaN. Diagnoses are 0 (CN, cognitively normal), 1 (MCI, mild cognitive impairment) and 2 (AD).
ADAS is the score ADAS-Cog13 in points (more is worse), volumes are in % of the intracranial volume (ICV).
A forecast is for ``m`` queries: a subject and a time each.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.random import Generator
from scipy.special import expit
from scipy.stats import rankdata
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, PolynomialFeatures, StandardScaler
from sklearn.svm import SVC, SVR

from companion import data, runtime, training

BIOMARKERS = ("ADAS", "MMSE", "ventricles", "hippocampus", "abeta", "tau")
ADAS, VENTRICLES, CSF = 0, 2, slice(4, 6)
SIGNS = (1, -1, 1, -1, -1, 1)  # whether a biomarker rises or falls with the disease
VISITS = (0, 0.5, 1, 1.5, 2, 3, 4, 5)
QUARTILE = 0.674  # half width of the central 50 % of a Gaussian, in standard deviations


class Truth(NamedTuple):
    """What was seen at the visits to be forecast; NaN where it was not measured."""

    diagnosis: Float[np.ndarray, " m"]
    adas: Float[np.ndarray, " m"]
    ventricles: Float[np.ndarray, " m"]


@dataclass(frozen=True)
class Cohort:
    """Subjects, their visits, and which of them are to be forecast.

    ``last_visit`` is the last visit that a forecaster may use: the very last one for training subjects. The rows of
    ``test`` are a subject and a later visit of theirs. ``latent_time`` is the true disease stage in years (or NaN).
    """

    times: Float[np.ndarray, " T"]
    age: Float[np.ndarray, " n"]
    biomarkers: Float[np.ndarray, "n T B"]
    diagnosis: Float[np.ndarray, "n T"]
    latent_time: Float[np.ndarray, "n T"]
    last_visit: Int[np.ndarray, " n"]
    test: Int[np.ndarray, "m 2"]

    @property
    def training(self) -> Bool[np.ndarray, " n"]:
        """Which subjects are open to the forecasters as a whole."""
        return self.last_visit == len(self.times) - 1

    @property
    def visible(self) -> Bool[np.ndarray, "n T"]:
        """Which visits a forecaster may use."""
        return np.arange(len(self.times)) <= self.last_visit[:, None]

    @property
    def truth(self) -> Truth:
        """What the forecasts of ``test`` are scored against."""
        subject, visit = self.test.T
        seen = self.biomarkers[subject, visit]
        return Truth(self.diagnosis[subject, visit], seen[:, ADAS], seen[:, VENTRICLES])


# --- cohorts ----------------------------------------------------------------------------------------------------------


def mean_biomarkers(tau: Float[np.ndarray, " *shape"]) -> Float[np.ndarray, "*shape B"]:
    """Expected biomarkers of the simulated cohort at disease stage ``tau`` (years), for a subject of typical brain.

    Ventricles are those of someone of speed 1 and mean growth who was at stage -11 with the median volume.
    """
    growth = 0.03 * (tau + 11) + 0.5 * (np.logaddexp(0, tau / 2.5) - math.log1p(math.exp(-11 / 2.5)))
    columns = [
        8 + 38 * expit((tau - 4) / 2.8),
        29 - 16 * expit((tau - 4.5) / 2.8),
        2.2 + growth,
        0.5 - 0.17 * expit((tau + 1) / 4),
        1 - 0.6 * expit((tau + 7) / 2.5),
        0.2 + 0.8 * expit((tau + 1.5) / 3.5),
    ]
    return np.stack(columns, axis=-1)


def simulate_cohort(seed: int, n_train: int = 400, n_test: int = 200, adas_noise: float = 6.0) -> Cohort:
    """Subjects who follow one course of disease, each with an onset, a speed and a brain of their own.

    A subject's stage is ``τ = t0 + α t``. Training subjects come first. Of a test subject the first five visits (two
    years) are open, and the visit of year 3 or 4 is to be forecast, in turn, or the other one if that was missed.

    Parameters
    ----------
    seed
        Of everything that is random.
    n_train, n_test
        Numbers of subjects.
    adas_noise
        Noise of the cognitive score in points: the standard deviation of an ADAS goes from 0.35 to 1.05 times this as
        the disease advances.

    Raises
    ------
    ValueError
        If there is no training subject, ``n_test`` is negative, or ``adas_noise`` is negative.
    """
    if n_train < 1 or n_test < 0:
        raise ValueError(f"n_train must be at least 1 and n_test not negative, got {n_train=}, {n_test=}")
    if not adas_noise >= 0:
        raise ValueError(f"adas_noise must not be negative, got {adas_noise}")
    rng, n, times = np.random.default_rng(seed), n_train + n_test, np.array(VISITS)

    def noise(each_visit: float, each_subject: float = 0.0) -> Float[np.ndarray, "n T"]:
        return each_subject * rng.normal(size=(n, 1)) + each_visit * rng.normal(size=(n, len(times)))

    t0, speed = rng.uniform(-11, 9, (n, 1)), np.exp(0.35 * rng.normal(size=(n, 1)))
    age, growth = rng.normal(73, 6, n), rng.normal(0.03, 0.02, (n, 1))
    tau = t0 + speed * times
    x = mean_biomarkers(tau)
    x[..., 0] += noise(0, 2.5) + 0.7 * adas_noise * (0.5 + expit((tau - 4) / 2.8)) * noise(1)
    x[..., 1] += noise(1.3)
    brain = 2.2 * np.exp(0.35 * rng.normal(size=(n, 1)) + 0.15 * (age[:, None] - 73) / 6) + 0.6 * expit(t0 / 3)
    # The volume grows at the rate ρ + 0.2 α sigmoid(τ/2.5), and this is its integral.
    x[..., 2] = brain + growth * times + 0.5 * (np.logaddexp(0, tau / 2.5) - np.logaddexp(0, t0 / 2.5)) + noise(0.035)
    x[..., 3] += noise(0.008, 0.04)
    x[..., 4] += noise(0.1)
    x[..., 5] += noise(0.12)
    x[:, 1:, CSF] = np.nan
    x[rng.random(n) > 0.55, :, CSF] = np.nan
    x[rng.random((n, len(times))) < 0.15, 2:4] = np.nan
    diagnosis = np.digitize(tau + noise(0.6, 0.9), [-1, 4]).astype(float)
    missed = (rng.random((n, len(times))) < 0.12) & (times > 0)
    x[missed], diagnosis[missed] = np.nan, np.nan

    test = np.arange(n_train, n)
    preferred = 5 + np.arange(n_test) % 2
    visit = np.where(missed[test, preferred], 11 - preferred, preferred)
    last_visit = np.where(np.arange(n) < n_train, len(times) - 1, 4)
    rows = np.stack([test, visit], axis=1)[~missed[test, visit]]
    return Cohort(times, age, x, diagnosis, tau, last_visit, rows)


_COLUMNS = ("ADAS13", "MMSE", "Ventricles", "Hippocampus", "ABETA_UPENNBIOMK9_04_19_17", "TAU_UPENNBIOMK9_04_19_17")
_DIAGNOSES = {"NL": 0.0, "CN": 0.0, "MCI": 1.0, "Dementia": 2.0, "AD": 2.0}


def _number(text: str) -> float:
    """A number of the table; "<80" and ">1700", the ends of an assay's range, count as these ends."""
    try:
        return float(text.strip().lstrip("<>"))
    except ValueError:
        return math.nan


def load_tadpole(path: str | Path, seed: int) -> Cohort:
    """The challenge's own data, split as for its leaderboard: the visits of ADNI-GO and ADNI-2 are to be forecast.

    Test subjects are two thirds of those who were CN or MCI at the last of two or more visits in ADNI-1 and went on to
    ADNI-GO or ADNI-2; the organisers' script draws them with replacement, we do so without. Everyone else is for
    training. Kept are yearly visits, and half-yearly ones for two years. In the ``smoke`` profile a small simulated
    cohort stands in.

    Parameters
    ----------
    path
        The file ``TADPOLE_D1_D2.csv``, which ADNI gives to those who apply for it.
    seed
        Of the draw of test subjects.

    Raises
    ------
    DataUnavailable
        If there is no such file.
    """
    if runtime.profile() == "smoke":
        return simulate_cohort(seed, 60, 40)
    if not Path(path).is_file():
        raise data.DataUnavailable(
            f"the data set of the TADPOLE challenge is not at {str(path)!r}: apply for it at adni.loni.usc.edu and put "
            "TADPOLE_D1_D2.csv there, or set BOOK_PROFILE=book, which simulates its subjects."
        )
    times = np.array([*VISITS, 6, 7, 8, 9, 10])
    position = {f"m{round(12 * t):02d}": k for k, t in enumerate(times)} | {"bl": 0}
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["VISCODE"] in position]
    index = {rid: k for k, rid in enumerate(sorted({row["RID"] for row in rows}, key=int))}
    n, T = len(index), len(times)
    age, x, diagnosis = np.full(n, np.nan), np.full((n, T, 6), np.nan), np.full((n, T), np.nan)
    first_study = np.zeros((n, T), dtype=bool)
    for row in rows:
        i, k = index[row["RID"]], position[row["VISCODE"]]
        x[i, k] = [_number(row[column]) for column in _COLUMNS]
        x[i, k, 2:4] *= 100 / _number(row["ICV_bl"])
        diagnosis[i, k] = _DIAGNOSES.get(row["DX"].split(" to ")[-1], math.nan)  # "NL to MCI" has become MCI
        first_study[i, k] = row["COLPROT"] == "ADNI1"
        age[i] = _number(row["AGE"])
    x[:, 1:, CSF] = np.nan
    later = ~np.isnan(diagnosis) & ~first_study
    last = T - 1 - first_study[:, ::-1].argmax(1)
    later &= np.arange(T) > last[:, None]
    eligible = (first_study.sum(1) >= 2) & later.any(1)
    diagnosed = last_observed(diagnosis, last)
    rng, last_visit = np.random.default_rng(seed), np.full(n, T - 1)
    for c in (0, 1):
        candidates = np.flatnonzero(eligible & (diagnosed == c))
        drawn = rng.choice(candidates, int(len(candidates) / 1.5), replace=False)
        last_visit[drawn] = last[drawn]
    test = np.argwhere(later & (last_visit < T - 1)[:, None])
    return Cohort(times, age, x, diagnosis, np.full((n, T), np.nan), last_visit, test)


# --- metrics ----------------------------------------------------------------------------------------------------------


def _measured(y: np.ndarray, *predictions: np.ndarray) -> list[np.ndarray]:
    """Targets that were measured, as first array, and the predictions for them."""
    arrays = [np.asarray(a, dtype=float) for a in (y, *predictions)]
    if arrays[0].ndim != 1 or any(len(a) != len(arrays[0]) for a in arrays):
        raise ValueError(f"targets (m,) and predictions need one row per visit, got shapes {[a.shape for a in arrays]}")
    if not all(np.isfinite(a).all() for a in arrays[1:]):
        raise ValueError("predictions hold NaN or infinite values; only targets may be missing")
    known = ~np.isnan(arrays[0])
    if not known.any():
        raise ValueError("targets are all NaN; at least one must have been measured")
    return [a[known] for a in arrays]


def _check_intervals(lower: np.ndarray, upper: np.ndarray) -> None:
    """Raise unless every interval has a positive width."""
    if not (upper > lower).all():
        raise ValueError(f"upper must lie above lower, got a smallest width of {np.min(upper - lower)}")


def multiclass_auc(labels: Float[np.ndarray, " m"], probabilities: Float[np.ndarray, "m L"]) -> float:
    """Multi-class area under the ROC curve, MAUC: how well probabilities order the visits of each pair of classes.

    Ties count half (mid-ranks). Labels are 0 to L-1, NaN ones are dropped; rows are scaled to sum 1.

    Raises
    ------
    ValueError
        If shapes differ, a class has no visit, or a probability is negative or not finite.

    Source: Hand and Till, 2001, equation 7; one of the challenge's metrics.
    """
    labels, p = _measured(labels, probabilities)
    if p.ndim != 2 or (p < 0).any() or not (p.sum(1) > 0).all():
        raise ValueError(f"probabilities (m, L) must be >= 0, and not all 0 in a row, got shape {p.shape}")
    classes = range(p.shape[1])
    if set(labels) != set(classes):
        raise ValueError(f"labels must hold each of the classes {list(classes)}, got {sorted(set(labels))}")
    p, areas = p / p.sum(1, keepdims=True), []
    for i in classes:
        for j in set(classes) - {i}:
            pair = (labels == i) | (labels == j)
            ranks, of_i = rankdata(p[pair, i]), labels[pair] == i
            n_i, n_j = of_i.sum(), (~of_i).sum()
            areas.append((ranks[of_i].sum() - n_i * (n_i + 1) / 2) / (n_i * n_j))
    return float(np.mean(areas))


def balanced_classification_accuracy(
    labels: Float[np.ndarray, " m"], predicted: Int[np.ndarray, " m"], n_classes: int = 3
) -> float:
    """Balanced classification accuracy, BCA: mean of sensitivity and specificity, averaged over classes.

    NaN labels are dropped; 1/2 stands for a ratio that is not defined, because a class has no visit or all of them.

    Raises
    ------
    ValueError
        If shapes differ, or a label or prediction is no class.
    """
    labels, predicted = _measured(labels, predicted)
    if not set(labels) | set(predicted) <= set(range(n_classes)):
        raise ValueError(f"labels and predicted must be classes from 0 to {n_classes - 1}")

    def share(hits: np.ndarray) -> float:
        return hits.mean() if len(hits) else 0.5

    ratios = [(share(predicted[labels == c] == c), share(predicted[labels != c] != c)) for c in range(n_classes)]
    return float(np.mean(ratios))


def mean_absolute_error(y: Float[np.ndarray, " m"], prediction: Float[np.ndarray, " m"]) -> float:
    """Mean absolute error, MAE; NaN targets are dropped. Raises ``ValueError`` if shapes differ."""
    y, prediction = _measured(y, prediction)
    return float(np.abs(prediction - y).mean())


def weighted_error_score(
    y: Float[np.ndarray, " m"],
    prediction: Float[np.ndarray, " m"],
    lower: Float[np.ndarray, " m"],
    upper: Float[np.ndarray, " m"],
) -> float:
    """Weighted error score, WES: mean absolute error with weights 1/(upper - lower); confident errors count more.

    NaN targets are dropped.

    Raises
    ------
    ValueError
        If shapes differ or an interval has no positive width.
    """
    y, prediction, lower, upper = _measured(y, prediction, lower, upper)
    _check_intervals(lower, upper)
    return float(np.average(np.abs(prediction - y), weights=1 / (upper - lower)))


def coverage_probability_accuracy(
    y: Float[np.ndarray, " m"], lower: Float[np.ndarray, " m"], upper: Float[np.ndarray, " m"]
) -> float:
    """Coverage probability accuracy, CPA: how far the share of targets strictly inside their interval is from 1/2.

    0 is best: intervals are 50 % intervals. NaN targets are dropped.

    Raises
    ------
    ValueError
        If shapes differ or an interval has no positive width.
    """
    y, lower, upper = _measured(y, lower, upper)
    _check_intervals(lower, upper)
    return float(abs(np.mean((lower < y) & (y < upper)) - 0.5))


def randomised_best(
    y: Float[np.ndarray, " m"], prediction: Float[np.ndarray, " m"], rng: Generator, copies: int = 100, sd: float = 2.0
) -> float:
    """Smallest MAE among copies of a forecast to which noise was added: what the luckiest of many guessers gets.

    Raises
    ------
    ValueError
        If shapes differ, there is no copy, or ``sd`` is negative.
    """
    if copies < 1 or not sd >= 0:
        raise ValueError(f"copies must be at least 1 and sd not negative, got {copies=}, {sd=}")
    y, prediction = _measured(y, prediction)
    return float(np.abs(prediction + sd * rng.normal(size=(copies, len(y))) - y).mean(1).min())


# --- forecasts, ensembles, leaderboard --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """A submission: diagnosis probabilities, and for ADAS and ventricles a best guess with a 50 % interval."""

    probabilities: Float[np.ndarray, "m 3"]
    adas: Float[np.ndarray, " m"]
    adas_lower: Float[np.ndarray, " m"]
    adas_upper: Float[np.ndarray, " m"]
    ventricles: Float[np.ndarray, " m"]
    ventricles_lower: Float[np.ndarray, " m"]
    ventricles_upper: Float[np.ndarray, " m"]

    def __getitem__(self, rows: slice | np.ndarray) -> Forecast:
        """The forecast for some of the queries."""
        return Forecast(*(getattr(self, field.name)[rows] for field in fields(self)))


def _with_intervals(probabilities, adas, adas_half, ventricles, ventricles_half) -> Forecast:
    """A forecast with symmetric intervals of the given half widths."""
    return Forecast(
        probabilities, adas, adas - adas_half, adas + adas_half,
        ventricles, ventricles - ventricles_half, ventricles + ventricles_half,
    )  # fmt: skip


def ensemble(forecasts: list[Forecast], how: str) -> Forecast:
    """Mean or median over submissions, entry by entry: probabilities (scaled to sum 1), best guesses, interval ends.

    Raises
    ------
    ValueError
        If there is no forecast, or ``how`` is neither ``"mean"`` nor ``"median"``.
    """
    if how not in ("mean", "median"):
        raise ValueError(f"how must be 'mean' or 'median', got {how!r}")
    if not forecasts:
        raise ValueError("forecasts is empty; an ensemble needs at least one")
    pool = {"mean": np.mean, "median": np.median}[how]
    p, *others = (pool([getattr(one, field.name) for one in forecasts], axis=0) for field in fields(Forecast))
    return Forecast(p / p.sum(1, keepdims=True), *others)


def leaderboard(forecasts: Mapping[str, Forecast], truth: Truth) -> dict[str, Float[np.ndarray, " methods"]]:
    """The challenge's table: eight metrics, and the mean rank over MAUC, ADAS MAE and ventricle MAE.

    One array per column, with an entry per forecast in their order; ``pandas.DataFrame`` takes it as it is. Ranks are
    competition ranks (1 is best, ties share the better one), by falling MAUC and by rising errors.

    Raises
    ------
    ValueError
        If there is no forecast, or one does not fit the truth.
    """
    if not forecasts:
        raise ValueError("forecasts is empty; a leaderboard needs at least one")
    rows = []
    for one in forecasts.values():
        adas = truth.adas, one.adas, one.adas_lower, one.adas_upper
        ventricles = truth.ventricles, one.ventricles, one.ventricles_lower, one.ventricles_upper
        rows.append([
            multiclass_auc(truth.diagnosis, one.probabilities),
            balanced_classification_accuracy(truth.diagnosis, one.probabilities.argmax(1)),
            *(
                score
                for y, prediction, lower, upper in (adas, ventricles)
                for score in (
                    mean_absolute_error(y, prediction),
                    weighted_error_score(y, prediction, lower, upper),
                    coverage_probability_accuracy(y, lower, upper),
                )
            ),
        ])  # fmt: skip
    names = [
        "MAUC",
        "BCA",
        *(f"{target} {metric}" for target in ("ADAS", "ventricle") for metric in ("MAE", "WES", "CPA")),
    ]
    table = dict(zip(names, np.array(rows).T, strict=True))
    columns = -table["MAUC"], table["ADAS MAE"], table["ventricle MAE"]
    return table | {"mean rank": np.mean([rankdata(column, method="min") for column in columns], axis=0)}


# --- two models of longitudinal data ----------------------------------------------------------------------------------


class LinearMixedModel:
    """Linear mixed effects: every subject has a line of their own, drawn around that of the population.

    ``y = (β0 + b0) + (β1 + b1) t + ε`` with ``b ~ N(0, D)`` for each subject and ``ε ~ N(0, σ²)``, fitted by EM (Laird
    and Ware, 1982).

    Attributes
    ----------
    fixed_effects, covariance, noise_variance
        ``β``, ``D`` and ``σ²``.
    random_effects
        Best linear unbiased predictions of ``b``, one row for each of ``subjects``.
    posterior_covariance
        Covariance of each subject's ``b`` given the data.
    """

    def fit(
        self, t: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], subject: Int[np.ndarray, " N"], rounds: int = 25
    ):
        """Fit to observations ``y`` at times ``t``, one row each, and return the model.

        Raises
        ------
        ValueError
            If shapes differ, a value is not finite, there are fewer than two subjects, or no round.
        """
        if not (np.shape(t) == np.shape(y) == np.shape(subject)) or np.ndim(t) != 1:
            raise ValueError(
                f"t, y, subject must have one shape (N,), got {np.shape(t)}, {np.shape(y)}, {np.shape(subject)}"
            )
        if not (np.isfinite(t).all() and np.isfinite(y).all()):
            raise ValueError("t or y holds NaN or infinite values; leave these observations out")
        self.subjects, of = np.unique(subject, return_inverse=True)
        if (n := len(self.subjects)) < 2 or rounds < 1:
            raise ValueError(f"a fit needs at least two subjects and one round, got {n} subjects and {rounds=}")
        Z = np.stack([np.ones(len(t)), t], axis=1)
        G, h = np.zeros((n, 2, 2)), np.zeros((n, 2))  # ZᵀZ and Zᵀy of each subject: all that the data say, with yᵀy
        np.add.at(G, of, Z[:, :, None] * Z[:, None, :])
        np.add.at(h, of, Z * y[:, None])
        self.noise_variance = np.var(y) / 2
        self.covariance = np.diag([np.var(y) / 2, np.var(y) / 2 / max(np.var(t), 1e-12)])
        for _ in range(rounds):
            s2 = self.noise_variance
            C = np.linalg.inv(np.linalg.inv(self.covariance) + G / s2)  # = D - D Zᵀ V⁻¹ Z D
            shrink = np.eye(2) - G @ C / s2  # Zᵀ V⁻¹ = shrink Zᵀ / σ²
            beta = np.linalg.solve((shrink @ G).sum(0), np.einsum("nij,nj->i", shrink, h))
            b = np.einsum("nij,nj->ni", C, h - G @ beta) / s2
            error = y - np.einsum("ki,ki->k", Z, beta + b[of])
            self.covariance = (b[:, :, None] * b[:, None, :] + C).mean(0)
            self.noise_variance = (np.square(error).sum() + np.einsum("nij,nij->", G, C)) / len(y)
            self.fixed_effects, self.random_effects, self.posterior_covariance = beta, b, C
        return self

    def predict(self, subject: Int[np.ndarray, " m"], t: Float[np.ndarray, " m"]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of a new observation of each subject; who was never seen gets the population's.

        Raises
        ------
        ValueError
            If shapes differ.
        """
        if np.shape(subject) != np.shape(t):
            raise ValueError(f"subject and t must have one shape, got {np.shape(subject)} and {np.shape(t)}")
        b = np.vstack([self.random_effects, np.zeros(2)])
        C = np.concatenate([self.posterior_covariance, self.covariance[None]])
        place = np.searchsorted(self.subjects, subject).clip(max=len(self.subjects) - 1)
        of = np.where(self.subjects[place] == subject, place, len(self.subjects))
        z = np.stack([np.ones(len(t)), t], axis=1)
        variance = np.einsum("mi,mij,mj->m", z, C[of], z) + self.noise_variance
        return np.einsum("mi,mi->m", z, self.fixed_effects + b[of]), np.sqrt(variance)


class DiseaseProgressionModel:
    """Disease progression model: all subjects run along the same sigmoid curves, each shifted and stretched in time.

    ``τ = t0 + exp(a) t`` and ``z_b = o_b + s_b A_b sigmoid((τ - c_b)/w_b) + r_b + ε`` for each biomarker ``b``, with
    ``a ~ N(0, 0.35²)``, ``t0 ~ N(0, 5²)``, and the subject's own level ``r_b``. The curves, ``t0`` and ``a`` are at the
    maximum of their joint posterior, found by Adam. ``r`` is Gaussian and integrated out: a joint maximum over ``r``
    and the variances does not exist, since the density grows without limit where both shrink to zero.

    Attributes
    ----------
    onset, speed
        ``t0`` (years) and ``exp(a)`` of each subject.
    latent_time
        ``τ`` (n, T) of each visit, in years.
    """

    def __init__(self, n_steps: int = 500) -> None:
        if n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {n_steps}")
        self.n_steps = n_steps

    def _curves(self, tau: Float[torch.Tensor, " *shape"]) -> Float[torch.Tensor, "*shape B"]:
        o, log_A, c, log_w = self._shape
        return o + torch.tensor(SIGNS) * log_A.exp() * torch.sigmoid((tau[..., None] - c) / log_w.exp())

    def fit(self, times: Float[np.ndarray, " T"], biomarkers: Float[np.ndarray, "n T B"]) -> DiseaseProgressionModel:
        """Fit to what is visible (all else NaN) of the six :data:`BIOMARKERS`, and return the model.

        Raises
        ------
        ValueError
            If shapes do not fit, or a biomarker was never measured.
        """
        if biomarkers.ndim != 3 or biomarkers.shape[1:] != (len(times), len(BIOMARKERS)):
            raise ValueError(f"biomarkers must have shape (n, {len(times)}, 6), got {biomarkers.shape}")
        if np.isnan(biomarkers).all((0, 1)).any():
            raise ValueError("biomarkers holds one that was never measured")
        self._mean, self._scale = np.nanmean(biomarkers, (0, 1)), np.nanstd(biomarkers, (0, 1))
        z, t = torch.from_numpy((biomarkers - self._mean) / self._scale), torch.from_numpy(np.asarray(times, float))
        seen = z.isfinite()
        z, count = z.nan_to_num(), seen.sum(1)  # count: (n, B)

        signs = torch.tensor(SIGNS, dtype=t.dtype)
        ones = torch.ones_like(signs)
        self._shape = torch.stack([-1.5 * signs, math.log(3) * ones, 0 * ones, math.log(3) * ones]).requires_grad_()
        log_sd = torch.stack([-0.5 * ones, -0.5 * ones]).requires_grad_()  # of ε and of r
        person = torch.zeros(2, len(z), dtype=t.dtype, requires_grad=True)  # t0 / 5 and a / 0.35

        def residual() -> tuple[torch.Tensor, torch.Tensor]:
            tau = 5 * person[0, :, None] + (0.35 * person[1, :, None]).exp() * t
            return torch.where(seen, z - self._curves(tau), 0), tau

        def negative_log_posterior(_: int) -> torch.Tensor:
            e, (s2, r2) = residual()[0], (2 * log_sd).exp()
            total = s2 + count * r2  # with r integrated out, the errors of a subject have covariance σ² I + σ_r² 11ᵀ
            square = (e.square().sum(1) - r2 / total * e.sum(1).square()) / s2
            log_det = (count - 1) * s2.log() + total.log()
            return 0.5 * (torch.where(count > 0, square + log_det, 0).sum() + person.square().sum())

        training.fit(negative_log_posterior, [self._shape, log_sd, person], steps=self.n_steps, lr=0.05)
        with torch.no_grad():
            (e, tau), (s2, r2) = residual(), (2 * log_sd).exp()
            self._level = r2 * e.sum(1) / (s2 + count * r2)
            self.onset, self.speed = 5 * person[0].numpy(), (0.35 * person[1]).exp().numpy()
            self.latent_time = tau.numpy()
        return self

    def stage(self, subject: Int[np.ndarray, " m"], time: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
        """Latent time ``τ`` of each subject at a time, in years."""
        return self.onset[subject] + self.speed[subject] * time

    @torch.no_grad()
    def forecast(self, subject: Int[np.ndarray, " m"], time: Float[np.ndarray, " m"]) -> Float[np.ndarray, "m B"]:
        """Expected biomarkers of each subject at a time, in their own units."""
        z = self._curves(torch.from_numpy(self.stage(subject, time))) + self._level[subject]
        return z.numpy() * self._scale + self._mean

    @torch.no_grad()
    def curves(self, tau: Float[np.ndarray, " m"]) -> Float[np.ndarray, "m B"]:
        """The curves of the population against latent time, in the units of the biomarkers."""
        return self._curves(torch.from_numpy(tau)).numpy() * self._scale + self._mean


# --- the nine submissions ---------------------------------------------------------------------------------------------


def last_observed(values: Float[np.ndarray, "n T"], last_visit: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Last value of each row that is not NaN, up to its last visit; NaN if there is none."""
    index = np.arange(values.shape[1])
    usable = ~np.isnan(values) & (index <= np.asarray(last_visit)[:, None])
    last = np.where(usable, index, 0).max(1)
    return np.where(usable.any(1), values[np.arange(len(values)), last], np.nan)


def history_features(
    cohort: Cohort,
    subject: Int[np.ndarray, " m"],
    last_visit: Int[np.ndarray, " m"],
    summaries: bool = True,
    csf: bool = True,
) -> Float[np.ndarray, "m d"]:
    """What is known of subjects after a visit, as vectors: nothing later enters.

    For each of ADAS, MMSE, ventricles and hippocampus the last value; with ``summaries`` also mean, maximum, minimum
    and slope, shrunken to ``Σ(t-t̄)(y-ȳ) / (Σ(t-t̄)² + 0.5)``; then age, last diagnosis (three indicators) and, with
    ``csf``, the two biomarkers of the cerebrospinal fluid. NaN where nothing was measured.

    Raises
    ------
    ValueError
        If shapes differ, or a subject or visit does not exist.
    """
    subject, last_visit = np.asarray(subject), np.asarray(last_visit)
    n, T = cohort.diagnosis.shape
    if subject.ndim != 1 or subject.shape != last_visit.shape:
        raise ValueError(f"subject and last_visit must have one shape (m,), got {subject.shape}, {last_visit.shape}")
    if not (((subject >= 0) & (subject < n)).all() and ((last_visit >= 0) & (last_visit < T)).all()):
        raise ValueError(f"subject must be below {n} and last_visit below {T}, none negative")
    open_ = np.arange(T) <= last_visit[:, None]
    columns = [cohort.age[subject]]
    for b in range(4):
        y = np.where(open_, cohort.biomarkers[subject, :, b], np.nan)
        columns.append(last_observed(y, last_visit))
        if summaries:
            seen = ~np.isnan(y)
            count = np.where(seen.any(1), seen.sum(1), np.nan)  # without a value, all summaries are NaN
            t, filled = np.where(seen, cohort.times, 0), np.where(seen, y, 0)
            t_mean, y_mean = t.sum(1) / count, filled.sum(1) / count
            dt, dy = (np.where(seen, a - mean[:, None], 0) for a, mean in ((t, t_mean), (filled, y_mean)))
            slope = (dt * dy).sum(1) / ((dt**2).sum(1) + 0.5)
            highest, lowest = np.where(seen, y, -np.inf).max(1), np.where(seen, y, np.inf).min(1)
            columns += [y_mean, *(np.where(count > 0, a, np.nan) for a in (highest, lowest, slope))]
    diagnosis = last_observed(cohort.diagnosis[subject], last_visit)
    columns += [np.where(np.isnan(diagnosis), np.nan, diagnosis == c) for c in range(3)]
    if csf:
        columns += [*cohort.biomarkers[subject, 0, CSF].T]
    return np.stack(columns, axis=1)


def _times_horizon(x: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m e"]:
    """Features, and their products with the last of them, the horizon: a slope acts for as long as one looks ahead."""
    return np.column_stack([x, x[:, :-1] * x[:, -1:]])


def _learners(seed: int) -> dict[str, tuple[dict, list]]:
    """For each feature method the features it sees, and its models of diagnosis, ADAS and ventricles."""

    def on_scaled(*models: object) -> list:
        return [make_pipeline(SimpleImputer(), StandardScaler(), model) for model in models]

    def linear() -> list:
        grows = (
            make_pipeline(SimpleImputer(), FunctionTransformer(_times_horizon), StandardScaler(), Ridge(10))
            for _ in range(2)
        )
        return [*on_scaled(LogisticRegression(C=1, max_iter=1000)), *grows]

    forests = [
        RandomForestClassifier(60, min_samples_leaf=5, random_state=seed),
        *(RandomForestRegressor(40, min_samples_leaf=8, random_state=seed) for _ in range(2)),
    ]
    boosting = dict(max_iter=60, max_depth=3, learning_rate=0.08, random_state=seed)
    return {
        "Linear": ({}, linear()),
        "LinearCrossSect": (dict(summaries=False), linear()),
        "LinearNoCSF": (dict(csf=False), linear()),
        "SVM": ({}, on_scaled(CalibratedClassifierCV(SVC(C=1), ensemble=False), SVR(C=3), SVR(C=0.5, epsilon=0.02))),
        "Forest": ({}, [make_pipeline(SimpleImputer(), model) for model in forests]),
        "Boosting": (
            {},
            [
                HistGradientBoostingClassifier(**boosting),
                *(HistGradientBoostingRegressor(**boosting) for _ in range(2)),
            ],
        ),
    }


def _filled(values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """The mean in place of what is missing."""
    return np.where(np.isnan(values), np.nanmean(values), values)


def _last_values(
    cohort: Cohort, subject: np.ndarray, last_visit: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Last diagnosis, ADAS and ventricle volume; where there is none, MCI and the mean of the others."""
    diagnosis, *values = (
        last_observed(column, last_visit)
        for column in (cohort.diagnosis[subject], *(cohort.biomarkers[subject, :, b] for b in (ADAS, VENTRICLES)))
    )
    return np.nan_to_num(diagnosis, nan=1).astype(int), *(_filled(value) for value in values)


def _half_widths(errors: np.ndarray, group: np.ndarray, new_group: np.ndarray) -> np.ndarray:
    """Median absolute error of the group (0, 1, 2) of each query: half of new errors should be smaller."""
    median = [
        np.nanmedian(np.abs(errors[group == c])) if (group == c).any() else np.nanmedian(np.abs(errors))
        for c in range(3)
    ]
    return np.array(median)[new_group]


def feature_submissions(
    cohort: Cohort, subject: Int[np.ndarray, " m"], time: Float[np.ndarray, " m"], seed: int
) -> dict[str, Forecast]:
    """Forecasts by six methods of machine learning, which map features of the history to a later visit.

    A training pair is a subject's history up to visit 2, 3 or 4 and one of the next two visits. Three quarters of the
    training subjects fit the models, the others calibrate the intervals. The models of ADAS and ventricles predict the
    *change* from the last value. Arguments as for :func:`submissions`.
    """
    rng = np.random.default_rng(seed)
    people = rng.permutation(np.flatnonzero(cohort.training))
    who, cut = (a.ravel() for a in np.meshgrid(people, [2, 3, 4], indexing="ij"))
    visit = cut + rng.integers(1, 3, len(cut))
    fitting, now = np.isin(who, people[: 3 * len(people) // 4]), cohort.last_visit[subject]
    stage, stage_now = (_last_values(cohort, *rows)[0] for rows in ((who, cut), (subject, now)))
    columns = cohort.diagnosis, cohort.biomarkers[..., ADAS], cohort.biomarkers[..., VENTRICLES]

    result = {}
    for name, (options, models) in _learners(seed).items():
        x, query, parts = (
            history_features(cohort, who, cut, **options),
            history_features(cohort, subject, now, **options),
            [],
        )
        for model, column in zip(models, columns, strict=True):
            seen = np.where(np.isnan(column), np.nan, cohort.times)
            horizon, ahead = (
                cohort.times[visit] - last_observed(seen[who], cut),
                time - last_observed(seen[subject], now),
            )
            inputs, asked, y = np.column_stack([x, horizon]), np.column_stack([query, ahead]), column[who, visit]
            rows = fitting & ~np.isnan(y)
            if column is cohort.diagnosis:
                parts.append(model.fit(inputs[rows], y[rows].astype(int)).predict_proba(asked))
                continue
            before, value = _filled(last_observed(column[who], cut)), _filled(last_observed(column[subject], now))
            model.fit(inputs[rows], (y - before)[rows])
            errors = (y - before)[~fitting] - model.predict(inputs[~fitting])
            parts += [value + model.predict(asked), _half_widths(errors, stage[~fitting], stage_now)]
        result[name] = _with_intervals(*parts)
    return result


def submissions(
    cohort: Cohort, subject: Int[np.ndarray, " m"], time: Float[np.ndarray, " m"], seed: int, n_steps: int = 500
) -> dict[str, Forecast]:
    """Forecasts of all nine methods, from training subjects and from the visible visits of the others.

    Parameters
    ----------
    cohort
        What is known; visits after ``last_visit`` are not looked at.
    subject, time
        Whom to forecast, and when, in years after the first visit (any time: monthly forecasts are queries, too).
    seed
        Of the split into fitting and calibration, of training pairs and of forests.
    n_steps
        Steps of the disease progression model.

    Raises
    ------
    ValueError
        If shapes differ.
    """
    subject, time = np.asarray(subject), np.asarray(time, float)
    if subject.ndim != 1 or subject.shape != time.shape:
        raise ValueError(f"subject and time must have one shape (m,), got {subject.shape} and {time.shape}")
    x = np.where(cohort.visible[..., None], cohort.biomarkers, np.nan)
    diagnosis = np.where(cohort.visible, cohort.diagnosis, np.nan)
    diagnosed = ~np.isnan(diagnosis) & cohort.training[:, None]
    last_diagnosis, last_adas, last_ventricles = _last_values(cohort, subject, cohort.last_visit[subject])
    last = _with_intervals(np.eye(3)[last_diagnosis], last_adas, 2.7, last_ventricles, 0.1)

    parts = []
    for b in (ADAS, VENTRICLES):
        who, visit = np.nonzero(~np.isnan(x[..., b]))
        model = LinearMixedModel().fit(cohort.times[visit], x[who, visit, b], who)
        mean, sd = model.predict(subject, time)
        parts += [mean, QUARTILE * sd]
    known = diagnosed & ~np.isnan(x[..., ADAS])
    likelihood = GaussianNB(priors=[1 / 3] * 3).fit(x[known][:, [ADAS]], diagnosis[known])
    mixed = _with_intervals(likelihood.predict_proba(parts[0][:, None]), *parts)

    dpm = DiseaseProgressionModel(n_steps).fit(cohort.times, x)
    staging = make_pipeline(PolynomialFeatures(2), StandardScaler(), LogisticRegression())
    staging.fit(dpm.latent_time[diagnosed][:, None], diagnosis[diagnosed])
    p, z = staging.predict_proba(dpm.stage(subject, time)[:, None]), dpm.forecast(subject, time)
    who, visit = np.nonzero(diagnosed)
    errors = x[who, visit] - dpm.forecast(who, cohort.times[visit])
    half = [_half_widths(errors[:, b], diagnosis[who, visit], p.argmax(1)) for b in (ADAS, VENTRICLES)]
    progression = _with_intervals(p, z[:, ADAS], 1.1 * half[0], z[:, VENTRICLES], 1.6 * half[1])

    learned = feature_submissions(cohort, subject, time, seed)
    return {"LastVisit": last, "MixedEffects": mixed, **learned, "ProgressionModel": progression}


def diagnosis_from_first_visit(cohort: Cohort, csf: bool) -> Float[np.ndarray, "m 3"]:
    """Diagnosis probabilities of the ``test`` visits by logistic regression on the first visit alone.

    It is fitted to the visits of training subjects in years 3 and 4; ``csf`` says whether the first visit counts with
    its two biomarkers of the cerebrospinal fluid.
    """
    who, visit = np.nonzero(cohort.training[:, None] & np.isin(cohort.times, [3, 4]) & ~np.isnan(cohort.diagnosis))

    def inputs(subject: np.ndarray, visit: np.ndarray) -> np.ndarray:
        features = history_features(cohort, subject, np.zeros_like(subject), summaries=False, csf=csf)
        return np.column_stack([features, cohort.times[visit]])

    model = make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression(C=1, max_iter=1000))
    return model.fit(inputs(who, visit), cohort.diagnosis[who, visit].astype(int)).predict_proba(inputs(*cohort.test.T))
