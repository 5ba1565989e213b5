"""Cross networks for click-through rates: FCN, its Self-Mask and Tri-BCE, and what its weights say about interactions.

Li, Zhang, Zhang, Li, Sang and Zhu, "FCN: Fusing Exponential and Linear Cross Network for Click-Through Rate
Prediction", 2024 (arXiv 2407.13349); details after the authors' code, salmon1802/FCN.

A row holds one category for each of ``F`` fields. Its embedding ``x_0`` of size ``d = F k`` lists the first halves of
all fields' embeddings and then the second halves. Predictions are logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from zipfile import ZipFile

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from companion import data, runtime, training

Rows = Int[Tensor, "n F"]
PLANTED = [*combinations(range(4), 2), (4, 5)]  # pairs of fields that interact in click_data
KINDS = ("linear", "exponential")


def click_data(
    n: int, seed: int, fields: int = 8, cardinality: int = 6
) -> tuple[Rows, Float[Tensor, " n"], Float[Tensor, " n"]]:
    r"""A click log whose interactions are known: categories, clicks and the logit that the clicks are drawn from.

    Categories are uniform. :math:`S_f` is the level of the category in field f, from a table that is the same for all
    seeds: a permutation of equally spaced levels from -0.6 to 1.8. The logit is
    :math:`-1.2+S_0S_1S_2S_3+1.2(S_4-0.6)(S_5-0.6)+0.5(S_6-0.6)`; all other fields are noise.

    Raises
    ------
    ValueError
        If ``n`` is smaller than 1, ``fields`` than 7, or ``cardinality`` than 2.
    """
    if n < 1 or fields < 7 or cardinality < 2:
        raise ValueError(f"n, fields, cardinality must be at least 1, 7 and 2, got {n=}, {fields=}, {cardinality=}")
    tables, rng = np.random.default_rng(12345), np.random.default_rng(seed)
    levels = np.array([tables.permutation(np.linspace(-0.6, 1.8, cardinality)) for _ in range(fields)])
    X = rng.integers(cardinality, size=(n, fields))
    S = levels[range(fields), X]
    logit = -1.2 + S[:, :4].prod(1) + 1.2 * (S[:, 4] - 0.6) * (S[:, 5] - 0.6) + 0.5 * (S[:, 6] - 0.6)
    y = rng.random(n) < 1 / (1 + np.exp(-logit))
    return torch.from_numpy(X), torch.from_numpy(y).float(), torch.from_numpy(logit).float()


def movielens(seed: int) -> tuple[Rows, Float[Tensor, " n"], list[int]]:
    """MovieLens-1M as a click log, in random order: categories, clicks, and the number of categories of each field.

    Ratings of 4 and 5 count as clicks, those of 1 and 2 do not, those of 3 are left out. The fields are user, gender,
    age, occupation, zip code, movie and its list of genres. In the ``smoke`` profile nothing is downloaded:
    :func:`click_data` stands in.

    Raises
    ------
    DataUnavailable
        If the archive cannot be had.
    """
    if runtime.profile() == "smoke":
        X, y, _ = click_data(640, seed)
        return X, y, [6] * X.shape[1]
    url = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
    with ZipFile(data.download("MovieLens-1M", url, "md5:c4d9eecfca2ab87c1945afe126590906")) as archive:
        users, movies, ratings = (
            np.array([line.split("::") for line in archive.read(f"ml-1m/{name}.dat").decode("latin1").splitlines()])
            for name in ("users", "movies", "ratings")
        )
    user, movie = ({row[0]: row for row in table} for table in (users, movies))
    score = ratings[:, 2].astype(int)
    kept = np.random.default_rng(seed).permutation(np.flatnonzero(score != 3))
    rows = np.array([[*user[u], m, movie[m][2]] for u, m in ratings[kept, :2]])
    X = np.stack([np.unique(column, return_inverse=True)[1] for column in rows.T], 1)
    return torch.from_numpy(X), torch.from_numpy(score[kept] > 3).float(), (X.max(0) + 1).tolist()


def self_mask(c: Float[Tensor, "*n h"], layer_norm: Callable[[Tensor], Tensor]) -> Float[Tensor, "*n h"]:
    """Self-Mask: what LayerNorm puts below zero is removed, the rest scaled, ``c * max(0, LN(c))``.

    Raises
    ------
    ValueError
        If ``layer_norm`` changes the shape of ``c``.
    """
    gate = torch.relu(layer_norm(c))
    if gate.shape != c.shape:
        raise ValueError(f"layer_norm must keep the shape of c, {tuple(c.shape)}, got {tuple(gate.shape)}")
    return c * gate


def _xavier(rows: int, columns: int, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, generator=generator) * (2 / (rows + columns)) ** 0.5)


class CrossNetwork(nn.Module):
    r"""LCN, :math:`x_{l+1}=x_0\odot(h_l+b_l)+x_l`, or ECN, :math:`x_{l+1}=x_l\odot(h_l+b_l)+x_l`.

    Parameters
    ----------
    d
        Size of the input.
    layers
        Number of cross layers L.
    kind
        ``"linear"`` (LCN) or ``"exponential"`` (ECN).
    mask
        :math:`h=[c,\mathrm{Mask}(c)]` with c = W x of size d/2 if True, :math:`h=[c,c]` if False.
    full
        True for the layer of DCNv2, :math:`h=Wx` with a square matrix; ``mask`` then plays no role.
    generator
        Source of the initial weights (Xavier normal) and biases (uniform on [0, 1]).

    Raises
    ------
    ValueError
        If ``kind`` is unknown, ``d`` or ``layers`` is not positive, or ``d`` is odd without ``full``.
    """

    def __init__(
        self,
        d: int,
        layers: int,
        kind: str = "linear",
        mask: bool = True,
        full: bool = False,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if d < 1 or layers < 1 or (d % 2 and not full):
            raise ValueError(f"d and layers must be positive, and d even unless full, got {d=}, {layers=}")
        self.kind, width = kind, d if full else d // 2
        self.weights = nn.ParameterList([_xavier(width, d, generator) for _ in range(layers)])
        self.biases = nn.ParameterList([torch.rand(d, generator=generator) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(layers if mask and not full else 0)])
        self.head, self.offset = _xavier(1, d, generator), nn.Parameter(torch.zeros(1))

    def crosses(self, c: Float[Tensor, "*n h"], layer: int) -> Float[Tensor, "*n d"]:
        """h: both halves of the vector that a layer multiplies with."""
        if c.shape[-1] == self.biases[layer].shape[0]:  # DCNv2: there are no halves
            return c
        return torch.cat([c, self_mask(c, self.norms[layer]) if self.norms else c], -1)

    def states(self, x: Float[Tensor, "*n d"]) -> list[Float[Tensor, "*n d"]]:
        """x_0, ..., x_L."""
        states = [x]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            base = states[0] if self.kind == "linear" else states[-1]
            states.append(base * (self.crosses(states[-1] @ weight.mT, layer) + bias) + states[-1])
        return states

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """Logits."""
        if x.shape[-1] != self.head.shape[1]:
            raise ValueError(f"x must have {self.head.shape[1]} features, got shape {tuple(x.shape)}")
        return (self.states(x)[-1] @ self.head.mT + self.offset).squeeze(-1)


class LogitSum(nn.Module):
    """The sum of several networks' logits: with one MLP a DNN, with a cross network and an MLP a DCNv2."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Logits."""
        return sum(network(x).reshape(len(x)) for network in self.networks)


