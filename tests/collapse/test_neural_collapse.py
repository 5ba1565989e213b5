"""Oracles for companion.collapse.neural_collapse: closed forms, lower bounds, other libraries, invariances."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.covariance import empirical_covariance

from companion import models
from companion.collapse import neural_collapse as nc

ETF4 = nc.simplex_etf(4)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def ufm(class_sizes, depth, decay=5e-4, n_seeds=2, width=8, std=0.15, **options):
    decays = [decay] * depth
    return nc.DeepLinearUFM(
        class_sizes, [width] * depth, decays, decay, generator=rng(), n_seeds=n_seeds, std=std, **options
    )


def matrices(model):
    with torch.no_grad():
        W, means = nc.weight_product(model.W), nc.class_means(model.H, model.labels, model.W[-1].shape[1])
        return W @ W.mT, means.mT @ means, W @ means


# --- the scalar problem


@pytest.mark.parametrize(
    ("beta", "depth", "expected"),
    [(0.05, 1, 3.472135955), (0.3, 2, 1.453616665), (0.49, 2, 1.020008), (0.51, 2, 0), (0.5, 3, 1.295132389)],
)
def test_class_strength_known_values(beta, depth, expected):
    assert nc.class_strength(beta, depth) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(beta=st.floats(1e-4, 2), depth=st.integers(1, 8))
def test_class_strength_is_the_global_minimum(beta, depth):
    def g(x):
        return 1 / (1 + x**depth) + beta * x

    grid = np.geomspace(1e-6, 1e4, 4001)
    assert g(nc.class_strength(beta, depth)) <= min(g(grid).min(), 1) + 1e-12


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_class_strength_threshold(depth):
    threshold = (depth - 1) ** ((depth - 1) / depth) / depth
    assert nc.class_strength(threshold * 1.0001, depth) == 0
    # the jump: at the threshold the strength is (M - 1)^(1/M), as 1/(1+x^M) + beta x = 1 there
    assert nc.class_strength(threshold * (1 - 1e-9), depth) == pytest.approx((depth - 1) ** (1 / depth), rel=1e-3)


@pytest.mark.parametrize(("beta", "depth"), [(0, 1), (-1.0, 2), (float("nan"), 2), (float("inf"), 2)])
def test_class_strength_rejects_beta(beta, depth):
    with pytest.raises(ValueError, match="beta"):
        nc.class_strength(beta, depth)


def test_class_strength_rejects_depth():
    with pytest.raises(ValueError, match="depth"):
        nc.class_strength(0.1, 0)


# --- the geometry


def test_one_layer_is_singular_value_soft_thresholding():
    sizes, lam_w, lam_h = [50, 100, 40, 10], 2e-3, 5e-4
    geometry = nc.gof_geometry(sizes, [lam_w], lam_h)
    n, N = np.array(sizes), sum(sizes)
    np.testing.assert_allclose(geometry.row_sq, np.sqrt(n * lam_h / lam_w) - N * lam_h, rtol=1e-12)
    # W H_1 has one singular value per class: the logit times sqrt(n_k)
    np.testing.assert_allclose(geometry.logit * np.sqrt(n), np.sqrt(n) - N * np.sqrt(lam_w * lam_h), rtol=1e-12)
    assert nc.gof_geometry([50] * 4, [5e-4], 5e-4).row_sq[0] == pytest.approx(6.971068, abs=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_geometry_is_reached_by_explicit_balanced_matrices(depth):
    """Build the minimiser and evaluate the objective itself: the loss of the scalar problem must come out."""
    sizes, decays, lam_h = [9, 6, 3], [1e-3 * (m + 1) for m in range(depth)], 2e-3
    geometry = nc.gof_geometry(sizes, decays, lam_h)
    shared = (np.prod(decays) * geometry.row_sq) ** (1 / depth)  # lambda_m s_m^2 is the same in every layer
    W = [torch.diag(torch.tensor(np.sqrt(shared / decay))) for decay in decays]
    labels = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    H = torch.diag(torch.tensor(geometry.mean_norm))[:, labels]
    loss = nc.regularised_loss(W, H, labels, decays, lam_h, "mse")
    assert loss.item() == pytest.approx(geometry.loss, rel=1e-12)
    np.testing.assert_allclose(nc.weight_product(W).square().sum(1), geometry.row_sq, rtol=1e-12)


def test_gof_targets_are_the_diagonals():
    geometry = nc.gof_geometry([30, 10], [1e-3], 1e-3)
    w, h, wh = nc.gof_targets([30, 10], [1e-3], 1e-3)
    np.testing.assert_allclose(torch.stack([w.diagonal(), h.diagonal(), wh.diagonal()]),
                               [geometry.row_sq, geometry.mean_norm**2, geometry.logit])  # fmt: skip
    assert w.count_nonzero() == 2


@pytest.mark.parametrize(
    ("class_sizes", "weight_decays", "feature_decay", "name"),
    [([3], [0.1], 0.1, "class_sizes"), ([3, 0], [0.1], 0.1, "class_sizes"), ([3, 2], [], 0.1, "weight_decays"),
     ([3, 2], [-0.1], 0.1, "weight_decays"), ([3, 2], [0.1], 0, "feature_decay"),
     ([3, 2], [0.1], float("nan"), "feature_decay")],
)  # fmt: skip
def test_geometry_rejects(class_sizes, weight_decays, feature_decay, name):
    with pytest.raises(ValueError, match=name):
        nc.gof_geometry(class_sizes, weight_decays, feature_decay)


# --- simplex and cross entropy


def test_simplex_etf_is_equiangular():
    gram = nc.simplex_etf(5) * 5 / 4
    np.testing.assert_allclose(gram.diagonal(), 1)
    np.testing.assert_allclose(gram[~torch.eye(5, dtype=bool)], -1 / 4)
    with pytest.raises(ValueError, match="n_classes"):
        nc.simplex_etf(1)


@pytest.mark.parametrize(
    ("depth", "decay", "expected"), [(1, 4e-3, 3.477), (2, 4e-3, 4.707), (1, 5e-4, 5.634), (2, 5e-4, 6.940)]
)
def test_etf_scale_of_cross_entropy_minimises_the_closed_form(depth, decay, expected):
    def F(t, K=4, n=50):
        p = 2 / (depth + 1)
        cost = (K - 1) * (depth + 1) / 2 * decay * (t * n**0.5) ** p
        return np.log(1 + (K - 1) * np.exp(-t)) + cost

    t, loss = nc.etf_scale(4, 50, [decay] * depth, decay, "ce")
    found = minimize_scalar(F, bounds=(1, 20), method="bounded", options={"xatol": 1e-10})
    assert (t, loss) == (pytest.approx(found.x, abs=1e-5), pytest.approx(found.fun, abs=1e-12))
    assert t == pytest.approx(expected, abs=1e-3)


def test_etf_scale_of_mse():
    scale, loss = nc.etf_scale(4, 50, [5e-4], 5e-4, "mse")
    assert scale == pytest.approx(50**0.5 - 0.1)
    # three directions are soft-thresholded by 0.1, the fourth is the bias's
    assert loss == pytest.approx(3 * (0.1**2 / 400 + 5e-4 * (50**0.5 - 0.1)))


def test_schatten_price_is_that_of_a_fit():
    """The price in logit_scale, against NumPy's singular values of fitted logits."""
    model = ufm([20] * 3, 2, decay=4e-3, n_seeds=1, std=0.3)
    loss, _ = model.fit("ce")
    with torch.no_grad():
        logits = (nc.weight_product(model.W) @ model.H)[0]
        entropy = torch.nn.functional.cross_entropy(logits.T, model.labels).item()
    sigma = np.linalg.svd(logits.numpy(), compute_uv=False)
    assert loss.item() == pytest.approx(entropy + 1.5 * 4e-3 * (sigma ** (2 / 3)).sum(), abs=1e-8)


