"""The construction against eigenvalues, other factorisations, a conic solver and limiting cases."""

import math

import cvxpy as cp
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from companion import data
from companion.robustness.lipschitz_networks import (
    OPENML_SETS,
    LDLTFeedForward,
    LDLTResidual,
    SLLBlock,
    SLLNet,
    SpectralNormNet,
    block_ldl,
    certified_radius,
    checkerboard,
    contraction,
    empirical_lipschitz,
    lipschitz_lmi,
    lipsdp,
    margin_loss,
    rings,
    squared_error,
    train,
    uci,
)

F64 = torch.float64
HIDDEN = [9, 7, 8, 5, 11]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scaled(network, factor):
    """The network in float64 with all its parameters multiplied by a number."""
    with torch.no_grad():
        for parameter in network.double().parameters():
            parameter.mul_(factor)
    return network.requires_grad_(False)


def residual(n=3, factor=1.0, lipschitz=2.0, seed=0):
    return scaled(LDLTResidual(6, HIDDEN[:n], 4, lipschitz, generator=generator(seed)), factor)


def least(M):
    return float(torch.linalg.eigvalsh(M)[0])


# --- the construction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.3, 1, 5])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_construction_satisfies_the_lmi_and_its_ldl_blocks_agree(n, factor):
    network = residual(n, factor, seed=n)
    A, Cs, B = network.weights()
    for last in (B, 3 * B):
        M = lipschitz_lmi(A, Cs, last, 2.0)
        _, blocks = block_ldl(M, [6, *HIDDEN[:n]])
        assert (least(M) > 0) == all(least(block) > 0 for block in blocks)
    assert least(lipschitz_lmi(A, Cs, B, 2.0)) > -1e-9
    points = 3 * torch.randn(200, 6, generator=generator(1), dtype=F64)
    ratio = empirical_lipschitz(network, points) / 2
    assert ratio <= 1 + 1e-9
    assert ratio > 0.95 or factor < 5


@given(seed=st.integers(0, 10**6), lipschitz=st.floats(0.1, 10), spread=st.floats(0.1, 4), log_alpha=st.floats(-3, 3))
def test_any_parameters_are_feasible_and_reached_again(seed, lipschitz, spread, log_alpha):
    network = residual(2, spread, lipschitz, seed)
    network.log_alpha.fill_(log_alpha)
    A, Cs, B = network.weights()
    assert least(lipschitz_lmi(A, Cs, B, lipschitz)) > -1e-9 * lipschitz**2
    other = residual(2, 1, lipschitz, seed + 1)
    other.set_weights(A, Cs, B)
    again_A, again_Cs, again_B = other.weights()
    for before, after in zip([A, *Cs, B], [again_A, *again_Cs, again_B], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-7, atol=1e-9)


def test_every_strictly_feasible_network_is_reached():
    for seed in range(5):
        g = generator(seed)
        A, C_1, C_2, B = (torch.randn(*shape, generator=g, dtype=F64) for shape in ((4, 6), (9, 6), (7, 9), (4, 7)))
        scale = 1.0
        while least(lipschitz_lmi(scale * A, [scale * C_1, scale * C_2], scale * B, 2.0)) < 1e-3:
            scale *= 0.9
        network = residual(2, 1, 2.0, seed)
        network.set_weights(scale * A, [scale * C_1, scale * C_2], scale * B)
        for got, draw in zip(network.weights()[1], (C_1, C_2), strict=True):
            torch.testing.assert_close(got, scale * draw)
        torch.testing.assert_close(network.weights()[0], scale * A)
        torch.testing.assert_close(network.weights()[2], scale * B)


def test_value_by_hand():
    network = scaled(LDLTResidual(1, [1], 1, generator=generator()), 1)
    for V in network.V:
        V.fill_(1)
    A, (C,), B = network.weights()
    assert (float(A), float(C), float(B)) == pytest.approx((0.7071068, 0.7071068, 0.1123724), abs=1e-7)
    M = lipschitz_lmi(A, [C], B, 1.0)
    assert float(torch.linalg.det(M)) == pytest.approx(0.375)
    assert [float(block) for block in block_ldl(M, [1, 1])[1]] == pytest.approx([0.5, 0.75])


