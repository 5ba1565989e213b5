"""Oracles: hand-computed layers, polynomial degrees, scikit-learn's features and losses, a loop over single members."""

from itertools import combinations
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Chebyshev
from sklearn.linear_model import LinearRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import PolynomialFeatures
from torch import nn
from torch.nn import functional as F

from companion import data, models
from companion.interpretability.cross_networks import (
    PLANTED,
    ClickModel,
    CrossNetwork,
    FusedCrossNetwork,
    LogitSum,
    click_data,
    field_interactions,
    half_split,
    mixed_difference,
    mixed_differences,
    movielens,
    self_mask,
    train,
    tri_bce,
)

bce = F.binary_cross_entropy_with_logits


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cross(d, layers, kind, **options):
    return CrossNetwork(d, layers, kind, generator=generator(), **options).double()


def with_weights(network, weight, bias):
    with torch.no_grad():
        for W, b in zip(network.weights, network.biases, strict=True):
            W.copy_(torch.tensor(weight))
            b.copy_(torch.tensor(bias))
    return network


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# --- the layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "second"), [("exponential", [2.400064, 18.92, -1.69, 5.39981]), ("linear", [2.10004, 11, -1.6, 2.949956])]
)
def test_two_layers_by_hand(kind, second):
    network = with_weights(cross(4, 2, kind), [[1.0, 0, 0, -1], [0, 1, 1, 0]], [0.1, 0.2, 0.3, 0.4])
    x = torch.tensor([1, 2, -1, 0.5], dtype=torch.float64)
    states = network.states(x)
    assert torch.equal(states[0], x)
    for state, expected in zip(states[1:], ([1.6, 4.4, -1.3, 1.19996], second), strict=True):
        torch.testing.assert_close(state, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)


def test_mask_of_a_single_number_is_zero():
    network = with_weights(cross(2, 1, "linear"), [[2.0, -1]], [0.5, 0.25])
    state = network.states(torch.tensor([1.0, 3], dtype=torch.float64))[1]
    assert state.tolist() == [0.5, 3.75]


def test_forward_is_the_head_on_the_last_state():
    network, x = cross(6, 3, "linear"), normal(5, 6)
    torch.testing.assert_close(network(x), network.states(x)[-1] @ network.head[0] + network.offset)


def test_self_mask_keeps_what_is_above_the_mean_and_does_not_touch_its_input():
    c = normal(7, 10)
    before, norm = c.clone(), nn.LayerNorm(10).double()
    masked = self_mask(c, norm)
    assert torch.equal(c, before)
    assert torch.equal(masked != 0, c > c.mean(1, keepdim=True))
    expected = c * ((c - c.mean(1, keepdim=True)) / (c.var(1, correction=0, keepdim=True) + 1e-5).sqrt()).clamp_min(0)
    torch.testing.assert_close(masked, expected)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.5, 100), st.integers(0, 100))
def test_self_mask_is_linear_on_rays(scale, seed):
    norm, c = nn.LayerNorm(8, eps=0).double(), normal(3, 8, seed=seed)
    torch.testing.assert_close(self_mask(scale * c, norm), scale * self_mask(c, norm))


def test_full_layer_is_the_one_of_dcnv2():
    network, x = cross(5, 1, "linear", full=True), normal(4, 5)
    torch.testing.assert_close(network.states(x)[1], x * (x @ network.weights[0].T + network.biases[0]) + x)


def test_initial_values_have_the_distributions_they_are_said_to_have():
    network = cross(64, 3, "linear")
    assert torch.stack([W.std() for W in network.weights]).mean().item() == pytest.approx((2 / 96) ** 0.5, rel=0.05)
    biases = torch.cat(list(network.biases))
    assert 0 <= biases.min() < 0.1
    assert 0.9 < biases.max() <= 1
    assert FusedCrossNetwork([50] * 4, generator=generator()).table.std().item() == pytest.approx(0.1, rel=0.1)


def test_halves_have_half_the_weights():
    def count(**options):
        return sum(W.numel() for W in cross(64, 3, "linear", **options).weights)

    assert (count(), count(full=True)) == (6144, 12288)


