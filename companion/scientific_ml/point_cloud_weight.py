"""Weight of a potato tuber from the part of its surface that a depth camera sees.

Blok, Wang, Suh, Wang, Burridge and Guo, "PointRAFT: 3D deep learning for high-throughput prediction of potato tuber
weight from partial point clouds", 2025 (arXiv 2512.24193).

A network of the PointNet++ family reads the centred cloud; PointRAFT tells it, beside the cloud, how high the object
stands above the belt. Lengths are in mm, weights in g, volumes in ml. Clouds are in the camera's frame: ``x``, ``y``
and the depth ``z`` along its axis, which points down to the belt.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.datasets import get_data_home
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from companion import data, models, runtime, training

BELT_DEPTH = 420.0  # of the simulated camera above its belt, mm
MAX_HEIGHT = 80.0  # mm
_TABLES = (
    "https://raw.githubusercontent.com/pieterblok/pointraft/f53930face88003af5861239fd56b59516562db6/data/3DPotatoTwin/"
)
_BELT_DEPTHS = {"2023": 345.0, "2024": 460.0, "2025": 465.0}  # by growing season, mm
LENGTH, WEIGHT = 40.0, 100.0  # units inside the networks, mm and g, in which all numbers are about one

# --- tubers and what a camera sees of them ----------------------------------------------------------------------------


class Tuber(NamedTuple):
    """A star-shaped body, bent: half-axes (mm), six coefficients of its radius, bend (no unit), density (g/ml)."""

    axes: tuple[float, float, float]
    modes: tuple[float, float, float, float, float, float] = (0.0,) * 6
    bend: float = 0.0
    density: float = 1.1

    @property
    def weight(self) -> float:
        """Weight in g."""
        return self.density * tuber_volume(self)


def sunflower(n: int = 4000) -> Float[np.ndarray, "n 3"]:
    """Unit vectors that cover the sphere evenly: equal steps in height, turned by the golden angle."""
    z = 1 - (2 * np.arange(n) + 1) / n
    angle = math.pi * (3 - math.sqrt(5)) * np.arange(n)
    return np.stack([np.sqrt(1 - z**2) * np.cos(angle), np.sqrt(1 - z**2) * np.sin(angle), z], 1)


_DIRECTIONS = sunflower()


def _radius(modes: Sequence[float]) -> Float[np.ndarray, " n"]:
    """Radius of the unbent body over the sphere, before its axes are stretched."""
    x, y, z = _DIRECTIONS.T
    shapes = [x, 2 * (x**2 - 1 / 3), 2 * x * y, 2 * x * z, y**2 - z**2, x * (5 * x**2 - 3) / 2]
    return 1 + np.dot(modes, shapes)


def tuber_surface(tuber: Tuber) -> Float[np.ndarray, "n 3"]:
    r"""Points of the surface: :math:`\rho(u)\,(a u_x, b u_y, c u_z)`, bent by :math:`y \mathrel{+}= \beta x^2/a`."""
    points = _radius(tuber.modes)[:, None] * _DIRECTIONS * tuber.axes
    points[:, 1] += tuber.bend * points[:, 0] ** 2 / tuber.axes[0]
    return points


def tuber_volume(tuber: Tuber) -> float:
    r"""Volume in ml: :math:`\frac43\pi abc` times the mean of :math:`\rho^3` over the sphere; a bend is a shear."""
    return 4 / 3 * math.pi * math.prod(tuber.axes) * float((_radius(tuber.modes) ** 3).mean()) / 1000


def simulate_tuber(rng: np.random.Generator) -> Tuber:
    """A random tuber between 36 and 494 g, with the sizes and proportions of the paper's public subset.

    Anything lighter or heavier is drawn again: one giant would decide a root mean square error.
    """
    while True:
        length = np.clip(rng.normal(76, 16), 42, 135)
        width = length * np.clip(rng.normal(0.84, 0.11), 0.5, 1.05)
        depth = width * np.clip(rng.normal(0.84, 0.09), 0.55, 1.05)
        modes, bend, density = rng.normal(0, 0.1, 6), rng.normal(0, 0.3), rng.normal(1.10, 0.012)
        tuber = Tuber((length / 2, width / 2, depth / 2), tuple(modes), bend, density)
        if 36 <= tuber.weight <= 494:
            return tuber


def resting(tuber: Tuber, rng: np.random.Generator) -> Float[np.ndarray, "n 3"]:
    """The surface of a tuber that lies on the belt somewhere below the camera, in the camera's frame.

    It is rolled about its long axis (sd 0.6 rad), turned on the belt by any angle, and shifted by up to 110 mm.
    """
    roll, yaw, shift = rng.normal(0, 0.6), rng.uniform(0, 2 * math.pi), rng.uniform(-110, 110, 2)
    x, y, z = tuber_surface(tuber).T
    y, z = math.cos(roll) * y - math.sin(roll) * z, math.sin(roll) * y + math.cos(roll) * z
    x, y = math.cos(yaw) * x - math.sin(yaw) * y, math.sin(yaw) * x + math.cos(yaw) * y
    return np.stack([x + shift[0], y + shift[1], BELT_DEPTH - (z - z.min())], 1)


def partial_view(
    tuber: Tuber, rng: np.random.Generator, pixel: float = 4.0, thickness: float = 3.0, noise: float = 0.8
) -> Float[np.ndarray, "n 3"]:
    """What a pinhole camera above the belt sees of a tuber at rest.

    Along the rays of one pixel only the points nearest to the camera are kept. Where the surface is seen at a grazing
    angle a pixel covers a range of depths and loses some, as depth cameras do.

    Parameters
    ----------
    tuber, rng
        The body, and the source of its pose (drawn first, by :func:`resting`) and of the noise.
    pixel
        Side of a pixel on the belt, mm.
    thickness
        How far behind the nearest point of its pixel a point may lie, mm.
    noise
        Standard deviation of the distance along a ray, mm.

    Raises
    ------
    ValueError
        If ``pixel`` or ``thickness`` is not positive, or ``noise`` is negative.
    """
    if not (pixel > 0 and thickness > 0 and noise >= 0):
        raise ValueError(
            f"pixel and thickness must be positive and noise not negative, got {pixel=}, {thickness=}, {noise=}"
        )
    points = resting(tuber, rng)
    column, row = np.floor(points[:, :2] / points[:, 2:] * BELT_DEPTH / pixel).astype(int).T
    _, ray = np.unique((column - column.min()) * (np.ptp(row) + 1) + row - row.min(), return_inverse=True)
    distance = np.linalg.norm(points, axis=1)
    nearest = np.full(ray.max() + 1, np.inf)
    np.minimum.at(nearest, ray, distance)
    seen = distance <= nearest[ray] + thickness
    return points[seen] * (1 + rng.normal(0, noise, seen.sum()) / distance[seen])[:, None]


def object_height(points: Float[np.ndarray, "n 3"], belt_depth: float, max_height: float = MAX_HEIGHT) -> float:
    r"""Height above the belt: :math:`H=\min\{\max(z_{belt}-z_{min},0),H_{max}\}`.

    The top, :math:`z_{min}`, is the 0.5% quantile of the depths: of many noisy points the very nearest is too near.
    (The paper's code takes the minimum.)

    Parameters
    ----------
    points
        A cloud in the camera's frame, not centred, mm.
    belt_depth, max_height
        Depth of the belt and largest height, mm.

    Raises
    ------
    ValueError
        If ``points`` are no finite (n, 3) array, or ``max_height`` is not positive.
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"points must be a finite array (n, 3), got shape {points.shape}")
    if not max_height > 0:
        raise ValueError(f"max_height must be positive, got {max_height}")
    return float(np.clip(belt_depth - np.quantile(points[:, 2], 0.005), 0, max_height))


