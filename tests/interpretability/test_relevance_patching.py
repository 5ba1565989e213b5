"""Oracles: SciPy, PyTorch's own layers and hooks, finite differences, closed forms, LRP's conservation, lxt."""

import importlib.util
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F

from companion import data, training
from companion.interpretability.relevance_patching import (
    KINDS,
    IOITask,
    SparseAutoencoder,
    TinyTransformer,
    activation_patching,
    circuit_faithfulness,
    coefficients,
    feature_attribution,
    fit_sparse_autoencoder,
    from_gpt2,
    gpt2_on_ioi,
    half_rule,
    identity_rule,
    layer_norm_rule,
    linear_patching,
    logit_difference,
    lrp_rules,
    residual_stream,
    train_on_ioi,
)

DEFAULT = ("ln", "identity", "half")
F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def network(seed=0, scale=3.0, **options):
    """An untrained network in double precision, with weights large enough for its layers to be far from linear."""
    model = TinyTransformer(len(TASK.words), generator=generator(seed), **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln" in name:
                parameter += 0.3 * normal(*parameter.shape, seed=len(name))
            else:
                parameter *= 20 if name in ("embedding", "position") else scale
    return model


def without_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


TASK = IOITask()
CLEAN, CORRUPTED, IO, SUBJECT = TASK.pair(6, generator())
METRIC = partial(logit_difference, io=IO, subject=SUBJECT)


# --- the rules --------------------------------------------------------------------------------------------------------


def slope(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs).sum(), inputs)


def test_identity_rule_of_gelu_is_the_normal_distribution_function():
    z = torch.cat([torch.tensor([1.0, -0.5, 2.0], dtype=F64), 3 * normal(200)])
    z = z[z.abs() > 1e-2]
    (coefficient,) = slope(partial(identity_rule, fn=F.gelu), z)
    torch.testing.assert_close(coefficient, torch.from_numpy(norm.cdf(z.numpy())), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        coefficient[:3], torch.tensor([0.841345, 0.308538, 0.977250], dtype=F64), rtol=0, atol=2e-6
    )


def test_identity_rule_of_relu_is_the_gradient():
    z = normal(100)
    torch.testing.assert_close(slope(partial(identity_rule, fn=F.relu), z), slope(F.relu, z), rtol=1e-4, atol=0)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=8))
def test_rules_keep_forward_values_at_every_point(values):
    z = torch.tensor([*values, 0.0], dtype=F64)
    for fn in (F.gelu, F.silu, F.relu, torch.tanh):
        out = identity_rule(z.requires_grad_(), fn)
        assert torch.equal(out, fn(z))
        assert torch.autograd.grad(out.sum(), z)[0].isfinite().all()
    torch.testing.assert_close(half_rule(z, z.flip(0)), z * z.flip(0), rtol=1e-15, atol=0)


def test_half_rule_by_hand():
    a, b = (torch.tensor(x, requires_grad=True) for x in (2.0, 3.0))
    product = half_rule(a, b)
    product.backward()
    assert (product.item(), a.grad.item(), b.grad.item()) == (6, 1.5, 1)


def test_layer_norm_rule_is_layer_norm_forward_and_linear_backward():
    x, (weight, bias, u) = normal(7, 12), normal(3, 12, seed=1)
    torch.testing.assert_close(layer_norm_rule(x, weight, bias), F.layer_norm(x, (12,), weight, bias))
    (rho,) = slope(lambda x: layer_norm_rule(x, weight, bias) @ u, x)
    w = u * weight
    expected = (w - w.mean()) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rho, expected, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), d=st.integers(3, 40), length=st.floats(0.1, 50))
