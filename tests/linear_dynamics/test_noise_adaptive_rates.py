"""Oracles: NumPy's norms, torch.optim.Muon, PyTorch's transformer layer, duality, equivariances, closed forms."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion.data import DataUnavailable
from companion.linear_dynamics.noise_adaptive_rates import (
    Lanton,
    dual_norm,
    groups,
    init_transformer,
    lmo,
    load_text,
    noise_factors,
    orthogonalize,
    simulate_layers,
    transformer_loss,
)

F64 = torch.float64
GEOMETRIES = ["spectral", "max", "rms"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_tensor(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def norm(a, geometry):
    """The norms as the paper defines them, by NumPy."""
    a = a.numpy()
    if geometry == "spectral":
        return math.sqrt(a.shape[1] / a.shape[0]) * np.linalg.norm(a, 2)
    return a.shape[1] * np.abs(a).max() if geometry == "max" else np.linalg.norm(a) / math.sqrt(len(a))


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_dual_norms_are_numpy_s(shape):
    b = random_tensor(*shape)
    nuclear = math.sqrt(shape[0] / shape[1]) * np.linalg.norm(b.numpy(), "nuc")
    assert float(dual_norm(b, "spectral")) == pytest.approx(nuclear, rel=1e-12)
    assert float(dual_norm(b, "max")) == pytest.approx(np.abs(b.numpy()).sum() / shape[1], rel=1e-12)
    assert float(dual_norm(b[0], "rms")) == pytest.approx(math.sqrt(shape[1]) * np.linalg.norm(b[0].numpy()), rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 8), columns=st.integers(1, 8), seed=st.integers(0, 2**31), geometry=st.sampled_from(GEOMETRIES)
)
def test_the_oracle_has_norm_one_and_attains_the_dual_norm(rows, columns, seed, geometry):
    shape = (columns,) if geometry == "rms" else (rows, columns)
    b, other = random_tensor(2, *shape, seed=seed)
    step = lmo(b, geometry)
    assert norm(step, geometry) == pytest.approx(1, abs=1e-6)
    assert float((b * step).sum()) == pytest.approx(-float(dual_norm(b, geometry)), rel=1e-6)
    assert float((b * other).sum()) <= float(dual_norm(b, geometry)) * norm(other, geometry) * (1 + 1e-9)  # Hölder


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 7), columns=st.integers(1, 7), seed=st.integers(0, 2**31))
def test_a_change_of_basis_turns_the_spectral_step(rows, columns, seed):
    b = random_tensor(rows, columns, seed=seed)
    q1, q2 = (torch.linalg.qr(random_tensor(n, n, seed=seed + n))[0] for n in (rows, columns))
    turned = q1 @ b @ q2.mT
    torch.testing.assert_close(lmo(turned, "spectral"), q1 @ lmo(b, "spectral") @ q2.mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(dual_norm(turned, "spectral"), dual_norm(b, "spectral"), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_batches_are_their_members_and_inputs_stay(geometry, method):
    batch = random_tensor(2, 3, 6, 4)
    before = batch.clone()
    own = 1 if geometry == "rms" else 2
    steps, norms = lmo(batch, geometry, method), dual_norm(batch, geometry, method)
    assert norms.shape == batch.shape[: 4 - own]
    torch.testing.assert_close(steps[1, 2], lmo(batch[1, 2], geometry, method), rtol=0, atol=1e-12)
    torch.testing.assert_close(norms[1, 2], dual_norm(batch[1, 2], geometry, method), rtol=0, atol=1e-12)
    assert torch.equal(batch, before)


@pytest.mark.parametrize("shape", [(9, 9), (12, 5), (5, 12)])
def test_newton_schulz_takes_singular_values_near_one_and_keeps_the_vectors(shape):
    g = random_tensor(*shape)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    inside = u.mT @ orthogonalize(g, "newton_schulz") @ vh.mT
    values, x = inside.diagonal(), s / g.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(values, x, rtol=0, atol=1e-10)
    assert (inside - values.diag()).abs().max() < 1e-10
    assert values.min() > 0.65
    assert values.max() < 1.21
    torch.testing.assert_close(orthogonalize(g), u @ vh, rtol=0, atol=1e-12)
    assert float(dual_norm(g, "spectral", "newton_schulz") / dual_norm(g, "spectral")) == pytest.approx(1, abs=0.2)


def test_a_zero_matrix_stays_zero_under_newton_schulz():
    assert torch.equal(orthogonalize(torch.zeros(3, 2), "newton_schulz"), torch.zeros(3, 2))


def test_the_difference_of_two_gradients_has_twice_the_noise():
    first, second, third = torch.randn(3, 4000, 24, 16, generator=generator())
    ratio = dual_norm(first - second, "spectral").square().mean() / dual_norm(third, "spectral").square().mean()
    assert float(ratio) == pytest.approx(2, rel=0.02)


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_factors_have_the_values_computed_by_hand():
    assert noise_factors([0, 3, 99], 1).tolist() == pytest.approx([1, 0.70710678, 0.31622777], abs=1e-7)
    assert noise_factors([4, 4], 0.5).tolist() == [1, 1]
    assert noise_factors([1e-4, 1e-2, 1], 0.01).tolist() == pytest.approx([1, 0.3751260, 0.1189177], abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(H=st.lists(st.floats(0, 1e4), min_size=1, max_size=8), alpha=st.floats(1e-2, 1e2), scale=st.floats(1e-2, 1e2))
def test_factors_are_bounded_ordered_and_free_of_units(H, alpha, scale):
    H = torch.tensor(H, dtype=F64)
    factors = noise_factors(H, alpha)
    assert factors.max() == 1
    assert factors.min() > 0
    assert (factors[H.argsort()].diff() <= 1e-12).all()
    torch.testing.assert_close(noise_factors(scale**2 * H, scale * alpha), factors, rtol=1e-9, atol=0)


def test_factors_have_their_two_limits():
    H = torch.tensor([0.3, 2.0, 50.0], dtype=F64)
    torch.testing.assert_close(noise_factors(H, 1e-6), (H[0] / H) ** 0.25, rtol=1e-9, atol=0)
    torch.testing.assert_close(noise_factors(H, 1e6), torch.ones(3, dtype=F64), rtol=1e-9, atol=0)


def test_factors_of_a_batch_compare_layers_only():
    H = random_tensor(3, 5).square()
    together = noise_factors(H, 0.5)
    torch.testing.assert_close(together[:, 4], noise_factors(H[:, 4], 0.5), rtol=0, atol=1e-12)


# --- the optimiser ----------------------------------------------------------------------------------------------------


def test_without_adaptation_it_is_pytorch_s_muon():
    start = random_tensor(16, 16, dtype=torch.float32)
    ours, theirs = start.clone(), start.clone().requires_grad_()
    optimizer = Lanton([ours], lr=0.1, adaptive=False, orthogonalization="newton_schulz")
    muon = torch.optim.Muon([theirs], lr=0.1, weight_decay=0, momentum=0.95, nesterov=False)
    for seed in range(5):
        ours.grad = theirs.grad = random_tensor(16, 16, seed=seed + 1, dtype=torch.float32)
        optimizer.step()
        muon.step()
    assert (ours - theirs).abs().max() < 0.02  # PyTorch iterates in bfloat16
    assert (ours - start).abs().max() > 0.2


def by_hand(gradients, lr, alpha, beta1, beta2, seconds=None):
    """Two spectral layers by the formulas, one number after the other; gradients by step and layer."""
    x, b, h, previous = [np.zeros(g.shape) for g in gradients[0]], [0.0, 0.0], [0.0, 0.0], None
    for step, pair in enumerate(gradients):
        other = seconds[step] if seconds else previous
        for l, g in enumerate(pair):
            b[l] = beta1 * b[l] + (1 - beta1) * g
            if other is not None:
                scale = math.sqrt(g.shape[0] / g.shape[1])
                h[l] = beta2 * h[l] + (1 - beta2) * (scale * np.linalg.norm(g - other[l], "nuc")) ** 2
        a = [alpha / math.sqrt(alpha**2 + value) for value in h]
        for l, g in enumerate(pair):
            u, _, vh = np.linalg.svd(b[l], full_matrices=False)
            x[l] = x[l] - lr * math.sqrt(a[l] / max(a)) * math.sqrt(g.shape[0] / g.shape[1]) * u @ vh
        previous = pair
    return x, h


@pytest.mark.parametrize("option", ["I", "II"])
def test_steps_follow_the_formulas(option):
    shapes, steps = [(4, 3), (2, 5)], 6
    gradients = [[random_tensor(*s, seed=10 * t + s[0]) * s[1] for s in shapes] for t in range(steps)]
    seconds = [[random_tensor(*s, seed=500 + 10 * t + s[0]) for s in shapes] for t in range(steps)]
    parameters = [torch.zeros(*s, dtype=F64) for s in shapes]
    optimizer = Lanton(parameters, lr=0.03, alpha=2.0, beta1=0.8, beta2=0.7)
    for t in range(steps):
        for p, g in zip(parameters, gradients[t], strict=True):
            p.grad = g.clone()
        optimizer.step(seconds[t] if option == "II" else None)
        if t == 0:
            assert (optimizer.noise_estimates()[0] > 0).all() == (option == "II")
    numbers = [[[g.numpy() for g in pair] for pair in both] for both in (gradients, seconds)]
    x, h = by_hand(numbers[0], 0.03, 2.0, 0.8, 0.7, numbers[1] if option == "II" else None)
    for p, expected in zip(parameters, x, strict=True):
        np.testing.assert_allclose(p.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(optimizer.noise_estimates()[0].numpy(), h, rtol=1e-12)


def test_option_one_sees_motion_as_noise_and_option_two_does_not():
    for option, expected in (("I", (8 * 0.02) ** 2 * (1 - 0.9**19)), ("II", 0.0)):
        w = torch.zeros(8, 8, dtype=F64)
        optimizer = Lanton([w], lr=0.02)
        for _ in range(20):
            w.grad = w - torch.eye(8, dtype=F64)
            optimizer.step([w.grad] if option == "II" else None)
        assert float(optimizer.noise_estimates()[0]) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def run_lanton(scale=1.0, alpha=0.1, adaptive=True, runs=1):
    """Parameters of all three geometries after five steps with random gradients, the same in every run."""
    shapes = {"spectral": [(4, 4), (8, 4)], "max": [(3, 4), (5, 2)], "rms": [(4,), (6,)]}
    parameters = {g: [torch.zeros(runs, *shape, dtype=F64) for shape in shapes[g]] for g in GEOMETRIES}
    layers = [{"params": parameters[g], "geometry": g, "lr": 0.01} for g in GEOMETRIES]
    optimizer = Lanton(layers, alpha=alpha, adaptive=adaptive)
    for step in range(5):
        for number, p in enumerate(p for g in GEOMETRIES for p in parameters[g]):
            p.grad = scale * (1 + number) * random_tensor(*p.shape, seed=100 * step + number)
        optimizer.step()
    return parameters, optimizer


def test_scaling_gradients_and_alpha_changes_nothing():
    one, other = run_lanton()[0], run_lanton(scale=50.0, alpha=5.0)[0]
    for geometry in GEOMETRIES:
        torch.testing.assert_close(one[geometry], other[geometry], rtol=0, atol=1e-12)


def test_factors_are_relative_to_the_quietest_layer_of_the_same_group():
    _, optimizer = run_lanton()
    assert all(float(factors.max()) == 1 for factors in optimizer.factors())
    assert all(float(factors.min()) < 0.95 for factors in optimizer.factors())
    _, optimizer = run_lanton(adaptive=False)
    assert all((factors == 1).all() for factors in optimizer.factors())
    assert all((H > 0).all() for H in optimizer.noise_estimates())


def test_runs_of_a_batch_do_not_touch_each_other():
    gradients = random_tensor(6, 3, 2, 4, 4)  # step, layer, run
    gradients[:, :, 1] *= torch.tensor([1.0, 10.0, 0.1], dtype=F64)[:, None, None]
    together = [torch.zeros(2, 4, 4, dtype=F64) for _ in range(3)]
    alone = [torch.zeros(4, 4, dtype=F64) for _ in range(3)]
    both, one = Lanton(together), Lanton(alone)
    for step in gradients:
        for l in range(3):
            together[l].grad, alone[l].grad = step[l].clone(), step[l, 1].clone()
        both.step()
        one.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1], b, rtol=0, atol=1e-12)
    torch.testing.assert_close(both.factors()[0][:, 1], one.factors()[0], rtol=0, atol=1e-12)


# --- the matrix problem -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["uniform", "adaptive"])
def test_simulation_is_the_optimiser_on_the_same_draws(mode):
    noise, distance, steps, size, rate = [0.1, 2.0], [1.5, 0.5], 15, 6, 0.05
    cases = torch.tensor(noise), torch.tensor(distance)
    run = simulate_layers(*cases, [0.01, rate], mode, generator(3), seeds=2, steps=steps, size=size)
    g = generator(3)

    def gaussian():
        return torch.randn(2, 2, 1, size, size, generator=g)[:, 1, 0]  # second seed

    target = torch.tensor(distance)[:, None, None] * torch.linalg.qr(gaussian())[0] * torch.linspace(0.2, 1, size)
    w = [torch.zeros(size, size) for _ in range(2)]
    optimizer = Lanton(w, lr=rate, alpha=1.0, adaptive=mode == "adaptive")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = 0.5 * sum(float((a - b).square().sum()) for a, b in zip(w, target, strict=True))
        assert float(run.loss[step, 1, 1]) == pytest.approx(loss, rel=1e-4)
        for l, draw in enumerate(gaussian()):
            w[l].grad = w[l] - target[l] + noise[l] / math.sqrt(size) * draw
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(run.factors[:, 1, 1], optimizer.factors()[0], rtol=1e-4, atol=0)


def test_simulation_starts_where_it_should():
    run = simulate_layers(torch.ones(2), torch.tensor([1.0, 3.0]), [0.1], "uniform", generator(), steps=1, size=5)
    values = torch.linspace(0.2, 1, 5)
    torch.testing.assert_close(run.loss[0], torch.full((3, 1), 0.5 * 10 * float(values.square().sum())))
    torch.testing.assert_close(run.slope, torch.full((3, 1), 4 * float(values.sum())))


def test_without_noise_every_singular_value_walks_at_the_learning_rate():
    run = simulate_layers(torch.zeros(1), torch.ones(1), [0.01], "uniform", generator(), seeds=1, steps=12, size=4)
    walked = 0.01 * sum(0.5 * (1 + math.cos(math.pi * t / 12)) for t in range(11))
    left = torch.linspace(0.2, 1, 4) - walked  # 0.2 is not reached yet
    assert float(run.loss[-1]) == pytest.approx(0.5 * float(left.square().sum()), rel=1e-4)


def test_cases_are_run_as_if_alone_and_reversal_turns_the_factors():
    noise, distance = torch.tensor([[0.1, 0.5], [3.0, 0.5]]), torch.ones(2, 2)
    settings = dict(seeds=2, steps=20, size=4)
    together = simulate_layers(noise, distance, [0.05], "adaptive", generator(), **settings)
    alone = simulate_layers(noise[:, 0], distance[:, 0], [0.05], "adaptive", generator(), **settings)
    torch.testing.assert_close(together.loss[:, 0], alone.loss, rtol=1e-4, atol=1e-5)
    turned = simulate_layers(noise[:, 0], distance[:, 0], [0.05], "reversed", generator(), **settings)
    assert (alone.factors[0] == 1).all()
    assert (turned.factors[1] == 1).all()
    assert turned.factors[0].max() < 0.9


# --- the transformer --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_transformer_agrees_with_pytorch_s_layer():
    width, context, heads = 8, 6, 2
    weights = {name: w.double() for name, w in init_transformer(11, width, 2, context, generator()).items()}
    weights = {name: w + 0.1 * random_tensor(*w.shape, seed=k) for k, (name, w) in enumerate(weights.items())}
    tokens = torch.randint(11, (3, context + 1), generator=generator(1))
    x = weights["embedding"][tokens[:, :-1]] + weights["position"]
    mask = nn.Transformer.generate_square_subsequent_mask(context, dtype=F64)
    for block in (1, 2):
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True, bias=False, dtype=F64
        )
        layer.norm1, layer.norm2 = nn.RMSNorm(width, dtype=F64), nn.RMSNorm(width, dtype=F64)
        theirs = [layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight, layer.linear1.weight]
        theirs += [layer.linear2.weight, layer.norm1.weight, layer.norm2.weight]
        ours = [torch.cat([weights[f"{name} {block}"] for name in "qkv"])]
        ours += [weights[f"{name} {block}"] for name in ("o", "up", "down")]
        ours += [weights[f"gain {block}a"], weights[f"gain {block}b"]]
        for parameter, value in zip(theirs, ours, strict=True):
            parameter.data = value
        x = layer(x, src_mask=mask, is_causal=True)
    logits = nn.functional.rms_norm(x, (width,), weights["gain"]) @ weights["head"].mT
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert float(transformer_loss(weights, tokens, heads)) == pytest.approx(float(expected), rel=1e-10)


def test_an_untrained_transformer_knows_nothing():
    weights = init_transformer(13, 8, 1, 5, generator())
    tokens = torch.randint(13, (4, 6), generator=generator())
    assert float(transformer_loss(weights, tokens, 2)) == pytest.approx(math.log(13), rel=1e-6)


def test_initial_weights_and_groups():
    weights = init_transformer(50, 64, 3, 20, generator())
    assert float(weights["down 2"].std()) == pytest.approx(256**-0.5, rel=0.05)
    assert float(weights["embedding"].std()) == pytest.approx(0.5, rel=0.05)
    hidden, ends, gains = groups(weights, 0.02)
    assert [len(group["params"]) for group in (hidden, ends, gains)] == [18, 3, 7]
    assert sum(len(group["params"]) for group in (hidden, ends, gains)) == len(weights)
    assert [(group["geometry"], group["lr"]) for group in (hidden, ends, gains)] == [
        ("spectral", 0.02), ("max", 0.16), ("rms", 0.02),
    ]  # fmt: skip
    assert all(p.shape in ((64, 64), (256, 64), (64, 256)) for p in hidden["params"])


# --- the text ---------------------------------------------------------------------------------------------------------


def test_the_small_text_is_long_enough():
    tokens, n_symbols = load_text("sklearn", 10**6)
    assert len(tokens) > 20_000
    assert tokens.unique().tolist() == list(range(n_symbols))
    assert len(load_text("sklearn", 100)[0]) == 100


def test_openwebtext_is_streamed_tokenised_and_cut(monkeypatch):
    documents = [{"text": "ab"}, {"text": "cde"}, {"text": "f"}]

    class Tokenizer:
        vocab_size = 300

        def __call__(self, text):
            return {"input_ids": [ord(character) for character in text]}

    asked = []
    load = SimpleNamespace(load_dataset=lambda name, **options: asked.append((name, options)) or iter(documents))
    auto = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: Tokenizer()))
    monkeypatch.setitem(sys.modules, "datasets", load)
    monkeypatch.setitem(sys.modules, "transformers", auto)
    tokens, n_symbols = load_text("openwebtext", 4)
    assert tokens.tolist() == [97, 98, 99, 100]
    assert n_symbols == 300
    assert asked == [("Skylion007/openwebtext", {"split": "train", "streaming": True})]


def test_missing_text_says_what_to_do_and_smoke_has_a_stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataUnavailable, match=r"openwebtext.*BOOK_PROFILE=book"):
        load_text("openwebtext", 10)
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    assert torch.equal(load_text("openwebtext", 10)[0], load_text("sklearn", 10)[0])


# --- what a reader can get wrong --------------------------------------------------------------------------------------

SQUARE, TWO = torch.eye(3), torch.ones(2)
SMALL = init_transformer(5, 4, 1, 3, generator())


def lanton_without_gradient():
    Lanton([torch.zeros(2, 2)]).step()


def lanton_with_too_many_seconds():
    p = torch.zeros(2, 2)
    p.grad = torch.ones(2, 2)
    Lanton([p]).step([p.grad, p.grad])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: orthogonalize(TWO), "matrix"),
        (lambda: orthogonalize(SQUARE, "qr"), "method"),
        (lambda: orthogonalize(SQUARE, "newton_schulz", steps=0), "steps"),
        (lambda: lmo(SQUARE, "frobenius"), "geometry"),
        (lambda: lmo(TWO, "max"), "matrix"),
        (lambda: lmo(torch.tensor(1.0), "rms"), "matrix"),
        (lambda: dual_norm(SQUARE, "frobenius"), "geometry"),
        (lambda: dual_norm(TWO, "spectral"), "matrix"),
        (lambda: dual_norm(SQUARE, "spectral", "qr"), "method"),
        (lambda: noise_factors([1.0], 0.0), "alpha"),
        (lambda: noise_factors([1.0], math.nan), "alpha"),
        (lambda: noise_factors([1.0, -1.0], 1.0), "H must"),
        (lambda: noise_factors([math.nan], 1.0), "H must"),
        (lambda: Lanton([SQUARE], lr=0.0), "lr"),
        (lambda: Lanton([SQUARE], beta1=1.0), "beta1"),
        (lambda: Lanton([SQUARE], beta2=-0.1), "beta2"),
        (lambda: Lanton([SQUARE], alpha=-1.0), "alpha"),
        (lambda: Lanton([SQUARE], orthogonalization="qr"), "orthogonalization"),
        (lambda: Lanton([SQUARE], geometry="frobenius"), "geometry"),
        (lambda: Lanton([TWO]), "matrix"),
        (lanton_without_gradient, "every parameter needs a gradient"),
        (lanton_with_too_many_seconds, "second_gradients"),
        (lambda: simulate_layers(TWO, torch.ones(3), [0.1], "uniform", generator()), "noise and distance"),
        (lambda: simulate_layers(-TWO, TWO, [0.1], "uniform", generator()), "noise and distance"),
        (lambda: simulate_layers(TWO, TWO, [0.1], "random", generator()), "mode"),
        (lambda: simulate_layers(TWO, TWO, [], "uniform", generator()), "lrs"),
        (lambda: simulate_layers(TWO, TWO, [0.0], "uniform", generator()), "lrs"),
        (lambda: simulate_layers(TWO, TWO, [0.1], "uniform", generator(), steps=0), "steps"),
        (lambda: simulate_layers(TWO, TWO, [0.1], "adaptive", generator(), steps=1, alpha=0.0), "alpha"),
        (lambda: load_text("wikipedia", 10), "name"),
        (lambda: load_text("sklearn", 0), "n_tokens"),
        (lambda: init_transformer(5, 4, 0, 3, generator()), "blocks"),
        (lambda: transformer_loss(SMALL, torch.zeros(1, 3, dtype=int), 3), "heads"),
        (lambda: transformer_loss(SMALL, torch.zeros(1, 5, dtype=int), 2), "tokens"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