def test_last_block_is_the_formula():
    """The numerical LDLᵀ against D_k by Woodbury and D_n with Σ = Σ Γ D⁻¹ Γᵀ, built with plain inverses."""
    network = residual(3, 2.0)
    A, Cs, B = network.weights()
    _, blocks = block_ldl(lipschitz_lmi(A, Cs, B, 2.0), [6, *HIDDEN[:3]])
    eye = lambda n: torch.eye(n, dtype=F64)  # noqa: E731
    for V, block in zip(network.V[1:3], blocks[1:3], strict=True):
        torch.testing.assert_close(torch.linalg.inv(block), (V @ V.mT + eye(len(V))) / 2, rtol=1e-9, atol=1e-9)
    V_A = network.V[0]
    torch.testing.assert_close(torch.linalg.inv(blocks[0]), (V_A.mT @ V_A + eye(6)) / 4, rtol=1e-9, atol=1e-9)
    D, gamma, sigma = 4 * eye(6) - A.mT @ A, eye(6), 0
    for C in Cs:
        inverse = torch.linalg.inv(D)
        sigma = sigma + gamma @ inverse @ gamma.mT
        gamma, D = gamma @ inverse @ C.mT, 2 * eye(len(C)) - C @ inverse @ C.mT
    cross = B.mT @ A @ gamma
    expected = D - cross - cross.mT - B.mT @ (eye(4) + A @ sigma @ A.mT) @ B
    torch.testing.assert_close(blocks[-1], expected, rtol=1e-9, atol=1e-9)


def test_feed_forward_is_certified_and_computes_its_layers():
    network = scaled(LDLTFeedForward(6, HIDDEN, 4, 0.5, torch.tanh, generator=generator()), 3)
    *Cs, B = network.weights()
    assert least(lipschitz_lmi(None, Cs, B, 0.5)) > -1e-12
    assert least(lipschitz_lmi(None, Cs, B, 0.4)) < 0
    x = torch.randn(7, 6, generator=generator(), dtype=F64)
    w = x
    for C, b in zip(Cs, network.biases[:-1], strict=True):
        w = torch.tanh(w @ C.mT + b)
    torch.testing.assert_close(network(x), w @ B.mT + network.biases[-1])


def test_residual_computes_its_formula():
    network = residual(2)
    A, (C_1, C_2), B = network.weights()
    x = torch.randn(7, 6, generator=generator(), dtype=F64)
    hidden = torch.relu(torch.relu(x @ C_1.mT + network.biases[0]) @ C_2.mT + network.biases[1])
    torch.testing.assert_close(network(x), x @ A.mT + hidden @ B.mT + network.b_y)


def test_doubling_the_constant_doubles_the_skip_connection():
    network = residual(2)
    before = network.weights()[0]
    network.lipschitz *= 2
    A, Cs, B = network.weights()
    torch.testing.assert_close(A, 2 * before)
    assert least(lipschitz_lmi(A, Cs, B, 4.0)) > 0


@pytest.mark.parametrize("kind", [LDLTResidual, LDLTFeedForward])
def test_gradients_through_the_weights(kind):
    network = kind(2, [3, 2], 2, generator=generator()).double()

    def flat(*_):
        first, *rest = network.weights()
        Cs = rest[0] if isinstance(rest[0], list) else []
        return torch.cat([W.flatten() for W in [first, *Cs, *(W for W in rest if not isinstance(W, list))]])

    assert torch.autograd.gradcheck(flat, (*network.V, network.log_alpha))


@given(seed=st.integers(0, 10**6), alpha=st.floats(1e-2, 10))
def test_contraction_squeezes_singular_values(seed, alpha):
    V = torch.randn(4, 6, generator=generator(seed), dtype=F64)
    s = torch.linalg.svdvals(V)
    for side, name in (("left", "lower"), ("right", "upper")):
        N = contraction(V, alpha, side)
        torch.testing.assert_close(torch.linalg.svdvals(N), s / (s**2 + alpha).sqrt())
        gram = V @ V.mT if name == "lower" else V.mT @ V
        R = scipy.linalg.cholesky(gram.numpy() + alpha * np.eye(len(gram)), lower=name == "lower")
        expected = np.linalg.solve(R, V) if name == "lower" else V.numpy() @ np.linalg.inv(R)
        np.testing.assert_allclose(N, expected, atol=1e-9)


# --- certificates -----------------------------------------------------------------------------------------------------


def test_general_slopes():
    """One linear hidden unit: f(x) = b s c x for slopes s in [m, l] has the constant |b c| max(|m|, |l|)."""
    C, B = [torch.tensor([[2.0]], dtype=F64)], torch.tensor([[1.5]], dtype=F64)
    for m, l in ((0.0, 1.0), (-0.5, 0.5), (0.2, 0.7)):
        grid = torch.logspace(-1, 2, 801, dtype=F64)
        certified = [
            any(least(lipschitz_lmi(None, C, B, factor * 3 * max(abs(m), l), [v[None]], (m, l))) > 0 for v in grid)
            for factor in (0.99, 1.01)
        ]
        assert certified == [False, True]