def test_effects_through_layer_norm_are_exact_for_equal_norms(seed, d, length):
    x, y, weight, u = normal(4, d, seed=seed)
    x, y = (length * F.normalize(v - v.mean(), dim=0) for v in (x, y))
    zero = torch.zeros(d, dtype=F64)
    rule = partial(layer_norm_rule, weight=weight, bias=zero, eps=0.0)
    (rho,) = slope(lambda x: u @ rule(x), x)
    torch.testing.assert_close((y - x) @ rho, u @ (rule(y) - rule(x)), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(x @ rho, u @ rule(x), rtol=1e-7, atol=1e-9)
    (gradient,) = slope(lambda x: u @ F.layer_norm(x, (d,), weight, zero, 0.0), x)
    assert abs(x @ gradient) < 1e-8 * (1 + x.norm() * gradient.norm())  # Euler


def test_the_rules_are_those_of_lxt():
    package = importlib.util.find_spec("lxt")
    if package is None:
        pytest.skip("lxt is not installed")
    # Its rules need nothing but PyTorch; the package itself wants a certain transformers.
    file = Path(package.submodule_search_locations[0], "efficient", "rules.py")
    loader = importlib.util.spec_from_file_location("lxt_rules", file)
    rules = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(rules)
    z, a, b = normal(50, 3).unbind(1)
    z = z + 0.2 * z.sign()  # away from zero, where the stabilisers differ
    peer = slope(lambda z: rules.identity_rule_implicit(F.gelu, z), z)
    torch.testing.assert_close(slope(partial(identity_rule, fn=F.gelu), z), peer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        slope(half_rule, a, b), slope(lambda a, b: rules.divide_gradient(a * b, 2), a, b), rtol=1e-12, atol=0
    )


# --- task and network -------------------------------------------------------------------------------------------------


def test_sentences_are_what_they_should_be():
    task = IOITask(n_names=5, n_places=2, n_objects=3)
    assert len(task.words) == 6 + 5 + 2 + 3
    tokens, io, subject = task.batch(4000, generator())
    _, a, _, b, _, place, _, s, _, thing, _ = tokens.T
    assert {" ".join(task.words[k] for k in row[[0, 2, 4, 6, 8, 10]]) for row in tokens} == {"<bos> and went , gave to"}
    assert torch.equal(s, subject)
    assert torch.equal(torch.stack([a, b]).sort(0).values, torch.stack([io, subject]).sort(0).values)
    for column, low, high in ((a, 6, 11), (b, 6, 11), (place, 11, 13), (thing, 13, 16)):
        counts = column.bincount(minlength=16)[low:high]
        assert counts.sum() == 4000
        assert (counts / 4000 * (high - low) - 1).abs().max() < 0.15  # uniform
    assert (a != b).all()
    assert abs((s == a).double().mean() - 0.5) < 0.04
    pairs = (5 * a + b).unique()
    assert len(pairs) == 20


def test_corrupted_sentences_differ_in_the_subject_only():
    clean, corrupted, io, subject = TASK.pair(50, generator(1))
    assert (clean != corrupted).nonzero()[:, 1].unique().tolist() == [7]
    assert torch.equal(corrupted[:, 7], io)
    assert torch.equal(clean[:, 7], subject)
    again = TASK.pair(50, generator(1))
    assert torch.equal(clean, again[0])


def test_logit_difference_by_hand():
    logits = torch.arange(12.0).view(2, 2, 3).square()
    assert logit_difference(logits, torch.tensor([2, 0]), torch.tensor([0, 1])).tolist() == [25 - 9, 81 - 100]


@pytest.mark.parametrize(("activation", "fn"), [("gelu", F.gelu), ("relu", F.relu)])
def test_the_network_is_pytorch_s_encoder_with_a_causal_mask(activation, fn):
    model = network(activation=activation)
    x = model.embedding[CLEAN] + model.position
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, fn, norm_first=True, batch_first=True, dtype=F64)
        layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias = block["qkv"].weight, block["qkv"].bias
        layer.self_attn.out_proj, layer.linear1, layer.linear2 = block["out"], block["up"], block["down"]
        layer.norm1, layer.norm2 = block["ln_1"], block["ln_2"]
        x = layer(x, nn.Transformer.generate_square_subsequent_mask(11, dtype=F64), is_causal=True)
    torch.testing.assert_close(model(CLEAN), model.unembedding(model.ln_f(x)), rtol=1e-9, atol=1e-9)


def test_the_gated_mlp_by_hand():
    model = network(activation="swiglu", n_layers=1)
    block, x = model.blocks[0], normal(5, 32)
    gate, value = block["up"].weight.split(128)
    gate_bias, value_bias = block["up"].bias.split(128)
    gate, value = x @ gate.T + gate_bias, x @ value.T + value_bias
    expected = block["down"](gate * torch.sigmoid(gate) * value)
    torch.testing.assert_close(model._mlp(block, x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "swiglu"])