def test_square_beats_the_simplex_only_for_deep_models():
    square = torch.tensor([[1.0, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, -1], [0, 0, -1, 1]])
    excess = [
        nc.logit_scale(square, 50, [1e-5] * M, 1e-5)[1] / nc.etf_scale(4, 50, [1e-5] * M, 1e-5, "ce")[1] - 1
        for M in (1, 2, 3)
    ]
    assert excess[0] > 0
    assert excess[1] > 0 > excess[2]
    assert nc.logit_scale(square, 50, [4e-3] * 3, 4e-3)[1] == pytest.approx(0.147974, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(0.05, 20), depth=st.integers(1, 4))
def test_logit_scale_does_not_depend_on_the_unit_of_the_pattern(seed, factor, depth):
    pattern = torch.eye(3).double() + 0.2 * torch.rand(3, 3, generator=rng(seed), dtype=torch.float64)
    t, loss = nc.logit_scale(pattern, 10, [1e-3] * depth, 1e-3)
    scaled_t, scaled_loss = nc.logit_scale(factor * pattern, 10, [1e-3] * depth, 1e-3)
    assert (scaled_t * factor, scaled_loss) == (pytest.approx(t, rel=1e-4), pytest.approx(loss, rel=1e-9))


@pytest.mark.parametrize("pattern", [torch.ones(2, 3), torch.full((2, 2), torch.nan), torch.ones(3, 3)])
def test_logit_scale_rejects_pattern(pattern):
    with pytest.raises(ValueError, match="pattern"):
        nc.logit_scale(pattern, 10, [0.1], 0.1)