class Clouds(NamedTuple):
    """Partial clouds (centred, mm) with the object's height (mm), its weight (g), and which tuber it is."""

    points: Float[Tensor, "B N 3"]
    height: Float[Tensor, " B"]
    weight: Float[Tensor, " B"]
    tuber: Int[Tensor, " B"]

    def to(self, device: torch.device) -> Clouds:
        """The clouds on another device."""
        return Clouds(*(entry.to(device) for entry in self))


def _collect(rows: Sequence[tuple[Float[np.ndarray, "N 3"], float, float, int]]) -> Clouds:
    points, height, weight, tuber = zip(*rows, strict=True)
    cloud = torch.from_numpy(np.stack(points)).float()
    centred = cloud - cloud.mean(1, keepdim=True)
    return Clouds(centred, torch.tensor(height).float(), torch.tensor(weight).float(), torch.tensor(tuber))


def make_dataset(n_tubers: int, n_views: int, seed: int, n_points: int = 128) -> Clouds:
    """Simulated clouds, the views of one tuber after each other, each thinned to ``n_points`` at random.

    The depth of the belt is known with an error of 1 mm (sd), so that heights are, too.

    Raises
    ------
    ValueError
        If a number is smaller than 1.
    """
    if min(n_tubers, n_views, n_points) < 1:
        raise ValueError(f"n_tubers, n_views, n_points must be at least 1, got {n_tubers=}, {n_views=}, {n_points=}")
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n_tubers):
        tuber = simulate_tuber(rng)
        for _ in range(n_views):
            points = partial_view(tuber, rng)
            height = object_height(points, BELT_DEPTH + rng.normal(0, 1))
            rows.append((rng.choice(points, n_points, replace=False), height, tuber.weight, number))
    return _collect(rows)