def test_rules_do_not_change_outputs_and_go_away(activation):
    model = network(activation=activation)
    before = model(CLEAN)
    with lrp_rules(model, (*DEFAULT, "attention")):
        torch.testing.assert_close(model(CLEAN), before, rtol=1e-9, atol=1e-9)
        with lrp_rules(model, ["ln"]):
            assert model.rules == {"ln"}
        assert model.rules == {*DEFAULT, "attention"}
    assert model.rules == frozenset()
    with pytest.raises(RuntimeError, match="inside"), lrp_rules(model, DEFAULT):
        raise RuntimeError("inside")
    assert model.rules == frozenset()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "swiglu"])
def test_relevance_is_conserved_without_biases(activation):
    model = without_biases(network(activation=activation))
    total = METRIC(model(CLEAN))

    def relevance(rules):
        a, rho = coefficients(model, CLEAN, METRIC, "resid", rules)
        return (a * rho).sum((2, 3))

    torch.testing.assert_close(relevance((*DEFAULT, "attention")), total.expand(3, 6), rtol=1e-4, atol=1e-5)
    broken = [("ln", "identity", "half"), ("identity", "half", "attention"), ()]
    broken += [("ln", "half", "attention")] if activation != "relu" else []
    broken += [("ln", "identity", "attention")] if activation == "swiglu" else []
    for rules in broken:
        assert (relevance(rules)[0] - total).abs().max() > 1e-2 * total.abs().max()


def test_relu_networks_have_no_use_for_the_identity_rule():
    model = network(activation="relu")
    one, other = (linear_patching(model, CLEAN, CORRUPTED, METRIC, "resid", rules) for rules in ((), ("identity",)))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)  # but for the stabiliser, 1e-6 in every ratio