def test_multipliers_move_constraints_without_breaking_the_pattern():
    A, Cs, B = residual(3).weights()
    lambdas = [torch.rand(len(C), generator=generator(), dtype=F64) + 0.5 for C in Cs]
    M = lipschitz_lmi(A, Cs, B, 2.0, lambdas)
    torch.testing.assert_close(M, M.mT)
    torch.testing.assert_close(M[6:15, :6], -torch.diag(lambdas[0]) @ Cs[0])
    torch.testing.assert_close(M[22:, :6], -B.mT @ A)
    assert not M[15:22, :6].any()


def test_block_ldl_rebuilds_the_matrix():
    factor = torch.randn(12, 12, generator=generator(), dtype=F64)
    M = factor + factor.mT
    L, blocks = block_ldl(M, [3, 5, 4])
    D = scipy.linalg.block_diag(*blocks)
    np.testing.assert_allclose(L @ torch.tensor(D) @ L.mT, M, atol=1e-10)
    assert not (L - torch.eye(12)).triu(0).any()


def test_block_ldl_refuses_a_singular_pivot():
    with pytest.raises(torch.linalg.LinAlgError):
        block_ldl(torch.ones(2, 2, dtype=F64) - torch.eye(2, dtype=F64), [1, 1])


@pytest.mark.parametrize("kind", ["residual", "feed-forward"])
def test_lipsdp_lies_between_the_empirical_and_the_certified_constant(kind):
    for factor in (1, 5):
        make = LDLTResidual if kind == "residual" else LDLTFeedForward
        network = scaled(make(4, [8, 8], 3, generator=generator(3)), factor)
        weights = network.weights()
        A, Cs, B = weights if kind == "residual" else (None, weights[:-1], weights[-1])
        constant = lipsdp(A, Cs, B)
        points = 3 * torch.randn(300, 4, generator=generator(), dtype=F64)
        assert empirical_lipschitz(network, points) - 1e-9 <= constant <= 1 + 1e-6


def test_lipsdp_of_one_hidden_unit():
    one = torch.ones(1, 1, dtype=F64)
    assert lipsdp(None, [2 * one], 3 * one) == pytest.approx(6, abs=1e-5)
    assert lipsdp(one, [one], -one) == pytest.approx(1, abs=1e-5)  # slopes of x - relu(x) are 0 and 1


def test_lipsdp_agrees_with_a_conic_solver():
    for seed in range(3):
        A, Cs, B = (
            [W.numpy() for W in part] if isinstance(part, list) else part.numpy()
            for part in scaled(LDLTResidual(4, [8, 8], 3, generator=generator(seed)), 1).weights()
        )
        rho, first, second = cp.Variable(), cp.Variable(8), cp.Variable(8)
        one, two = cp.diag(first), cp.diag(second)
        M = cp.bmat(
            [
                [rho * np.eye(4) - A.T @ A, -Cs[0].T @ one, -A.T @ B],
                [-one @ Cs[0], 2 * one, -Cs[1].T @ two],
                [-B.T @ A, -two @ Cs[1], 2 * two - B.T @ B],
            ]
        )
        problem = cp.Problem(cp.Minimize(rho), [(M + M.T) / 2 >> 0])
        problem.solve(solver="CLARABEL")
        ours = lipsdp(torch.tensor(A), [torch.tensor(C) for C in Cs], torch.tensor(B))
        assert ours == pytest.approx(math.sqrt(problem.value), abs=1e-5)


def test_certified_radius_of_a_linear_classifier_is_at_most_its_distance():
    W = torch.randn(3, 5, generator=generator(), dtype=F64)
    W = W / torch.linalg.matrix_norm(W, 2)
    x = torch.randn(50, 5, generator=generator(1), dtype=F64)
    logits = x @ W.mT
    top = logits.argmax(1)
    gaps = (logits.gather(1, top[:, None]) - logits).clamp_min(0)
    slopes = torch.linalg.vector_norm(W[top][:, None] - W[None], dim=-1)
    distance = (gaps / slopes).nan_to_num(math.inf).scatter(1, top[:, None], math.inf).min(1).values
    radius = certified_radius(logits, 1.0)
    assert (radius <= distance + 1e-12).all()
    opposite = torch.tensor([[1.0, -1.0]], dtype=F64).mT / math.sqrt(2)  # here the bound is met
    point = torch.tensor([[0.7]], dtype=F64)
    assert float(certified_radius(point @ opposite.mT, 1.0)) == pytest.approx(0.7)


