"""Oracles: volumes in closed form and of a mesh, the geometry of sight, SciPy's trees and hulls, loops by hand."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import dblquad
from scipy.spatial import ConvexHull, cKDTree
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from companion import data
from companion.scientific_ml import point_cloud_weight
from companion.scientific_ml.point_cloud_weight import (
    BELT_DEPTH,
    PAPER,
    SMALL,
    Architecture,
    Clouds,
    PointRAFT,
    SetAbstraction,
    Tuber,
    _turned,
    ball_query,
    farthest_point_sampling,
    make_dataset,
    neighbourhoods,
    object_height,
    oriented_box,
    partial_view,
    potato_twin,
    predict,
    resting,
    simulate_tuber,
    sunflower,
    train,
    tuber_surface,
    tuber_volume,
)

ELLIPSOID = Tuber((40, 30, 25))
ODD = Tuber((40, 30, 25), (0.1, -0.1, 0.05, 0.1, -0.05, 0.1), bend=0.4)
FIVE = torch.tensor([[[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [0.1, 0, 0]]])
TINY = Architecture(((6, 20.0, 4, (8, 8)), (3, 40.0, 3, (8, 8))), (8, 8), (8,), 4)
seeds = st.integers(0, 2**32 - 1)


def rng(seed=0):
    return np.random.default_rng(seed)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_clouds(seed=0, n=3, points=20, dtype=torch.float64):
    return 20 * torch.randn(n, points, 3, generator=generator(seed), dtype=dtype)


def rotation(angle, dtype=torch.float64):
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=dtype)


def constant(update, steps):
    return LambdaLR(update, lambda _: 1.0)


# --- tubers and the camera --------------------------------------------------------------------------------------------


def test_sunflower_covers_the_sphere_evenly():
    u = sunflower(1000)
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1)
    np.testing.assert_allclose(u.T @ u / 1000, np.eye(3) / 3, atol=1e-3)
    assert cKDTree(u).query(u, 2)[0][:, 1].min() > 0.7 * math.sqrt(4 * math.pi / 1000)


def test_volume_of_an_ellipsoid_and_of_its_hull():
    assert tuber_volume(ELLIPSOID) == pytest.approx(4 / 3 * math.pi * 30, abs=1e-9)
    assert ConvexHull(tuber_surface(ELLIPSOID)).volume / 1000 == pytest.approx(125.48, abs=0.01)
    assert tuber_volume(ELLIPSOID._replace(bend=0.3)) == tuber_volume(ELLIPSOID)
    assert ELLIPSOID._replace(density=1.2).weight == pytest.approx(150.796, abs=1e-3)


def test_volume_agrees_with_quadrature():
    def cubed(angle, z):
        return (1 + 0.2 * ((1 - z**2) * math.cos(angle) ** 2 - 1 / 3)) ** 3

    mean = dblquad(cubed, -1, 1, 0, 2 * math.pi)[0] / (4 * math.pi)
    assert mean == pytest.approx(1.0108021, abs=1e-7)
    assert tuber_volume(Tuber((10, 10, 10), (0, 0.1, 0, 0, 0, 0))) == pytest.approx(4 / 3 * math.pi * mean, rel=1e-6)


def test_volume_agrees_with_a_mesh_of_the_bent_surface():
    u, corners = sunflower(), tuber_surface(ODD)
    triangles = ConvexHull(u).simplices
    outward = np.sign(np.linalg.det(u[triangles]))
    mesh = (outward * np.linalg.det(corners[triangles])).sum() / 6000
    assert mesh == pytest.approx(tuber_volume(ODD), rel=3e-3)
    assert abs(tuber_volume(ODD) / tuber_volume(ELLIPSOID) - 1) > 0.02


def test_simulated_tubers_have_the_measured_sizes():
    tubers = [simulate_tuber(rng(seed)) for seed in range(300)]
    weight, axes = np.array([t.weight for t in tubers]), np.array([t.axes for t in tubers])
    assert weight.min() >= 36
    assert weight.max() <= 494
    assert 2 * axes[:, 0].mean() == pytest.approx(76, abs=4)
    assert (axes[:, 1] / axes[:, 0]).mean() == pytest.approx(0.84, abs=0.03)
    assert (axes[:, 2] / axes[:, 1]).mean() == pytest.approx(0.84, abs=0.03)
    assert np.mean([t.density for t in tubers]) == pytest.approx(1.10, abs=0.003)
    assert simulate_tuber(rng(5)) == simulate_tuber(rng(5))


def test_a_resting_tuber_is_moved_rigidly_and_touches_the_belt():
    points, body = resting(ODD, rng()), tuber_surface(ODD)
    assert points[:, 2].max() == pytest.approx(BELT_DEPTH)
    chosen = slice(None, None, 97)
    between = np.linalg.norm(points[chosen, None] - points[None, chosen], axis=-1)
    np.testing.assert_allclose(between, np.linalg.norm(body[chosen, None] - body[None, chosen], axis=-1), atol=1e-9)


def test_the_camera_sees_the_near_side_only():
    body, points = tuber_surface(ELLIPSOID), resting(ELLIPSOID, rng(3))
    turn = np.linalg.lstsq(body - body.mean(0), points - points.mean(0))[0]
    normal = body / np.square(ELLIPSOID.axes) @ turn
    facing = -(normal * points).sum(1) / np.linalg.norm(normal, axis=1) / np.linalg.norm(points, axis=1)
    distance, seen = cKDTree(points).query(partial_view(ELLIPSOID, rng(3), noise=0.0))
    assert distance.max() < 1e-9
    assert (facing[seen] > 0).mean() > 0.97  # a ray that grazes the rim sees a little of what is behind
    assert np.isin(np.flatnonzero(facing > 0.75), seen).all()  # what is seen steeply is not lost
    assert len(partial_view(ELLIPSOID, rng(3), thickness=1e3)) == 4000


def test_finer_pixels_hide_less_of_a_slope_and_noise_lies_along_the_ray():
    counts = [len(partial_view(ELLIPSOID, rng(1), pixel)) for pixel in (2.0, 4.0, 8.0)]
    assert counts[0] > counts[1] > counts[2]
    clean, noisy = partial_view(ELLIPSOID, rng(1), noise=0.0), partial_view(ELLIPSOID, rng(1), noise=0.8)
    np.testing.assert_allclose(np.cross(clean, noisy), 0, atol=1e-8)
    assert (np.linalg.norm(noisy, axis=1) - np.linalg.norm(clean, axis=1)).std() == pytest.approx(0.8, abs=0.06)


@given(seeds, st.floats(-50, 50))
def test_height_is_that_of_the_top_and_moves_with_the_belt(seed, shift):
    points = partial_view(ELLIPSOID, rng(seed), noise=0.0)
    top = BELT_DEPTH - resting(ELLIPSOID, rng(seed))[:, 2].min()
    height = object_height(points, BELT_DEPTH)
    assert top - 1 < height <= top
    assert object_height(points, BELT_DEPTH + shift) == pytest.approx(np.clip(height + shift, 0, 80))


def test_height_is_clipped_and_not_set_by_one_outlier():
    points = np.column_stack([np.zeros((1000, 2)), np.full(1000, 350.0)])
    assert object_height(points, 420) == 70
    assert object_height(points, 340) == 0
    assert object_height(points, 420, max_height=60) == 60
    points[0, 2] = 300
    assert object_height(points, 420) == 70


def test_data_set_is_centred_grouped_by_tuber_and_repeatable():
    clouds = make_dataset(3, 2, 7)
    assert clouds.points.shape == (6, 128, 3)
    assert clouds.points.mean(1).abs().max() < 1e-3
    assert clouds.tuber.tolist() == [0, 0, 1, 1, 2, 2]
    assert clouds.weight[0] == clouds.weight[1] != clouds.weight[2]
    assert clouds.weight[0] == pytest.approx(simulate_tuber(rng(7)).weight)
    for first, second in zip(clouds, make_dataset(3, 2, 7), strict=True):
        assert torch.equal(first, second)
    reach = clouds.height - (clouds.points[..., 2].mean(1) - clouds.points[..., 2].amin(1))
    assert (reach > 0).all()  # the centre of what is seen lies above the belt


def test_box_of_a_rectangle_and_of_a_hull():
    corners = torch.tensor([[40.0, 25, 0], [-40, 25, 9], [40, -25, 3], [-40, -25, 0]], dtype=torch.float64)
    length, width = oriented_box((corners @ rotation(math.radians(34)).T)[None])
    assert (float(length), float(width)) == pytest.approx((80, 50))
    points = random_clouds(n=1, points=50)
    outline = points[0, :, :2].numpy()[ConvexHull(points[0, :, :2].numpy()).vertices]
    edges = np.roll(outline, -1, 0) - outline
    sides = edges / np.linalg.norm(edges, axis=1)[:, None]
    across = np.stack([-sides[:, 1], sides[:, 0]], 1)
    best = min(np.ptp(outline @ u) * np.ptp(outline @ v) for u, v in zip(sides, across, strict=True))
    length, width = oriented_box(points)
    assert best <= float(length * width) < 1.03 * best  # rotating calipers; ours tries a direction every two degrees
    assert length >= width


# --- sampling and neighbourhoods --------------------------------------------------------------------------------------


def test_sampling_and_balls_have_the_values_found_by_hand():
    chosen = farthest_point_sampling(FIVE, 3)
    assert chosen.tolist() == [[3, 2, 1]]
    assert ball_query(FIVE, FIVE[:, [3, 2]], 1.2, 3).tolist() == [[[3, 3, 3], [2, 2, 2]]]
    assert ball_query(FIVE, FIVE[:, [0]], 1.2, 3).tolist() == [[[0, 4, 1]]]


def test_every_centre_is_the_farthest_point():
    points = random_clouds(n=2, points=40)
    for cloud, chosen in zip(points.numpy(), farthest_point_sampling(points, 10).tolist(), strict=True):
        assert chosen[0] == np.linalg.norm(cloud - cloud.mean(0), axis=1).argmax()
        for k in range(1, 10):
            assert chosen[k] == cKDTree(cloud[chosen[:k]]).query(cloud)[0].argmax()


@given(seeds)
def test_chosen_points_do_not_depend_on_order_or_pose(seed):
    points = random_clouds(seed, n=1)
    order = torch.randperm(20, generator=generator(seed))
    first, second = farthest_point_sampling(points, 7)[0], farthest_point_sampling(points[:, order], 7)[0]
    assert torch.equal(points[0, first], points[0, order][second])
    moved = points @ rotation(seed % 7).T * torch.tensor([-1, 1, 1]) + 100
    assert torch.equal(farthest_point_sampling(moved, 7)[0], first)


@given(seeds, st.floats(5, 60), st.integers(1, 20))
def test_balls_agree_with_scipy(seed, radius, k):
    points = random_clouds(seed, n=1)
    centres = points[:, :4]
    tree = cKDTree(points[0].numpy())
    for centre, found in zip(centres[0].numpy(), ball_query(points, centres, radius, k)[0].tolist(), strict=True):
        inside = tree.query_ball_point(centre, radius)
        assert set(found) <= set(inside)
        assert len(set(found)) == min(k, len(inside))
        assert set(found) == set(np.atleast_1d(tree.query(centre, min(k, len(inside)))[1]).tolist())
        missing = k - len(set(found))
        assert found[len(found) - missing :] == [found[0]] * missing


# --- the network ------------------------------------------------------------------------------------------------------


def loop_over_edges(layer, points, features):
    """Equation (3), edge by edge."""
    chosen = farthest_point_sampling(points[None], layer.m)[0]
    rows = []
    for centre in points[chosen]:
        edges = [
            layer.h(torch.cat([feature, (point - centre) / 40]))
            for point, feature in zip(points, features, strict=True)
            if (point - centre).norm() <= layer.radius
        ]
        rows.append(torch.stack(edges).amax(0))
    return points[chosen], torch.stack(rows)


def test_set_abstraction_is_a_maximum_over_edges():
    points, features = random_clouds(n=2), torch.randn(2, 20, 4, generator=generator(1), dtype=torch.float64)
    layer = SetAbstraction(4, (8, 5), 6, 25.0, 20, generator=generator()).double()
    centres, outputs = layer(points, features)
    for k in range(2):
        expected = loop_over_edges(layer, points[k], features[k])
        torch.testing.assert_close((centres[k], outputs[k]), expected, atol=1e-12, rtol=0)


def test_pointraft_is_two_levels_a_global_one_and_a_head():
    """Equation (4), with both levels edge by edge and the centres' places in the global one."""
    sizes = Architecture(((6, 25.0, 20, (8, 8)), (3, 50.0, 6, (8, 8))), (8, 8), (8,), 4)
    network, height = PointRAFT(sizes=sizes, generator=generator()).double(), torch.tensor([30.0, 50]).double()
    points = random_clouds(n=2)
    for cloud, h, found in zip(points, height, network(points, height), strict=True):
        centres, features = cloud - cloud.mean(0), cloud[:, :0]
        for level in network.levels:
            centres, features = loop_over_edges(level, centres, features)
        rows = [network.top(torch.cat([f, c / 40])) for f, c in zip(features, centres, strict=True)]
        code = torch.cat([torch.stack(rows).amax(0), network.embed(h[None] / 80)])
        torch.testing.assert_close(found, 100 * network.head(code)[0])


