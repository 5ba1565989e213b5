"""Oracles: SciPy's integer programs, brute force, torch.nn.utils.prune, NumPy on linear networks, and invariances."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn
from torch.nn.utils import prune

from companion import data, models
from companion.collapse.layer_adaptive_pruning import (
    allocate,
    apply_counts,
    digit_cnn,
    distortion_curves,
    global_magnitude_counts,
    lamp_counts,
    lamp_scores,
    layer_weights,
    logits,
    magnitude_mask,
    output_distortion,
    prunable_layers,
    prune_iteratively,
    train,
    uniform_counts,
)

HAND = np.array([[0, 1, 4], [0, 2, 2.5]])
HALVES = np.array([0, 0.5, 1])
SIZES = (90, 300, 1200, 50, 700, 2400, 333, 64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n=12):
    return torch.randn(n, 1, 8, 8, generator=generator(9))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def random_problem(rng, n_layers, n_points, steps=(0.1, 5)):
    curves = rng.exponential(size=(n_layers, n_points)).cumsum(1) * rng.uniform(*steps, size=(n_layers, 1))
    return curves - curves[:, :1], rng.integers(1, 40, n_layers).tolist(), np.linspace(0, 1, n_points)


def brute_force(curves, counts, target):
    choices = product(range(curves.shape[1]), repeat=len(curves))
    rows = range(len(curves))
    return min(
        (sum(curves[rows, list(c)]) for c in choices if sum(counts[rows, list(c)]) >= target), default=float("inf")
    )


# --- the knapsack -----------------------------------------------------------------------------------------------------


def test_allocation_of_the_hand_case():
    assert allocate(HAND, [2, 2], HALVES, 0.5) == ([0, 1], [0, 2], 2.5)
    assert allocate(HAND, [2, 2], HALVES, 0.75) == ([0.5, 1], [1, 2], 3.5)
    assert allocate(HAND, [2, 2], HALVES, 0) == ([0, 0], [0, 0], 0)
    assert allocate(HAND, [2, 2], HALVES, 1) == ([1, 1], [2, 2], 6.5)


@pytest.mark.parametrize(("sparsity", "optimum"), [(0.3, 2.3226448), (0.6, 19.0061241), (0.9, 65.3565809)])
def test_allocation_is_the_optimum_of_an_integer_program(sparsity, optimum):
    rng = np.random.default_rng(7)
    curves = np.cumsum(rng.exponential(size=(8, 11)), 1) * rng.uniform(0.2, 5, size=(8, 1))
    curves -= curves[:, :1]
    grid = np.linspace(0, 1, 11)
    counts = np.rint(np.outer(SIZES, grid))
    rules = [
        LinearConstraint(np.kron(np.eye(8), np.ones(11)), 1, 1),
        LinearConstraint(counts.reshape(1, -1), np.ceil(sparsity * sum(SIZES) - 1e-9), np.inf),
    ]
    options = {"mip_rel_gap": 0}
    theirs = milp(curves.ravel(), constraints=rules, integrality=np.ones(88), bounds=Bounds(0, 1), options=options).fun
    ours = allocate(curves, SIZES, grid, sparsity)
    assert ours.predicted_distortion == pytest.approx(theirs, abs=1e-9)
    assert ours.predicted_distortion == pytest.approx(optimum, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), sparsity=st.floats(0, 0.97), monotone=st.booleans())
def test_allocation_is_the_best_of_all(seed, sparsity, monotone):
    rng = np.random.default_rng(seed)
    curves, sizes, grid = random_problem(rng, 4, 5)
    curves = curves if monotone else rng.permuted(curves, axis=1)  # a curve need not rise
    counts = np.rint(np.outer(sizes, grid)).astype(int)
    chosen = allocate(curves, sizes, grid, sparsity)
    at = [int(np.flatnonzero(grid == fraction)[0]) for fraction in chosen.fractions]
    assert chosen.counts == counts[range(4), at].tolist()
    assert sum(chosen.counts) >= sparsity * sum(sizes) - 1e-9
    assert chosen.predicted_distortion == pytest.approx(curves[range(4), at].sum(), abs=1e-12)
    best = brute_force(curves, counts, np.ceil(sparsity * sum(sizes) - 1e-9))
    assert chosen.predicted_distortion == pytest.approx(best, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100))
def test_allocation_knows_no_order_of_layers_and_no_unit(seed, scale):
    rng = np.random.default_rng(seed)
    curves, sizes, grid = random_problem(rng, 5, 6)
    order = rng.permutation(5)
    one = allocate(curves, sizes, grid, 0.7)
    other = allocate(scale * curves[order], [sizes[l] for l in order], grid, 0.7)
    assert other.predicted_distortion == pytest.approx(scale * one.predicted_distortion, rel=1e-9)
    assert other.fractions == [one.fractions[l] for l in order]  # the optimum of random curves is unique


def test_more_sparsity_never_costs_less():
    curves, sizes, grid = random_problem(np.random.default_rng(3), 6, 9)
    costs = [allocate(curves, sizes, grid, sparsity).predicted_distortion for sparsity in np.linspace(0, 1, 21)]
    assert (np.diff(costs) >= 0).all()


@pytest.mark.parametrize(("least", "most"), [([0.4, 0, 0.2, 0.9], 1.0), (None, 0.8), ([0.25] * 4, 0.9)])
def test_bounds_on_fractions_are_kept_and_optimal(least, most):
    curves, sizes, _ = random_problem(np.random.default_rng(5), 4, 11)
    grid = np.linspace(0, 1, 11)
    chosen = allocate(curves, sizes, grid, 0.6, least, most)
    counts = np.rint(np.outer(sizes, grid)).astype(int)
    allowed = (counts >= np.rint(np.multiply(least or [0] * 4, sizes))[:, None]) & (grid <= most)
    assert all(allowed[l, np.isclose(grid, a)].all() for l, a in enumerate(chosen.fractions))
    best = brute_force(np.where(allowed, curves, np.inf), counts, np.ceil(0.6 * sum(sizes) - 1e-9))
    assert chosen.predicted_distortion == pytest.approx(best, abs=1e-12)


def test_counts_that_were_chosen_once_may_be_chosen_again():
    sizes, grid = [144, 640], np.linspace(0, 1, 41)  # 144 * 0.325 = 46.8 is rounded up
    curves = np.array([grid, 10 * grid])
    first = allocate(curves, sizes, grid, 0.0599)
    again = allocate(curves, sizes, grid, 0.0599, min_fractions=np.divide(first.counts, sizes))
    assert again == first
    assert first.counts[0] == 47


def test_the_target_is_met_by_counts_without_rounding_up_too_far():
    assert sum(allocate(np.zeros((1, 6)), [15], np.linspace(0, 1, 6), 0.2).counts) == 3  # 0.2 * 15 > 3 in floats
    coarse = allocate(np.array([[0, 1.0]]), [7], np.array([0, 1.0]), 0.3)  # only an overshoot is feasible
    assert coarse.counts == [7]


# --- magnitude masks and the baselines --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 23, 24])
def test_masks_agree_with_torch_prune(count):
    layer = nn.Linear(6, 4)
    mask = magnitude_mask(layer.weight, count)
    prune.l1_unstructured(layer, "weight", amount=count)
    assert torch.equal(mask, layer.weight_mask.bool())


def test_equal_weights_go_in_order():
    weight = torch.tensor([[1.0, -1, 1], [-1, 0.5, 1]])
    assert magnitude_mask(weight, 3).tolist() == [[False, False, True], [True, False, True]]


def test_global_counts_agree_with_torch_prune():
    network = models.mlp([7, 9, 5, 3], generator=generator())
    names = prunable_layers(network)
    counts = global_magnitude_counts(layer_weights(network, names), 0.4)
    ours = apply_counts(network, names, counts)
    modules = [(network.get_submodule(name), "weight") for name in names]
    prune.global_unstructured(modules, pruning_method=prune.L1Unstructured, amount=sum(counts))
    for name in names:
        assert torch.equal(ours.get_parameter(f"{name}.weight"), network.get_submodule(name).weight)


def test_lamp_scores_of_the_paper_s_definition():
    expected = torch.tensor([1 / 14, 4 / 13, 1.0], dtype=torch.float64)
    torch.testing.assert_close(lamp_scores(torch.tensor([1.0, -2, 3])), expected)
    torch.testing.assert_close(lamp_scores(torch.tensor([[3.0], [1], [-2]])), expected[[2, 0, 1]][:, None])
    assert lamp_scores(torch.tensor([0.0, 0, 2])).tolist() == [0, 0, 1]
    assert lamp_scores(torch.zeros(3)).tolist() == [0, 0, 0]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), sparsity=st.floats(0, 0.9), scale=st.floats(0.01, 100))
def test_lamp_ignores_the_scale_of_a_layer_and_empties_none(seed, sparsity, scale):
    weights = [torch.randn(size, generator=generator(seed), dtype=torch.float64) for size in (20, 60, 120)]
    counts = lamp_counts(weights, sparsity)
    assert counts == lamp_counts([weights[0], 2.0 * weights[1], weights[2] * scale], sparsity)
    assert sum(counts) == int(np.ceil(sparsity * 200 - 1e-9))
    assert all(count < weight.numel() for count, weight in zip(counts, weights, strict=True))


def test_global_magnitude_does_not_ignore_the_scale():
    weights = [torch.ones(10), 0.1 * torch.ones(10)]
    assert global_magnitude_counts(weights, 0.5) == [0, 10]
    assert uniform_counts(weights, 0.5) == [5, 5]
    assert uniform_counts([torch.ones(3), torch.ones(7)], 0.5) == [2, 4]  # 1.5 and 3.5, to even


# --- distortion -------------------------------------------------------------------------------------------------------


def test_curve_of_a_linear_network_by_numpy():
    network = models.mlp([5, 4], generator=generator(), dtype=torch.float64)
    x = torch.randn(30, 5, generator=generator(1), dtype=torch.float64)
    grid = np.linspace(0, 1, 11)
    weight = network[0].weight.detach().numpy()
    mean, worst = [], []
    for fraction in grid:
        gone = np.argsort(np.abs(weight).ravel())[: int(np.rint(20 * fraction))]
        change = np.zeros(20)
        change[gone] = weight.ravel()[gone]
        per_sample = ((x.numpy() @ change.reshape(4, 5).T) ** 2).mean(1)
        mean.append(per_sample.mean())
        worst.append(per_sample.max())
    np.testing.assert_allclose(distortion_curves(network, ["0"], x, grid)[0], mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(distortion_curves(network, ["0"], x, grid, True)[0], worst, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("make", [digit_cnn, partial(models.resnet, 3, (3, 6, 12), 1, 10)])
def test_curves_are_measured_one_layer_at_a_time_and_nothing_changes(make):
    network = make(generator=generator())
    x = random_images() if make is digit_cnn else torch.randn(4, 3, 16, 16, generator=generator(2))
    names, grid, before = prunable_layers(network), np.array([0, 0.3, 0.8, 1.0]), state(network)
    curves = distortion_curves(network, names, x, grid)
    sizes = [weight.numel() for weight in layer_weights(network, names)]
    for l, size in enumerate(sizes):
        for a, fraction in enumerate(grid):
            alone = [0] * len(names)
            alone[l] = int(np.rint(size * fraction))
            expected = output_distortion(network, apply_counts(network, names, alone), x)
            assert curves[l, a] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert (curves[:, 0] == 0).all()
    assert same(state(network), before)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_curves_of_a_pruned_network_start_at_zero_and_then_agree_with_direct_evaluation():
    network, x, grid = digit_cnn(generator=generator()), random_images(), np.linspace(0, 1, 6)
    names = prunable_layers(network)
    counts = uniform_counts(layer_weights(network, names), 0.5)
    pruned = apply_counts(network, names, counts)
    curves = distortion_curves(pruned, names, x, grid)
    assert (curves[:, grid < 0.5] == 0).all()
    sizes = [weight.numel() for weight in layer_weights(network, names)]
    more = [max(count, int(np.rint(0.8 * size))) for count, size in zip(counts, sizes, strict=True)]
    for l in range(len(names)):
        alone = [more[i] if i == l else counts[i] for i in range(len(names))]
        direct = output_distortion(pruned, apply_counts(pruned, names, alone), x)
        assert curves[l, 4] == pytest.approx(direct, rel=1e-3)


def test_distortion_of_independent_changes_of_a_linear_network_adds_up():
    x = torch.randn(200, 6, generator=generator(3), dtype=torch.float64)
    network = models.mlp([6, 8, 4], generator=generator(4), activation=None, dtype=torch.float64)
    names, g = ["0", "1"], generator(5)
    weights = layer_weights(network, names)
    before = logits(network, x)
    sums, joint = [], []
    for _ in range(300):
        changed = {
            f"{name}.weight": weight * (1 + 0.05 * (2.0 * torch.randint(2, weight.shape, generator=g) - 1))
            for name, weight in zip(names, weights, strict=True)
        }
        alone = [(logits(network, x, {key: value}) - before).square().mean() for key, value in changed.items()]
        sums.append(float(sum(alone)))
        joint.append(float((logits(network, x, changed) - before).square().mean()))
    assert np.mean(joint) / np.mean(sums) == pytest.approx(1, abs=0.05)


def test_a_single_perturbed_layer_of_a_linear_network_scales_quadratically():
    network = models.mlp([5, 6, 3], generator=generator(), activation=None, dtype=torch.float64)
    x, weight = torch.randn(20, 5, generator=generator(1), dtype=torch.float64), network[0].weight.detach()
    change = torch.randn(weight.shape, generator=generator(2), dtype=torch.float64)
    one, two = (
        (logits(network, x, {"0.weight": weight + step * change}) - logits(network, x)).square().mean()
        for step in (1, 2)
    )
    assert float(two / one) == pytest.approx(4, rel=1e-10)


def test_every_curve_ends_where_the_signal_ends():
    network = digit_cnn(generator=generator())
    names, x = prunable_layers(network), random_images()
    last = distortion_curves(network, names, x, np.array([0, 1.0]))[-1, 1]
    expected = (logits(network, x) - network[-1].bias.detach()).square().mean()
    assert last == pytest.approx(float(expected), rel=1e-4)


# --- networks, training, the iterative protocol -----------------------------------------------------------------------


def test_networks_have_the_sizes_of_the_papers():
    weights = layer_weights(digit_cnn(generator=generator()), prunable_layers(digit_cnn(generator=generator())))
    assert [weight.numel() for weight in weights] == [144, 2304, 4608, 9216, 32768, 640]
    network = models.resnet(3, (16, 32, 64), 5, 10, generator=generator())  # ResNet-32
    convolutions = [name for name in prunable_layers(network) if "shortcut" not in name]
    assert len(convolutions) == 32
    assert (
        sum(weight.numel() for weight in layer_weights(network, convolutions)) == 461_872
    )  # 432 + 23 040 + 87 552 + 350 208 + 640
    assert 0.46e6 < sum(parameter.numel() for parameter in network.parameters()) < 0.47e6
    assert logits(network, torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("make", [digit_cnn, partial(models.resnet, 3, (4, 8, 16), 1, 10)])
def test_networks_come_from_their_generator_alone(make):
    torch.manual_seed(0)
    one, after = make(generator=generator(1)), torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == after
    assert same(state(one), state(make(generator=generator(1))))
    assert not same(state(one), state(make(generator=generator(2))))
    for module in one.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.abs().max() <= module.weight[0].numel() ** -0.5


def test_training_learns_and_keeps_pruned_weights_at_zero():
    x, y = data.digits(per_class=40)
    x = x.view(-1, 1, 8, 8)
    network = digit_cnn(generator=generator())
    names = prunable_layers(network)
    masks = {
        f"{n}.weight": magnitude_mask(w, w.numel() // 2)
        for n, w in zip(names, layer_weights(network, names), strict=True)
    }
    pruned = apply_counts(network, names, [w.numel() // 2 for w in layer_weights(network, names)])
    before = state(pruned)
    train(pruned, x, y, masks, epochs=6, batch_size=40, lr=3e-3, generator=generator(), augment=None)
    assert (logits(pruned, x).argmax(1) == y).float().mean() > 0.85
    for name, mask in masks.items():
        weight = pruned.get_parameter(name).detach()
        assert not weight[~mask].any()
        assert (weight != before[name])[mask].any()


def test_training_sees_augmented_inputs():
    seen = []

    def record(batch, g):
        seen.append(batch.shape)
        return 0 * batch

    network, x = digit_cnn(generator=generator()), random_images(8)
    before = network[0].weight.detach().clone()
    train(
        network, x, torch.arange(8), {}, epochs=2, batch_size=4, lr=0.1, generator=generator(), augment=record,
        optimizer=torch.optim.SGD,
    )  # fmt: skip
    assert seen == [(4, 1, 8, 8)] * 4
    assert torch.equal(network[0].weight, before)  # inputs were zero, so the first layer got no gradient


def test_iterative_pruning_follows_its_schedule():
    network, x, grid = digit_cnn(generator=generator()), random_images(), np.linspace(0, 1, 11)
    names, before = prunable_layers(network), state(network)
    sizes = [weight.numel() for weight in layer_weights(network, names)]
    calls, seen = [], []

    def allocator(current, sparsity, counts):
        seen.append(current)
        least = np.divide(counts, sizes)
        return allocate(distortion_curves(current, names, x, grid), sizes, grid, sparsity, least).counts

    def finetune(current, masks):
        calls.append({name: int((~mask).sum()) for name, mask in masks.items()})
        for name, mask in masks.items():
            current.get_parameter(name).data.add_(0.01 * mask)

    stages = prune_iteratively(network, names, [0.3, 0.6, 0.9], finetune, allocator)
    assert all(one is other for one, other in zip(seen, [network, *stages[:-1]], strict=True))  # as it is by then
    zeros = np.array([[int((weight == 0).sum()) for weight in layer_weights(stage, names)] for stage in stages])
    assert zeros.tolist() == [list(call.values()) for call in calls]
    assert (np.diff(zeros, axis=0) >= 0).all()
    assert (zeros.sum(1) / sum(sizes) >= np.array([0.3, 0.6, 0.9])).all()
    alive = [weight != 0 for weight in layer_weights(stages[2], names)]
    for now, earlier in zip(alive, layer_weights(stages[0], names), strict=True):
        assert (earlier[now] != 0).all()  # nothing comes back
    assert same(state(network), before)


# --- errors -----------------------------------------------------------------------------------------------------------


CNN, IMAGES = digit_cnn(generator=generator()), random_images(2)
NAMES, ONES = prunable_layers(CNN), [torch.ones(4)]


def leave(network, masks):
    pass


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: magnitude_mask(torch.ones(3), 4), "num_pruned"),
        (lambda: magnitude_mask(torch.ones(3), -1), "num_pruned"),
        (lambda: layer_weights(CNN, []), "layers"),
        (lambda: layer_weights(CNN, ["0", "0"]), "layers"),
        (lambda: layer_weights(CNN, ["1"]), "layers"),
        (lambda: logits(CNN, IMAGES * torch.nan), "inputs"),
        (lambda: output_distortion(CNN, CNN, IMAGES[:0]), "inputs"),
        (lambda: distortion_curves(CNN, ["nothing"], IMAGES, HALVES), "layers"),
        (lambda: distortion_curves(CNN, NAMES, IMAGES / 0, HALVES), "inputs"),
        (lambda: distortion_curves(CNN, NAMES, IMAGES, HALVES[1:]), "grid"),
        (lambda: distortion_curves(CNN, NAMES, IMAGES, np.array([0, 0.5, 0.5])), "grid"),
        (lambda: distortion_curves(CNN, NAMES, IMAGES, np.array([0, 2])), "grid"),
        (lambda: allocate(HAND, [2, 2, 2], HALVES, 0.5), "curves"),
        (lambda: allocate(HAND * np.nan, [2, 2], HALVES, 0.5), "curves"),
        (lambda: allocate(HAND, [2, 0], HALVES, 0.5), "sizes"),
        (lambda: allocate(HAND, [2, 2], HALVES[::-1], 0.5), "grid"),
        (lambda: allocate(HAND, [2, 2], HALVES, 1.1), "sparsity"),
        (lambda: allocate(HAND, [2, 2], HALVES, 0.5, [0]), "min_fractions"),
        (lambda: allocate(HAND, [2, 2], HALVES, 0.5, [0, 2]), "min_fractions"),
        (lambda: allocate(HAND, [2, 2], HALVES, 0.75, max_fraction=0.5), "max_fraction"),
        (lambda: allocate(HAND, [2, 2], HALVES, 0.5, [1, 0], max_fraction=0.5), "min_fractions"),
        (lambda: lamp_counts(ONES, -0.1), "sparsity"),
        (lambda: global_magnitude_counts(ONES, 1.5), "sparsity"),
        (lambda: uniform_counts(ONES, 2), "sparsity"),
        (lambda: apply_counts(CNN, NAMES, [1]), "counts"),
        (lambda: apply_counts(CNN, NAMES, [145, 0, 0, 0, 0, 0]), "num_pruned"),
        (lambda: prune_iteratively(CNN, NAMES, [], leave, None), "schedule"),
        (lambda: prune_iteratively(CNN, NAMES, [0.5, 0.4], leave, None), "schedule"),
        (lambda: prune_iteratively(CNN, NAMES, [0.1, 0.2], leave, lambda net, s, k: [5 - k[0]] * 6), "allocator"),
        (
            lambda: prune_iteratively(
                CNN, NAMES, [0.1], lambda net, masks: net[0].weight.data.fill_(1), lambda net, s, k: [5] * 6
            ),
            "finetune",
        ),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
