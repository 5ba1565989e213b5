"""Oracles: the first layer's closed form, the certificate, examples by hand, invariances, and PyTorch's own loop."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from companion import attacks, models
from companion.collapse.grokking_complexity import (
    activation_pattern,
    affinity_gap,
    decision_boundary_points,
    local_complexity,
    orthonormal_frame,
    train_stack,
)

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_net(sizes=(10, 20, 20, 20, 3), seed=0):
    return models.mlp(sizes, generator=generator(seed), dtype=F64)


def inputs(n=60, d=10, seed=1):
    return torch.randn(n, d, generator=generator(seed), dtype=F64)


def frame_of(d=10, p=4, seed=2):
    return orthonormal_frame(d, p, generator(seed)).double()


# --- frames and patterns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "number"), [(1, 1), (7, 3), (7, 7)])
def test_a_frame_is_orthonormal_and_comes_from_its_generator(dim, number):
    frame = orthonormal_frame(dim, number, generator())
    torch.testing.assert_close(frame @ frame.mT, torch.eye(number), rtol=0, atol=1e-5)
    assert torch.equal(frame, orthonormal_frame(dim, number, generator()))
    assert frame.shape == (number, dim)


def test_points_of_one_pattern_share_an_affine_map():
    net, x = random_net(), inputs(4)
    near = x + 1e-9
    assert torch.equal(activation_pattern(net, x), activation_pattern(net, near))
    first = torch.cat([net[0](x), net[2](net[1](net[0](x)))], 1) > 0
    assert torch.equal(activation_pattern(net, x)[:, :40], first)
    assert activation_pattern(net, x).shape == (4, 60)


# --- local complexity -------------------------------------------------------------------------------------------------


def test_local_complexity_of_three_lines_by_hand():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    net[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    net[0].bias.data = torch.tensor([-0.15, -0.5, -0.25])
    for place, radius, count in (
        (0.0, 0.1, 0), (0.0, 0.2, 1), (0.0, 0.3, 2), (0.0, 0.6, 3), (0.2, 0.1, 1), (0.2, 0.2, 2),
    ):  # fmt: skip
        assert local_complexity(net, torch.full((1, 2), place), torch.eye(2), radius).tolist() == [[count]]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), radius=st.floats(0.01, 2))
def test_first_layer_has_its_closed_form(seed, radius):
    net, x, frame = random_net(seed=seed), inputs(seed=seed + 1), frame_of(seed=seed + 2)
    weight, bias = net[0].weight, net[0].bias
    expected = ((x @ weight.mT + bias).abs() < radius * (weight @ frame.mT).abs().amax(1)).sum(1)
    assert torch.equal(local_complexity(net, x, frame, radius)[:, 0], expected)


def test_every_layer_agrees_with_a_loop_over_vertices():
    net, x, frame = random_net(), inputs(20), frame_of()
    counts = local_complexity(net, x, frame, 0.4)
    for centre, count in zip(x, counts, strict=True):
        h, expected = torch.cat([centre + 0.4 * frame, centre - 0.4 * frame]), []
        for linear in net[::2][:-1]:
            z = linear(h)
            expected.append(sum(len(set((column > 0).tolist())) == 2 for column in z.mT))
            h = z.clamp_min(0)
        assert count.tolist() == expected


def test_zero_is_a_certificate_of_affinity():
    net, x, frame = random_net(), inputs(400), frame_of()
    uncut = local_complexity(net, x, frame, 0.05).sum(1) == 0
    gap = affinity_gap(net, x, frame, 0.05, generator())
    assert 0.2 < uncut.double().mean() < 0.6
    assert gap[uncut].max() < 1e-12
    assert gap[~uncut].median() > 1e-6


def test_the_gap_of_an_absolute_value_is_known():
    net = models.mlp([1, 2, 1], generator=generator(), dtype=F64)  # |x|
    net[0].weight.data, net[0].bias.data = torch.tensor([[1.0], [-1.0]], dtype=F64), torch.zeros(2, dtype=F64)
    net[2].weight.data, net[2].bias.data = torch.ones(1, 2, dtype=F64), torch.zeros(1, dtype=F64)
    gap = affinity_gap(net, torch.zeros(2000, 1, dtype=F64), torch.eye(1, dtype=F64), 0.3, generator())
    assert gap.max() == pytest.approx(0.3, rel=1e-2)  # reached in the middle, where f = 0 and the chord is r
    assert gap.max() <= 0.3


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
def test_local_complexity_ignores_what_does_not_move_a_border(seed, scale):
    net, x, frame = random_net(seed=seed), inputs(), frame_of()
    expected = local_complexity(net, x, frame, 0.3)
    order = torch.randperm(20, generator=generator(seed))
    permuted = copy.deepcopy(net)
    permuted[2].weight.data, permuted[2].bias.data = net[2].weight.data[order], net[2].bias.data[order]
    permuted[4].weight.data = net[4].weight.data[:, order]
    scaled = copy.deepcopy(net)
    for parameter in scaled[0].parameters():
        parameter.data *= 2.0 ** round(scale)  # a power of two, so that no rounding moves a border
    scaled[2].bias.data *= 2.0 ** round(scale)
    scaled[4].bias.data *= 2.0 ** round(scale)
    turned = frame[torch.randperm(4, generator=generator(seed))] * torch.tensor([[1.0], [-1], [1], [-1]], dtype=F64)
    assert torch.equal(local_complexity(permuted, x, frame, 0.3), expected)
    assert torch.equal(local_complexity(scaled, x, frame, 0.3), expected)
    assert torch.equal(local_complexity(net, x, turned, 0.3), expected)


def test_first_layer_grows_with_the_radius_from_zero():
    net, x, frame = random_net(), inputs(), frame_of()
    counts = [local_complexity(net, x, frame, radius)[:, 0] for radius in (1e-9, 0.1, 0.3, 1, 3)]
    assert counts[0].sum() == 0
    assert all((low <= high).all() for low, high in pairwise(counts))


def test_images_in_chunks_and_in_evaluation_mode():
    net = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    net[4].eval()
    x = torch.randn(300, 3, 4, 4, generator=generator())
    frame = orthonormal_frame(48, 20, generator())  # 300 x 40 vertices: several chunks
    counts = local_complexity(net, x, frame, 0.5)
    assert [module.training for module in net] == [True, True, True, True, False]
    assert torch.equal(counts, torch.cat([local_complexity(net, part, frame, 0.5) for part in x.split(7)]))
    assert 0 < counts.max() <= 32
    assert local_complexity(net, x[:0], frame, 0.5).shape == (0, 1)


def test_gelu_is_counted_like_relu():
    relu = random_net((10, 20, 3))
    gelu = nn.Sequential(relu[0], nn.GELU(), relu[2])
    assert torch.equal(
        local_complexity(relu, inputs(), frame_of(), 0.3), local_complexity(gelu, inputs(), frame_of(), 0.3)
    )


def test_every_layer_of_a_residual_network_is_counted():
    net = models.resnet(3, (2, 4, 8, 16), 2, 10, generator=generator(), norm=False)
    x = torch.randn(3, 3, 16, 16, generator=generator())
    assert local_complexity(net, x, orthonormal_frame(768, 2, generator()), 0.1).shape == (3, 17)


# --- boundary and attack ----------------------------------------------------------------------------------------------


def test_boundary_points_of_a_linear_classifier_lie_on_its_hyperplane():
    net, a, b = random_net((10, 2)), inputs(seed=3), inputs(seed=4)
    points, mask = decision_boundary_points(net, a, b, 40)
    normal, offset = net[0].weight[1] - net[0].weight[0], net[0].bias[1] - net[0].bias[0]
    assert torch.equal(mask, net(a).argmax(1) != net(b).argmax(1))
    assert 0 < len(points) == mask.sum() < len(a)
    assert (points @ normal + offset).abs().max() < 1e-10
    assert torch.equal(net(points).argmax(1), net(a[mask]).argmax(1))
    t = -(a[mask] @ normal + offset) / ((b - a)[mask] @ normal)
    torch.testing.assert_close(points, a[mask] + t[:, None] * (b - a)[mask], rtol=0, atol=1e-10)


def test_no_pair_no_boundary_point():
    points, mask = decision_boundary_points(random_net(), inputs(), inputs())
    assert points.shape == (0, 10)
    assert not mask.any()


def test_the_room_s_attack_lowers_a_linear_margin_as_far_as_it_can():
    net, x = random_net((10, 2)), inputs()
    y = net(x).argmax(1)
    moved = net(attacks.pgd(net, x, y, 0.01, loss="margin"))
    fall = (net(x) - moved).gather(1, y[:, None]) - (net(x) - moved).gather(1, 1 - y[:, None])
    reach = 0.01 * (net[0].weight[1] - net[0].weight[0]).abs().sum()
    torch.testing.assert_close(fall, reach.expand_as(fall), rtol=0, atol=1e-12)


# --- training ---------------------------------------------------------------------------------------------------------


def losses(outputs, targets):
    return cross_entropy(outputs.mT, targets, reduction="none").mean(1)


def stack(networks, x, y, batch_size, record_at=(20,), record=dict):
    return train_stack(
        networks,
        x,
        y,
        loss=losses,
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
        batch_size=batch_size,
        record_at=record_at,
        record=record,
        generator=generator(),
    )


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_stack_trains_each_network_as_if_it_were_alone(batch_size, kind):
    shape = (4,) if kind == "mlp" else (1, 4, 4)
    x, y = (
        torch.randn(3, 30, *shape, generator=generator(), dtype=F64),
        torch.randint(3, (3, 30), generator=generator()),
    )
    make = partial(models.mlp, [4, 8, 8, 3], dtype=F64) if kind == "mlp" else partial(models.convnet, 1, [2], 3)
    networks = [make(generator=generator(seed)).double() for seed in range(3)]
    alone = copy.deepcopy(networks)
    history = stack(networks, x, y, batch_size)
    g = generator()
    batches = [
        torch.arange(30).expand(3, -1) if batch_size is None else torch.randint(30, (3, 7), generator=g)
        for _ in range(20)
    ]
    for e, network in enumerate(alone):
        optimizer, seen = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1), []
        for batch in batches:
            optimizer.zero_grad()
            value = cross_entropy(network(x[e, batch[e]]), y[e, batch[e]])
            value.backward()
            optimizer.step()
            seen.append(value.detach())
        torch.testing.assert_close(history["loss"][:, e], torch.stack(seen), rtol=0, atol=1e-10)
        for one, other in zip(networks[e].parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=1e-10)


def test_a_stack_records_the_networks_as_they_are():
    networks = [models.mlp([4, 8, 3], generator=generator(seed)) for seed in range(2)]
    x, y = torch.randn(2, 30, 4, generator=generator()), torch.randint(3, (2, 30), generator=generator())
    before = x.clone(), y.clone()
    start = losses(torch.stack([net(part) for net, part in zip(networks, x, strict=True)]), y).detach()
    history = stack(
        networks, x, y, None, record_at=[0, 3, 5],
        record=lambda: {"now": losses(torch.stack([net(part) for net, part in zip(networks, x, strict=True)]), y)},
    )  # fmt: skip
    assert history["step"].tolist() == [0, 3, 5]
    assert history["loss"].shape == (5, 2)
    torch.testing.assert_close(history["now"][0], start)
    torch.testing.assert_close(history["now"][1], history["loss"][3])
    assert (history["now"][-1] < start).all()
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert stack(networks, x, y, None, record_at=[0])["loss"].shape == (0, 2)


# --- bad input --------------------------------------------------------------------------------------------------------


ONE, TWO = torch.zeros(1, 2, 10, dtype=F64), torch.zeros(2, 2, 10, dtype=F64)  # inputs of one network and of two
LABELS = torch.zeros(1, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: orthonormal_frame(3, 4, generator()), "num_vectors must be between 1 and dim=3, got 4"),
        (lambda: orthonormal_frame(3, 0, generator()), "num_vectors"),
        (lambda: activation_pattern(nn.Linear(2, 2), torch.zeros(1, 2)), "net must contain"),
        (lambda: local_complexity(nn.Linear(2, 2), torch.zeros(1, 2), torch.eye(2), 1.0), "net must contain"),
        (lambda: local_complexity(random_net(), inputs(), frame_of(), 0.0), "radius must be positive, got 0.0"),
        (lambda: local_complexity(random_net(), inputs(), frame_of(9), 1.0), "frame must have one column"),
        (lambda: affinity_gap(random_net(), inputs(), frame_of(), -1.0, generator()), "radius"),
        (lambda: decision_boundary_points(random_net(), inputs(3), inputs(2)), "a and b must have the same"),
        (lambda: decision_boundary_points(random_net(), inputs(), inputs(), 0), "iterations"),
        (lambda: stack([], ONE[:0], LABELS[:0], None), "networks must hold"),
        (lambda: stack([nn.Sequential(nn.BatchNorm1d(4))], ONE, LABELS, None), "buffers"),
        (lambda: stack([random_net()], TWO, LABELS, None), "x and y must start"),
        (lambda: stack([random_net()], ONE, LABELS[:, :1], None), "x and y must start"),
        (lambda: stack([random_net()], ONE, LABELS, 0), "batch_size"),
        (lambda: stack([random_net()], ONE, LABELS, 1, record_at=[-1]), "record_at"),
        (lambda: stack([random_net()], ONE, LABELS, 1, record_at=[]), "record_at"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_stack_takes_sequential_networks_only():
    with pytest.raises(TypeError, match=r"nn\.Sequential, got \['Linear'\]"):
        stack([nn.Linear(10, 3)], ONE, LABELS, None)
