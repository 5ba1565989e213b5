"""Encoding models of the visual brain: attention routes image patches to areas, against two linear baselines.

Adeli, Sun and Kriegeskorte, "Transformer brain encoders explain human high-level visual responses", NeurIPS 2025
(arXiv 2505.17329); details after the authors' code, Hosseinadeli/transformer_brain_encoder.

Image ``n`` is ``T`` tokens ``x_nt`` of ``d`` features, one per patch. The response of voxel ``v`` of area (region of
interest, ROI) ``r`` is ``y_nrv``. Responses are in units of the standard deviation of their signal.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from sklearn.datasets import get_data_home
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from companion import data, models, runtime, training

GRID = 5  # a scene has GRID x GRID cells, numbered row by row
CELLS = GRID * GRID
AREAS = {"FFA": (0, 0), "EBA": (1, 0), "PPA": (2, 0), "OFA": (0, 2)}  # (category it wants, first column it sees)
BASES = ("pixel", "random", "trained")
PENALTIES = (1e2, 1e3, 1e4, 3e4)

Tokens = Float[Tensor, "n T d"]
Responses = Float[Tensor, "n R V"]


# --- planted scenes ---------------------------------------------------------------------------------------------------


class Scenes(NamedTuple):
    """Images and what they evoke."""

    images: Float[Tensor, "n 25 8 8"]
    cells: Int[Tensor, "n 4"]  # where the digit of each category is, or -1
    signals: Responses  # without noise
    responses: Responses


class SceneData(NamedTuple):
    """Scenes for training and test, and the truth that was planted."""

    train: Scenes
    test: Scenes
    noise_ceiling: Float[Tensor, "R V"]  # of a single presentation, over the test images
    receptive_fields: Float[Tensor, "V 25"]  # of the voxels of V1
    roi_names: tuple[str, ...]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, classes and six style scores of the digits, and which of them may appear in training scenes."""
    x, digit = data.digits()
    for_training = np.zeros(len(x), dtype=bool)
    for_training[np.random.default_rng(0).permutation(len(x))[:1300]] = True
    return x.numpy(), digit.numpy(), data.whiten(x, 6).numpy(), for_training


