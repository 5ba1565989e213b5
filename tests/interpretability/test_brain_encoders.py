"""Oracles: PyTorch's attention, scikit-learn, closed forms, invariances, and the truth that was planted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import Ridge
from torch import nn

from companion import data
from companion.interpretability.brain_encoders import (
    BASES,
    LinearEncoder,
    SpatialFeatureEncoder,
    TransformerBrainEncoder,
    algonauts,
    explained_variance_fraction,
    fit_encoder,
    make_scene_dataset,
    noise_ceiling,
    patch_features,
    standardise,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed))


def transformer(dim=12, n_tokens=7, n_rois=3, n_voxels=2, seed=0, **options):
    model = TransformerBrainEncoder(dim, n_tokens, n_rois, n_voxels, generator=generator(seed), **options).eval()
    return model.requires_grad_(False)


def factorised(dim=12, n_tokens=7, n_rois=3, n_voxels=2):
    return SpatialFeatureEncoder(dim, n_tokens, n_rois, n_voxels, generator=generator()).requires_grad_(False)


@pytest.fixture(scope="module")
def scenes():
    return make_scene_dataset(0, n_test=1000)


# --- planted scenes ---------------------------------------------------------------------------------------------------


def test_signals_are_standardised_on_training_scenes_and_noise_has_the_asked_variance(scenes):
    signals, responses = scenes.train.signals, scenes.train.responses
    assert signals.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(signals.std(0, correction=0), torch.ones(5, 20), rtol=0, atol=1e-4)
    assert (responses - signals).var() == pytest.approx(1, rel=0.01)
    quiet = make_scene_dataset(0, 500, 2, snr=4.0).train
    assert (quiet.responses - quiet.signals).var() == pytest.approx(0.25, rel=0.03)
    test = scenes.test.signals.var(0)
    torch.testing.assert_close(scenes.noise_ceiling, test / (test + 1))


def test_category_areas_answer_where_their_category_is(scenes):
    """Without the category a voxel's signal is one constant; OFA's also with the 0 in a column on the left."""
    assert scenes.roi_names == ("V1", "FFA", "EBA", "PPA", "OFA")
    for r, (category, column) in enumerate([(0, 0), (1, 0), (2, 0), (0, 2)], start=1):
        cell = scenes.test.cells[:, category]
        silent = (cell < 0) | (cell % 5 < column)
        signals = scenes.test.signals[:, r]
        torch.testing.assert_close(signals[silent], signals[silent][:1].expand(int(silent.sum()), -1))
        assert (signals[~silent] - signals[silent][0]).abs().mean() > 0.3
    assert ((scenes.test.cells >= 0).float().mean(0) - 0.7).abs().max() < 0.08


def test_v1_is_linear_in_the_pixels_of_its_receptive_field(scenes):
    pixels = scenes.train.images.flatten(2).double()
    seen = torch.einsum("vt,ntp->nvp", scenes.receptive_fields.double(), pixels)
    for voxel in range(3):
        design = torch.cat([seen[:, voxel], torch.ones(len(seen), 1)], 1)
        y = scenes.train.signals[:, 0, voxel].double()
        residual = y - design @ torch.linalg.lstsq(design, y).solution
        assert residual.abs().max() < 1e-4


def test_a_cell_shows_its_category(scenes):
    """A nearest-neighbour classifier that knows all digits names the digit in the cell."""
    x, digit = data.digits()
    for category in range(4):
        scene = (scenes.test.cells[:, category] >= 0).nonzero()[:, 0]
        shown = scenes.test.images[scene, scenes.test.cells[scene, category]].flatten(1)
        assert (digit[torch.cdist(shown, x).argmin(1)] == category).float().mean() > 0.98


def test_no_digit_image_of_a_test_scene_occurs_in_training():
    x, _ = data.digits()
    scenes, used = make_scene_dataset(3, 2000, 2000, 1), []
    for part in (scenes.train, scenes.test):
        scene = (part.cells[:, 0] >= 0).nonzero()[:, 0]
        shown = part.images[scene, part.cells[scene, 0]].flatten(1)
        used.append(set(torch.cdist(shown, x).argmin(1).tolist()))
    assert min(map(len, used)) > 30
    assert len(used[0] & used[1]) <= 1  # near twins, mistaken for each other under the noise


def test_scenes_depend_on_the_seed_only(scenes):
    again, other = make_scene_dataset(0, n_test=1000), make_scene_dataset(1, 10, 10)
    assert torch.equal(again.train.responses, scenes.train.responses)
    assert not torch.equal(other.train.images, scenes.train.images[:10])


def test_features_are_what_they_say(scenes):
    images = scenes.train.images[:20]
    pixel, random, trained = (patch_features(images, basis) for basis in BASES)
    assert torch.equal(pixel, images.flatten(2) - 0.3)
    assert all(features.shape == (20, 25, 64) for features in (pixel, random, trained))
    assert min(random.min(), trained.min()) == 0
    assert torch.equal(random, patch_features(images, "random"))
    assert not torch.equal(random, patch_features(images, "random", seed=8))
    alone = patch_features(images[:, 3:4], "trained")  # a token depends on its own cell only
    torch.testing.assert_close(alone[:, 0], trained[:, 3])


def test_standardise_uses_the_statistics_of_the_reference():
    reference, tokens = 3 * normal(50, 4, 6) + 2, normal(5, 4, 6)
    ours = standardise(reference, reference).flatten(0, 1)
    assert ours.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(ours.std(0), torch.ones(6), rtol=0, atol=1e-4)
    one = (tokens[2, 3, 1] - reference[..., 1].mean()) / reference[..., 1].std()
    torch.testing.assert_close(standardise(tokens, reference)[2, 3, 1], one, rtol=1e-4, atol=1e-5)


# --- the transformer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_heads", "queries"), [(1, "roi"), (4, "roi"), (3, "voxel")])
def test_attention_is_that_of_pytorch(n_heads, queries):
    model, tokens = transformer(n_heads=n_heads, queries=queries), normal(5, 7, 12)
    theirs = nn.MultiheadAttention(12, n_heads, batch_first=True)
    key_bias = normal(12, seed=9)  # ours has none, because it does not matter
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([model.to_query.weight, model.to_key.weight, torch.eye(12)]))
        theirs.in_proj_bias.copy_(torch.cat([model.to_query.bias, key_bias, torch.zeros(12)]))
        theirs.out_proj.load_state_dict(model.output.state_dict())
        query = model.query.expand(5, -1, -1)
        o, A = theirs(query, tokens + model.position, tokens, average_attn_weights=False)
        torch.testing.assert_close(model.attention(tokens), A.transpose(1, 2), rtol=0, atol=1e-5)
        o = o + model.ffn(o)
        per_voxel = o.view(5, 3, 2, 12) if queries == "voxel" else o[:, :, None].expand(-1, -1, 2, -1)
        expected = (per_voxel * model.readout).sum(-1) + model.bias
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-5)


def test_a_zero_query_reads_the_mean_token():
    model, tokens = transformer(), normal(5, 7, 12)
    model.query.zero_()
    model.to_query.bias.zero_()
    torch.testing.assert_close(model.attention(tokens), torch.full((5, 3, 4, 7), 1 / 7))
    mean = tokens.mean(1, keepdim=True).expand(-1, 7, -1)
    torch.testing.assert_close(model(tokens), model(mean), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(7)), queries=st.sampled_from(["roi", "voxel"]))
def test_without_positions_the_order_of_tokens_does_not_matter(order, queries):
    model, tokens = transformer(queries=queries), normal(5, 7, 12)
    model.position.zero_()
    torch.testing.assert_close(model(tokens[:, order]), model(tokens), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model.attention(tokens[:, order]), model.attention(tokens)[..., order], rtol=0, atol=1e-6
    )


def test_with_positions_the_order_matters():
    model, tokens = transformer(), normal(5, 7, 12)
    model.position.mul_(20)
    assert (model(tokens.flip(1)) - model(tokens)).abs().max() > 1e-2


def test_filters_score_content_and_place():
    model, tokens = transformer(), normal(5, 7, 12)
    content = torch.einsum("ntd,qhd->nqht", tokens, model.filters())
    place = torch.einsum("td,qhd->qht", model.position, model.filters())
    torch.testing.assert_close((content + place).softmax(-1), model.attention(tokens))
    torch.testing.assert_close(model.attention(0 * tokens), place.softmax(-1).expand(5, -1, -1, -1))


def test_an_attention_that_is_handed_in_is_used():
    model, tokens = transformer(), normal(5, 7, 12)
    torch.testing.assert_close(model(tokens, model.attention(tokens)), model(tokens))
    uniform = torch.full((3, 4, 7), 1 / 7)
    torch.testing.assert_close(model(tokens, uniform), model(tokens, uniform.expand(5, -1, -1, -1)))
    mean = tokens.mean(1, keepdim=True).expand(-1, 7, -1)
    torch.testing.assert_close(model(tokens, uniform), model(mean), rtol=0, atol=1e-5)


# --- the linear models ------------------------------------------------------------------------------------------------


def test_a_one_hot_field_reads_one_token():
    model, tokens = factorised(), normal(5, 7, 12)
    place = torch.tensor([[0, 3], [6, 1], [2, 2]])
    model.place.scatter_(2, place[..., None], 100.0)
    torch.testing.assert_close(model.receptive_fields(), nn.functional.one_hot(place, 7).float())
    expected = (tokens[:, place] * model.readout).sum(-1) + model.bias
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-5)


def test_a_common_field_reads_the_weighted_mean_token():
    model, tokens = factorised(), normal(5, 7, 12)
    model.place.copy_(normal(7, seed=3))
    fields = model.receptive_fields()
    torch.testing.assert_close(fields.sum(-1), torch.ones(3, 2))
    mean = torch.einsum("t,ntd->nd", fields[0, 0], tokens)
    torch.testing.assert_close(model(tokens), torch.einsum("nd,rvd->nrv", mean, model.readout), rtol=0, atol=1e-5)


def test_the_linear_encoder_is_ridge_with_the_penalty_of_least_held_out_error():
    x, weights = normal(120, 3, 5), normal(15, 4, seed=2)
    y = (x.flatten(1) @ weights + 2 * normal(120, 4, seed=3)).view(120, 2, 2)
    penalties = [0.1, 10.0, 100.0, 1e4]
    model, flat, target = LinearEncoder(x, y, penalties), x.flatten(1).numpy(), y.flatten(1).numpy()
    gram = flat[:96] - flat[:96].mean(0)  # closed form, held out by hand
    errors = []
    for penalty in penalties:
        w = np.linalg.solve(gram.T @ gram + penalty * np.eye(15), gram.T @ (target[:96] - target[:96].mean(0)))
        prediction = (flat[96:] - flat[:96].mean(0)) @ w + target[:96].mean(0)
        errors.append(((prediction - target[96:]) ** 2).mean())
    assert model.penalty == penalties[int(np.argmin(errors))]
    assert model.penalty not in (penalties[0], penalties[-1])
    expected = Ridge(alpha=model.penalty).fit(flat, target).predict(flat).reshape(120, 2, 2)
    torch.testing.assert_close(model(x), torch.from_numpy(expected).float(), rtol=0, atol=1e-5)


def test_importance_is_the_share_of_a_token():
    x, y = normal(50, 3, 5), normal(50, 2, 1, seed=2)  # one voxel per area, so the share is an absolute value
    model = LinearEncoder(x, y, [1.0])
    without = x.clone()
    without[:, 1] = 0
    torch.testing.assert_close(
        model.importance(x)[:, :, 1], (model(x) - model(without)).abs()[..., 0], rtol=0, atol=1e-5
    )


# --- fitting ----------------------------------------------------------------------------------------------------------


def test_fitting_recovers_a_factorised_truth():
    truth, x = factorised(6, 5, 1, 3), normal(1000, 5, 6)
    truth.place.copy_(3 * normal(1, 3, 5, seed=4))
    model = SpatialFeatureEncoder(6, 5, 1, 3, generator=generator(5))
    losses = fit_encoder(model, x, truth(x), epochs=40, lr=0.1, weight_decay=0.0, seed=0)
    assert losses.shape == (40,)
    assert losses[-1] < 1e-3
    torch.testing.assert_close(model.receptive_fields(), truth.receptive_fields(), rtol=0, atol=0.05)


def test_fitting_finds_content_anywhere_and_repeats_itself():
    """The response is a feature of the one token that is marked, in a place that changes: only attention can."""
    x, place = normal(1000, 6, 8), torch.randint(6, (1000,), generator=generator(2))
    x[..., 0] = 0
    x[torch.arange(1000), place, 0] = 4.0
    y = x[torch.arange(1000), place, 1][:, None, None]
    before = x.clone()
    options = dict(epochs=20, lr=1e-2, weight_decay=1e-3, seed=0)
    models = [TransformerBrainEncoder(8, 6, 1, 1, 2, generator=generator(1)) for _ in range(2)]
    losses = []
    for model in models:
        torch.rand(1)  # another global state, which must not matter
        state = torch.get_rng_state()
        losses.append(fit_encoder(model, x, y, **options))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(x, before)
    assert not models[0].training
    static = SpatialFeatureEncoder(8, 6, 1, 1, generator=generator(1))
    fit_encoder(static, x, y, **options)
    with torch.no_grad():
        attended = models[0].attention(x).mean(2)[:, 0].argmax(-1)
        error, static_error = (nn.functional.mse_loss(model(x), y) for model in (models[0], static))
    assert (attended == place).float().mean() > 0.9
    assert error < 0.1 < 0.5 < static_error


def test_weight_decay_shrinks_the_weights():
    x, y, sizes = normal(200, 5, 6), normal(200, 1, 3, seed=2), []
    for weight_decay in (0.0, 10.0):
        model = SpatialFeatureEncoder(6, 5, 1, 3, generator=generator(5))
        fit_encoder(model, x, y, epochs=5, lr=0.01, weight_decay=weight_decay, seed=0)
        sizes.append(float(model.readout.detach().norm()))
    assert sizes[1] < 0.8 * sizes[0]


# --- scores -----------------------------------------------------------------------------------------------------------


def test_the_noise_ceiling_of_planted_data_is_known(scenes):
    signals = scenes.train.signals
    repeats = signals + normal(3, *signals.shape)
    for n_averaged, truth in ((1, 0.5), (3, 0.75)):
        ceiling = noise_ceiling(repeats, n_averaged)
        assert ceiling.shape == (5, 20)
        assert ceiling.mean() == pytest.approx(truth, abs=0.02)


def test_the_noise_ceiling_by_hand():
    repeats = torch.tensor([[0.0, 4, 8], [2, 6, 10]])[..., None]  # noise variance 2, means 1, 5, 9 of variance 16
    assert noise_ceiling(repeats).item() == pytest.approx(15 / 17)
    assert noise_ceiling(repeats, 2).item() == pytest.approx(15 / 16)
    assert noise_ceiling(repeats - repeats.mean(0)).item() == 0


def test_explained_variance_fraction_is_signed_squared_correlation():
    pred, target = normal(80, 3), normal(80, 3, seed=2)
    ceiling = torch.tensor([0.5, 0.8, 1.0])
    rho = np.array([np.corrcoef(pred[:, v], target[:, v])[0, 1] for v in range(3)])
    ours = explained_variance_fraction(pred, target, ceiling)
    np.testing.assert_allclose(ours, np.sign(rho) * rho**2 / ceiling.numpy(), atol=1e-6)
    torch.testing.assert_close(explained_variance_fraction(target, target, torch.ones(3)), torch.ones(3))
    torch.testing.assert_close(explained_variance_fraction(-target, target, torch.ones(3)), -torch.ones(3))
    assert explained_variance_fraction(torch.ones(80, 3), target, ceiling).tolist() == [0, 0, 0]


@settings(deadline=None, max_examples=25)
@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_explained_variance_fraction_ignores_positive_affine_maps(scale, shift):
    pred, target = normal(60, 2, 3), normal(60, 2, 3, seed=2)
    ceiling = torch.full((2, 3), 0.5)
    expected = explained_variance_fraction(pred, target, ceiling)
    torch.testing.assert_close(
        explained_variance_fraction(scale * pred + shift, target, ceiling), expected, rtol=0, atol=1e-5
    )


def test_the_true_signal_scores_one(scenes):
    fraction = explained_variance_fraction(scenes.test.signals, scenes.test.responses, scenes.noise_ceiling)
    assert fraction.mean() == pytest.approx(1, abs=0.03)


# --- recorded brains --------------------------------------------------------------------------------------------------


class Backbone:
    """Stands in for DINOv2: every token holds the image's mean."""

    def to(self, _):
        return self

    def eval(self):
        return self

    def get_intermediate_layers(self, image, n):
        assert image.shape == (1, 3, 434, 434)
        assert n == 1
        return [image.mean().expand(1, 961, 768)]


