"""Relevance patching: which components of a transformer matter, from one backward pass with LRP's rules.

Rezaei Jafari, Eberle, Khakzar and Nanda, "RelP: Faithful and Efficient Circuit Discovery via Relevance Patching", 2025
(arXiv 2508.21258); details after the authors' code, FarnoushRJ/RelP.

A component is the vector ``a`` of size ``d`` at layer ``l`` and position ``t``. Its kind is ``"resid"`` (the input of
block ``l``), ``"attn"`` or ``"mlp"`` (what attention or MLP add to the stream). A metric maps logits (B, T, V) to one
number for each prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from companion import data, models, runtime, training

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

RULES = ("ln", "identity", "half", "attention")
KINDS = ("resid", "attn", "mlp")
Metric = Callable[[Float[Tensor, "B T V"]], Float[Tensor, " B"]]
Tap = Callable[[str, int, Float[Tensor, "B T d"]], Float[Tensor, "B T d"]]

# --- the rules: forward values as they are, another backward pass -----------------------------------------------------


def layer_norm_rule(
    x: Float[Tensor, "*batch d"], weight: Float[Tensor, " d"], bias: Float[Tensor, " d"], eps: float = 1e-5
) -> Float[Tensor, "*batch d"]:
    """Layer normalisation whose standard deviation is a constant for the backward pass (the LN-rule)."""
    centred = x - x.mean(-1, keepdim=True)
    sigma = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return weight * centred / sigma.detach() + bias


def identity_rule(z: Float[Tensor, "*shape"], fn: Callable[[Tensor], Tensor]) -> Float[Tensor, "*shape"]:
    """An activation whose backward pass multiplies by ``fn(z)/z`` in place of ``fn'(z)`` (the Identity-rule)."""
    value = fn(z).detach()
    slope = value / (z + torch.where(z < 0, -1e-6, 1e-6)).detach()
    return value + slope * (z - z.detach())


