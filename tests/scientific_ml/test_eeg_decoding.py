"""The simulator against its spectrum and variances; decoders and scores against scikit-learn and closed forms."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import periodogram
from scipy.stats import special_ortho_group
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from companion import data
from companion.scientific_ml import eeg_decoding
from companion.scientific_ml.eeg_decoding import (
    ContrastiveDecoder,
    RidgeDecoder,
    condition_residuals,
    cosine_similarity,
    data_multiplier,
    evoked_response,
    info_nce,
    lda_auc,
    log_linear_fit,
    make_eeg_world,
    noise_whitener,
    pink_noise,
    recording,
    retrieval_accuracy,
    simulate_trials,
    time_bins,
    trial_snr,
)

N = [100, 200, 400, 800, 1600, 3200, 6400]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


WORLD = make_eeg_world(generator())
E = normal(40, 24)


# --- the simulator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_noise_has_the_spectrum_and_the_variance_it_should(exponent):
    noise = pink_noise(2000, 4, 70, generator(), exponent)
    assert noise.shape == (2000, 4, 70)
    frequency, power = periodogram(noise.numpy(), fs=100, window="hann")
    band = (frequency >= 3) & (frequency <= 45)
    slope = np.polyfit(np.log(frequency[band]), np.log(power.mean((0, 1))[band]), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.05)
    at_each_time = noise.square().mean((0, 1)).sqrt()  # stationary: no time is quieter, and none is scaled
    assert at_each_time.mean() == pytest.approx(1, abs=0.01)
    assert (at_each_time - 1).abs().max() < 5 / (2 * 8000) ** 0.5


def test_noise_is_independent_between_channels_and_epochs_keep_their_size():
    noise = pink_noise(4000, 3, 70, generator())
    assert (torch.einsum("nct,ndt->cd", noise, noise) / noise[:, 0].numel() - torch.eye(3)).abs().max() < 0.05
    assert noise.std(-1).std() > 0.1
    assert pink_noise(50_000, 1, 2, generator()).std() == pytest.approx(
        1, abs=0.01
    )  # the highest frequency counts half
    white = pink_noise(4000, 1, 70, generator(), 0.0)[:, 0]
    assert (white.mT @ white / 4000 - torch.eye(70)).abs().max() < 6 / 4000**0.5


def test_electrodes_lie_on_the_half_sphere_and_sources_at_the_back():
    torch.testing.assert_close(WORLD.electrodes.norm(dim=1), torch.ones(32))
    assert WORLD.electrodes[:, 2].min() > 0
    gaps = torch.cdist(WORLD.electrodes, WORLD.electrodes) + 9 * torch.eye(32)
    assert gaps.amin(1).min() > 0.2  # evenly spread
    strength = WORLD.leadfield.square().sum(1)
    assert strength[WORLD.electrodes[:, 1] < 0].mean() > 2 * strength[WORLD.electrodes[:, 1] > 0].mean()
    distance = torch.cdist(WORLD.electrodes, WORLD.electrodes)
    covariance = (-(distance**2) / 0.72).exp() + 0.15 * torch.eye(32)
    torch.testing.assert_close(WORLD.mixing @ WORLD.mixing.mT, covariance, atol=1e-5, rtol=0)


def test_without_noise_a_trial_is_the_evoked_response_written_out():
    x = simulate_trials(WORLD, E, 0.0, generator())
    torch.testing.assert_close(x, evoked_response(WORLD, E))
    by_hand = torch.zeros(32, 70)
    for s in range(12):
        amplitude = torch.tanh(WORLD.weights[s] @ E[3]) + WORLD.constants[s]
        by_hand += amplitude * torch.outer(WORLD.leadfield[:, s], WORLD.time_courses[s])
    by_hand -= by_hand[:, :10].mean(1, keepdim=True)
    torch.testing.assert_close(x[3], by_hand, atol=1e-5, rtol=0)


def test_noise_is_mixed_scaled_averaged_and_baseline_corrected():
    e = E[:1].expand(2500, -1)
    evoked = evoked_response(WORLD, e)
    single = simulate_trials(WORLD, e, 1.0, generator(1)) - evoked
    assert single[..., :10].mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(simulate_trials(WORLD, e, 0.5, generator(1)) - evoked, 0.5 * single, atol=1e-5, rtol=0)
    many = simulate_trials(WORLD, e, 1.0, generator(2), n_average=20) - evoked
    assert many.var() / single.var() == pytest.approx(1 / 20, rel=0.05)
    rows = single.movedim(1, -1).flatten(0, 1)
    covariance = rows.mT @ rows / len(rows)
    expected = WORLD.mixing @ WORLD.mixing.mT
    scale = covariance.trace() / expected.trace()  # baseline correction changes the variance in time
    assert (covariance / scale - expected).abs().max() < 0.1
    assert trial_snr(evoked, evoked + single) == pytest.approx(0, abs=1e-6)  # one image: no variance over trials


def test_snr_falls_with_the_square_of_the_noise_level():
    e = normal(400, 24, seed=2)
    evoked = evoked_response(WORLD, e)
    low, high = (trial_snr(evoked, simulate_trials(WORLD, e, level, generator())) for level in (0.424, 1.131))
    assert low / high == pytest.approx((1.131 / 0.424) ** 2, rel=1e-4)
    noise = simulate_trials(WORLD, e, 0.424, generator()) - evoked
    by_hand = evoked.numpy().var(0).mean() / noise.numpy().var(0).mean()
    assert low == pytest.approx(by_hand, rel=1e-4)


def test_the_world_s_exponent_colours_the_noise():
    white = replace(WORLD, exponent=0.0, mixing=torch.eye(32))
    noise = simulate_trials(white, E, 1.0, generator()) - evoked_response(white, E)
    bins, _ = time_bins(noise, white.times)
    slow = simulate_trials(WORLD, E, 1.0, generator()) - evoked_response(WORLD, E)
    slow_bins, _ = time_bins(slow, WORLD.times)
    assert bins.var() / noise.var() < 0.5 < slow_bins.var() / slow.var()  # averaging removes white noise only


# --- features ---------------------------------------------------------------------------------------------------------


def test_bins_are_means_and_one_starts_at_onset():
    x = normal(5, 2, 70)
    bins, start = time_bins(x, WORLD.times)
    assert bins.shape == (5, 2, 23)
    assert float(start[3]) == 0
    torch.testing.assert_close(bins[..., 3], x[..., 10:13].mean(-1))
    torch.testing.assert_close(bins[..., -1], x[..., 67:70].mean(-1))


def test_residuals_have_no_mean_in_any_condition_and_whitening_whitens():
    condition = torch.arange(60) % 4
    x = WORLD.mixing @ normal(60, 32, 20) + normal(4, 32, 20, seed=1)[condition]
    before = x.clone()
    residuals = condition_residuals(x, condition)
    for k in range(4):
        assert residuals[condition == k].mean(0).abs().max() < 1e-5
    whitener = noise_whitener(residuals.double())
    covariance, _ = ledoit_wolf(residuals.double().movedim(1, -1).flatten(0, 1).numpy())
    torch.testing.assert_close(
        whitener @ torch.from_numpy(covariance) @ whitener, torch.eye(32).double(), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(whitener, whitener.mT, atol=1e-12, rtol=0)
    assert torch.equal(x, before)


# --- decoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [24, 200])
def test_ridge_is_scikit_learn_s(n):
    x = normal(n, 5, 10)
    e = x.flatten(1) @ normal(50, 3, seed=1) / 5 + normal(n, 3, seed=2)
    new, ours = normal(30, 5, 10, seed=3), RidgeDecoder().fit(x, e)
    theirs = Ridge(alpha=ours.penalty).fit(x.flatten(1).double().numpy(), e.double().numpy())
    expected = theirs.predict(new.flatten(1).double().numpy())
    torch.testing.assert_close(ours.predict(new.double()), torch.from_numpy(expected), atol=1e-8, rtol=0)
    kept, errors = n - n // 8, []
    for penalty in 10.0 ** np.arange(1, 7):
        model = Ridge(alpha=penalty).fit(x[:kept].flatten(1).double().numpy(), e[:kept].double().numpy())
        errors.append(np.square(model.predict(x[kept:].flatten(1).double().numpy()) - e[kept:].numpy()).mean())
    assert ours.penalty == 10.0 ** (1 + int(np.argmin(errors)))


def test_the_penalty_does_not_see_test_data_and_noise_raises_it():
    x, w = normal(400, 1, 30), normal(30, 4, seed=1)
    clean = RidgeDecoder().fit(x, x.flatten(1) @ w)
    pure_noise = RidgeDecoder().fit(x, normal(400, 4, seed=2))
    assert clean.penalty == 10
    assert pure_noise.penalty > 1000


def test_info_nce_in_its_limits():
    assert float(info_nce(torch.eye(6), torch.eye(6), torch.tensor(200.0))) == pytest.approx(0, abs=1e-6)
    assert float(info_nce(normal(6, 3), normal(6, 3, seed=1), torch.tensor(0.0))) == pytest.approx(math.log(6))
    f, e = normal(6, 3), normal(6, 3, seed=1)
    assert float(info_nce(f, e, torch.tensor(2.0))) == pytest.approx(float(info_nce(5 * e, f, torch.tensor(2.0))))
    z = 2 * F.normalize(f) @ F.normalize(e).mT
    right = (-z.log_softmax(1).diagonal().mean() - z.log_softmax(0).diagonal().mean()) / 2
    assert float(info_nce(f, e, torch.tensor(2.0))) == pytest.approx(float(right))


def test_the_network_learns_and_repeats_itself():
    x = normal(256, 6, 12)
    e = x.flatten(1) @ normal(72, 4, seed=1)
    state = torch.get_rng_state()
    networks = [ContrastiveDecoder(6, 12, 4, generator=generator()).fit(x, e, 0, epochs=60) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())  # the global generator is as it was
    assert torch.equal(networks[0].predict(x), networks[1].predict(x))
    untrained = ContrastiveDecoder(6, 12, 4, generator=generator()).eval()
    assert retrieval_accuracy(networks[0].predict(x), e, 5) > 0.4 > 0.1 > retrieval_accuracy(untrained.predict(x), e, 5)


def test_each_seed_of_the_network_counts(monkeypatch):
    """The generator sets the first weights, the seed of the fit both the batches and the dropout."""
    x, e = normal(280, 3, 6), normal(280, 2, seed=1)

    def fitted(seed, dropout, start=0):
        network = ContrastiveDecoder(3, 6, 2, generator=generator(start))
        for layer in network.network:
            if isinstance(layer, torch.nn.Dropout):
                layer.p = dropout
        return network.fit(x, e, seed, epochs=2).predict(x)

    assert not torch.equal(fitted(0, 0.0), fitted(1, 0.0))  # batches
    assert not torch.equal(fitted(0, 0.0), fitted(0, 0.0, start=1))
    monkeypatch.setattr(eeg_decoding.training, "minibatches", lambda n, batch, _: iter([torch.arange(batch)] * 2))
    assert torch.equal(fitted(0, 0.0), fitted(1, 0.0))
    assert not torch.equal(fitted(0, 0.3), fitted(1, 0.3))  # dropout


def test_the_factor_of_the_cosines_starts_at_e_squared_and_is_learned(monkeypatch):
    factors = []

    def spy(f, e, scale):
        factors.append(scale.item())
        return info_nce(f, e, scale)

    monkeypatch.setattr(eeg_decoding, "info_nce", spy)
    ContrastiveDecoder(3, 6, 2, generator=generator()).fit(normal(16, 3, 6), normal(16, 2), 0, epochs=5)
    assert factors[0] == pytest.approx(math.exp(2))
    assert factors[-1] != pytest.approx(factors[0], rel=1e-4)


def test_lda_is_scikit_learn_s_at_each_time():
    y, y_test = torch.arange(300) % 2, torch.arange(90) % 2
    x, test = (WORLD.mixing[:6, :6] @ normal(n, 6, 4, seed=n) for n in (300, 90))
    x[y == 1, 2, 1] += 0.8
    test[y_test == 1, 2, 1] += 0.8
    ours = lda_auc(x.double(), y, test.double(), y_test)
    for t in range(4):
        theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x[..., t].double().numpy(), y.numpy())
        score = theirs.decision_function(test[..., t].double().numpy())
        assert float(ours[t]) == pytest.approx(roc_auc_score(y_test.numpy(), score), abs=1e-9)
    assert int(ours.argmax()) == 1


# --- scores -----------------------------------------------------------------------------------------------------------


def test_retrieval_of_perfect_constant_and_permuted_predictions():
    gallery = normal(200, 24)
    assert retrieval_accuracy(gallery, gallery, 1) == 1
    assert retrieval_accuracy(torch.ones(200, 24), gallery, 5) == 0  # ties count against
    for k in (1, 5, 50):
        orders = [torch.randperm(200, generator=generator(seed)) for seed in range(100)]
        found = np.mean([retrieval_accuracy(gallery[order], gallery, k) for order in orders])
        assert found == pytest.approx(k / 200, abs=5 * (k / 200 * (1 - k / 200) / 20_000) ** 0.5)
    assert retrieval_accuracy(normal(200, 24, seed=1), gallery, 200) == 1


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100), k=st.integers(1, 30))
def test_retrieval_does_not_depend_on_scale_rotation_or_offset(seed, scale, k):
    gallery = normal(30, 5, seed=seed).double()
    guess = gallery + normal(30, 5, seed=seed + 1).double()
    turn = torch.from_numpy(special_ortho_group.rvs(5, random_state=seed))
    offset = normal(5, seed=seed + 2).double()
    reference = retrieval_accuracy(guess, gallery, k)
    assert retrieval_accuracy(scale * guess, gallery, k) == reference
    assert retrieval_accuracy(guess @ turn, gallery @ turn, k) == reference
    assert retrieval_accuracy(guess + offset, gallery + offset, k) == reference


def test_similarity_is_the_correlation_of_centred_rows():
    a, b = normal(7, 5), normal(9, 5, seed=1)
    x, y = (a - a.mean(0)).numpy()[2], (b - b.mean(0)).numpy()[4]
    assert float(cosine_similarity(a, b)[2, 4]) == pytest.approx(
        x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-5
    )


def test_the_log_linear_law_is_recovered():
    slope, intercept, r2 = log_linear_fit(N, 0.03 * np.log2(N) - 0.1)
    assert (slope, intercept, r2) == pytest.approx((0.03, -0.1, 1), abs=1e-10)
    noisy = 0.03 * np.log2(N) + 0.01 * np.random.default_rng(0).normal(size=7)
    _, _, r2 = log_linear_fit(N, noisy)
    assert r2 == pytest.approx(np.corrcoef(np.log2(N), noisy)[0, 1] ** 2)


def test_the_multiplier_of_parallel_lines_is_their_shift():
    a = 0.05 * np.log2(N)
    b = a - 3 * 0.05
    for wanted in (a[0] + 0.001, 0.4, b[-1]):
        assert data_multiplier(N, a, b, wanted) == pytest.approx(8)
        assert data_multiplier(N, b, a, wanted) == pytest.approx(1 / 8)
    assert math.isnan(data_multiplier(N, a, b, a[0] - 0.01))  # a starts above it
    assert math.isnan(data_multiplier(N, a, b, b[-1] + 0.01))  # b never gets there
    assert data_multiplier(N, a, a, 0.5) == 1
    dip = a.copy()
    dip[3] = 0
    assert data_multiplier(N, dip, a, a[5]) == pytest.approx(1)
    dip[3] = a[2] - 0.01  # an accuracy once reached stays reached
    assert data_multiplier(N, dip, a, (a[1] + a[2]) / 2) == pytest.approx(1)


# --- the whole --------------------------------------------------------------------------------------------------------


def test_more_noise_means_less_is_decoded_and_shuffled_pairs_nothing():
    e = normal(1200, 24, seed=5)
    score = {}
    for level in (0.1, 1.0):
        x = simulate_trials(WORLD, e, level, generator(6))
        bins, start = time_bins(x, WORLD.times)
        bins = bins[..., start >= 0]
        ridge = RidgeDecoder().fit(bins[:1000], e[:1000])
        score[level] = retrieval_accuracy(ridge.predict(bins[1000:]), e[1000:], 10)
        shuffled = RidgeDecoder().fit(bins[:1000], e[:1000].flip(0))
        assert retrieval_accuracy(shuffled.predict(bins[1000:]), e[1000:], 10) < 0.12
    assert score[0.1] > 0.6 > 0.4 > score[1.0] > 0.12


def test_recordings_that_are_not_there_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    for name in ("alljoined", "things_eeg2"):
        with pytest.raises(data.DataUnavailable, match=f"'{name}'.*BOOK_PROFILE=book"):
            recording(name, 1)
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    found = recording("alljoined", 1)
    assert len(found.x) == len(found.e) == 300
    assert found.x_test.shape == (20, 32, 70)


@pytest.mark.parametrize("name", ["alljoined", "things_eeg2"])
def test_recordings_are_read_as_their_authors_store_them(name, monkeypatch, tmp_path):
    """Files of the right layout: every trial goes with its image, and test trials are averaged over repeats."""
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    monkeypatch.setattr(eeg_decoding, "_clip", lambda paths: torch.tensor([[float(path[-9:-4])] for path in paths]))
    trials = {"training": normal(4, 2, 3, 5), "test": normal(2, 2, 3, 5, seed=1)}  # images, repeats, channels, samples
    folder = tmp_path / name / ("preprocessed_eeg/sub-07" if name == "alljoined" else "sub-07")
    folder.mkdir(parents=True)
    order = {"training": [2, 0, 1, 3, 3, 1, 0, 2], "test": [1, 0, 0, 1]}
    if name == "alljoined":
        partition = {"training": "stim_train", "test": "stim_test"}
        rows = [(partition[part], f"images/{image:05d}.jpg", False) for part in order for image in order[part]]
        rows.append(("stim_train", "images/00009.jpg", True))  # a trial that was not recorded
        for part, images in order.items():
            seen = [0] * 4
            flat = torch.empty(len(images), 3, 5)
            for k, image in enumerate(images):
                flat[k] = trials[part][image, seen[image]]
                seen[image] += 1
            content = pickle.dumps({"preprocessed_eeg_data": flat.numpy()})
            (folder / f"preprocessed_eeg_{part}_flat.npy").write_bytes(content)
        pandas = pytest.importorskip("pandas")
        table = pandas.DataFrame(rows, columns=["partition", "image_path", "dropped"])
        monkeypatch.setattr(pandas, "read_parquet", lambda path: table)
    else:
        for part, x in trials.items():
            content = pickle.dumps({"preprocessed_eeg_data": x.numpy()})
            (folder / f"preprocessed_eeg_{part}.npy").write_bytes(content)
            for image in range(len(x)):
                place = tmp_path / name / "images_set" / f"{part}_images" / f"concept{image}"
                place.mkdir(parents=True)
                (place / f"{image:05d}.jpg").touch()
    found = recording(name, 7)
    assert found.x.shape == (8, 3, 5)
    for x, e in zip(found.x, found.e, strict=True):
        assert any(torch.equal(x, repeat) for repeat in trials["training"][int(e)])
    torch.testing.assert_close(found.x_test, trials["test"].mean(1))
    assert found.e_test[:, 0].tolist() == [0, 1]


# --- what a reader can get wrong --------------------------------------------------------------------------------------

X = normal(16, 3, 10)
Y = torch.arange(16) % 2


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: pink_noise(2, 2, 10, generator(), -0.1), "exponent"),
        (lambda: pink_noise(2, 2, 10, generator(), math.nan), "exponent"),
        (lambda: pink_noise(2, 0, 10, generator()), "channels"),
        (lambda: make_eeg_world(generator(), 0), "n_channels"),
        (lambda: make_eeg_world(generator(), embedding_dim=0), "embedding_dim"),
        (lambda: evoked_response(WORLD, E[:, :23]), "embeddings"),
        (lambda: evoked_response(WORLD, E * math.nan), "embeddings"),
        (lambda: simulate_trials(WORLD, E[0], 1.0, generator()), "embeddings"),
        (lambda: simulate_trials(WORLD, E, -1.0, generator()), "noise_level"),
        (lambda: simulate_trials(WORLD, E, 1.0, generator(), 0), "n_average"),
        (lambda: trial_snr(X, X[:5]), "evoked"),
        (lambda: time_bins(X, torch.arange(9)), "times"),
        (lambda: time_bins(X, torch.arange(10), 11), "width"),
        (lambda: condition_residuals(X, Y[:5]), "condition"),
        (lambda: noise_whitener(X[0]), "residuals"),
        (lambda: noise_whitener(X * math.nan), "residuals"),
        (lambda: noise_whitener(0 * X), "residuals"),
        (lambda: RidgeDecoder().fit(X, E[:15]), "X and E"),
        (lambda: RidgeDecoder().fit(X[:7], E[:7]), "X and E"),
        (lambda: RidgeDecoder().fit(X * math.inf, E[:16]), "X and E"),
        (lambda: ContrastiveDecoder(3, 4, 2, generator=generator()), "n_samples"),
        (lambda: ContrastiveDecoder(3, 10, 24, generator=generator()).fit(X, E[:15], 0), "X and E"),
        (lambda: ContrastiveDecoder(3, 10, 24, generator=generator()).fit(X, E[:16], 0, epochs=0), "epochs"),
        (lambda: lda_auc(X, 0 * Y, X, Y), "y must"),
        (lambda: lda_auc(X, Y, X, 2 * Y), "y_test"),
        (lambda: retrieval_accuracy(E, E[:39], 1), "predicted"),
        (lambda: retrieval_accuracy(E * math.nan, E, 1), "predicted"),
        (lambda: retrieval_accuracy(E, E, 0), "k must"),
        (lambda: retrieval_accuracy(E, E, 41), "k must"),
        (lambda: log_linear_fit([1, 2], [0.1]), "accuracy"),
        (lambda: log_linear_fit([2, 1], [0.1, 0.2]), "n_trials"),
        (lambda: log_linear_fit([0, 1], [0.1, 0.2]), "n_trials"),
        (lambda: data_multiplier([1, 2], [0.1, 0.2], [0.1, math.nan], 0.1), "accuracy"),
        (lambda: recording("eeg", 1), "name"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