def test_set_abstraction_agrees_with_pytorch_geometric():
    conv = pytest.importorskip("torch_geometric.nn").PointNetConv
    points, features = random_clouds(n=1)[0], torch.randn(20, 4, generator=generator(1), dtype=torch.float64)
    layer = SetAbstraction(4, (8, 5), 6, 25.0, 20, generator=generator()).double()
    twin = SetAbstraction(4, (8, 5), 6, 25.0, 20, generator=generator(1)).double()
    peer = conv(twin.h, add_self_loops=False)  # draws the weights of its network anew, so copy ours afterwards
    twin.h.load_state_dict(layer.h.state_dict())
    chosen = farthest_point_sampling(points[None], 6)[0]
    near = torch.cdist(points[chosen], points) <= 25
    target, source = near.nonzero().T
    scaled = points / 40
    theirs = peer((features, features[chosen]), (scaled, scaled[chosen]), torch.stack([source, target]))
    torch.testing.assert_close(layer(points[None], features[None])[1][0], theirs, atol=1e-12, rtol=0)


def test_numbers_of_weights():
    def count(*arguments):
        return sum(p.numel() for p in PointRAFT(*arguments, generator=generator()).parameters())

    assert count() == 31_409
    assert count(False) == 28_241
    assert count(True, PAPER) - count(False, PAPER) == 64 + 33 * 32 + 32 * 512
    assert SMALL.norm is False


