"""Oracles: SciPy's distances and image filters, scikit-learn's k-means and nearest centroids, and invariances."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestCentroid
from torch import nn
from torch.nn import functional as F

from companion import data
from companion.interpretability.prototype_networks import (
    PrototypeNetwork,
    PrototypeOutput,
    conv_autoencoder,
    cross_entropy,
    elastic_transform,
    explain,
    mlp_autoencoder,
    nearest_images,
    prototype_loss,
    prototype_quality,
    squared_distances,
    train_networks,
)

SHAPE = (1, 8, 8)
Z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
P = torch.tensor([[0.0, 1.0], [2.0, 0.0]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=0, **options):
    draw = generator(seed)
    return PrototypeNetwork(*mlp_autoencoder(SHAPE, 24, 6, draw), SHAPE, **options, generator=draw)


def digits(n=300):
    x, y = data.digits()
    return x[:n].view(-1, *SHAPE), y[:n]


def identity_network(prototypes, weight, shape=SHAPE):
    """A network whose codes are the pixels themselves."""
    net = PrototypeNetwork(nn.Flatten(), nn.Unflatten(1, shape), shape, *weight.shape, generator=generator())
    net.load_state_dict({"prototypes": prototypes, "weight": weight})
    return net


def output_of(z, prototypes, n_classes=3):
    """An output whose distances are those of the given codes; everything else is zero."""
    images = torch.zeros(len(z), 1, 2, 2)
    return PrototypeOutput(torch.zeros(len(z), n_classes), images, squared_distances(z, prototypes)), images


# --- distances --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 50), st.integers(0, 1000))
def test_squared_distances_are_scipys(n, m, q, seed):
    z, p = torch.randn(n, q, generator=generator(seed)), torch.randn(m, q, generator=generator(seed + 1))
    assert np.allclose(squared_distances(z, p), cdist(z, p, "sqeuclidean"), atol=1e-4)
    assert torch.allclose(squared_distances(z, p), torch.cdist(z, p) ** 2, atol=1e-4)


def test_squared_distances_are_never_negative():
    z = 100 + torch.randn(200, 40, generator=generator())
    assert squared_distances(z, z).min() == 0


# --- the objective ----------------------------------------------------------------------------------------------------


def test_interpretability_terms_by_hand():
    assert squared_distances(Z, P).tolist() == [[1, 4], [2, 1], [26, 9]]
    output, x = output_of(Z, P)
    _, terms = prototype_loss(output, x, torch.zeros(3, dtype=torch.long))
    assert terms["r1"] == 1
    assert terms["r2"].item() == pytest.approx(11 / 3)
    output, x = output_of(Z, Z)
    _, terms = prototype_loss(output, x, torch.zeros(3, dtype=torch.long))
    assert terms["r1"] == terms["r2"] == 0


def test_classification_and_reconstruction_terms_are_pytorchs():
    x, y = digits(40)
    output = network()(x)
    total, terms = prototype_loss(output, x, y, (2, 3, 5, 7))
    assert torch.allclose(terms["classification"], F.cross_entropy(output.logits, y), atol=1e-5)
    summed = F.mse_loss(output.reconstruction, x, reduction="sum") / len(
        x
    )  # over pixels; a mean would be 64 times less
    assert torch.allclose(terms["autoencoder"], summed, atol=1e-4)
    expected = sum(w * terms[name] for w, name in zip((2, 3, 5, 7), terms, strict=True))
    assert list(terms) == ["classification", "autoencoder", "r1", "r2"]
    assert torch.allclose(total, expected)


def test_a_stack_of_networks_has_the_losses_of_its_members():
    x, y = digits(30)
    outputs = [network(seed)(x) for seed in range(3)]
    weights = torch.tensor([[20.0, 1, 5, 5], [20, 1, 0, 0], [0, 1, 2, 3]])
    stacked = PrototypeOutput(*(torch.stack(part) for part in zip(*outputs, strict=True)))
    total, _ = prototype_loss(stacked, x.expand(3, *x.shape), y.expand(3, -1), weights)
    single = [prototype_loss(output, x, y, weight)[0] for output, weight in zip(outputs, weights, strict=True)]
    assert torch.allclose(total, torch.stack(single), rtol=1e-5)


def test_r1_of_a_batch_is_biased_upwards_and_r2_is_not():
    z, p = torch.randn(240, 5, generator=generator()).double(), torch.randn(15, 5, generator=generator(1)).double()

    def terms(codes):
        output, x = output_of(codes, p)
        return prototype_loss(output, x.double(), torch.zeros(len(codes), dtype=torch.long))[1]

    whole, batches = terms(z), [terms(batch) for batch in z.split(40)]
    assert all(batch["r1"] >= whole["r1"] for batch in batches)
    assert max(batch["r1"] for batch in batches) > 1.2 * whole["r1"]
    assert torch.allclose(torch.stack([batch["r2"] for batch in batches]).mean(), whole["r2"], atol=1e-6)


def test_minimising_r2_over_the_prototypes_is_k_means():
    x, y = digits(800)
    z = x.flatten(1)
    start = z[torch.randperm(len(z), generator=generator())[:15]]
    net = identity_network(start, torch.zeros(15, 10))
    update = torch.optim.Adam([net.prototypes], lr=0.02)
    for _ in range(300):
        update.zero_grad()
        total, terms = prototype_loss(net(x), x, y, (0, 0, 0, 1))
        total.backward()
        update.step()
    optimum = KMeans(15, n_init=10, random_state=0).fit(z.numpy()).inertia_ / len(z)
    assert 0.999 * optimum <= terms["r2"].item() <= 1.15 * optimum


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "latent"), [((1, 28, 28), 40), ((3, 32, 32), 40), ((1, 9, 14), 10)])
def test_convolutional_network_has_the_papers_code_and_gives_images_back(shape, latent):
    draw = generator()
    net = PrototypeNetwork(*conv_autoencoder(shape, draw), shape, generator=draw)
    output = net(torch.rand(2, *shape, generator=draw))
    assert net.prototypes.shape == (15, latent)
    assert output.reconstruction.shape == (2, *shape)
    assert ((output.reconstruction > 0) & (output.reconstruction < 1)).all()
    assert net.prototype_images().shape == (15, *shape)
    assert sum(isinstance(module, nn.ReLU) for module in net.modules()) == 6
    assert (output.logits.shape, output.distances.shape) == ((2, 10), (2, 15))


def test_convolutional_weights_have_pytorchs_distribution():
    for built in conv_autoencoder((1, 28, 28), generator()):
        for layer in built:
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                reference = type(layer)(layer.in_channels, layer.out_channels, 3).weight.std()
                assert layer.weight.std().item() == pytest.approx(reference.item(), rel=0.15)


def test_constructing_a_network_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draw = generator()
    PrototypeNetwork(*conv_autoencoder((1, 28, 28), draw), (1, 28, 28), generator=draw)
    network()
    assert torch.equal(before, torch.get_rng_state())


def test_logits_are_linear_in_the_squared_distances():
    net, (x, _) = network(), digits(20)
    distances = cdist(net.encoder(x).detach(), net.prototypes.detach(), "sqeuclidean")
    assert np.allclose(net(x).logits.detach(), distances @ net.weight.detach().numpy(), atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-3, 3), min_size=15, max_size=15))
def test_a_constant_added_to_a_row_of_the_weights_changes_nothing(shift):
    net, shifted, (x, _) = network(), network(), digits(20)
    shifted.weight.data += torch.tensor(shift)[:, None]
    before, after = (n(x).logits.double().softmax(1) for n in (net, shifted))
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(net.centred_weight(), shifted.centred_weight(), atol=1e-5)
    assert net.centred_weight().sum(1).abs().max() < 1e-5


def test_class_of_a_prototype_is_that_of_its_most_negative_weight():
    weight = torch.tensor([[5.0, 4, 9], [-1, 0, -2]])
    assert identity_network(torch.zeros(2, 64), weight).prototype_classes().tolist() == [1, 2]


def test_one_prototype_per_class_is_scikit_learns_nearest_centroid():
    x, y = digits(600)
    z = network().encoder(x).detach()
    reference = NearestCentroid().fit(z.numpy(), y.numpy())
    centroids = torch.from_numpy(reference.centroids_).to(z)
    net = identity_network(centroids, -torch.eye(10), shape=(1, 1, 6))
    # The logits are -D here: W with the entry -1 at the prototype's own class and 0 elsewhere.
    assert np.array_equal(net(z.view(-1, 1, 1, 6)).logits.argmax(1), reference.predict(z.numpy()))


# --- explanations and measures ----------------------------------------------------------------------------------------


def test_contributions_add_up_to_the_logits():
    net, (x, _) = network(), digits(20)
    for image, logits, distances in zip(x, *net(x)[::2], strict=True):
        explanation = explain(net, image)
        assert torch.allclose(explanation.contributions.sum(0), logits, rtol=1e-5, atol=1e-5)
        assert torch.allclose(explanation.distances, distances, atol=1e-5)
        assert explanation.prediction == logits.argmax()
    assert torch.equal(explanation.prototypes, net.prototype_images())


def test_nearest_images_are_scipys():
    x, _ = digits(50)
    distance, index = nearest_images(x[:10] + 0.05, x)
    reference = cdist((x[:10] + 0.05).flatten(1), x.flatten(1))
    assert np.allclose(distance, reference.min(1), atol=1e-4)
    assert np.array_equal(index, reference.argmin(1))


def test_quality_of_prototypes_that_are_training_images():
    x, _ = digits(100)
    quality = prototype_quality(identity_network(x[:15].flatten(1), torch.zeros(15, 10)), x)
    assert quality["r1_normalised"] == pytest.approx(0, abs=1e-5)
    assert quality["pixel_nn"] == pytest.approx(0, abs=5e-3)
    squares = cdist(x.flatten(1), x[:15].flatten(1), "sqeuclidean").min(1).mean()
    assert quality["r2_normalised"] == pytest.approx(squares / x.flatten(1).numpy().var(0).sum(), rel=1e-4)


def test_quality_does_not_change_with_the_scale_of_the_codes():
    x, _ = digits(100)
    net, scaled = network(), network()
    scaled.encoder[-1].weight.data *= 3
    scaled.encoder[-1].bias.data *= 3
    scaled.prototypes.data *= 3
    one, other = prototype_quality(net, x), prototype_quality(scaled, x)
    for key in ("r1_normalised", "r2_normalised"):
        assert one[key] == pytest.approx(other[key], rel=1e-3)


# --- deformation ------------------------------------------------------------------------------------------------------


def scipy_deformation(images, sigma, alpha, noise):
    """The authors' recipe, image by image."""
    result = []
    for (image,), field in zip(images.double().numpy(), noise.double().numpy(), strict=True):
        down, right = (alpha * gaussian_filter(part, sigma, mode="constant") for part in field)
        rows, columns = np.indices(image.shape)
        result.append([map_coordinates(image, [rows + down, columns + right], order=1, mode="constant")])
    return np.array(result)