class Fusion(nn.Module):
    r"""Both cross networks on one input, and the mean of their logits: :math:`z=\frac12(z_D+z_S)`, z_D, z_S."""

    def __init__(self, d: int, layers: int, mask: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.exponential = (CrossNetwork(d, layers, kind, mask, generator=generator) for kind in KINDS)

    def forward(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the fused, the exponential (deep) and the linear (shallow) network."""
        deep, shallow = self.exponential(x), self.linear(x)
        return (deep + shallow) / 2, deep, shallow


def _check_fields(cardinalities: Sequence[int], embedding: int) -> None:
    if not len(cardinalities) or min(cardinalities) < 1:
        raise ValueError(f"cardinalities must hold a positive number for every field, got {list(cardinalities)}")
    if embedding < 2 or embedding % 2:
        raise ValueError(f"embedding must be even and positive, got {embedding}")


class ClickModel(nn.Module):
    """Embeddings of all fields, and any network of interactions on top.

    Parameters
    ----------
    cardinalities
        Number of categories of every field.
    embedding
        Size k of an embedding, even.
    interactions
        Maps the embedded rows, of size ``len(cardinalities) * embedding``, to logits.
    generator
        Source of the initial embeddings, of standard deviation 0.1.

    Raises
    ------
    ValueError
        If ``cardinalities`` is empty or not positive, or ``embedding`` is odd or not positive.
    """

    def __init__(
        self, cardinalities: Sequence[int], embedding: int, interactions: nn.Module, generator: torch.Generator
    ) -> None:
        super().__init__()
        _check_fields(cardinalities, embedding)
        self.cardinalities = list(cardinalities)
        self.table = nn.Parameter(0.1 * torch.randn(sum(cardinalities), embedding, generator=generator))
        self.interactions = interactions

    def entries(self, X: Rows) -> Rows:
        """Rows of the table that belong to the categories."""
        sizes = torch.tensor(self.cardinalities, device=X.device)
        if X.is_floating_point() or X.shape[-1:] != sizes.shape or not ((X >= 0) & (sizes > X)).all():
            raise ValueError(
                f"X must hold categories 0, ... below {self.cardinalities}, one column for each field, "
                f"got {X.dtype} of shape {tuple(X.shape)}"
            )
        return X + sizes.cumsum(0) - sizes

    def embed(self, X: Rows) -> Float[Tensor, "n d"]:
        """x_0, in the layout of half-splits; ValueError if a category does not exist."""
        return half_split(F.embedding(self.entries(X), self.table))

    def forward(self, X: Rows) -> Tensor | tuple[Tensor, ...]:
        """What the network of interactions says; ValueError if a category does not exist."""
        return self.interactions(self.embed(X))


def half_split(e: Float[Tensor, "*n F k"]) -> Float[Tensor, "*n d"]:
    """The first halves of all fields' embeddings, then the second halves."""
    return e.unflatten(-1, (2, -1)).transpose(-3, -2).flatten(-3)


class FusedCrossNetwork(ClickModel):
    """FCN: embeddings, LCN and ECN; its output is ``(z, z_deep, z_shallow)``. Parameters as of the parts."""

    def __init__(
        self,
        cardinalities: Sequence[int],
        embedding: int = 8,
        layers: int = 2,
        mask: bool = True,
        *,
        generator: torch.Generator,
    ) -> None:
        _check_fields(cardinalities, embedding)
        fusion = Fusion(len(cardinalities) * embedding, layers, mask, generator)
        super().__init__(cardinalities, embedding, fusion, generator)


def tri_bce(
    z: Float[Tensor, " n"], z_deep: Float[Tensor, " n"], z_shallow: Float[Tensor, " n"], y: Float[Tensor, " n"]
) -> Float[Tensor, ""]:
    r"""Tri-BCE: :math:`\ell+w_D\ell_D+w_S\ell_S`, where a sub-network's weight is its excess loss over the fused one.

    :math:`w_D=\max(0,\ell_D-\ell)`, likewise w_S; the gradient flows through the weights, as in the authors' code.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if len({tuple(t.shape) for t in (z, z_deep, z_shallow, y)}) != 1:
        shapes = [tuple(t.shape) for t in (z, z_deep, z_shallow, y)]
        raise ValueError(f"z, z_deep, z_shallow and y must have one shape, got {shapes}")
    fused, deep, shallow = (F.binary_cross_entropy_with_logits(logit, y) for logit in (z, z_deep, z_shallow))
    return fused + torch.relu(deep - fused) * deep + torch.relu(shallow - fused) * shallow


def train(
    models: Sequence[ClickModel],
    X: Int[Tensor, "members n F"],
    y: Float[Tensor, "members n"],
    loss: Callable[..., Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    decay: float,
    generators: Sequence[torch.Generator],
    record: Callable[[], Mapping[str, Tensor]] | None = None,
) -> training.History:
    """Train models of one architecture together with Adam, in place, each on its own rows in its own order.

    Parameters
    ----------
    models
        The members. During training their parameters are views of stacked ones, so ``record`` may look at them.
    X, y
        Categories, and clicks (0 or 1), of every member.
    loss
        ``loss(logits, y)``, or ``loss(z, z_deep, z_shallow, y)`` for :class:`FusedCrossNetwork`.
    epochs, batch_size, lr
        An incomplete last batch of an epoch is dropped.
    decay
        Factor of the learning rate after every epoch.
    generators
        Source of the order of batches, one for each member.
    record
        Called before training and after every epoch; what it returns is stacked in the history.

    Raises
    ------
    ValueError
        If members, data and generators differ in number, a category does not exist, or ``y`` is not 0 or 1.
    """
    if not len(models) == len(generators) == len(X) == len(y) or X.shape[:2] != y.shape:
        raise ValueError(
            f"X, y and generators must have one entry for each of {len(models)} models, "
            f"got shapes {tuple(X.shape)}, {tuple(y.shape)} and {len(generators)} generators"
        )
    if not ((y == 0) | (y == 1)).all():
        raise ValueError(f"y must hold only 0 and 1, got values from {y.min():g} to {y.max():g}")
    parameters, _ = stack_module_state(list(models))
    for name, stacked in parameters.items():
        for model, view in zip(models, stacked.detach(), strict=True):
            model.get_parameter(name).data = view
    table, inner = parameters["table"], models[0].interactions
    weights = {name.removeprefix("interactions."): p for name, p in parameters.items() if name != "table"}
    member = torch.arange(len(models), device=X.device)[:, None]
    entries = torch.stack([model.entries(rows) for model, rows in zip(models, X, strict=True)])
    entries += member[..., None] * table.shape[1]  # one table of all members, so that one look-up serves them all
    batches = [training.minibatches(y.shape[1], batch_size, generator) for generator in generators]
    batches = map(torch.stack, zip(*batches, strict=True))

    def one(weights: dict[str, Tensor], x: Tensor, clicks: Tensor) -> Tensor:
        logits = functional_call(inner, weights, (x,))
        return loss(*logits, clicks) if isinstance(logits, tuple) else loss(logits, clicks)

    def losses(step: int) -> Float[Tensor, " members"]:
        rows = next(batches).to(X.device)
        x = half_split(F.embedding(entries[member, rows], table.flatten(0, 1)))
        return torch.vmap(one)(weights, x, y[member, rows])

    per_epoch = y.shape[1] // batch_size
    return training.fit(
        losses,
        parameters.values(),
        steps=epochs * per_epoch,
        lr=lr,
        optimizer=partial(torch.optim.Adam, fused=True),
        schedule=partial(StepLR, step_size=per_epoch, gamma=decay),
        record=record,
        record_every=per_epoch,
    )


@torch.no_grad()
def field_interactions(model: FusedCrossNetwork, network: str) -> Float[Tensor, "F F"]:
    r"""Strength of every pair of fields, read off the first cross layer and the embeddings.

    :math:`I_{fg}=\mathrm{rms}(e_f)\,(\sum_h\|W_0^{(f,g,h)}\|_F^2\,\mathrm{rms}(e_g^h)^2)^{1/2}` over the halves h, plus
    its transpose. The block :math:`W_0^{(f,g,h)}` takes half h of field g's embedding to the rows of field f.

    Raises
    ------
    ValueError
        If ``network`` is neither ``"linear"`` nor ``"exponential"``.
    """
    if network not in KINDS:
        raise ValueError(f"network must be one of {', '.join(KINDS)}, got {network!r}")
    fields = len(model.cardinalities)
    halves = model.table.unflatten(1, (2, -1)).square().mean(2).split(model.cardinalities)
    scale = torch.stack([half.mean(0) for half in halves])  # rms², a row for each field and a column for each half
    weight = getattr(model.interactions, network).weights[0]
    blocks = weight.square().unflatten(1, (2, fields, -1)).sum(3).unflatten(0, (fields, -1)).sum(1)
    strength = (scale.sum(1)[:, None] * torch.einsum("fhg,gh->fg", blocks, scale)).sqrt()
    return strength + strength.mT


def mixed_difference(
    f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, coordinates: Sequence[int]
) -> Float[Tensor, " n"]:
    r"""Mixed difference of k coordinates, :math:`\sum_{\epsilon\in\{0,1\}^k}(-1)^{|\epsilon|}f(x^\epsilon)`.

    :math:`x^\epsilon` is a row of ``x`` whose coordinates with :math:`\epsilon=1` come from ``y``. The sum keeps what
    only all coordinates together explain: it is zero for a polynomial of a degree below k.

    Raises
    ------
    ValueError
        If the shapes differ, or ``coordinates`` are not different columns.
    """
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"x and y must be (n, d) of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not len(coordinates) or not set(coordinates) <= set(range(x.shape[1])) or len({*coordinates}) < len(coordinates):
        raise ValueError(f"coordinates must be different columns of x, below {x.shape[1]}, got {list(coordinates)}")
    k = len(coordinates)
    chosen = torch.arange(2**k, device=x.device)[:, None] >> torch.arange(k, device=x.device) & 1
    swap = torch.zeros(2**k, 1, x.shape[1], dtype=torch.bool, device=x.device)
    swap[:, 0, list(coordinates)] = chosen.bool()
    values = f(torch.where(swap, y, x).flatten(0, 1)).view(2**k, len(x))
    return ((-1.0) ** chosen.sum(1)).to(values) @ values


@torch.no_grad()
def mixed_differences(
    predict: Callable[[Rows], Float[Tensor, " n"]],
    cardinalities: Sequence[int],
    samples: int,
    generator: torch.Generator,
) -> Float[Tensor, "F F"]:
    """Interaction of every pair of fields in any model: root mean square of the mixed difference over random rows.

    Raises
    ------
    ValueError
        If ``samples`` is smaller than 1 or there are fewer than two fields.
    """
    if samples < 1 or len(cardinalities) < 2:
        raise ValueError(f"samples must be at least 1 and fields at least 2, got {samples} and {len(cardinalities)}")
    x, y = (
        torch.stack([torch.randint(c, (samples,), generator=generator) for c in cardinalities], 1) for _ in range(2)
    )
    J = torch.zeros(len(cardinalities), len(cardinalities))
    for f, g in combinations(range(len(cardinalities)), 2):
        J[f, g] = J[g, f] = mixed_difference(predict, x, y, (f, g)).square().mean().sqrt()
    return J
