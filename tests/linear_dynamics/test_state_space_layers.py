"""Oracles: SciPy's discretisation, simulation and Padé approximants, dense linear algebra, quadrature, invariances."""

import copy
import hashlib
import http.server
import io
import math
import tarfile
import threading
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial, legendre
from scipy.integrate import solve_ivp
from scipy.interpolate import pade
from scipy.io import wavfile
from scipy.linalg import expm
from scipy.signal import cont2discrete, dlsim
from torch import nn

from companion import data
from companion.linear_dynamics import state_space_layers
from companion.linear_dynamics.state_space_layers import (
    SPOKEN_WORDS,
    LinearStateSpaceLayer,
    StateSpaceClassifier,
    causal_convolution,
    discretize,
    hippo_legs,
    hippo_legt,
    hippo_structure,
    krylov,
    legs_matvec,
    legs_solve,
    off_diagonal_rank,
    picard_layers,
    quasiseparable,
    simulate,
    speech_commands,
    tone_words,
    train_classifier,
)

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=atol)


# --- HiPPO ------------------------------------------------------------------------------------------------------------


def test_hippo_matrices_have_the_values_computed_by_hand():
    a, b, c = 3**0.5, 5**0.5, 15**0.5
    A, B = hippo_legs(3)
    close(A, torch.tensor([[-1, 0, 0], [-a, -2, 0], [-b, -c, -3]], dtype=F64))
    close(B, torch.tensor([1, a, b], dtype=F64))
    A, B = hippo_legt(3, window=2.0)
    close(2 * A, torch.tensor([[-1, a, -b], [-a, -3, c], [-b, -c, -5]], dtype=F64))
    close(2 * B, torch.tensor([1, a, b], dtype=F64))


@pytest.mark.parametrize("hippo", [hippo_legs, hippo_legt, lambda order: hippo_legt(order, 3.0)])
@pytest.mark.parametrize("order", [1, 2, 7, 20])
def test_a_constant_input_leaves_a_constant_polynomial(hippo, order):
    A, B = hippo(order)
    close(-torch.linalg.solve(A, B), torch.eye(order, dtype=F64)[0], atol=1e-10)


@pytest.mark.parametrize("t", [0.0, 0.3, 2.0])
def test_the_kernel_of_legs_is_a_legendre_polynomial_in_fading_time(t):
    A, B = (part.numpy() for part in hippo_legs(6))
    expected = B * math.exp(-t) * legendre.legvander(np.array([2 * math.exp(-t) - 1]), 5)[0]
    np.testing.assert_allclose(expm(t * A) @ B, expected, atol=1e-12)


