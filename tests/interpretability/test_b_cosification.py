"""Oracles: values by hand, PyTorch's own layers, Jacobians in explanation mode, homogeneity, bounds and invariances."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from companion import models
from companion.interpretability import b_cosification as bc

MEAN, STD = torch.tensor([0.25, 0.3, 0.2]), torch.tensor([0.25, 0.2, 0.3])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed))


def disturbed(network, seed=0):
    """The network with running statistics and affine parameters of its norms away from their initial values."""
    g = generator(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=g)
            module.running_var.uniform_(0.05, 0.2, generator=g)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=g)
            module.bias.data.normal_(generator=g)
    return network.eval()


def small_cnn(seed=0, n_out=4):
    return disturbed(bc.cnn(n_out, width=4, normalise=bc.Normalise(MEAN, STD), generator=generator(seed)))


def small_vit(seed=0):
    shape = dict(size=8, patch=2, width=16, heads=2, blocks=2)
    return disturbed(bc.vit(4, **shape, normalise=bc.Normalise(MEAN, STD), generator=generator(seed)))


def small_resnet(seed=0):
    body = models.resnet(3, (4, 8), 1, 4, generator=generator(seed))
    return disturbed(nn.Sequential(bc.Normalise(MEAN, STD), *body))


NETWORKS = [small_cnn, small_vit, small_resnet]


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("w", "B", "normalise", "y"),
    [((1.0, 0.0), 2, True, 1.8), ((1.0, 0.0), 3, True, 1.08), ((2.0, 0.0), 2, False, 7.2), ((2.0, 0.0), 2, True, 1.8)],
)
def test_values_by_hand(w, B, normalise, y):
    linear = bc.BcosLinear(2, 1, B=B, normalise_weights=normalise)
    linear.weight.data = torch.tensor([w])
    assert linear(torch.tensor([3.0, 4.0])).item() == pytest.approx(y, abs=1e-5)
    convolution = bc.BcosConv2d(2, 1, 1, B=B, normalise_weights=normalise)
    convolution.weight.data = torch.tensor(w).view(1, 2, 1, 1)
    assert convolution(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)).item() == pytest.approx(y, abs=1e-5)


def test_exponent_one_is_the_ordinary_layer():
    x, bias = randn(3, 5, 9, 9), randn(4, seed=1)
    convolution = bc.BcosConv2d(5, 4, 3, stride=2, padding=1, B=1, bias=True)
    convolution.bias.data = bias
    torch.testing.assert_close(convolution(x), F.conv2d(x, convolution.weight, bias, 2, 1), rtol=0, atol=1e-6)
    linear = bc.BcosLinear(9, 4, B=1, bias=True)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias), rtol=0, atol=1e-6)


@pytest.mark.parametrize("B", [1.5, 2, 3])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_convolution_is_the_layer_applied_to_every_patch(B, normalise):
    x = randn(2, 3, 7, 7)
    convolution = bc.BcosConv2d(3, 5, 3, stride=2, padding=1, B=B, bias=True, normalise_weights=normalise)
    linear = bc.BcosLinear(27, 5, B=B, bias=True, normalise_weights=normalise)
    linear.weight.data, linear.bias.data = convolution.weight.data.flatten(1), convolution.bias.data
    patches = F.unfold(x, 3, stride=2, padding=1).mT
    torch.testing.assert_close(convolution(x).flatten(2).mT, linear(patches), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), B=st.floats(1, 4))
def test_output_is_bounded_by_the_input_and_falls_with_the_exponent(seed, B):
    x, layer = randn(6, 8, seed=seed), bc.BcosLinear(8, 5, B=B, normalise_weights=True)
    y = layer(x).abs()
    assert (y <= x.norm(dim=1, keepdim=True) + 1e-5).all()
    layer.B = B + 0.5
    assert (layer(x).abs() <= y + 1e-5).all()


def test_empty_patches_and_right_angles_have_finite_gradients():
    layer = bc.BcosLinear(2, 1, B=1.25)
    layer.weight.data = torch.tensor([[1.0, 0.0]])
    for point in ([0.0, 0.0], [0.0, 1.0]):
        x = torch.tensor(point, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.isfinite().all()


def test_uncentered_norm_with_converted_bias_is_batch_norm():
    x = randn(8, 6, 5, 5)
    norm = disturbed(nn.Sequential(nn.BatchNorm2d(6)))
    (ours,) = bc._converted(norm, 2.0, bias=True)
    torch.testing.assert_close(ours.eval()(x), norm(x), rtol=0, atol=1e-5)
    (without,) = bc._converted(norm, 2.0, bias=False)
    torch.testing.assert_close(without.eval()(2 * x), 2 * without(x), rtol=0, atol=1e-5)


def test_uncentered_norm_uses_the_centred_variance_in_training():
    ours, theirs = bc.UncenteredBatchNorm2d(6), nn.BatchNorm2d(6)
    for seed in range(3):
        x = 5 + (1 + seed) * randn(8, 6, 5, 5, seed=seed)
        y = ours(x)
        torch.testing.assert_close(y - y.mean((0, 2, 3), keepdim=True), theirs(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-4, atol=0)


def test_layer_norm_and_gelu_are_pytorch_s():
    x = randn(3, 7, 16)
    (norm,) = disturbed(nn.Sequential(nn.LayerNorm(16)))
    torch.testing.assert_close(bc._converted(norm, 2.0, bias=True)(x), norm(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(bc.DynamicGELU()(x), F.gelu(x), rtol=0, atol=1e-6)


def test_attention_is_pytorch_s():
    ours, theirs = bc.Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=0, atol=1e-5)


def test_input_has_six_channels_which_are_z_and_its_mirror_image():
    x = rand(2, 3, 4, 4)
    assert torch.equal(bc.add_inverse(x), torch.cat([x, 1 - x], 1))
    z = bc.Normalise(MEAN, STD)(x)
    torch.testing.assert_close(bc.Normalise(MEAN, STD, inverse=True)(x), torch.cat([z, -z], 1), rtol=0, atol=1e-5)


def test_positions_repeat_on_larger_grids():
    positions = bc.Positions(16, 4)
    one, tiled = positions(torch.zeros(1, 16, 4, 4)), positions(torch.zeros(1, 16, 8, 8))
    tiles = tiled.mT.view(16, 2, 4, 2, 4)
    assert torch.equal(tiles[:, 1, :, 0], one.mT.view(16, 4, 4))
    for row, column in ((0, 0), (1, 3), (3, 2)):
        slow = [1e4 ** (-k / 4) for k in range(4)]
        code = [f(place * w) for place in (row, column) for f in (math.sin, math.cos) for w in slow]
        torch.testing.assert_close(one[0, 4 * row + column], torch.tensor(code))


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", NETWORKS)
def test_conversion_at_exponent_one_is_exact_and_leaves_the_source_alone(make):
    network, x = make(), rand(5, 3, 8, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    converted = bc.b_cosify(network, B=1, bias=True, logit_bias=0.7)
    torch.testing.assert_close(converted(x) - 0.7, network(x), rtol=0, atol=1e-4)
    for parameter in converted.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("make", NETWORKS)
def test_converted_networks_have_no_bias_but_the_last(make):
    network = bc.b_cosify(make())
    assert not [name for name, _ in network.named_parameters() if name.endswith("bias")]
    kinds = {type(module) for module in network.modules()}
    assert not kinds & {nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.GELU, nn.MaxPool2d}
    linear = [name for name, module in network.named_modules() if type(module) is nn.Linear]
    assert all(name.endswith("qkv") for name in linear)


def test_maximum_becomes_average_pooling_and_the_head_comes_before_the_mean():
    network = nn.Sequential(bc.Normalise(MEAN, STD), *models.convnet(3, (4, 8), 5, generator=generator())).eval()
    converted = bc.b_cosify(network)
    assert [type(module) for module in converted][3] is nn.AvgPool2d
    assert [type(module) for module in converted][-4:] == [
        bc.BcosConv2d,
        nn.AdaptiveAvgPool2d,
        nn.Flatten,
        bc.LogitBias,
    ]
    assert not converted.training
    assert bc.b_cosify(network.train()).training


def test_scratch_networks_have_unit_weights_and_no_relu():
    network = bc.b_cos_from_scratch(small_resnet(), -1.0)
    layers = [module for module in network.modules() if isinstance(module, bc.BcosConv2d)]
    assert len(layers) > 4
    assert all(module.normalise_weights for module in layers)
    both = [*network.modules(), *bc.b_cos_from_scratch(small_vit(), -1.0).modules()]
    assert not [module for module in both if isinstance(module, nn.ReLU | bc.DynamicGELU)]
    x = rand(3, 3, 8, 8)
    before = network(x)
    for module in layers:
        module.weight.data *= 3
    torch.testing.assert_close(network(x), before, rtol=0, atol=1e-5)  # the length of a weight means nothing


def test_first_weights_stay_mirror_images_in_training():
    network, x = bc.b_cosify(small_cnn()), rand(32, 3, 8, 8)
    y = torch.arange(32) % 4
    start = network[1].weight.detach().clone()
    bc.train(network, lambda: (x, y), F.cross_entropy, epochs=3, lr=1e-2, batch_size=8, generator=generator())
    W = network[1].weight
    torch.testing.assert_close(W[:, :3], -W[:, 3:], rtol=0, atol=1e-5)
    assert (W - start).abs().max() > 0.01


def test_drawing_networks_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    for make in NETWORKS:
        bc.b_cosify(make())
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(small_vit(1)[1].weight, small_vit(1)[1].weight)


# --- explanations -----------------------------------------------------------------------------------------------------


def positional_term(network, x, target):
    """What position codes contribute to the target logits; zero for a network without."""
    codes = [module for module in network.modules() if isinstance(module, bc.Positions)]
    if not codes:
        return torch.zeros(len(x))
    code = codes[0].code.detach()
    with bc.explanation_mode(network):

        def logits(code):
            codes[0].code = code
            return network(x).gather(1, target[:, None])[:, 0]

        rows = torch.func.jacrev(logits)(code)
    codes[0].code = code
    return (rows * code).sum((1, 2, 3))


@pytest.mark.parametrize("make", NETWORKS)
def test_contributions_add_up_to_the_logit(make):
    network = bc.b_cosify(make(), logit_bias=-1.5).double()
    x, target = rand(6, 3, 8, 8).double(), torch.arange(6) % 4
    evidence = network(x).gather(1, target[:, None])[:, 0].detach() + 1.5
    total = bc.contribution_map(network, x, target).sum((1, 2)) + positional_term(network, x, target)
    torch.testing.assert_close(total, evidence, rtol=0, atol=1e-7 * evidence.abs().max().item())


@pytest.mark.parametrize("make", [small_cnn, small_resnet])
def test_the_jacobian_in_explanation_mode_is_the_linear_map(make):
    network, x = bc.b_cosify(make()), rand(1, 3, 8, 8)
    z = network[0](x)
    with bc.explanation_mode(network):
        jacobian = torch.func.jacrev(lambda z: network[1:](z)[0])(z)[:, 0]
    torch.testing.assert_close((jacobian * z).sum((1, 2, 3)), network(x)[0], rtol=0, atol=1e-4)
    for target in range(4):
        ours = bc.contribution_map(network, x, torch.tensor([target]))[0]
        torch.testing.assert_close(ours, (jacobian[target] * z[0]).sum(0).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", NETWORKS)
def test_the_linear_map_is_that_of_frozen_factors(make):
    """Record every factor at one input; the network with these factors is linear, and W is its matrix."""
    network, x = bc.b_cosify(make()).double(), rand(2, 3, 8, 8).double()
    kept, playing = [], []

    def constant(factor):
        if playing:
            return playing.pop(0)
        kept.append(factor.detach())
        return kept[-1]

    for module in network.modules():
        if isinstance(module, bc.Dynamic):
            module.constant = constant
        if isinstance(module, nn.ReLU):  # freeze the gates, too
            module.forward = lambda x: x * constant((x > 0).to(x))
    z = network[0](x)
    at_z = network[1:](z)

    def frozen(z):
        playing[:] = kept
        return network[1:](z)

    count = len(kept)
    torch.testing.assert_close(frozen(z), at_z)
    assert count == len(kept) > 5
    origin = frozen(torch.zeros_like(z))  # what position codes contribute
    direction = randn(*z.shape, seed=4).double()
    torch.testing.assert_close(frozen(2 * z + direction) - origin, 2 * (at_z - origin) + frozen(direction) - origin)
    for module in network.modules():
        vars(module).pop("constant", None)
        vars(module).pop("forward", None)
    ours = bc.contribution_map(network, x, torch.tensor([1, 2])).sum((1, 2))
    torch.testing.assert_close(ours, (at_z - origin)[[0, 1], [1, 2]].detach())


@pytest.mark.parametrize("make", NETWORKS)
def test_the_plain_gradient_is_another_map(make):
    network, x, target = bc.b_cosify(make()), rand(6, 3, 8, 8), torch.arange(6) % 4
    detached, plain = (f(network, x, target) for f in (bc.contribution_map, bc.input_times_gradient))
    assert (detached - plain).norm() > 0.3 * detached.norm()


def test_plain_gradient_of_one_unit_is_the_formula():
    unit = bc.BcosLinear(5, 1, B=2, normalise_weights=True).double()
    x = randn(5).double().requires_grad_()
    (plain,) = torch.autograd.grad(unit(x).sum(), x)
    with bc.explanation_mode(unit):
        (row,) = torch.autograd.grad(unit(x).sum(), x)
    expected = 2 * row * x - unit(x) * x.square() / x.square().sum()
    torch.testing.assert_close(plain * x, expected, rtol=0, atol=1e-6)


def trained():
    """A B-cosified network that can tell the colour of noisy images: its logits are not small."""
    x, y = 0.2 * rand(64, 3, 8, 8), torch.arange(64) % 3
    x[torch.arange(64), y] += 0.6
    network = bc.cnn(3, width=4, normalise=bc.Normalise(MEAN, STD), generator=generator())
    protocol = dict(lr=1e-2, batch_size=16, generator=generator())
    bc.train(network, lambda: (x, y), F.cross_entropy, epochs=6, **protocol)
    network = bc.b_cosify(network)
    history = bc.train(network, lambda: (x, y), F.cross_entropy, epochs=6, **protocol)
    return network, x, y, history


def test_training_lowers_the_loss_and_the_network_is_homogeneous():
    network, x, y, history = trained()
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert (network(x).argmax(1) == y).float().mean() > 0.9
    z = network[0](x)
    torch.testing.assert_close(network[1:](2.5 * z), 2.5 * network[1:](z), rtol=1e-3, atol=1e-3)


def test_each_epoch_is_drawn_anew():
    draws = []

    def draw():
        draws.append(rand(20, 3, 8, 8, seed=len(draws)))
        return draws[-1], torch.zeros(20, dtype=torch.long)

    network = small_cnn()
    protocol = dict(lr=1e-3, batch_size=8, generator=generator(), one_cycle=True)
    history = bc.train(network, draw, F.cross_entropy, epochs=3, record=lambda: {"mode": torch.tensor(0)}, **protocol)
    assert len(draws) == 3
    assert history["step"].tolist() == [0, 2, 4, 6]
    assert not network.training


def test_explanation_mode_ends_even_after_an_error():
    network = bc.b_cosify(small_cnn())
    first = network[1]
    first.detach = True
    with bc.explanation_mode(network):
        assert all(module.detach for module in network.modules() if isinstance(module, bc.Dynamic))
    with pytest.raises(RuntimeError, match="channels"), bc.explanation_mode(network):
        network[1](torch.zeros(1, 5, 8, 8))
    assert first.detach
    assert not any(m.detach for m in network.modules() if isinstance(m, bc.Dynamic) and m is not first)


def test_integrated_gradients_are_complete():
    network, x, target = small_cnn(), rand(4, 3, 8, 8), torch.arange(4)
    total = bc.integrated_gradients(network, x, target, steps=200).sum((1, 2))
    with torch.no_grad():
        change = (network(x) - network(torch.zeros_like(x))).diagonal()
    torch.testing.assert_close(total, change, rtol=0, atol=0.01 * change.abs().max().item())


def test_one_midpoint_integrates_the_gradient_of_a_square_exactly():
    class Square(nn.Module):
        def forward(self, z):
            return z.square().sum((1, 2, 3))[:, None]

    x = rand(2, 3, 4, 4)
    attribution = bc.integrated_gradients(
        nn.Sequential(nn.Identity(), Square()).eval(), x, torch.zeros(2).long(), steps=1
    )
    torch.testing.assert_close(attribution, x.square().sum(1))


def test_prompt_scores_are_cosines_and_explained_without_the_length():
    texts, embedding = randn(5, 8), randn(3, 8, seed=1).requires_grad_()
    head = bc.PromptScores(texts)
    expected = F.cosine_similarity(embedding[:, None], texts, dim=2)
    torch.testing.assert_close(head(embedding), expected, rtol=0, atol=1e-6)
    with bc.explanation_mode(head):
        (row,) = torch.autograd.grad(head(embedding)[:, 2].sum(), embedding)
    torch.testing.assert_close((row * embedding).sum(1), expected[:, 2], rtol=0, atol=1e-6)


def test_a_pair_of_towers_names_colour_and_digit():
    pair = bc.ContrastivePair(small_cnn(n_out=6), 6, n_colours=3, n_digits=2, generator=generator()).eval()
    texts, x = pair.texts(), rand(4, 3, 8, 8)
    expected = F.normalize(pair.digits[1] + pair.colours[2], dim=0)
    torch.testing.assert_close(texts[3 * 1 + 2], expected)
    torch.testing.assert_close(pair(x), bc.PromptScores(texts)(pair.tower(x)), rtol=0, atol=1e-6)


def test_explanation_image_of_known_weights():
    z, W = torch.ones(6, 2, 2), torch.zeros(6, 2, 2)
    W[0, 0, 0] = 2.0  # red
    W[1, 0, 1], W[4, 0, 1] = 0.5, 0.5  # green as much as its inverse
    W[:, 1, 0] = -1.0  # speaks against
    image = bc.explanation_image(z, W)
    assert image.shape == (2, 2, 4)
    assert image[0, 0].tolist() == pytest.approx([1, 0, 0, 1])
    assert image[0, 1, :3].tolist() == pytest.approx([0, 0.5, 0])
    assert image[1, 0, 3] == 0
    torch.testing.assert_close(bc.explanation_image(z, 7 * W), image)


# --- the pointing game and the data -----------------------------------------------------------------------------------


def test_pointing_game_by_hand():
    attribution = torch.zeros(1, 4, 4)
    attribution[0, :2, :2], attribution[0, 2:, 2:], attribution[0, 0, 3] = 1.0, 3.0, -5.0
    labels = torch.arange(4)[None]
    scores = bc.grid_pointing_game(lambda grids, target: attribution, torch.zeros(1, 3, 4, 4), labels, 2)
    assert scores.tolist() == [[0.25, 0, 0, 0.75]]


def test_pointing_game_asks_for_the_class_of_each_cell():
    labels = torch.stack([torch.randperm(12, generator=generator(k))[:9] for k in range(70)])
    grids = labels.view(70, 1, 3, 3).float().repeat_interleave(2, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    scores = bc.grid_pointing_game(lambda g, target: (g[:, 0] == target[:, None, None]).float(), grids, labels, 3)
    assert torch.equal(scores, torch.ones(70, 9))
    constant = bc.grid_pointing_game(lambda g, target: torch.ones_like(g[:, 0]), grids, labels, 3)
    torch.testing.assert_close(constant, torch.full((70, 9), 1 / 9))
    assert not bc.grid_pointing_game(lambda g, target: -torch.ones_like(g[:, 0]), grids, labels, 3).any()


def test_grids_hold_confident_images_of_distinct_classes_where_the_labels_say():
    labels = torch.arange(60) % 6
    images = torch.arange(60.0).view(60, 1, 1, 1).expand(60, 3, 2, 4)
    confidence = torch.arange(60.0)
    grids, classes = bc.make_grids(images, labels, confidence, 2, 50, generator(), pool=3)
    assert grids.shape == (50, 3, 4, 8)
    chosen = grids[:, 0, ::2, ::4].reshape(50, 4).long()
    assert torch.equal(labels[chosen], classes)
    assert all(len(row.unique()) == 4 for row in classes)
    assert set(chosen.flatten().tolist()) == set(range(42, 60))  # the three most confident of each of six
    again, _ = bc.make_grids(images, labels, confidence, 2, 50, generator(), pool=3)
    assert torch.equal(grids, again)


def test_coloured_digits_are_where_they_can_be_and_of_their_colour():
    ink = torch.zeros(400, 1, 4, 4)
    ink[:, :, 0, 0] = 1.0  # one dot
    colours = torch.arange(400) % 4
    images = bc.coloured_digits(ink, colours, 7, generator())
    assert images.shape == (400, 3, 7, 7)
    assert images.min() >= 0
    assert images.max() <= 1
    paint = torch.tensor(list(bc.COLOURS.values()))[colours]
    distance = (images - paint[:, :, None, None]).norm(dim=1).flatten(1)
    places = distance.argmin(1)
    assert distance.min(1).values.max() < 0.25
    assert {divmod(place, 7) for place in places.tolist()} == {(r, c) for r in range(4) for c in range(4)}
    assert (images.sum((2, 3)) - paint).max() < 0.5 * 48
    torch.testing.assert_close(images, bc.coloured_digits(ink, colours, 7, generator()))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [partial(bc.BcosLinear, 2, 2), partial(bc.BcosConv2d, 2, 2, 1)])
@pytest.mark.parametrize("B", [0.5, math.nan])
def test_exponents_below_one_are_refused(layer, B):
    with pytest.raises(ValueError, match="B must be at least 1"):
        layer(B=B)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 1, 4, 4), (2, 6, 4, 4)])
def test_images_without_three_channels_are_refused(shape):
    with pytest.raises(ValueError, match="x must be images"):
        bc.add_inverse(torch.zeros(shape))


def test_networks_that_cannot_be_converted_are_refused():
    first, last = (
        [bc.Normalise(MEAN, STD), nn.Conv2d(3, 4, 3)],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)],
    )
    with pytest.raises(ValueError, match="B must be at least 1"):
        bc.b_cosify(nn.Sequential(*first, *last), B=0.0)
    for bad in (
        nn.Sequential(*first[1:], *last),
        nn.Sequential(*first, *last[:-1]),
        nn.Sequential(*first, *last[1:]),
        nn.ReLU(),
    ):
        with pytest.raises(TypeError, match="net must be a Sequential"):
            bc.b_cosify(bad)
    for unknown in (nn.Tanh(), nn.MultiheadAttention(4, 2), nn.Sequential(nn.Softmax(1))):
        with pytest.raises(TypeError, match="no B-cos counterpart"):
            bc.b_cosify(nn.Sequential(*first, unknown, *last))
    with pytest.raises(TypeError, match="one group"):
        bc.b_cosify(nn.Sequential(*first, nn.Conv2d(4, 4, 1, groups=2), *last))


@pytest.mark.parametrize("explain", [bc.contribution_map, bc.input_times_gradient, bc.integrated_gradients])
def test_explanations_refuse_training_mode_and_wrong_targets(explain):
    network, x = small_cnn(), rand(2, 3, 8, 8)
    for target in (torch.tensor([1]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="target must hold 2 integers"):
            explain(network, x, target)
    with pytest.raises(ValueError, match="evaluation mode"):
        explain(network.train(), x, torch.tensor([0, 1]))


def test_other_bad_inputs_are_refused():
    images, labels = torch.zeros(8, 3, 2, 2), torch.arange(8) % 4
    with pytest.raises(ValueError, match="steps must be at least 1"):
        bc.integrated_gradients(small_cnn(), images, labels, steps=0)
    with pytest.raises(ValueError, match="confidence differ"):
        bc.make_grids(images, labels, torch.zeros(7), 2, 1, generator())
    with pytest.raises(ValueError, match="at least n² = 9 classes, got 4"):
        bc.make_grids(images, labels, torch.zeros(8), 3, 1, generator())
    with pytest.raises(ValueError, match="must be positive"):
        bc.make_grids(images, labels, torch.zeros(8), 2, 1, generator(), pool=0)
    with pytest.raises(ValueError, match="divisible by 3"):
        bc.grid_pointing_game(bc.contribution_map, torch.zeros(1, 3, 8, 8), torch.zeros(1, 9).long(), 3)
    with pytest.raises(ValueError, match="labels of shape"):
        bc.grid_pointing_game(bc.contribution_map, torch.zeros(1, 3, 8, 8), torch.zeros(1, 3).long(), 2)
    with pytest.raises(ValueError, match="one shape"):
        bc.explanation_image(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="ink must be"):
        bc.coloured_digits(torch.zeros(2, 8, 8), torch.zeros(2).long(), 12, generator())
    with pytest.raises(ValueError, match="canvas must be at least 8"):
        bc.coloured_digits(torch.zeros(2, 1, 8, 8), torch.zeros(2).long(), 7, generator())