def test_scales_reject():
    with pytest.raises(ValueError, match="n_per_class"):
        nc.logit_scale(ETF4, 0, [0.1], 0.1)
    with pytest.raises(ValueError, match="decays"):
        nc.logit_scale(ETF4, 10, [], 0.1)
    with pytest.raises(ValueError, match="loss"):
        nc.etf_scale(4, 10, [0.1], 0.1, "hinge")


# --- the objective and the model


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_objective_against_torch(loss):
    model = nc.DeepLinearUFM([3, 2, 4], [5, 6], [0.1, 0.2], 0.3, generator=rng(), n_seeds=2, bias=True, bias_decay=0.4)
    with torch.no_grad():
        model.b += torch.randn(model.b.shape, generator=rng(1), dtype=torch.float64)
    for seed in range(2):
        W1, W2, H, b = (p[seed].detach() for p in (*model.W, model.H, model.b))
        logits = (W2 @ W1 @ H + b).T
        one_hot = torch.eye(3, dtype=torch.float64)[model.labels]
        fit = (
            torch.nn.functional.cross_entropy(logits, model.labels)
            if loss == "ce"
            else torch.nn.functional.mse_loss(logits, one_hot, reduction="sum") / 18
        )
        decay = 0.05 * W1.norm() ** 2 + 0.1 * W2.norm() ** 2 + 0.15 * H.norm() ** 2 + 0.2 * b.norm() ** 2
        assert model.objective(loss)[seed].item() == pytest.approx((fit + decay).item(), rel=1e-12)


def test_objective_rejects():
    model = ufm([3, 2], 2)
    with pytest.raises(ValueError, match="loss"):
        model.objective("hinge")
    with pytest.raises(ValueError, match="weight_decays"):
        nc.regularised_loss(model.W, model.H, model.labels, [0.1], 0.1, "mse")