@pytest.mark.parametrize(("height", "width", "sigma", "alpha"), [(8, 8, 2, 4), (28, 20, 4, 20), (9, 9, 0.5, 2)])
def test_deformation_is_that_of_scipy(height, width, sigma, alpha):
    images = torch.rand(5, 1, height, width, generator=generator())
    noise = 2 * torch.rand(5, 2, height, width, generator=generator(3)) - 1
    ours = elastic_transform(images, sigma, alpha, generator(3))
    assert np.allclose(ours, scipy_deformation(images, sigma, alpha, noise), atol=1e-4)


def test_no_displacement_is_the_identity_and_every_image_gets_its_own():
    images = torch.rand(2, 3, 1, 8, 8, generator=generator())
    inner = (..., slice(1, -1), slice(1, -1))
    assert torch.allclose(elastic_transform(images, 2, 0, generator())[inner], images[inner], atol=1e-5)
    assert torch.allclose(elastic_transform(images, 2, 0, generator()), images, atol=1e-5)
    same = images[:1, :1].expand(2, 3, 1, 8, 8)
    assert len(elastic_transform(same, 2, 4, generator()).flatten(0, 1).flatten(1).unique(dim=0)) == 6


# --- training ---------------------------------------------------------------------------------------------------------

PROTOCOL = dict(epochs=4, batch_size=30, lr=5e-3, augment=lambda batch: batch, record_every=2)