@pytest.mark.parametrize("kind", ["linear", "exponential"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_degree_on_a_ray_and_in_mixed_differences(kind, layers):
    degree = layers + 1 if kind == "linear" else 2**layers
    network = cross(12, layers, kind, mask=False)
    t = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None]
    z = network(t * normal(12)).detach().numpy()
    errors = [np.abs(Chebyshev.fit(t[:, 0], z, k)(t[:, 0].numpy()) - z).max() / np.ptp(z) for k in (degree - 1, degree)]
    assert errors[0] > 1e-9 > errors[1]
    sizes = [mixed_difference(network, normal(4, 12), normal(4, 12, seed=2), range(k)).abs().max() for k in (2, degree)]
    above = mixed_difference(network, normal(4, 12), normal(4, 12, seed=2), range(degree + 1)).abs().max()
    assert above < 1e-10 * sizes[0] < 1e-5 * sizes[1]


def test_with_the_mask_the_second_layer_is_no_polynomial():
    t = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None]
    z = cross(12, 2, "linear")(t * normal(12)).detach().numpy()
    assert np.abs(Chebyshev.fit(t[:, 0], z, 12)(t[:, 0].numpy()) - z).max() > 1e-6 * np.ptp(z)


def test_quadratic_features_express_one_exponential_layer():
    x = normal(200, 6)
    z = cross(6, 1, "exponential", mask=False)(x).detach().numpy()
    features = PolynomialFeatures(2).fit_transform(x.numpy())
    assert np.abs(LinearRegression().fit(features, z).predict(features) - z).max() < 1e-9
    lines = LinearRegression().fit(x.numpy(), z)
    assert np.abs(lines.predict(x.numpy()) - z).max() > 0.1


# --- models -----------------------------------------------------------------------------------------------------------


def test_layout_is_first_halves_then_second_halves():
    e = torch.arange(12).view(1, 3, 4)
    assert half_split(e).tolist() == [[0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]]


def test_embedding_looks_up_each_field_in_its_own_table():
    model = FusedCrossNetwork([2, 3, 4], 4, generator=generator())
    tables = model.table.split([2, 3, 4])
    X = torch.tensor([[1, 0, 3], [0, 2, 2]])
    e = torch.stack([table[column] for table, column in zip(tables, X.T, strict=True)], 1)
    assert torch.equal(model.embed(X), torch.cat([e[..., :2].flatten(1), e[..., 2:].flatten(1)], 1))


def test_fused_logit_is_the_mean_and_rows_do_not_mix():
    model, (X, _, _) = FusedCrossNetwork([6] * 8, generator=generator()), click_data(50, 0)
    z, deep, shallow = model(X)
    torch.testing.assert_close(z, (deep + shallow) / 2)
    torch.testing.assert_close(deep, model.interactions.exponential(model.embed(X)))
    order = torch.randperm(50, generator=generator())
    torch.testing.assert_close(model(X[order])[0], z[order])


def test_logit_sum_adds():
    parts = [cross(6, 2, "linear", full=True), models.mlp([6, 4, 1], generator=generator(), dtype=torch.float64)]
    x = normal(3, 6)
    torch.testing.assert_close(LogitSum(*parts)(x), parts[0](x) + parts[1](x)[:, 0])


# --- the loss ---------------------------------------------------------------------------------------------------------

HAND = [torch.tensor(z, dtype=torch.float64) for z in ([0, 1, -2], [0.5, 0.5, -1], [-0.5, 1.5, -3], [0, 1, 0])]


def test_tri_bce_by_hand_and_by_sklearn():
    losses = [log_loss(HAND[3].numpy(), z.sigmoid().numpy()) for z in HAND[:3]]
    np.testing.assert_allclose(losses, [0.37777895970704695, 0.5871385519594787, 0.24135920457886706], rtol=1e-12)
    assert abs(float(tri_bce(*HAND)) - 0.5007020475409667) < 1e-12


def test_equal_logits_give_plain_cross_entropy():
    z, y = normal(20), (normal(20, seed=2) > 0).double()
    torch.testing.assert_close(tri_bce(z, z, z, y), bce(z, y))


def test_gradient_flows_through_the_weights():
    z, deep, shallow = (logit.clone().requires_grad_() for logit in HAND[:3])
    assert torch.autograd.gradcheck(lambda *logits: tri_bce(*logits, HAND[3]), (z, deep, shallow))
    tri_bce(z, deep, shallow, HAND[3]).backward()
    losses = [float(bce(logit.detach(), HAND[3])) for logit in (z, deep)]
    slope = (deep.sigmoid() - HAND[3]).detach() / 3
    torch.testing.assert_close(deep.grad, (2 * losses[1] - losses[0]) * slope)
    assert not shallow.grad.any()


# --- data, training, interactions -------------------------------------------------------------------------------------