@pytest.mark.parametrize(("sizes", "depth"), [([20] * 3, 1), ([20] * 3, 3), ([40, 20, 10], 2), ([40, 20, 10], 3)])
def test_fit_reaches_the_predicted_geometry_and_never_less(sizes, depth):
    model = ufm(sizes, depth, n_seeds=3, std=0.3)
    losses, gradient = model.fit("mse")
    geometry = nc.gof_geometry(sizes, [5e-4] * depth, 5e-4)
    assert (losses - geometry.loss).min() > -1e-10
    assert (losses - geometry.loss).max() < 1e-8
    assert gradient < 1e-8
    for measured, target in zip(matrices(model), nc.gof_targets(sizes, [5e-4] * depth, 5e-4), strict=True):
        torch.testing.assert_close(measured, target.expand_as(measured), atol=1e-4, rtol=1e-4)


def test_fit_is_never_below_the_bound_where_classes_vanish():
    for decay, depth in ((0.02, 1), (0.01, 2), (0.008, 3), (0.1, 2)):
        losses, _ = ufm([100, 60, 30, 10], depth, decay=decay, n_seeds=4, std=0.3).fit("mse")
        assert (losses - nc.gof_geometry([100, 60, 30, 10], [decay] * depth, decay).loss).min() > -1e-10


def test_narrow_layer_gives_the_best_low_rank_solution():
    model = nc.DeepLinearUFM([30] * 5, [8, 3], [5e-4] * 2, 5e-4, generator=rng(), n_seeds=2)
    losses, _ = model.fit("mse")
    geometry = nc.gof_geometry([30] * 5, [5e-4] * 2, 5e-4)
    eigenvalues = torch.linalg.eigvalsh(matrices(model)[0])
    np.testing.assert_allclose(eigenvalues[:, 2:], geometry.row_sq[0], rtol=1e-4)
    np.testing.assert_allclose(eigenvalues[:, :2], 0, atol=1e-6)
    # (5): n/(2N) (R g + K - R), with R = 3 and g from the full-width loss
    np.testing.assert_allclose(losses, (3 * geometry.loss * 2 + 2) / 10, atol=1e-8)


def test_free_bias_turns_the_frame_into_a_simplex():
    model = ufm([20] * 4, 1, bias=True)
    losses, _ = model.fit("mse")
    scale, loss = nc.etf_scale(4, 20, [5e-4], 5e-4, "mse")
    np.testing.assert_allclose(losses, loss, atol=1e-8)
    np.testing.assert_allclose(matrices(model)[0][0], scale * ETF4, atol=1e-4)
    np.testing.assert_allclose(model.b.detach(), 1 / 4, atol=1e-6)


@pytest.mark.parametrize(("ratio", "simplex"), [(0.8, True), (1.5, False)])
def test_decay_of_the_bias_decides_between_the_shapes(ratio, simplex):
    """One layer: W leaves out the all-ones direction as long as the bias's residual, sqrt(n) lambda_b / (1 + lambda_b),
    is below the threshold N lambda of the singular values."""
    n, lam = 20, 2e-3
    share = 4 * n * lam / n**0.5
    model = ufm([n] * 4, 1, decay=lam, bias=True, bias_decay=ratio * share / (1 - share))
    model.fit("mse")
    ones = torch.ones(4, dtype=torch.float64) / 2
    along_ones = (ones @ matrices(model)[0] @ ones).max()
    assert (along_ones < 1e-8) if simplex else (along_ones > 0.1)


def test_gradient_descent_ends_where_the_fit_ends():
    targets = nc.gof_targets([20, 10], [5e-3], 5e-3)
    history = ufm([20, 10], 1, decay=5e-3).descend(targets, steps=400, lr=2.0, record_every=100)
    assert history["nc2_w"].shape == (5, 2)
    assert history["nc2_w"][-1].max() < 1e-6 < history["nc2_w"][0].min()
    np.testing.assert_allclose(history["loss"][-1], nc.gof_geometry([20, 10], [5e-3], 5e-3).loss, rtol=1e-8)


