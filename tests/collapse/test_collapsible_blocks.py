"""Oracles: running the two convolutions, autograd's Jacobian, actual SGD steps, hook counts, examples by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from companion import data
from companion.collapse import collapsible_blocks as cb
from companion.collapse.collapsible_blocks import SESR, CollapsibleLinearBlock, collapse_linear_block

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def block(*arguments, seed=0, **options):
    return CollapsibleLinearBlock(*arguments, **options, generator=generator(seed)).double()


def lively(network, seed=0):
    """Slopes away from their common start, so that a swapped channel shows."""
    for activation in network.activations:
        nn.init.uniform_(activation.weight, -0.5, 0.9, generator=generator(seed))
    return network


# --- the block --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 3, 5]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(1, 8),
    st.integers(1, 8),
    st.booleans(),
)
def test_collapsed_block_equals_the_two_convolutions_up_to_the_border(k, c, o, r, height, width, residual):
    A, a, B, b, x = random(r, c, k, k), random(r), random(o, r), random(o), random(2, c, height, width)
    residual = residual and c == o
    expected = F.conv2d(F.conv2d(x, A, a, padding=k // 2), B[:, :, None, None], b) + (x if residual else 0)
    W, beta = collapse_linear_block(A, a, B, b, residual)
    torch.testing.assert_close(F.conv2d(x, W, beta, padding=k // 2), expected, rtol=0, atol=1e-12)
    convs = [nn.Conv2d(c, r, k, dtype=F64), nn.Conv2d(r, o, 1, dtype=F64)]
    for conv, weight in zip(convs, (A, B[:, :, None, None]), strict=True):
        conv.weight.data = weight
    plain, _ = collapse_linear_block(A, a, B, b)
    torch.testing.assert_close(cb.collapse_by_probing(convs), plain, rtol=0, atol=1e-12)


def test_example_by_hand():
    A = torch.stack([F.pad(torch.ones(1, 1), [1] * 4), torch.ones(3, 3)])[:, None]
    W, beta = collapse_linear_block(A, torch.ones(2), torch.tensor([[2.0, -1.0]]), torch.tensor([0.5]), residual=True)
    expected = -torch.ones(1, 1, 3, 3)
    expected[0, 0, 1, 1] = 2.0
    assert torch.equal(W, expected)
    assert beta.tolist() == [1.5]


def test_residual_adds_the_identity_map():
    A, a, B, b, x = random(5, 3, 3, 3), random(5), random(3, 5), random(3), random(1, 3, 6, 7)
    (with_it, beta), (without, same) = (collapse_linear_block(A, a, B, b, flag) for flag in (True, False))
    torch.testing.assert_close(F.conv2d(x, with_it - without, padding=1), x)
    assert torch.equal(beta, same)


def test_jacobian_at_a_pixel_is_the_kernel():
    layer = block(2, 3, 3, 4, mode="expanded")
    x = random(1, 2, 5, 5)
    jacobian = torch.func.jacrev(lambda image: layer(image)[0, :, 2, 3])(x)[:, 0]
    W, _ = layer.kernel()
    torch.testing.assert_close(jacobian[:, :, 1:4, 2:5], W, rtol=0, atol=1e-12)
    assert jacobian[:, :, 0].abs().max() == 0
    assert jacobian[..., :2].abs().max() == 0


def test_probing_a_chain_of_three_equals_running_it():
    convs = [nn.Conv2d(2, 5, 1), nn.Conv2d(5, 4, (3, 5), padding=(1, 2)), nn.Conv2d(4, 3, 1)]
    convs = [conv.double() for conv in convs]
    for seed, conv in enumerate(convs):
        conv.weight.data = random(*conv.weight.shape, seed=seed)
        nn.init.zeros_(conv.bias)
    x = random(2, 2, 6, 7)
    W = cb.collapse_by_probing(convs)
    assert W.shape == (3, 2, 3, 5)
    torch.testing.assert_close(F.conv2d(x, W, padding=(1, 2)), nn.Sequential(*convs)(x), rtol=0, atol=1e-12)


def test_two_large_kernels_make_a_larger_one():
    convs = [nn.Conv2d(2, 3, 3, dtype=F64), nn.Conv2d(3, 2, 5, dtype=F64)]
    for seed, conv in enumerate(convs):
        conv.weight.data = random(*conv.weight.shape, seed=seed)
        nn.init.zeros_(conv.bias)
    x = random(1, 2, 9, 9)
    W = cb.collapse_by_probing(convs)
    assert W.shape[2:] == (7, 7)
    torch.testing.assert_close(F.conv2d(x, W), nn.Sequential(*convs)(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("residual", [False, True])
def test_both_modes_have_the_same_outputs_and_gradients(residual):
    layer, x = block(3, 3, 3, 7, residual), random(2, 3, 5, 6).requires_grad_()
    found = {}
    for mode in ("collapsed", "expanded"):
        layer.mode = mode
        y = layer(x)
        found[mode] = [y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.to_conv()(x), found["expanded"][0], rtol=0, atol=1e-12)


def test_without_expansion_a_block_is_an_ordinary_convolution():
    layer, x = block(2, 4, 3, expansion=None), random(1, 2, 5, 5)
    assert torch.equal(layer(x), layer.expand(x))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["expand.weight", "expand.bias"]


def test_initial_weights_come_from_the_generator_alone():
    state = torch.get_rng_state()
    one, two, other = (block(2, 4, 3, 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.expand.weight, two.expand.weight)
    assert not torch.equal(one.expand.weight, other.expand.weight)
    assert one.expand.weight.abs().max() <= 18**-0.5
    assert one.project.weight.abs().max() > 0.8 * 8**-0.5


# --- the update law ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
def test_update_law_is_the_first_order_of_an_sgd_step(residual):
    x, target, change = random(2, 3, 6, 6), random(2, 3, 6, 6, seed=1), {}
    for lr in (1e-3, 1e-4):
        layer = block(3, 3, 3, 8, residual)
        W, beta = (value.detach().requires_grad_() for value in layer.kernel())
        G, g = torch.autograd.grad((F.conv2d(x, W, beta, padding=1) - target).square().mean(), [W, beta])
        parameters = layer.expand.weight, layer.expand.bias, layer.project.weight.flatten(1)
        law = cb.collapsed_gradient(*parameters, G, g).detach()
        (layer(x) - target).square().mean().backward()
        torch.optim.SGD(layer.parameters(), lr=lr).step()
        change[lr] = float((layer.kernel()[0] - W + lr * law).detach().norm() / (lr * law).norm())
    assert change[1e-3] < 1e-3
    assert 9 < change[1e-3] / change[1e-4] < 11  # what is left is of the next order


def test_update_law_of_a_scalar_block():
    w1, w2, G = 0.7, -1.3, 2.0
    zero = torch.zeros(1)
    law = cb.collapsed_gradient(
        torch.full((1, 1, 1, 1), w1), zero, torch.tensor([[w2]]), torch.full((1, 1, 1, 1), G), zero
    )
    assert float(law) == pytest.approx((w1**2 + w2**2) * G)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("short_residual", "scale"), [(True, 2), (False, 2), (True, 4)])
def test_network_is_what_the_paper_draws(short_residual, scale):
    network = lively(SESR(4, 2, 8, scale, short_residual, mode="expanded", generator=generator())).double()
    x = torch.rand(2, 1, 5, 6, generator=generator(), dtype=F64)
    first, second, third, last = network.blocks

    def run(layer, value):
        return layer.project(layer.expand(value))

    h0 = run(first, x - 0.5)
    h1 = run(second, h0) + (h0 if short_residual else 0)
    h1 = h1.clamp(min=0) + network.activations[0].weight[:, None, None] * h1.clamp(max=0)
    h2 = run(third, h1) + (h1 if short_residual else 0)
    h2 = h2.clamp(min=0) + network.activations[1].weight[:, None, None] * h2.clamp(max=0)
    channels = run(last, h2 + h0) + x
    expected = torch.zeros(2, 1, 5 * scale, 6 * scale, dtype=F64)
    for channel in range(scale**2):
        expected[:, 0, channel // scale :: scale, channel % scale :: scale] = channels[:, channel]
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-12)
    narrow = network.collapse()
    torch.testing.assert_close(narrow(x), expected, rtol=0, atol=1e-12)
    assert all(isinstance(layer, nn.Conv2d) for layer in narrow.blocks)
    assert isinstance(network.blocks[0], CollapsibleLinearBlock), "collapse must leave the network as it is"
    with torch.no_grad():
        narrow.activations[0].weight.zero_()
        narrow.blocks[0].weight.zero_()
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("expansion", [8, None])
def test_another_factor_keeps_all_but_the_last_block(expansion):
    network = lively(SESR(4, 2, expansion, 2, generator=generator()))
    other, fresh = network.rescale(4, generator(1)), SESR(4, 2, expansion, 4, generator=generator(1))
    x = torch.rand(1, 1, 5, 6, generator=generator())
    assert other(x).shape == (1, 1, 20, 24)
    assert [tuple(p.shape) for p in other.parameters()] == [tuple(p.shape) for p in fresh.parameters()]
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in fresh.parameters()]
    for before, after in zip(network.blocks[:-1], other.blocks[:-1], strict=True):
        assert torch.equal(
            before(x.expand(1, before.expand.in_channels, -1, -1)), after(x.expand(1, after.expand.in_channels, -1, -1))
        )
    assert torch.equal(other.activations[1].weight, network.activations[1].weight)
    with torch.no_grad():
        other.blocks[0].expand.weight.zero_()
    assert network.blocks[0].expand.weight.abs().max() > 0, "the first network must stay as it is"
    assert network.scale == 2


@pytest.mark.parametrize(
    ("features", "blocks", "scale", "parameters", "gmacs"),  # for an output of 1280 x 720
    [
        (16, 3, 2, 8912, 2.053),
        (16, 5, 2, 13520, 3.115),
        (16, 7, 2, 18128, 4.177),
        (16, 11, 2, 27344, 6.300),
        (32, 11, 2, 105376, 24.28),
        (16, 5, 4, 18320, 1.055),
        (16, 11, 4, 32144, 1.851),
    ],
)
def test_counts_of_the_paper(features, blocks, scale, parameters, gmacs):
    assert cb.count_parameters(features, blocks, scale) == parameters
    macs = cb.count_macs(720 // scale, 1280 // scale, features, blocks, scale)
    assert macs / 1e9 == pytest.approx(gmacs, rel=5e-4)
    network = SESR(features, blocks, None, scale, generator=generator()).collapse()
    assert sum(layer.weight.numel() for layer in network.blocks) == parameters


def test_macs_agree_with_a_count_of_the_running_network():
    counted = []

    def hook(conv, _, output):
        counted.append(output[0].numel() * conv.weight[0].numel())

    network = SESR(8, 2, 12, generator=generator()).collapse()
    for layer in network.blocks:
        layer.register_forward_hook(hook)
    network(torch.zeros(1, 1, 9, 7))
    assert sum(counted) == cb.count_macs(9, 7, 8, 2, 2)


def test_training_macs_are_those_of_the_authors():
    options = {"batch": 32, "patch": 64, "features": 16, "blocks": 5, "scale": 2, "expansion": 256}
    assert cb.training_macs(**options, mode="expanded") == 318720 * 131072
    assert cb.training_macs(**options, mode="expanded") / 1e9 == pytest.approx(41.77, abs=0.01)
    assert cb.training_macs(**options, mode="collapsed") / 1e9 == pytest.approx(1.84, abs=0.005)


def test_training_macs_agree_with_a_count_of_the_running_network():
    counted = []

    def hook(conv, _, output):
        counted.append(output.numel() * conv.weight[0].numel())

    network = SESR(6, 2, 10, mode="expanded", generator=generator())
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:
        conv.register_forward_hook(hook)
    network(torch.zeros(3, 1, 8, 8))
    assert sum(counted) == cb.training_macs(3, 8, 6, 2, 2, 10, "expanded")
    counted.clear()
    for layer in network.blocks:  # Algorithm 1: c impulses, cut to the k x k pixels that they reach
        c, k = layer.expand.in_channels, layer.expand.kernel_size[0]
        impulses = F.pad(torch.eye(c)[:, :, None, None], [k // 2] * 4)
        layer.project(layer.expand(impulses))
    narrow = cb.count_macs(8, 8, 6, 2, 2)
    assert 3 * narrow + sum(counted) == cb.training_macs(3, 8, 6, 2, 2, 10, "collapsed")


# --- training and judging ---------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    target = torch.rand(3, 1, 12, 10, generator=generator())
    wrong = target + torch.tensor([0.1, 0.01, 0.001])[:, None, None, None]
    torch.testing.assert_close(cb.psnr(wrong, target), torch.tensor([20.0, 40.0, 60.0]), rtol=0, atol=0.05)
    spoiled = wrong.clone()
    spoiled[..., :2, :] = spoiled[..., -2:, :] = spoiled[..., :2] = spoiled[..., -2:] = 7.0
    assert torch.equal(cb.psnr(spoiled, target), cb.psnr(wrong, target))
    assert (cb.psnr(spoiled, target, shave=1) < 15).all()
    assert cb.psnr(wrong, target, shave=0)[0] == pytest.approx(20.0, abs=0.05)


def test_mean_psnr_clamps_and_weighs_every_image_alike():
    large = torch.rand(5, 1, 8, 8, generator=generator())
    noisy = large + 0.1 * torch.randn(5, 1, 8, 8, generator=generator(1))
    expected = cb.psnr(noisy.clamp(0, 1), large).mean()
    pairs = list(zip(noisy.split(2), large.split(2), strict=True))
    assert float(cb.mean_psnr(nn.Identity(), pairs)) == pytest.approx(float(expected), abs=1e-5)


def train(network, steps=12, large=None, **options):
    large = data.shapes(24, (12, 12), generator()) if large is None else large
    chosen = {
        "batch": 4,
        "crop": 12,
        "lr": 3e-3,
        "optimizer": torch.optim.Adam,
        "schedule": None,
        "record_every": 5,
        "generator": generator(3),
        **options,
    }
    return cb.train(network, large, [(cb.shrink(large, 2), large)], steps=steps, **chosen)


def test_training_learns_and_leaves_its_input_alone():
    network = SESR(4, 1, 8, generator=generator())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trained, history = train(network, 60, crop=10, record_every=25)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert history["step"].tolist() == [0, 25, 50, 60]
    assert history["psnr"][-1] > history["psnr"][0] + 3
    assert history["cpu"].tolist() == sorted(history["cpu"].tolist())
    large = data.shapes(24, (12, 12), generator())
    test = [(cb.shrink(large, 2), large)]
    for moment, judged in ((0, network), (-1, trained)):
        assert float(cb.mean_psnr(judged, test)) == pytest.approx(float(history["psnr"][moment]), abs=1e-4)


def test_time_spent_on_measuring_is_not_counted(monkeypatch):
    """A clock that ticks once at every look, and a measurement that takes 100 ticks."""
    clock = iter(range(0, 10**6))
    late = [0]

    def measure(*_):
        late[0] += 100
        return torch.tensor(0.0)

    monkeypatch.setattr(cb.time, "process_time", lambda: next(clock) + late[0])
    monkeypatch.setattr(cb, "mean_psnr", measure)
    _, history = train(SESR(4, 1, 8, generator=generator()), 3, record_every=1)
    assert history["cpu"].tolist() == [1, 2, 3, 4]


def test_a_step_turns_mirrors_and_cuts_images_at_one_place():
    network, places = SESR(4, 1, 8, generator=generator()), set()
    for seed in range(6):
        large = data.shapes(6, (12, 14), generator(seed))
        trained, _ = train(
            network, 1, large, batch=6, crop=10, lr=0.1, optimizer=torch.optim.SGD, generator=generator(seed)
        )
        moved = torch.cat(
            [(old - new).flatten() for old, new in zip(network.parameters(), trained.parameters(), strict=True)]
        ).detach()
        found = []
        for top, left, turns, mirrored in itertools.product(range(3), range(5), range(4), (False, True)):
            y = large[..., top : top + 10, left : left + 10].rot90(turns, (2, 3))
            y = y.flip(3) if mirrored else y
            loss = F.l1_loss(network(cb.shrink(y, 2)), y)
            slopes = torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, list(network.parameters()))])
            if (moved - 0.1 * slopes).norm() < 1e-4 * moved.norm():
                found.append((top - left, turns, mirrored))
        assert len(found) == 1
        places.update(found)
    for drawn in zip(*places, strict=True):
        assert len(set(drawn)) > 1  # neither rows and columns alike, nor always the same turn


def test_both_modes_train_to_the_same_network():
    networks = [SESR(4, 1, 8, mode=mode, generator=generator()) for mode in ("collapsed", "expanded")]
    one, other = (train(network.double().float())[0] for network in networks)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_the_fixed_projection_of_the_baseline_is_not_trained():
    trained, _ = train(SESR(4, 1, None, generator=generator()), optimizer=torch.optim.AdamW, lr=0.1)
    for layer in trained.blocks:
        assert torch.equal(layer.project.weight.flatten(1), torch.eye(layer.project.out_channels))


# --- images -----------------------------------------------------------------------------------------------------------


def test_shrink_keeps_smooth_images_and_means():
    ramp = (torch.arange(32) + 0.5)[None, None, None] / 32 * torch.ones(1, 1, 32, 1)
    expected = (torch.arange(16) + 0.5) / 16
    torch.testing.assert_close(cb.shrink(ramp, 2)[0, 0, 8, 3:-3], expected[3:-3])
    images = torch.rand(1, 1, 24, 36, generator=generator())
    pillow = Image.fromarray(images[0, 0].numpy()).resize((18, 12), Image.Resampling.BICUBIC)  # antialiases, too
    torch.testing.assert_close(cb.shrink(images, 2)[0, 0], torch.from_numpy(np.array(pillow)), rtol=0, atol=1e-5)


def test_random_patches_are_parts_of_the_images():
    images = [torch.arange(48.0).view(1, 6, 8), 100 + torch.arange(25.0).view(1, 5, 5)]
    patches = cb.random_patches(iter(images), 30, 4, generator())
    assert patches.shape == (60, 1, 4, 4)
    assert (patches[:30, 0, 1:, :] - patches[:30, 0, :-1, :] == 8).all()
    assert (patches[30:, 0, :, 1:] - patches[30:, 0, :, :-1] == 1).all()
    assert set(patches[:30, 0, 0, 0].tolist()) == {8.0 * i + j for i in range(3) for j in range(5)}


def test_luminance_of_primary_colours():
    rgb = torch.zeros(3, 2, 4, dtype=torch.uint8)
    rgb[1, 0], rgb[:, 1] = 255, 255  # a green and a white row
    expected = torch.tensor([128.553 + 16, 235.0])[:, None].expand(2, 4) / 255
    torch.testing.assert_close(cb.luminance(rgb), expected[None])


# --- what a reader can get wrong --------------------------------------------------------------------------------------

WEIGHTS = torch.zeros(6, 2, 3, 3), torch.zeros(6), torch.zeros(4, 6), torch.zeros(4)
NETWORK = SESR(4, 1, 8, generator=generator())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: collapse_linear_block(torch.zeros(6, 2, 2, 2), *WEIGHTS[1:]), "expand_weight"),
        (lambda: collapse_linear_block(torch.zeros(6, 2, 3, 5), *WEIGHTS[1:]), "expand_weight"),
        (lambda: collapse_linear_block(WEIGHTS[0], torch.zeros(5), *WEIGHTS[2:]), "expand_bias"),
        (lambda: collapse_linear_block(*WEIGHTS[:2], torch.zeros(4, 5), WEIGHTS[3]), "project_weight"),
        (lambda: collapse_linear_block(*WEIGHTS[:3], torch.zeros(3)), "project_bias"),
        (lambda: collapse_linear_block(*WEIGHTS, residual=True), "residual"),
        (lambda: cb.collapse_by_probing([]), "convs"),
        (lambda: cb.collapse_by_probing([nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)]), "convs must fit"),
        (lambda: cb.collapse_by_probing([nn.Conv2d(2, 2, 3, stride=2)]), "stride"),
        (lambda: cb.collapse_by_probing([nn.Conv2d(2, 2, 3, dilation=2)]), "dilation"),
        (lambda: cb.collapse_by_probing([nn.Conv2d(2, 2, 3, groups=2)]), "groups"),
        (lambda: block(0, 2, 3), "in_channels"),
        (lambda: block(2, 2, 4), "kernel_size"),
        (lambda: block(2, 2, 3, 0), "expansion"),
        (lambda: block(2, 2, 3, mode="wide"), "mode"),
        (lambda: block(2, 3, 3, residual=True), "residual"),
        (lambda: SESR(0, generator=generator()), "features"),
        (lambda: SESR(blocks=0, generator=generator()), "blocks"),
        (lambda: cb.count_parameters(16, 5, 0), "scale"),
        (lambda: cb.count_macs(0, 5, 16, 5, 2), "height"),
        (lambda: cb.training_macs(0, 64, 16, 5, 2, 256, "expanded"), "batch"),
        (lambda: cb.training_macs(32, 64, 16, 5, 2, 256, "wide"), "mode"),
        (lambda: cb.psnr(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 9)), "prediction"),
        (lambda: cb.psnr(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)), "border"),
        (lambda: train(NETWORK, 0), "steps"),
        (lambda: train(NETWORK, record_every=0), "record_every"),
        (lambda: train(NETWORK, batch=25), "batch"),
        (lambda: train(NETWORK, crop=13), "crop"),
        (lambda: train(NETWORK, crop=11), "large"),
        (lambda: NETWORK.rescale(0, generator()), "scale"),
        (lambda: cb.luminance(torch.zeros(1, 4, 4, dtype=torch.uint8)), "rgb"),
        (lambda: cb.random_patches([torch.zeros(1, 4, 8)], 1, 5, generator()), "size"),
        (lambda: cb.shrink(torch.zeros(1, 1, 5, 8), 2), "large"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_psnr_of_equal_images_is_infinite():
    assert cb.psnr(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)).tolist() == [math.inf]