def test_networks_trained_together_are_those_trained_alone_and_they_learn():
    together = train_on_ioi(TASK, [3, 4], steps=6)
    (alone,) = train_on_ioi(TASK, [4], steps=6)
    for one, other in zip(together[1].parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    start = TinyTransformer(len(TASK.words), generator=generator(4))
    (learned,) = train_on_ioi(TASK, [4], steps=60)
    tokens, io, _ = TASK.batch(200, generator(9))
    loss = [F.cross_entropy(model(tokens)[:, -1], io).item() for model in (start, learned)]
    assert loss[0] > 3  # log 26 is 3.26
    assert loss[1] < 1.5  # better than any name at random, log 12 is 2.48


# --- patching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "layer_name"), [("attn", "out"), ("mlp", "down")])
def test_activation_patching_agrees_with_hooks(kind, layer_name):
    model = network()
    effects = activation_patching(model, CLEAN, CORRUPTED, METRIC, kind)
    assert effects.shape == (6, 3, 11)
    with torch.no_grad():
        for layer, t in ((0, 7), (1, 10), (2, 10), (0, 9)):
            module, saved = model.blocks[layer][layer_name], []
            handle = module.register_forward_hook(lambda m, i, out, saved=saved: saved.append(out))
            model(CLEAN)
            handle.remove()

            def put(m, i, out, t=t, saved=saved):
                out = out.clone()
                out[:, t] = saved[0][:, t]
                return out

            handle = module.register_forward_hook(put)
            expected = METRIC(model(CORRUPTED))
            handle.remove()
            expected -= METRIC(model(CORRUPTED))
            assert expected.abs().max() > 1e-6
            torch.testing.assert_close(effects[:, layer, t], expected, rtol=1e-8, atol=1e-10)


def test_patching_the_subject_before_the_first_block_restores_everything():
    model = network()
    effects = activation_patching(model, CLEAN, CORRUPTED, METRIC, "resid")
    torch.testing.assert_close(effects[:, 0, 7], METRIC(model(CLEAN)) - METRIC(model(CORRUPTED)))
    assert effects[:, 0, 8:].abs().max() < 1e-9  # elsewhere the first stream is the same


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_before_the_subject_has_an_effect(kind):
    model = network()
    estimates = [linear_patching(model, CLEAN, CORRUPTED, METRIC, kind, rules) for rules in ((), DEFAULT)]
    for values in (activation_patching(model, CLEAN, CORRUPTED, METRIC, kind), *estimates):
        assert values[..., :7].abs().max() < 1e-6
        assert values[..., 7:].abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_without_rules_the_estimate_is_the_directional_derivative(kind, activation):
    model = network(activation=activation)
    values = linear_patching(model, CLEAN, CORRUPTED, METRIC, kind)
    (start, _), (end, _) = (coefficients(model, tokens, METRIC, kind) for tokens in (CORRUPTED, CLEAN))
    for layer, t in ((0, 7), (1, 7), (1, 10), (2, 10)):

        def moved(step, layer=layer, t=t):
            def tap(at, l, a):
                if (at, l) != (kind, layer):
                    return a
                change = torch.zeros_like(a)
                change[:, t] = step * (end - start)[layer][:, t]
                return a + change

            with torch.no_grad():
                return METRIC(model(CORRUPTED, tap))

        difference = (moved(1e-4) - moved(-1e-4)) / 2e-4
        torch.testing.assert_close(values[:, layer, t], difference, rtol=1e-4, atol=1e-4)


def test_the_last_mlp_has_a_closed_form():
    model = network()
    for bias in (model.ln_f.bias, model.unembedding.bias):
        nn.init.zeros_(bias)
    estimate = linear_patching(model, CLEAN, CORRUPTED, METRIC, "mlp", ["ln"])[:, -1, -1]
    patched = activation_patching(model, CLEAN, CORRUPTED, METRIC, "mlp")[:, -1, -1] + METRIC(model(CORRUPTED))

    def sigma(tokens, replacement=None):
        """Standard deviation at the last norm, in a run whose last MLP output may be another one at the last place."""
        stream = []
        seen = lambda at, l, a: stream.append(a) or a  # noqa: E731
        model(tokens, seen)
        resid, attn, mlp = stream[-3:]
        last = resid[:, -1] + attn[:, -1] + (mlp if replacement is None else replacement)[:, -1]
        return (last.var(-1, correction=0) + 1e-5).sqrt(), mlp

    _, mlp_clean = sigma(CLEAN)
    ratio = sigma(CORRUPTED)[0] / sigma(CORRUPTED, mlp_clean)[0]
    assert (ratio - 1).abs().max() > 1e-3
    torch.testing.assert_close(patched, (METRIC(model(CORRUPTED)) + estimate) * ratio, rtol=1e-6, atol=1e-8)


def test_prompts_do_not_mix_and_nothing_is_modified():
    model, before = network(), (CLEAN.clone(), CORRUPTED.clone())
    weights = deepcopy(model.state_dict())
    whole = linear_patching(model, CLEAN, CORRUPTED, METRIC, "mlp", DEFAULT)
    for k in range(6):
        one = slice(k, k + 1)
        metric = partial(logit_difference, io=IO[one], subject=SUBJECT[one])
        part = linear_patching(model, CLEAN[one], CORRUPTED[one], metric, "mlp", DEFAULT)
        torch.testing.assert_close(part, whole[one], rtol=1e-8, atol=1e-10)
    activation_patching(model, CLEAN, CORRUPTED, METRIC, "mlp")
    assert torch.equal(CLEAN, before[0])
    assert torch.equal(CORRUPTED, before[1])
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- circuits ---------------------------------------------------------------------------------------------------------


def autoencoders(seed=0, d_features=24):
    """Autoencoders with some features on, some off."""
    result = {layer: SparseAutoencoder(32, d_features, generator=generator(seed + layer)).double() for layer in (1, 2)}
    for sae in result.values():
        nn.init.normal_(sae.b_d, generator=generator(5))
    return result


def features(model, saes, tokens):
    return torch.stack([sae.encode(residual_stream(model, tokens)[layer]) for layer, sae in saes.items()]).detach()


def moved_metric(model, layer, change):
    with torch.no_grad():
        return METRIC(model(CLEAN, lambda at, l, a: a + change if (at, l) == ("resid", layer) else a)).mean()


def test_integrated_gradients_are_complete_in_every_layer():
    model, saes = network(), autoencoders()
    scores = feature_attribution(model, saes, CLEAN, CORRUPTED, METRIC, "ig", n_steps=100)
    delta = features(model, saes, CORRUPTED) - features(model, saes, CLEAN)
    for k, (layer, sae) in enumerate(saes.items()):
        whole = moved_metric(model, layer, delta[k] @ sae.W_d) - METRIC(model(CLEAN)).mean()
        assert abs(whole) > 0.1
        torch.testing.assert_close(scores[k].sum(), whole, rtol=1e-3, atol=1e-4)


def test_gradient_and_exact_scores_by_direct_intervention():
    model, saes = network(), autoencoders()
    gradient, exact, relp = (
        feature_attribution(model, saes, CLEAN, CORRUPTED, METRIC, method) for method in ("atp", "exact", "relp")
    )
    delta = features(model, saes, CORRUPTED) - features(model, saes, CLEAN)
    for k, (layer, sae) in enumerate(saes.items()):
        _, rho = coefficients(model, CLEAN, METRIC, "resid", DEFAULT)
        t, i = (int(n) for n in (delta[k].abs().mean(0) == delta[k].abs().mean(0).max()).nonzero()[0])
        change = torch.zeros_like(rho[layer])
        change[:, t] = delta[k][:, t, i, None] * sae.W_d[i].detach()
        base = METRIC(model(CLEAN)).mean()
        torch.testing.assert_close(exact[k, t, i], moved_metric(model, layer, change) - base)
        slope = (moved_metric(model, layer, 1e-4 * change) - moved_metric(model, layer, -1e-4 * change)) / 2e-4
        torch.testing.assert_close(gradient[k, t, i], slope, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(relp[k, t, i], (change * rho[layer]).sum((1, 2)).mean())
    assert (relp - gradient).abs().max() > 1e-3


def test_the_number_of_backward_passes():
    model, saes = network(n_layers=3), autoencoders()
    for method, expected in (("atp", 1), ("relp", 1), ("ig", 2 * 7)):
        calls = []
        metric = lambda logits, calls=calls: calls.append(1) or METRIC(logits)  # noqa: E731
        feature_attribution(model, saes, CLEAN, CORRUPTED, metric, method, n_steps=7)
        assert len(calls) == expected


def test_faithfulness_runs_from_zero_to_one_and_agrees_with_its_definition():
    model, saes = network(), autoencoders()
    means = features(model, saes, CLEAN).mean(1)
    masks = torch.rand(3, *means.shape, generator=generator(2)) < 0.5
    masks[1], masks[2] = True, False
    values = circuit_faithfulness(model, saes, CLEAN, METRIC, masks, means)
    torch.testing.assert_close(values[1:], torch.tensor([1.0, 0.0], dtype=F64))

    def score(mask):
        def tap(at, layer, x):
            if at != "resid" or layer not in saes:
                return x
            k, sae = list(saes).index(layer), saes[layer]
            f = sae.encode(x)
            error = x - sae.decode(f)
            return sae.decode(mask[k] * f + ~mask[k] * means[k]) + error

        with torch.no_grad():
            return METRIC(model(CLEAN, tap)).mean()

    none, every = score(masks[2]), METRIC(model(CLEAN)).mean()
    torch.testing.assert_close(values[0], ((score(masks[0]) - none) / (every - none)).detach())
    assert circuit_faithfulness(model, saes, CLEAN, METRIC, masks[1], means).shape == ()


def test_autoencoders_learn_sparse_directions_whatever_the_scale():
    directions, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator()))
    strength = torch.rand(2000, 8, generator=generator(1)) * (torch.rand(2000, 8, generator=generator(2)) < 0.15)
    x = strength @ directions
    data_sets = torch.stack([x, -10 * x])  # ReLU features of the one cannot reconstruct the other
    members = fit_sparse_autoencoder(data_sets, 16, generator(3), penalty=0.05)
    for sae, own in zip(members, data_sets, strict=True):
        assert (own - sae(own)[1]).square().sum() < 0.1 * (own - own.mean(0)).square().sum()
    one = members[0]
    f, _ = one(x)
    assert (f > 0).float().mean() < 0.4
    found = F.normalize(one.W_d[f.mean(0) > 1e-3], dim=1) @ directions.T
    assert found.max(0).values.median() > 0.85
    first, second = fit_sparse_autoencoder(torch.stack([x, x]), 16, generator(3), steps=1)
    assert not torch.equal(first.W_d, second.W_d)  # members have initial weights of their own
    _, scaled = fit_sparse_autoencoder(torch.stack([x, 1000 * x]), 24, generator(3), steps=20)
    _, plain = fit_sparse_autoencoder(torch.stack([x, x]), 24, generator(3), steps=20)
    torch.testing.assert_close(scaled.encode(1000 * x), plain.encode(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scaled(1000 * x)[1], 1000 * plain(x)[1], rtol=1e-3, atol=0.1)


def test_autoencoders_minimise_the_stated_loss():
    x = 3 * torch.randn(600, 8, generator=generator(1))
    (sae,) = fit_sparse_autoencoder(x[None], 12, generator(3), penalty=0.2, steps=5)
    g, scale = generator(3), x.std()
    batches, model = training.minibatches(600, 512, g), SparseAutoencoder(8, 12, generator=g)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(5):
        batch = x[next(batches)] / scale
        f, reconstruction = model(batch)
        sizes = (f * model.W_d.norm(dim=1)).sum(1)
        loss = ((batch - reconstruction).square().sum(1) + 0.2 * 8**0.5 * sizes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(sae(x)[1], scale * model(x / scale)[1], rtol=1e-3, atol=1e-3)


# --- GPT-2 ------------------------------------------------------------------------------------------------------------


def test_the_network_is_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=12, n_embd=24, n_layer=2, n_head=3)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator(parameter.numel()))
    tokens = torch.randint(50, (3, 9), generator=generator())
    torch.testing.assert_close(from_gpt2(theirs)(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def as_gpt2(model):
    """The weights under GPT-2's names and in its layout."""
    names = {"embedding": "transformer.wte.weight", "position": "transformer.wpe.weight"}
    for k in range(len(model.blocks)):
        parts = {"ln_1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj"}
        parts |= {"ln_2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"}
        names |= {
            f"blocks.{k}.{a}.{w}": f"transformer.h.{k}.{b}.{w}" for a, b in parts.items() for w in ("weight", "bias")
        }
    names |= {f"ln_f.{w}": f"transformer.ln_f.{w}" for w in ("weight", "bias")}
    names["unembedding.weight"] = "lm_head.weight"
    state = model.state_dict()
    return {
        theirs: state[ours].mT if ours.startswith("blocks") and state[ours].ndim == 2 else state[ours]
        for ours, theirs in names.items()
    }


def test_weights_under_gpt2_s_names_give_the_same_network():
    model = TinyTransformer(30, 12, generator=generator(), activation="gelu_new")
    nn.init.zeros_(model.unembedding.bias)
    config = SimpleNamespace(vocab_size=30, n_positions=12, n_embd=32, n_head=4, n_layer=3)
    copy = from_gpt2(SimpleNamespace(config=config, state_dict=lambda: as_gpt2(model)))
    tokens = torch.randint(30, (4, 12), generator=generator())
    assert torch.equal(copy(tokens), model(tokens))


def test_the_stand_in_for_gpt2_reads_pairs_that_differ_in_the_subject(monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    model, clean, corrupted, io, subject = gpt2_on_ioi("gpt2", 8, generator())
    assert clean.shape == (8, 15)
    assert (clean != corrupted).nonzero()[:, 1].unique().tolist() == [10]
    assert torch.equal(corrupted[:, 10], io)
    assert torch.equal(clean[:, 10], subject)
    assert model(clean).isfinite().all()


def test_english_sentences_go_through_the_tokenizer(monkeypatch):
    texts = []
    tokenizer = SimpleNamespace(encode=lambda text: texts.append(text) or [len(word) for word in text.split()])
    config = SimpleNamespace(vocab_size=30, n_positions=20, n_embd=32, n_head=4, n_layer=3)
    source = TinyTransformer(30, 20, generator=generator(), activation="gelu_new")
    weights = SimpleNamespace(config=config, state_dict=lambda: as_gpt2(source))
    library = SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: tokenizer),
        GPT2LMHeadModel=SimpleNamespace(from_pretrained=lambda name: weights),
    )
    monkeypatch.setitem(sys.modules, "transformers", library)
    model, clean, *_ = gpt2_on_ioi("gpt2", 2, generator())
    rows = [[TASK.words[k] for k in row] for row in TASK.pair(2, generator())[0]]
    a, b, place, s, thing = rows[0][1::2]
    expected = f"<|endoftext|>When {a} and {b} went to the {place}, {s} gave a {thing} to"
    assert expected in texts
    assert model(clean).shape == (2, 13, 30)


def test_a_missing_gpt2_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(data.DataUnavailable, match=r"'gpt2'.*BOOK_PROFILE=book"):
        gpt2_on_ioi("gpt2", 2, generator())


# --- what a reader can get wrong --------------------------------------------------------------------------------------

MODEL, SAES = network(), autoencoders()
MEANS = torch.zeros(2, 11, 24, dtype=F64)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: IOITask(n_names=1), "n_names"),
        (lambda: IOITask(n_names=100), "n_names"),
        (lambda: IOITask(n_places=0), "n_places"),
        (lambda: IOITask(n_objects=9), "n_objects"),
        (lambda: TASK.batch(0, generator()), "n must"),
        (lambda: TinyTransformer(26, generator=generator(), d_model=30), "d_model"),
        (lambda: TinyTransformer(26, generator=generator(), activation="tanh"), "activation"),
        (lambda: lrp_rules(MODEL, ("ln", "epsilon")).__enter__(), "rules"),
        (lambda: lrp_rules(MODEL, "ln").__enter__(), "rules"),
        (lambda: activation_patching(MODEL, CLEAN, CORRUPTED[:, :10], METRIC, "mlp"), "clean and corrupted"),
        (lambda: activation_patching(MODEL, CLEAN, CORRUPTED, METRIC, "heads"), "kind"),
        (lambda: activation_patching(MODEL, CLEAN, CORRUPTED, lambda x: METRIC(x).mean(), "mlp"), "metric"),
        (lambda: linear_patching(MODEL, CLEAN[:3], CORRUPTED, METRIC, "mlp"), "clean and corrupted"),
        (lambda: linear_patching(MODEL, CLEAN, CORRUPTED, METRIC, "logits"), "kind"),
        (lambda: linear_patching(MODEL, CLEAN, CORRUPTED, lambda x: METRIC(x).mean(), "mlp"), "metric"),
        (lambda: linear_patching(MODEL, CLEAN, CORRUPTED, METRIC, "mlp", ["lrp"]), "rules"),
        (lambda: coefficients(MODEL, CLEAN, METRIC, "x"), "kind"),
        (lambda: fit_sparse_autoencoder(torch.zeros(600, 8), 4, generator()), "X"),
        (lambda: fit_sparse_autoencoder(torch.full((1, 600, 8), torch.nan), 4, generator()), "X"),
        (lambda: fit_sparse_autoencoder(torch.zeros(1, 60, 8), 4, generator()), "batch_size"),
        (lambda: feature_attribution(MODEL, SAES, CLEAN, CORRUPTED, METRIC, "shap"), "method"),
        (lambda: feature_attribution(MODEL, SAES, CLEAN, CORRUPTED, METRIC, "ig", 0), "n_steps"),
        (lambda: feature_attribution(MODEL, {7: SAES[1]}, CLEAN, CORRUPTED, METRIC, "atp"), "saes"),
        (lambda: feature_attribution(MODEL, SAES, CLEAN, CORRUPTED[:2], METRIC, "atp"), "clean and corrupted"),
        (lambda: circuit_faithfulness(MODEL, {}, CLEAN, METRIC, MEANS > 0, MEANS), "saes"),
        (lambda: circuit_faithfulness(MODEL, SAES, CLEAN, METRIC, MEANS[:1] > 0, MEANS), "keep_masks"),
        (lambda: circuit_faithfulness(MODEL, SAES, CLEAN, METRIC, MEANS > 0, MEANS[:, :4]), "means"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