def test_layers_are_balanced_after_a_fit():
    decays, lam_h = [1e-3, 2e-3], 5e-4
    model = nc.DeepLinearUFM([80, 40, 20], [8, 8], decays, lam_h, generator=rng(), n_seeds=2, std=0.3)
    model.fit("mse")
    W1, W2, H = (p.detach() for p in model.parameters)
    torch.testing.assert_close(2e-3 * W2.mT @ W2, 1e-3 * W1 @ W1.mT, atol=1e-8, rtol=0)
    for penalty in (1e-3 * W1.square().sum((1, 2)), 2e-3 * W2.square().sum((1, 2)), lam_h * H.square().sum((1, 2))):
        np.testing.assert_allclose(penalty, 0.010359, atol=1e-6)


def test_seeds_are_independent_of_each_other():
    """Two seeds fitted together end where one of them ends alone (the CE minimum is unique for one layer)."""
    together, alone = ufm([10] * 3, 1, decay=4e-3), ufm([10] * 3, 1, decay=4e-3, n_seeds=1)
    np.testing.assert_allclose(together.fit("ce")[0], alone.fit("ce")[0].repeat(2), atol=1e-12)
    assert not torch.equal(together.H[0], together.H[1])


def test_generator_decides_everything():
    first, again = ufm([5, 3], 2), ufm([5, 3], 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, again.parameters, strict=True))


@pytest.mark.parametrize(
    ("change", "name"),
    [({"widths": [4]}, "widths"), ({"widths": [4, 0]}, "widths"), ({"n_seeds": 0}, "n_seeds"), ({"std": 0.0}, "std"),
     ({"bias_decay": -1.0}, "bias_decay"), ({"class_sizes": [3]}, "class_sizes"),
     ({"feature_decay": -1}, "feature_decay")],
)  # fmt: skip
def test_model_rejects(change, name):
    arguments = {"class_sizes": [3, 2], "widths": [4, 4], "weight_decays": [0.1, 0.1], "feature_decay": 0.1, **change}
    with pytest.raises(ValueError, match=name):
        nc.DeepLinearUFM(**arguments, generator=rng())


# --- metrics


def random_case(seed=0, d=6):
    generator = rng(seed)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3])
    return (
        torch.randn(4, d, generator=generator, dtype=torch.float64),
        torch.randn(d, len(labels), generator=generator, dtype=torch.float64),
        labels,
    )


def test_metrics_against_direct_loops_and_sklearn():
    W, H, labels = random_case()
    result = nc.collapse_metrics(W, H, labels, ETF4, ETF4, ETF4)
    means = torch.stack([H[:, labels == k].mean(1) for k in range(4)], 1)
    within = empirical_covariance((H - means[:, labels]).T.numpy(), assume_centered=True)
    between = sum(np.outer(m, m) for m in (means - H.mean(1, keepdim=True)).T.numpy()) / 4
    assert result["nc1"].item() == pytest.approx(np.trace(within @ np.linalg.pinv(between, rcond=1e-8)) / 4, rel=1e-9)
    for key, A in (("nc2_w", W @ W.T), ("nc2_h", means.T @ means), ("nc3", W @ means)):
        distance = np.linalg.norm(A / np.linalg.norm(A) - ETF4 / np.linalg.norm(ETF4))
        assert result[key].item() == pytest.approx(distance, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
def test_metrics_are_invariant_under_rotation_and_scale_of_features(seed, scale):
    W, H, labels = random_case(seed)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=rng(seed + 1), dtype=torch.float64))[0]
    before = nc.collapse_metrics(W, H, labels, ETF4, ETF4, ETF4)
    after = nc.collapse_metrics(W @ Q.T, scale * Q @ H, labels, ETF4, ETF4, ETF4)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-7, atol=1e-10)