@given(seeds)
def test_weight_depends_neither_on_order_nor_on_place(seed):
    points, height = random_clouds(seed), torch.tensor([30.0, 40, 50], dtype=torch.float64)
    network = PointRAFT(sizes=TINY, generator=generator()).double()
    expected = network(points, height)
    order = torch.randperm(20, generator=generator(seed))
    torch.testing.assert_close(network(points[:, order], height), expected)
    torch.testing.assert_close(network(points + torch.tensor([100, -30, 400]), height), expected)
    groups = neighbourhoods(network, points)
    known = [(centres.long(), near.long()) for centres, near in groups]
    torch.testing.assert_close(network(points, height, known), expected, atol=0, rtol=0)


def test_only_pointraft_sees_the_height():
    points, low, high = random_clouds(), torch.full((3,), 30.0).double(), torch.full((3,), 60.0).double()
    plain, raft = (PointRAFT(flag, TINY, generator=generator()).double() for flag in (False, True))
    assert torch.equal(plain(points, low), plain(points, high))
    assert (raft(points, low) - raft(points, high)).abs().min() > 1e-3


def test_batch_norm_and_dropout_act_in_training_only():
    network = PointRAFT(sizes=TINY._replace(norm=True, dropout=0.5), generator=generator()).double()
    points, height = random_clouds(), torch.full((3,), 30.0).double()
    network.train()
    torch.manual_seed(0)
    assert not torch.equal(network(points, height), network(points, height))
    network.eval()
    alone = torch.cat([network(points[k : k + 1], height[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(network(points, height), alone)
    layer = point_cloud_weight._BatchNorm(3).double()
    x = 5 + 3 * torch.randn(4, 6, 3, generator=generator(), dtype=torch.float64)
    np.testing.assert_allclose(layer(x).detach().mean((0, 1)), 0, atol=1e-12)
    np.testing.assert_allclose(layer(x).detach().std((0, 1), correction=0), 1, atol=1e-5)


# --- training ---------------------------------------------------------------------------------------------------------


def test_turning_is_rigid_about_the_vertical_and_leaves_neighbourhoods():
    points = random_clouds(n=40)
    before = points.clone()
    turned = _turned(points, generator())
    assert torch.equal(points, before)
    torch.testing.assert_close(turned[..., 2], points[..., 2])
    torch.testing.assert_close(torch.cdist(turned, turned), torch.cdist(points, points), atol=1e-4, rtol=0)
    maps = torch.linalg.lstsq(points, turned).solution
    handed = torch.linalg.det(maps)
    torch.testing.assert_close(handed.abs(), torch.ones_like(handed), atol=1e-5, rtol=0)
    assert 8 < int((handed < 0).sum()) < 32  # about half are mirrored
    angles = torch.atan2(maps[:, 0, 1], maps[:, 0, 0])
    assert angles.max() > 2
    assert angles.min() < -2


def tiny_data():
    return make_dataset(8, 2, 0, n_points=16)


def test_training_together_is_training_alone():
    clouds = tiny_data()
    options = dict(epochs=3, lr=1e-2, schedule=constant, batch_size=4)
    together = [PointRAFT(flag, TINY, generator=generator()) for flag in (True, False)]
    history = train(together, clouds, generator(1), **options)
    assert history["loss"].shape == (4, 2)
    assert not together[0].training
    for column, flag in enumerate((True, False)):
        alone = PointRAFT(flag, TINY, generator=generator())
        train([alone], clouds, generator(1), **options)
        torch.testing.assert_close(predict(alone, clouds), predict(together[column], clouds))


def test_a_network_learns_a_few_clouds_by_heart_and_the_loss_is_hubers():
    clouds = tiny_data()
    network = PointRAFT(sizes=TINY, generator=generator())
    error = (predict(network, clouds) - clouds.weight).abs() / 100
    history = train([network], clouds, generator(), epochs=150, lr=1e-2, schedule=constant, batch_size=16)
    assert (error > 0.2).all()
    assert history["loss"][0, 0] == pytest.approx(float((error - 0.1).mean()), rel=0.05)  # turned clouds, linear part
    assert (predict(network, clouds) - clouds.weight).abs().mean() < 25


def test_balanced_batches_show_rare_weights_as_often():
    clouds = tiny_data()
    same = clouds._replace(  # all look alike, so that the best prediction is the mean weight of what is shown
        points=clouds.points[:1].expand(16, -1, -1), weight=torch.tensor([140.0] * 15 + [160.0])
    )
    options = dict(epochs=200, lr=1e-2, schedule=lambda update, steps: OneCycleLR(update, 1e-2, total_steps=steps))
    for balanced, mean in ((False, 141.25), (True, 150)):
        network = PointRAFT(False, TINY, generator=generator())
        train([network], same, generator(), **options, batch_size=16, balanced=balanced)
        assert float(predict(network, same).mean()) == pytest.approx(mean, abs=3)


def test_the_schedule_is_told_the_number_of_steps():
    told = []

    def schedule(update, steps):
        told.append(steps)
        return constant(update, steps)

    network = PointRAFT(sizes=TINY, generator=generator())
    train([network], tiny_data(), generator(), epochs=2, lr=1e-3, schedule=schedule, batch_size=5)
    assert told == [6]


# --- the real data set ------------------------------------------------------------------------------------------------


def write_ply(path, points, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.zeros(len(points), [(axis, kind) for axis in "xyz"] + [("red", "u1")])
    for column, axis in enumerate("xyz"):
        rows[axis] = points[:, column]
    name = {"<f8": "double", "<f4": "float"}[kind]
    properties = "".join(f"property {name} {axis}\n" for axis in "xyz") + "property uchar red\n"
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
    path.write_bytes(header.encode() + rows.tobytes())


def test_the_real_clouds_are_read_as_the_paper_reads_them(tmp_path, monkeypatch):
    clouds = {"R1-1": (1500, 0.345), "R1-2": (600, 0.465), "R1-3": (1200, 0.345)}
    for kind, (label, (n, belt)) in zip(("<f8", "<f4", "<f8"), clouds.items(), strict=True):
        points = np.column_stack([rng(n).normal(size=(n, 2)) / 50, np.linspace(belt - 0.05, belt - 0.02, n)])
        write_ply(tmp_path / "3DPotatoTwin/1_rgbd/2_pcd" / label / "a.ply", points, kind)
    (tmp_path / "ground_truth.csv").write_text(
        "label,growing_season,weight_g_inctack\nR1-1,2023,84\nR1-2,2025,234\nR1-3,2023,154\n"
    )
    (tmp_path / "splits.csv").write_text("label,split\nR1-1,train\nR1-2,train\nR1-3,test\n")
    monkeypatch.setattr(point_cloud_weight, "get_data_home", lambda: tmp_path)
    monkeypatch.setattr(data, "download", lambda name, url, known_hash: tmp_path / url.split("/")[-1])
    found = potato_twin("train")
    assert found.points.shape == (2, 1024, 3)
    assert found.weight.tolist() == [84, 234]
    assert found.tuber.unique().numel() == 2
    torch.testing.assert_close(found.height, torch.full((2,), 50.0), atol=0.2, rtol=0)
    assert [len(cloud.unique(dim=0)) for cloud in found.points] == [1024, 600]
    assert potato_twin("test").weight.tolist() == [154]


def test_missing_clouds_name_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(point_cloud_weight, "get_data_home", lambda: tmp_path)
    with pytest.raises(data.DataUnavailable, match=r"3DPotatoTwin.*huggingface.*BOOK_PROFILE=book"):
        potato_twin("train")
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    assert isinstance(potato_twin("train"), Clouds)
    assert not torch.equal(potato_twin("train").weight, potato_twin("test").weight)


# --- what a reader can get wrong --------------------------------------------------------------------------------------

FLAT, CLOUD = torch.zeros(5, 3), torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: farthest_point_sampling(FLAT, 2), "points must be a batch of clouds (B, N, 3), got shape (5, 3)"),
        (lambda: farthest_point_sampling(CLOUD, 6), "m must be between 1 and the number of points, 5, got 6"),
        (lambda: farthest_point_sampling(CLOUD, 0), "m must be between 1 and the number of points, 5, got 0"),
        (lambda: ball_query(CLOUD, CLOUD, 0, 2), "radius must be positive, got 0"),
        (lambda: ball_query(CLOUD, CLOUD, 1, 6), "k must be between 1 and the number of points, 5, got 6"),
        (lambda: ball_query(CLOUD, CLOUD[:1], 1, 2), "centres must belong to the 2 clouds of points, got 1"),
        (lambda: ball_query(CLOUD, FLAT, 1, 2), "points must be a batch of clouds"),
        (lambda: oriented_box(FLAT), "points must be a batch of clouds"),
        (lambda: object_height(np.zeros((4, 2)), 400), "points must be a finite array (n, 3), got shape (4, 2)"),
        (lambda: object_height(np.full((4, 3), np.nan), 400), "points must be a finite array (n, 3)"),
        (lambda: object_height(np.zeros((4, 3)), 400, 0), "max_height must be positive, got 0"),
        (lambda: partial_view(ELLIPSOID, rng(), pixel=0), "pixel and thickness must be positive"),
        (lambda: partial_view(ELLIPSOID, rng(), noise=-1), "noise not negative"),
        (lambda: make_dataset(0, 1, 0), "n_tubers, n_views, n_points must be at least 1, got n_tubers=0"),
        (lambda: potato_twin("all"), "split must be one of train, val, test, got 'all'"),
        (
            lambda: PointRAFT(sizes=TINY, generator=generator())(CLOUD, torch.zeros(3)),
            "height must hold one number per",
        ),
        (lambda: train([], tiny_data(), generator(), epochs=1, lr=1, schedule=constant), "networks is empty"),
        (
            lambda: train([PointRAFT(generator=generator())], None, generator(), epochs=0, lr=1, schedule=constant),
            "epochs must be at least 1, got 0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