def test_algonauts_reads_the_challenge_s_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load", lambda *_: Backbone())
    folder = tmp_path / "algonauts2023" / "subj01"
    for part in ("training_split/training_fmri", "training_split/training_images", "roi_masks"):
        (folder / part).mkdir(parents=True)
    grey = np.arange(20) * 10
    for k, value in enumerate(grey):
        picture = Image.new("RGB", (425, 425), (int(value),) * 3)
        picture.save(folder / "training_split" / "training_images" / f"train-{k + 1:04d}.png")
    left = np.array([0, 0, 0, 1, 1, 1, 2, 2])  # 0 is no area, and the second area has two vertices only
    labels = {"lh": left, "rh": left[::-1]}
    for localiser in ("prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words"):
        names = {0: "Unknown", 1: f"{localiser} one", 2: f"{localiser} two"}
        np.save(folder / "roi_masks" / f"mapping_{localiser}.npy", names)
        for side in ("lh", "rh"):
            np.save(folder / "roi_masks" / f"{side}.{localiser}_challenge_space.npy", labels[side])
    for sign, side in ((1, "lh"), (-1, "rh")):
        activity = sign * (grey[:, None] + np.where(labels[side] == 1, 1000.0, 0))
        np.save(folder / "training_split" / "training_fmri" / f"{side}_training_fmri.npy", activity)
    brain = algonauts("subj01", 3, seed=0)
    assert brain.tokens.shape == (18, 961, 768)
    assert brain.test_tokens.dtype == torch.float16
    assert brain.responses.shape == (18, 10, 3)
    assert brain.test_responses.shape == (2, 10, 3)
    assert brain.roi_names[0] == "lh prf-visualrois one"
    assert brain.roi_names[-1] == "rh floc-words one"
    for tokens, responses in ((brain.tokens, brain.responses), (brain.test_tokens, brain.test_responses)):
        value = responses[:, 0, 0] - 1000
        assert torch.equal(responses[:, 9], -responses[:, 0])
        shade = (value / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None]) / torch.tensor([0.229, 0.224, 0.225])[
            :, None
        ]
        torch.testing.assert_close(tokens[:, 5, 7].float(), shade.mean(0), rtol=0, atol=5e-3)


