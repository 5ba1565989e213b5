"""Oracles: exact modes, conservation laws, reciprocity, SciPy's integrator and least squares, finite differences."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import lstsq
from torch import nn

from companion.scientific_ml.acoustic_operators import (
    SPEED_OF_SOUND,
    DeepONet,
    ModifiedMLP,
    Recording,
    Room,
    acoustic_energy,
    fourier_features,
    gaussian_source,
    linear_operator,
    nearest_source,
    room_mask,
    simulate_wave,
    train_operators,
    transfer,
)

F64 = torch.float64
H, LAM = 0.05, 0.6
DT = LAM * H / SPEED_OF_SOUND
ELL, SQUARE = room_mask("L", 2.0, H), room_mask("square", 2.0, H)
SOURCE = torch.tensor([[0.5, 0.7]], dtype=F64)
SMALL = Room("L", dx=0.1, steps=8)
NET = {"hidden": 12, "n_basis": 5, "frequencies": (0.5, 1.0)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rms(error):
    return float(error.square().mean().sqrt())


def centres(n, h):
    return (torch.arange(n, dtype=F64) + 0.5) * h


def modal_series(position, sigma, side, times, n, modes=30):
    """Pressure in the rigid square at the centres of n × n cells; projections by quadrature on a grid of its own."""
    m = torch.arange(modes, dtype=F64)
    norm = torch.where(m == 0, math.sqrt(1 / side), math.sqrt(2 / side))[:, None]
    quadrature = centres(2000, side / 2000)

    def phi(x):
        return norm * torch.cos(math.pi / side * m[:, None] * x)

    branch = [phi(quadrature) @ torch.exp(-((quadrature - x0) ** 2) / sigma**2) * side / 2000 for x0 in position]
    omega = SPEED_OF_SOUND * math.pi / side * (m[:, None] ** 2 + m**2).sqrt()
    trunk = phi(centres(n, side / n))
    return torch.einsum("m,n,tmn,mx,ny->txy", *branch, torch.cos(times[:, None, None] * omega), trunk, trunk)


# --- the solver -------------------------------------------------------------------------------------------------------


def test_a_mode_of_the_rigid_square_keeps_its_shape():
    x = centres(40, H)
    start = torch.outer(torch.cos(1.5 * math.pi * x), torch.cos(math.pi * x))
    field = simulate_wave(start[None], SQUARE, H, DT, 60)[0]
    kx, ky = 1.5 * math.pi, math.pi
    omega = 2 / DT * math.asin(LAM * math.hypot(math.sin(kx * H / 2), math.sin(ky * H / 2)))
    assert omega == pytest.approx(1941.2183, abs=1e-4)
    exact = start * torch.cos(omega * DT * torch.arange(61, dtype=F64))[:, None, None]
    assert (field - exact).abs().max() < 1e-13


def test_the_solver_converges_to_the_modal_series_with_second_order():
    # A pulse in the middle barely touches the walls, so that its start is smooth enough for the full order.
    errors = []
    for n in (20, 40, 80):
        h, steps = 2 / n, 3 * n // 2
        mask, dt = room_mask("square", 2.0, h), LAM * h / SPEED_OF_SOUND
        pulse = gaussian_source(torch.tensor([[0.95, 1.05]], dtype=F64), mask, h, 0.3)
        field = simulate_wave(pulse, mask, h, dt, steps)[0]
        exact = modal_series((0.95, 1.05), 0.3, 2.0, dt * torch.arange(steps + 1, dtype=F64), n)
        errors.append(rms(field - exact))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(orders) > 1.9
    assert max(orders) < 2.1


def test_known_values_on_the_square_and_the_l():
    pulse = gaussian_source(SOURCE, SQUARE, H, 0.4)
    field = simulate_wave(pulse, SQUARE, H, DT, 60)[0]
    np.testing.assert_allclose(field[[20, 40, 60], 10, 30], [0.206761, 0.113740, 0.178719], atol=1e-6)
    exact = modal_series((0.5, 0.7), 0.4, 2.0, DT * torch.tensor([20.0, 40.0, 60.0], dtype=F64), 40)
    np.testing.assert_allclose(exact[:, 10, 30], [0.207650, 0.112818, 0.178565], atol=1e-4)
    sound = simulate_wave(gaussian_source(SOURCE, ELL, H, 0.4), ELL, H, DT, 60, 1 / 18)[0]
    assert sound[60, 10, 30] == pytest.approx(0.2764121258, abs=1e-7)


def test_the_scheme_is_a_discretisation_of_its_wave_equation_in_time():
    # With cells fixed and Δt → 0 it solves h² p'' = c² L p - γ c h b p'/1, integrated here by SciPy, walls and all.
    mask = room_mask("L", 0.4, 0.1)
    inside = [tuple(cell) for cell in mask.nonzero().tolist()]
    number = {cell: k for k, cell in enumerate(inside)}
    graph, faces = np.zeros((len(inside),) * 2), np.full(len(inside), 4.0)
    for (i, j), k in number.items():
        for neighbour in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if neighbour in number:
                graph[k, number[neighbour]] = 1
                graph[k, k] -= 1
                faces[k] -= 1
    p0 = torch.rand(1, 4, 4, generator=generator(), dtype=F64)
    h, gamma, end = 0.1, 0.3, 1e-3

    def flow(_, state):
        p, v = np.split(state, 2)
        return np.concatenate([v, (SPEED_OF_SOUND / h) ** 2 * graph @ p - gamma * SPEED_OF_SOUND / h * faces * v])

    start = np.concatenate([p0[0][mask], np.zeros(len(inside))])
    exact = solve_ivp(flow, (0, end), start, rtol=1e-11, atol=1e-12).y[: len(inside), -1]
    errors = [
        np.abs(simulate_wave(p0, mask, h, end / steps, steps, gamma)[0, -1][mask].numpy() - exact).max()
        for steps in (200, 400)
    ]
    assert errors[0] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.sampled_from([ELL, SQUARE]))
def test_rigid_walls_keep_energy_and_mean(seed, mask):
    start = torch.randn(1, 40, 40, generator=generator(seed), dtype=F64) * mask
    field = simulate_wave(start, mask, H, DT, 60)[0]
    energy = acoustic_energy(field, mask, LAM)
    assert (energy / energy[0] - 1).abs().max() < 1e-13
    assert (field.sum((1, 2)) - start.sum()).abs().max() < 1e-10
    assert not field[:, ~mask].any()


def test_absorbing_walls_only_absorb():
    field = simulate_wave(gaussian_source(SOURCE, ELL, H, 0.4), ELL, H, DT, 60, 1 / 18)[0]
    energy = acoustic_energy(field, ELL, LAM)
    assert (energy.diff() <= 0).all()
    assert energy[0] == pytest.approx(0.53591, abs=1e-5)
    assert energy[-1] == pytest.approx(0.36594, abs=1e-5)


def test_the_energy_is_that_of_the_wave_equation():
    # From a start at rest all energy is potential, λ²/2 times the sum of squared differences between neighbours.
    pulse = gaussian_source(SOURCE, ELL, H, 0.4)
    energy = acoustic_energy(simulate_wave(pulse, ELL, H, DT / 100, 1)[0], ELL, LAM / 100)[0]
    u = pulse[0]
    squares = ((u[1:] - u[:-1])[ELL[1:] & ELL[:-1]] ** 2).sum() + (
        (u[:, 1:] - u[:, :-1])[ELL[:, 1:] & ELL[:, :-1]] ** 2
    ).sum()
    assert float(energy) == pytest.approx((LAM / 100) ** 2 / 2 * float(squares), rel=1e-4)


def test_source_and_listener_may_change_places():
    clicks = torch.zeros(2, 40, 40, dtype=F64)
    clicks[0, 10, 30] = clicks[1, 30, 5] = 1
    heard = simulate_wave(clicks, ELL, H, DT, 60, 1 / 18)
    assert (heard[0, :, 30, 5] - heard[1, :, 10, 30]).abs().max() < 1e-15
    assert heard[0, :, 30, 5].abs().max() == pytest.approx(0.01675, abs=1e-5)


@settings(max_examples=10)
@given(st.floats(-3, 3), st.integers(0, 2**31))
def test_the_operator_is_linear_and_the_input_stays(a, seed):
    u = torch.randn(2, 40, 40, generator=generator(seed), dtype=F64)
    before = u.clone()
    one, other = simulate_wave(u, ELL, H, DT, 20, 0.2)
    both = simulate_wave((a * u[0] + u[1])[None], ELL, H, DT, 20, 0.2)[0]
    torch.testing.assert_close(both, a * one + other, rtol=0, atol=1e-10)
    assert torch.equal(u, before)


def test_a_room_is_symmetric_about_its_diagonal():
    one = simulate_wave(gaussian_source(SOURCE, ELL, H, 0.4), ELL, H, DT, 30, 0.1)
    mirrored = simulate_wave(gaussian_source(SOURCE.flip(1), ELL, H, 0.4), ELL, H, DT, 30, 0.1)
    torch.testing.assert_close(one.mT, mirrored, rtol=0, atol=1e-13)


# --- rooms and recordings ---------------------------------------------------------------------------------------------


def test_masks_and_lattices():
    assert SQUARE.all()
    assert int(ELL.sum()) == 1200
    assert not ELL[20:, 20:].any()
    assert len(Room("L").lattice(0.25)) == 48
    assert len(Room("square").lattice(0.25)) == 64
    assert Room("L").lattice(0.25).min() == 0.125


def test_gaussian_source_is_the_formula():
    x = centres(40, H)
    expected = torch.exp(-((x[:, None] - 0.5) ** 2 + (x[None] - 0.7) ** 2) / 0.16) * ELL
    torch.testing.assert_close(gaussian_source(SOURCE, ELL, H, 0.4)[0], expected, rtol=0, atol=1e-14)


def test_random_sources_fill_the_room():
    points = Room("L").random_sources(4000, generator())
    assert gaussian_source(points, ELL, H, 0.4).shape == (4000, 40, 40)  # all inside
    assert float((points > 1).any(1).float().mean()) == pytest.approx(2 / 3, abs=0.03)
    assert float((points / H % 1).mean()) == pytest.approx(0.5, abs=0.02)


def test_a_recording_is_the_field_at_its_coordinates():
    positions = SMALL.lattice(0.5)
    whole = SMALL.record(positions, at_once=5)
    chosen = torch.tensor([7, 2000, 3, 900])
    some = SMALL.record(positions, chosen)
    torch.testing.assert_close(some, whole.at(chosen))
    field = SMALL.fields(positions)
    for y, p in zip(some.y.double(), some.p.mT, strict=True):
        i, j = ((y[:2] + 1) / 2 * SMALL.side / SMALL.dx - 0.5).round().long()
        n = round(float(y[2]) * SMALL.side / SPEED_OF_SOUND / SMALL.dt)
        torch.testing.assert_close(p, field[:, n, i, j].float())
    assert len(whole.y) == int(SMALL.mask.sum()) * 9


def test_sensors_read_the_pulse():
    room = Room("L")
    sensors = room.sensors(SOURCE)
    assert sensors.shape == (1, 100)
    x = centres(40, H)[2::4]
    inside = (x[:, None] < 1) | (x[None] < 1)
    expected = torch.exp(-((x[:, None] - 0.5) ** 2 + (x[None] - 0.7) ** 2) / 0.16) * inside
    torch.testing.assert_close(sensors[0], expected.flatten().float())


def test_a_refined_room_lasts_as_long_and_agrees():
    room = Room("square", dx=0.1, steps=30, impedance=math.inf)
    fine = room.refined(3)
    assert fine.steps * fine.dt == pytest.approx(room.steps * room.dt)
    middle = torch.tensor([[1.0, 1.0]], dtype=F64)
    gaps = [rms(r.fields(middle)[0] - r.refined(3).fields(middle)[0, ::3, 1::3, 1::3]) for r in (room, fine)]
    assert math.log(gaps[0] / gaps[1], 3) == pytest.approx(2, abs=0.05)


# --- the networks -----------------------------------------------------------------------------------------------------


def test_fourier_features_at_the_origin_and_elsewhere():
    zero = fourier_features(torch.zeros(4, 3), (0.5, 2.0))
    assert zero.shape == (4, 15)
    assert zero[0].tolist() == [0] * 3 + [1] * 6 + [0] * 6
    features = fourier_features(torch.tensor([[0.25, -0.5]]), (1.0,))
    torch.testing.assert_close(features, torch.tensor([[0.25, -0.5, 0, -1, 1, 0]]), atol=1e-6, rtol=0)
    assert torch.equal(fourier_features(torch.ones(2, 3), ()), torch.ones(2, 3))
    point = torch.rand(6, 3, generator=generator())
    waves = [wave(2 * math.pi * f * point) for wave in (torch.cos, torch.sin) for f in (0.5, 1.5)]
    torch.testing.assert_close(fourier_features(point, (0.5, 1.5)), torch.cat([point, *waves], 1))


@pytest.mark.parametrize("gated", [True, False])
def test_modified_mlp_is_its_formula(gated):
    net = ModifiedMLP(4, 6, 2, 3, omega0=7.0, gated=gated, generator=generator()).double()
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5, generator=generator(parameter.numel()))
    x = torch.randn(5, 4, generator=generator(1), dtype=F64).numpy()
    state = {name: value.detach().numpy() for name, value in net.named_parameters()}

    def layer(name, z, factor=1.0):
        return np.sin(factor * z @ state[f"{name}.weight"].T + state[f"{name}.bias"])

    z = x
    for k in range(3):
        z = layer(f"layers.{k}", z, 7.0 if k == 0 else 1.0)
        if gated:
            z = z * layer("codes.0", x) + (1 - z) * layer("codes.1", x)
    expected = z @ state["output.weight"].T + state["output.bias"]
    np.testing.assert_allclose(net(torch.from_numpy(x)).detach(), expected, atol=1e-12)


def test_initial_weights_have_the_stated_ranges():
    net = ModifiedMLP(50, 60, 40, 2, generator=generator())
    for layer, limit in [
        (net.codes[0], 1 / 50),
        (net.layers[0], 1 / 50),
        (net.layers[1], 0.1**0.5),
        (net.output, 0.1**0.5),
    ]:
        assert 0.95 * limit < layer.weight.abs().max() <= limit
        assert not layer.bias.any()


def test_deeponet_is_a_scaled_inner_product_and_linear_in_the_branch_s_output():
    net = DeepONet(100, **NET, generator=generator())
    net.bias.data.fill_(0.3)
    u, y = torch.rand(4, 100, generator=generator(1)), torch.rand(7, 3, generator=generator(2))
    with torch.no_grad():
        first = net(u, y)
        by_hand = net.branch(2 * u - 1) @ net.trunk(fourier_features(y, NET["frequencies"])).T / 5**0.5 + 0.3
        torch.testing.assert_close(first, by_hand)
        for parameter in net.branch.output.parameters():
            parameter *= 2
        torch.testing.assert_close(net(u, y) - 0.3, 2 * (first - 0.3))


def test_the_book_s_network_has_seventy_thousand_parameters():
    count = sum(parameter.numel() for parameter in DeepONet(100, generator=generator()).parameters())
    assert 70_000 < count < 76_000


def test_transfer_copies_and_freezes_the_input_side():
    net = DeepONet(20, **NET, generator=generator())
    frozen, free = transfer(net), transfer(net, freeze=False)
    for copy in (frozen, free):
        for (name, a), b in zip(net.named_parameters(), copy.parameters(), strict=True):
            assert torch.equal(a, b), name
            assert a is not b
    trainable = {name.rsplit(".", 1)[0] for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trainable == {"branch.output", "trunk.layers.1", "trunk.layers.2", "trunk.output", "bias"}
    assert all(parameter.requires_grad for parameter in [*net.parameters(), *free.parameters()])


TABLE = SMALL.record(SMALL.lattice(0.5))


def test_training_lowers_the_error_and_leaves_what_it_was_given():
    nets = [DeepONet(TABLE.u.shape[1], **NET, generator=generator(seed)) for seed in range(2)]
    before = [[parameter.clone() for parameter in net.parameters()] for net in nets]
    options = {"steps": 60, "n_sources": 100, "n_coordinates": 200, "lr": 1e-2}
    trained = train_operators(nets, [TABLE] * 2, **options).members()
    for net, kept, better in zip(nets, before, trained, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), kept, strict=True))
        with torch.no_grad():
            assert rms(better(TABLE.u, TABLE.y) - TABLE.p) < 0.7 * rms(net(TABLE.u, TABLE.y) - TABLE.p)


def test_members_train_as_if_alone_and_frozen_layers_stay():
    nets = [transfer(DeepONet(TABLE.u.shape[1], **NET, generator=generator(seed))) for seed in range(2)]
    options = {"steps": 10, "n_sources": 6, "n_coordinates": 20, "lr": 1e-3}
    together = train_operators(nets, [TABLE] * 2, **options).members()[0]
    (alone,) = train_operators(nets[:1], [TABLE], **options).members()
    moved = set()
    for (name, start), a, b in zip(nets[0].named_parameters(), together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        moved |= {name} if not torch.equal(a, start) else set()
    assert moved == {name for name, parameter in nets[0].named_parameters() if parameter.requires_grad}


def test_the_first_loss_is_the_mean_square_over_all_pairs(monkeypatch):
    net = DeepONet(TABLE.u.shape[1], **NET, generator=generator())
    seen = []

    def fit(loss, parameters, **_):
        seen.append(loss(0))

    monkeypatch.setattr("companion.scientific_ml.acoustic_operators.fit", fit)
    train_operators([net], [TABLE], steps=1, n_sources=1000, n_coordinates=30, lr=1e-3)
    drawn = TABLE.at(torch.randint(len(TABLE.y), (30,), generator=generator(0)))
    torch.testing.assert_close(seen[0], (net(drawn.u, drawn.y) - drawn.p).square().mean()[None])


def test_each_member_draws_from_all_sources_and_on_its_own(monkeypatch):
    net = DeepONet(TABLE.u.shape[1], **NET, generator=generator())
    told, losses = {}, []

    def fit(loss, parameters, **options):
        told.update(options)
        losses.extend(loss(step).detach() for step in range(300))

    monkeypatch.setattr("companion.scientific_ml.acoustic_operators.fit", fit)
    loud = TABLE._replace(p=TABLE.p * torch.linspace(0, 3, len(TABLE.u))[:, None])  # the first sources are quiet
    train_operators([net] * 2, [loud] * 2, steps=300, n_sources=2, n_coordinates=50, lr=1e-3)
    drawn = torch.stack(losses)
    with torch.no_grad():
        expected = float((net(loud.u, loud.y) - loud.p).square().mean())
    assert drawn.mean(0).tolist() == pytest.approx([expected] * 2, rel=0.15)
    assert not torch.equal(drawn[0, 0], drawn[0, 1])
    assert told["cosine_to"] == 0


# --- baselines --------------------------------------------------------------------------------------------------------


def test_the_table_answers_with_the_nearest_source():
    near = SMALL.lattice(0.5) + 0.04
    torch.testing.assert_close(nearest_source(SMALL.sensors(near), TABLE), TABLE.p)


def test_the_linear_fit_is_scipy_s_minimum_norm_solution():
    matrix = linear_operator(TABLE)
    expected = lstsq(TABLE.u.double().numpy(), TABLE.p.double().numpy())[0]
    np.testing.assert_allclose(matrix, expected, atol=1e-5)
    torch.testing.assert_close(TABLE.u @ matrix, TABLE.p, rtol=0, atol=1e-5)


def test_the_linear_fit_recovers_a_linear_operator():
    operator = torch.randn(6, 9, generator=generator())
    u = torch.randn(20, 6, generator=generator(1))
    torch.testing.assert_close(
        linear_operator(Recording(u, torch.zeros(9, 3), u @ operator)), operator, atol=1e-5, rtol=0
    )


# --- what a reader can get wrong --------------------------------------------------------------------------------------

U, FLAT = torch.zeros(1, 40, 40, dtype=F64), torch.zeros(40, 40, dtype=F64)
TINY = DeepONet(TABLE.u.shape[1], **NET, generator=generator())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: simulate_wave(FLAT, SQUARE, H, DT, 5), "p0"),
        (lambda: simulate_wave(U, SQUARE[:20], H, DT, 5), "p0"),
        (lambda: simulate_wave(U * math.nan, SQUARE, H, DT, 5), "p0"),
        (lambda: simulate_wave(U, SQUARE, H, 1.2 * DT, 5), "c dt/dx"),
        (lambda: simulate_wave(U, SQUARE, H, 0.0, 5), "c dt/dx"),
        (lambda: simulate_wave(U, SQUARE, H, DT, 5, -0.1), "admittance"),
        (lambda: simulate_wave(U, SQUARE, H, DT, 0), "steps"),
        (lambda: acoustic_energy(U[:1], SQUARE, LAM), "field"),
        (lambda: acoustic_energy(U.repeat(3, 1, 1), SQUARE[:3], LAM), "field"),
        (lambda: acoustic_energy(U.repeat(3, 1, 1), SQUARE, 0.0), "lam"),
        (lambda: room_mask("dome", 2.0, H), "shape"),
        (lambda: room_mask("square", 2.0, 0.3), "side"),
        (lambda: room_mask("L", 1.5, 0.1), "side"),
        (lambda: gaussian_source(torch.tensor([[1.5, 1.5]]), ELL, H, 0.4), "positions"),
        (lambda: gaussian_source(torch.tensor([[0.5, 2.5]]), ELL, H, 0.4), "positions"),
        (lambda: gaussian_source(torch.tensor([0.5, 0.5]), ELL, H, 0.4), "positions"),
        (lambda: gaussian_source(SOURCE, ELL, H, 0.0), "sigma"),
        (lambda: replace(SMALL, shape="dome").mask, "shape"),
        (lambda: ModifiedMLP(3, 0, 1, 2, generator=generator()), "hidden"),
        (lambda: ModifiedMLP(3, 4, 1, 0, generator=generator()), "depth"),
        (lambda: train_operators([TINY], [TABLE] * 2, steps=1, n_sources=1, n_coordinates=1, lr=1e-3), "recordings"),
        (lambda: train_operators([TINY], [TABLE], steps=1, n_sources=0, n_coordinates=1, lr=1e-3), "n_sources"),
        (lambda: train_operators([TINY], [TABLE], steps=1, n_sources=1, n_coordinates=0, lr=1e-3), "n_coordinates"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