def test_the_state_of_scaled_legs_is_the_projection_of_the_past():
    A, B = (part.numpy() for part in hippo_legs(8))
    u = Polynomial([0.3, -1.2, 0.5, 2.0, -1.5, 0.4])
    nodes, weights = legendre.leggauss(20)

    def project(t):
        return B * (legendre.legvander(nodes, 7).T @ (weights / 2 * u(t * (nodes + 1) / 2)))

    path = solve_ivp(lambda t, x: (A @ x + B * u(t)) / t, (0.01, 2), project(0.01), "DOP853", rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(path.y[:, -1], project(2), atol=1e-9)


@pytest.mark.parametrize("window", [1.0, 0.4])
def test_the_read_out_of_the_far_end_of_legt_is_the_padé_approximant_of_a_delay(window):
    A, B = (part.numpy() for part in hippo_legt(6, window))
    C = (-1.0) ** np.arange(6) * np.sqrt(2 * np.arange(6) + 1)
    numerator, denominator = pade([(-1) ** k / math.factorial(k) for k in range(12)], 6, 5)
    s = 3j
    value = C @ np.linalg.solve(s / window * np.eye(6) - A, B)
    assert value == pytest.approx(numerator(s) / denominator(s), abs=1e-9)
    assert value == pytest.approx(-0.98999053017889 - 0.14112023199814j, abs=1e-10)


def test_legt_redraws_a_smooth_window():
    order, step = 16, 1e-3
    t = step * torch.arange(1, 2001, dtype=F64)
    u = torch.sin(5 * t) + 0.3 * t
    states = causal_convolution(u, krylov(*discretize(*hippo_legt(order), step), len(t)))
    s = torch.linspace(0, 1, 11, dtype=F64)
    basis = torch.from_numpy(legendre.legvander((2 * s - 1).numpy(), order - 1)) * hippo_legt(order)[1]
    past = t[-1] - 1 + s
    close(basis @ states[:, -1], torch.sin(5 * past) + 0.3 * past, atol=0.02)


# --- structure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 30])
@pytest.mark.parametrize(("measure", "hippo"), [("legs", hippo_legs), ("legt", hippo_legt)])
def test_hippo_matrices_are_made_of_diagonal_and_tridiagonal_parts(measure, hippo, order):
    close(quasiseparable(*hippo_structure(measure, order)), hippo(order)[0], atol=1e-10)


def test_ranks_of_blocks():
    assert off_diagonal_rank(hippo_legs(32)[0]) == 1
    assert off_diagonal_rank(hippo_legt(32)[0]) == 1
    assert off_diagonal_rank(gauss(32, 32)) == 16
    assert off_diagonal_rank(torch.eye(5)) == 0
    assert off_diagonal_rank(torch.diag(torch.ones(7), -3)) == 3  # only the lower blocks count here
    assert off_diagonal_rank(torch.diag(torch.ones(7), 3)) == 3  # and only the upper ones here
    random_member = quasiseparable(gauss(20), gauss(20, seed=1), gauss(3, 20, seed=2))
    assert off_diagonal_rank(random_member) == 1


@settings(deadline=None, max_examples=30)
@given(order=st.integers(1, 60), step=st.floats(0, 2), seed=st.integers(0, 2**31))
def test_fast_product_and_solution_agree_with_the_dense_matrix(order, step, seed):
    A, _ = hippo_legs(order)
    v = gauss(2, order, seed=seed)
    dense = v @ A.mT
    close(legs_matvec(v), dense, atol=1e-11 * max(1.0, float(dense.abs().max())))
    solved = torch.linalg.solve(torch.eye(order, dtype=F64) - step * A, v.mT).mT
    close(legs_solve(v, step), solved, atol=1e-11 * max(1.0, float(solved.abs().max())))


# --- three views ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("hippo", [hippo_legs, hippo_legt])
def test_discretisation_agrees_with_scipy(hippo, alpha):
    A, B = hippo(9)
    ours = discretize(A, B, 0.07, alpha)
    system = A.numpy(), B[:, None].numpy(), np.ones((1, 9)), np.zeros((1, 1))
    theirs = cont2discrete(system, 0.07, method="gbt", alpha=alpha)
    close(ours[0], theirs[0])
    close(ours[1], theirs[1][:, 0])
    if alpha == 0.5:
        close(ours[0], cont2discrete(system, 0.07, method="bilinear")[0])


def test_discretisation_and_krylov_matrix_have_the_values_computed_by_hand():
    A_bar, B_bar = discretize(*hippo_legs(2), 0.1)
    close(A_bar, torch.tensor([[0.9047619, 0], [-0.14996111, 0.81818182]], dtype=F64), atol=1e-8)
    close(B_bar, torch.tensor([0.0952381, 0.14996111], dtype=F64), atol=1e-8)
    expected = [[0.0952381, 0.0861678, 0.07796134, 0.07053645], [0.14996111, 0.10841344, 0.07578009, 0.05031072]]
    close(krylov(A_bar, B_bar, 4), torch.tensor(expected, dtype=F64), atol=1e-8)


def test_many_steps_are_discretised_side_by_side():
    A, B = hippo_legt(5)
    steps = torch.tensor([0.01, 0.1, 1.0], dtype=F64)
    matrices, vectors = discretize(A, B, steps)
    columns = krylov(matrices, vectors, 7)
    for k, step in enumerate(steps.tolist()):
        A_bar, B_bar = discretize(A, B, step)
        close(matrices[k], A_bar)
        close(vectors[k], B_bar)
        close(columns[k], krylov(A_bar, B_bar, 7))


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
def test_krylov_columns_are_powers(length):
    A_bar, B_bar = discretize(*hippo_legs(6), 0.05)
    expected = [torch.linalg.matrix_power(A_bar, k) @ B_bar for k in range(length)]
    close(krylov(A_bar, B_bar, length), torch.stack(expected, 1))


def test_convolution_agrees_with_numpy():
    u, kernel = gauss(3, 1, 20), gauss(4, 20, seed=1)
    result = causal_convolution(u, kernel)
    assert result.shape == (3, 4, 20)
    for i in range(3):
        for j in range(4):
            close(result[i, j], np.convolve(u[i, 0], kernel[j])[:20])


@pytest.mark.parametrize("hippo", [hippo_legs, hippo_legt])
@pytest.mark.parametrize(("order", "length"), [(8, 100), (32, 300)])
def test_recurrence_convolution_and_scipy_agree(hippo, order, length):
    A_bar, B_bar = discretize(*hippo(order), 1 / length)
    C, D, u = gauss(2, order), gauss(2, seed=1), gauss(length, seed=2)
    y, x = simulate(A_bar, B_bar, C, D, u)
    convolved = causal_convolution(u, C @ krylov(A_bar, B_bar, length)) + D[:, None] * u
    close(y.mT, convolved, atol=1e-11)
    # SciPy reads the state out before the update: its matrices are C Ā and C B̄ + D
    shifted = A_bar.numpy(), B_bar[:, None].numpy(), (C @ A_bar).numpy(), (C @ B_bar + D)[:, None].numpy(), 1.0
    _, theirs, _ = dlsim(shifted, u.numpy())
    close(y, theirs, atol=1e-11)
    close(x[-1], krylov(A_bar, B_bar, length).flip(-1) @ u, atol=1e-11)


def test_a_simulation_can_be_cut_in_two():
    A_bar, B_bar = discretize(*hippo_legs(5), 0.05)
    C, D, u = gauss(1, 5), gauss(1, seed=1), gauss(30, seed=2)
    y, _ = simulate(A_bar, B_bar, C, D, u)
    first, state = simulate(A_bar, B_bar, C, D, u[:12])
    second, _ = simulate(A_bar, B_bar, C, D, u[12:], state[-1])
    close(torch.cat([first, second]), y)


@pytest.mark.parametrize(("alpha", "shift", "order"), [(0.5, 0.5, 2), (0.5, 0.0, 1), (1.0, 0.0, 1), (0.0, 1.0, 1)])
def test_the_recurrence_converges_to_the_differential_equation(alpha, shift, order):
    A, B = hippo_legs(4)
    exact = solve_ivp(
        lambda t, x: A.numpy() @ x + B.numpy() * np.sin(7 * t), (0, 1), np.zeros(4), "DOP853", rtol=1e-12, atol=1e-13
    ).y[:, -1]
    errors = []
    for length in (200, 400):
        u = torch.sin(7 * (torch.arange(1, length + 1, dtype=F64) - shift) / length)
        _, x = simulate(*discretize(A, B, 1 / length, alpha), gauss(1, 4), gauss(1), u)
        errors.append(np.abs(x[-1].numpy() - exact).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@settings(deadline=None, max_examples=20)
@given(z=st.floats(-9, 9))
def test_a_gate_is_a_step_of_backward_euler(z):
    A_bar, B_bar = discretize(torch.tensor([[-1.0]], dtype=F64), torch.ones(1, dtype=F64), math.exp(z), alpha=1.0)
    gate = 1 / (1 + math.exp(-z))
    assert A_bar.item() == pytest.approx(1 - gate, abs=1e-14)
    assert B_bar.item() == pytest.approx(gate, abs=1e-14)


# --- Picard -----------------------------------------------------------------------------------------------------------


def test_picard_iteration_on_a_linear_equation_is_known():
    # dx/dt = -x + x = 0 has the solution x0; dx/dt = -x + 2x has the iterates exp(-t) Σ (2t)^k/k! plus a remainder
    t, layers = picard_layers(lambda t, x: x, 0.7, 3.0, 50, 2)
    close(layers[2], torch.full_like(t, 0.7))
    t, layers = picard_layers(lambda t, x: 2 * x, 1.0, 1.0, 4000, 1)
    close(layers[1], 2 - (-t).exp(), atol=1e-7)  # solves dx/dt = -x + 2, x(0) = 1
    t, layers = picard_layers(lambda t, x: 2 * x, 1.0, 1.0, 4000, 15)
    close(layers[15], t.exp(), atol=1e-6)


def test_picard_iteration_converges_and_starts_from_a_constant():
    t, layers = picard_layers(lambda t, x: torch.sin(2 * x) + torch.cos(2 * t), 0.5, 2.0, 1000, 9)
    exact = solve_ivp(
        lambda t, x: -x + np.sin(2 * x) + np.cos(2 * t), (0, 2), [0.5], "DOP853", t.numpy(), rtol=1e-12, atol=1e-13
    )
    errors = [float((x - torch.from_numpy(exact.y[0])).abs().max()) for x in layers]
    close(layers[0], torch.full_like(t, 0.5))
    assert len(layers) == 10
    assert errors[4] < 0.01
    assert errors[8] < 1e-5
    assert all(after < before for before, after in pairwise(errors[:9]))


# --- layer and network ------------------------------------------------------------------------------------------------


def layer(seed=0, **options):
    return LinearStateSpaceLayer(3, 8, generator=generator(seed), **options).double()


@pytest.mark.parametrize("measure", ["legs", "legt", "random"])
@pytest.mark.parametrize("channels", [1, 2])
def test_both_views_of_the_layer_agree(measure, channels):
    model = layer(channels=channels, measure=measure)
    u = gauss(4, 20, 3)
    state, outputs = None, []
    for u_k in u.unbind(1):
        out, state = model.step(u_k, state)
        outputs.append(out)
    assert state.shape == (4, 3, 8)
    close(torch.stack(outputs, 1), model(u))


def test_the_layer_is_its_parts():
    model = layer(channels=2)
    u = gauss(1, 15, 3)
    inside = []
    for h in range(3):
        A_bar, B_bar = discretize(*hippo_legs(8), float(model.log_step[h].exp()))
        inside.append(simulate(A_bar, B_bar, model.C[h], model.D[h], u[0, :, h])[0])
    close(model(u)[0], model.mix(nn.functional.gelu(torch.cat(inside, 1))))


def test_rate_multiplies_the_steps():
    model, other = layer(step_range=(1e-3, 1e-2)), layer(step_range=(2e-3, 2e-2))
    u = gauss(2, 12, 3)
    close(model(u, rate=2.0), other(u))
    assert (model(u) - other(u)).abs().max() > 1e-6  # and the kept kernels of the two rates are not mixed up


def test_half_the_samples_with_twice_the_step_give_nearly_the_same_output():
    model = layer(step_range=(1e-3, 1e-2))
    t = torch.arange(400, dtype=F64) / 400
    u = torch.sin(2 * math.pi * t[:, None] * torch.tensor([1.0, 2.0, 3.0], dtype=F64))[None]
    full, half = model(u), model(u[:, ::2], rate=2.0)
    assert (half - full[:, ::2]).abs().max() < 0.1 * full.abs().max()
    assert (model(u[:, ::2]) - full[:, ::2]).abs().max() > 0.2 * full.abs().max()


@settings(deadline=None, max_examples=15)
@given(where=st.integers(0, 19), seed=st.integers(0, 2**31))
def test_the_layer_is_causal_and_equivariant_under_shifts(where, seed):
    model, u = layer(), gauss(2, 20, 3, seed=seed)
    changed = u.clone()
    changed[:, where] += 1
    close(model(changed)[:, :where], model(u)[:, :where])
    assert (model(changed)[:, where] - model(u)[:, where]).abs().max() > 1e-9
    late = torch.cat([torch.zeros(2, where, 3, dtype=F64), u], 1)
    close(model(late)[:, where:], model(u))


def test_the_kernel_follows_what_is_loaded_cast_and_trained():
    model, other = layer(0), layer(1)
    u = gauss(1, 10, 3)
    model(u)
    model.load_state_dict(other.state_dict())
    close(model(u), other(u))
    single = copy.deepcopy(model).float()
    assert single(u.float()).dtype == torch.float32
    trained = layer(train_dynamics=True)
    before = trained(u)
    with torch.no_grad():
        trained.log_step += 0.5
    assert (trained(u) - before).abs().max() > 1e-6


def test_trained_dynamics_start_where_fixed_ones_stay_and_have_gradients():
    fixed, trained = layer(), layer(train_dynamics=True)
    u = gauss(2, 10, 3)
    close(trained(u), fixed(u))
    trained(u).square().sum().backward()
    for name in ("log_step", "scale", "diagonal", "tridiagonal"):
        assert getattr(trained, name).grad.abs().max() > 0
        assert name not in dict(fixed.named_parameters())


def test_steps_are_spread_over_the_range_on_a_logarithmic_axis():
    model = LinearStateSpaceLayer(4000, 2, generator=generator(), step_range=(1e-3, 1e-1))
    steps = model.log_step.exp()
    assert 1e-3 <= steps.min() < 1.1e-3
    assert 0.09 < steps.max() <= 0.1
    assert steps.log10().mean() == pytest.approx(-2, abs=0.03)


def test_the_classifier_is_its_parts_and_has_the_stated_size():
    model = StateSpaceClassifier(1, 16, 32, 2, 9, generator=generator(), step_range=(4e-3, 1e-1))
    assert sum(parameter.numel() for parameter in model.parameters()) == 1849
    u = torch.randn(5, 30, 1, generator=generator())
    z = model.encoder(u)
    for norm, block in zip(model.norms, model.layers, strict=True):
        z = z + block(norm(z), 2.0)
    torch.testing.assert_close(model(u, rate=2.0), model.head(z.mean(1)))


def test_training_learns_a_small_task_and_is_reproducible():
    labels = torch.arange(64) % 2
    phase = 2 * math.pi * torch.rand(64, 1, generator=generator())
    u = torch.sin(torch.arange(20) * (0.5 + 0.7 * labels[:, None]) + phase)[..., None]  # slow or fast

    def trained():
        model = StateSpaceClassifier(1, 8, 8, 1, 2, generator=generator(), train_dynamics=True, step_range=(0.05, 0.5))
        before = model.layers[0].log_step.clone()
        train_classifier(model, u, labels, epochs=25, lr=0.03, generator=generator(), batch=16)
        assert (model.layers[0].log_step - before).abs().max() > 1e-3
        return model(u).argmax(1)

    first = trained()
    assert (first == labels).float().mean() > 0.9
    assert torch.equal(first, trained())


def test_weights_decay_and_dynamics_do_not():
    u, labels = torch.randn(8, 12, 1, generator=generator()), torch.arange(8) % 2

    def trained(weight_decay):
        model = StateSpaceClassifier(1, 3, 4, 1, 2, generator=generator(), train_dynamics=True)
        options = dict(epochs=1, lr=1e-6, generator=generator(), batch=4, weight_decay=weight_decay)
        train_classifier(model, u, labels, **options)
        return dict(model.named_parameters())

    plain, decayed = trained(0.0), trained(1e5)  # with lr = 1e-6, the largest step takes a tenth of a weight
    for name in plain:
        if name.rpartition(".")[2] in ("log_step", "scale", "diagonal", "tridiagonal"):
            torch.testing.assert_close(decayed[name], plain[name], rtol=0, atol=1e-5)
        elif not name.startswith("norms") or name.endswith("weight"):  # a normalisation's shift starts at zero
            assert decayed[name].norm() < 0.95 * plain[name].norm()


# --- words ------------------------------------------------------------------------------------------------------------


def test_words_are_the_same_signals_at_every_sampling_rate():
    u, labels = tone_words(20, 128, generator())
    dense, same = tone_words(20, 512, generator())
    assert u.shape == (20, 128, 1)
    torch.testing.assert_close(dense[:, ::4], u, rtol=0, atol=1e-4)
    assert torch.equal(labels, same)


def test_words_hold_their_pitches_in_order_and_nothing_fast():
    u, labels = tone_words(900, 256, generator())
    assert labels.bincount().shape == (9,)
    assert labels.bincount().min() > 60
    halves = u[:, :128, 0], u[:, 128:, 0]
    frequencies = torch.fft.rfftfreq(128, 1 / 256)
    for half, pitch in zip(halves, (labels // 3, labels % 3), strict=True):
        loudest = frequencies[torch.fft.rfft(half * torch.hann_window(128)).abs().argmax(1)]
        nearest = (loudest[:, None] - torch.tensor([5.0, 9.0, 14.0])).abs().argmin(1)
        assert (nearest == pitch).float().mean() > 0.95
    power = torch.fft.rfft(u[..., 0] * torch.hann_window(256)).abs().square().sum(0)
    assert power[32:].sum() < 1e-3 * power.sum()  # above the Nyquist frequency of 64 samples


# --- spoken words -----------------------------------------------------------------------------------------------------


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def speech(monkeypatch, tmp_path):
    """A local archive with two recordings that count, and the folder where downloads are kept."""
    monkeypatch.setenv("BOOK_PROFILE", "full")
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "kept"))
    served = tmp_path / "served"
    served.mkdir()
    waves = np.random.default_rng(0).integers(-(2**15), 2**15, (6, 16_000)).astype(np.int16)
    names = ["go/a_nohash_0.wav", "_background_noise_/hum.wav", "cat/b_nohash_0.wav", "yes/a_nohash_1.wav"]
    members = dict(zip(names, waves, strict=False)) | {"yes/cut_nohash_0.wav": waves[4][:15_999]}
    with tarfile.open(served / "speech.tar.gz", "w:gz") as archive:
        for name, wave in members.items():
            wavfile.write(body := io.BytesIO(), 16_000, wave)
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(body.getvalue())
            archive.addfile(member, io.BytesIO(body.getvalue()))
        member = tarfile.TarInfo("./yes/README.md")
        archive.addfile(member, io.BytesIO())
    digest = hashlib.md5((served / "speech.tar.gz").read_bytes()).hexdigest()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietFiles, directory=str(served))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/speech.tar.gz"
        monkeypatch.setattr(state_space_layers, "_SPEECH_COMMANDS", (address, f"md5:{digest}"))
        yield waves[[0, 3]], tmp_path / "kept"
        server.shutdown()


def test_speech_is_whole_seconds_of_the_ten_words(speech, capfd):
    u, labels = speech_commands()
    assert u.dtype == torch.float32
    np.testing.assert_array_equal(u[..., 0] * 2**15, speech[0])
    assert labels.tolist() == [SPOKEN_WORDS.index("go"), SPOKEN_WORDS.index("yes")]
    assert capfd.readouterr().err == ""


def test_another_archive_than_that_of_speech_commands_is_refused(speech, monkeypatch):
    address, _ = state_space_layers._SPEECH_COMMANDS
    monkeypatch.setattr(state_space_layers, "_SPEECH_COMMANDS", (address, "md5:" + "0" * 32))
    with pytest.raises(data.DataUnavailable, match=r"'speech_commands' could not be downloaded.*BOOK_PROFILE=book"):
        speech_commands()
    assert not list(speech[1].iterdir())


def test_the_stand_in_for_speech_is_read_like_speech(monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    monkeypatch.setattr(data, "download", lambda *_: pytest.fail("a download was tried"))
    u, labels = speech_commands()
    assert labels.bincount().tolist() == [4] * 10  # without the noise and the recording that was cut short
    loudest = torch.fft.rfft(u[..., 0]).abs().argmax(1)  # in Hz, for one second
    assert torch.equal(loudest, 100 * (labels + 1))


# --- errors -----------------------------------------------------------------------------------------------------------

A3, B3 = hippo_legs(3)
C3, D3, U3 = gauss(2, 3), gauss(2), gauss(7)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: hippo_legs(0), "order"),
        (lambda: hippo_legt(0), "order"),
        (lambda: hippo_legt(3, 0.0), "window"),
        (lambda: hippo_legt(3, math.nan), "window"),
        (lambda: hippo_structure("random", 3), "measure"),
        (lambda: hippo_structure("legs", 0), "order"),
        (lambda: quasiseparable(B3, B3, A3[:2]), "tridiagonal"),
        (lambda: quasiseparable(B3, B3[:2], A3), "diagonal"),
        (lambda: off_diagonal_rank(C3), "A must"),
        (lambda: off_diagonal_rank(A3[:1, :1]), "A must"),
        (lambda: legs_matvec(torch.empty(0)), "order"),
        (lambda: legs_solve(B3, -0.1), "step"),
        (lambda: legs_solve(B3, math.nan), "step"),
        (lambda: discretize(C3, B3, 0.1), "A must"),
        (lambda: discretize(A3, B3[:2], 0.1), r"B \(N,\)"),
        (lambda: discretize(A3, B3, 0.0), "step"),
        (lambda: discretize(A3, B3, torch.tensor([0.1, -0.1])), "step"),
        (lambda: discretize(A3, B3, math.nan), "step"),
        (lambda: discretize(A3, B3, 0.1, alpha=1.5), "alpha"),
        (lambda: discretize(A3, B3, 0.1, alpha=math.nan), "alpha"),
        (lambda: krylov(A3, B3, 0), "length"),
        (lambda: krylov(C3, B3, 4), "A_bar"),
        (lambda: krylov(A3, B3[:2], 4), "B_bar"),
        (lambda: causal_convolution(U3, U3[:-1]), "kernel"),
        (lambda: simulate(A3, B3, C3[:, :2], D3, U3), "C"),
        (lambda: simulate(A3, B3, C3, D3[:1], U3), "D"),
        (lambda: simulate(A3[:2], B3, C3, D3, U3), "A_bar"),
        (lambda: simulate(A3, B3, C3, D3, U3[:, None]), "u"),
        (lambda: simulate(A3, B3, C3, D3, U3, B3[:2]), "x0"),
        (lambda: picard_layers(torch.add, 0.0, 0.0, 5, 1), "horizon"),
        (lambda: picard_layers(torch.add, 0.0, 1.0, 0, 1), "steps"),
        (lambda: picard_layers(torch.add, 0.0, 1.0, 5, -1), "depth"),
        (lambda: layer(channels=0), "channels"),
        (lambda: layer(measure="lmu"), "measure"),
        (lambda: layer(measure="random", train_dynamics=True), "measure"),
        (lambda: layer(step_range=(0.0, 0.1)), "step_range"),
        (lambda: layer(step_range=(0.2, 0.1)), "step_range"),
        (lambda: layer()(gauss(2, 5, 4)), "u must"),
        (lambda: layer()(gauss(2, 5, 3), rate=0.0), "rate"),
        (lambda: layer().step(gauss(2, 4)), "u_k"),
        (lambda: StateSpaceClassifier(1, 4, 4, 0, 2, generator=generator()), "depth"),
        (lambda: StateSpaceClassifier(1, 0, 4, 1, 2, generator=generator()), "sizes"),
        (lambda: train_classifier(layer(), U3, U3[:2].long(), epochs=1, lr=0.1, generator=generator()), "labels"),
        (lambda: train_classifier(layer(), U3, U3.long(), epochs=0, lr=0.1, generator=generator()), "epochs"),
        (lambda: train_classifier(layer(), U3, U3.long(), epochs=1, lr=0.0, generator=generator()), "lr"),
        (lambda: train_classifier(layer(), U3, U3.long(), epochs=1, lr=0.1, generator=generator(), batch=8), "batch"),
        (lambda: tone_words(0, 8, generator()), "samples"),
        (lambda: tone_words(8, 0, generator()), "length"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_inputs_stay_as_they_are():
    arguments = [A3, B3, C3, D3, U3]
    before = [part.clone() for part in arguments]
    A_bar, B_bar = discretize(A3, B3, 0.1)
    simulate(A_bar, B_bar, C3, D3, U3)
    krylov(A3, B3, 5)
    legs_matvec(B3)
    legs_solve(B3, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