def test_algonauts_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    with pytest.raises(data.DataUnavailable, match=r"subj03.*BOOK_PROFILE=book"):
        algonauts("subj03", 3, seed=0)


def test_algonauts_has_a_stand_in(monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    brain = algonauts("subj01", 3, seed=0)
    assert brain.tokens.shape == (90, 25, 64)
    assert brain.test_responses.shape == (10, 5, 3)


# --- bad input --------------------------------------------------------------------------------------------------------

LINEAR = LinearEncoder(normal(10, 3, 4), normal(10, 2, 1), [1.0])
ONES = torch.ones(6, 3)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: make_scene_dataset(0, snr=0.0), "snr"),
        (lambda: make_scene_dataset(0, snr=float("nan")), "snr"),
        (lambda: make_scene_dataset(0, n_train=1), "n_train"),
        (lambda: make_scene_dataset(0, n_voxels=0), "n_voxels"),
        (lambda: patch_features(torch.ones(2, 25, 8, 8), "dino"), "basis"),
        (lambda: patch_features(torch.ones(2, 25, 7, 8), "pixel"), "images"),
        (lambda: standardise(torch.ones(2, 3, 4), torch.ones(2, 3, 5)), "tokens and reference"),
        (lambda: transformer(n_heads=5), "n_heads"),
        (lambda: transformer(n_voxels=0), "positive"),
        (lambda: transformer(queries="area"), "queries"),
        (lambda: transformer()(torch.ones(2, 6, 12)), "tokens"),
        (lambda: transformer().attention(torch.ones(2, 7, 11)), "tokens"),
        (lambda: factorised(n_tokens=0), "positive"),
        (lambda: factorised()(torch.ones(7, 12)), "tokens"),
        (lambda: LinearEncoder(torch.ones(10, 3, 4), torch.ones(9, 2, 1)), "tokens and responses"),
        (lambda: LinearEncoder(torch.ones(4, 3, 4), torch.ones(4, 2, 1)), "5 images"),
        (lambda: LinearEncoder(torch.ones(10, 3, 4), torch.ones(10, 2, 1), []), "penalties"),
        (lambda: LINEAR(torch.ones(2, 4, 4)), "tokens"),
        (lambda: LINEAR.importance(torch.ones(2, 4, 4)), "tokens"),
        (lambda: fit_encoder(factorised(), normal(9, 7, 12), normal(8, 3, 2), 1, 0.1, 0.0, 0), "tokens and responses"),
        (lambda: fit_encoder(factorised(), normal(9, 7, 12), normal(9, 3, 2), 0, 0.1, 0.0, 0), "epochs"),
        (lambda: fit_encoder(factorised(), normal(9, 7, 12), normal(9, 3, 2), 1, 0.0, 0.0, 0), "lr"),
        (lambda: fit_encoder(factorised(), normal(9, 7, 12), normal(9, 3, 2), 1, 0.1, 0.0, 0), "batch_size"),
        (lambda: noise_ceiling(torch.ones(1, 5, 2)), "repeats"),
        (lambda: noise_ceiling(torch.ones(2, 1, 2)), "repeats"),
        (lambda: noise_ceiling(torch.ones(2, 5, 2), 0), "n_averaged"),
        (lambda: explained_variance_fraction(ONES, torch.ones(5, 3), torch.ones(3)), "pred and target"),
        (lambda: explained_variance_fraction(ONES, ONES, torch.ones(2)), "noise_ceiling"),
        (lambda: explained_variance_fraction(ONES, ONES, torch.zeros(3)), "noise_ceiling"),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=names):
        call()
