"""Neural probes that read hallucinations from the hidden states of a frozen language model.

Liang and Wang, "Neural Probe-Based Hallucination Detection for Large Language Models", 2025 (arXiv 2512.20949).

A small language model is trained on a world of facts whose long tail it cannot know; frozen, it answers questions about
all of them. A probe maps the hidden state at one *site* of the residual stream to a logit per generated token. Site 0
is the embedding; one site follows each attention and each MLP sub-layer, so that ``L`` blocks have ``2L+1`` sites. A
*span* is the answer to one question, ``T`` tokens that share one label: 1 if it is wrong, a hallucination.

The exact terms and weights of the paper's joint loss could not be read; the loss here is a reconstruction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.metrics import roc_curve
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from companion import models, runtime, training
from companion.data import DataUnavailable

IGNORED = -100  # label of a token that belongs to no span

# --- a world of facts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactCorpus:
    """Facts (subject, relation) → object of two tokens, some known and the others the long tail.

    The tokens are, in this order: one that begins a text, the subjects, the relations, the first object tokens
    (``n_first`` for each relation) and the second ones (shared). Objects are stored as tokens.

    Attributes
    ----------
    truth, known
        The true object of every (subject, relation), and whether the corpus repeats it.
    group, stereotype, strong
        The group of each subject; what the corpus tends to say about a group; and for which (group, relation) it does.
    """

    truth: Int[Tensor, "S R 2"]
    known: Bool[Tensor, "S R"]
    group: Int[Tensor, " S"]
    stereotype: Int[Tensor, "G R 2"]
    strong: Bool[Tensor, "G R"]
    stereotype_rate: float
    n_first: int
    n_second: int
    vocab_size: int

    def prompt(self, queries: Int[Tensor, "*batch 2"]) -> Int[Tensor, "*batch 2"]:
        """The tokens of (subject, relation) pairs given as numbers."""
        return queries + torch.tensor([1, 1 + len(self.truth)])

    def names(self) -> list[str]:
        """A name for every token: ``a0`` … for the first objects of relation 0, ``b0`` … for those of 1, ``z0`` …"""
        subjects, relations = self.known.shape
        first = [f"{chr(97 + r)}{k}" for r in range(relations) for k in range(self.n_first)]
        return ["."] * (1 + subjects + relations) + first + [f"z{k}" for k in range(self.n_second)]

    def sample_batch(
        self, n_sequences: int, facts_per_sequence: int, known_share: float, generator: torch.Generator
    ) -> Int[Tensor, "n_sequences length"]:
        """Texts to learn from: a begin token and ``facts_per_sequence`` times subject, relation, object.

        A fact is a known one with probability ``known_share``, with its true object. Otherwise it belongs to the tail
        and gets a fresh object: mostly the group's stereotype where the cell is strong, else any.

        Raises
        ------
        ValueError
            If a number is not positive or ``known_share`` is no probability.
        """
        if min(n_sequences, facts_per_sequence) < 1 or not 0 <= known_share <= 1:
            raise ValueError(
                "n_sequences and facts_per_sequence must be positive and known_share in [0, 1], "
                f"got {n_sequences=}, {facts_per_sequence=}, {known_share=}"
            )
        n = n_sequences * facts_per_sequence
        drawn = [
            cells[torch.randint(len(cells), (n,), generator=generator)]
            for cells in (self.known.nonzero(), (~self.known).nonzero())
        ]
        is_known = torch.rand(n, generator=generator) < known_share
        queries = torch.where(is_known[:, None], *drawn)
        subject, relation = queries.unbind(-1)
        cell = self.group[subject], relation
        typical = self.strong[cell] & (torch.rand(n, generator=generator) < self.stereotype_rate)
        fresh = _any_object(relation, *self.known.shape, self.n_first, self.n_second, generator)
        tail = torch.where(typical[:, None], self.stereotype[cell], fresh)
        objects = torch.where(is_known[:, None], self.truth[subject, relation], tail)
        facts = torch.cat([self.prompt(queries), objects], 1).view(n_sequences, -1)
        return F.pad(facts, (1, 0))


def _any_object(
    relation: Int[Tensor, "*batch"],
    n_subjects: int,
    n_relations: int,
    n_first: int,
    n_second: int,
    generator: torch.Generator,
) -> Int[Tensor, "*batch 2"]:
    """Uniform objects of the relations, as tokens."""
    first = torch.randint(n_first, relation.shape, generator=generator) + relation * n_first
    second = torch.randint(n_second, relation.shape, generator=generator) + n_relations * n_first
    return torch.stack([first, second], -1) + 1 + n_subjects + n_relations


def make_fact_corpus(
    seed: int,
    n_subjects: int = 220,
    n_relations: int = 4,
    n_groups: int = 12,
    n_first: int = 10,
    n_second: int = 20,
    stereotype_share: float = 0.75,
    stereotype_rate: float = 0.95,
) -> FactCorpus:
    """Draw a world.

    Of every four subjects one has all its relations known, two have half of them, and one has none; which ones is
    random, so that familiarity belongs to the pair. True objects are uniform, whatever the corpus says of the group;
    but 40 % of the known facts in strong cells agree with the stereotype, so that stereotypes are no sign of error.

    Parameters
    ----------
    seed
        Of the world.
    n_subjects, n_relations, n_groups
        How many there are.
    n_first, n_second
        First object tokens of each relation, and second ones, which relations share.
    stereotype_share
        Share of (group, relation) cells for which the corpus has a stereotype.
    stereotype_rate
        How often a tail fact in such a cell is told with the stereotype.

    Raises
    ------
    ValueError
        If a size is not positive or a rate is not in [0, 1].
    """
    sizes = dict(n_subjects=n_subjects, n_relations=n_relations, n_groups=n_groups, n_first=n_first, n_second=n_second)
    if min(sizes.values()) < 1:
        raise ValueError(f"sizes must be positive, got {sizes}")
    if not 0 <= stereotype_share <= 1 or not 0 <= stereotype_rate <= 1:
        raise ValueError(
            f"stereotype_share and stereotype_rate must be in [0, 1], got {stereotype_share} and {stereotype_rate}"
        )
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    n_known = torch.tensor([n_relations, n_relations // 2, n_relations // 2, 0])[torch.arange(n_subjects) % 4]
    known = uniform(n_subjects, n_relations).argsort(1) < n_known[:, None]
    group = torch.randint(n_groups, (n_subjects,), generator=generator)
    rank = uniform(n_groups * n_relations).argsort().argsort()  # the share is exact, and the cells random
    strong = (rank < round(stereotype_share * n_groups * n_relations)).view(n_groups, n_relations)
    vocab_size = 1 + n_subjects + n_relations * (1 + n_first) + n_second
    counts = n_subjects, n_relations, n_first, n_second
    relation = torch.arange(n_relations)
    stereotype = _any_object(relation.expand(n_groups, -1), *counts, generator)
    truth = _any_object(relation.expand(n_subjects, -1), *counts, generator)
    agrees = known & strong[group] & (uniform(n_subjects, n_relations) < 0.4)
    truth = torch.where(agrees[..., None], stereotype[group], truth)
    return FactCorpus(truth, known, group, stereotype, strong, stereotype_rate, n_first, n_second, vocab_size)


# --- a small language model -------------------------------------------------------------------------------------------


def _linear(n_in: int, n_out: int, generator: torch.Generator, scale: float = 1.0) -> nn.Linear:
    """A linear layer with Gaussian weights of variance ``scale²/fan-in`` and no bias yet."""
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out)
    nn.init.normal_(layer.weight, std=scale * n_in**-0.5, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class _Attention(nn.Module):
    """Causal self-attention on a normalised input."""

    def __init__(self, d_model: int, n_heads: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(d_model)
        self.qkv = _linear(d_model, 3 * d_model, generator)
        self.out = _linear(d_model, d_model, generator, scale)

    def forward(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TinyLM(nn.Module):
    """A causal decoder with normalisation before each sub-layer, and the embedding as its output layer.

    Parameters
    ----------
    vocab_size, d_model, n_layers, n_heads, max_len
        Tokens, width, blocks, attention heads, and the longest text.
    generator
        Source of the initial weights.

    Raises
    ------
    ValueError
        If a size is not positive or ``n_heads`` does not divide ``d_model``.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 64,
        n_layers: int = 4,
        n_heads: int = 4,
        max_len: int = 24,
        *,
        generator: torch.Generator,
    ) -> None:
        if min(vocab_size, d_model, n_layers, n_heads, max_len) < 1 or d_model % n_heads:
            raise ValueError(
                "sizes must be positive and n_heads divide d_model, "
                f"got {vocab_size=}, {d_model=}, {n_layers=}, {n_heads=}, {max_len=}"
            )
        super().__init__()
        self.embedding = nn.Parameter(0.3 * torch.randn(vocab_size, d_model, generator=generator))
        self.position = nn.Parameter(0.1 * torch.randn(max_len, d_model, generator=generator))
        scale = (2 * n_layers) ** -0.5  # of what is added to the residual stream, which then keeps its size
        self.sublayers = nn.ModuleList()
        for _ in range(n_layers):
            up, down = _linear(d_model, 4 * d_model, generator), _linear(4 * d_model, d_model, generator, scale)
            mlp = nn.Sequential(nn.LayerNorm(d_model), up, nn.GELU(), down)
            self.sublayers += [_Attention(d_model, n_heads, scale, generator), mlp]
        self.norm = nn.LayerNorm(d_model)
        nn.init.constant_(self.norm.weight, 0.5)

    def _stream(self, tokens: Int[Tensor, "B T"]) -> list[Float[Tensor, "B T d"]]:
        if tokens.shape[1] > len(self.position):
            raise ValueError(f"tokens must have at most {len(self.position)} columns, got {tokens.shape[1]}")
        sites = [self.embedding[tokens] + self.position[: tokens.shape[1]]]
        for sublayer in self.sublayers:
            sites.append(sites[-1] + sublayer(sites[-1]))
        return sites

    def hidden_states(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "sites B T d"]:
        """The residual stream at every site.

        Raises
        ------
        ValueError
            If a text is longer than ``max_len``.
        """
        return torch.stack(self._stream(tokens))

    def read_out(self, last_site: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch V"]:
        """Logits of the next token from the last site."""
        return self.norm(last_site) @ self.embedding.T

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        return self.read_out(self._stream(tokens)[-1])


def train_lm(corpus: FactCorpus, seed: int, steps: int = 270, n_sequences: int = 112) -> TinyLM:
    """A :class:`TinyLM` trained to predict every next token of the corpus, then frozen.

    Raises
    ------
    ValueError
        If ``steps`` or ``n_sequences`` is not positive.
    """
    generator = torch.Generator().manual_seed(seed)
    model = TinyLM(corpus.vocab_size, generator=generator)

    def loss(_: int) -> Tensor:
        tokens = corpus.sample_batch(n_sequences, 2, 0.6, generator)
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    adam = partial(torch.optim.AdamW, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    _fit(loss, model, adam, steps, 8e-3, clip=1.0)
    return model


def _fit(
    loss: Callable[[int], Tensor], model: nn.Module, optimizer: Callable, steps: int, lr: float, **settings: float
) -> None:
    """Train on a one-cycle schedule with 10 % warm-up; leave the model frozen, in evaluation mode."""

    def one_cycle(update: torch.optim.Optimizer) -> OneCycleLR:
        return OneCycleLR(update, lr, total_steps=steps + 1, pct_start=0.1)

    options = dict(steps=steps, lr=lr, optimizer=optimizer, schedule=one_cycle, record_every=max(steps, 1))
    training.fit(loss, model.parameters(), **options, **settings)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = None


# --- answers and their hidden states ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneratedSpans:
    """Generated answers, what the model computed at their tokens, and whether they are true.

    Attributes
    ----------
    hidden
        Hidden states at the positions that have *consumed* the tokens, so that a probe sees the token it judges.
    labels
        1 where the answer is wrong.
    known
        Whether the fact was known. Of a large language model nobody knows; there, right answers count as known.
    nll, entropy
        Negative log-likelihood of each token, and entropy of the distribution it was chosen from, in nats.
    prompts, words, truths
        Question, tokens of the answer, and true answer, as texts.
    """

    hidden: Float[Tensor, "sites N T d"]
    labels: Int[Tensor, " N"]
    known: Bool[Tensor, " N"]
    nll: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    prompts: list[str]
    words: list[list[str]]
    truths: list[str]


def split_groups(n_groups: int, seed: int) -> tuple[Int[Tensor, " n"], ...]:
    """Numbers of the groups (subjects, conversations) for training, validation and test: 55, 15 and 30 %.

    Raises
    ------
    ValueError
        If there are fewer than 7 groups, so that a part would be empty.
    """
    if n_groups < 7:
        raise ValueError(f"n_groups must be at least 7, got {n_groups}")
    ends = round(0.55 * n_groups), round(0.7 * n_groups)
    return torch.randperm(n_groups, generator=torch.Generator().manual_seed(seed)).tensor_split(ends)


def pack_questions(
    corpus: FactCorpus, subjects: Int[Tensor, " n"], n_packings: int, generator: torch.Generator
) -> Int[Tensor, "B 2 2"]:
    """All (subject, relation) questions about ``subjects``, ``n_packings`` times, in random pairs.

    Raises
    ------
    ValueError
        If there are no subjects or packings.
    """
    if not len(subjects) or n_packings < 1:
        raise ValueError(f"subjects and n_packings must not be empty, got {len(subjects)} and {n_packings}")
    questions = torch.cartesian_prod(subjects, torch.arange(corpus.known.shape[1]))
    packings = [questions[torch.randperm(len(questions), generator=generator)] for _ in range(n_packings)]
    return torch.cat([packing[: len(packing) // 2 * 2].view(-1, 2, 2) for packing in packings])


@torch.no_grad()
def generate_answers(model: TinyLM, corpus: FactCorpus, queries: Int[Tensor, "B F 2"]) -> GeneratedSpans:
    """Let the model answer, by greedy decoding, the ``F`` questions of every text one after the other.

    Subject and relation are forced; the two object tokens are the model's. The spans are in the order of ``queries``.

    Raises
    ------
    ValueError
        If ``queries`` is not of shape (B, F, 2), or a subject or relation does not exist.
    """
    limit = torch.tensor(corpus.known.shape)
    if queries.ndim != 3 or queries.shape[-1] != 2 or not ((queries >= 0) & (queries < limit)).all():
        raise ValueError(f"queries must be (B, F, 2) numbers below {limit.tolist()}, got shape {tuple(queries.shape)}")
    text = torch.zeros(len(queries), 1, dtype=torch.long)
    for question in corpus.prompt(queries).unbind(1):
        text = torch.cat([text, question], 1)
        for _ in range(2):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    hidden = model.hidden_states(text)
    log_p = model.read_out(hidden[-1]).log_softmax(-1)
    position = torch.arange(text.shape[1]).view(1, -1)[:, 1:].view(-1, 4)[:, 2:]  # (F, 2): where the objects stand
    answer = text[:, position].flatten(0, 1)
    before = log_p[:, position - 1].flatten(0, 1)
    subject, relation = queries.flatten(0, 1).unbind(-1)
    truth = corpus.truth[subject, relation]
    names = corpus.names()
    return GeneratedSpans(
        hidden=hidden[:, :, position].flatten(1, 2),
        labels=(answer != truth).any(1).long(),
        known=corpus.known[subject, relation],
        nll=-before.gather(-1, answer[..., None]).squeeze(-1),
        entropy=-(before.exp() * before).sum(-1),
        prompts=[f"subject {s}, relation {r}" for s, r in queries.flatten(0, 1).tolist()],
        words=[[names[token] for token in row] for row in answer.tolist()],
        truths=[" ".join(names[token] for token in row) for row in truth.tolist()],
    )


def small_world(seed: int) -> tuple[GeneratedSpans, GeneratedSpans, GeneratedSpans]:
    """Spans for training, validation and test: a world, a model trained on it, and its answers, split by subject.

    The questions about the subjects of each part are asked three times for training, in other pairs each time, and
    twice for validation and test.
    """
    corpus = make_fact_corpus(seed)
    model = train_lm(corpus, seed)
    generator = torch.Generator().manual_seed(seed + 200)
    parts = zip(split_groups(len(corpus.known), seed + 100), (3, 2, 2), strict=True)
    return tuple(generate_answers(model, corpus, pack_questions(corpus, *part, generator)) for part in parts)


# --- probes -----------------------------------------------------------------------------------------------------------


def joint_probe_loss(
    logits: Float[Tensor, "N T"],
    labels: Int[Tensor, "N T"],
    omega: float,
    gamma: float = 2.0,
    rank_weight: float = 0.5,
    class_weights: tuple[float, float] = (1.0, 1.0),
) -> Float[Tensor, ""]:
    r"""Token, span and ranking terms, :math:`(1-\omega) L_{tok} + \omega L_{span} + \lambda L_{rank}`.

    Parameters
    ----------
    logits, labels
        One row for each span; a token with label -100 is ignored, the others of a row share their label.
    omega
        Weight of the span term, in [0, 1].
    gamma
        Exponent of the focal factor of the token term; 0 is plain cross-entropy.
    rank_weight
        Weight λ of the ranking term, which is zero if one class is absent.
    class_weights
        Weights of supported (0) and hallucinated (1) spans.

    Raises
    ------
    ValueError
        If a row mixes labels, a label is none of -100, 0, 1, ``omega`` is outside [0, 1], the shapes differ, or every
        token is ignored.

    Notes
    -----
    Source: a reconstruction from the paper's description (token, span and separation terms).
    """
    if logits.shape != labels.shape or logits.ndim != 2:
        raise ValueError(f"logits and labels must be (N, T), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if not 0 <= omega <= 1:
        raise ValueError(f"omega must be in [0, 1], got {omega}")
    counts = labels != IGNORED
    if not counts.any() or not torch.isin(labels[counts], torch.tensor([0, 1], device=labels.device)).all():
        raise ValueError(f"labels must be -100, 0 or 1 and not all -100, got {labels.unique().tolist()}")
    y = labels.amax(1)
    if ((labels != y[:, None]) & counts).any():
        raise ValueError("labels must not mix 0 and 1 in a row: a row is one span")

    weight = logits.new_tensor(class_weights)
    token_y = labels[counts]
    ce = F.binary_cross_entropy_with_logits(logits[counts], token_y.to(logits), reduction="none")
    token = (weight[token_y] * (1 - (-ce).exp()) ** gamma * ce).mean()

    spans = counts.any(1)
    z, y = logits.masked_fill(~counts, -torch.inf).amax(1)[spans], y[spans]
    span = (weight[y] * F.binary_cross_entropy_with_logits(z, y.to(z), reduction="none")).mean()

    lead = z[y == 1][:, None] - z[y == 0]
    rank = F.softplus(1 - lead).mean() if lead.numel() else lead.sum()
    return (1 - omega) * token + omega * span + rank_weight * rank


class Probe(nn.Module):
    """A network on standardised hidden states of one site, with one logit per token."""

    def __init__(self, net: nn.Module, mean: Float[Tensor, " d"], std: Float[Tensor, " d"]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def token_logits(self, hidden: Float[Tensor, "N T d"]) -> Float[Tensor, "N T"]:
        """Logit of hallucination at each token."""
        return self.net((hidden.to(self.mean.device) - self.mean) / self.std).squeeze(-1)

    def span_logits(self, hidden: Float[Tensor, "N T d"]) -> Float[Tensor, " N"]:
        """Logit of a span, that of its most suspicious token."""
        return self.token_logits(hidden).amax(-1)


def _probe_net(kind: str, d: int, generator: torch.Generator) -> nn.Sequential:
    if kind == "linear":
        return models.mlp([d, 1], generator=generator)
    first, *rest = models.mlp([d, 64, 32, 1], generator=generator, activation=nn.GELU)
    return nn.Sequential(first, nn.LayerNorm(64), *rest)


def train_probe(
    hidden: Float[Tensor, "N T d"],
    labels: Int[Tensor, " N"],
    kind: str = "mlp",
    loss: str = "joint",
    epochs: int = 20,
    seed: int = 0,
) -> Probe:
    """Train a probe on spans; means and standard deviations come from these spans.

    Parameters
    ----------
    hidden, labels
        States of one site at the tokens of ``N`` spans, and whether each is a hallucination.
    kind
        ``"linear"``, or ``"mlp"``: d → 64 → 32 → 1 with GELU, and LayerNorm after the first layer.
    loss
        ``"joint"``: :func:`joint_probe_loss`, ``omega`` going from 0 to 1. ``"bce"``: cross-entropy of the tokens. Both
        weigh the classes alike.
    epochs
        Passes over the spans, in batches of 128.
    seed
        Of the initial weights and the batches.

    Raises
    ------
    ValueError
        If ``kind`` or ``loss`` is not offered, the shapes do not fit, ``epochs`` is not positive, ``hidden`` is not
        finite, or the labels are not 0 and 1, both present.
    """
    if kind not in ("mlp", "linear") or loss not in ("joint", "bce"):
        raise ValueError(f"kind must be 'mlp' or 'linear' and loss 'joint' or 'bce', got {kind=}, {loss=}")
    if hidden.ndim != 3 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be (N, T, d) and labels (N,), got {tuple(hidden.shape)}, {tuple(labels.shape)}")
    if labels.unique().tolist() != [0, 1]:
        raise ValueError(f"labels must hold both 0 and 1 and nothing else, got {labels.unique().tolist()}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    device = runtime.device()
    labels = labels.to(device)
    hidden = hidden.detach().to(device).float()  # detached: no gradient of the probe can reach the language model
    if not hidden.isfinite().all():
        raise ValueError("hidden holds NaN or infinite values")
    generator = torch.Generator().manual_seed(seed)
    tokens = hidden.flatten(0, 1)
    probe = Probe(_probe_net(kind, hidden.shape[-1], generator), tokens.mean(0), tokens.std(0).clamp_min(1e-6))
    probe = probe.to(device)
    share = float(labels.float().mean())
    class_weights = 0.5 / (1 - share), 0.5 / share
    batch_size = min(128, len(labels))
    batches = training.minibatches(len(labels), batch_size, generator)
    steps = epochs * (len(labels) // batch_size)
    ablated = dict(gamma=0.0, rank_weight=0.0) if loss == "bce" else {}

    def batch_loss(step: int) -> Tensor:
        rows = next(batches).to(device)
        omega = step / max(steps - 1, 1) if loss == "joint" else 0.0
        y = labels[rows, None].expand(-1, hidden.shape[1])
        return joint_probe_loss(probe.token_logits(hidden[rows]), y, omega, class_weights=class_weights, **ablated)

    _fit(batch_loss, probe, partial(torch.optim.AdamW, weight_decay=1e-2, fused=True), steps, 3e-3)
    return probe


def recall_at_fpr(labels: Int[Tensor, " N"], scores: Float[Tensor, " N"], fpr: float) -> float:
    """Largest recall over all thresholds whose false-positive rate is at most ``fpr``; equal scores stay together.

    Raises
    ------
    ValueError
        If ``fpr`` is not in [0, 1], or the labels are not 0 and 1, both present.
    """
    labels = np.asarray(labels)
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr must be in [0, 1], got {fpr}")
    if set(labels.tolist()) != {0, 1}:
        raise ValueError(f"labels must hold both 0 and 1 and nothing else, got {sorted(set(labels.tolist()))}")
    false, true, _ = roc_curve(labels, np.asarray(scores), drop_intermediate=False)
    return float(true[false <= fpr].max())


# --- which layer? -----------------------------------------------------------------------------------------------------


def expected_improvement(
    mean: float | Float[np.ndarray, "*n"], std: float | Float[np.ndarray, "*n"], best: float
) -> Float[np.ndarray, "*n"]:
    r"""Expectation of :math:`\max(g - g^*, 0)` for :math:`g\sim N(\mu,\sigma^2)`.

    Parameters
    ----------
    mean, std
        μ and σ; where σ is 0 the result is :math:`\max(\mu - g^*, 0)`.
    best
        :math:`g^*`, the best value so far.

    Raises
    ------
    ValueError
        If a standard deviation is negative.

    Source: Mockus 1975; Jones, Schonlau and Welch 1998, equation 15.
    """
    mean, std = np.asarray(mean, dtype=float), np.asarray(std, dtype=float)
    if (std < 0).any():
        raise ValueError(f"std must not be negative, got {std.min()}")
    gain = mean - best
    u = gain / np.where(std > 0, std, 1)
    return np.where(std > 0, gain * norm.cdf(u) + std * norm.pdf(u), np.maximum(gain, 0))


def layer_response(
    sites: Sequence[int], values: Sequence[float], n_sites: int
) -> tuple[Float[np.ndarray, " n_sites"], Float[np.ndarray, " n_sites"]]:
    """Mean and standard deviation, at all sites, of a Gaussian process that has seen ``values`` at some ``sites``.

    Its input is the relative depth, from 0 to 1. The kernel is Matérn 5/2 with noise, around the mean of the values.

    Raises
    ------
    ValueError
        If sites and values differ in number or there is none, or a site does not exist.
    """
    if not len(sites) or len(sites) != len(values) or not 0 <= min(sites) <= max(sites) < n_sites:
        raise ValueError(f"sites must be numbers below n_sites={n_sites}, one per value, got {list(sites)}")
    depth = np.linspace(0, 1, n_sites)[:, None]
    kernel = ConstantKernel(0.02, (1e-4, 1)) * Matern(0.4, (0.1, 2), nu=2.5) + WhiteKernel(1e-4, (1e-6, 1e-2))
    centre = np.mean(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a few points often put a parameter on its bound
        process = GaussianProcessRegressor(kernel).fit(depth[list(sites)], np.asarray(values) - centre)
    mean, std = process.predict(depth, return_std=True)
    return mean + centre, std


def bayesian_layer_search(
    objective: Callable[[int], float], n_sites: int, n_evaluations: int = 6
) -> tuple[int, list[int], list[float]]:
    """Maximise ``objective`` over sites: first at 0 and in the middle, then where the expected improvement is largest.

    Returns
    -------
    best_site
        The visited site with the largest value.
    visited, values
        The sites in the order of their evaluation, and what was found.

    Raises
    ------
    ValueError
        If ``n_evaluations`` is not between 2 and ``n_sites``.
    """
    if not 2 <= n_evaluations <= n_sites:
        raise ValueError(f"n_evaluations must be between 2 and n_sites={n_sites}, got {n_evaluations}")
    visited = [0, n_sites // 2]
    values = [float(objective(site)) for site in visited]
    while len(visited) < n_evaluations:
        promise = expected_improvement(*layer_response(visited, values, n_sites), max(values))
        promise[visited] = -np.inf
        visited.append(int(promise.argmax()))
        values.append(float(objective(visited[-1])))
    return visited[int(np.argmax(values))], visited, values


# --- a large language model -------------------------------------------------------------------------------------------

QWEN = "Qwen/Qwen2.5-7B-Instruct"
_VERDICTS = {"Supported": 0, "Not Supported": 1, "Insufficient Information": 1}


class _Qwen:
    """The frozen language model of the paper."""

    def __init__(self, n_sites: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(QWEN)
        model = AutoModelForCausalLM.from_pretrained(QWEN, torch_dtype=torch.bfloat16)
        self.model = model.to(runtime.device()).eval().requires_grad_(False)
        self.layers = np.linspace(0, model.config.num_hidden_layers, n_sites).round().astype(int)

    def chat(self, question: str) -> str:
        turn = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def encode(self, text: str) -> tuple[Int[Tensor, " T"], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=2048)
        return torch.tensor(encoded["input_ids"]), encoded["offset_mapping"]

    def states(self, tokens: Int[Tensor, " T"]) -> tuple[Float[Tensor, "sites T d"], Float[Tensor, "T V"]]:
        out = self.model(tokens[None].to(runtime.device()), output_hidden_states=True)
        return torch.stack([out.hidden_states[layer][0].cpu() for layer in self.layers]), out.logits[0].cpu()

    def complete(self, question: str) -> str:
        tokens = self.encode(self.chat(question))[0][None].to(runtime.device())
        options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False)
        return self.tokenizer.decode(self.model.generate(tokens, **options)[0, tokens.shape[1] :].tolist())


class _StandIn:
    """A random model of characters in its place, in the ``smoke`` profile."""

    def __init__(self, n_sites: int) -> None:
        self.model = TinyLM(128, 16, n_sites // 2, 2, 64, generator=torch.Generator().manual_seed(0))
        self.n_sites = n_sites

    def chat(self, question: str) -> str:
        return question + " "

    def encode(self, text: str) -> tuple[Int[Tensor, " T"], list[tuple[int, int]]]:
        return torch.tensor([ord(letter) for letter in text]), [(k, k + 1) for k in range(len(text))]

    def states(self, tokens: Int[Tensor, " T"]) -> tuple[Float[Tensor, "sites T d"], Float[Tensor, "T V"]]:
        hidden = self.model.hidden_states(tokens[None])[: self.n_sites, 0]
        return hidden, self.model.read_out(hidden[-1])

    def complete(self, question: str) -> str:
        return "yes" if len(question) % 2 else "no"


def _rows(dataset: str) -> Iterator[dict]:
    """Annotated answers, or questions with accepted answers, as Hugging Face has them; stand-ins in ``smoke``."""
    if runtime.profile() == "smoke":
        for k in range(40):
            text, verdict = f"is {'very ' * (k % 2)}{k}?", list(_VERDICTS)[k % 3]
            annotations = [{"span": f"no {k}", "index": 5, "label": verdict}]
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": f"it is no {k}."}]
            yield {
                "conversation": turns,
                "annotations": annotations,
                "question": text,
                "answer": {"normalized_aliases": ["yes"]},
            }
        return
    from datasets import load_dataset

    if dataset == "triviaqa":
        yield from load_dataset("trivia_qa", "rc.nocontext", split="validation")
    else:
        yield from chain.from_iterable(load_dataset(f"obalcells/{dataset}-annotations", QWEN.split("/")[1]).values())


def _annotated(row: dict, dataset: str, llm: _Qwen | _StandIn) -> tuple[str, str, list[tuple[int, int, int, str]]]:
    """Question, answer, and for each span its ends in the answer, its label, and what is known of the truth."""
    if dataset == "triviaqa":
        answer, aliases = llm.complete(row["question"]), row["answer"]["normalized_aliases"]
        right = any(alias in answer.lower() for alias in aliases)
        return row["question"], answer, [(0, len(answer), int(not right), aliases[0])]
    question, answer = (turn["content"] for turn in row["conversation"][-2:])
    spans = []
    for note in row["annotations"]:
        text, start = note["span"] or "", note["index"]
        # Some annotations have no place, or a wrong one; then the first occurrence is taken.
        if not isinstance(start, int) or not answer.startswith(text, start):
            start = answer.find(text)
        if text and start >= 0 and note["label"] in _VERDICTS:
            spans.append((start, start + len(text), _VERDICTS[note["label"]], note["label"]))
    return question, answer, spans


@torch.no_grad()
def llm_spans(
    dataset: str, n_sites: int, n_answers: int, n_tokens: int, seed: int = 0
) -> tuple[GeneratedSpans, GeneratedSpans, GeneratedSpans]:
    """Spans for training, validation and test from answers of Qwen2.5-7B-Instruct, split by answer.

    The ``smoke`` profile puts a small random model and forty made-up answers in the place of model and data.

    Parameters
    ----------
    dataset
        ``"longfact"`` or ``"healthbench"``: long answers with annotated entities (Obeso et al. 2025), where a span
        that is not supported, or that nothing is found about, counts as hallucinated. ``"triviaqa"``: the model's
        greedy answer is the span, and right if it contains an accepted answer.
    n_sites
        Layers whose output is kept, evenly spread from the embedding to the last one.
    n_answers
        How many answers to read.
    n_tokens
        Length of the spans kept: a longer one is cut, a shorter one repeats its last token, which no maximum notices.
    seed
        Of the split.

    Raises
    ------
    ValueError
        If ``dataset`` is unknown or a number is too small.
    DataUnavailable
        If the model or the data cannot be had.
    """
    if dataset not in ("longfact", "healthbench", "triviaqa"):
        raise ValueError(f"dataset must be 'longfact', 'healthbench' or 'triviaqa', got {dataset!r}")
    if n_sites < 2 or n_answers < 7 or n_tokens < 1:
        raise ValueError(
            f"n_sites must be at least 2, n_answers 7, n_tokens 1, got {n_sites=}, {n_answers=}, {n_tokens=}"
        )
    try:
        llm = _StandIn(n_sites) if runtime.profile() == "smoke" else _Qwen(n_sites)
        rows = list(islice(_rows(dataset), n_answers))
    except Exception as error:  # missing packages, the network, the server
        raise DataUnavailable(
            f"{QWEN} or its answers to {dataset!r} could not be had: {error}. Install the packages datasets and "
            "transformers and connect to the internet, or set BOOK_PROFILE=book, which needs no download."
        ) from error
    found = []
    for number, row in enumerate(rows):
        question, answer, spans = _annotated(row, dataset, llm)
        opening = len(llm.chat(question))
        tokens, offsets = llm.encode(llm.chat(question) + answer)
        hidden, logits = llm.states(tokens)
        for start, end, label, truth in spans:
            inside = [k for k, (a, b) in enumerate(offsets) if a < opening + end and b > opening + start][:n_tokens]
            if inside:  # a text that was too long may have lost the span
                words = [(llm.chat(question) + answer)[slice(*offsets[k])] for k in inside]
                place = torch.tensor(inside + inside[-1:] * (n_tokens - len(inside)))
                log_p = logits[place - 1].float().log_softmax(-1)
                nll = -log_p.gather(-1, tokens[place, None]).squeeze(-1)
                entropy = -(log_p.exp() * log_p).sum(-1)
                found.append((number, hidden[:, place], label, nll, entropy, question, words, truth))
    number = torch.tensor([span[0] for span in found])
    parts = []
    for group in split_groups(len(rows), seed):
        chosen = [found[k] for k in torch.isin(number, group).nonzero().flatten().tolist()]
        _, hidden, labels, nll, entropy, *texts = map(list, zip(*chosen, strict=True))
        labels = torch.tensor(labels)
        doubts = torch.stack(nll), torch.stack(entropy)
        parts.append(GeneratedSpans(torch.stack(hidden, 1), labels, labels == 0, *doubts, *texts))
    return tuple(parts)
