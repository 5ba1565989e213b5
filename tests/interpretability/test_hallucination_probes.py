"""Oracles: losses by hand, PyTorch, scikit-learn, integrals, invariances, causality, a curve with a known peak."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.gaussian_process.kernels import Matern
from sklearn.metrics import roc_auc_score, roc_curve
from torch.nn import functional as F

from companion.data import DataUnavailable
from companion.interpretability import hallucination_probes as hp


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SMALL = dict(n_subjects=12, n_relations=4, n_groups=3, n_first=3, n_second=4)
CORPUS = hp.make_fact_corpus(0, **SMALL)
MODEL = hp.TinyLM(CORPUS.vocab_size, 16, 2, 2, 12, generator=generator()).requires_grad_(False)


# --- the world --------------------------------------------------------------------------------------------------------


def test_known_pairs_strong_cells_and_agreement_have_their_shares():
    corpus = hp.make_fact_corpus(3)
    assert corpus.known.sum(1).tolist() == [4, 2, 2, 0] * 55
    assert int(corpus.strong.sum()) == 36
    cells = corpus.strong[corpus.group]
    agree = (corpus.truth == corpus.stereotype[corpus.group]).all(-1)
    assert 0.3 < agree[corpus.known & cells].float().mean() < 0.52
    assert agree[~corpus.known & cells].float().mean() < 0.05  # 1/200 by chance: the truth ignores the stereotype
    other = hp.make_fact_corpus(4)
    assert not torch.equal(other.truth, corpus.truth)
    assert torch.equal(hp.make_fact_corpus(3).truth, corpus.truth)


def test_texts_repeat_known_facts_and_tell_stereotypes_of_the_others():
    corpus = hp.make_fact_corpus(0)
    text = corpus.sample_batch(4000, 2, 0.6, generator())
    assert text.shape == (4000, 9)
    assert (text[:, 0] == 0).all()
    subject, relation, *objects = text[:, 1:].reshape(-1, 4).unbind(1)
    subject, relation, objects = subject - 1, relation - 221, torch.stack(objects, 1)
    known = corpus.known[subject, relation]
    assert abs(float(known.float().mean()) - 0.6) < 0.03
    assert torch.equal(objects[known], corpus.truth[subject, relation][known])
    stereotype = (objects == corpus.stereotype[corpus.group[subject], relation]).all(1)
    strong = corpus.strong[corpus.group[subject], relation]
    assert abs(float(stereotype[~known & strong].float().mean()) - 0.95) < 0.02
    assert float(stereotype[~known & ~strong].float().mean()) < 0.02
    first = objects[:, 0] - 225
    assert torch.equal(first // 10, relation)  # each relation has first tokens of its own
    assert objects[:, 1].min() == 265
    assert objects[:, 1].max() == corpus.vocab_size - 1


# --- the language model -----------------------------------------------------------------------------------------------


def test_sites_add_up_and_the_last_one_is_read_out():
    text = CORPUS.sample_batch(5, 2, 0.5, generator())
    hidden = MODEL.hidden_states(text)
    assert hidden.shape == (5, 5, 9, 16)
    torch.testing.assert_close(hidden[0], MODEL.embedding[text] + MODEL.position[:9])
    last = F.layer_norm(hidden[-1], (16,)) * MODEL.norm.weight + MODEL.norm.bias
    torch.testing.assert_close(MODEL(text), last @ MODEL.embedding.T)


def test_a_token_changes_no_state_before_it():
    text = CORPUS.sample_batch(5, 2, 0.5, generator())
    other = text.clone()
    other[:, 6] = (other[:, 6] + 1) % CORPUS.vocab_size
    before, after = MODEL.hidden_states(text), MODEL.hidden_states(other)
    torch.testing.assert_close(before[:, :, :6], after[:, :, :6], atol=1e-6, rtol=0)
    assert (before[1:, :, 7] - after[1:, :, 7]).abs().amax() > 1e-3


def test_attention_is_that_of_pytorch_s_own_module():
    layer = MODEL.sublayers[0]
    peer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    peer.load_state_dict(
        dict(in_proj_weight=layer.qkv.weight, in_proj_bias=layer.qkv.bias, **{"out_proj.weight": layer.out.weight})
        | {"out_proj.bias": layer.out.bias}
    )
    x = torch.randn(3, 7, 16, generator=generator())
    future = torch.ones(7, 7).triu(1).bool()
    z = F.layer_norm(x, (16,))
    torch.testing.assert_close(layer(x), peer(z, z, z, attn_mask=future, need_weights=False)[0])


def test_training_lowers_the_loss_and_leaves_the_model_frozen():
    model = hp.train_lm(CORPUS, 0, steps=60, n_sequences=32)
    text = CORPUS.sample_batch(200, 2, 1.0, generator(1))
    before = hp.TinyLM(CORPUS.vocab_size, generator=generator(0)).requires_grad_(False)
    losses = [float(F.cross_entropy(m(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())) for m in (before, model)]
    assert losses[1] < 0.6 * losses[0]
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


# --- answers ----------------------------------------------------------------------------------------------------------


def test_parts_share_no_subject_and_packings_ask_everything():
    parts = hp.split_groups(220, 7)
    assert [len(part) for part in parts] == [121, 33, 66]
    assert torch.cat(parts).sort().values.tolist() == list(range(220))
    questions = hp.pack_questions(CORPUS, torch.tensor([2, 5]), 3, generator())
    assert questions.shape == (12, 2, 2)
    pairs, counts = questions.view(-1, 2).unique(dim=0, return_counts=True)
    assert pairs.tolist() == [[s, r] for s in (2, 5) for r in range(4)]
    assert counts.tolist() == [3] * 8


def test_answers_are_greedy_and_their_states_have_consumed_them():
    queries = torch.tensor([[[0, 1], [3, 2]], [[5, 0], [0, 3]]])
    spans = hp.generate_answers(MODEL, CORPUS, queries)
    k = 0
    for row in queries:
        text = torch.zeros(1, 1, dtype=torch.long)
        for subject, relation in row.tolist():
            text = torch.cat([text, torch.tensor([[1 + subject, 13 + relation]])], 1)
            for t in range(2):
                log_p = MODEL(text)[0, -1].log_softmax(0)
                token = log_p.argmax()
                text = torch.cat([text, token.view(1, 1)], 1)
                assert abs(float(spans.nll[k, t] + log_p[token])) < 1e-5
                entropy = torch.distributions.Categorical(logits=log_p).entropy()
                assert abs(float(spans.entropy[k, t] - entropy)) < 1e-5
                torch.testing.assert_close(spans.hidden[:, k, t], MODEL.hidden_states(text)[:, 0, -1])
            wrong = (text[0, -2:] != CORPUS.truth[subject, relation]).any()
            assert bool(spans.labels[k]) == bool(wrong)
            assert bool(spans.known[k]) == bool(CORPUS.known[subject, relation])
            k += 1
    assert spans.prompts[1] == "subject 3, relation 2"
    assert all(len(words) == 2 for words in spans.words)


# --- loss -------------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[0.5, -1.0], [2.0, 0.0], [-0.5, -0.25]])
LABELS = torch.tensor([[1, 1], [0, 0], [0, 0]])


def test_loss_by_hand():
    token = float(hp.joint_probe_loss(LOGITS, LABELS, 0.0, rank_weight=0.0))
    span = float(hp.joint_probe_loss(LOGITS, LABELS, 1.0, rank_weight=0.0))
    rank = float(hp.joint_probe_loss(LOGITS, LABELS, 1.0, rank_weight=1.0)) - span
    np.testing.assert_allclose([token, span, rank], [0.461797, 1.058982, 1.702415], atol=1e-6)
    assert abs(float(hp.joint_probe_loss(LOGITS, LABELS, 0.25)) - 1.462301) < 1e-6


def test_without_its_extras_the_loss_is_binary_cross_entropy():
    plain = hp.joint_probe_loss(LOGITS, LABELS, 0.0, gamma=0.0, rank_weight=0.0)
    assert abs(float(plain) - 0.942905) < 1e-6
    torch.testing.assert_close(plain, F.binary_cross_entropy_with_logits(LOGITS, LABELS.float()))
    weighted = hp.joint_probe_loss(LOGITS, LABELS, 0.0, gamma=0.0, rank_weight=0.0, class_weights=(0.5, 2.0))
    weight = torch.where(LABELS == 1, 2.0, 0.5)
    torch.testing.assert_close(weighted, F.binary_cross_entropy_with_logits(LOGITS, LABELS.float(), weight=weight))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), omega=st.floats(0, 1))
def test_order_in_a_span_and_ignored_tokens_do_not_matter(seed, omega):
    logits = torch.randn(6, 4, generator=generator(seed), dtype=torch.float64)
    labels = (torch.arange(6) % 2)[:, None].expand(-1, 4)
    loss = hp.joint_probe_loss(logits, labels, omega)
    order = torch.randperm(4, generator=generator(seed))
    torch.testing.assert_close(hp.joint_probe_loss(logits[:, order], labels, omega), loss)
    padded = F.pad(logits, (0, 2), value=50.0)
    torch.testing.assert_close(hp.joint_probe_loss(padded, F.pad(labels, (0, 2), value=-100), omega), loss)
    extra = torch.cat([logits, torch.full((1, 4), 9.0, dtype=torch.float64)])
    ignored = torch.cat([labels, torch.full((1, 4), -100)])
    torch.testing.assert_close(hp.joint_probe_loss(extra, ignored, omega), loss)


def test_ranking_term_is_zero_for_one_class_and_pairs_are_all_pairs():
    ones = torch.ones_like(LABELS)
    torch.testing.assert_close(
        hp.joint_probe_loss(LOGITS, ones, 1.0), hp.joint_probe_loss(LOGITS, ones, 1.0, rank_weight=0.0)
    )
    logits = torch.randn(7, 3, generator=generator(1))
    y = torch.tensor([1, 0, 1, 0, 0, 1, 0])
    labels = y[:, None].expand(-1, 3)
    z = logits.max(1).values.tolist()
    pairs = [np.log1p(np.exp(1 - (z[i] - z[j]))) for i in range(7) for j in range(7) if y[i] > y[j]]
    rank = hp.joint_probe_loss(logits, labels, 1.0, rank_weight=1.0) - hp.joint_probe_loss(
        logits, labels, 1.0, rank_weight=0.0
    )
    assert abs(float(rank) - np.mean(pairs)) < 1e-5


# --- probes -----------------------------------------------------------------------------------------------------------


def parity(seed, n=600):
    """Spans whose label is the exclusive or of two signs, which no linear probe can tell."""
    hidden = 3 + 5 * torch.randn(n, 2, 6, generator=generator(seed))
    sign = torch.randn(n, 2, generator=generator(seed + 1)).sign()
    hidden[..., :2] = 10 * sign[:, None] + torch.randn(n, 2, 2, generator=generator(seed + 2))
    return hidden, (sign.prod(1) < 0).long()


def test_the_mlp_tells_what_the_linear_probe_cannot():
    hidden, labels = parity(0)
    fresh, truth = parity(10)
    before = hidden.clone()
    for loss in ("joint", "bce"):
        mlp = hp.train_probe(hidden, labels, "mlp", loss, epochs=15)
        assert roc_auc_score(truth, mlp.span_logits(fresh)) > 0.95
        linear = hp.train_probe(hidden, labels, "linear", loss, epochs=15)
        assert abs(roc_auc_score(truth, linear.span_logits(fresh)) - 0.5) < 0.1
    assert torch.equal(hidden, before)


def test_statistics_are_those_of_the_training_tokens_and_a_span_is_its_largest_token():
    hidden, labels = parity(0, 60)
    probe = hp.train_probe(hidden, labels, "linear", epochs=1)
    torch.testing.assert_close(probe.mean, hidden.view(-1, 6).mean(0))
    torch.testing.assert_close(probe.std, hidden.view(-1, 6).std(0))
    other = 100 + hidden
    weight, bias = probe.net[0].weight[0], probe.net[0].bias
    torch.testing.assert_close(probe.token_logits(other), ((other - probe.mean) / probe.std) @ weight + bias)
    torch.testing.assert_close(probe.span_logits(other), probe.token_logits(other).max(1).values)
    torch.testing.assert_close(probe.span_logits(other.flip(1)), probe.span_logits(other))


def test_probes_depend_on_their_seed_only():
    hidden, labels = parity(0, 60)
    state = torch.random.get_rng_state()
    first, again, other = (hp.train_probe(hidden, labels, epochs=1, seed=s).span_logits(hidden) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_probe_touches_the_language_model():
    model = hp.TinyLM(CORPUS.vocab_size, 16, 2, 2, 12, generator=generator())  # its parameters still ask for gradients
    text = CORPUS.sample_batch(40, 1, 0.5, generator())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    hidden = model.hidden_states(text)[2][:, 3:]
    assert hidden.requires_grad
    hp.train_probe(hidden, torch.arange(40) % 2, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


# --- recall -----------------------------------------------------------------------------------------------------------

Y = np.array([0] * 10 + [1] * 4)
SCORES = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.85, 0.92, 0.97, 0.3])


def test_recall_by_hand():
    assert [hp.recall_at_fpr(Y, SCORES, fpr) for fpr in (0, 0.1, 0.3)] == [0.25, 0.5, 0.75]
    assert abs(roc_auc_score(Y, SCORES) - 0.7375) < 1e-12


def test_equal_scores_stay_on_one_side_of_the_threshold():
    assert hp.recall_at_fpr([0, 0, 1, 1], [0.5, 0.1, 0.5, 0.9], 0.25) == 0.5
    assert hp.recall_at_fpr([0, 1], [0.5, 0.5], 0.9) == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), alpha=st.floats(0, 1))
def test_recall_is_the_best_threshold_and_ignores_monotone_maps(seed, alpha):
    scores = torch.randint(12, (40,), generator=generator(seed)).numpy() / 4
    labels = (torch.arange(40) % 3 == 0).long().numpy()
    thresholds = [np.inf, *scores]
    allowed = [t for t in thresholds if (scores[labels == 0] >= t).mean() <= alpha]
    best = max((scores[labels == 1] >= t).mean() for t in allowed)
    assert abs(hp.recall_at_fpr(labels, scores, alpha) - best) < 1e-12
    assert hp.recall_at_fpr(labels, np.exp(scores), alpha) == hp.recall_at_fpr(labels, scores, alpha)
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert hp.recall_at_fpr(labels, scores, alpha) == true[np.searchsorted(false, alpha, side="right") - 1]


# --- the search -------------------------------------------------------------------------------------------------------


def test_expected_improvement_is_its_integral():
    assert abs(float(hp.expected_improvement(0.8, 0.1, 0.75)) - 0.0697797) < 1e-6
    for mean, std, best in ((0.2, 0.5, 0.3), (-1.0, 0.4, 0.0), (2.0, 0.1, 1.0)):
        span = best, max(mean, best) + 10 * std
        value, _ = quad(lambda g: (g - best) * norm.pdf(g, mean, std), *span, points=[max(mean, best)])  # noqa: B023
        assert abs(float(hp.expected_improvement(mean, std, best)) - value) < 1e-7
    np.testing.assert_allclose(hp.expected_improvement([0.8, 0.7], [0, 0], 0.75), [0.05, 0])
    np.testing.assert_allclose(hp.expected_improvement(0.8, 1e-9, 0.75), 0.05)


def test_layer_response_is_the_posterior_in_closed_form(monkeypatch):
    sites, values = [0, 4, 7], [0.5, 0.8, 0.7]
    seen = []

    class Kept(hp.GaussianProcessRegressor):
        def fit(self, *args):
            seen.append(self)
            return super().fit(*args)

    monkeypatch.setattr(hp, "GaussianProcessRegressor", Kept)
    mean, std = hp.layer_response(sites, values, 9)
    kernel = seen[0].kernel_
    scale, length, noise = kernel.k1.k1.constant_value, kernel.k1.k2.length_scale, kernel.k2.noise_level
    x = np.linspace(0, 1, 9)[:, None]
    k = scale * Matern(length, nu=2.5)(x, x)
    observed = np.linalg.inv(k[np.ix_(sites, sites)] + (noise + 1e-10) * np.eye(3))
    centre = np.mean(values)
    np.testing.assert_allclose(mean, centre + k[:, sites] @ observed @ (np.array(values) - centre), atol=1e-6)
    variance = np.diag(k - k[:, sites] @ observed @ k[sites]) + noise
    np.testing.assert_allclose(std**2, variance, atol=1e-6)


@pytest.mark.parametrize("peak", [0.62, 0.2])
def test_search_finds_the_top_of_a_parabola(peak):
    def response(site):
        return 0.9 - 0.4 * (site / 32 - peak) ** 2

    best, visited, values = hp.bayesian_layer_search(response, 33, 8)
    assert max(map(response, range(33))) - response(best) < 1e-3
    assert visited[:2] == [0, 16]
    assert len(set(visited)) == 8
    assert values == [response(site) for site in visited]
    assert response(best) == max(values)


# --- a large language model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["longfact", "healthbench", "triviaqa"])
def test_stand_ins_follow_the_code_of_the_large_model(monkeypatch, dataset):
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    parts = hp.llm_spans(dataset, 5, 20, 3)
    assert [len(part.labels) for part in parts] == [11, 3, 6]
    for part in parts:
        assert part.hidden.shape == (5, len(part.labels), 3, 16)
        assert part.nll.shape == part.entropy.shape == (len(part.labels), 3)
    assert set(torch.cat([part.labels for part in parts]).tolist()) == {0, 1}


def test_missing_packages_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataUnavailable, match=r"longfact.*BOOK_PROFILE=book"):
        hp.llm_spans("longfact", 3, 10, 2)


class Tokenizer:
    """Words, or rather pairs of letters, as tokens."""

    def apply_chat_template(self, turn, tokenize, add_generation_prompt):
        assert add_generation_prompt
        assert not tokenize
        return f"<{turn[0]['content']}>"

    def __call__(self, text, return_offsets_mapping, truncation, max_length):
        offsets = [(k, min(k + 2, len(text))) for k in range(0, len(text), 2)]
        return {"input_ids": [sum(map(ord, text[a:b])) % 50 for a, b in offsets], "offset_mapping": offsets}

    def decode(self, tokens):
        return " ".join(f"t{token}" for token in tokens)


class Network:
    """A small model in the clothes of the large one; it always completes with 7, 7."""

    config = SimpleNamespace(num_hidden_layers=4)

    def __init__(self):
        self.lm = hp.TinyLM(50, 8, 2, 2, 64, generator=generator())

    def to(self, _):
        return self

    eval = lambda self: self  # noqa: E731
    requires_grad_ = lambda self, _: self  # noqa: E731

    def __call__(self, tokens, output_hidden_states):
        assert output_hidden_states
        hidden = self.lm.hidden_states(tokens)
        return SimpleNamespace(hidden_states=tuple(hidden), logits=self.lm.read_out(hidden[-1]))

    def generate(self, tokens, attention_mask, max_new_tokens, do_sample):
        assert not do_sample
        return torch.cat([tokens, torch.full((1, 2), 7)], 1)


@pytest.fixture
def hugging_face(monkeypatch):
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "Ada, or Bob, in Rome"}]
    notes = [
        {"span": "Ada", "index": 0, "label": "Supported"},
        {"span": "Bob", "index": 3, "label": "Not Supported"},  # a wrong place
        {"span": "Rome", "index": None, "label": "Insufficient Information"},
        {"span": "Eve", "index": 4, "label": "Supported"},  # not in the text
        {"span": "in", "index": 13, "label": "N/A"},
        {"span": None, "index": None, "label": "Supported"},
    ]
    asked = []

    def load_dataset(name, config, split=None):
        asked.append((name, config))
        if split:
            return [
                {"question": f"q{k}", "answer": {"normalized_aliases": ["t7" if k % 2 else "no"]}} for k in range(30)
            ]
        return {part: [{"conversation": turns, "annotations": notes}] * 6 for part in ("train", "test")}

    auto = SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: Tokenizer()),
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda name, torch_dtype: Network()),
    )
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "transformers", auto)
    return asked


def test_annotated_spans_are_found_in_the_tokens(hugging_face):
    parts = hp.llm_spans("longfact", 3, 12, 3)
    assert hugging_face == [("obalcells/longfact-annotations", "Qwen2.5-7B-Instruct")]
    assert [len(part.labels) for part in parts] == [21, 3, 12]  # 7, 1 and 4 answers with three spans each
    validation = parts[1]
    assert validation.labels.tolist() == [0, 1, 1]
    assert validation.truths == ["Supported", "Not Supported", "Insufficient Information"]
    # "<who?>" takes three tokens, so "Ada, or Bob, in Rome" falls into Ad|a,| o|r |Bo|b,| i|n |Ro|me
    assert validation.words == [["Ad", "a,"], ["Bo", "b,"], ["Ro", "me"]]
    tokens, _ = hp._Qwen(3).encode("<who?>Ada, or Bob, in Rome")
    lm = Network().lm
    hidden = lm.hidden_states(tokens[None])[[0, 2, 4], 0]
    torch.testing.assert_close(validation.hidden[:, 1], hidden[:, [7, 8, 8]])  # a short span repeats its last token
    log_p = lm(tokens[None])[0].log_softmax(-1)
    torch.testing.assert_close(validation.nll[1], -log_p[[6, 7, 7], tokens[[7, 8, 8]]])


def test_short_answers_are_right_if_they_contain_an_accepted_one(hugging_face):
    parts = hp.llm_spans("triviaqa", 3, 20, 2)
    assert hugging_face == [("trivia_qa", "rc.nocontext")]
    for part in parts:
        assert part.labels.tolist() == [1 - int(question[1:]) % 2 for question in part.prompts]


# --- what a reader can get wrong --------------------------------------------------------------------------------------

HIDDEN, TWO = torch.randn(6, 2, 4, generator=generator()), torch.tensor([0, 1] * 3)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: hp.make_fact_corpus(0, n_subjects=0), "n_subjects"),
        (lambda: hp.make_fact_corpus(0, stereotype_rate=1.5), "stereotype_rate"),
        (lambda: CORPUS.sample_batch(0, 2, 0.5, generator()), "n_sequences"),
        (lambda: CORPUS.sample_batch(2, 2, 1.5, generator()), "known_share"),
        (lambda: hp.TinyLM(10, 6, n_heads=4, generator=generator()), "n_heads"),
        (lambda: MODEL(torch.zeros(1, 13, dtype=torch.long)), "tokens"),
        (lambda: hp.train_lm(CORPUS, 0, steps=0), "steps"),
        (lambda: hp.train_lm(CORPUS, 0, steps=1, n_sequences=0), "n_sequences"),
        (lambda: hp.split_groups(3, 0), "n_groups"),
        (lambda: hp.pack_questions(CORPUS, torch.arange(2), 0, generator()), "n_packings"),
        (lambda: hp.generate_answers(MODEL, CORPUS, torch.tensor([[[0, 4]]])), "queries"),
        (lambda: hp.joint_probe_loss(LOGITS, LABELS[:2], 0.5), "labels"),
        (lambda: hp.joint_probe_loss(LOGITS, LABELS, 1.5), "omega"),
        (lambda: hp.joint_probe_loss(LOGITS, torch.full_like(LABELS, -100), 0.5), "labels"),
        (lambda: hp.joint_probe_loss(LOGITS, LABELS + 1, 0.5), "labels"),
        (lambda: hp.joint_probe_loss(LOGITS, torch.tensor([[1, 0], [0, 0], [0, 0]]), 0.5), "mix"),
        (lambda: hp.train_probe(HIDDEN, TWO, "forest"), "kind"),
        (lambda: hp.train_probe(HIDDEN, TWO, loss="hinge"), "loss"),
        (lambda: hp.train_probe(HIDDEN, TWO[:5]), "hidden"),
        (lambda: hp.train_probe(HIDDEN, torch.zeros(6, dtype=torch.long)), "labels"),
        (lambda: hp.train_probe(HIDDEN, TWO, epochs=0), "epochs"),
        (lambda: hp.train_probe(HIDDEN * torch.nan, TWO), "hidden"),
        (lambda: hp.recall_at_fpr(Y, SCORES, -0.1), "fpr"),
        (lambda: hp.recall_at_fpr(Y * 0, SCORES, 0.1), "labels"),
        (lambda: hp.expected_improvement(0.0, -1.0, 0.0), "std"),
        (lambda: hp.layer_response([0, 9], [0.1, 0.2], 9), "sites"),
        (lambda: hp.layer_response([], [], 9), "sites"),
        (lambda: hp.bayesian_layer_search(float, 9, 10), "n_evaluations"),
        (lambda: hp.llm_spans("squad", 3, 10, 2), "dataset"),
        (lambda: hp.llm_spans("longfact", 1, 10, 2), "n_sites"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()