def oriented_box(points: Float[Tensor, "B N 3"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Length and width (mm) of the smallest upright box around each cloud, over 90 directions on the belt.

    Raises
    ------
    ValueError
        If ``points`` is no batch of clouds (B, N, 3).
    """
    _check_clouds(points)
    angle = torch.arange(45, device=points.device) * (math.pi / 90)
    turned = points[..., :2] @ torch.stack(
        [torch.cat([angle.cos(), -angle.sin()]), torch.cat([angle.sin(), angle.cos()])]
    ).to(points)
    first, second = (turned.amax(1) - turned.amin(1)).chunk(2, -1)  # extents along and across each direction
    best = (first * second).argmin(1, keepdim=True)
    sides = torch.cat([first.gather(1, best), second.gather(1, best)], 1)
    return sides.amax(1), sides.amin(1)


_PLY = {"double": "<f8", "float": "<f4", "uchar": "u1"}


def _read_ply(path: Path) -> Float[np.ndarray, "n 3"]:
    """Coordinates of the points in a binary PLY file that holds nothing but points."""
    with path.open("rb") as file:
        header = []
        while not header or header[-1] != ["end_header"]:
            header.append(file.readline().decode("ascii").split())
        kinds = [(words[2], _PLY[words[1]]) for words in header if words[0] == "property"]
        count = next(int(words[2]) for words in header if words[:2] == ["element", "vertex"])
        vertices = np.fromfile(file, np.dtype(kinds), count)
    return np.stack([vertices[axis] for axis in "xyz"], 1).astype(float)


def potato_twin(split: Literal["train", "val", "test"]) -> Clouds:
    """The paper's public subset, 3DPotatoTwin, each cloud thinned to 1024 points by farthest point sampling.

    The clouds are behind a form on Hugging Face and must have been unpacked into ``3DPotatoTwin`` in the folder
    ``SCIKIT_LEARN_DATA``; weights and splits come from the paper's repository. A cloud with fewer points repeats some.
    In the ``smoke`` profile simulated clouds stand in.

    Raises
    ------
    ValueError
        If the split is unknown.
    DataUnavailable
        If the clouds are not there, or the tables cannot be had.
    """
    if split not in (splits := ("train", "val", "test")):
        raise ValueError(f"split must be one of {', '.join(splits)}, got {split!r}")
    if runtime.profile() == "smoke":
        return make_dataset(16, 2, splits.index(split))
    folder = Path(get_data_home(), "3DPotatoTwin")
    files = sorted(folder.glob("1_rgbd/2_pcd/*/*.ply"))
    if not files:
        raise data.DataUnavailable(
            f"the clouds of 3DPotatoTwin are not in {folder}. Accept the conditions at "
            "https://huggingface.co/datasets/UTokyo-FieldPhenomics-Lab/3DPotatoTwin and unpack 1_rgbd/2_pcd into that "
            "folder, or set BOOK_PROFILE=book, which needs no download."
        )
    truth, parts = (
        {
            row["label"]: row
            for row in csv.DictReader(data.download("3DPotatoTwin", _TABLES + name, None).read_text().splitlines())
        }
        for name in ("ground_truth.csv", "splits.csv")
    )
    rows, labels = [], sorted(parts)
    for path in tqdm(files, leave=False):
        label = path.parent.name
        if label in truth and parts.get(label, {}).get("split") == split:
            points = 1000 * _read_ply(path)
            height = object_height(points, _BELT_DEPTHS[truth[label]["growing_season"]])
            cloud = torch.from_numpy(points)[None].to(runtime.device())
            chosen = farthest_point_sampling(cloud, min(1024, len(points)))[0].cpu().numpy()
            rows.append(
                (points[np.resize(chosen, 1024)], height, float(truth[label]["weight_g_inctack"]), labels.index(label))
            )
    return _collect(rows)


# --- the network ------------------------------------------------------------------------------------------------------


def _check_clouds(points: Tensor) -> None:
    """Raise unless this is a batch of clouds."""
    if points.ndim != 3 or points.shape[-1] != 3 or 0 in points.shape:
        raise ValueError(f"points must be a batch of clouds (B, N, 3), got shape {tuple(points.shape)}")


def _pick(values: Float[Tensor, "B N c"], index: Int[Tensor, "B *m"]) -> Float[Tensor, "B *m c"]:
    """The rows of every cloud that its indices name."""
    flat = index.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).view(*index.shape, -1)


def farthest_point_sampling(points: Float[Tensor, "B N 3"], m: int) -> Int[Tensor, "B m"]:
    """Indices of ``m`` points of each cloud, every one as far as possible from those chosen before.

    The first is the point farthest from the centroid, so that which *points* are chosen depends neither on their order
    nor on the pose of the cloud.

    Raises
    ------
    ValueError
        If ``points`` is no batch of clouds, or ``m`` is not between 1 and N.

    Notes
    -----
    Source: Qi et al., PointNet++, 2017, Section 3.2; the deterministic start is ours.
    """
    _check_clouds(points)
    if not 1 <= m <= points.shape[1]:
        raise ValueError(f"m must be between 1 and the number of points, {points.shape[1]}, got {m}")
    cloud = torch.arange(len(points), device=points.device)
    chosen = [(points - points.mean(1, keepdim=True)).square().sum(-1).argmax(1)]
    distance = points.new_full(points.shape[:2], torch.inf)
    for _ in range(m - 1):
        distance = torch.minimum(distance, (points - points[cloud, chosen[-1]][:, None]).square().sum(-1))
        chosen.append(distance.argmax(1))
    return torch.stack(chosen, 1)


def ball_query(
    points: Float[Tensor, "B N 3"], centres: Float[Tensor, "B m 3"], radius: float, k: int
) -> Int[Tensor, "B m k"]:
    """Indices of the at most ``k`` nearest points within ``radius`` of each centre, nearest first.

    Missing neighbours are filled with the nearest point, which is the centre itself where the centres are points: for
    a maximum over neighbours that changes nothing.

    Raises
    ------
    ValueError
        If ``points`` or ``centres`` are no batches of as many clouds, ``radius`` is not positive, or ``k`` is not
        between 1 and N.
    """
    _check_clouds(points)
    _check_clouds(centres)
    if len(points) != len(centres):
        raise ValueError(f"centres must belong to the {len(points)} clouds of points, got {len(centres)}")
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
    if not 1 <= k <= points.shape[1]:
        raise ValueError(f"k must be between 1 and the number of points, {points.shape[1]}, got {k}")
    distance = torch.cdist(centres, points, compute_mode="donot_use_mm_for_euclid_dist")
    near, index = distance.topk(k, largest=False)
    return torch.where(near <= radius, index, index[..., :1])


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last axis."""

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        return super().forward(x.flatten(0, -2)).view_as(x)


def _mlp(sizes: Sequence[int], generator: torch.Generator, norm: bool) -> nn.Sequential:
    """A fully connected network over the last axis, with batch normalisation before each ReLU if asked for."""
    widths = iter(sizes[1:])
    activation = (lambda: nn.Sequential(_BatchNorm(next(widths)), nn.ReLU())) if norm else nn.ReLU
    return models.mlp(sizes, generator=generator, activation=activation)


class SetAbstraction(nn.Module):
    r"""From features of points to features of fewer centres: :math:`f'_j=\max_{i\in N(j)}h([f_i,\;x_i-c_j])`.

    Parameters
    ----------
    in_channels
        Features of each point beside its coordinates; 0 for bare points.
    widths
        Of the layers of ``h``; the last is the number of features of a centre.
    m, radius, k
        Number of centres, and radius (mm) and size of their neighbourhoods.
    generator
        Source of the initial weights.
    norm
        Whether ``h`` normalises over the batch.

    Notes
    -----
    Source: Qi et al., PointNet++, 2017, Section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        m: int,
        radius: float,
        k: int,
        *,
        generator: torch.Generator,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.m, self.radius, self.k = m, radius, k
        self.h = _mlp([in_channels + 3, *widths], generator, norm)

    def group(self, points: Float[Tensor, "B N 3"]) -> tuple[Int[Tensor, "B m"], Int[Tensor, "B m k"]]:
        """Which points are the centres, and which are the neighbours of each; a rigid motion changes neither."""
        centres = farthest_point_sampling(points, self.m)
        return centres, ball_query(points, _pick(points, centres), self.radius, self.k)

    def forward(
        self,
        points: Float[Tensor, "B N 3"],
        features: Float[Tensor, "B N c"] | None = None,
        groups: tuple[Int[Tensor, "B m"], Int[Tensor, "B m k"]] | None = None,
    ) -> tuple[Float[Tensor, "B m 3"], Float[Tensor, "B m c2"]]:
        """Centres and their features; ``groups``, if known already, saves the search."""
        chosen, neighbours = self.group(points) if groups is None else groups
        centres = _pick(points, chosen)
        x = (_pick(points, neighbours) - centres[:, :, None]) / LENGTH
        if features is not None:
            x = torch.cat([_pick(features, neighbours), x], -1)
        return centres, self.h(x).max(2).values


class Architecture(NamedTuple):
    """Sizes of the network.

    Attributes
    ----------
    levels
        Of each set abstraction: centres, radius (mm), neighbours, widths.
    top, head
        Hidden and last widths of the global level, hidden widths of the head.
    embedding
        Width of both layers of the height embedding.
    dropout, norm
        Rate of dropout in the head, and whether the point networks use batch normalisation.
    """

    levels: tuple[tuple[int, float, int, tuple[int, ...]], ...] = (
        (32, 25.0, 16, (16, 16, 32)),
        (8, 50.0, 8, (32, 32, 64)),
    )
    top: tuple[int, ...] = (64, 128)
    head: tuple[int, ...] = (64, 32)
    embedding: int = 32
    dropout: float = 0.0
    norm: bool = False


SMALL = Architecture()
# The network of the paper's code, for 1024 points. Its radii are larger than any tuber: the 64 nearest points remain.
PAPER = Architecture(
    levels=((512, 200.0, 64, (64, 64, 128)), (128, 400.0, 64, (128, 128, 256))),
    top=(256, 512, 1024),
    head=(512, 256),
    dropout=0.5,
    norm=True,
)


class PointRAFT(nn.Module):
    """Weight from a partial cloud and the object's height; without the height embedding, plain PointNet++.

    Parameters
    ----------
    height_embedding
        Whether the height enters.
    sizes
        Number and widths of the layers.
    generator
        Source of the initial weights.

    Notes
    -----
    Source: the paper's published code; the sizes :data:`SMALL` are ours, and :data:`PAPER` holds the original ones.
    """

    def __init__(
        self,
        height_embedding: bool = True,
        sizes: Architecture = SMALL,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        channels = [0, *(widths[-1] for *_, widths in sizes.levels)]
        self.levels = nn.ModuleList(
            SetAbstraction(n_in, widths, m, radius, k, generator=generator, norm=sizes.norm)
            for n_in, (m, radius, k, widths) in zip(channels, sizes.levels, strict=False)
        )
        self.top = _mlp([channels[-1] + 3, *sizes.top], generator, sizes.norm)
        self.embed = models.mlp([1, *[sizes.embedding] * 2], generator=generator) if height_embedding else None
        self.head = models.mlp(
            [sizes.top[-1] + sizes.embedding * height_embedding, *sizes.head, 1],
            generator=generator,
            activation=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(sizes.dropout)),
        )

    def group(self, points: Float[Tensor, "B N 3"]) -> list[tuple[Int[Tensor, "B m"], Int[Tensor, "B m k"]]]:
        """Centres and neighbours at every level."""
        groups = []
        for level in self.levels:
            groups.append(level.group(points))
            points = _pick(points, groups[-1][0])
        return groups

    def forward(
        self,
        points: Float[Tensor, "B N 3"],
        height: Float[Tensor, " B"],
        groups: Sequence[tuple[Int[Tensor, "B m"], Int[Tensor, "B m k"]]] | None = None,
    ) -> Float[Tensor, " B"]:
        """Weight in g, from points in mm, which are centred first, and heights in mm.

        Raises
        ------
        ValueError
            If ``points`` is no batch of clouds, or ``height`` does not hold one number for each.
        """
        _check_clouds(points)
        if height.shape != points.shape[:1]:
            raise ValueError(f"height must hold one number per cloud, {len(points)}, got shape {tuple(height.shape)}")
        centres, features = points - points.mean(1, keepdim=True), None
        for number, level in enumerate(self.levels):
            centres, features = level(centres, features, groups[number] if groups else None)
        g = self.top(torch.cat([features, centres / LENGTH], -1)).max(1).values
        if self.embed is not None:
            g = torch.cat([g, self.embed(height[:, None] / MAX_HEIGHT)], 1)
        return WEIGHT * self.head(g).squeeze(1)


# --- training and prediction ------------------------------------------------------------------------------------------


def _turned(points: Float[Tensor, "B N 3"], generator: torch.Generator) -> Float[Tensor, "B N 3"]:
    """Every cloud turned about the vertical by a random angle, and mirrored or not: neither changes a weight."""
    angle = 2 * math.pi * torch.rand(len(points), generator=generator)
    sign = torch.randint(2, (len(points),), generator=generator) * 2 - 1
    turn = torch.eye(3).repeat(len(points), 1, 1)
    turn[:, 0, 0], turn[:, 1, 0] = sign * angle.cos(), -sign * angle.sin()
    turn[:, 0, 1], turn[:, 1, 1] = angle.sin(), angle.cos()
    return points @ turn.to(points)


def train(
    networks: Sequence[PointRAFT],
    clouds: Clouds,
    generator: torch.Generator,
    *,
    epochs: int,
    lr: float,
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler],
    batch_size: int = 32,
    balanced: bool = False,
) -> training.History:
    """Train networks of the same levels side by side, on the same batches of turned and mirrored clouds.

    The loss is Huber's with its corner at 20 g; the optimiser is Adam with weight decay 1e-4.

    Parameters
    ----------
    networks
        Trained in place, and left in evaluation mode.
    clouds
        Training data.
    generator
        Draws batches and turns.
    epochs, lr, schedule, batch_size
        Of the optimisation; ``schedule`` is called with the optimiser and the number of steps, after each of which it
        moves on.
    balanced
        Whether batches are drawn so that all weight classes, 50 g wide, are equally frequent.

    Returns
    -------
    History
        As of :func:`companion.training.fit`: ``"loss"`` has one column per network.

    Raises
    ------
    ValueError
        If there is no network, or a number is out of range.
    """
    if not networks:
        raise ValueError("networks is empty; give at least one")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    groups = neighbourhoods(networks[0], clouds.points)
    steps = len(clouds.points) // batch_size
    batches = training.minibatches(len(clouds.points), batch_size, generator)
    _, label, count = (clouds.weight.cpu() / 50).floor().unique(return_inverse=True, return_counts=True)

    def loss(_: int) -> Float[Tensor, " networks"]:
        rows = torch.multinomial(1 / count[label], batch_size, True, generator=generator) if balanced else next(batches)
        rows = rows.to(clouds.points.device)
        points = _turned(clouds.points[rows], generator)
        near = [(centres[rows].long(), neighbours[rows].long()) for centres, neighbours in groups]
        y = clouds.weight[rows] / WEIGHT
        outputs = [network(points, clouds.height[rows], near) / WEIGHT for network in networks]
        return torch.stack([smooth_l1_loss(output, y, beta=20 / WEIGHT) for output in outputs])

    for network in networks:
        network.train()
    history = training.fit(
        loss,
        [parameter for network in networks for parameter in network.parameters()],
        steps=epochs * steps,
        lr=lr,
        optimizer=lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, weight_decay=1e-4, fused=True),
        schedule=lambda update: schedule(update, epochs * steps),
        record_every=steps,
    )
    for network in networks:
        network.eval()
    return history


@torch.no_grad()
def neighbourhoods(
    network: PointRAFT, points: Float[Tensor, "B N 3"]
) -> list[tuple[Int[Tensor, "B m"], Int[Tensor, "B m k"]]]:
    """Centres and neighbours of many clouds, in pieces that fit into memory and as 16-bit integers."""
    pieces = [network.group(piece) for piece in points.split(256)]
    return [
        tuple(torch.cat(parts).short() for parts in zip(*level, strict=True)) for level in zip(*pieces, strict=True)
    ]


@torch.no_grad()
def predict(network: PointRAFT, clouds: Clouds) -> Float[Tensor, " B"]:
    """Weights in g, in pieces that fit into memory."""
    pieces = zip(clouds.points.split(256), clouds.height.split(256), strict=True)
    return torch.cat([network(points, height) for points, height in pieces])