def _draw(n: int, allowed: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (n, 25, 64) of scenes, the cell of each category (n, 4), and its digit image (n, 4)."""
    x, digit, *_ = _digits()
    targets = [rng.choice(np.flatnonzero(allowed & (digit == c)), (n, 1)) for c in range(4)]
    shown = np.hstack([*targets, rng.choice(np.flatnonzero(allowed & (digit > 3)), (n, 6))])
    present = np.hstack([rng.random((n, 4)) < 0.7, np.arange(6) < rng.integers(3, 7, (n, 1))])
    cells = rng.permuted(np.tile(np.arange(CELLS), (n, 1)), axis=1)[:, :10]  # no two digits share a cell
    pixels = rng.normal(0.15, 0.12, (n, CELLS, 64)).clip(0, 1)
    scene, item = present.nonzero()
    pixels[scene, cells[scene, item]] = x[shown[scene, item]]
    pixels = (pixels + rng.normal(0, 0.08, pixels.shape)).clip(0, 1)
    return pixels, np.where(present, cells, -1)[:, :4], shown[:, :4]


def make_scene_dataset(
    seed: int, n_train: int = 2400, n_test: int = 600, n_voxels: int = 20, snr: float = 1.0
) -> SceneData:
    r"""Scenes of digits on a 5 x 5 grid, and the responses of five areas whose routing we know.

    Digits 0, 1, 2, 3 are the categories, each present with probability 0.7 in a random cell; 3 to 6 other digits
    distract. A voxel of V1 sums pixels of a fixed place. A voxel of FFA, EBA or PPA answers only where its category is
    present, with :math:`a_v+1.2\,c^\top B_v`, where c are six style scores of the digit image: it must know *which*
    token to read. OFA does so for category 0, in the three right columns only. Digit images of test scenes never occur
    in training scenes. Signals are standardised on the training scenes.

    Parameters
    ----------
    seed
        Of scenes, voxels and noise.
    n_train, n_test, n_voxels
        Numbers of scenes, and of voxels per area.
    snr
        Variance of the signal over that of the noise.

    Raises
    ------
    ValueError
        If ``snr`` is not positive, there are fewer than two scenes of a kind, or no voxels.
    """
    if not snr > 0:
        raise ValueError(f"snr must be positive, got {snr}")
    if min(n_train, n_test) < 2 or n_voxels < 1:
        raise ValueError(f"n_train, n_test, n_voxels must be at least 2, 2, 1, got {n_train=}, {n_test=}, {n_voxels=}")
    rng = np.random.default_rng(seed)
    _, _, style, for_training = _digits()
    centre = rng.integers(GRID, size=(n_voxels, 1, 2))
    place = np.stack(np.divmod(np.arange(CELLS), GRID), 1)
    fields = np.exp(-((place - centre) ** 2).sum(2) / (2 * 0.6**2))
    filters = rng.normal(size=(n_voxels, 64))
    filters /= np.linalg.norm(filters, axis=1, keepdims=True)
    tuning = {area: (rng.normal(1, 0.3, n_voxels), rng.normal(0, 6**-0.5, (6, n_voxels))) for area in AREAS}

    def observe(n: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pixels, cells, shown = _draw(n, allowed, rng)
        signals = [np.einsum("vt,ntv->nv", fields, pixels @ filters.T)]
        for area, (category, column) in AREAS.items():
            seen = (cells[:, category] >= 0) & (cells[:, category] % GRID >= column)
            a, B = tuning[area]
            signals.append(seen[:, None] * (a + 1.2 * style[shown[:, category]] @ B))
        return pixels, cells, np.stack(signals, 1)

    parts = [observe(n_train, for_training), observe(n_test, ~for_training)]
    mean, std = parts[0][2].mean(0), parts[0][2].std(0)
    scenes = []
    for pixels, cells, signals in parts:
        signals = (signals - mean) / std
        responses = signals + rng.normal(0, snr**-0.5, signals.shape)
        images, signals, responses = (torch.from_numpy(a).float() for a in (pixels, signals, responses))
        scenes.append(Scenes(images.view(-1, CELLS, 8, 8), torch.from_numpy(cells), signals, responses))
    power = scenes[1].signals.var(0)
    ceiling, fields = power / (power + 1 / snr), torch.from_numpy(fields).float()
    return SceneData(*scenes, ceiling, fields, ("V1", *AREAS))


def patch_features(images: Float[Tensor, "n 25 8 8"], basis: str, seed: int = 7) -> Float[Tensor, "n 25 64"]:
    """One token of 64 features per cell: a stand-in for the frozen backbone.

    Parameters
    ----------
    images
        Scenes, cut into cells.
    basis
        ``"pixel"``: grey values less 0.3. ``"random"``: ReLU of a fixed random map of the pixels. ``"trained"``: the
        hidden layer of a network that was trained to name single digits (those of training scenes).
    seed
        Of the random map, or of that network's training.

    Raises
    ------
    ValueError
        If the basis is unknown, or a cell does not have 64 pixels.
    """
    if basis not in BASES:
        raise ValueError(f"basis must be one of {', '.join(BASES)}, got {basis!r}")
    pixels = images.flatten(2)
    if pixels.shape[-1] != 64:
        raise ValueError(f"images must hold cells of 8 x 8 pixels, got shape {tuple(images.shape)}")
    if basis == "pixel":
        return pixels - 0.3
    if basis == "random":
        generator = torch.Generator().manual_seed(seed)
        weight, bias = torch.randn(65, 64, generator=generator).split([64, 1])
        return F.relu(pixels @ weight / 4 + 0.3 * bias)
    weight, bias = _trained_layer(seed)
    return F.relu(pixels @ weight + bias)


@cache
def _trained_layer(seed: int) -> tuple[Tensor, Tensor]:
    x, digit, _, for_training = _digits()
    network = MLPClassifier((64,), max_iter=40, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 40 epochs are enough for features
        network.fit(x[for_training], digit[for_training])
    return torch.from_numpy(network.coefs_[0]).float(), torch.from_numpy(network.intercepts_[0]).float()


def standardise(tokens: Tokens, reference: Tokens) -> Tokens:
    """Give every feature the mean 0 and the standard deviation 1 that it has in ``reference``, over images and tokens.

    Raises
    ------
    ValueError
        If the two differ in the number of tokens or features.
    """
    if tokens.shape[1:] != reference.shape[1:]:
        raise ValueError(f"tokens and reference must agree, got {tuple(tokens.shape)} and {tuple(reference.shape)}")
    return (tokens - reference.mean((0, 1))) / (reference.std((0, 1)) + 1e-6)


# --- encoding models --------------------------------------------------------------------------------------------------


def _check_tokens(tokens: Tensor, n_tokens: int, dim: int) -> None:
    if tokens.ndim != 3 or tuple(tokens.shape[1:]) != (n_tokens, dim):
        raise ValueError(f"tokens must have shape (n, {n_tokens}, {dim}), got {tuple(tokens.shape)}")


class TransformerBrainEncoder(nn.Module):
    """A learned query per area attends to the tokens; one readout per voxel. Values are the tokens themselves.

    Parameters
    ----------
    dim, n_tokens
        Features per token, and tokens per image.
    n_rois, n_voxels
        Areas, and voxels per area.
    n_heads
        Each head sees ``dim / n_heads`` of the features.
    queries
        ``"roi"``: the voxels of an area share one query. ``"voxel"``: each voxel has its own.
    generator
        Source of the initial weights.

    Raises
    ------
    ValueError
        If ``dim`` is not divisible by ``n_heads``, a size is not positive, or ``queries`` is unknown.

    Notes
    -----
    The paper's decoder: one layer, no self-attention. Its key bias is left out, since a softmax does not see it.
    """

    def __init__(
        self,
        dim: int,
        n_tokens: int,
        n_rois: int,
        n_voxels: int,
        n_heads: int = 4,
        queries: str = "roi",
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if min(dim, n_tokens, n_rois, n_voxels, n_heads) < 1 or dim % n_heads:
            raise ValueError(f"sizes must be positive and dim divisible by n_heads, got {dim=}, {n_heads=}")
        if queries not in ("roi", "voxel"):
            raise ValueError(f"queries must be 'roi' or 'voxel', got {queries!r}")
        self.n_heads, self.n_rois = n_heads, n_rois
        n_queries = n_rois if queries == "roi" else n_rois * n_voxels
        self.query = nn.Parameter(0.1 * torch.randn(n_queries, dim, generator=generator))
        self.position = nn.Parameter(0.1 * torch.randn(n_tokens, dim, generator=generator))
        linear = partial(models.mlp, [dim, dim], generator=generator)
        self.to_query, self.to_key, self.output = linear()[0], linear(bias=False)[0], linear()[0]
        ffn = models.mlp([dim, 2 * dim, dim], generator=generator, activation=nn.GELU)
        self.ffn = nn.Sequential(nn.LayerNorm(dim), *ffn, nn.Dropout(0.1))
        self.readout = nn.Parameter(dim**-0.5 * torch.randn(n_rois, n_voxels, dim, generator=generator))
        self.bias = nn.Parameter(torch.zeros(n_rois, n_voxels))

    def filters(self) -> Float[Tensor, "Q H d"]:
        """What each query looks for: its score of a token is a linear filter, applied to content plus position."""
        q = self.to_query(self.query).unflatten(1, (self.n_heads, -1))
        keys = self.to_key.weight.unflatten(0, (self.n_heads, -1))
        return torch.einsum("qhk,hkd->qhd", q, keys) * q.shape[-1] ** -0.5

    def attention(self, tokens: Tokens) -> Float[Tensor, "n Q H T"]:
        """Weights over tokens, which sum to 1, of each query (an area, or a voxel: area by area) and head."""
        _check_tokens(tokens, *self.position.shape)
        u = self.filters()
        content = torch.einsum("ntd,qhd->nqht", tokens, u)
        place = torch.einsum("td,qhd->qht", self.position, u)
        return (content + place).softmax(-1)

    def forward(self, tokens: Tokens, attention: Float[Tensor, "*n Q H T"] | None = None) -> Responses:
        """Predicted responses; an ``attention`` that is handed in takes the place of the model's own."""
        attention = self.attention(tokens) if attention is None else attention.expand(len(tokens), -1, -1, -1)
        values = tokens.unflatten(2, (self.n_heads, -1))
        o = self.output(torch.einsum("nqht,nthk->nqhk", attention, values).flatten(2))
        o = (o + self.ffn(o)).unflatten(1, (self.n_rois, -1))  # the last axis but one: 1 query, or one per voxel
        return torch.einsum("nrvd,rvd->nrv", o, self.readout) + self.bias


class SpatialFeatureEncoder(nn.Module):
    """A static map of positions times a vector of features for each voxel, the factorised linear model.

    Parameters
    ----------
    dim, n_tokens, n_rois, n_voxels, generator
        As for :class:`TransformerBrainEncoder`.

    Raises
    ------
    ValueError
        If a size is not positive.
    """

    def __init__(self, dim: int, n_tokens: int, n_rois: int, n_voxels: int, *, generator: torch.Generator) -> None:
        super().__init__()
        if min(dim, n_tokens, n_rois, n_voxels) < 1:
            raise ValueError(f"sizes must be positive, got {dim=}, {n_tokens=}, {n_rois=}, {n_voxels=}")
        self.place = nn.Parameter(torch.zeros(n_rois, n_voxels, n_tokens))
        self.readout = nn.Parameter(dim**-0.5 * torch.randn(n_rois, n_voxels, dim, generator=generator))
        self.bias = nn.Parameter(torch.zeros(n_rois, n_voxels))

    def receptive_fields(self) -> Float[Tensor, "R V T"]:
        """The map of each voxel, which sums to 1 over positions."""
        return self.place.softmax(-1)

    def forward(self, tokens: Tokens) -> Responses:
        """Predicted responses."""
        _check_tokens(tokens, self.place.shape[-1], self.readout.shape[-1])
        seen = torch.einsum("ntd,rvd->nrvt", tokens, self.readout)
        return torch.einsum("nrvt,rvt->nrv", seen, self.receptive_fields()) + self.bias


class LinearEncoder:
    """Ridge regression from all tokens and features at once, fitted when it is made.

    Parameters
    ----------
    tokens, responses
        Training images. The last fifth of them chooses the penalty; the final fit uses all.
    penalties
        The candidates; ``penalty`` is the chosen one.

    Raises
    ------
    ValueError
        If the numbers of images differ, there are fewer than five, or there is no penalty.
    """

    def __init__(self, tokens: Tokens, responses: Responses, penalties: Sequence[float] = PENALTIES) -> None:
        if len(tokens) != len(responses) or len(tokens) < 5 or not penalties:
            raise ValueError(
                "tokens and responses must hold the same 5 images or more, and penalties one number or more, got "
                f"{len(tokens)}, {len(responses)} and {len(penalties)}"
            )
        self.shapes = tokens.shape[1:], responses.shape[1:]
        x, y = tokens.flatten(1).numpy(), responses.flatten(1).numpy()
        cut = len(x) * 4 // 5

        def held_out_error(penalty: float) -> float:
            return ((Ridge(alpha=penalty).fit(x[:cut], y[:cut]).predict(x[cut:]) - y[cut:]) ** 2).mean()

        self.penalty = min(penalties, key=held_out_error)
        self.ridge = Ridge(alpha=self.penalty).fit(x, y)

    def __call__(self, tokens: Tokens) -> Responses:
        """Predicted responses."""
        _check_tokens(tokens, *self.shapes[0])
        return torch.from_numpy(self.ridge.predict(tokens.flatten(1).numpy())).float().unflatten(1, self.shapes[1])

    def importance(self, tokens: Tokens) -> Float[Tensor, "n R T"]:
        """How much each token moves the prediction of an area: root mean square over voxels of its share."""
        _check_tokens(tokens, *self.shapes[0])
        weights = torch.from_numpy(self.ridge.coef_).float().view(*self.shapes[1], *self.shapes[0])
        shares = torch.einsum("ntd,rvtd->nrvt", tokens, weights)
        return shares.square().mean(2).sqrt()


# --- fitting and scoring ----------------------------------------------------------------------------------------------


def fit_encoder(
    model: nn.Module,
    tokens: Tokens,
    responses: Responses,
    epochs: int,
    lr: float,
    weight_decay: float,
    seed: int,
    batch_size: int = 100,
) -> Float[Tensor, " epochs"]:
    """Train a model in place on the squared error, with AdamW and a one-cycle learning rate; the loss by epoch.

    Parameters
    ----------
    model
        Maps tokens to responses; left in evaluation mode, on its device.
    tokens, responses
        Training images, moved to the model's device batch by batch.
    epochs, lr, weight_decay, batch_size
        Passes over the images, largest learning rate, AdamW's weight decay, images per step.
    seed
        Of the order of images and of dropout; the global state of PyTorch is left as it was.

    Raises
    ------
    ValueError
        If the numbers of images differ, ``epochs`` or ``lr`` is not positive, or a batch holds no image or too many.
    """
    if len(tokens) != len(responses):
        raise ValueError(f"tokens and responses must hold the same images, got {len(tokens)} and {len(responses)}")
    if epochs < 1 or not lr > 0 or not 1 <= batch_size <= len(tokens):
        raise ValueError(
            f"epochs must be at least 1, lr positive, and batch_size between 1 and the {len(tokens)} images, "
            f"got {epochs=}, {lr=}, {batch_size=}"
        )
    device, per_epoch = next(model.parameters()).device, len(tokens) // batch_size
    batches = training.minibatches(len(tokens), batch_size, torch.Generator().manual_seed(seed))

    def loss(_: int) -> Tensor:
        rows = next(batches)
        return F.mse_loss(model(tokens[rows].to(device).float()), responses[rows].to(device))

    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout draws from PyTorch's global generator
        model.train()
        history = training.fit(
            loss,
            model.parameters(),
            steps=epochs * per_epoch,
            lr=lr,
            optimizer=partial(AdamW, weight_decay=weight_decay, fused=True),
            schedule=partial(OneCycleLR, max_lr=lr, total_steps=epochs * per_epoch),
            record_every=per_epoch,
        )
        model.eval()
    return history["loss"][1:]


def noise_ceiling(repeats: Float[Tensor, "k n *voxels"], n_averaged: int = 1) -> Float[Tensor, "*voxels"]:
    """Share of the variance over images that is signal, from repeated presentations of the same images.

    Parameters
    ----------
    repeats
        Responses to ``n`` images, each shown ``k`` times.
    n_averaged
        Number ``m`` of presentations that the responses to be predicted are averaged over.

    Raises
    ------
    ValueError
        If there are fewer than two repeats or images, or ``n_averaged`` is smaller than 1.

    Notes
    -----
    Source: the convention of the Natural Scenes Dataset.
    """
    if repeats.ndim < 2 or min(repeats.shape[:2]) < 2 or n_averaged < 1:
        raise ValueError(
            "repeats must hold 2 presentations and 2 images or more, and n_averaged be at least 1, got shape "
            f"{tuple(repeats.shape)} and {n_averaged=}"
        )
    noise = repeats.var(0).mean(0)
    signal = (repeats.mean(0).var(0) - noise / len(repeats)).clamp(min=0)
    return signal / (signal + noise / n_averaged)


def explained_variance_fraction(
    pred: Float[Tensor, "n *voxels"], target: Float[Tensor, "n *voxels"], noise_ceiling: Float[Tensor, "*voxels"]
) -> Float[Tensor, "*voxels"]:
    """Signed squared correlation over images as a fraction of the noise ceiling: 1 is as good as any model can be.

    A prediction that does not vary explains nothing: 0.

    Raises
    ------
    ValueError
        If the shapes do not fit, or a noise ceiling is not positive.
    """
    if pred.shape != target.shape or pred.shape[1:] != noise_ceiling.shape:
        shapes = ", ".join(str(tuple(part.shape)) for part in (pred, target, noise_ceiling))
        raise ValueError(f"pred and target must agree, and noise_ceiling have one entry per voxel, got shapes {shapes}")
    if not (noise_ceiling > 0).all():
        raise ValueError(f"noise_ceiling must be positive, got a smallest entry of {noise_ceiling.min()}")
    rho = F.cosine_similarity(pred - pred.mean(0), target - target.mean(0), dim=0)
    return rho * rho.abs() / noise_ceiling


# --- recorded brains --------------------------------------------------------------------------------------------------


class Recording(NamedTuple):
    """Tokens and responses of one subject, in random order; a tenth of the images is for test."""

    tokens: Tokens
    test_tokens: Tokens
    responses: Responses
    test_responses: Responses
    roi_names: tuple[str, ...]


_LOCALISERS = ("prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words")


def algonauts(subject: str, n_vertices: int, seed: int) -> Recording:
    """One subject of the Algonauts 2023 challenge (Natural Scenes Dataset), with DINOv2 ViT-B/14 tokens of the images.

    The data need a registration (algonautsproject.com). Unpack ``subj01`` … ``subj08`` into the folder
    ``algonauts2023`` beside the book's other data (``SCIKIT_LEARN_DATA``, default ``~/scikit_learn_data``). Tokens are
    31 x 31 patches of 768 features, kept in half precision (15 GB for a subject). In the ``smoke`` profile planted
    scenes stand in.

    Parameters
    ----------
    subject
        ``"subj01"`` to ``"subj08"``.
    n_vertices
        Vertices of the cortical surface that are kept of each area, drawn at random; smaller areas are left out.
    seed
        Of that draw, and of the split.

    Raises
    ------
    DataUnavailable
        If the recordings are not there, or DINOv2 cannot be had.
    """
    rng = np.random.default_rng(seed)
    if runtime.profile() == "smoke":
        scenes = make_scene_dataset(seed, 100, 2, n_vertices).train
        tokens, responses, names = patch_features(scenes.images, "pixel"), scenes.responses, ("V1", *AREAS)
    else:
        folder = Path(get_data_home(), "algonauts2023", subject)
        if not (folder / "training_split").is_dir():
            raise data.DataUnavailable(
                f"the recordings of {subject!r} are not in {folder}. Register at algonautsproject.com and unpack them "
                "there, or set BOOK_PROFILE=book, which needs no data."
            )
        responses, names = _areas(folder, n_vertices, rng)
        tokens = _dinov2(sorted((folder / "training_split" / "training_images").glob("*.png")))
    test, train = torch.from_numpy(rng.permutation(len(tokens))).split([len(tokens) // 10, -(-len(tokens) * 9 // 10)])
    return Recording(tokens[train], tokens[test], responses[train], responses[test], names)


def _areas(folder: Path, n_vertices: int, rng: np.random.Generator) -> tuple[Responses, tuple[str, ...]]:
    """Responses (images, areas, vertices) of both hemispheres, and the names of the areas."""
    found = {}
    for side in ("lh", "rh"):
        activity = np.load(folder / "training_split" / "training_fmri" / f"{side}_training_fmri.npy")
        for localiser in _LOCALISERS:
            names = np.load(folder / "roi_masks" / f"mapping_{localiser}.npy", allow_pickle=True).item()
            label = np.load(folder / "roi_masks" / f"{side}.{localiser}_challenge_space.npy")
            for number, name in names.items():
                vertices = np.flatnonzero(label == number)
                if number and len(vertices) >= n_vertices:
                    found[f"{side} {name}"] = activity[:, rng.choice(vertices, n_vertices, replace=False)]
    return torch.from_numpy(np.stack([*found.values()], 1)).float(), tuple(found)


@torch.no_grad()
def _dinov2(paths: Sequence[Path]) -> Float[Tensor, "n 961 768"]:
    """Patch tokens of the last layer for 434 x 434 pixels, in half precision."""
    try:
        network = torch.hub.load("facebookresearch/dinov2", "dinov2_vitb14").to(runtime.device()).eval()
    except Exception as error:  # of the network, the server or the hub
        raise data.DataUnavailable(
            f"DINOv2 could not be had: {error}. Connect to the internet, or set BOOK_PROFILE=book."
        ) from error
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    tokens = torch.empty(len(paths), 961, 768, dtype=torch.float16)
    for row, path in enumerate(paths):
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB").resize((434, 434)))).movedim(-1, 0) / 255
        image = ((pixels - mean) / std)[None].to(runtime.device())
        tokens[row] = network.get_intermediate_layers(image, n=1)[0][0].half().cpu()
    return tokens