def test_clicks_follow_the_logit():
    X, y, logit = click_data(20_000, 0)
    assert torch.equal(X, click_data(20_000, 0)[0])
    assert set(X.unique().tolist()) == set(range(6))
    probability = logit.sigmoid()
    entropy = bce(logit, probability)  # of a click, given its row
    assert log_loss(y.numpy(), probability.double().numpy()) == pytest.approx(float(entropy), abs=0.01)
    assert 0.77 < roc_auc_score(y, logit) < 0.79


def test_mixed_differences_of_the_true_logit_find_the_planted_pairs():
    levels = np.random.default_rng(12345)
    S = torch.from_numpy(np.array([levels.permutation(np.linspace(-0.6, 1.8, 6)) for _ in range(8)]))

    def logit(X):
        s = S[torch.arange(8), X]
        return s[:, :4].prod(1) + 1.2 * (s[:, 4] - 0.6) * (s[:, 5] - 0.6) + 0.5 * s[:, 6]

    X, _, z = click_data(100, 3)
    torch.testing.assert_close(logit(X).float() - 1.2 - 0.3, z)
    J = mixed_differences(logit, [6] * 8, 200, generator())
    assert torch.equal(J, J.T)
    found = {pair for pair in combinations(range(8), 2) if J[pair] > 1e-6}
    assert found == set(PLANTED)
    # Levels of a field have variance 0.672, so differences of two have mean square 1.344.
    assert J[4, 5] == pytest.approx(1.2 * 1.344, rel=0.25)


def test_mixed_difference_of_a_product_is_the_product_of_differences():
    x, y = normal(9, 5), normal(9, 5, seed=2)
    product = mixed_difference(lambda v: v[:, [0, 2, 4]].prod(1), x, y, [4, 0, 2])
    torch.testing.assert_close(product, (x - y)[:, [0, 2, 4]].prod(1))


def test_field_interactions_by_loops_over_blocks():
    model = FusedCrossNetwork([3, 4, 5], 4, generator=generator())
    tables = [table.detach().numpy() for table in model.table.split([3, 4, 5])]
    for network in ("linear", "exponential"):
        W = getattr(model.interactions, network).weights[0].detach().numpy()
        expected = np.zeros((3, 3))
        for f in range(3):
            for g in range(3):
                squares = 0
                for half in range(2):
                    block = W[2 * f : 2 * f + 2, 6 * half + 2 * g : 6 * half + 2 * g + 2]
                    squares += (block**2).sum() * (tables[g][:, 2 * half : 2 * half + 2] ** 2).mean()
                scale = (tables[f][:, :2] ** 2).mean() + (tables[f][:, 2:] ** 2).mean()
                expected[f, g] += (scale * squares) ** 0.5
        np.testing.assert_allclose(field_interactions(model, network), expected + expected.T, rtol=1e-5)


def test_interactions_of_a_field_without_embedding_are_zero():
    model = FusedCrossNetwork([3, 4, 5], 4, generator=generator())
    with torch.no_grad():
        model.table[3:7] = 0
    I = field_interactions(model, "linear")
    assert not I[1].any()
    assert I[0, 2] > 0


OPTIONS = dict(epochs=2, batch_size=32, lr=5e-3, decay=0.5)


def make_members(n):
    return [FusedCrossNetwork([6] * 8, 4, generator=generator(seed)) for seed in range(n)]


def training_data(n):
    logs = [click_data(100, seed) for seed in range(n)]
    return torch.stack([log[0] for log in logs]), torch.stack([log[1] for log in logs])


