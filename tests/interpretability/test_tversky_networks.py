"""Oracles: values of the library verskyt, Jaccard and Dice, sums written out, set identities, XOR by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import dice
from sklearn.metrics import jaccard_score
from torch import nn
from torch.nn import functional as F

from companion import data, models, training
from companion.interpretability import tversky_networks as tn
from companion.interpretability.tversky_networks import (
    Decoder,
    TverskyProjection,
    descriptions,
    fit_classifiers,
    image_batches,
    penn_treebank,
    prototype_attribution,
    salience,
    text_batches,
    train_xor,
    tversky_similarity,
)

REDUCTIONS = list(product(("product", "min"), ("ignorematch", "subtractmatch")))
SMALL = dict(width=8, heads=2, layers=1, context=6, mlp_width=8, n_features=5, scale=0.1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def objects(seed, n=4, p=3, n_features=6, d=5, dtype=torch.float64):
    return [
        torch.randn(m, d, generator=generator(seed + 1000 * k), dtype=dtype) for k, m in enumerate((n, p, n_features))
    ]


def written_out(x, p, features, alpha, beta, theta, intersection, difference):
    """The definition, one feature at a time."""
    score = 0.0
    for f in features:
        a, b = float(x @ f), float(p @ f)
        if a > 0 and b > 0:
            score += theta * (a * b if intersection == "product" else min(a, b))
        if difference == "ignorematch":
            score -= alpha * a * (a > 0 and b <= 0) + beta * b * (b > 0 and a <= 0)
        elif a > 0 and b > 0:
            score -= alpha * max(a - b, 0) + beta * max(b - a, 0)
    return score


# --- similarity -------------------------------------------------------------------------------------------------------

# From verskyt 0.2.4 (tversky_contrast_similarity and tversky_similarity) for the objects of the test below.
VERSKYT = {
    ("product", "ignorematch"): (
        [[-2.606621, -1.134701], [2.88276, 1.252259]],
        [[0.0, 0.0], [1.0, 0.914152]],
    ),
    ("product", "subtractmatch"): (
        [[0.0, 0.0], [1.792953, 1.097924]],
        [[1.0, 1.0], [0.687923, 0.812856]],
    ),
    ("min", "ignorematch"): (
        [[-2.606621, -1.134701], [2.318524, 1.313298]],
        [[0.0, 0.0], [1.0, 0.917539]],
    ),
    ("min", "subtractmatch"): (
        [[0.0, 0.0], [1.228718, 1.158963]],
        [[1.0, 1.0], [0.639365, 0.81945]],
    ),
}


@pytest.mark.parametrize("reductions", REDUCTIONS)
def test_similarity_is_that_of_an_independent_library(reductions):
    x = torch.arange(6.0).view(2, 3).sin()
    prototypes = (1.7 * torch.arange(6.0) + 0.4).view(2, 3).cos()
    features = (2.3 * torch.arange(15.0) + 1).view(5, 3).sin()
    contrast, ratio = VERSKYT[reductions]
    measured = tversky_similarity(x, prototypes, features, 0.3, 0.7, 1.2, *reductions)
    torch.testing.assert_close(measured, torch.tensor(contrast), atol=1e-5, rtol=0)
    measured = tversky_similarity(x, prototypes, features, 0.3, 0.7, 1.0, *reductions, form="ratio")
    torch.testing.assert_close(measured, torch.tensor(ratio), atol=1e-5, rtol=0)


@pytest.mark.parametrize("reductions", REDUCTIONS)
def test_matrix_products_are_the_sum_over_features(reductions):
    x, prototypes, features = objects(0)
    measured = tversky_similarity(x, prototypes, features, 0.3, -0.7, 1.2, *reductions)
    expected = [[written_out(a, b, features, 0.3, -0.7, 1.2, *reductions) for b in prototypes] for a in x]
    torch.testing.assert_close(measured, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("reductions", REDUCTIONS)
def test_batch_axes_are_independent(reductions):
    runs = [objects(seed) for seed in range(3)]
    x, prototypes, features = (torch.stack(parts) for parts in zip(*runs, strict=True))
    alpha = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)[:, None, None]
    together = tversky_similarity(x, prototypes, features, alpha, 0.5, 1.0, *reductions)
    alone = [tversky_similarity(*run, float(a), 0.5, 1.0, *reductions) for run, a in zip(runs, alpha, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), alpha=st.floats(-2, 2), beta=st.floats(-2, 2), which=st.sampled_from(REDUCTIONS))
def test_asymmetry_is_the_difference_of_the_scalars(seed, alpha, beta, which):
    x, y, features = objects(seed, n=3, p=3)
    there = tversky_similarity(x, y, features, alpha, beta, 1.0, *which)
    back = tversky_similarity(y, x, features, alpha, beta, 1.0, *which).mT
    only_x = -tversky_similarity(x, y, features, 1.0, 0.0, 0.0, *which)
    only_y = -tversky_similarity(x, y, features, 0.0, 1.0, 0.0, *which)
    torch.testing.assert_close(there - back, (beta - alpha) * (only_x - only_y))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), c=st.floats(0.1, 10), difference=st.sampled_from(["ignorematch", "subtractmatch"]))
def test_min_is_homogeneous_and_the_product_of_degree_two(seed, c, difference):
    x, prototypes, features = objects(seed)
    base = tversky_similarity(x, prototypes, features, 0.4, 0.6, 1.0, "min", difference)
    scaled = tversky_similarity(c * x, c * prototypes, features, 0.4, 0.6, 1.0, "min", difference)
    torch.testing.assert_close(scaled, c * base)
    common = tversky_similarity(x, prototypes, features, 0.0, 0.0, 1.0, "product", difference)
    scaled = tversky_similarity(c * x, c * prototypes, features, 0.0, 0.0, 1.0, "product", difference)
    torch.testing.assert_close(scaled, c**2 * common)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_sets_add_up_under_min_with_both_differences(seed):
    x, prototypes, features = objects(seed)
    common = tversky_similarity(x, prototypes, features, 0.0, 0.0, 1.0, "min")
    only_x, only_p = (
        -sum(tversky_similarity(x, prototypes, features, *w, 0.0, "min", d) for d in ("ignorematch", "subtractmatch"))
        for w in ((1.0, 0.0), (0.0, 1.0))
    )
    f_x, f_p = salience(x, features)[:, None], salience(prototypes, features)
    torch.testing.assert_close(common + only_x, f_x.expand_as(common))
    torch.testing.assert_close(only_x - only_p, f_x - f_p)
    a, b = (x @ features.T).relu(), (prototypes @ features.T).relu()
    torch.testing.assert_close(only_x + only_p, torch.cdist(a, b, p=1))  # min makes the contrast an L1 distance


@pytest.mark.parametrize(("weight", "name"), [(1.0, "jaccard"), (0.5, "dice")])
def test_ratio_of_binary_sets_is_jaccard_and_dice(weight, name):
    rows = (torch.rand(6, 9, generator=generator(3)) < 0.5).double()
    measured = tversky_similarity(rows, rows, torch.eye(9, dtype=torch.float64), weight, weight, form="ratio")
    sets = rows.bool().numpy()
    score = jaccard_score if name == "jaccard" else lambda a, b: 1 - dice(a, b)
    np.testing.assert_allclose(measured.numpy(), [[score(a, b) for b in sets] for a in sets], atol=1e-6)


def test_an_object_is_like_itself_and_empty_sets_are_alike():
    x, _, features = objects(5)
    for difference in ("ignorematch", "subtractmatch"):
        itself = tversky_similarity(x, x, features, 0.3, 0.9, 1.0, "min", difference, form="ratio").diagonal()
        torch.testing.assert_close(itself, torch.ones_like(itself))
    nothing = torch.zeros(1, 5, dtype=torch.float64)
    assert tversky_similarity(nothing, nothing, features, 1.0, 1.0, form="ratio").item() == 1
    assert salience(nothing, features).item() == 0
    torch.testing.assert_close(salience(x, features), tversky_similarity(x, -x, features, -1.0, 0.0)[:, :].diagonal())


def test_bad_objects_and_names_are_refused():
    x, prototypes, features = objects(0)
    with pytest.raises(ValueError, match=r"x \(n, d\) and features"):
        salience(x[:, :4], features)
    with pytest.raises(ValueError, match="prototypes"):
        tversky_similarity(x, prototypes[:, :4], features, 1.0, 1.0)
    with pytest.raises(ValueError, match="x "):
        salience(x[0], features)
    for wrong in ({"intersection": "max"}, {"difference": "substractmatch"}, {"form": "sum"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            tversky_similarity(x, prototypes, features, 1.0, 1.0, **wrong)


# --- layer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reductions", REDUCTIONS)
def test_layer_computes_the_similarity_and_attributions_sum_to_it(reductions):
    layer = TverskyProjection(
        5, 3, 7, generator=generator(), alpha=0.2, beta=0.9, theta=1.5, intersection=reductions[0],
        difference=reductions[1], scale=0.3,
    )  # fmt: skip
    x = torch.randn(2, 4, 5, generator=generator(1))
    scores = layer(x)
    assert scores.shape == (2, 4, 3)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 3 * 5 + 7 * 5 + 3
    assert layer.prototypes.abs().max() <= 1
    direct = tversky_similarity(x[1], layer.prototypes, layer.features, 0.2, 0.9, 1.5, *reductions)
    torch.testing.assert_close(scores[1], 0.3 * direct)
    parts = prototype_attribution(layer, x[1, 2], 1)
    assert {part.shape for part in parts.values()} == {(7,)}
    torch.testing.assert_close(sum(part.sum() for part in parts.values()), scores[1, 2, 1].detach())
    assert (parts["common"] >= 0).all()
    assert (parts["only_x"] <= 0).all()
    assert (parts["only_prototype"] <= 0).all()


def test_every_parameter_but_the_indicators_learns():
    layer = TverskyProjection(5, 3, 7, generator=generator(), intersection="min")
    layer(torch.randn(8, 5, generator=generator(1))).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_a_linear_layer_is_the_common_part_over_signed_coordinates():
    """With the bank ±identity and no differences, x·p splits into agreeing signs; the layer keeps these."""
    x, prototypes, _ = objects(2)
    eye = torch.eye(5, dtype=torch.float64)
    agree = tversky_similarity(x, prototypes, torch.cat([eye, -eye]), 0.0, 0.0)
    clash = tversky_similarity(x, -prototypes, torch.cat([eye, -eye]), 0.0, 0.0)
    torch.testing.assert_close(agree - clash, x @ prototypes.T)


def test_shared_parameters_are_shared_and_checked():
    bank, embedding = nn.Parameter(torch.ones(7, 5)), nn.Parameter(torch.ones(3, 5))
    layer = TverskyProjection(5, 3, 7, generator=generator(), features=bank, prototypes=embedding)
    assert layer.features is bank
    assert layer.prototypes is embedding
    with pytest.raises(ValueError, match=r"features must have shape \(8, 5\)"):
        TverskyProjection(5, 3, 8, generator=generator(), features=bank)
    with pytest.raises(ValueError, match="prototypes must have shape"):
        TverskyProjection(5, 2, 7, generator=generator(), prototypes=embedding)
    with pytest.raises(ValueError, match="sizes must be positive"):
        TverskyProjection(5, 0, 7, generator=generator())
    with pytest.raises(ValueError, match="intersection"):
        TverskyProjection(5, 3, 7, generator=generator(), intersection="sum")
    with pytest.raises(ValueError, match="x must be a vector of 5"):
        prototype_attribution(layer, torch.ones(4), 0)
    with pytest.raises(ValueError, match="j must be between 0 and 2"):
        prototype_attribution(layer, torch.ones(5), 3)


# --- XOR --------------------------------------------------------------------------------------------------------------


def test_xor_by_hand():
    features = torch.tensor([[-1.0, -1.0], [-1.0, 0.0], [1.0, 1.0]])
    prototypes = torch.tensor([[2.0, 2.0], [-1.0, -1.0]])
    scores = tversky_similarity(tn.XOR_INPUTS, prototypes, features, 2.0, -1.0, 0.0)
    assert scores.tolist() == [[4, 3], [0, 1], [0, 1], [0, -1]]
    assert (scores.argmax(1) == tn.XOR_LABELS).all()


def test_xor_is_learned_often_with_min_and_the_outcome_is_reproducible():
    outcome = train_xor(60, 16, "min", "ignorematch", seed=0)
    assert outcome["success"].float().mean() > 0.5
    assert (outcome["success"] <= outcome["argmax"]).all()
    assert {value.shape for value in outcome.values()} == {(60,)}
    again = train_xor(60, 16, "min", "ignorematch", seed=0)
    assert all(torch.equal(outcome[key], again[key]) for key in outcome)


@pytest.mark.parametrize("intersection", ["product", "min"])
def test_the_empty_set_ties_under_subtractmatch_unless_the_coding_changes(intersection):
    outcome = train_xor(40, 16, intersection, "subtractmatch", seed=0, steps=200)
    assert not outcome["success"].any()
    assert outcome["argmax"].any()
    if intersection == "min":
        assert train_xor(40, 16, "min", "subtractmatch", seed=0, inputs=2 * tn.XOR_INPUTS - 1)["success"].any()


def test_bad_xor_settings_are_refused():
    with pytest.raises(ValueError, match="n_runs and n_features"):
        train_xor(0, 4, "min", "ignorematch", seed=0)
    with pytest.raises(ValueError, match="difference"):
        train_xor(2, 4, "min", "ignore", seed=0)


# --- training side by side --------------------------------------------------------------------------------------------


def test_networks_side_by_side_train_as_if_alone():
    x = torch.randn(2, 30, 4, generator=generator(1), dtype=torch.float64)
    y = torch.randint(3, (2, 30), generator=generator(2))
    networks = [TverskyProjection(4, 3, 6, generator=generator(seed)).double() for seed in range(2)]
    together = training.Ensemble(networks)
    fit_classifiers(together, image_batches(x, y, 10, generator(5)), steps=15, lr=0.01, optimizer=torch.optim.SGD)
    batches = image_batches(x, y, 10, generator(5))
    update = torch.optim.SGD(networks[1].parameters(), lr=0.01)
    for _ in range(15):
        x_batch, y_batch = next(batches)
        update.zero_grad()
        F.cross_entropy(networks[1](x_batch[1]), y_batch[1]).backward()
        update.step()
    torch.testing.assert_close(together.each(x)[1], networks[1](x[1]))


def test_training_ends_in_evaluation_mode():
    together = training.Ensemble([models.resnet(1, [4], 1, 3, generator=generator(seed)) for seed in range(2)])
    x, y = torch.randn(2, 12, 1, 8, 8, generator=generator(1)), torch.randint(3, (2, 12), generator=generator(2))
    fit_classifiers(together, image_batches(x, y, 6, generator(5)), steps=2, lr=0.01)
    # In training mode the outputs of one image would depend on the others, through the batch's mean and variance.
    torch.testing.assert_close(together.each(x)[:, :3], together.each(x[:, :3]))


def test_image_batches_pair_inputs_with_labels_and_augment():
    x = torch.arange(20.0).view(2, 10, 1)
    inputs, labels = next(image_batches(x, x[..., 0].long(), 4, generator(), lambda x, _: -x))
    assert torch.equal(-inputs[..., 0], labels.float())
    with pytest.raises(ValueError, match="batch_size"):
        next(image_batches(x, x[..., 0].long(), 11, generator()))


# --- language models --------------------------------------------------------------------------------------------------


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("variant", ["linear", "tversky", "shared"])
def test_decoder_is_causal_and_shares_what_it_says(variant):
    network = Decoder(11, variant=variant, generator=generator(), **SMALL)
    symbols = torch.randint(11, (2, 6), generator=generator(1))
    other = symbols.clone()
    other[:, 4] = (other[:, 4] + 1) % 11
    with torch.no_grad():
        same, changed = network(symbols), network(other)
    assert same.shape == (2, 6, 11)
    torch.testing.assert_close(same[:, :4], changed[:, :4])
    assert not torch.allclose(same[:, 4], changed[:, 4])
    head = network.head
    if variant == "shared":
        assert head.prototypes is network.tokens
        assert head.features is network.outputs[0].features


def test_decoder_knows_the_order_of_what_came_before():
    """Causal attention alone sees a set of earlier symbols; the positions make it a sequence."""
    network = Decoder(11, variant="linear", generator=generator(), **SMALL)
    with torch.no_grad():
        one, other = network(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert not torch.allclose(one, other, atol=1e-4)


def test_parameters_of_the_variants():
    linear, tversky, shared = (
        parameters(Decoder(11, variant=name, generator=generator(), **SMALL))
        for name in ("linear", "tversky", "shared")
    )
    assert tversky - linear == 5 * 8 + 3  # the bank and three scalars; prototypes replace the weights
    # Tied: no prototypes of the head; the attention output loses its bias, keeps an 8x8 matrix, gains three scalars.
    assert shared - tversky == -11 * 8 - 8 + 3


def test_side_by_side_keeps_tied_parameters_tied():
    ensemble = training.Ensemble([Decoder(11, variant="shared", generator=generator(s), **SMALL) for s in range(2)])
    text = torch.randint(11, (200,), generator=generator(1))
    before = parameters(ensemble.members()[0])
    fit_classifiers(ensemble, text_batches(text, 2, 4, 6, generator()), steps=3, lr=0.01)
    member = ensemble.members()[0]
    assert parameters(member) == before
    assert torch.equal(member.head.prototypes, member.tokens)
    symbols = text[:12].view(1, 2, 6).expand(2, -1, -1)
    torch.testing.assert_close(ensemble.each(symbols)[0], member(symbols[0]))


def test_descriptions_are_split_without_overlap():
    train, held_out, vocabulary = descriptions(33)
    assert held_out.shape[1] == 33
    assert 9 * held_out.numel() == train.numel()
    assert int(train.min()) >= 0
    assert int(train.max()) < vocabulary
    joined = torch.cat([train.view(-1, 297), held_out], 1).flatten()
    rows, _, _ = descriptions(3)
    assert torch.equal(joined[:27], rows[:27])
    with pytest.raises(ValueError, match="window"):
        descriptions(1)


def test_text_batches_are_pieces_of_the_text():
    text = torch.arange(50)
    x, y = next(text_batches(text, 2, 5, 7, generator()))
    assert x.shape == y.shape == (2, 5, 7)
    assert torch.equal(y, x + 1)
    with pytest.raises(ValueError, match="symbols must be more than context=50"):
        next(text_batches(text, 2, 5, 50, generator()))


def test_penn_treebank_numbers_its_words(monkeypatch, tmp_path):
    texts = {"train": "the cat sat on the mat\n", "test": "the mat sat on\n"}

    def download(name, url, known_hash):
        part = url.split(".")[-2]
        (tmp_path / part).write_text(texts[part])
        return tmp_path / part

    monkeypatch.setattr(data, "download", download)
    train, held_out, vocabulary = penn_treebank(2)
    assert vocabulary == 5
    assert train.tolist() == [4, 0, 3, 2, 4, 1]
    assert held_out.tolist() == [[4, 1], [3, 2]]


def test_bad_decoders_are_refused():
    with pytest.raises(ValueError, match="variant"):
        Decoder(11, variant="cubic", generator=generator(), **SMALL)
    with pytest.raises(ValueError, match="heads"):
        Decoder(11, variant="linear", generator=generator(), **(SMALL | {"heads": 3}))


def test_nothing_touches_global_randomness_or_inputs():
    state = torch.get_rng_state()
    Decoder(11, variant="shared", generator=generator(), **SMALL)
    models.mlp([4, 3], generator=generator())
    x, prototypes, features = objects(0)
    kept = x.clone()
    tversky_similarity(x, prototypes, features, 1.0, 1.0)
    train_xor(2, 2, "min", "ignorematch", seed=0, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
