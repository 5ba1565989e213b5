"""Oracles: Python sets, enumeration, Zaslavsky's theorem, autograd, scikit-learn, plain PyTorch, invariances."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import nn

from companion import models, training
from companion.collapse.hash_encoders import (
    categorization,
    centred,
    clustering_accuracy,
    drop_constant_bits,
    expressivity_regime,
    hash_network,
    max_linear_regions,
    neural_code,
    redundancy_ratio,
    train,
)

binary = npst.arrays(np.uint8, npst.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, 1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def random_codes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2, shape, dtype=np.uint8)


# --- the code ---------------------------------------------------------------------------------------------------------


def test_code_of_a_network_computed_by_hand():
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight[:] = 1
        net[0].bias[:] = torch.tensor([-1.0, 0.0])
    codes = neural_code(net, torch.tensor([[-1.0], [0.3], [0.6], [1.5], [0.0], [1.0]]))
    assert codes.dtype == np.uint8
    assert codes.tolist() == [[0, 0], [0, 1], [0, 1], [1, 1], [0, 0], [0, 1]]  # zero is off


@pytest.mark.parametrize("inplace", [False, True])
def test_code_of_a_deep_network_is_that_of_a_manual_forward_pass(inplace):
    net = models.mlp([5, 7, 6, 4], generator=generator(), activation=lambda: nn.ReLU(inplace=inplace))
    x = inputs(50, 5)
    first = net[0](x)
    second = net[2](first.relu())
    expected = torch.cat([first > 0, second > 0], 1)
    assert neural_code(net, x).tolist() == expected.int().tolist()


def test_code_of_a_convolutional_network_has_a_bit_for_every_position():
    net = models.convnet(2, [3, 4], 5, generator=generator())
    x = inputs(6, 2, 8, 8)
    maps = net[0](x)
    codes = neural_code(net, x)
    assert codes.shape == (6, 3 * 64 + 4 * 16)
    assert codes[:, : 3 * 64].tolist() == (maps > 0).flatten(1).int().tolist()


def test_code_uses_running_statistics_and_leaves_the_network_as_it_was():
    net = hash_network(5, 7, 3, generator()).train()
    net[3].eval()  # a mixture of modes must survive
    net[1].running_mean[:] = inputs(7, seed=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = inputs(30, 5)
    expected = (net[0](x) > net[1].running_mean).int().tolist()  # scale and shift are still 1 and 0
    assert neural_code(net, x).tolist() == expected
    assert neural_code(net, x[:1]).tolist() == expected[:1]  # nothing depends on the rest of the batch
    assert [module.training for module in net] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), scales=st.lists(st.floats(0.01, 100), min_size=6, max_size=6))
def test_rescaling_a_hidden_unit_changes_no_code(seed, scales):
    net = models.mlp([4, 6, 5, 2], generator=generator(seed))
    x = inputs(40, 4, seed=seed)
    before = neural_code(net, x)
    scale = torch.tensor(scales)
    with torch.no_grad():
        net[0].weight *= scale[:, None]
        net[0].bias *= scale
        net[2].weight /= scale  # the next layer sees what it saw
    assert np.mean(neural_code(net, x) != before) < 0.01  # a sign may turn by rounding at zero


def test_equal_codes_mean_one_affine_map():
    net = models.mlp([3, 8, 8, 2], generator=generator())
    x = inputs(200, 3)
    near = x + 1e-6
    jacobian = torch.vmap(torch.func.jacrev(net))
    same = torch.from_numpy((neural_code(net, x) == neural_code(net, near)).all(1))
    assert same.float().mean() > 0.9
    torch.testing.assert_close(jacobian(x)[same], jacobian(near)[same], rtol=0, atol=1e-6)
    codes = neural_code(net, x)
    first, second = next(
        (i, j) for i, j in product(range(200), repeat=2) if i < j and (codes[i] == codes[j]).all()
    )  # two inputs far apart
    torch.testing.assert_close(jacobian(x)[first], jacobian(x)[second], rtol=0, atol=1e-6)
    d1, d2 = (torch.diag(torch.from_numpy(part).float()) for part in np.split(codes[first], 2))
    by_formula = net[4].weight @ d2 @ net[2].weight @ d1 @ net[0].weight
    torch.testing.assert_close(jacobian(x)[first], by_formula, rtol=0, atol=1e-6)


# --- collisions -------------------------------------------------------------------------------------------------------


def test_redundancy_ratio_by_hand():
    assert redundancy_ratio(np.array([[0, 1], [0, 1], [1, 1], [0, 0], [1, 1]])) == 2 / 5
    assert redundancy_ratio(np.zeros((4, 3), np.uint8)) == 3 / 4
    assert redundancy_ratio(np.eye(20, dtype=np.uint8)) == 0


@given(binary)
def test_redundancy_ratio_counts_a_set_of_rows(codes):
    assert redundancy_ratio(codes) == pytest.approx(1 - len(set(map(bytes, codes))) / len(codes), abs=1e-12)


@given(binary, st.randoms(use_true_random=False))
def test_redundancy_ratio_ignores_order_and_constant_bits(codes, random):
    rows, columns = list(range(codes.shape[0])), list(range(codes.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    assert redundancy_ratio(codes[rows][:, columns]) == redundancy_ratio(codes)
    padded = np.pad(codes, ((0, 0), (1, 1)), constant_values=1)
    assert redundancy_ratio(padded) == redundancy_ratio(codes)


def test_redundancy_of_random_words_is_that_of_the_birthday_problem():
    m, n = 8, 300
    ratios = [redundancy_ratio(random_codes(n, m, seed=seed)) for seed in range(200)]
    expected = 1 - 2**m * (1 - (1 - 2**-m) ** n) / n
    assert np.mean(ratios) == pytest.approx(expected, abs=5 * np.std(ratios) / 200**0.5)


def test_number_of_linear_regions():
    assert max_linear_regions(3, 64) == 8
    assert max_linear_regions(10, 2) == 56
    assert max_linear_regions(5, 5) == 32
    assert max_linear_regions(7, 1) == 8
    assert max_linear_regions(7, 0) == max_linear_regions(0, 7) == 1
    assert max_linear_regions(200, 150) < 2**200  # exact beyond floats
    for width, dim in product(range(1, 9), repeat=2):  # a new hyperplane cuts as many as it has regions itself
        ours = max_linear_regions(width, dim)
        assert ours == max_linear_regions(width - 1, dim) + max_linear_regions(width - 1, dim - 1)


def test_a_fine_grid_finds_no_more_regions_than_there_can_be():
    net = models.mlp([2, 10, 1], generator=generator(3))
    # Corners of the arrangement: around each crossing of two lines lie four regions, and far away all unbounded ones.
    weight, bias = net[0].weight.detach(), net[0].bias.detach()
    pairs = torch.combinations(torch.arange(10))
    corners = torch.linalg.solve(weight[pairs], -bias[pairs])
    turn = torch.linspace(0, 2 * torch.pi, 721)[:-1]
    circle = torch.stack([turn.cos(), turn.sin()], 1)
    around = (corners[:, None] + 1e-3 * circle[::10]).flatten(0, 1)
    found = neural_code(net, torch.cat([around, 1e4 * circle]))
    assert len(set(map(bytes, found))) == max_linear_regions(10, 2)  # generic: the bound is met
    reach = 2 * float(corners.abs().max())
    side = torch.linspace(-reach, reach, 1500)
    grid = neural_code(net, torch.cartesian_prod(side, side))
    packed = np.unique(np.packbits(grid, axis=1).view(np.uint16))
    assert 20 < len(packed) <= max_linear_regions(10, 2)


# --- categorization ---------------------------------------------------------------------------------------------------


def test_clustering_accuracy_by_hand():
    clusters, labels = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1]
    assert clustering_accuracy(clusters, labels) == pytest.approx(5 / 6)
    assert clustering_accuracy(clusters, labels, "hungarian") == pytest.approx(4 / 6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_clustering_accuracy_is_the_best_assignment_of_labels(pairs):
    clusters, labels = np.array(pairs).T

    def best(assignments):
        return max(np.mean(np.array(names)[clusters] == labels) for names in assignments)

    majority, hungarian = (clustering_accuracy(clusters, labels, way) for way in ("majority", "hungarian"))
    assert majority == pytest.approx(best(product(range(4), repeat=4)))
    assert hungarian == pytest.approx(best(permutations(range(4))))
    assert hungarian <= majority + 1e-12


def test_constant_bits_go_and_distances_stay():
    train_codes, test_codes = random_codes(30, 6), random_codes(20, 6, seed=1)
    train_codes[:, 1], test_codes[:, 1] = 1, 1
    train_codes[:, 2], test_codes[:, 2] = 0, 0
    train_codes[:, 4] = 1  # constant in training only: it stays
    kept = drop_constant_bits(train_codes, test_codes)
    assert [codes.tolist() for codes in kept] == [
        codes[:, [0, 3, 4, 5]].tolist() for codes in (train_codes, test_codes)
    ]
    before = (train_codes[:, None] != test_codes[None]).sum(-1)
    assert ((kept[0][:, None] != kept[1][None]).sum(-1) == before).all()


def test_hamming_distance_is_squared_euclidean_distance_on_codes():
    codes, queries = random_codes(80, 24), random_codes(30, 24, seed=1)
    hamming, _ = NearestNeighbors(n_neighbors=9, metric="hamming", algorithm="brute").fit(codes).kneighbors(queries)
    euclid, _ = NearestNeighbors(n_neighbors=9, algorithm="brute").fit(codes.astype(float)).kneighbors(queries)
    np.testing.assert_allclose(hamming, euclid**2 / 24, rtol=0, atol=1e-12)


def test_categorization_of_codes_that_are_prototypes_with_flips():
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 2, (4, 40), dtype=np.uint8)
    labels, test_labels = rng.integers(0, 4, 200), rng.integers(0, 4, 100)
    codes, test_codes = (prototypes[y] ^ (rng.random((len(y), 40)) < 0.05) for y in (labels, test_labels))
    assert set(categorization(codes, labels, test_codes, test_labels).values()) == {1.0}
    shuffled = categorization(codes, rng.permutation(labels), test_codes, test_labels)
    assert max(shuffled["kmeans_train"], shuffled["knn"], shuffled["logistic"]) < 0.5  # chance is 0.25
    assert shuffled["kmeans_test"] == 1  # K-Means sees no labels, and is scored on the true ones


def test_categorization_is_what_scikit_learn_says():
    codes, test_codes = random_codes(90, 7), random_codes(60, 7, seed=1)
    codes, test_codes = (np.pad(c, ((0, 0), (0, 3)), constant_values=1) for c in (codes, test_codes))
    labels, test_labels = codes[:, 0] + 2 * codes[:, 1], test_codes[:, 0] + 2 * test_codes[:, 1]
    found = categorization(codes, labels, test_codes, test_labels, seed=3)
    a, b = codes[:, :7].astype(float), test_codes[:, :7].astype(float)
    kmeans = KMeans(4, n_init=4, random_state=3).fit(a)
    assert found["kmeans_train"] == clustering_accuracy(kmeans.labels_, labels)
    assert found["kmeans_test"] == clustering_accuracy(kmeans.predict(b), test_labels)
    knn = KNeighborsClassifier(9, metric=lambda u, v: np.mean(u != v), algorithm="brute").fit(a, labels)
    assert found["knn"] == pytest.approx(knn.score(b, test_labels), abs=0.1)  # up to ties
    assert found["logistic"] == LogisticRegression(max_iter=1000).fit(a, labels).score(b, test_labels)


def test_categorization_needs_no_more_clusters_than_codes():
    codes = np.array([[0, 0], [1, 1]] * 10, dtype=np.uint8)
    labels = np.arange(20) % 4
    assert categorization(codes, labels, codes, labels)["kmeans_train"] == 0.5  # two words for four classes


@pytest.mark.parametrize(
    ("ratio", "accuracy", "regime"),
    [
        (0.5, 1.0, "under-expressive"),
        (0.0, 0.649, "under-expressive"),
        (0.499, 0.65, "critically-expressive"),
        (0.021, 0.99, "critically-expressive"),
        (0.0, 0.849, "critically-expressive"),
        (0.02, 0.85, "sufficiently-expressive"),
    ],
)
def test_regimes(ratio, accuracy, regime):
    assert expressivity_regime(ratio, accuracy) == regime


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_is_plain_pytorch_for_every_member():
    nets = [hash_network(6, 5, 3, generator(seed)) for seed in range(2)]
    x, y = inputs(2, 43, 6), torch.randint(3, (2, 43), generator=generator(5))
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in nets]
    kept = train(nets, x, y, epochs=(0, 2, 23), generator=generator(7), weight_decay=1e-2, batch_size=20)
    assert list(kept) == [0, 2, 23]
    for member, net in enumerate(nets):
        batches = training.minibatches(43, 20, generator(7))
        state = net.state_dict()
        assert all(torch.equal(state[name], value) for name, value in before[member].items())
        assert all(torch.equal(kept[0][member].state_dict()[name], value) for name, value in before[member].items())
        net.train()
        update = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-2)
        for epoch in range(1, 24):
            for _ in range(2):  # an incomplete batch of three is left out
                rows = next(batches)
                update.zero_grad()
                nn.functional.cross_entropy(net(x[member, rows]), y[member, rows]).backward()
                update.step()
            if epoch == 20:
                update.param_groups[0]["lr"] = 0.001
            if epoch in kept:
                copy = kept[epoch][member]
                assert not copy.training
                for name, value in net.state_dict().items():
                    torch.testing.assert_close(copy.state_dict()[name], value, rtol=1e-3, atol=2e-4)


def test_training_learns_and_a_small_sample_is_one_batch():
    x = torch.cat([inputs(1, 10, 4) + 3, inputs(1, 10, 4, seed=1) - 3], 1)
    y = torch.tensor([[0] * 10 + [1] * 10])
    (net,) = train([hash_network(4, 6, 2, generator())], x, y, epochs=(60,), generator=generator())[60]
    assert (net(x[0]).argmax(1) == y[0]).all()
    assert net[1].num_batches_tracked == 60


def test_centred_networks_split_the_data_in_the_middle():
    net = hash_network(5, 400, 3, generator())
    x = inputs(300, 5) + 10
    copy = centred(net, x)
    z = net[0](x)
    torch.testing.assert_close(copy[1].running_mean, z.mean(0))
    torch.testing.assert_close(copy[1].running_var, z.var(0))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), copy.parameters(), strict=True))
    assert not net[1].running_mean.any()  # the argument is not modified
    assert np.abs(neural_code(copy, x).mean(0) - 0.5).max() < 0.15
    assert np.abs(neural_code(net, x).mean(0) - 0.5).mean() > 0.45


def test_random_hyperplanes_keep_angles():
    net = nn.Sequential(nn.Linear(3, 20_000, bias=False), nn.ReLU())
    with torch.no_grad():
        net[0].weight.normal_(generator=generator())
    x = inputs(5, 3, seed=2)
    unit = nn.functional.normalize(x)
    codes = neural_code(net, x)
    hamming = (codes[:, None] != codes[None]).mean(-1)
    angle = torch.arccos((unit @ unit.mT).clamp(-1, 1)) / torch.pi
    np.testing.assert_allclose(hamming, angle.numpy(), atol=5 * 0.5 / 20_000**0.5)


# --- errors -----------------------------------------------------------------------------------------------------------

CODES, LABELS = random_codes(12, 4), np.arange(12) % 3
NET = hash_network(4, 6, 3, generator())
X, Y = inputs(1, 8, 4), torch.zeros(1, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: neural_code(nn.Linear(4, 2), X[0]), "net must have at least one nn.ReLU"),
        (lambda: neural_code(NET, X[0, :0]), "x must hold at least one sample"),
        (lambda: neural_code(NET, X[0] * float("nan")), "x must hold .* finite"),
        (lambda: redundancy_ratio(np.zeros((0, 3))), "codes must be a non-empty"),
        (lambda: redundancy_ratio(np.zeros(3)), "codes must be a non-empty"),
        (lambda: redundancy_ratio(np.full((2, 2), 0.5)), "codes must hold only 0 and 1"),
        (lambda: redundancy_ratio(np.full((2, 2), np.nan)), "codes must hold only 0 and 1"),
        (lambda: max_linear_regions(-1, 2), "width and dim must not be negative"),
        (lambda: drop_constant_bits(CODES, CODES[:, :2]), "equally many bits, got 4 and 2"),
        (lambda: drop_constant_bits(CODES, CODES + 1), "test_codes must hold only 0 and 1"),
        (lambda: clustering_accuracy([0, 1], [0]), "clusters and labels must be vectors of one length"),
        (lambda: clustering_accuracy([], []), "clusters and labels must be vectors of one length"),
        (lambda: clustering_accuracy([0], [0], "greedy"), "matching must be .* got 'greedy'"),
        (lambda: categorization(CODES, LABELS[:5], CODES, LABELS), "train_labels must have one entry per code, got 5"),
        (lambda: categorization(CODES, LABELS, CODES, LABELS[:5]), "test_labels must have one entry per code, got 5"),
        (lambda: categorization(CODES * 0, LABELS, CODES * 0, LABELS), "must differ in at least one bit"),
        (lambda: expressivity_regime(1.2, 0.5), "must lie in .* rr_train=1.2"),
        (lambda: expressivity_regime(0.1, float("nan")), "mean_accuracy=nan"),
        (lambda: train([NET, NET], X, Y, epochs=(1,), generator=generator()), "one sample per net, got 2 nets"),
        (lambda: train([NET], X, Y[:, :5], epochs=(1,), generator=generator()), "x and y must hold one sample"),
        (lambda: train([NET], X, Y, epochs=(), generator=generator()), "epochs must be increasing"),
        (
            lambda: train([NET], X, Y, epochs=(2, 1), generator=generator()),
            r"epochs must be increasing .* got \(2, 1\)",
        ),
        (lambda: train([NET], X, Y, epochs=(1,), generator=generator(), weight_decay=-1), "weight_decay must not be"),
        (lambda: train([NET], X, Y, epochs=(1,), generator=generator(), batch_size=1), "batch_size at least 2"),
        (
            lambda: train([NET], X / 0, Y, epochs=(1,), generator=generator()),
            "x must hold at least two samples per net",
        ),
        (lambda: centred(NET, X[0, :1]), "x must hold at least two samples"),
        (lambda: hash_network(4, 0, 3, generator()), "sizes must .* positive"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