def test_members_train_as_if_alone():
    X, y = training_data(2)
    together = make_members(2)
    history = train(together, X, y, tri_bce, generators=[generator(5), generator(6)], **OPTIONS)
    assert history["loss"].shape == (3, 2)
    member = make_members(2)[1]
    optimizer, order = torch.optim.Adam(member.parameters(), lr=5e-3), generator(6)
    for epoch in range(2):
        for rows in torch.randperm(100, generator=order)[:96].split(32):
            optimizer.zero_grad()
            tri_bce(*member(X[1, rows]), y[1, rows]).backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 5e-3 * 0.5 ** (epoch + 1)
    for (name, one), other in zip(together[1].named_parameters(), member.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


def test_record_sees_the_models_move():
    X, y = training_data(1)
    model = ClickModel([6] * 8, 4, cross(32, 1, "linear").float(), generator())

    def record():
        return {"table": model.table.clone(), "loss of all rows": bce(model(X[0]), y[0])}

    history = train([model], X, y, bce, generators=[generator()], record=record, **OPTIONS)
    assert history["table"].shape == (3, 48, 4)
    assert torch.equal(history["table"][-1], model.table)
    assert (history["table"].diff(dim=0).abs().amax((1, 2)) > 0).all()
    assert history["loss of all rows"][-1] < history["loss of all rows"][0]


# --- MovieLens --------------------------------------------------------------------------------------------------------


def test_movielens_is_read(tmp_path, monkeypatch):
    with ZipFile(tmp_path / "ml.zip", "w") as archive:
        archive.writestr("ml-1m/users.dat", "1::F::1::10::48067\n2::M::56::16::70072\n")
        archive.writestr("ml-1m/movies.dat", "7::Café (1995)::Drama\n9::B (1996)::Comedy|Drama\n".encode("latin1"))
        archive.writestr("ml-1m/ratings.dat", "1::7::5::9\n2::9::1::9\n2::7::3::9\n1::9::4::9\n")
    monkeypatch.setenv("BOOK_PROFILE", "full")
    monkeypatch.setattr(data, "download", lambda name, url, known_hash: tmp_path / "ml.zip")
    X, y, cardinalities = movielens(0)
    assert cardinalities == [2] * 7
    assert sorted(torch.cat([X, y.long()[:, None]], 1).tolist()) == [
        [0, 0, 0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 1, 0, 1],
        [1, 1, 1, 1, 1, 1, 0, 0],
    ]


def test_movielens_has_a_stand_in(monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    X, y, cardinalities = movielens(0)
    assert X.shape == (640, 8) == (len(y), len(cardinalities))


# --- bad input --------------------------------------------------------------------------------------------------------

MODEL = FusedCrossNetwork([2, 3], 4, generator=generator())
ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: click_data(0, 0), "n"),
        (lambda: click_data(5, 0, fields=6), "fields"),
        (lambda: click_data(5, 0, cardinality=1), "cardinality"),
        (lambda: self_mask(torch.ones(2, 3), lambda c: c[:, :1]), "layer_norm"),
        (lambda: CrossNetwork(5, 1, generator=generator()), "d and layers"),
        (lambda: CrossNetwork(0, 1, generator=generator()), "d and layers"),
        (lambda: CrossNetwork(4, 0, generator=generator()), "d and layers"),
        (lambda: CrossNetwork(4, 1, "cubic", generator=generator()), "kind"),
        (lambda: CrossNetwork(4, 1, generator=generator())(torch.ones(2, 3)), "x must"),
        (lambda: FusedCrossNetwork([2, 0], generator=generator()), "cardinalities"),
        (lambda: FusedCrossNetwork([], generator=generator()), "cardinalities"),
        (lambda: FusedCrossNetwork([2, 2], 3, generator=generator()), "embedding"),
        (lambda: MODEL(torch.tensor([[0, 3]])), "X must"),
        (lambda: MODEL.embed(torch.tensor([[-1, 0]])), "X must"),
        (lambda: MODEL(torch.tensor([[0, 0, 0]])), "X must"),
        (lambda: MODEL(torch.zeros(1, 2)), "X must"),
        (lambda: tri_bce(ONES, ONES, torch.ones(2), ONES), "one shape"),
        (lambda: field_interactions(MODEL, "deep"), "network"),
        (lambda: mixed_difference(len, torch.ones(2, 3), torch.ones(3, 3), [0]), "x and y"),
        (lambda: mixed_difference(len, torch.ones(2, 3), torch.ones(2, 3), [0, 0]), "coordinates"),
        (lambda: mixed_difference(len, torch.ones(2, 3), torch.ones(2, 3), [3]), "coordinates"),
        (lambda: mixed_difference(len, torch.ones(2, 3), torch.ones(2, 3), []), "coordinates"),
        (lambda: mixed_differences(len, [2, 2], 0, generator()), "samples"),
        (lambda: mixed_differences(len, [2], 5, generator()), "fields"),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=names):
        call()


def test_training_checks_its_data():
    X, y = training_data(2)
    for bad, names in [
        (dict(models=make_members(1)), "1 models"),
        (dict(X=X[:, :50]), "X, y and generators"),
        (dict(y=y * 2), "y must hold"),
        (dict(y=y * torch.nan), "y must hold"),
        (dict(X=X + 1), "X must hold"),
    ]:
        arguments = {"models": make_members(2), "X": X, "y": y, **bad}
        with pytest.raises(ValueError, match=names):
            train(**arguments, loss=tri_bce, generators=[generator(), generator()], **OPTIONS)