def objective(output, x, y):
    return prototype_loss(output, x, y)[0]


def test_training_many_networks_is_training_each_alone():
    x, y = digits(120)
    both, history = train_networks(
        [network(0), network(1)], objective, x.view(1, 120, *SHAPE), y[None], generator=generator(), **PROTOCOL
    )
    alone, _ = train_networks([network(1)], objective, x[None], y[None], generator=generator(), **PROTOCOL)
    for name, value in alone[0].state_dict().items():
        assert torch.allclose(both[1].state_dict()[name], value, atol=2e-3)
        assert torch.equal(history[name][-1, 1], both[1].state_dict()[name])
    assert torch.equal(history["prototypes"][0, 0], network(0).prototypes)
    assert history["step"].tolist() == [0, 8, 16]


def test_each_network_learns_from_its_own_data_and_nothing_is_modified():
    x, y = digits(240)
    start, before = network(), network().state_dict()
    stacked = x.view(2, 120, *SHAPE), torch.stack([y[:120], y[120:] * 0])
    trained, history = train_networks([start] * 4, objective, *stacked, generator=generator(), **PROTOCOL)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert torch.allclose(history["weight"][-1, 0], history["weight"][-1, 2], atol=1e-4)
    always, mixed = (float((trained[k](x).logits.argmax(1) == 0).float().mean()) for k in (1, 0))
    assert always > 0.8
    assert mixed < 0.5


