"""Oracles: closed forms, spectral identities, invariances, first-passage times, SciPy and scikit-learn."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.spatial import cKDTree
from scipy.special import erfc
from sklearn.linear_model import LinearRegression

from companion.data import DataUnavailable
from companion.scientific_ml import cosmology_graphs as module
from companion.scientific_ml.cosmology_graphs import (
    LIMITS,
    CloudGNN,
    DeepSet,
    TreeGNN,
    VelocityGNN,
    batch_graphs,
    clouds,
    correlation_function,
    eps_merger_tree,
    fit_least_squares,
    growth_factor,
    linear_theory_velocity,
    merger_forest,
    neighbour_graph,
    pair_distance_features,
    refinement_samples,
    sigma_radius,
    squared_distances,
    transfer_function,
    tree_features,
    tree_of,
    velocity_features,
    zeldovich_halos,
)

LEVELS = np.geomspace(1, 0.25, 13)


def rng(seed=0):
    return np.random.default_rng(seed)


def uniform(n, box, seed=0):
    return rng(seed).uniform(0, box, (n, 3))


# --- the universe -----------------------------------------------------------------------------------------------------


def test_transfer_function_and_sigma_have_the_values_computed_by_hand():
    np.testing.assert_allclose(
        transfer_function(np.array([0.01, 0.1, 1]), 0.3), [0.809535, 0.174250, 0.006511], atol=1e-6
    )
    np.testing.assert_allclose(sigma_radius(np.array([4.0, 8, 16]), 0.3, 0.8), [1.25399, 0.8, 0.45898], atol=1e-4)


@pytest.mark.parametrize(("R", "omega_m"), [(2.0, 0.15), (20.0, 0.45)])
def test_sigma_is_the_integral(R, omega_m):
    def variance(R):
        def integrand(log_k):
            k = math.exp(log_k)
            x = k * R
            window = 3 * (math.sin(x) - x * math.cos(x)) / x**3 if x > 1e-3 else 1.0
            return k**3.9624 * transfer_function(np.array(k), omega_m) ** 2 * window**2

        return quad(integrand, math.log(1e-4), math.log(30 / R), limit=400)[0]

    expected = 0.7 * math.sqrt(variance(R) / variance(8.0))
    assert sigma_radius(R, omega_m, 0.7) == pytest.approx(expected, rel=3e-3)


def test_growth_is_that_of_a_flat_universe():
    np.testing.assert_allclose(growth_factor(np.array([0.1, 0.5, 1]), 1.0), [0.1, 0.5, 1], rtol=1e-12)  # no Λ: D = a

    def exact(a):  # D ∝ H ∫ da / (aH)³
        hubble = lambda a: math.sqrt(0.3 / a**3 + 0.7)  # noqa: E731
        return hubble(a) * quad(lambda x: (x * hubble(x)) ** -3, 1e-8, a)[0]

    assert growth_factor(0.5, 0.3) == pytest.approx(0.61289, abs=1e-5)
    assert exact(0.5) / exact(1) == pytest.approx(0.61181, abs=1e-5)
    for a in (0.25, 0.5, 0.8):
        assert growth_factor(a, 0.3) == pytest.approx(exact(a) / exact(1), rel=3e-3)


def test_density_has_the_variance_of_its_spectrum():
    measured = np.sqrt(np.mean([zeldovich_halos(0.3, 0.8, rng(seed), n_halos=2)[2].var() for seed in range(12)]))
    assert measured == pytest.approx(1.8551, rel=0.01)


def test_displacements_flow_to_where_there_is_more():
    n, box = 16, 100.0
    delta_k = np.fft.rfftn(rng().standard_normal((n, n, n)))
    psi = module._displacement(delta_k, n, box)
    assert np.isrealobj(psi)
    k = np.fft.fftfreq(n, box / n) * 2 * np.pi
    inner = abs(k) < abs(k).max()
    divergence = sum(
        1j * k.reshape([-1 if a == axis else 1 for a in range(3)]) * np.fft.fftn(psi[..., axis]) for axis in range(3)
    )
    full = np.fft.fftn(np.fft.irfftn(delta_k, (n,) * 3, (0, 1, 2)))
    full[0, 0, 0] = 0
    block = np.ix_(inner, inner, inner)
    np.testing.assert_allclose(divergence[block], -full[block], atol=1e-8)


def test_halos_are_the_densest_cells_moved_by_psi():
    x, v, delta = zeldovich_halos(0.3, 0.8, rng(3), box=64.0, n_grid=16, n_halos=50)
    assert x.shape == v.shape == (50, 3)
    assert x.min() >= 0
    assert x.max() < 64
    psi = module._displacement(np.fft.rfftn(delta), 16, 64.0)
    rows = np.argsort(delta.ravel())[-50:]
    expected = 100 * 0.3**0.55 * psi.reshape(-1, 3)[rows]
    np.testing.assert_allclose(v[np.lexsort(v.T)], expected[np.lexsort(expected.T)], atol=1e-6)
    # what is left of x after the displacement is a point of the cell
    start = (x - v / (100 * 0.3**0.55)) % 64 / 4
    cells = {tuple(cell) for cell in np.floor(start).astype(int) % 16}
    assert cells == set(zip(*(axis.tolist() for axis in np.unravel_index(rows, delta.shape)), strict=True))


def test_amplitude_scales_velocities_and_leaves_the_choice_of_cells():
    (_, slow, low), (_, fast, high) = (zeldovich_halos(0.3, s8, rng(1)) for s8 in (0.5, 1.0))
    np.testing.assert_allclose(high, 2 * low)
    np.testing.assert_allclose(np.sort(fast, axis=0), 2 * np.sort(slow, axis=0))


# --- features ---------------------------------------------------------------------------------------------------------


def test_four_points_have_the_features_computed_by_hand():
    four = np.array([[0, 0, 0], [9, 0, 0], [0, 4, 0], [0, 0, 1.0]])
    np.testing.assert_allclose(np.sort(squared_distances(four, 10)), [1, 1, 2, 16, 17, 17])
    np.testing.assert_allclose(pair_distance_features(four, 10, [5]), [9, 8.414274, 2, 16], atol=1e-6)


def test_uniform_points_have_the_features_of_a_ball():
    features = pair_distance_features(uniform(2000, 100.0), 100.0, [20, 40]).reshape(2, 4) / [[400], [1600]]
    expected = [3 / 5, math.sqrt(3 / 7 - 9 / 25), (1 / 3) ** (2 / 3), (2 / 3) ** (2 / 3)]
    np.testing.assert_allclose(features, [expected] * 2, rtol=5e-3)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), shift=st.floats(0, 10), axes=st.permutations(range(3)))
def test_features_do_not_see_what_does_not_matter(seed, shift, axes):
    x = uniform(60, 10.0, seed)
    before = pair_distance_features(x, 10.0, [3, 4.9]), correlation_function(x, 10.0, [1, 3, 5])
    y = rng(seed).permutation(((10 - x)[:, axes] + shift) % 10 % 10)
    after = pair_distance_features(y, 10.0, [3, 4.9]), correlation_function(y, 10.0, [1, 3, 5])
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, atol=1e-9)


def test_pair_counts_are_those_of_scipy():
    x, edges = uniform(300, 50.0), np.array([2.0, 5, 12, 24])
    tree = cKDTree(x, boxsize=50.0)
    pairs = np.diff((tree.count_neighbors(tree, edges) - 300) / 2)
    expected = pairs / (300 * 299 / 2 * 4 / 3 * np.pi * np.diff(edges**3) / 50**3) - 1
    np.testing.assert_allclose(correlation_function(x, 50.0, edges), expected, atol=1e-12)


def test_velocity_features_are_the_sum_over_pairs():
    x, box = uniform(12, 30.0), 30.0
    F = velocity_features(x, box, 3, 2)
    expected = np.zeros((3, 6, 12))
    for i in range(12):
        for j in set(range(12)) - {i}:
            d = x[i] - x[j]
            r = np.linalg.norm(d - box * np.round(d / box))
            rows = [np.sin(2 * np.pi * k * d / box) * (box / r) ** p for p in (1, 2) for k in (1, 2, 3)]
            expected[:, :, i] += np.transpose(rows)
    np.testing.assert_allclose(F, expected, rtol=1e-9, atol=1e-9)
    assert abs(F.sum(2)).max() < 1e-8 * abs(F).max()  # pulls of a pair cancel


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000))
def test_velocity_features_turn_with_the_cloud(seed):
    x = uniform(30, 20.0, seed)
    F = velocity_features(x, 20.0)
    close = dict(rtol=1e-6, atol=1e-9 * abs(F).max())
    mirrored = velocity_features(np.column_stack([20.0 - x[:, 0], x[:, 1:]]), 20.0)
    np.testing.assert_allclose(mirrored, F * np.array([-1, 1, 1])[:, None, None], **close)
    np.testing.assert_allclose(velocity_features(x[:, [1, 2, 0]], 20.0), F[[1, 2, 0]], **close)


def test_linear_theory_inverts_a_plane_wave():
    # Points crowd at x = L/2 along a wave of contrast ε: the velocity is -100 f ε sin(kx')/k towards the crest.
    box, n, epsilon, smoothing = 100.0, 32, 0.05, 6.0
    q = (np.arange(64) + 0.5) * box / 64
    lattice = np.stack(np.meshgrid(q, q[::4], q[::4], indexing="ij"), -1).reshape(-1, 3)
    k = 2 * np.pi / box
    lattice[:, 0] += epsilon / k * np.sin(k * lattice[:, 0])  # density 1 - ε cos kx to first order
    v = linear_theory_velocity(lattice, box, 0.3, smoothing, n)
    expected = 100 * 0.3**0.55 * epsilon * np.sin(k * lattice[:, 0]) / k * math.exp(-((k * smoothing) ** 2) / 2)
    assert abs(v[:, 1:]).max() < 1e-3 * abs(v[:, 0]).max()
    np.testing.assert_allclose(v[:, 0], expected, atol=0.07 * expected.max())


def test_linear_theory_has_the_same_sign_as_the_simulator():
    x, v, _ = zeldovich_halos(0.3, 0.8, rng(2))
    assert np.corrcoef(v.ravel(), linear_theory_velocity(x, 128.0, 0.3, 12.0).ravel())[0, 1] > 0.3


def test_least_squares_is_that_of_scikit_learn():
    X, Y = rng().standard_normal((50, 7)) * np.geomspace(0.1, 10, 7) + 5, rng(1).standard_normal((50, 2))
    new = rng(2).standard_normal((9, 7))
    np.testing.assert_allclose(
        fit_least_squares(X, Y)(new), LinearRegression().fit(X, Y).predict(new), rtol=1e-8, atol=1e-8
    )
    constant = np.column_stack([X, np.full(50, 0.1)])
    changed = np.column_stack([new, np.full(9, 77.0)])
    np.testing.assert_allclose(fit_least_squares(constant, Y)(changed), fit_least_squares(X, Y)(new), atol=1e-8)


# --- trees ------------------------------------------------------------------------------------------------------------


def test_progenitors_follow_the_first_passage_law():
    a, m0, n = np.array([1.0, 0.9]), 1e13, 20_000
    m_res = 1e9
    mass, level, parent = eps_merger_tree(0.3, 0.8, rng(), np.full(n, m0), m_res, a, substeps=1)
    rise = 1.686 / growth_factor(0.9, 0.3) - 1.686
    radius = lambda m: (3 * m / (4 * np.pi * 2.775e11 * 0.3)) ** (1 / 3)  # noqa: E731
    children, owner = mass[level == 1], parent[level == 1]
    whole = np.bincount(owner, children, n)
    assert (whole <= m0 * (1 + 1e-9)).all()
    # M_1 is one of the two siblings: P(M_1 < m) with ΔS(m) is erfc(...) complement. Count both ends of the pair.
    for m in (0.02 * m0, 0.2 * m0):
        small = np.mean(np.bincount(owner, children < m, n) > 0) + np.mean(np.bincount(owner, minlength=n) < 2)
        s = [
            float(sigma_radius(radius(x), 0.3, 0.8) ** 2 - sigma_radius(radius(m0), 0.3, 0.8) ** 2) for x in (m, m0 - m)
        ]
        below, above = (erfc(rise / math.sqrt(2 * x)) for x in s)
        assert small == pytest.approx(1 - below + above, abs=4 * 0.5 / math.sqrt(n) + 0.01)


def test_trees_are_binary_conserve_mass_and_point_upwards():
    mass, level, parent = eps_merger_tree(0.3, 0.8, rng(), np.full(40, 1e13), 2e11, LEVELS)
    child = parent >= 0
    assert (level[child] == level[parent[child]] + 1).all()
    assert np.bincount(parent[child]).max() == 2
    assert (np.bincount(parent[child], mass[child], len(mass)) <= mass * (1 + 1e-9)).all()
    assert mass.min() >= 2e11
    siblings = np.flatnonzero(child[1:] & (parent[1:] == parent[:-1]))
    assert (mass[siblings] >= mass[siblings + 1]).all()
    tree = tree_of(level, parent)
    assert np.array_equal(tree[child], tree[parent[child]])
    assert np.array_equal(np.bincount(tree[level == 0]), np.ones(40))


def test_features_of_a_tree_computed_by_hand():
    # A root with two progenitors; the larger one is lost, the smaller one has two.
    mass = np.array([1e13, 6e12, 3e12, 2e12, 1e12])
    forest = mass, np.array([0, 1, 1, 2, 2]), np.array([-1, 0, 0, 2, 2])
    features = tree_features(forest, 3, 1e11)
    np.testing.assert_allclose(features, [[math.log10(6e12), 11, math.log(3), math.log(3)]])


@pytest.mark.parametrize("early", [True, False])
def test_a_merger_belongs_to_the_half_in_which_it_happened(early):
    dropped = [1, 1] if early else [1, 2]
    forest = np.array([9e12, 5e12, 3e12, 2e12, 1.5e12]), np.array([0, 1, 1, 2, 2]), np.array([-1, 0, 0, *dropped])
    X, y = refinement_samples(forest, np.array([1.0, 0.8, 0.6]))
    np.testing.assert_allclose(X, [[*np.log10([9e12, 2e12, 1.5e12]), 2, 1.0]])
    assert y.tolist() == [int(early)]


def test_a_forest_is_its_trees_one_after_the_other():
    pairs = np.array([[0.2, 0.7], [0.4, 0.9]])
    mass, level, parent = merger_forest(pairs, rng(4), 3, 1e13, 2e11, LEVELS)
    again = rng(4)
    single = [eps_merger_tree(*pair, again, np.full(3, 1e13), 2e11, LEVELS) for pair in pairs]
    np.testing.assert_array_equal(mass, np.concatenate([tree[0] for tree in single]))
    child = parent >= 0
    assert (level[child] == level[parent[child]] + 1).all()
    np.testing.assert_array_equal(
        np.bincount(tree_of(level, parent)), np.concatenate([np.bincount(tree_of(*t[1:])) for t in single])
    )


# --- networks ---------------------------------------------------------------------------------------------------------


def generator():
    return torch.Generator().manual_seed(0)


def test_neighbours_are_those_of_all_pairs():
    x = uniform(80, 20.0)
    edges, apart = neighbour_graph(x, 20.0, 4.0)
    r2 = squared_distances(x, 20.0)
    assert edges.shape[1] == 2 * (r2 < 16).sum()
    np.testing.assert_allclose(np.sort(apart.square().sum(1)), np.repeat(np.sort(r2[r2 < 16]), 2), rtol=1e-5)
    wrapped = (x[edges[0]] - x[edges[1]] - apart.numpy()) / 20  # source minus target, up to whole boxes
    np.testing.assert_allclose(wrapped, np.round(wrapped), atol=1e-6)


def test_a_batch_of_clouds_gives_what_each_gives_alone():
    parts = [uniform(n, 20.0, n) for n in (30, 50)]
    graphs = [neighbour_graph(x, 20.0, 5.0) for x in parts]
    network = CloudGNN(8, 5.0, generator())
    both = network(*batch_graphs(graphs, [30, 50]))
    alone = torch.cat([network(*batch_graphs([g], [len(x)])) for g, x in zip(graphs, parts, strict=True)])
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-6)
    assert (both[0] - both[1]).abs().min() > 1e-6


def test_networks_of_clouds_keep_their_symmetry():
    x = uniform(60, 20.0)
    turned = np.column_stack([20 - x[:, 1], x[:, 2], x[:, 0]])
    (before, after) = (batch_graphs([neighbour_graph(c, 20.0, 6.0)], [60]) for c in (x, turned))
    cloud, velocity = CloudGNN(8, 6.0, generator()), VelocityGNN(8, 6.0, generator())
    torch.testing.assert_close(cloud(*after), cloud(*before), rtol=1e-4, atol=1e-5)
    old, new = velocity(*before), velocity(*after)
    torch.testing.assert_close(new, torch.stack([-old[:, 1], old[:, 2], old[:, 0]], 1), rtol=1e-3, atol=1e-5)
    assert old.abs().max() > 1e-4


@pytest.mark.parametrize("kind", [DeepSet, TreeGNN])
def test_networks_of_trees_do_not_see_the_order_of_nodes(kind):
    mass, level, parent = merger_forest(np.array([[0.3, 0.8]]), rng(), 4, 1e13, 2e11, LEVELS)
    x, tree = (
        torch.tensor(np.stack([np.log10(mass / 1e12), level / 12], 1)).float(),
        torch.tensor(tree_of(level, parent)),
    )
    network = kind(2, 8, generator())
    before = network(x, torch.tensor(parent), tree)
    order = rng().permutation(len(mass))
    moved = np.where(parent[order] < 0, -1, np.argsort(order)[parent[order]])
    torch.testing.assert_close(network(x[order], torch.tensor(moved), tree[order]), before, rtol=1e-4, atol=1e-6)
    cut = network(x, torch.full((len(x),), -1), tree)
    assert torch.equal(cut, before) == (kind is DeepSet)  # only the graph network sees the edges


# --- data and errors --------------------------------------------------------------------------------------------------


def test_clouds_are_drawn_within_the_limits_and_again_from_the_same_seed(monkeypatch):
    (x, v, targets), test, box = clouds("zeldovich", 1, 4, 2)
    assert (len(x), len(v), len(test[0]), box) == (4, 4, 2, 128.0)
    assert (targets >= LIMITS[0]).all()
    assert (targets <= LIMITS[1]).all()
    np.testing.assert_array_equal(clouds("zeldovich", 1, 4, 2)[1][0][0], test[0][0])
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    assert clouds("CAMELS", 0, 2, 2)[2] == 25.0  # stand-ins in a box of that size


class _File(dict):
    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *_: None  # noqa: E731


def test_the_benchmark_is_read_or_named(monkeypatch, tmp_path):
    cloud = {axis: np.array([1.0, 26.0, 3.0]) for axis in ("X", "Y", "Z", "VX", "VY", "VZ")}
    file = _File({"params": {"Omega_m": np.array([0.2, 0.3, 0.4]), "sigma_8": np.array([0.7, 0.8, 0.9])}})
    file |= {f"LH/LH_{n}": cloud for n in range(3)}
    monkeypatch.setattr(module, "download", lambda *_: tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", type("h5py", (), {"File": lambda path: _File(file)}))
    (x, v, targets), _, _ = clouds("CAMELS", 0, 2, 2)
    np.testing.assert_array_equal(targets, [[0.2, 0.7], [0.3, 0.8]])
    np.testing.assert_array_equal(x[0][:, 0], [1, 1, 3])  # back into the box
    assert v[0].shape == (3, 3)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataUnavailable, match="h5py"):
        clouds("CAMELS", 0, 2, 2)


CLOUD = uniform(20, 10.0)
BAD = CLOUD.copy()
BAD[0, 0] = np.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sigma_radius(0.0, 0.3, 0.8), "R must"),
        (lambda: sigma_radius(8.0, 1.3, 0.8), "omega_m"),
        (lambda: transfer_function(np.array(0.1), 0), "omega_m"),
        (lambda: growth_factor(0.0, 0.3), "a must"),
        (lambda: zeldovich_halos(0.3, -1, rng()), "sigma_8"),
        (lambda: zeldovich_halos(0.3, 0.8, rng(), n_grid=31), "n_grid"),
        (lambda: clouds("Quijote", 0, 4, 2), "source"),
        (lambda: squared_distances(CLOUD[:, :2], 10), "positions must have shape"),
        (lambda: squared_distances(BAD, 10), "positions must lie"),
        (lambda: pair_distance_features(CLOUD, 10, [6]), "cutoffs must hold radii"),
        (lambda: pair_distance_features(CLOUD, 10, [1e-6]), "cutoffs must have two pairs"),
        (lambda: correlation_function(CLOUD, 10, [1, 6]), "edges"),
        (lambda: correlation_function(CLOUD, 10, [4, 2]), "edges"),
        (lambda: velocity_features(CLOUD, 10, 0), "n_modes"),
        (lambda: velocity_features(np.zeros((2, 3)), 10), "positions must differ"),
        (lambda: linear_theory_velocity(CLOUD, 10, 0.3, -1), "smoothing"),
        (lambda: fit_least_squares(CLOUD, CLOUD[:5]), "X and Y"),
        (lambda: fit_least_squares(BAD, CLOUD), "X and Y"),
        (lambda: eps_merger_tree(0.3, 0.8, rng(), 1e13, 1e14, LEVELS), "m_res"),
        (lambda: eps_merger_tree(0.3, 0.8, rng(), 1e13, 1e11, LEVELS[::-1]), "scale_factors"),
        (lambda: neighbour_graph(CLOUD, 10, 7), "reach"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
