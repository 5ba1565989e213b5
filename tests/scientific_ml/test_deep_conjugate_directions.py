"""Deep conjugate directions against closed forms, SciPy's solvers, and the physics that the simulation must obey."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import cg, eigsh, splu, spsolve

from companion.scientific_ml.deep_conjugate_directions import (
    DirectionNetwork,
    PoissonOperator,
    advect,
    conjugate_gradient,
    deep_conjugate_direction,
    deflated_conjugate_gradient,
    direction_loss,
    incomplete_cholesky,
    lanczos_ritz,
    multigrid,
    open_to_outside,
    plume_step,
    project,
    ritz_dataset,
    train_direction_network,
)

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def box(n, dims=2):
    return torch.ones((n,) * dims, dtype=torch.bool)


def with_discs(n):
    """The test system: three solid discs."""
    rng, fluid = np.random.default_rng(0), np.ones((n, n), bool)
    y, x = np.meshgrid(*[(np.arange(n) + 0.5) / n] * 2, indexing="ij")
    for _ in range(3):
        centre, radius = rng.uniform(0.2, 0.8, 2), rng.uniform(0.06, 0.13)
        fluid &= np.hypot(y - centre[0], x - centre[1]) > radius
    return torch.from_numpy(fluid)


def scattered(n, seed, dims=2):
    return open_to_outside(torch.rand((n,) * dims, generator=generator(seed)) > 0.25)


def noise(operator, seed=5):
    return torch.randn(operator.fluid.shape, generator=generator(seed), dtype=F64) * operator.fluid


def vector(operator, field):
    return field[operator.fluid].numpy()


def energy(operator, error):
    return float((error * operator(error)).sum())


# --- operator ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dims", "n"), [(2, 12), (3, 6)])
def test_operator_is_its_sparse_matrix(dims, n):
    operator = PoissonOperator(scattered(n, 1, dims))
    x = torch.randn(3, 2, *operator.fluid.shape, generator=generator(), dtype=F64)
    image = operator(x)
    assert image.shape == x.shape
    assert (image[..., ~operator.fluid] == 0).all()
    for field, result in zip(x.flatten(0, 1), image.flatten(0, 1), strict=True):
        np.testing.assert_allclose(vector(operator, result), operator.to_sparse() @ vector(operator, field), atol=1e-12)
    np.testing.assert_array_equal(operator.to_sparse().diagonal(), vector(operator, operator.diagonal))


def test_a_corner_and_a_solid_by_hand():
    fluid = box(3)
    fluid[1, 1] = False
    operator = PoissonOperator(fluid)
    assert operator.diagonal.tolist() == [[4, 3, 4], [3, 0, 3], [4, 3, 4]]
    image = operator(torch.tensor([[1.0, 2, 3], [4, 100, 6], [7, 8, 9]]))
    assert image.tolist() == [[4 - 2 - 4, 3 * 2 - 1 - 3, 12 - 2 - 6], [12 - 1 - 7, 0, 18 - 3 - 9], [16, 8, 36 - 6 - 8]]


@pytest.mark.parametrize(("dims", "n"), [(2, 9), (3, 4)])
def test_eigenvalues_of_the_empty_box(dims, n):
    wave = 2 - 2 * np.cos(np.pi * np.arange(1, n + 1) / (n + 1))
    expected = np.sort(sum(np.meshgrid(*[wave] * dims)).ravel())
    matrix = PoissonOperator(box(n, dims)).to_sparse().toarray()
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), expected, atol=1e-12)


def test_extreme_eigenvalues_at_the_size_of_the_training():
    matrix = PoissonOperator(box(32)).to_sparse()
    assert eigsh(matrix, 1, sigma=0, return_eigenvectors=False)[0] == pytest.approx(0.018112, abs=1e-6)
    assert eigsh(matrix, 1, which="LA", return_eigenvectors=False)[0] == pytest.approx(7.981888, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_operator_is_symmetric_and_positive(seed):
    operator = PoissonOperator(scattered(8, seed))
    x, y = noise(operator, seed), noise(operator, seed + 1)
    assert float((x * operator(y)).sum()) == pytest.approx(float((y * operator(x)).sum()), abs=1e-10)
    assert energy(operator, x) > 0
    assert energy(operator, x) == pytest.approx(sum(float(g.square().sum()) for g in operator.gradient(x)))


def test_closed_pockets_are_found():
    fluid = box(7)
    fluid[1:4, 1:4] = False
    fluid[2, 2] = True
    expected = fluid.clone()
    expected[2, 2] = False
    assert torch.equal(open_to_outside(fluid), expected)
    with pytest.raises(ValueError, match="way out"):
        PoissonOperator(fluid)


# --- training data ----------------------------------------------------------------------------------------------------


def test_lanczos_gives_ritz_vectors():
    operator = PoissonOperator(box(12))
    values, vectors = lanczos_ritz(operator, 40, generator())
    flat = vectors.flatten(1)
    torch.testing.assert_close(flat @ flat.mT, torch.eye(40, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(flat @ operator(vectors).flatten(1).mT, torch.diag(values), rtol=0, atol=1e-12)
    assert (values.diff() > 0).all()
    krylov = [operator(torch.randn(12, 12, generator=generator(), dtype=F64))]
    for _ in range(4):
        krylov.append(operator(krylov[-1]))
    for field in krylov:  # in the span
        torch.testing.assert_close(flat.mT @ (flat @ field.flatten()), field.flatten(), rtol=1e-9, atol=1e-9)


def test_a_full_krylov_space_gives_eigenvalues():
    n = 4  # many eigenvalues are multiple, and a Krylov space holds one vector for each
    matrix = PoissonOperator(box(n)).to_sparse().toarray()
    distinct = np.unique(np.linalg.eigvalsh(matrix).round(9))
    values, _ = lanczos_ritz(PoissonOperator(box(n)), len(distinct), generator())
    np.testing.assert_allclose(values, distinct, atol=1e-9)
    with pytest.raises(ValueError, match="num_steps"):
        lanczos_ritz(PoissonOperator(box(n)), len(distinct) + 1, generator())


def test_dataset_has_norm_one_and_boosts_the_lower_half():
    _, vectors = lanczos_ritz(PoissonOperator(box(12)), 20, generator())
    for boost in (1.0, 9.0):
        data = ritz_dataset(vectors, 4000, generator(1), boost)
        assert data.shape == (4000, 1, 12, 12)
        torch.testing.assert_close(data.flatten(1).norm(dim=1), torch.ones(4000, dtype=F64))
        power = (data.flatten(1) @ vectors.flatten(1).mT).square().mean(0)
        assert float(power[:10].sum() / power[10:].sum()) == pytest.approx(boost**2, rel=0.15 if boost == 1 else 0.4)


# --- network, loss, training ------------------------------------------------------------------------------------------


def test_network_has_the_expected_size_and_is_homogeneous():
    network = DirectionNetwork(generator=generator())
    assert sum(parameter.numel() for parameter in network.parameters()) == 8144
    b = torch.randn(2, 1, 16, 16, generator=generator(1))
    with torch.no_grad():
        torch.testing.assert_close(network(1e-3 * b), 1e-3 * network(b), rtol=1e-4, atol=1e-8)
        assert network(torch.randn(1, 1, 40, 40)).shape == (1, 1, 40, 40)
        assert DirectionNetwork(2, 2, 3, generator=generator())(torch.randn(1, 1, 8, 8, 8)).shape == (1, 1, 8, 8, 8)


def test_network_commutes_with_shifts_by_whole_blocks():
    network = DirectionNetwork(2, 1, generator=generator())
    b = torch.zeros(1, 1, 64, 64)
    b[..., 30:34, 30:34] = torch.randn(4, 4, generator=generator(1))
    with torch.no_grad():
        torch.testing.assert_close(
            network(b).roll((2, -4), (2, 3)), network(b.roll((2, -4), (2, 3))), atol=1e-6, rtol=0
        )


def test_network_goes_down_and_up_as_written():
    """Without its 3x3 corrections the network is a sum of block averages, times 4 for each halving of the grid."""
    network = DirectionNetwork(1, 2, generator=generator())
    for parameter in network.parameters():
        parameter.data.zero_()
    network.first.weight.data[0, 0, 1, 1] = 1
    network.last.weight.data.fill_(1)
    b = torch.randn(1, 1, 8, 8, generator=generator(1))

    def average(x, size):
        return (
            x.view(8 // size, size, 8 // size, size).mean((1, 3)).repeat_interleave(size, 0).repeat_interleave(size, 1)
        )

    expected = b[0, 0] + 4 * average(b[0, 0], 2) + 16 * average(b[0, 0], 4)
    torch.testing.assert_close(network(b)[0, 0], expected)


def test_loss_is_the_residual_after_one_step():
    operator = PoissonOperator(with_discs(16))
    b = noise(operator) / noise(operator).norm()
    f = torch.randn(4, 16, 16, generator=generator(2), dtype=F64)
    for direction, loss in zip(f, direction_loss(operator, f, b.expand(4, 16, 16)), strict=True):
        _, residuals = deep_conjugate_direction(operator, b, lambda r: direction, 1e-12, 1)  # noqa: B023
        assert float(loss) == pytest.approx(residuals[1] ** 2, rel=1e-10)
    solution = torch.zeros_like(b)
    solution[operator.fluid] = torch.from_numpy(spsolve(operator.to_sparse().tocsc(), vector(operator, b)))
    assert float(direction_loss(operator, 7 * solution, b)) < 1e-20


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(-50, 50).filter(lambda c: abs(c) > 1e-3), seed=st.integers(0, 1000))
def test_loss_does_not_see_the_scale(scale, seed):
    operator = PoissonOperator(box(8))
    f, b = noise(operator, seed), noise(operator, seed + 1)
    torch.testing.assert_close(
        direction_loss(operator, scale * f, b), direction_loss(operator, f, b), rtol=1e-9, atol=0
    )


def test_training_is_that_of_each_network_alone_and_lowers_the_loss():
    operator = PoissonOperator(box(16))
    _, vectors = lanczos_ritz(operator, 40, generator())
    data = ritz_dataset(vectors, 100, generator(1)).float()
    starts = [DirectionNetwork(4, 2, generator=generator(seed)) for seed in range(2)]
    before = [parameter.clone() for parameter in starts[1].parameters()]
    together, losses = train_direction_network(operator, data, starts, [generator(7), generator(8)], steps=60)
    assert losses.shape == (60, 2)
    assert losses[-10:].mean() < 0.5 * losses[0].mean()
    _, alone = train_direction_network(operator, data, starts[1:], [generator(8)], steps=10, lr=6e-3)
    assert float(alone[0, 0]) == pytest.approx(float(losses[0, 1]), rel=1e-4)
    assert all(torch.equal(old, new) for old, new in zip(before, starts[1].parameters(), strict=True))
    assert len(together) == 2
    assert not together[0].last.weight.requires_grad or together[0].last.weight.is_leaf


def test_training_clips_each_network_by_its_own_norm():
    """Adam's first step hardly depends on the gradient's size, so the second moments are looked at after several."""
    operator, data = PoissonOperator(box(8)), torch.randn(8, 1, 8, 8, generator=generator())
    data /= data.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    start = DirectionNetwork(2, 1, generator=generator(3))
    loud = DirectionNetwork(2, 1, generator=generator(3))
    loud.last.weight.data *= (
        1e-6  # a scale that the loss does not see makes the gradient of this layer a million times larger
    )
    reference, _ = train_direction_network(operator, data, [start], [generator(1)], steps=10, batch_size=8)
    (quiet, _), _ = train_direction_network(
        operator, data, [start, loud], [generator(1), generator(1)], steps=10, batch_size=8
    )
    for one, other in zip(reference[0].parameters(), quiet.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# --- the iteration ----------------------------------------------------------------------------------------------------


def test_the_identity_gives_conjugate_gradients():
    operator = PoissonOperator(with_discs(64))
    b = noise(operator)
    _, identity = deep_conjugate_direction(operator, b, lambda r: r, 1e-4, 1000)
    _, on_grid = conjugate_gradient(operator, b, 1e-4)
    _, on_cells = conjugate_gradient(operator.to_sparse(), vector(operator, b), 1e-4)
    assert len(identity) == len(on_grid) == len(on_cells) == 145
    np.testing.assert_allclose(identity[:21], on_grid[:21], rtol=1e-8)
    np.testing.assert_allclose(on_grid, on_cells, rtol=1e-8)


@pytest.mark.parametrize("scale", [1.0, -7.0, 1e-3])
def test_the_exact_inverse_takes_one_iteration(scale):
    operator = PoissonOperator(with_discs(16))
    b, factor = noise(operator), splu(operator.to_sparse().tocsc())

    def inverse(r):
        return torch.zeros_like(r).masked_scatter(
            operator.fluid, torch.from_numpy(scale * factor.solve(vector(operator, r)))
        )

    x, residuals = deep_conjugate_direction(operator, b, inverse, 1e-10, 10)
    assert len(residuals) == 2
    np.testing.assert_allclose(vector(operator, x), factor.solve(vector(operator, b)), rtol=1e-9, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), number=st.integers(0, 3))
def test_energy_never_grows_and_scale_does_not_matter(seed, number):
    operator = PoissonOperator(scattered(8, seed))
    b = noise(operator, seed)
    solution = spsolve(operator.to_sparse().tocsc(), vector(operator, b))
    solution = torch.zeros_like(b).masked_scatter(operator.fluid, torch.from_numpy(solution))
    draws = torch.randn(12, 8, 8, generator=generator(seed + 1), dtype=F64)

    def run(steps, scale):
        proposals = iter(scale * draws)
        return deep_conjugate_direction(operator, b, lambda r: next(proposals), 1e-14, steps, number)

    energies = [energy(operator, solution)] + [energy(operator, solution - run(k, 1.0)[0]) for k in range(1, 13)]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(energies))
    np.testing.assert_allclose(run(12, 1.0)[1], run(12, -3.0)[1], rtol=1e-8)


def test_directions_are_conjugate_to_the_latest_ones():
    operator = PoissonOperator(box(8))
    b = noise(operator)
    draws = torch.randn(9, 8, 8, generator=generator(1), dtype=F64)
    for number in (0, 1, 2, 4):
        iterates = [torch.zeros_like(b)]
        for k in range(1, 10):
            proposals = iter(draws)
            iterates.append(deep_conjugate_direction(operator, b, lambda r: next(proposals), 1e-14, k, number)[0])  # noqa: B023
        p = torch.stack(iterates).diff(dim=0)
        p = p / (p * operator(p)).sum((1, 2), keepdim=True).sqrt()
        products = (p.flatten(1) @ operator(p).flatten(1).mT).abs()
        distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
        if number:
            assert products[(distance > 0) & (distance <= number)].max() < 1e-8
        assert products[distance > number].max() > 1e-2


def test_solution_is_blank_in_solids_and_the_residual_is_the_true_one():
    operator = PoissonOperator(with_discs(16))
    b = noise(operator)
    before = b.clone()
    x, residuals = deep_conjugate_direction(operator, b, lambda r: r + 5 * ~operator.fluid, 1e-6, 200)
    assert (x[~operator.fluid] == 0).all()
    assert residuals[-1] == pytest.approx(float((b - operator(x)).norm() / b.norm()), rel=1e-12)
    assert residuals[-1] < 1e-6 <= residuals[-2]
    assert torch.equal(b, before)


def test_a_proposal_orthogonal_to_the_residual_stalls():
    operator = PoissonOperator(box(4))
    b = torch.zeros(4, 4, dtype=F64)
    b[0] = 1
    x, residuals = deep_conjugate_direction(operator, b, lambda r: r.flip(0), 1e-6, 20, num_orthogonal=0)
    assert residuals == [1.0] * 21
    assert not x.any()


# --- classical solvers ------------------------------------------------------------------------------------------------


def test_conjugate_gradient_is_scipys():
    operator = PoissonOperator(with_discs(24))
    matrix, b = operator.to_sparse(), vector(operator, noise(operator))
    for preconditioner in (None, multigrid(operator)):
        steps = []
        M = None if preconditioner is None else csr_array(np.stack([preconditioner(e) for e in np.eye(len(b))], 1))
        cg(matrix, b, rtol=1e-6, M=M, callback=steps.append)
        ours, residuals = conjugate_gradient(matrix, b, 1e-6, preconditioner or (lambda r: r))
        assert len(steps) == len(residuals) - 1
        np.testing.assert_allclose(ours, steps[-1], rtol=1e-6, atol=1e-9)


def test_incomplete_cholesky_is_exact_where_nothing_fills_in():
    ends = np.random.default_rng(0).uniform(0.2, 0.9, 19)
    matrix = csr_array(diags_array([-ends, np.full(20, 2.5), -ends], offsets=[-1, 0, 1]))
    np.testing.assert_allclose(incomplete_cholesky(matrix).toarray(), np.linalg.cholesky(matrix.toarray()), atol=1e-12)
    dense = np.cov(np.random.default_rng(1).normal(size=(6, 50)))
    np.testing.assert_allclose(incomplete_cholesky(csr_array(dense)).toarray(), np.linalg.cholesky(dense), atol=1e-12)


def test_incomplete_cholesky_agrees_with_the_matrix_on_its_pattern():
    operator = PoissonOperator(with_discs(32))
    matrix = operator.to_sparse()
    lower = incomplete_cholesky(matrix)
    assert (lower.toarray() != 0).sum() == (np.tril(matrix.toarray()) != 0).sum()
    product, pattern = (lower @ lower.T).toarray(), matrix.toarray() != 0
    np.testing.assert_allclose(product[pattern], matrix.toarray()[pattern], atol=1e-12)
    factor = splu(lower.tocsc(), permc_spec="NATURAL", diag_pivot_thresh=0)
    b = vector(operator, noise(operator))
    x, residuals = conjugate_gradient(matrix, b, 1e-10, lambda r: factor.solve(factor.solve(r), "T"))
    np.testing.assert_allclose(x, spsolve(matrix.tocsc(), b), rtol=1e-7, atol=1e-8)
    assert len(residuals) < 0.5 * len(conjugate_gradient(matrix, b, 1e-10)[1])


def test_deflation_finds_the_solution_sooner():
    operator = PoissonOperator(with_discs(32))
    matrix, b = operator.to_sparse(), vector(operator, noise(operator))
    W = eigsh(matrix, 16, sigma=0)[1]
    x, residuals = deflated_conjugate_gradient(matrix, b, W, 1e-12)
    np.testing.assert_allclose(x, spsolve(matrix.tocsc(), b), rtol=1e-9, atol=1e-9)
    assert len(residuals) < 0.6 * len(conjugate_gradient(matrix, b, 1e-12)[1])
    solution = spsolve(matrix.tocsc(), b)
    _, at_once = deflated_conjugate_gradient(matrix, b, np.c_[solution, W], 1e-8)
    assert len(at_once) == 1  # the solution lies in the deflated space


@pytest.mark.parametrize("fluid", [box(20), with_discs(32), scattered(24, 3), box(8, 3)])
def test_multigrid_is_symmetric_positive_and_good(fluid):
    operator = PoissonOperator(fluid)
    cycle, b, c = multigrid(operator), vector(operator, noise(operator)), vector(operator, noise(operator, 6))
    assert c @ cycle(b) == pytest.approx(b @ cycle(c), rel=1e-9)
    assert b @ cycle(b) > 0
    x, residuals = conjugate_gradient(operator.to_sparse(), b, 1e-10, cycle)
    np.testing.assert_allclose(x, spsolve(operator.to_sparse().tocsc(), b), rtol=1e-6, atol=1e-8)
    assert len(residuals) < 35


def test_multigrid_does_not_depend_on_size():
    steps = []
    for n in (32, 96):
        operator = PoissonOperator(box(n))
        steps.append(
            len(
                conjugate_gradient(operator.to_sparse(), vector(operator, noise(operator)), 1e-4, multigrid(operator))[
                    1
                ]
            )
        )
    assert steps[1] <= steps[0] + 2


# --- smoke ------------------------------------------------------------------------------------------------------------


def solver(operator):
    return lambda b: conjugate_gradient(operator, b, 1e-12)[0]


def random_flow(operator, seed=0):
    return [torch.randn(faces.shape, generator=generator(seed), dtype=F64) for faces in operator.open]


@pytest.mark.parametrize("fluid", [with_discs(16), scattered(6, 2, dims=3)])
def test_projection_removes_the_divergence_and_no_more(fluid):
    operator = PoissonOperator(fluid)
    flow = random_flow(operator)
    before = [part.clone() for part in flow]
    once = project(operator, flow, solver(operator))
    assert operator.divergence(once).abs().max() < 1e-9
    assert all((part[~faces] == 0).all() for part, faces in zip(once, operator.open, strict=True))
    removed = [faces * a - b for a, b, faces in zip(flow, once, operator.open, strict=True)]
    assert abs(sum(float((a * b).sum()) for a, b in zip(removed, once, strict=True))) < 1e-8  # an orthogonal projection
    assert all(torch.equal(a, b) for a, b in zip(flow, before, strict=True))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_uniform_wind_shifts_a_field(dims):
    fluid = box(8, dims)
    operator = PoissonOperator(fluid)
    wind = [torch.full(faces.shape, float(axis + 1), dtype=F64) for axis, faces in enumerate(operator.open)]
    field = torch.zeros(fluid.shape, dtype=F64)
    field[(slice(2, 4),) * dims] = torch.rand((2,) * dims, generator=generator(), dtype=F64)
    centre = torch.full((dims,), 0.5, dtype=F64)
    moved = advect(field, centre, wind, 1.0)
    torch.testing.assert_close(moved, field.roll(tuple(range(1, dims + 1)), tuple(range(dims))), rtol=0, atol=1e-12)
    for axis, flow in enumerate(wind):  # a constant stays, on the faces as well
        offset = centre.clone()
        offset[axis] = 0
        torch.testing.assert_close(advect(flow, offset, wind, 0.7), flow, rtol=0, atol=1e-12)


def test_a_rigid_rotation_turns_a_field_by_its_angle():
    operator = PoissonOperator(box(32))
    y, x = torch.meshgrid(*[torch.arange(32, dtype=F64) - 15.5] * 2, indexing="ij")
    along = torch.arange(32, dtype=F64) - 15.5
    wind = [along.expand(33, 32).clone(), -along[:, None].expand(32, 33).clone()]  # dy/dt = x, dx/dt = -y
    assert operator.divergence(wind).abs().max() < 1e-12
    blob = torch.exp(-((y - 5) ** 2 + x**2) / 20)
    moved, angle, steps = blob, math.pi / 4, 100
    for _ in range(steps):
        moved = advect(moved, torch.tensor([0.5, 0.5], dtype=F64), wind, angle / steps)
    mass = moved.sum()
    assert float((moved * y).sum() / mass) == pytest.approx(5 * math.cos(angle), abs=0.1)
    assert float((moved * x).sum() / mass) == pytest.approx(-5 * math.sin(angle), abs=0.1)


def test_smoke_rises_and_keeps_the_symmetry_of_its_box():
    fluid = box(16)
    fluid[9:11, 6:10] = False
    operator = PoissonOperator(fluid)
    source = torch.zeros_like(fluid)
    source[2:4, 6:10] = True
    density, velocity = torch.zeros(16, 16, dtype=F64), [torch.zeros(f.shape, dtype=F64) for f in operator.open]
    height = []
    for _ in range(12):
        density, velocity = plume_step(operator, density, velocity, source, solver(operator))
        height.append(float((density * torch.arange(16)[:, None]).sum() / density.sum()))
        assert operator.divergence(velocity).abs().max() < 1e-9
    assert density.min() >= 0
    assert density.max() <= 1
    assert (density[~fluid] == 0).all()
    assert (density[source] == 1).all()
    assert height[-1] > height[0] + 0.5
    torch.testing.assert_close(density, density.flip(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(velocity[0], velocity[0].flip(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(velocity[1], -velocity[1].flip(1), rtol=0, atol=1e-9)


def test_without_buoyancy_nothing_is_set_in_motion():
    operator = PoissonOperator(box(8))
    source = torch.zeros(8, 8, dtype=torch.bool)
    source[3, 3] = True
    still = [torch.zeros(f.shape, dtype=F64) for f in operator.open]
    density, velocity = plume_step(operator, torch.zeros(8, 8, dtype=F64), still, source, lambda b: 0 * b, buoyancy=0.0)
    assert density.sum() == 1
    assert not any(flow.any() for flow in velocity)


# --- what a reader can get wrong --------------------------------------------------------------------------------------

SMALL = PoissonOperator(box(8))
B = noise(SMALL)
STILL = [torch.zeros(faces.shape, dtype=F64) for faces in SMALL.open]
MATRIX, V = SMALL.to_sparse(), vector(SMALL, B)
HOLE = PoissonOperator(with_discs(16))


def network(**options):
    return DirectionNetwork(**{"channels": 2, "levels": 1, **options}, generator=generator())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: PoissonOperator(torch.ones(4, 4)), "fluid"),
        (lambda: PoissonOperator(torch.ones(4, 5, dtype=torch.bool)), "fluid"),
        (lambda: PoissonOperator(torch.ones(4, dtype=torch.bool)), "fluid"),
        (lambda: PoissonOperator(torch.zeros(4, 4, dtype=torch.bool)), "fluid"),
        (lambda: lanczos_ritz(SMALL, 0, generator()), "num_steps"),
        (lambda: ritz_dataset(torch.ones(4, 8, 8), 0, generator()), "num"),
        (lambda: ritz_dataset(torch.ones(4, 8, 8), 3, generator(), boost=0), "boost"),
        (lambda: ritz_dataset(torch.ones(1, 8, 8), 3, generator()), "vectors"),
        (lambda: network(channels=0), "channels"),
        (lambda: network(levels=0), "levels"),
        (lambda: network(dims=4), "dims"),
        (lambda: network(levels=3)(torch.ones(1, 1, 12, 12)), "b must"),
        (lambda: direction_loss(SMALL, B[None], B), "f must"),
        (lambda: train_direction_network(SMALL, B[None, None], [network()], [], steps=10), "generators"),
        (lambda: train_direction_network(SMALL, B[None, None], [network()], [generator()], steps=9), "steps"),
        (lambda: deep_conjugate_direction(SMALL, 0 * B, torch.clone, 1e-4, 5), "b must"),
        (lambda: deep_conjugate_direction(SMALL, B * math.nan, torch.clone, 1e-4, 5), "b must"),
        (lambda: deep_conjugate_direction(SMALL, B[:4, :4], torch.clone, 1e-4, 5), "b must"),
        (lambda: deep_conjugate_direction(HOLE, torch.ones(16, 16), torch.clone, 1e-4, 5), "solid"),
        (lambda: deep_conjugate_direction(SMALL, B, torch.clone, 0.0, 5), "tol"),
        (lambda: deep_conjugate_direction(SMALL, B, torch.clone, 1e-4, 0), "max_iter"),
        (lambda: deep_conjugate_direction(SMALL, B, torch.clone, 1e-4, 5, -1), "num_orthogonal"),
        (lambda: deep_conjugate_direction(SMALL, B, torch.zeros_like, 1e-4, 5), "propose"),
        (lambda: deep_conjugate_direction(SMALL, B, lambda r: r * math.nan, 1e-4, 5), "propose"),
        (lambda: conjugate_gradient(MATRIX, 0 * V, 1e-4), "b must"),
        (lambda: conjugate_gradient(MATRIX, V, -1.0), "tol"),
        (lambda: conjugate_gradient(SMALL, B, 1e-4, max_iter=0), "max_iter"),
        (lambda: deflated_conjugate_gradient(MATRIX, V, np.ones((3, 2)), 1e-4), "W"),
        (lambda: deflated_conjugate_gradient(MATRIX, V, np.ones((64, 2)), 1e-4), "W"),
        (lambda: incomplete_cholesky(MATRIX[:3]), "square"),
        (lambda: incomplete_cholesky(-1 * MATRIX), "pivot 0"),
        (lambda: open_to_outside(torch.ones(4, 4)), "fluid"),
        (lambda: advect(B, torch.zeros(3), STILL, 1.0), "offset"),
        (lambda: advect(B, torch.zeros(2), STILL[:1], 1.0), "velocity"),
        (lambda: project(SMALL, STILL[::-1], solver(SMALL)), "velocity"),
        (lambda: plume_step(SMALL, B[:4], STILL, SMALL.fluid, solver(SMALL)), "density"),
        (lambda: plume_step(HOLE, 0.0 * HOLE.fluid, STILL, torch.ones_like(HOLE.fluid), solver(HOLE)), "source"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
