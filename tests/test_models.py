"""The shared networks against torch's own layers, by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from companion import models


def test_mlp_is_the_composition_of_its_layers(generator):
    network = models.mlp([3, 5, 4, 2], generator=generator, dtype=torch.float64)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    first, second, last = (layer for layer in network if isinstance(layer, nn.Linear))
    expected = (x @ first.weight.T + first.bias).relu()
    expected = (expected @ second.weight.T + second.bias).relu()
    torch.testing.assert_close(network(x), expected @ last.weight.T + last.bias)


def test_without_activation_the_network_is_one_matrix(generator):
    network = models.mlp([3, 5, 2], generator=generator, activation=None, bias=False)
    product = network[1].weight @ network[0].weight
    x = torch.randn(7, 3, generator=generator)
    torch.testing.assert_close(network(x), x @ product.T)


def test_weights_come_from_the_generator_with_torchs_scale():
    state = torch.get_rng_state()
    networks = [models.mlp([400, 300, 10], generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert torch.equal(networks[0][0].weight, networks[1][0].weight)
    assert not torch.equal(networks[0][0].weight, networks[2][0].weight)
    reference = nn.Linear(400, 300)
    assert networks[0][0].weight.std().item() == pytest.approx(reference.weight.std().item(), rel=0.02)
    assert networks[0][0].weight.abs().max() <= 400**-0.5


def test_convnet_shapes_and_translation(generator):
    network = models.convnet(1, [8, 16], 3, generator=generator)
    x = torch.zeros(1, 1, 32, 32)
    x[..., 8:16, 8:16] = torch.rand(8, 8, generator=generator)
    assert network(x).shape == (1, 3)
    # Two poolings: a shift by a multiple of 4 pixels, away from the border, changes nothing but the background.
    torch.testing.assert_close(network(x.roll((4, 8), dims=(2, 3))), network(x))


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_known_architectures_have_their_known_sizes(generator):
    # 13 convolutions of VGG-16 and one linear layer, by the sum of n_in * n_out * 9 + n_out.
    vgg16 = models.convnet(3, (64, 128, 256, 512, 512), 10, generator=generator, convolutions=(2, 2, 3, 3, 3))
    assert parameters(vgg16) == 14_714_688 + 5_130
    # The sizes that implementations of ResNets for CIFAR with 1x1 shortcuts are known by.
    assert parameters(models.resnet(3, (16, 32, 64), 3, 10, generator=generator)) == 272_474
    assert parameters(models.resnet(3, (64, 128, 256, 512), 2, 10, generator=generator)) == 11_173_962


@pytest.mark.parametrize("norm", [True, False])
def test_resnet_is_its_blocks_by_hand(generator, norm):
    network = models.resnet(2, (4, 6), 1, 3, generator=generator, norm=norm).double().eval()
    x = torch.randn(5, 2, 8, 8, generator=generator, dtype=torch.float64)

    def apply(layer, h, stride, size):
        convolution = layer[0] if norm else layer
        h = functional.conv2d(h, convolution.weight, convolution.bias, stride, size // 2)
        return h / (1 + layer[1].eps) ** 0.5 if norm else h

    blocks = [layer for layer in network if isinstance(layer, models._Block)]
    h = apply(network[:2] if norm else network[0], x, 1, 3).relu()
    inner = apply(blocks[0].second, apply(blocks[0].first, h, 1, 3).relu(), 1, 3)
    h = (h + inner).relu()
    inner = apply(blocks[1].second, apply(blocks[1].first, h, 2, 3).relu(), 1, 3)
    h = (apply(blocks[1].shortcut, h, 2, 1) + inner).relu()
    torch.testing.assert_close(network(x), network[-1](h.mean((2, 3))))
    assert h.shape == (5, 6, 4, 4)


def test_networks_without_normalisation_treat_every_input_alone(generator):
    network = models.resnet(1, (4, 4), 2, 3, generator=generator, norm=False)
    x = torch.randn(6, 1, 8, 8, generator=generator)
    torch.testing.assert_close(network(x)[2:3], network(x[2:3]))
    assert sum(isinstance(module, nn.ReLU) for module in network.modules()) == 1 + 2 * 4


def test_bad_sizes_are_named(generator):
    with pytest.raises(ValueError, match=r"sizes must hold at least two positive widths, got \[3\]"):
        models.mlp([3], generator=generator)
    with pytest.raises(ValueError, match=r"got \[3, 0\]"):
        models.mlp([3, 0], generator=generator)
    with pytest.raises(ValueError, match=r"widths=\[\]"):
        models.convnet(1, [], 2, generator=generator)
    with pytest.raises(ValueError, match=r"convolutions must hold a positive number for each stage, got \[2\]"):
        models.convnet(1, [4, 4], 2, generator=generator, convolutions=[2])
    with pytest.raises(ValueError, match=r"blocks=0"):
        models.resnet(1, [4], 0, 2, generator=generator)