def test_empirical_constant_of_a_linear_map():
    W = torch.randn(3, 5, generator=generator(), dtype=F64)
    constant = empirical_lipschitz(lambda x: x @ W.mT, torch.zeros(2, 5, dtype=F64))
    assert constant == pytest.approx(float(torch.linalg.svdvals(W)[0]))


# --- baselines --------------------------------------------------------------------------------------------------------


def test_sll_is_a_boundary_case_of_the_lmi():
    block = scaled(SLLBlock(4, 6, generator=generator()), 1)
    block.log_q.copy_(torch.randn(6, generator=generator(1), dtype=F64))
    T, W = block.scales(), block.W
    certificate = torch.eye(4, dtype=F64), [W.mT], -2 * W / T
    assert least(lipschitz_lmi(*certificate, 1.0, [2 / T])) > -1e-12
    assert least(lipschitz_lmi(*certificate, 1.0)) < -0.01
    x = torch.randn(9, 4, generator=generator(), dtype=F64)
    torch.testing.assert_close(block(x), x - 2 * torch.relu(x @ W + block.b) @ torch.diag(1 / T) @ W.mT)
    q = block.log_q.exp()
    rows = [sum(abs(float(W[:, i] @ W[:, j])) * float(q[j] / q[i]) for j in range(6)) for i in range(6)]
    torch.testing.assert_close(T, torch.tensor(rows, dtype=F64))


@pytest.mark.parametrize(
    "net",
    [
        SLLNet(3, 5, 7, 3, 2, generator=generator()),
        SLLNet(3, 5, 7, 3, 2, head=False, generator=generator()),
        SpectralNormNet(3, [6, 6], 2, generator=generator()),
    ],
)
def test_baselines_are_one_lipschitz(net):
    points = 2 * torch.randn(300, 3, generator=generator(), dtype=F64)
    for factor in (1, 5):
        assert empirical_lipschitz(scaled(net, factor), points) <= 1 + 1e-9


def test_spectral_norm_of_one_path_is_exact():
    net = scaled(SpectralNormNet(1, [1], 1, generator=generator()), 1)
    for V in net.V:
        V.fill_(0.2)
    assert empirical_lipschitz(net, torch.tensor([[9.0]], dtype=F64)) == pytest.approx(1)


# --- training and data ------------------------------------------------------------------------------------------------


def test_members_train_as_if_alone():
    x, y = torch.randn(2, 40, 3, generator=generator()), torch.randn(2, 40, 1, generator=generator(1))
    members = [LDLTResidual(3, [4], 1, generator=generator(seed)) for seed in range(2)]
    before = [V.clone() for V in members[0].V]
    settings = dict(steps=5, lr=0.02, batch_size=16)
    both, history = train(members, squared_error, x, y, **settings, generator=generator())
    for k in range(2):
        (alone,), _ = train(
            members[k : k + 1], squared_error, x[k : k + 1], y[k : k + 1], **settings, generator=generator()
        )
        torch.testing.assert_close(both[k](x[k]), alone(x[k]), rtol=1e-4, atol=1e-5)
    assert history["loss"].shape[1] == 2
    assert all(torch.equal(old, V) for old, V in zip(before, members[0].V, strict=True))


def test_margin_loss_is_cross_entropy_of_shifted_logits():
    outputs, y = torch.randn(2, 9, 3, generator=generator()), torch.arange(18).view(2, 9) % 3
    for k, value in enumerate(margin_loss(0.3, 0.1)(outputs, y)):
        terms = []
        for row, label in zip(outputs[k].tolist(), y[k].tolist(), strict=True):
            z = [(v - 0.3 * (j == label)) / 0.1 for j, v in enumerate(row)]
            terms.append(math.log(sum(math.exp(v - z[label]) for v in z)))
        assert float(value) == pytest.approx(np.mean(terms), rel=1e-5)


def test_toy_sets():
    x, y = checkerboard(500, np.random.default_rng(0))
    assert x.abs().max() <= 2
    assert all(int(label) == (math.floor(a) + math.floor(b)) % 2 for (a, b), label in zip(x.tolist(), y, strict=True))
    x, y = rings(500, np.random.default_rng(0))
    assert ((x.norm(dim=1) - 0.5 * (y + 1)).abs() < 0.4).all()
    assert set(y.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("name", "shape"), [("iris", (150, 4)), ("wine", (178, 13)), ("cancer", (569, 30)), ("digits", (1797, 64))]
)
def test_bundled_sets(name, shape):
    x, y = uci(name)
    assert x.shape == shape
    assert sorted(set(y.tolist())) == list(range(int(y.max()) + 1))


