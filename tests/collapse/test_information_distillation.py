"""Oracles: NumPy by hand, PyTorch's own reductions, gradients for what a pixel sees, shifts, and the full pass."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from companion.collapse.information_distillation import (
    IMDN,
    ContrastAwareChannelAttention,
    InformationMultiDistillationBlock,
    ResidualBlock,
    adaptive_crop_forward,
    channel_contrast,
    psnr,
    resize_then_restore,
    ssim,
)
from companion.training import Ensemble

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed), dtype=F64)


def lite(seed=0, **options):
    options = {"in_channels": 1, "features": 8, "blocks": 2, "scale": 2, "reduction": 4, "attention": None, **options}
    return IMDN(**options, generator=generator(seed)).double().requires_grad_(False)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


# --- attention --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(-5, 5), st.floats(-3, 3))
def test_contrast_is_mean_plus_population_deviation_and_moves_with_both(seed, shift, factor):
    x = random(3, 5, 6, 7, seed=seed)
    std, mean = torch.std_mean(x, (2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(channel_contrast(x), std + mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(channel_contrast(factor * x + shift), factor * mean + shift + abs(factor) * std)


@pytest.mark.parametrize("descriptor", ["contrast", "mean"])
def test_gates_are_a_two_layer_network_of_the_descriptor(descriptor):
    attention = ContrastAwareChannelAttention(8, 4, descriptor, generator=generator()).double().requires_grad_(False)
    x = random(2, 8, 5, 4)
    z = x.mean((2, 3)).numpy() + (x.numpy().std((2, 3)) if descriptor == "contrast" else 0)
    w1, w2 = (layer.weight.flatten(1).numpy() for layer in (attention.squeeze, attention.excite))
    b1, b2 = (layer.bias.numpy() for layer in (attention.squeeze, attention.excite))
    assert w1.shape == (2, 8)
    expected = 1 / (1 + np.exp(-(np.maximum(z @ w1.T + b1, 0) @ w2.T + b2)))
    np.testing.assert_allclose(attention.gates(x)[..., 0, 0], expected, atol=1e-12)
    np.testing.assert_allclose(attention(x), x.numpy() * expected[..., None, None], atol=1e-12)


def test_gradients_of_constant_channels_are_finite():
    attention = ContrastAwareChannelAttention(32, generator=generator())
    x = torch.ones(1, 32, 4, 4, requires_grad=True)
    attention(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


def test_only_contrast_tells_maps_of_equal_mean_apart():
    maps = torch.stack([torch.full((8, 8), 0.5), (torch.arange(8) % 2.0).expand(8, 8)]).to(F64)
    x = maps[:, None].expand(-1, 256, -1, -1)
    for descriptor, apart in (("mean", False), ("contrast", True)):
        flat, textured = (
            ContrastAwareChannelAttention(256, descriptor=descriptor, generator=generator()).double().gates(x)
        )
        assert ((flat - textured).abs().max() > 1e-3) == apart


# --- block ------------------------------------------------------------------------------------------------------------


def test_block_keeps_a_quarter_at_each_split():
    """Every convolution copies; the signs show where φ acts: on the first three parts, not on the last."""
    block = InformationMultiDistillationBlock(8, attention=None, generator=generator()).double()
    with torch.no_grad():
        for conv in [*block.refine, block.fuse]:
            conv.bias.zero_()
            middle = conv.kernel_size[0] // 2
            n_out, n_in = conv.weight.shape[:2]
            conv.weight.zero_()[:n_in, :, middle, middle] = torch.eye(n_in, dtype=F64)[:n_out]
    x = random(2, 8, 5, 6) - 0.5

    def phi(a):
        return np.where(a > 0, a, 0.05 * a)

    a = x.numpy()
    first, second = phi(a), phi(phi(a[:, 2:]))
    third = phi(second[:, 2:])
    expected = a + np.concatenate([first[:, :2], second[:, :2], third[:, :2], third[:, 2:4]], axis=1)
    np.testing.assert_allclose(block(x).detach(), expected, atol=1e-12)


def test_activation_acts_on_the_distilled_parts_but_not_on_the_last():
    block = InformationMultiDistillationBlock(4, attention=None, generator=generator())
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        for conv in block.refine:
            conv.bias.fill_(-1.0)
        block.fuse.weight.copy_(torch.eye(4)[..., None, None])
    torch.testing.assert_close(block(torch.zeros(1, 4, 1, 1)).flatten(), torch.tensor([-0.05, -0.05, -0.05, -1.0]))


@pytest.mark.parametrize("n", [4, 16, 64])
def test_weights_of_a_block_follow_the_formula(n):
    d, r, hidden = n // 4, n - n // 4, max(n // 16, 1)
    split = 9 * n**2 + n + 2 * (9 * r * n + n) + 9 * r * d + d + n**2 + n
    assert count(InformationMultiDistillationBlock(n, attention=None, generator=generator())) == split
    with_attention = count(InformationMultiDistillationBlock(n, generator=generator()))
    assert with_attention - split == 2 * n * hidden + hidden + n
    assert count(ResidualBlock(n, generator=generator())) == 2 * (9 * n**2 + n)


def test_residual_block_is_its_formula():
    block = ResidualBlock(3, generator=generator()).double()
    x = random(1, 3, 5, 5)
    inner = F.conv2d(x, block.first.weight, block.first.bias, padding=1)
    outer = F.conv2d(torch.where(inner > 0, inner, 0.05 * inner), block.second.weight, block.second.bias, padding=1)
    torch.testing.assert_close(block(x), x + outer)


# --- network ----------------------------------------------------------------------------------------------------------


def test_networks_of_the_paper_have_its_number_of_weights():
    counts = [count(IMDN(scale=scale, generator=generator())) for scale in (2, 3, 4)]
    assert counts == [694404, 703059, 715176]
    assert count(IMDN(any_scale=True, generator=generator())) == 752104


@pytest.mark.parametrize(("options", "factor"), [({}, 2), ({"scale": 3}, 3), ({"scale": 4, "any_scale": True}, 1)])
def test_size_of_the_output(options, factor):
    assert lite(**options, in_channels=3, attention="contrast")(random(2, 3, 8, 12)).shape == (
        2,
        3,
        8 * factor,
        12 * factor,
    )


def test_pixel_shuffle_deals_channels_out_in_rows():
    network = lite()
    for parameter in network.parameters():
        parameter.zero_()
    network.enlarge[0].bias.copy_(torch.arange(4.0))
    torch.testing.assert_close(network(random(1, 1, 1, 1))[0, 0], torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=F64))


def test_the_end_adds_the_head_and_every_block_reaches_the_end():
    network = lite(blocks=3)
    x = random(1, 1, 9, 9)
    first = network.head(x)
    outputs = [first]
    for block in network.body:
        outputs.append(block(outputs[-1]))
    collected = F.leaky_relu(network.collect(torch.cat(outputs[1:], 1)), 0.05)
    expected = F.pixel_shuffle(network.enlarge[0](network.smooth(collected) + first), 2)
    torch.testing.assert_close(network(x), expected)


def test_image_residual_adds_the_image():
    options = {"scale": 4, "any_scale": True}
    x = random(1, 1, 8, 8)
    torch.testing.assert_close(lite(**options, image_residual=True)(x), lite(**options)(x) + x)


@pytest.mark.parametrize(
    ("options", "side", "scale"),
    [({}, 31, 2), ({"blocks": 1}, 19, 2), ({"blocks": 1, "scale": 4, "any_scale": True}, 80, 1)],
)
def test_no_pixel_sees_beyond_the_receptive_radius_and_some_see_as_far(options, side, scale):
    network = lite(**options)
    radius, seen = network.receptive_radius(), 0
    for offset in range(4):  # with strides, the reach depends on the place of the pixel
        x = random(1, 1, side, side).requires_grad_()
        place = side // 2 + offset
        (slope,) = torch.autograd.grad(network(x)[0, 0, scale * place, scale * place], x)
        rows, columns = slope[0, 0].nonzero().T
        seen = max(seen, int((rows - place).abs().max()), int((columns - place).abs().max()))
    assert seen == radius


def test_radius_of_the_paper_s_network():
    assert IMDN(attention=None, generator=generator()).receptive_radius() == 27
    assert IMDN(attention=None, any_scale=True, generator=generator()).receptive_radius() == 110
    assert IMDN(generator=generator()).receptive_radius() == math.inf


def test_network_without_attention_commutes_with_shifts_in_the_interior():
    network, radius = lite(), 11
    x = random(1, 1, 34, 34)
    inside = slice(2 * radius + 2, -2 * radius)
    shifted = network(x.roll((1, 1), (2, 3)))[..., inside, inside]
    before = slice(inside.start - 2, inside.stop - 2)
    torch.testing.assert_close(shifted, network(x)[..., before, before], rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["contrast", "mean", None])
def test_network_with_circular_padding_commutes_with_all_shifts(attention):
    network = lite(attention=attention)
    for conv in (layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)):
        conv.padding_mode = "circular" if conv.kernel_size[0] > 1 else "zeros"
        conv._reversed_padding_repeated_twice = [conv.padding[0]] * 4
    x = random(1, 1, 10, 12)
    torch.testing.assert_close(network(x.roll((3, 5), (2, 3))), network(x).roll((6, 10), (2, 3)), rtol=0, atol=1e-12)


def test_weights_come_from_the_generator_alone():
    state = torch.get_rng_state()
    first, second, other = lite(1), lite(1), lite(2)
    assert torch.equal(state, torch.get_rng_state())
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


# --- cropping ---------------------------------------------------------------------------------------------------------


def test_four_crops_equal_the_full_pass_exactly_when_they_overlap_enough():
    network, x = lite(), random(1, 1, 61, 70)
    whole = network(x)
    assert (adaptive_crop_forward(network, x, 16, scale=2) - whole).abs().max() < 1e-10
    assert (adaptive_crop_forward(network, x, 4, scale=2) - whole).abs().max() > 1e-3
    assert (adaptive_crop_forward(network, x, 12, scale=2, multiple=1) - whole).abs().max() < 1e-14
    assert (adaptive_crop_forward(network, x, 12, scale=2) - whole).abs().max() > 1e-14  # 12 is rounded to 10


def test_with_attention_crops_are_close_and_never_equal():
    network, x = lite(features=16, attention="contrast"), random(1, 1, 61, 70)
    difference = (adaptive_crop_forward(network, x, 24, scale=2) - network(x)).abs().max()
    assert 1e-9 < difference < 1e-3


def test_crops_of_the_any_scale_network_keep_the_phase_of_its_stride():
    network = lite(blocks=1, scale=4, any_scale=True)
    x = random(1, 1, 96, 100)
    torch.testing.assert_close(adaptive_crop_forward(network, x, 40), network(x), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 60), st.integers(8, 60), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_every_pixel_comes_back_to_its_place(height, width, scale, multiple, seed):
    x = random(2, 1, height, width, seed=seed)

    def enlarge(patch):
        return F.interpolate(patch, scale_factor=scale, mode="nearest")

    torch.testing.assert_close(adaptive_crop_forward(enlarge, x, multiple, scale, multiple), enlarge(x), rtol=0, atol=0)


def test_any_size_and_all_members_of_an_ensemble():
    networks = [lite(seed, scale=4, any_scale=True) for seed in range(2)]
    x = random(3, 1, 101, 131)
    together = adaptive_crop_forward(Ensemble(networks), x)
    assert together.shape == (2, 3, 1, 101, 131)
    for member, network in zip(together, networks, strict=True):
        torch.testing.assert_close(member, adaptive_crop_forward(network, x), rtol=0, atol=1e-12)


# --- images -----------------------------------------------------------------------------------------------------------


def test_restoring_shrinks_and_enlarges():
    hr = random(2, 1, 20, 24)
    small = F.interpolate(hr, (8, 10), mode="bicubic", antialias=True)
    torch.testing.assert_close(resize_then_restore(hr, 2.5), F.interpolate(small, (20, 24), mode="bicubic"))
    torch.testing.assert_close(resize_then_restore(hr, 1.0), hr)
    constant = torch.full((1, 1, 9, 7), 0.3)
    torch.testing.assert_close(resize_then_restore(constant, 2.0), constant)


def test_psnr_in_closed_form():
    hr = torch.full((2, 1, 8, 8), 0.5)
    restored = hr + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(restored, hr, 2), torch.tensor([20.0, 40.0]), rtol=0, atol=1e-3)
    restored[:, :, :2] = 9.0  # outside the border
    torch.testing.assert_close(psnr(restored, hr, 2), torch.tensor([20.0, 40.0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(psnr(torch.full_like(hr, 7.0), hr, 0), torch.full((2,), -20 * math.log10(0.5)))
    assert psnr(restored.expand(3, 2, 1, 8, 8), hr, 0).shape == (3, 2)


def test_psnr_of_colour_is_that_of_luma():
    hr, restored = random(2, 3, 6, 6), random(2, 3, 6, 6, seed=1)
    luma = [np.tensordot([65.481, 128.553, 24.966], x.numpy(), axes=(0, 1)) for x in (hr, restored)]
    expected = 10 * np.log10(255**2 / ((luma[0] - luma[1]) ** 2).mean((1, 2)))
    np.testing.assert_allclose(psnr(restored, hr, 0), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_its_formula(channels):
    """Means, variances and covariance under a Gaussian window, by convolution, where the window fits."""
    hr, restored = random(2, channels, 20, 18), 1.2 * random(2, channels, 20, 18, seed=1)
    window = torch.exp(-(torch.arange(-5.0, 6.0, dtype=F64) ** 2) / (2 * 1.5**2))
    window = torch.outer(window, window)[None, None] / window.sum() ** 2

    def luma(image):
        weights = torch.tensor([65.481, 128.553, 24.966], dtype=F64)[:, None, None]
        return image if channels == 1 else ((weights * image).sum(1, keepdim=True) + 16) / 255

    x, y = (luma(image)[..., 2:-2, 2:-2] for image in (restored.clamp(0, 1), hr))
    mx, my, xx, yy, xy = (F.conv2d(image, window) for image in (x, y, x * x, y * y, x * y))
    above = (2 * mx * my + 0.01**2) * (2 * (xy - mx * my) + 0.03**2)
    below = (mx**2 + my**2 + 0.01**2) * (xx - mx**2 + yy - my**2 + 0.03**2)
    expected = (above / below).mean((1, 2, 3))
    torch.testing.assert_close(ssim(restored, hr, 2), expected, rtol=0, atol=1e-10)
    members = torch.stack([hr, restored, restored])
    torch.testing.assert_close(ssim(members, hr, 2), torch.stack([torch.ones(2, dtype=F64), expected, expected]))


# --- what a reader can get wrong --------------------------------------------------------------------------------------

X = random(1, 1, 16, 16)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: channel_contrast(X[0]), "x must"),
        (lambda: ContrastAwareChannelAttention(0, generator=generator()), "channels"),
        (lambda: ContrastAwareChannelAttention(8, 0, generator=generator()), "reduction"),
        (lambda: ContrastAwareChannelAttention(8, 4, "max", generator=generator()), "descriptor"),
        (lambda: InformationMultiDistillationBlock(6, generator=generator()), "channels"),
        (lambda: InformationMultiDistillationBlock(0, generator=generator()), "channels"),
        (lambda: ResidualBlock(0, generator=generator()), "channels"),
        (lambda: lite(blocks=0), "blocks"),
        (lambda: lite(any_scale=True), "scale must be 4"),
        (lambda: lite(image_residual=True), "image_residual"),
        (lambda: lite(scale=4, any_scale=True)(X[..., 1:]), "divisible by 4"),
        (lambda: adaptive_crop_forward(lite(), X[0], 4, 2), "x must"),
        (lambda: adaptive_crop_forward(lite(), X, -1, 2), "shave"),
        (lambda: adaptive_crop_forward(lite(), X, 4, 0), "scale"),
        (lambda: adaptive_crop_forward(lite(), X, 4, 2, 0), "multiple"),
        (lambda: adaptive_crop_forward(lite(), X, 32, 2), "shave=32"),
        (lambda: adaptive_crop_forward(lite(), X, 0, 2, 5), "height"),
        (lambda: resize_then_restore(X[0], 2), "hr must"),
        (lambda: resize_then_restore(X, 0.5), "scale_factor"),
        (lambda: resize_then_restore(X, 17), "scale_factor"),
        (lambda: psnr(X, X[..., 1:], 0), "restored"),
        (lambda: psnr(X.expand(-1, 2, -1, -1), X.expand(-1, 2, -1, -1), 0), "channels"),
        (lambda: psnr(X, X, 8), "border"),
        (lambda: ssim(X, X, -1), "border"),
        (lambda: ssim(X, X, 3), "leave at least 11 pixels"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
