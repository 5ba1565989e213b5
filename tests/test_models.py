"""The shared networks against torch's own layers, by hand."""

import pytest
import torch
from torch import nn

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


def test_bad_sizes_are_named(generator):
    with pytest.raises(ValueError, match=r"sizes must hold at least two positive widths, got \[3\]"):
        models.mlp([3], generator=generator)
    with pytest.raises(ValueError, match=r"got \[3, 0\]"):
        models.mlp([3, 0], generator=generator)
    with pytest.raises(ValueError, match=r"widths=\[\]"):
        models.convnet(1, [], 2, generator=generator)