def test_downloads_are_kept_whole_or_not_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    monkeypatch.delenv("BOOK_PROFILE", raising=False)

    def refuse(**_):
        raise OSError("no network")

    monkeypatch.setattr(data, "fetch_openml", refuse)
    with pytest.raises(data.DataUnavailable, match=r"sonar.*BOOK_PROFILE=book"):
        uci("sonar")
    assert not list(tmp_path.iterdir())
    answer = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array(["Rock", "Mine"])
    monkeypatch.setattr(data, "fetch_openml", lambda **_: answer)
    x, y = uci("sonar")
    assert x.tolist() == answer[0].tolist()
    assert y.tolist() == [1, 0]
    monkeypatch.setattr(data, "fetch_openml", refuse)
    assert torch.equal(uci("sonar")[0], x)  # from the kept file
    assert len(OPENML_SETS) == 20


# --- what a reader can get wrong --------------------------------------------------------------------------------------

C, B = [torch.ones(3, 2, dtype=F64)], torch.ones(1, 3, dtype=F64)
ONE = torch.eye(2, dtype=F64)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: contraction(ONE, 1.0, "both"), "side"),
        (lambda: contraction(ONE, 0.0, "left"), "alpha"),
        (lambda: lipschitz_lmi(None, [], B, 1.0), "Cs"),
        (lambda: lipschitz_lmi(ONE, C, B, 1.0), "A, Cs and B"),
        (lambda: lipschitz_lmi(None, C, B.mT, 1.0), "A, Cs and B"),
        (lambda: lipschitz_lmi(None, C, B, 0.0), "lipschitz"),
        (lambda: lipschitz_lmi(None, C, B, 1.0, [torch.ones(2, dtype=F64)]), "lambdas"),
        (lambda: lipschitz_lmi(None, C, B, 1.0, [ONE]), "lambdas"),
        (lambda: lipschitz_lmi(None, C, B, 1.0, [-torch.ones(3, dtype=F64)]), "lambdas"),
        (lambda: lipschitz_lmi(None, C, B, 1.0, slopes=(1.0, 0.0)), "slopes"),
        (lambda: block_ldl(ONE, [1, 2]), "sizes"),
        (lambda: block_ldl(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), [1, 1]), "M must be symmetric"),
        (lambda: lipsdp(None, [C[0].float()], B.float()), "float64"),
        (lambda: lipsdp(None, [], B), "Cs"),
        (lambda: certified_radius(torch.ones(3), 1.0), "logits"),
        (lambda: certified_radius(torch.ones(3, 1), 1.0), "logits"),
        (lambda: certified_radius(torch.ones(3, 2), 0.0), "lipschitz"),
        (lambda: empirical_lipschitz(torch.sin, torch.ones(3)), "X"),
        (lambda: LDLTResidual(2, [], 2, generator=generator()), "hidden"),
        (lambda: LDLTResidual(2, [3, 0], 2, generator=generator()), "sizes"),
        (lambda: LDLTResidual(2, [3], 2, 0.0, generator=generator()), "lipschitz"),
        (lambda: LDLTFeedForward(0, [3], 2, generator=generator()), "sizes"),
        (lambda: LDLTFeedForward(2, [], 2, generator=generator()), "hidden"),
        (lambda: LDLTFeedForward(2, [3], 2, -1.0, generator=generator()), "lipschitz"),
        (lambda: residual(1).set_weights(ONE, C, B), "shapes"),
        (lambda: LDLTResidual(2, [3], 1, generator=generator()).double().set_weights(9 * B[:, :2], C, B), "LMI"),
        (lambda: SLLBlock(0, 3, generator=generator()), "sizes"),
        (lambda: SLLNet(4, 3, 3, 1, 2, generator=generator()), "width"),
        (lambda: SLLNet(4, 4, 3, 1, 5, head=False, generator=generator()), "width"),
        (lambda: SLLNet(4, 4, 3, 0, 2, generator=generator()), "hidden"),
        (lambda: SpectralNormNet(4, [], 2, generator=generator()), "hidden"),
        (lambda: margin_loss(-0.1, 0.1), "margin"),
        (lambda: margin_loss(0.1, 0.0), "temperature"),
        (
            lambda: train(
                [residual(1)], squared_error, torch.ones(2, 3, 6), torch.ones(2, 3, 4),
                steps=1, lr=0.1, batch_size=1, generator=generator(),
            ),
            "members",
        ),
        (lambda: uci("mnist"), "name"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
