"""Oracles for the generative model of spatial and network images: scikit-learn, SciPy, closed forms, symmetries."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats
from sklearn.linear_model import BayesianRidge
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from companion import training
from companion.interpretability.spatial_network_xai import (
    BayesianSVC,
    Inputs,
    SpatialNetworkModel,
    align,
    dropout_masks,
    effect_interval,
    embed_networks,
    fit_models,
    gaussian_basis,
    interval_coverage,
    mc_dropout,
    mean_image,
    normal_interval,
    prediction_interval,
    simulate_images,
    spectral_embedding,
)

F64 = torch.float64
DATA = simulate_images(0, n_subjects=12, side=8, regions_per_side=2)
LATENTS = embed_networks(DATA.networks, 2, 10)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def network(seed=0, **options):
    return SpatialNetworkModel(2, 2, generator(seed), **options)


def hollow(u):
    """Networks without noise and without a diagonal."""
    product = u @ u.mT
    return product - torch.diag_embed(product.diagonal(dim1=-2, dim2=-1))


# --- the simulator ----------------------------------------------------------------------------------------------------


def test_the_mean_image_is_the_model_s_sum():
    expected = torch.empty_like(DATA.outcome)
    for i in range(12):
        for j in range(64):
            local = DATA.covariates[i, j] @ DATA.effects[j, 1:]
            expected[i, j] = DATA.effects[j, 0] + local + DATA.node_effect[i, DATA.region[j]]
    torch.testing.assert_close(DATA.mean, expected, rtol=0, atol=1e-12)
    draws = mean_image(
        DATA.covariates, torch.stack([DATA.effects] * 3), torch.stack([DATA.node_effect] * 3), DATA.region
    )
    torch.testing.assert_close(draws, expected.expand(3, -1, -1), rtol=0, atol=1e-12)


def test_regions_are_square_blocks():
    region = simulate_images(0, n_subjects=1, side=4, regions_per_side=2).region
    assert region.view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_simulated_images_have_the_stated_moments():
    data = simulate_images(1, n_subjects=3000, side=8, regions_per_side=2, noise=0.5)
    assert (data.outcome - data.mean).std() == pytest.approx(0.5, rel=0.01)
    fields = data.covariates[..., 0]
    distance = torch.cdist(data.locations, data.locations)
    expected = 0.64 * (-distance.square() / (2 * 0.15**2)).exp() + 0.36 * torch.eye(64, dtype=F64)
    assert (fields.T @ fields / 3000 - expected).abs().max() < 5 * 2**0.5 / 3000**0.5
    assert (data.latent - data.latent.mean(0)).std() == pytest.approx(0.7, rel=0.02)
    u1, u2 = data.latent.unbind(-1)
    torch.testing.assert_close(data.node_effect, 1.2 * torch.sin(1.5 * u1) + 0.5 * (u2**2 - 1))
    assert not data.networks.diagonal(dim1=1, dim2=2).any()
    torch.testing.assert_close(data.networks, data.networks.mT)
    upper = torch.triu_indices(4, 4, 1)
    error = (data.networks - data.latent @ data.latent.mT)[:, upper[0], upper[1]]
    assert error.std() == pytest.approx(0.15, rel=0.03)


def test_the_second_effect_is_a_bump():
    data = simulate_images(3, n_subjects=1, side=32)
    bump = data.effects[:, 2]
    centre = data.locations[bump.argmax()]
    assert bump.max() == pytest.approx(1.5, rel=0.01)
    assert ((centre > 0.27) & (centre < 0.73)).all()
    width = (bump / bump.sum()) @ (data.locations - centre).square().sum(1) / 2
    assert width.sqrt() == pytest.approx(0.15, rel=0.1)


def test_seeds_differ_and_repeat():
    again, other = (simulate_images(seed, n_subjects=12, side=8, regions_per_side=2) for seed in (0, 1))
    assert torch.equal(again.outcome, DATA.outcome)
    assert not torch.equal(other.outcome, DATA.outcome)
    assert torch.equal(DATA.to(torch.device("cpu")).networks, DATA.networks)


# --- stage 1 ----------------------------------------------------------------------------------------------------------


def test_positions_on_a_line_are_found_by_hand():
    line = torch.tensor([[[0.0, 2, 3], [2, 0, 6], [3, 6, 0]]], dtype=F64)
    found = spectral_embedding(line, 1, 1000)[0, :, 0].abs()
    torch.testing.assert_close(found, torch.tensor([1.0, 2, 3], dtype=F64), rtol=0, atol=1e-8)


def test_completion_recovers_the_product_with_its_diagonal():
    u = normal(10, 16, 2)
    networks = hollow(u)
    before = networks.clone()
    found = spectral_embedding(networks, 2, 200)
    torch.testing.assert_close(found @ found.mT, u @ u.mT, rtol=0, atol=1e-8)
    assert torch.equal(networks, before)
    rough = spectral_embedding(networks, 2, 0)
    assert (rough @ rough.mT - u @ u.mT).abs().max() > 0.5  # zeros on the diagonal are not data


def test_without_completion_it_is_the_best_approximation_of_its_rank():
    u = normal(1, 9, 3)
    found = spectral_embedding(u @ u.mT, 3, 0)
    torch.testing.assert_close(found @ found.mT, u @ u.mT, rtol=0, atol=1e-10)
    left, s, _ = torch.linalg.svd(u @ u.mT)
    low = spectral_embedding(u @ u.mT, 2, 0)
    torch.testing.assert_close(low @ low.mT, left[..., :2] * s[:, None, :2] @ left[..., :2].mT, rtol=0, atol=1e-10)


def test_alignment_to_one_subject_is_scipy_s_procrustes():
    u = normal(5, 7, 3)
    ours = align(u, 1)
    for i in range(5):
        rotation, _ = linalg.orthogonal_procrustes(u[i].numpy(), u[0].numpy())
        np.testing.assert_allclose(ours[i], u[i].numpy() @ rotation, atol=1e-10)


def test_alignment_to_the_mean_is_five_rounds_of_it():
    u = normal(6, 7, 3)
    template = u[0].numpy()
    for _ in range(5):
        aligned = np.stack([one @ linalg.orthogonal_procrustes(one, template)[0] for one in u.numpy()])
        template = aligned[:4].mean(0)
    np.testing.assert_allclose(align(u, 4), aligned, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_what_each_subject_s_axes_were_does_not_matter(seed):
    u = normal(6, 8, 2, seed=1) + 2 * normal(8, 2, seed=2)
    turns, _ = torch.linalg.qr(normal(6, 2, 2, seed=seed))
    one, other = align(u, 4), align(u @ turns, 4)
    products = [torch.einsum("igk,jhk->ijgh", a, a) for a in (one, other)]
    torch.testing.assert_close(*products, rtol=0, atol=1e-8)


def test_alignment_finds_a_common_pattern_and_ignores_test_subjects():
    pattern = normal(8, 2)
    turns, _ = torch.linalg.qr(normal(6, 2, 2, seed=3))
    aligned = align(pattern @ turns, 4)
    torch.testing.assert_close(aligned, aligned[:1].expand(6, -1, -1), rtol=0, atol=1e-10)
    u = normal(6, 8, 2)
    changed = torch.cat([u[:4], normal(2, 8, 2, seed=9)])
    torch.testing.assert_close(align(u, 4)[:4], align(changed, 4)[:4])


def test_relabelled_regions_change_nothing_but_names():
    order = torch.randperm(4, generator=generator(1))
    renamed = replace(DATA, networks=DATA.networks[:, order][:, :, order], region=order.argsort()[DATA.region])
    latents = embed_networks(renamed.networks, 2, 10)
    old = LATENTS[:, order]
    torch.testing.assert_close(latents @ latents.mT, old @ old.mT, rtol=0, atol=1e-8)
    model = network()
    one, other = (mc_dropout(model, d, u, range(12), 5).mean for d, u in ((DATA, LATENTS), (renamed, old)))
    torch.testing.assert_close(one, other)


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def test_dropout_variance_of_a_linear_unit_is_known():
    x, w = torch.tensor([0.4, 1, -1]), torch.tensor([1, -2, 0.5])
    first, second = dropout_masks(torch.tensor(0.7), (20_000, 3), generator())
    for mask in (first, second):
        outputs = (mask * x) @ w
        assert outputs.mean() == pytest.approx(-2.1, abs=0.05)
        assert outputs.var() == pytest.approx(1.89, abs=0.08)
    assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.02


def test_masks_take_a_rate_for_each_member():
    (mask, _) = dropout_masks(torch.tensor([1.0, 0.5])[:, None], (2, 10_000), generator())
    assert (mask[0] == 1).all()
    assert mask[1].mean() == pytest.approx(1, abs=0.05)
    assert mask[1].unique().tolist() == [0, 2]


def test_without_masks_the_parts_are_ordinary_networks():
    model, s, u = network(), DATA.locations.float(), LATENTS.float()
    torch.testing.assert_close(model.effects(s), model.effect_network(2 * s - 1))
    torch.testing.assert_close(model.node_effect(u), model.node_network(u)[..., 0])
    mean = model(Inputs(s, DATA.region, DATA.covariates.float(), u))
    expected = mean_image(DATA.covariates.float(), model.effects(s), model.node_effect(u), DATA.region)
    torch.testing.assert_close(mean, expected)


def test_masks_act_where_nn_dropout_does():
    model, s = network(dropout=0.5), DATA.locations.float()
    masks = dropout_masks(torch.tensor(0.5), (64, 64), generator())
    recorded = iter(masks)

    class Recorded(nn.Module):
        def forward(self, x):
            return x * next(recorded)

    first, gelu, second, _, last = model.effect_network
    expected = nn.Sequential(first, gelu, Recorded(), second, gelu, Recorded(), last)(2 * s - 1)
    torch.testing.assert_close(model.effects(s, masks), expected)


def test_the_first_layer_starts_wide():
    first = network(width=2000).effect_network[0]
    assert first.weight.detach().std() == pytest.approx(2, rel=0.04)
    assert first.bias.detach().std() == pytest.approx(4 / 12**0.5, rel=0.04)


@pytest.mark.parametrize("q", [0.0, 0.3])
def test_training_is_adamw_with_one_cycle_on_the_squared_error(q):
    """With masks for every location and for every node of a batch."""
    start = network(dropout=q)
    (trained,) = fit_models([start], [DATA], [LATENTS], 10, epochs=3, batch_size=4, lr=1e-2, seed=5)
    model, masked = network(dropout=q), generator(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, max_lr=1e-2, total_steps=7)
    batches = training.minibatches(10, 4, generator(5))
    s, x, y, u = (t.float() for t in (DATA.locations, DATA.covariates, DATA.outcome, LATENTS))
    for _ in range(6):
        batch = next(batches)
        effect_masks, node_masks = (dropout_masks(model.keep, (*n, 64), masked) for n in ((64,), (4, 4)))
        optimizer.zero_grad()
        inputs = Inputs(s, DATA.region, x[batch], u[batch], effect_masks, node_masks)
        nn.functional.mse_loss(model(inputs), y[batch]).backward()
        optimizer.step()
        schedule.step()
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), network().parameters(), strict=True))


def test_models_side_by_side_do_not_disturb_each_other():
    other = simulate_images(1, n_subjects=12, side=8, regions_per_side=2)
    both = [(network(0, dropout=0.0), DATA, LATENTS), (network(1, dropout=0.0), other, 0 * LATENTS)]
    together = fit_models(*zip(*both, strict=True), 10, epochs=2)
    for parts, model in zip(both, together, strict=True):
        (alone,) = fit_models(*([part] for part in parts), 10, epochs=2)
        for a, b in zip(alone.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_training_with_dropout_learns_a_constant():
    flat = replace(DATA, outcome=torch.full_like(DATA.outcome, 3.0))
    models = fit_models([network(0), network(1, dropout=0.3)], [flat] * 2, [LATENTS] * 2, 10, epochs=100, lr=2e-2)
    assert [float(m.keep) for m in models] == pytest.approx([0.95, 0.7])
    errors = [float((mc_dropout(m, flat, LATENTS, [10, 11], 50).mean.mean(0) - 3).abs().max()) for m in models]
    assert max(errors) < 0.5
    assert errors[0] != errors[1]


def test_a_draw_is_one_function():
    model = network(dropout=0.3)
    twin = replace(DATA, locations=DATA.locations[:1].expand(64, 2))
    same = LATENTS[:1, :1].expand(12, 4, 2)
    draws = mc_dropout(model, twin, same, range(3), 20, seed=4)
    assert draws.effects.shape == (20, 64, 3)
    assert draws.node_effect.shape == (20, 3, 4)
    torch.testing.assert_close(draws.effects, draws.effects[:, :1].expand(-1, 64, -1))
    torch.testing.assert_close(draws.node_effect, draws.node_effect[:, :1, :1].expand(-1, 3, 4))
    assert (draws.effects.std(0) > 0).all()
    expected = mean_image(DATA.covariates[:3].float(), draws.effects, draws.node_effect, DATA.region)
    torch.testing.assert_close(draws.mean, expected)


def test_draws_of_the_last_layer_have_the_closed_form_variance():
    q, model, s = 0.3, network(dropout=0.3), DATA.locations[:5].float()
    _, mask = dropout_masks(torch.tensor(1 - q), (20_000, 1, 64), generator())
    with torch.no_grad():
        draws = model.effects(s, (1.0, mask))
        hidden = model.effect_network[:-1](2 * s - 1)
    expected = q / (1 - q) * hidden.square() @ model.effect_network[-1].weight.T.square()
    torch.testing.assert_close(draws.var(0), expected, rtol=0.06, atol=0)


def test_without_dropout_there_is_no_uncertainty():
    draws = mc_dropout(network(dropout=0.0), DATA, LATENTS, [10, 11], 7)
    assert all(torch.equal(part, part[:1].expand_as(part)) for part in draws)
    low, high = effect_interval(draws.effects)
    assert torch.equal(low, high)
    assert interval_coverage(DATA.effects.float(), low, high) < 0.1


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_intervals_are_those_of_scipy_and_numpy(level):
    draws = normal(50, 3, 4)
    mean, low, high = prediction_interval(draws, 0.25, level)
    spread = np.sqrt(draws.numpy().var(0, ddof=1) + 0.25)
    expected = stats.norm.interval(level, draws.numpy().mean(0), spread)
    np.testing.assert_allclose(mean, draws.numpy().mean(0))
    np.testing.assert_allclose([low.numpy(), high.numpy()], expected, rtol=1e-10)
    quantiles = np.quantile(draws.numpy(), [(1 - level) / 2, (1 + level) / 2], axis=0)
    np.testing.assert_allclose(np.stack(effect_interval(draws, level)), quantiles, rtol=1e-10)


def test_coverage_counts_and_is_nominal_where_the_model_is_true():
    truth = torch.tensor([0.0, 1, 2, 3])
    assert interval_coverage(truth, torch.zeros(4), torch.full((4,), 2.0)) == 0.75
    y, one = normal(100_000), torch.ones(100_000, dtype=F64)
    assert interval_coverage(y, *normal_interval(0 * one, one)) == pytest.approx(0.95, abs=0.003)


# --- the Bayesian baseline --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_basis", [None, "linear", "rbf"])
def test_the_posterior_is_that_of_scikit_learn(latent_basis):
    ours = BayesianSVC(3, 0.3, latent_basis).fit(DATA, LATENTS, 10)
    phi, y = ours.design(DATA, LATENTS, range(10)).numpy(), DATA.outcome[:10].flatten().numpy()
    assert phi.shape == (640, 27 + {None: 0, "linear": 2, "rbf": 40}[latent_basis])
    zero = dict.fromkeys(("alpha_1", "alpha_2", "lambda_1", "lambda_2"), 0)
    theirs = BayesianRidge(fit_intercept=False, tol=1e-12, max_iter=5000, **zero).fit(phi, y)
    np.testing.assert_allclose(ours.m, theirs.coef_, rtol=0, atol=1e-7)
    np.testing.assert_allclose(ours.C, theirs.sigma_, rtol=0, atol=1e-7)
    assert ours.a == pytest.approx(theirs.lambda_, rel=1e-6)
    assert ours.b == pytest.approx(theirs.alpha_, rel=1e-6)
    new = ours.design(DATA, LATENTS, [10, 11]).numpy()
    mean, std = theirs.predict(new, return_std=True)
    ours_mean, ours_std = ours.predict(DATA, LATENTS, [10, 11])
    np.testing.assert_allclose(ours_mean.flatten(), mean, atol=1e-7)
    np.testing.assert_allclose(ours_std.flatten(), std, atol=1e-7)


def test_effect_maps_make_the_prediction():
    regression = BayesianSVC(4, 0.3).fit(DATA, LATENTS, 10)
    maps = torch.stack([regression.effect_map(p)[0] for p in range(3)], 1)
    expected = mean_image(DATA.covariates[10:], maps, torch.zeros(2, 4, dtype=F64), DATA.region)
    torch.testing.assert_close(regression.predict(DATA, LATENTS, [10, 11])[0], expected)
    weights = torch.linalg.cholesky(regression.C) @ normal(48, 20_000) + regression.m[:, None]
    axis = torch.linspace(0, 1, 4, dtype=F64)
    drawn = gaussian_basis(DATA.locations, torch.cartesian_prod(axis, axis), 0.3) @ weights[16:32]
    mean, std = regression.effect_map(1)
    torch.testing.assert_close(drawn.std(1), std, rtol=0.05, atol=0)
    assert ((drawn.mean(1) - mean).abs() < 6 * std / 20_000**0.5).all()


def test_one_infinite_bump_is_a_constant_coefficient():
    mean, std = BayesianSVC(1, math.inf).fit(DATA, LATENTS, 10).effect_map(1)
    assert mean.std() < 1e-12
    assert std.std() < 1e-12
    x = torch.cat([torch.ones(10, 64, 1, dtype=F64), DATA.covariates[:10]], -1).flatten(0, 1)
    least_squares = torch.linalg.lstsq(x, DATA.outcome[:10].flatten()).solution
    assert mean[0] == pytest.approx(float(least_squares[1]), abs=0.02)


def test_the_network_enters_as_asked():
    shuffled = LATENTS.flip(0)
    for basis, same in ((None, True), ("linear", False), ("rbf", False)):
        one, other = (
            BayesianSVC(2, 0.5, basis).fit(DATA, u, 10).predict(DATA, u, [11])[0] for u in (LATENTS, shuffled)
        )
        assert torch.equal(one, other) == same


# --- what a reader can get wrong --------------------------------------------------------------------------------------

NAN = torch.full_like(LATENTS, math.nan)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: simulate_images(0, side=16, regions_per_side=5), "side must be a multiple"),
        (lambda: simulate_images(0, n_subjects=0), "n_subjects"),
        (lambda: simulate_images(0, noise=-1.0), "noise"),
        (lambda: spectral_embedding(normal(2, 4, 4), 2), "symmetric"),
        (lambda: spectral_embedding(normal(4, 4), 2), "networks"),
        (lambda: spectral_embedding(DATA.networks * math.nan, 2), "networks"),
        (lambda: embed_networks(DATA.networks, 5, 10), "latent_dim"),
        (lambda: embed_networks(DATA.networks, 0, 10), "latent_dim"),
        (lambda: spectral_embedding(DATA.networks, 2, -1), "n_completion"),
        (lambda: align(LATENTS, 13), "n_train"),
        (lambda: SpatialNetworkModel(2, 2, generator(), dropout=1.0), "dropout"),
        (lambda: SpatialNetworkModel(0, 2, generator()), "n_covariates"),
        (lambda: dropout_masks(torch.tensor(0.0), (3,), generator()), "keep"),
        (lambda: fit_models([network()], [DATA], [], 10), "one entry per model"),
        (lambda: fit_models([network()], [DATA], [LATENTS[:5]], 10), "latents"),
        (lambda: fit_models([network()], [DATA], [NAN], 10), "latents"),
        (lambda: fit_models([network()], [DATA], [LATENTS], 13), "n_train"),
        (lambda: fit_models([network()], [DATA], [LATENTS], 10, epochs=0), "epochs"),
        (lambda: fit_models([network()], [DATA], [LATENTS], 10, batch_size=11), "batch_size"),
        (lambda: mc_dropout(network(), DATA, LATENTS, [0], 1), "n_samples"),
        (lambda: mc_dropout(network(), DATA, LATENTS[:, :3], [0]), "latents"),
        (lambda: prediction_interval(normal(5, 2), -0.1), "noise_variance"),
        (lambda: prediction_interval(normal(5, 2), 0.1, 1.0), "level"),
        (lambda: effect_interval(normal(5, 2), 0.0), "level"),
        (lambda: interval_coverage(torch.zeros(2), torch.zeros(3), torch.zeros(3)), "truth"),
        (lambda: BayesianSVC(0), "n_basis"),
        (lambda: BayesianSVC(length=0), "length"),
        (lambda: BayesianSVC(latent_basis="spline"), "latent_basis"),
        (lambda: BayesianSVC().fit(DATA, LATENTS[:5], 10), "latents"),
        (lambda: BayesianSVC().fit(DATA, LATENTS, 0), "n_train"),
        (lambda: BayesianSVC().predict(DATA, LATENTS, [0]), "call fit"),
        (lambda: BayesianSVC().effect_map(1), "call fit"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