def test_metrics_vanish_for_exact_shapes():
    labels = torch.arange(4).repeat(3)
    identity = torch.eye(4, dtype=torch.float64)
    weights = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    lengths = torch.diag(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    for W, means in ((identity, identity), (ETF4, ETF4), (weights, lengths)):
        result = nc.collapse_metrics(W, means[:, labels], labels, W @ W.T, means.T @ means, W @ means)
        assert max(value.item() for value in result.values()) < 1e-12


def test_metrics_of_a_stack_are_those_of_its_members():
    W, H, labels = random_case()
    stack = nc.collapse_metrics(torch.stack([W, 2 * W + 1]), torch.stack([H, H**2]), labels, ETF4, ETF4, ETF4)
    single = nc.collapse_metrics(2 * W + 1, H**2, labels, ETF4, ETF4, ETF4)
    for key, value in single.items():
        torch.testing.assert_close(stack[key][1], value)


def test_metrics_reject_missing_class_and_wrong_labels():
    W, H, labels = random_case()
    with pytest.raises(ValueError, match="every class"):
        nc.collapse_metrics(W, H, labels.clamp(max=2), ETF4, ETF4, ETF4)
    with pytest.raises(ValueError, match="shape"):
        nc.collapse_metrics(W, H, labels[:-1], ETF4, ETF4, ETF4)
    with pytest.raises(ValueError, match="features"):
        nc.collapse_metrics(W, H / 0, labels, ETF4, ETF4, ETF4)


def test_inputs_are_not_modified():
    W, H, labels = random_case()
    copies = W.clone(), H.clone(), labels.clone()
    nc.collapse_metrics(W, H, labels, ETF4, ETF4, ETF4)
    assert all(torch.equal(a, b) for a, b in zip((W, H, labels), copies, strict=True))


# --- networks


def test_first_of_each():
    x, labels = torch.arange(8.0)[:, None], torch.tensor([1, 0, 1, 0, 2, 2, 1, 0])
    rows, kept = nc.first_of_each(x, labels, [2, 1, 2])
    assert rows.flatten().tolist() == [1, 3, 0, 4, 5]
    assert kept.tolist() == [0, 0, 1, 2, 2]
    with pytest.raises(ValueError, match="class_sizes"):
        nc.first_of_each(x, labels, [4, 1, 1])


def test_train_network_with_ample_capacity_reaches_the_frame():
    """One-hot inputs and a linear backbone make the features free: the trained network must be the model."""
    labels = torch.tensor([0] * 6 + [1] * 3)

    def free_features(generator):
        return models.mlp([9, 6], generator=generator, activation=None, bias=False)

    trained = nc.train_network(
        free_features, torch.eye(9), labels, 2, 1e-2, seeds=range(2), steps=1500, lr=2e-2, record_every=500
    )
    geometry = nc.gof_geometry([6, 3], [1e-2] * 2, 1e-2)
    np.testing.assert_allclose(trained.history["loss"][-1], geometry.loss, rtol=1e-3)
    np.testing.assert_allclose(trained.W.square().sum(-1), [geometry.row_sq] * 2, rtol=0.02)
    means = nc.class_means(trained.H, labels, 2)
    np.testing.assert_allclose(means.norm(dim=1), [geometry.mean_norm] * 2, rtol=0.02)
    assert trained.history["nc2_h"].shape == (4, 2)
    assert trained.history["nc2_h"][-1].max() < 0.02 < trained.history["nc2_h"][0].min()


@pytest.mark.parametrize(
    ("change", "name"), [({"depth": 0}, "sizes"), ({"decay": -1.0}, "decay"), ({"steps": 0}, "steps")]
)
def test_train_network_rejects(change, name):
    arguments = {"depth": 1, "decay": 0.1, "seeds": [0], "steps": 1, "lr": 0.1, "record_every": 1, **change}
    backbone = functools.partial(models.mlp, [4, 3])
    with pytest.raises(ValueError, match=name):
        nc.train_network(backbone, torch.eye(4), torch.tensor([0, 0, 1, 1]), **arguments)
