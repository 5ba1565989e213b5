"""Oracles: values by hand, SciPy's Gamma function, exact maxima, random points, autograd, invariances."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gamma
from torch import nn

from companion import data, models
from companion.robustness import certified_training as ct

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def chain(sizes, seed=0):
    source = generator(seed)
    return [torch.randn(b, a, generator=source, dtype=F64) for a, b in pairwise(sizes)]


def network(sizes=(3, 6, 5, 4), seed=0, **options):
    return models.mlp(sizes, generator=generator(seed), dtype=F64, **options)


def boxes(n=5, d=3, eps=0.3, seed=0):
    x = torch.rand(n, d, generator=generator(seed), dtype=F64)
    return ct.box(x, eps)


HAND = [torch.tensor([[1.0, 2], [3, -1]], dtype=F64), torch.tensor([[1.0, 1]], dtype=F64)]


def hand_relu():
    """``f(x) = relu(x1 - x2) - relu(x1 + x2)`` as the margin of class 1 over class 0."""
    net = network((2, 2, 2), bias=False)
    net[0].weight.data = torch.tensor([[1.0, -1], [1, 1]], dtype=F64)
    net[2].weight.data = torch.tensor([[0.0, 0], [1, -1]], dtype=F64)
    return net


# --- linear networks --------------------------------------------------------------------------------------------------


def test_tightness_by_hand():
    tau, exact, ibp = ct.dln_tightness(HAND)
    assert (tau.item(), exact.item(), ibp.item()) == (5 / 7, 5, 7)
    # One input alone leaves nothing to cancel but its own two paths: (3 + 1) over (3 + 1), and (2 - 1) over (2 + 1).
    assert ct.dln_tightness(HAND, torch.tensor([1.0, 0]))[0].item() == 1
    assert ct.dln_tightness(HAND, torch.tensor([0.0, 1]))[0].item() == pytest.approx(1 / 3)


def test_tightness_is_one_where_the_interval_radius_is_zero():
    assert ct.dln_tightness([torch.zeros(2, 2), torch.ones(1, 2)])[0].item() == 1


def test_exact_radius_is_attained_at_a_corner_of_the_box():
    weights = chain([4, 6, 5, 3])
    eps = torch.tensor([0.1, 0.0, 0.7, 1.3], dtype=F64)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1], dtype=F64)] * 4) * eps
    images = corners @ torch.linalg.multi_dot(weights[::-1]).mT
    torch.testing.assert_close(ct.dln_tightness(weights, eps)[1], images.amax(0))


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-10, 10).filter(lambda c: abs(c) > 0.01))
def test_tightness_ignores_the_size_of_the_box_and_the_parametrisation_of_hidden_units(seed, scale, factor):
    weights = chain([4, 5, 3, 2], seed)
    tau = ct.dln_tightness(weights)[0]
    torch.testing.assert_close(ct.dln_tightness(weights, scale)[0], tau)
    order = torch.randperm(5, generator=generator(seed))
    first, second = weights[0][order].clone(), weights[1][:, order].clone()
    first[2] *= factor
    second[:, 2] /= factor
    torch.testing.assert_close(ct.dln_tightness([first, second, weights[2]])[0], tau)
    assert (tau > 0).all()
    assert (tau <= 1 + 1e-12).all()


def test_tightness_takes_networks_side_by_side():
    many = [chain([4, 5, 3], seed) for seed in range(3)]
    together = ct.dln_tightness([torch.stack(layers) for layers in zip(*many, strict=True)])
    for k, weights in enumerate(many):
        for part, alone in zip(together, ct.dln_tightness(weights), strict=True):
            torch.testing.assert_close(part[k], alone)


@pytest.mark.parametrize(("d", "value"), [(1, 1), (2, math.pi / 4), (3, 2 / 3), (5, 8 / 15), (7, 16 / 35)])
def test_expected_tightness_at_small_widths(d, value):
    assert ct.expected_tightness([d]) == pytest.approx(value, rel=1e-12)


def test_expected_tightness_against_the_gamma_function_its_asymptote_and_the_product():
    assert ct.expected_tightness([]) == 1
    assert ct.expected_tightness([100]) == pytest.approx(0.1250185, abs=1e-7)
    for d in (4, 11, 64):
        assert ct.expected_tightness([d]) == pytest.approx(math.sqrt(math.pi) * gamma((d + 1) / 2) / d / gamma(d / 2))
    assert ct.expected_tightness([10**6]) == pytest.approx(math.sqrt(math.pi / 2e6), rel=1e-6)
    assert ct.expected_tightness([3, 7, 3]) == pytest.approx(4 / 9 * 16 / 35)


def test_expected_tightness_is_that_of_gaussian_weights():
    weights = [torch.randn(4000, b, a, generator=generator(b), dtype=F64) for a, b in ((3, 5), (5, 9), (9, 4))]
    _, exact, ibp = ct.dln_tightness(weights)
    assert exact.mean() / ibp.mean() == pytest.approx(ct.expected_tightness([5, 9]), rel=0.02)


def test_propagation_invariance_is_agreement_of_the_signs_of_paths():
    assert not ct.is_propagation_invariant(HAND)
    assert ct.is_propagation_invariant([weight.abs() for weight in chain([4, 5, 3])])
    assert ct.is_propagation_invariant([chain([4, 5])[0], torch.eye(5, dtype=F64)])  # one path for each pair
    a, s, b = torch.tensor([1.0, -1, 1]), torch.tensor([-1.0, 1]), torch.tensor([1.0, 1, -1, -1])
    first, second = s[:, None] * torch.rand(2, 4) * b, a[:, None] * torch.rand(3, 2) * s
    assert ct.is_propagation_invariant([first, second], 1e-5)
    first[0, 0] *= -1
    assert not ct.is_propagation_invariant([first, second], 1e-5)


# --- interval bounds --------------------------------------------------------------------------------------------------


def test_relu_example_by_hand():
    net, x, y = hand_relu(), torch.tensor([[0.5, 0.25]], dtype=F64), torch.tensor([0])
    lower, upper = ct.box(x, 0.25)
    low, high = ct.ibp_bounds(net, lower, upper, y)
    assert (low[0, 1].item(), high[0, 1].item()) == (-1.25, 0.5)
    up = torch.tensor([0.0, 1], dtype=F64)
    assert ct.exact_margin(net, lower[0], upper[0], up) == pytest.approx((0, 0), abs=1e-6)
    assert ct.exact_margin(net, lower[0], upper[0], -up) == pytest.approx((1, 1), abs=1e-6)
    assert ct.local_tightness(net, x, y, 0.25).item() == 0.5


@pytest.mark.parametrize("labelled", [False, True])
def test_bounds_contain_random_points(labelled):
    net, (lower, upper) = network(), boxes()
    y = torch.tensor([0, 1, 2, 3, 0])
    low, high = ct.ibp_bounds(net, lower, upper, y if labelled else None)
    share = torch.rand(1000, 5, 3, generator=generator(1), dtype=F64)
    out = net(lower + share * (upper - lower))
    if labelled:
        out = out - out.gather(-1, y.expand(1000, 5)[..., None])
    assert (out >= low).all()
    assert (out <= high).all()


def test_bounds_of_a_point_are_its_output_and_the_label_s_own_margin_is_zero():
    net, (x, _) = network(), boxes()
    for end in ct.ibp_bounds(net, x, x):
        torch.testing.assert_close(end, net(x))
    lower, upper = boxes()
    for end in ct.ibp_bounds(net, lower, upper, torch.full((5,), 2)):
        assert (end[:, 2] == 0).all()


def test_elision_is_a_new_last_layer_and_tightens():
    net, (lower, upper) = network(), boxes()
    margin = copy.deepcopy(net)
    margin[-1].weight.data -= net[-1].weight[1].detach()
    margin[-1].bias.data -= net[-1].bias[1].detach()
    elided = ct.ibp_bounds(net, lower, upper, torch.ones(5, dtype=int))
    for a, b in zip(elided, ct.ibp_bounds(margin, lower, upper), strict=True):
        torch.testing.assert_close(a, b)
    low, high = ct.ibp_bounds(net, lower, upper)
    assert (elided[1][:, 0] < high[:, 0] - low[:, 1]).all()


@pytest.mark.parametrize("training", [False, True])
def test_convolution_and_batch_normalisation_are_the_affine_maps_that_they_are(training):
    net = ct.cnn7(1, 6, 2, 3, generator()).double().train(training)
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(generator=generator(1))
            layer.running_var.uniform_(0.5, 2, generator=generator(2))
            layer.weight.data.uniform_(-2, 2, generator=generator(3))
    x = torch.rand(4, 1, 6, 6, generator=generator(4), dtype=F64)
    lower, upper = ct.box(x, 0.1)
    # Through one convolution and its normalisation: compare with the columns of the whole map.
    centre, radius = ct._affine(net[1], *ct._affine(net[0], (lower + upper) / 2, (upper - lower) / 2))
    frozen = copy.deepcopy(net[:2])
    if training:
        out = net[0]((lower + upper) / 2).detach()
        frozen[1].running_mean, frozen[1].running_var = out.mean((0, 2, 3)), out.var((0, 2, 3), unbiased=False)
    frozen.eval()
    torch.testing.assert_close(centre, frozen((lower + upper) / 2))
    jacobian = torch.func.jacrev(lambda image: frozen(image[None])[0])(x[0])
    torch.testing.assert_close(radius[0], (jacobian.abs() * (upper - lower)[0] / 2).sum((-1, -2, -3)))


def test_cnn7_bounds_contain_random_points():
    net = ct.cnn7(1, 6, 2, 3, generator()).double().eval()
    lower, upper = ct.box(torch.rand(2, 1, 6, 6, generator=generator(4), dtype=F64), 0.1)
    low, high = ct.ibp_bounds(net, lower, upper)
    share = torch.rand(500, 2, 1, 6, 6, generator=generator(1), dtype=F64)
    out = net((lower + share * (upper - lower)).flatten(0, 1)).unflatten(0, (500, 2))
    assert ((out >= low) & (out <= high)).all()


def test_box_is_clipped():
    lower, upper = ct.box(torch.tensor([[0.0, 0.5, 1.0]]), 0.25)
    assert lower.tolist() == [[0, 0.25, 0.75]]
    assert upper.tolist() == [[0.25, 0.75, 1]]


# --- local tightness --------------------------------------------------------------------------------------------------


def test_local_tightness_is_that_of_the_masked_matrices():
    net = network()
    x = torch.rand(6, 3, generator=generator(3), dtype=F64)
    y = torch.tensor([0, 1, 2, 3, 1, 2])
    eps = 0.2
    tau = ct.local_tightness(net, x, y, eps)
    first, second, last = (layer.weight.detach() for layer in net[::2])
    for i in range(6):
        on = [(net[:k](x[i]) > 0).double() for k in (1, 3)]
        rows = [j for j in range(4) if j != y[i]]
        elided = (last - last[y[i]])[rows]
        radius = ((x[i] + eps).clamp(max=1) - (x[i] - eps).clamp(min=0)) / 2
        exact = (elided @ torch.diag(on[1]) @ second @ torch.diag(on[0]) @ first).abs() @ radius
        ibp = elided.abs() @ torch.diag(on[1]) @ second.abs() @ torch.diag(on[0]) @ first.abs() @ radius
        assert tau[i].item() == pytest.approx((exact / ibp).mean().item())


def test_local_tightness_of_a_linear_layer_is_one():
    x = torch.rand(5, 3, generator=generator(), dtype=F64)
    tau = ct.local_tightness(network((3, 4)), x, torch.tensor([0, 1, 2, 3, 0]), 0.1)
    torch.testing.assert_close(tau, torch.ones(5, dtype=F64))


# --- exact verification -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_exact_maximum_lies_between_random_points_and_interval_bounds(seed):
    net, (lower, upper) = network(seed=seed), boxes(1, eps=0.4, seed=seed)
    net[0].weight.data *= 3  # so that many units change their sign inside the box
    c = torch.tensor([1.0, -1, 0, 0], dtype=F64)
    value, bound = ct.exact_margin(net, lower[0], upper[0], c)
    assert value == pytest.approx(bound, abs=1e-4)
    share = torch.rand(100_000, 3, generator=generator(seed), dtype=F64)
    found = (net(lower + share * (upper - lower)) @ c).max().item()
    assert found <= value + 1e-6
    assert value - found < 0.02  # in three dimensions random points come close
    assert value <= ct.ibp_bounds(net, lower, upper, torch.tensor([1]))[1][0, 0].item() + 1e-6


def test_exact_margin_of_a_linear_network_is_that_of_interval_bounds():
    net, (lower, upper) = network((3, 4)), boxes(1)
    value, _ = ct.exact_margin(net, lower[0], upper[0], torch.tensor([0.0, 1, -1, 0], dtype=F64))
    assert value == pytest.approx(ct.ibp_bounds(net, lower, upper, torch.tensor([2]))[1][0, 1].item())


def test_a_wide_gap_still_settles_the_sign():
    net, c = network((3, 8, 8, 4)), torch.tensor([1.0, 0, -1, 0], dtype=F64)
    signs = set()
    for seed in range(8):
        lower, upper = boxes(1, eps=0.3, seed=seed)
        exact, _ = ct.exact_margin(net, lower[0], upper[0], c)
        value, bound = ct.exact_margin(net, lower[0], upper[0], c, rel_gap=0.9)
        assert value - 1e-6 <= exact <= bound + 1e-6
        assert (bound < 0) == (exact < 0)
        signs.add(exact < 0)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["standard", "ibp"])
def test_gradient_of_the_loss(method):
    net = network((3, 5, 4))
    x, y = torch.rand(4, 3, generator=generator(7), dtype=F64), torch.tensor([0, 1, 2, 3])
    names, values = zip(*[(n, p.detach().clone().requires_grad_()) for n, p in net.named_parameters()], strict=True)

    def loss(*parameters):
        rebuilt = copy.deepcopy(net)
        for layer, k in ((0, 0), (2, 2)):
            del rebuilt[layer].weight, rebuilt[layer].bias
            rebuilt[layer].weight, rebuilt[layer].bias = parameters[k], parameters[k + 1]
        return ct.robust_loss(rebuilt, x, y, method, 0.1, generator=generator())

    assert names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert torch.autograd.gradcheck(loss, values)


def test_losses_are_ordered_and_meet_in_their_limits():
    net = network((3, 16, 4), seed=2)
    x, y = torch.rand(40, 3, generator=generator(7), dtype=F64), torch.arange(40) % 4

    def loss(method, eps, **options):
        return ct.robust_loss(net, x, y, method, eps, generator=generator(), **options).item()

    assert loss("standard", 0.2) < loss("pgd", 0.2) < loss("sabr", 0.2) < loss("ibp", 0.2)
    assert loss("sabr", 0.2, sabr_lambda=1) == pytest.approx(loss("ibp", 0.2))
    assert loss("sabr", 0.2, sabr_lambda=0) == pytest.approx(loss("pgd", 0.2))
    assert loss("ibp", 0.0) == pytest.approx(loss("standard", 0.2))


@pytest.fixture(scope="module")
def digits():
    return data.digits(classes=range(4), per_class=60)


def test_interval_training_tightens_and_certifies_where_standard_training_does_not(digits):
    net = models.mlp([64, 32, 4], generator=generator())
    before = copy.deepcopy(net.state_dict())
    scores = {}
    for method in ("standard", "ibp"):
        trained = ct.train(net, *digits, method, 0.1, epochs=40, batch_size=60, generator=generator(1))
        assert not trained.training
        scores[method] = ct.evaluate(trained, *digits, 0.1, generator(2))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    for found in scores.values():
        assert found["certified"] <= found["adversarial"] <= found["standard"]
    assert scores["ibp"]["tightness"] > scores["standard"]["tightness"] + 0.2
    assert scores["ibp"]["certified"] > scores["standard"]["certified"] + 0.3


def test_training_repeats_with_the_same_generator_and_keeps_the_mode_of_the_network(digits):
    net = models.mlp([64, 8, 4], generator=generator())
    first, second = (
        ct.train(net, *digits, "sabr", 0.1, epochs=1, batch_size=60, generator=generator(3)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    net.train()
    ct.robust_loss(net, *digits, "pgd", 0.1, generator=generator())
    assert net.training


def test_certified_counts_a_constant_classifier_where_it_is_right(digits):
    net = models.mlp([64, 4], generator=generator())
    net[0].weight.data.zero_()
    net[0].bias.data = torch.tensor([0.0, 1, 0, 0])
    assert ct.evaluate(net, *digits, 0.1, generator())["certified"] == 0.25


def test_cnn7_has_the_shape_and_the_weights_of_the_paper():
    net = ct.cnn7(1, 28, 64, 10, generator())
    assert [layer.out_channels for layer in net if isinstance(layer, nn.Conv2d)] == [64, 64, 128, 128, 128]
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    hidden = net[-3].weight
    assert hidden.shape == (512, 128 * 14 * 14)
    assert hidden.std().item() == pytest.approx(math.sqrt(2 * math.pi) / hidden.shape[1], rel=0.01)


# --- what a reader can get wrong --------------------------------------------------------------------------------------

X, Y = torch.rand(4, 3, generator=generator(), dtype=F64), torch.tensor([0, 1, 2, 3])
UNIT = torch.ones(3, dtype=F64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ct.dln_tightness([]), "weights is empty"),
        (lambda: ct.dln_tightness(HAND[::-1]), "weights must be matrices that chain"),
        (lambda: ct.dln_tightness([torch.ones(3)]), "weights must be matrices"),
        (lambda: ct.dln_tightness(HAND, torch.ones(3)), "eps must be a number or hold 2"),
        (lambda: ct.dln_tightness(HAND, -1.0), "eps must be finite, not negative"),
        (lambda: ct.dln_tightness(HAND, 0.0), "not zero everywhere"),
        (lambda: ct.dln_tightness(HAND, math.nan), "eps must be finite"),
        (lambda: ct.expected_tightness([3, 0]), "widths must be at least 1"),
        (lambda: ct.is_propagation_invariant(HAND, -1), "tol must not be negative"),
        (lambda: ct.ibp_bounds(network(), X, X - 1), "lower must not exceed upper"),
        (lambda: ct.ibp_bounds(network(), X, X[:2]), "shapes"),
        (lambda: ct.box(X, -0.1), "eps must be finite and not negative"),
        (lambda: ct.local_tightness(network(), X, Y, math.nan), "eps must be finite"),
        (lambda: ct.robust_loss(network(), X, Y, "trades", 0.1, generator=generator()), "method must be one of"),
        (
            lambda: ct.robust_loss(network(), X, Y, "sabr", 0.1, sabr_lambda=2, generator=generator()),
            "sabr_lambda must lie in",
        ),
        (lambda: ct.train(network(), X, Y, "ibp", 0.1, epochs=0, generator=generator()), "epochs must be at least 1"),
        (lambda: ct.train(network(), X * math.nan, Y, "ibp", 0.1, epochs=1, generator=generator()), "x holds NaN"),
        (lambda: ct.exact_margin(network(), 0 * UNIT, UNIT, UNIT), "c must have 4 entries"),
        (lambda: ct.exact_margin(network(), 0 * UNIT, UNIT, torch.ones(4), time_limit=0), "must be positive"),
        (lambda: ct.cnn7(1, 28, 0, 10, generator()), "sizes must be at least 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("net", [nn.Sequential(nn.Tanh(), nn.Linear(3, 4)), nn.Linear(3, 4), nn.Sequential(nn.ReLU())])
def test_networks_of_another_form_are_refused(net):
    net = net.double()
    with pytest.raises(TypeError, match="net must"):
        ct.ibp_bounds(net, X, X)
    with pytest.raises(TypeError, match="net must"):
        ct.local_tightness(net, X, Y, 0.1)


def test_exact_verification_wants_linear_layers_and_relus_in_turn():
    with pytest.raises(TypeError, match="net must alternate"):
        ct.exact_margin(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4)), UNIT, UNIT, np.ones(4))