def half_rule(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A product that hands half of the gradient to each factor, so that relevance is not counted twice."""
    product = a * b
    return (product + product.detach()) / 2


# --- task and network -------------------------------------------------------------------------------------------------

_WORDS = ["<bos>", "and", "went", ",", "gave", "to"]
_NAMES = ["Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "Sarah", "David", "Robert", "Michael", "Jessica"]
_PLACES = ["store", "garden", "school", "hospital"]
_OBJECTS = ["ring", "drink", "book", "computer"]
_ENGLISH = "<|endoftext|>When {} and {} went to the {}, {} gave a {} to"
_TOKEN = re.compile(r"<.*?>|\w+|,")


class IOITask:
    """Indirect object identification in sentences of 11 tokens, ``<bos> A and B went P , S gave O to``.

    A and B are different names and the subject S is one of them, all uniform. The next word is the other name, the
    indirect object. ``words`` spells out the tokens.

    Parameters
    ----------
    n_names, n_places, n_objects
        How many of each there are.

    Raises
    ------
    ValueError
        If there are fewer than two names, no place or no object, or more than there are words for.
    """

    def __init__(self, n_names: int = 12, n_places: int = 4, n_objects: int = 4) -> None:
        if not (2 <= n_names <= len(_NAMES) and 1 <= n_places <= len(_PLACES) and 1 <= n_objects <= len(_OBJECTS)):
            raise ValueError(
                f"n_names must be from 2 to {len(_NAMES)}, n_places from 1 to {len(_PLACES)} and n_objects from 1 to "
                f"{len(_OBJECTS)}, got {n_names=}, {n_places=}, {n_objects=}"
            )
        self.n_names, self.n_places, self.n_objects = n_names, n_places, n_objects
        self.words = [*_WORDS, *_NAMES[:n_names], *_PLACES[:n_places], *_OBJECTS[:n_objects]]

    def batch(
        self, n: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "n 11"], Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Sentences, and the token of the indirect object and of the subject of each.

        Raises
        ------
        ValueError
            If ``n`` is smaller than 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")

        def draw(size: int) -> Int[Tensor, " n"]:
            return torch.randint(size, (n,), generator=generator)

        first_name, first_place = len(_WORDS), len(_WORDS) + self.n_names
        a = draw(self.n_names)
        b = (a + 1 + draw(self.n_names - 1)) % self.n_names
        place, thing = first_place + draw(self.n_places), first_place + self.n_places + draw(self.n_objects)
        a, b, swap = first_name + a, first_name + b, draw(2).bool()
        io, subject = torch.where(swap, a, b), torch.where(swap, b, a)
        bos, and_, went, comma, gave, to = torch.arange(len(_WORDS))[:, None].expand(-1, n)
        return torch.stack([bos, a, and_, b, went, place, comma, subject, gave, thing, to], 1), io, subject

    def pair(
        self, n: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "n 11"], Int[Tensor, "n 11"], Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Clean sentences, corrupted ones in which the indirect object is the subject (position 7), and both names."""
        clean, io, subject = self.batch(n, generator)
        corrupted = clean.clone()
        corrupted[:, 7] = io
        return clean, corrupted, io, subject


def logit_difference(
    logits: Float[Tensor, "B T V"], io: Int[Tensor, " B"], subject: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """How much more likely the indirect object is than the subject, in logits at the last position."""
    last, rows = logits[:, -1], torch.arange(len(io), device=io.device)
    return last[rows, io] - last[rows, subject]


_ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu, "swiglu": F.silu}


class TinyTransformer(nn.Module):
    """A decoder with layer normalisation before attention, MLP and the last layer; at its size, GPT-2.

    Parameters
    ----------
    vocab_size, n_positions
        Number ``V`` of tokens, and the longest sequence.
    generator
        Source of the initial weights.
    d_model, n_heads, n_layers, d_mlp
        Width of the stream, attention heads, blocks, and hidden units of each MLP.
    activation
        ``"gelu"`` (exact), ``"gelu_new"`` (GPT-2's approximation), ``"relu"``, or ``"swiglu"``: SiLU as the gate of a
        product of two projections.

    Raises
    ------
    ValueError
        If ``d_model`` is no multiple of ``n_heads``, or the activation is unknown.
    """

    rules: frozenset[str] = frozenset()  # set by lrp_rules alone

    def __init__(
        self,
        vocab_size: int,
        n_positions: int = 11,
        *,
        generator: torch.Generator,
        d_model: int = 32,
        n_heads: int = 4,
        n_layers: int = 3,
        d_mlp: int = 128,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model=} and {n_heads=}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")

        def linear(n_in: int, n_out: int) -> nn.Module:
            return models.initialised(nn.utils.skip_init(nn.Linear, n_in, n_out), generator)

        self.n_heads, self.activation = n_heads, activation
        self.embedding = nn.Parameter(0.02 * torch.randn(vocab_size, d_model, generator=generator))
        self.position = nn.Parameter(0.01 * torch.randn(n_positions, d_model, generator=generator))
        self.blocks = nn.ModuleList()
        for _ in range(n_layers):
            block = nn.ModuleDict({"ln_1": nn.LayerNorm(d_model), "ln_2": nn.LayerNorm(d_model)})
            block.update({"qkv": linear(d_model, 3 * d_model), "out": linear(d_model, d_model)})
            block.update(
                {"up": linear(d_model, d_mlp * (1 + (activation == "swiglu"))), "down": linear(d_mlp, d_model)}
            )
            self.blocks.append(block)
        self.ln_f, self.unembedding = nn.LayerNorm(d_model), linear(d_model, vocab_size)

    def forward(self, tokens: Int[Tensor, "B T"], tap: Tap = lambda kind, layer, a: a) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position; ``tap(kind, layer, a)`` sees, and may replace, each component."""
        x = self.embedding[tokens] + self.position[: tokens.shape[1]]
        for layer, block in enumerate(self.blocks):
            x = tap("resid", layer, x)
            x = x + tap("attn", layer, self._attention(block, self._norm(block["ln_1"], x)))
            x = x + tap("mlp", layer, self._mlp(block, self._norm(block["ln_2"], x)))
        return self.unembedding(self._norm(self.ln_f, x))

    def _norm(self, ln: nn.LayerNorm, x: Tensor) -> Tensor:
        return layer_norm_rule(x, ln.weight, ln.bias, ln.eps) if "ln" in self.rules else ln(x)

    def _attention(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        q, k, v = block["qkv"](x).unflatten(-1, (3, self.n_heads, -1)).movedim((-3, -2), (0, -3))
        future = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
        pattern = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf).softmax(-1)
        if "attention" in self.rules:
            pattern = pattern.detach()
        return block["out"]((pattern @ v).movedim(-3, -2).flatten(-2))

    def _mlp(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        z, fn = block["up"](x), _ACTIVATIONS[self.activation]
        act = partial(identity_rule, fn=fn) if "identity" in self.rules else fn
        if self.activation == "swiglu":
            gate, value = z.chunk(2, -1)
            return block["down"](half_rule(act(gate), value) if "half" in self.rules else act(gate) * value)
        return block["down"](act(z))


@contextmanager
def lrp_rules(model: TinyTransformer, rules: Collection[str]) -> Iterator[None]:
    """Within the block, the backward pass of ``model`` follows the given rules; its outputs do not change.

    Parameters
    ----------
    model
        The network; it is as before at the end, also after an error.
    rules
        Some of ``"ln"``, ``"identity"``, ``"half"`` (the paper's default is these three) and ``"attention"``, which
        treats attention patterns as constants.

    Raises
    ------
    ValueError
        If a rule is unknown.
    """
    if isinstance(rules, str) or not set(rules) <= set(RULES):
        raise ValueError(f"rules must be a collection of some of {', '.join(RULES)}, got {rules!r}")
    before, model.rules = model.rules, frozenset(rules)
    try:
        yield
    finally:
        model.rules = before


def train_on_ioi(
    task: IOITask, seeds: Sequence[int], *, steps: int = 500, activation: str = "gelu"
) -> list[TinyTransformer]:
    """Transformers that complete the sentences of ``task``, one per seed and all trained at once.

    Cross-entropy at the last position, 32 fresh sentences a step; AdamW with weight decay 0.1 and one cycle of the
    learning rate up to 0.005.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    ensemble = training.Ensemble(
        [TinyTransformer(len(task.words), activation=activation, generator=g) for g in generators]
    )
    draws = zip(*(task.batch(steps * 32, g) for g in generators), strict=True)
    tokens, io, _ = (torch.stack(draw).unflatten(1, (steps, 32)) for draw in draws)

    def loss(step: int) -> Float[Tensor, " members"]:
        logits = ensemble.each(tokens[:, step])[:, :, -1]
        return F.cross_entropy(logits.movedim(-1, 1), io[:, step], reduction="none").mean(1)

    training.fit(
        loss,
        ensemble.parameters.values(),
        steps=steps,
        lr=5e-3,
        optimizer=partial(torch.optim.AdamW, weight_decay=0.1, fused=True),
        schedule=partial(OneCycleLR, max_lr=5e-3, total_steps=steps + 1),
        record_every=steps,
    )
    return ensemble.members()


# --- patching ---------------------------------------------------------------------------------------------------------


def _run(
    model: TinyTransformer, tokens: Int[Tensor, "B T"], kind: str, edits: Mapping[int, Callable[[Tensor], Tensor]] = {}
) -> tuple[Float[Tensor, "B T V"], list[Float[Tensor, "B T d"]]]:
    """Logits and all components of one kind, after the given edits of some layers."""
    seen = []

    def tap(at: str, layer: int, a: Tensor) -> Tensor:
        if at == kind:
            a = edits[layer](a) if layer in edits else a
            seen.append(a)
        return a

    return model(tokens, tap), seen


def _score(metric: Metric, logits: Float[Tensor, "B T V"]) -> Float[Tensor, " B"]:
    """The metric, which must be one number per prompt: a mean would make every value B times too small."""
    score = metric(logits)
    if score.shape != logits.shape[:1]:
        raise ValueError(f"metric must return one number for each of {len(logits)} prompts, got {tuple(score.shape)}")
    return score


def _check_pair(clean: Tensor, corrupted: Tensor, kind: str = "resid") -> None:
    if clean.ndim != 2 or clean.shape != corrupted.shape:
        raise ValueError(
            "clean and corrupted must be tokens of one shape (B, T), "
            f"got {tuple(clean.shape)} and {tuple(corrupted.shape)}"
        )
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


@torch.no_grad()
def activation_patching(
    model: TinyTransformer, clean: Int[Tensor, "B T"], corrupted: Int[Tensor, "B T"], metric: Metric, kind: str
) -> Float[Tensor, "B L T"]:
    """Change of the metric when one component of the corrupted run takes its value of the clean run, for each of them.

    It costs a forward pass for each layer and position.

    Parameters
    ----------
    model
        The network.
    clean, corrupted
        Tokens of the prompts and of their counterparts.
    metric
        Maps logits (B, T, V) to a number per prompt.
    kind
        Which components: ``"resid"``, ``"attn"`` or ``"mlp"``.

    Raises
    ------
    ValueError
        If the shapes differ, the kind is unknown, or the metric is not one number per prompt.
    """
    _check_pair(clean, corrupted, kind)
    _, source = _run(model, clean, kind)
    baseline = _score(metric, model(corrupted))

    def effect(layer: int, t: int) -> Float[Tensor, " B"]:
        column = torch.arange(clean.shape[1], device=clean.device)[:, None] == t
        logits, _ = _run(model, corrupted, kind, {layer: lambda a: torch.where(column, source[layer], a)})
        return _score(metric, logits) - baseline

    effects = [effect(layer, t) for layer in range(len(source)) for t in range(clean.shape[1])]
    return torch.stack(effects, 1).unflatten(1, (len(source), -1))


def coefficients(
    model: TinyTransformer,
    tokens: Int[Tensor, "B T"],
    metric: Metric,
    kind: str,
    rules: Collection[str] = (),
    edits: Mapping[int, Callable[[Tensor], Tensor]] = {},
) -> tuple[Float[Tensor, "L B T d"], Float[Tensor, "L B T d"]]:
    """All components ``a`` of one kind and their propagation coefficients, from one forward and one backward pass.

    Parameters
    ----------
    model, tokens, metric, kind
        As for :func:`activation_patching`.
    rules
        As for :func:`lrp_rules`; without rules the coefficients are the gradient of the metric.
    edits
        Changes of the components of some layers on the way.

    Raises
    ------
    ValueError
        If the kind or a rule is unknown, or the metric is not one number per prompt.
    """
    _check_pair(tokens, tokens, kind)
    with lrp_rules(model, rules):
        logits, a = _run(model, tokens, kind, edits)
        rho = torch.autograd.grad(_score(metric, logits).sum(), a)
    return torch.stack(a).detach(), torch.stack(rho)


def linear_patching(
    model: TinyTransformer,
    clean: Int[Tensor, "B T"],
    corrupted: Int[Tensor, "B T"],
    metric: Metric,
    kind: str,
    rules: Collection[str] = (),
) -> Float[Tensor, "B L T"]:
    r"""Estimate of :func:`activation_patching` from two forward passes and one backward pass.

    :math:`(a^c-a^*)^\top\rho` with the coefficients :math:`\rho` of a backward pass at the corrupted run: the gradient
    without rules (attribution patching), LRP's coefficients with them (relevance patching).

    Parameters
    ----------
    model, clean, corrupted, metric, kind
        As for :func:`activation_patching`.
    rules
        As for :func:`lrp_rules`.

    Raises
    ------
    ValueError
        As for :func:`activation_patching`, and if a rule is unknown.
    """
    _check_pair(clean, corrupted, kind)
    with torch.no_grad():
        _, target = _run(model, clean, kind)
    start, rho = coefficients(model, corrupted, metric, kind, rules)
    return ((torch.stack(target) - start) * rho).sum(-1).movedim(0, 1)


# --- circuits of sparse features --------------------------------------------------------------------------------------


class SparseAutoencoder(nn.Module):
    """Features ``f = relu((x - b_d) W_e + b_e)`` and the reconstruction ``f W_d + b_d``."""

    def __init__(self, d_in: int, d_features: int, *, generator: torch.Generator) -> None:
        super().__init__()
        directions = F.normalize(torch.randn(d_features, d_in, generator=generator), dim=1)
        self.W_e, self.W_d = nn.Parameter(directions.T.clone()), nn.Parameter(directions)
        self.b_e, self.b_d = nn.Parameter(torch.zeros(d_features)), nn.Parameter(torch.zeros(d_in))

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch F"]:
        return F.relu((x - self.b_d) @ self.W_e + self.b_e)

    def decode(self, f: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch d"]:
        return f @ self.W_d + self.b_d

    def forward(self, x: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch F"], Float[Tensor, "*batch d"]]:
        f = self.encode(x)
        return f, self.decode(f)


def fit_sparse_autoencoder(
    X: Float[Tensor, "members n d"],
    d_features: int,
    generator: torch.Generator,
    *,
    penalty: float = 0.15,
    steps: int = 400,
    batch_size: int = 512,
) -> list[SparseAutoencoder]:
    r"""Sparse autoencoders of several data sets, trained at once.

    Minimises :math:`\|x-\hat x\|^2+c\sqrt d\sum_i f_i\|W_{d,i}\|` for data divided by their standard deviation with
    Adam at learning rate 0.005; the autoencoders that come back take the data as they are.

    Parameters
    ----------
    X
        The data sets.
    d_features
        Number of features.
    generator
        Source of the initial weights and the mini-batches.
    penalty
        The factor ``c`` of the penalty.
    steps, batch_size
        Number of steps, and samples in each.

    Raises
    ------
    ValueError
        If ``X`` does not have three axes, is not finite, or is shorter than a mini-batch.
    """
    if X.ndim != 3 or not X.isfinite().all():
        raise ValueError(f"X must be finite data sets (members, n, d), got shape {tuple(X.shape)}")
    members, n, d = X.shape
    scale = X.std((1, 2), keepdim=True)
    data_sets, batches = X / scale, training.minibatches(n, batch_size, generator)
    ensemble = training.Ensemble([SparseAutoencoder(d, d_features, generator=generator) for _ in range(members)])

    def loss(step: int) -> Float[Tensor, " members"]:
        x = data_sets[:, next(batches)]
        f, reconstruction = ensemble.each(x)
        sizes = f @ ensemble.parameters["W_d"].norm(dim=-1)[:, :, None]
        return ((x - reconstruction).square().sum(-1) + penalty * math.sqrt(d) * sizes[..., 0]).mean(1)

    training.fit(loss, ensemble.parameters.values(), steps=steps, lr=5e-3, record_every=steps)
    saes = ensemble.members()
    with torch.no_grad():
        for sae, factor in zip(saes, scale.flatten(), strict=True):
            sae.W_e /= factor
            sae.W_d *= factor
            sae.b_d *= factor
    return saes


@torch.no_grad()
def residual_stream(model: TinyTransformer, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "L B T d"]:
    """The input of every block."""
    return torch.stack(_run(model, tokens, "resid")[1])


def feature_attribution(
    model: TinyTransformer,
    saes: Mapping[int, SparseAutoencoder],
    clean: Int[Tensor, "B T"],
    corrupted: Int[Tensor, "B T"],
    metric: Metric,
    method: str,
    n_steps: int = 10,
) -> Float[Tensor, "layers T F"]:
    r"""Effect on the metric, mean over prompts, of each feature going from its clean to its corrupted value.

    The stream at layer ``l`` is :math:`f_lW_d+b_d` and an error that stays. The coefficients of the features are those
    of the stream in the directions of :math:`W_d`, so the effect is
    :math:`(f^*_l-f^c_l)\odot(W_d\rho_l)`, with :math:`\rho_l` from one backward pass at the clean run, or the mean of
    ``n_steps`` for each layer.

    Parameters
    ----------
    model, clean, corrupted, metric
        As for :func:`activation_patching`.
    saes
        The sparse autoencoder of the input of each block that takes part, by number of the block.
    method
        ``"atp"`` (gradient), ``"relp"`` (the paper's default rules), ``"ig"`` (integrated gradients on the way from the
        clean to the corrupted features, one layer at a time), or ``"exact"`` (a forward pass for each feature that
        differs).
    n_steps
        Points of the midpoint rule for ``"ig"``.

    Raises
    ------
    ValueError
        If the shapes differ, the method is unknown, ``n_steps`` is smaller than 1, a layer has no block, or the metric
        is not one number per prompt.
    """
    _check_pair(clean, corrupted)
    if method not in ("atp", "relp", "ig", "exact") or n_steps < 1:
        raise ValueError(f"method must be atp, relp, ig or exact and n_steps positive, got {method!r} and {n_steps}")
    _check_layers(model, saes)
    before, after = residual_stream(model, clean), residual_stream(model, corrupted)
    with torch.no_grad():
        delta = {layer: sae.encode(after[layer]) - sae.encode(before[layer]) for layer, sae in saes.items()}

    if method == "exact":
        return torch.stack([_exact(model, saes[l], clean, metric, l, change) for l, change in delta.items()])
    if method == "ig":
        rho = {}
        for layer, sae in saes.items():
            way = (delta[layer] @ sae.W_d).detach()
            points = [(k + 0.5) / n_steps for k in range(n_steps)]
            paths = [{layer: lambda x, p=p, way=way: x + p * way} for p in points]
            rho[layer] = (
                sum(coefficients(model, clean, metric, "resid", (), path)[1][layer] for path in paths) / n_steps
            )
    else:
        _, rho = coefficients(model, clean, metric, "resid", ("ln", "identity", "half") if method == "relp" else ())
    return torch.stack([(delta[l] * (rho[l] @ sae.W_d.mT)).mean(0).detach() for l, sae in saes.items()])


@torch.no_grad()
def _exact(
    model: TinyTransformer, sae: SparseAutoencoder, clean: Tensor, metric: Metric, layer: int, delta: Tensor
) -> Float[Tensor, "T F"]:
    """Mean change of the metric for each feature, moved alone."""
    baseline = _score(metric, model(clean)).mean()
    result = torch.zeros_like(delta[0])
    for t, i in delta.abs().amax(0).nonzero().tolist():
        moved = torch.zeros_like(delta)
        moved[:, t, i] = delta[:, t, i]
        step = moved @ sae.W_d
        result[t, i] = (
            _score(metric, _run(model, clean, "resid", {layer: lambda x, s=step: x + s})[0]).mean() - baseline
        )
    return result


def _check_layers(model: TinyTransformer, saes: Mapping[int, SparseAutoencoder]) -> None:
    if not saes or not set(saes) <= set(range(len(model.blocks))):
        raise ValueError(f"saes must be for blocks from 0 to {len(model.blocks) - 1}, got blocks {list(saes)}")


@torch.no_grad()
def circuit_faithfulness(
    model: TinyTransformer,
    saes: Mapping[int, SparseAutoencoder],
    clean: Int[Tensor, "B T"],
    metric: Metric,
    keep_masks: Bool[Tensor, "*circuits layers T F"],
    means: Float[Tensor, "layers T F"],
) -> Float[Tensor, "*circuits"]:
    r"""Part of the metric that circuits of features keep, :math:`(m(C)-m(\emptyset))/(m(M)-m(\emptyset))`.

    Features outside a circuit are set to their mean; what the autoencoder does not reconstruct stays as it is.

    Parameters
    ----------
    model, saes, clean, metric
        As for :func:`feature_attribution`.
    keep_masks
        For each circuit, True for its features.
    means
        Mean of each feature over the data.

    Raises
    ------
    ValueError
        If a layer has no block, or ``means`` or each of ``keep_masks`` does not have the shape (layers, T, F).
    """
    _check_layers(model, saes)
    shape = (len(saes), clean.shape[1], len(next(iter(saes.values())).W_d))
    if tuple(keep_masks.shape[-3:]) != shape or tuple(means.shape) != shape:
        raise ValueError(
            f"keep_masks and means must have the shape {shape}, got {tuple(keep_masks.shape)} and {tuple(means.shape)}"
        )

    def keep(x: Tensor, sae: SparseAutoencoder, mask: Tensor, mean: Tensor) -> Tensor:
        return x + torch.where(mask, 0, mean - sae.encode(x)) @ sae.W_d

    def score(masks: Bool[Tensor, "layers T F"]) -> Float[Tensor, ""]:
        parts = zip(saes.items(), masks, means, strict=True)
        edits = {layer: partial(keep, sae=sae, mask=mask, mean=mean) for (layer, sae), mask, mean in parts}
        return _score(metric, _run(model, clean, "resid", edits)[0]).mean()

    nothing, everything = score(torch.zeros(shape, dtype=torch.bool)), score(torch.ones(shape, dtype=torch.bool))
    kept = torch.stack([score(masks) for masks in keep_masks.reshape(-1, *shape)]).view(keep_masks.shape[:-3])
    return (kept - nothing) / (everything - nothing)


# --- GPT-2 ------------------------------------------------------------------------------------------------------------

_RENAMED = [  # GPT-2's names, ours
    ("transformer.wte.weight", "embedding"),
    ("transformer.wpe.weight", "position"),
    ("transformer.ln_f", "ln_f"),
    ("transformer.h", "blocks"),
    ("attn.c_attn", "qkv"),
    ("attn.c_proj", "out"),
    ("mlp.c_fc", "up"),
    ("mlp.c_proj", "down"),
    ("lm_head", "unembedding"),
]


def from_gpt2(source: GPT2LMHeadModel) -> TinyTransformer:
    """The same network as a :class:`TinyTransformer`, with a copy of the weights."""
    config = source.config
    sizes = dict(d_model=config.n_embd, n_heads=config.n_head, n_layers=config.n_layer, d_mlp=4 * config.n_embd)
    model = TinyTransformer(
        config.vocab_size, config.n_positions, activation="gelu_new", generator=torch.Generator(), **sizes
    )
    state = {"unembedding.bias": torch.zeros(config.vocab_size)}
    for name, value in source.state_dict().items():
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        # GPT-2 keeps the transpose of its matrices, all but the two embeddings
        state[name] = value.mT if name.startswith("blocks") and value.ndim == 2 else value
    model.load_state_dict(state)
    return model


def gpt2_on_ioi(
    name: str, n: int, generator: torch.Generator
) -> tuple[TinyTransformer, Int[Tensor, "n T"], Int[Tensor, "n T"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """A pretrained GPT-2 and the sentences of :meth:`IOITask.pair` in English, as GPT-2 reads them.

    The package ``transformers`` is needed. In the ``smoke`` profile nothing is downloaded: an untrained transformer
    that reads word by word stands in for GPT-2.

    Raises
    ------
    DataUnavailable
        If the network cannot be had.
    """
    task = IOITask()
    if runtime.profile() == "smoke":
        words = sorted({*task.words, *_TOKEN.findall(_ENGLISH)})
        model = TinyTransformer(len(words), 16, n_layers=2, generator=generator)

        def encode(text: str) -> list[int]:
            return [words.index(word) for word in _TOKEN.findall(text)]
    else:
        try:
            from transformers import AutoTokenizer, GPT2LMHeadModel

            encode = AutoTokenizer.from_pretrained(name).encode
            model = from_gpt2(GPT2LMHeadModel.from_pretrained(name))
        except Exception as error:  # missing package, the network, the server
            raise data.DataUnavailable(
                f"the network {name!r} could not be had: {error}. Install the package transformers and connect to the "
                "internet, or set BOOK_PROFILE=book, which needs no download."
            ) from error

    def english(tokens: Int[Tensor, "n 11"]) -> Int[Tensor, "n T"]:
        places = [[task.words[token] for token in row[1::2]] for row in tokens]  # A, B, P, S, O
        return torch.tensor([encode(_ENGLISH.format(*words)) for words in places])

    clean, corrupted, io, subject = task.pair(n, generator)
    io, subject = (torch.tensor([encode(" " + task.words[k]) for k in names])[:, 0] for names in (io, subject))
    device = runtime.device()
    return model.to(device), *(x.to(device) for x in (english(clean), english(corrupted), io, subject))