def test_training_classifies_and_the_terms_bind_prototypes_to_data():
    x, y = digits(600)
    weights = torch.tensor([[20.0, 1, 5, 5], [20, 1, 0, 0]])
    (full, neither), _ = train_networks(
        [network()] * 2,
        lambda output, images, labels: prototype_loss(output, images, labels, weights)[0],
        x[None],
        y[None],
        generator=generator(),
        **PROTOCOL
        | dict(epochs=60, record_every=60, augment=partial(elastic_transform, sigma=2, alpha=4, generator=generator())),
    )
    assert (full(x).logits.argmax(1) == y).float().mean() > 0.95
    bound, free = prototype_quality(full, x), prototype_quality(neither, x)
    assert all(bound[key] < free[key] for key in bound)
    assert bound["r1_normalised"] < 0.1


# --- bad input --------------------------------------------------------------------------------------------------------


def training_of(**changes):
    x, y = digits(60)
    options = dict(networks=[network()], loss=objective, x=x[None], y=y[None], generator=generator(), **PROTOCOL)
    return train_networks(**options | changes)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: squared_distances(torch.ones(3, 2), torch.ones(3, 4)), "z and prototypes"),
        (lambda: squared_distances(torch.ones(3), torch.ones(3, 4)), "z and prototypes"),
        (lambda: mlp_autoencoder(SHAPE, 0, 2, generator()), "sizes"),
        (lambda: conv_autoencoder(SHAPE, generator(), ()), "widths"),
        (lambda: conv_autoencoder((1, 0, 8), generator()), "image_shape"),
        (lambda: network(n_prototypes=0), "n_prototypes"),
        (lambda: network(n_classes=0), "n_classes"),
        (lambda: prototype_loss(*output_of(Z, P), torch.zeros(3, dtype=torch.long), (20, 1, -1, 1)), "weights"),
        (lambda: prototype_loss(*output_of(Z, P), torch.zeros(3, dtype=torch.long), (20, 1, 1)), "weights"),
        (lambda: prototype_loss(output_of(Z, P)[0], torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)), "x must"),
        (lambda: elastic_transform(torch.ones(8, 8), 2, 4, generator()), "images"),
        (lambda: elastic_transform(torch.ones(1, 1, 8, 1), 2, 4, generator()), "images"),
        (lambda: elastic_transform(torch.ones(1, 1, 8, 8), 0, 4, generator()), "sigma"),
        (lambda: elastic_transform(torch.ones(1, 1, 8, 8), 2, -1, generator()), "alpha"),
        (lambda: explain(network(), torch.ones(2, *SHAPE)), "x must"),
        (lambda: explain(network(), torch.full(SHAPE, torch.nan)), "x must"),
        (lambda: nearest_images(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 9)), "images"),
        (lambda: prototype_quality(network(), torch.ones(0, *SHAPE)), "x_train"),
        (lambda: prototype_quality(network(), torch.full((1, *SHAPE), torch.nan)), "x_train"),
        (lambda: training_of(y=torch.zeros(1, 59, dtype=torch.long)), "x must"),
        (lambda: training_of(x=torch.full((1, 60, *SHAPE), torch.nan)), "x must"),
        (lambda: training_of(networks=[]), "networks"),
        (lambda: training_of(epochs=0), "epochs"),
        (lambda: training_of(record_every=0), "record_every"),
        (lambda: training_of(batch_size=61), "batch_size"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_cross_entropy_is_pytorchs_for_every_member():
    logits, y = torch.randn(3, 20, 7, generator=generator()), torch.randint(7, (3, 20), generator=generator())
    expected = [F.cross_entropy(*pair) for pair in zip(logits, y, strict=True)]
    assert torch.allclose(cross_entropy(logits, y), torch.stack(expected), atol=1e-6)
