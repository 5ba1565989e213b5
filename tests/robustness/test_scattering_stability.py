"""Oracles: the kymatio library, closed forms, SciPy and torch convolutions, the theorems and their limiting cases."""

import math
from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kymatio.scattering1d.frontend.torch_frontend import ScatteringTorch1D  # kymatio.torch needs an older SciPy
from scipy.integrate import quad

from companion.robustness.scattering_stability import (
    NONLINEARITIES,
    POOLINGS,
    BandLimited,
    Cartoon,
    FeatureExtractor,
    Frame,
    Layer,
    Lipschitz,
    Noise,
    bandlimited_bound,
    deform,
    directional_frame,
    feature_distance,
    filter_frame,
    translate,
    wavelet_frame,
    weyl_heisenberg_frame,
)

F64 = torch.float64
TILINGS = {"wavelets": [8, 8, 8], "curvelets": [16, 8, 8], "ridgelets": [32, 16, 8]}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


TAPS = torch.cat([torch.ones(1, 9, dtype=F64), noise(4, 9)])
FACTORIES = {
    "wavelets": partial(wavelet_frame, octaves=3),
    "Weyl-Heisenberg": partial(weyl_heisenberg_frame, channels=6),
    "filters": partial(filter_frame, TAPS),
}
MIXED = FeatureExtractor(
    [
        Layer(FACTORIES["wavelets"], "modulus", "average", 2),
        Layer(FACTORIES["Weyl-Heisenberg"], "relu", "subsample", 2),
        Layer(FACTORIES["filters"], "tanh", "average", 2),
        Layer(FACTORIES["wavelets"]),
    ]
)


def total(features):
    return feature_distance(features, [0 * x for x in features]).norm(dim=1)


def grid(n):
    return torch.arange(n, dtype=F64) / n


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 15, 64, 512])
@pytest.mark.parametrize("octaves", [1, 3, 7])
def test_wavelet_frame_is_tight(n, octaves):
    frame = wavelet_frame(n, octaves)
    assert frame.atoms.shape == (2 * octaves, n)
    assert frame.bounds() == pytest.approx((1, 1), abs=1e-12)


def test_wavelet_frame_has_the_values_computed_by_hand():
    frame = wavelet_frame(64, 3)
    low = [1, 1, 1, 0.999613, 0.707107, 0.119442, 0]
    np.testing.assert_allclose(frame.output_atom[:7], low, atol=1e-6)
    np.testing.assert_allclose(frame.atoms[:, 12], [0.027809, 0, 0.999613, 0, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(frame.atoms[0, 1:32], frame.atoms[1, 33:].flip(0))  # mirror images
    assert frame.output_atom[4] == pytest.approx(math.sqrt(0.5), abs=1e-15)  # half way at 4 = 32/2³


@pytest.mark.parametrize("channels", [2, 3, 6, 11])
def test_weyl_heisenberg_frame_is_tight_and_made_of_shifts(channels):
    frame = weyl_heisenberg_frame(12 * channels, channels)
    assert frame.bounds() == pytest.approx((1, 1), abs=1e-12)
    for m, atom in enumerate(frame.atoms, 1):
        torch.testing.assert_close(atom, frame.output_atom.roll(12 * m), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "atoms"), [("wavelets", 24), ("curvelets", 32), ("ridgelets", 56)])
def test_directional_frames_are_tight(name, atoms):
    for n in (16, 33):
        frame = directional_frame(n, TILINGS[name])
        assert frame.atoms.shape == (atoms, n, n)
        assert frame.bounds() == pytest.approx((1, 1), abs=1e-12)


def test_directional_frame_turns_with_the_image_and_has_the_radial_profile_of_the_wavelets():
    frame = directional_frame(33, [8, 8])
    centred = torch.fft.fftshift(frame.atoms, dim=(1, 2))  # an odd grid turns onto itself
    quarter = torch.rot90(centred, 1, (1, 2)).view(2, 8, 33, 33)
    torch.testing.assert_close(quarter.roll(2, 1), centred.view(2, 8, 33, 33), rtol=0, atol=1e-12)
    line = wavelet_frame(33, 2)
    torch.testing.assert_close(frame.output_atom[:, 0], line.output_atom, rtol=0, atol=1e-12)
    torch.testing.assert_close(frame.atoms[[0, 8], :17, 0], line.atoms[[0, 2], :17], rtol=0, atol=1e-12)


def test_filter_frame_filters_as_scipy_does():
    signal = noise(40, seed=1)
    frame = filter_frame(TAPS, 40)
    ratio = frame.output_atom[0].real.item() / 9  # of the normalised to the given taps
    for taps, transform in zip(TAPS[1:], frame.atoms, strict=True):
        ours = torch.fft.ifft(torch.fft.fft(signal) * transform).real
        theirs = scipy.ndimage.convolve1d(signal.numpy(), taps.numpy(), mode="wrap", origin=-4)
        np.testing.assert_allclose(ours, ratio * theirs, atol=1e-12)
    lower, upper = frame.bounds()
    assert upper == pytest.approx(1, abs=1e-12)
    assert 0 < lower < 1


def test_an_orthonormal_basis_of_filters_is_a_tight_frame():
    basis = torch.linalg.qr(noise(9, 9)).Q
    assert filter_frame(basis, 50).bounds() == pytest.approx((1, 1), abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.1, 3))
def test_frame_bounds_hold_and_are_attained(seed, factor):
    frame = filter_frame(noise(4, 5, seed=seed), 32).scaled(factor)
    lower, upper = frame.bounds()
    assert upper == pytest.approx(factor**2)
    assert frame.normalized().bounds()[1] == pytest.approx(1)
    spectra = torch.cat([torch.fft.fft(noise(3, 32, seed=seed + 1)), torch.eye(32, dtype=torch.complex128)])
    split = torch.cat([frame.atoms, frame.output_atom[None]]) * spectra[:, None]
    gain = split.abs().square().sum((1, 2)) / spectra.abs().square().sum(1)
    assert (gain > lower - 1e-9).all()
    assert (gain < upper + 1e-9).all()
    assert gain.min().item() == pytest.approx(lower)
    assert gain.max().item() == pytest.approx(upper)


# --- the cascade ------------------------------------------------------------------------------------------------------


def kymatio_scattering():
    """The library's transform of 512 samples, and our network with its filters."""
    theirs = ScatteringTorch1D(J=4, shape=512, Q=1, oversampling=4, out_type="list").double()
    output = theirs.phi_f["levels"][0].squeeze(-1)
    layers = [
        Layer(lambda n, bank=bank: Frame(torch.stack([f["levels"][0].squeeze(-1) for f in bank]), output))
        for bank in (theirs.psi1_f, theirs.psi2_f, theirs.psi2_f)
    ]
    return theirs, FeatureExtractor(layers)


def test_features_are_those_of_kymatio():
    theirs, ours = kymatio_scattering()
    signal = noise(3, 512)
    padded = torch.nn.functional.pad(signal[None], (theirs.pad_left, theirs.pad_right), mode="reflect")[0]
    features = [x[..., theirs.pad_left : theirs.pad_left + 512] for x in ours(padded)]
    coefficients = theirs(signal)
    assert len(coefficients) == 13
    for coefficient in coefficients:
        path = coefficient["n"]
        index = sum(n * len(theirs.psi2_f) ** k for k, n in enumerate(reversed(path)))
        torch.testing.assert_close(features[len(path)][:, index].real, coefficient["coef"], rtol=0, atol=1e-12)


def test_kymatio_s_one_sided_filters_are_admissible_for_real_signals_only():
    _, ours = kymatio_scattering()
    assert not ours.admissible(1024)
    energy = ours.frames(1024)[0].littlewood_paley()
    assert energy.max() == pytest.approx(1.239, abs=1e-3)
    mirrored = energy.roll(-1).flip(0)
    assert ((energy + mirrored) / 2).max() == pytest.approx(1, abs=1e-6)


def test_features_of_a_cosine_in_closed_form():
    wave = torch.cos(2 * math.pi * 12 * torch.arange(64, dtype=F64) / 64)[None]
    phi0, phi1 = FeatureExtractor(2 * [Layer(FACTORIES["wavelets"])])(wave)
    assert phi0.abs().max() < 1e-12
    expected = torch.tensor([0.013904, 0.013904, 0.499807, 0.499807, 0, 0], dtype=torch.complex128)
    torch.testing.assert_close(phi1[0], expected[:, None].expand(6, 64), rtol=0, atol=1e-6)


def test_features_of_a_linear_chain_are_nested_convolutions():
    """For real signals, real taps and a signal so large in mean that ReLU does nothing, features are convolutions."""
    taps = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.2, 0.1], [0.3, 0.3, 0.2]], dtype=F64)
    signal = 5 + noise(1, 24).abs()
    features = FeatureExtractor(3 * [Layer(partial(filter_frame, taps), "relu")])(signal)
    scale = filter_frame(taps, 24).output_atom[0].real / 2

    def circular(z, k):
        return scale * sum(k[j] * z.roll(j) for j in range(3))

    expected = [circular(circular(circular(signal[0], a), b), taps[0]) for a in taps[1:] for b in taps[1:]]
    torch.testing.assert_close(features[2][0].real, torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("frame", FACTORIES)
def test_networks_do_not_expand(frame, nonlinearity, pooling):
    network = FeatureExtractor(3 * [Layer(FACTORIES[frame], nonlinearity, pooling, 1 if pooling == "none" else 2)])
    assert network.admissible(64)
    f = noise(6, 64, dtype=torch.complex128)
    h = f + torch.logspace(-4, 1, 6, dtype=F64)[:, None] * noise(6, 64, seed=1, dtype=torch.complex128)
    distance = feature_distance(network(f), network(h)).norm(dim=1)
    assert (distance <= (f - h).norm(dim=1) * (1 + 1e-9)).all()
    assert (distance > 0.1 * (f - h).norm(dim=1).clamp(max=1)).all()
    assert (total(network(f)) <= f.norm(dim=1) * (1 + 1e-9)).all()
    assert total(network(0 * f)).max() == 0


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), size=st.floats(1e-6, 10))
def test_the_mixed_network_does_not_expand(seed, size):
    f = noise(1, 64, seed=seed, dtype=torch.complex128)
    h = f + size * noise(1, 64, seed=seed + 1, dtype=torch.complex128)
    assert feature_distance(MIXED(f), MIXED(h)).norm() <= (f - h).norm() * (1 + 1e-9)


def test_two_dimensional_networks_do_not_expand():
    network = FeatureExtractor(
        [
            Layer(partial(directional_frame, wedges_per_octave=[8, 4]), "modulus", "average", 2),
            Layer(partial(directional_frame, wedges_per_octave=[4]), "relu", "subsample", 2),
            Layer(partial(directional_frame, wedges_per_octave=[4])),
        ]
    )
    f, h = noise(2, 16, 16), noise(2, 16, 16, seed=1)
    features = network(f)
    assert [tuple(x.shape) for x in features] == [(2, 1, 16, 16), (2, 12, 8, 8), (2, 48, 4, 4)]
    assert (feature_distance(features, network(h)).norm(dim=1) <= (f - h).flatten(1).norm(dim=1)).all()
    moved = network(f.roll((4, -8), (1, 2)))
    for depth, (x, y) in enumerate(zip(features, moved, strict=True)):
        torch.testing.assert_close(y, x.roll((4 // 2**depth, -8 // 2**depth), (2, 3)), rtol=0, atol=1e-12)


def test_a_tight_frame_with_modulus_keeps_the_energy_of_a_deep_network():
    f = noise(2, 64)
    kept = [total(FeatureExtractor(depth * [Layer(FACTORIES["wavelets"])])(f)) / f.norm(dim=1) for depth in (1, 2, 5)]
    assert (kept[0] < kept[1]).all()
    assert (kept[1] < kept[2]).all()
    assert kept[2] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("nonlinearity", "factor"), [("modulus", 2), ("sigmoid", 4)])
def test_inadmissible_networks_expand(nonlinearity, factor):
    for frame_of in FACTORIES.values():
        layer = Layer(lambda n, frame_of=frame_of: frame_of(n).scaled(factor), nonlinearity)
        network = FeatureExtractor(3 * [layer])
        assert not network.admissible(64)
        f = noise(4, 64)
        h = f + 0.01  # at frequency 0, where the output atom alone expands
        assert (feature_distance(network(f), network(h)).norm(dim=1) > (f - h).norm(dim=1)).all()


@pytest.mark.parametrize(("name", "slope"), [("modulus", 1), ("relu", 1), ("tanh", 1), ("sigmoid", 0.25)])
def test_lipschitz_constants_are_sharp(name, slope):
    function, constant = NONLINEARITIES[name]
    assert constant == slope
    points = noise(4000, dtype=torch.complex128)
    steps = 1e-3 * noise(4000, seed=1, dtype=torch.complex128)
    ratio = (function(points + steps) - function(points)).abs() / steps.abs()
    assert ratio.max() <= slope * (1 + 1e-9)
    assert ratio.max() > 0.99 * slope
    assert function(torch.zeros(1, dtype=torch.complex128)) == 0


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_average_pooling_is_an_isometry_on_what_it_keeps(factor):
    z = noise(1, 2, 64, dtype=torch.complex128)
    pooled = Layer(FACTORIES["wavelets"], pooling="average", factor=factor).pool(z)
    nu = torch.fft.fftfreq(64, dtype=F64).abs() * factor  # cycles per new sample
    spectrum = torch.fft.fft(z)
    flat = torch.fft.ifft(spectrum * (nu <= 0.25))
    same = Layer(FACTORIES["wavelets"], pooling="average", factor=factor).pool(flat)
    assert same.norm().item() == pytest.approx(flat.norm().item(), rel=1e-12)
    torch.testing.assert_close(same, math.sqrt(factor) * flat[..., ::factor], rtol=0, atol=1e-12)
    assert flat.norm() < pooled.norm() < torch.fft.ifft(spectrum * (nu < 0.5)).norm()
    high = torch.fft.ifft(spectrum * (nu >= 0.5))
    assert Layer(FACTORIES["wavelets"], pooling="average", factor=factor).pool(high).norm() < 1e-12


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), shift=st.integers(-8, 8))
def test_features_move_with_the_signal(seed, shift):
    f = noise(2, 64, seed=seed)
    for depth, (x, y) in enumerate(zip(MIXED(f), MIXED(f.roll(8 * shift, 1)), strict=True)):
        torch.testing.assert_close(y, x.roll(8 * shift // 2**depth, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [0, 4, 8, 40])
def test_translation_bound_holds(shift):
    f = noise(5, 64)
    moved = feature_distance(MIXED(f), MIXED(translate(f, shift)))
    assert (moved <= MIXED.translation_bound(64, shift) * f.norm(dim=1, keepdim=True) + 1e-12).all()
    assert torch.equal(MIXED.translation_bound(64, shift), MIXED.translation_bound(64, -shift))


def test_translation_bound_has_its_closed_form_and_is_attained():
    layers = [Layer(partial(weyl_heisenberg_frame, channels=6), "modulus", "average", 2)] * 3
    bound = FeatureExtractor(layers).translation_bound(4096, 0.1)
    expected = 2 * math.pi * 0.1 * 0.3572 / 6 / torch.tensor([1.0, 2, 4], dtype=F64)
    torch.testing.assert_close(bound, expected, rtol=1e-3, atol=0)
    atom = weyl_heisenberg_frame(4096, 6).output_atom
    k = int((atom * torch.fft.fftfreq(4096)).argmax())
    wave = torch.exp(2j * math.pi * k * grid(4096))[None]
    features = FeatureExtractor(layers[:1])
    moved = feature_distance(features(wave), features(translate(wave, 0.1)))
    assert moved.item() == pytest.approx(bound[0].item() * wave.norm().item(), rel=1e-3)


def test_features_follow_the_precision_of_the_signal_and_leave_it_alone():
    f = noise(2, 64)
    before = f.clone()
    assert [x.dtype for x in MIXED(f.float())] == 4 * [torch.complex64]
    assert [x.dtype for x in MIXED(f)] == 4 * [torch.complex128]
    assert torch.equal(f, before)
    torch.testing.assert_close(MIXED(f.float())[2], MIXED(f)[2].to(torch.complex64), rtol=0, atol=1e-5)


# --- shifts, deformations, signal classes -----------------------------------------------------------------------------


def test_translate_is_a_roll_and_interpolates_by_fourier_series():
    f = noise(3, 20)
    torch.testing.assert_close(translate(f, 7).real, f.roll(7, 1), rtol=0, atol=1e-12)
    shifted = scipy.ndimage.fourier_shift(np.fft.fft(f[0].numpy()), 2.5)
    np.testing.assert_allclose(translate(f, 2.5)[0], np.fft.ifft(shifted), atol=1e-12)
    torch.testing.assert_close(translate(translate(f, 0.3), -0.3).real, f, rtol=0, atol=1e-12)


def test_deform_with_a_constant_field_translates():
    signal = BandLimited(2, 9, generator())
    moved = deform(signal, torch.full((64,), 3.5 / 64, dtype=F64))
    torch.testing.assert_close(moved, translate(signal(grid(64)), 3.5), rtol=0, atol=1e-12)
    turned = deform(signal, torch.zeros(64, dtype=F64), 0.25)
    torch.testing.assert_close(turned, 1j * signal(grid(64)), rtol=0, atol=1e-12)


def test_the_constant_of_the_band_limited_bound_is_its_integral():
    value, _ = quad(lambda s: (1 - s / 2) ** -0.5, 0, 1)
    assert bandlimited_bound(3, 0.01) == pytest.approx(2 * math.pi * value * 0.03, rel=1e-12)
    assert bandlimited_bound(3, 0, 0.1) == pytest.approx(2 * math.pi * math.sqrt(2) * 0.1, rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), size=st.floats(1 / 512, 1 / 64), modulation=st.floats(0, 0.3))
def test_deformation_bounds_hold(seed, size, modulation):
    n = 1024
    tau = BandLimited(1, 2, generator(seed))(grid(n))
    tau = size * tau / tau.abs().max()
    for make in (partial(BandLimited, 2, 20), partial(Lipschitz, 2), partial(Cartoon, 2, 3)):
        signal = make(generator(seed + 1))
        change = (deform(signal, tau) - signal(grid(n))).abs().square().mean(1).sqrt()
        assert (change > 0).all()
        assert (change <= signal.bound(size)).all()
    signal = BandLimited(2, 20, generator(seed))
    change = (deform(signal, tau, modulation * tau / size) - signal(grid(n))).abs().square().mean(1).sqrt()
    assert (change <= bandlimited_bound(20, size, modulation)).all()


def test_band_limited_signals_are_periodic_and_have_the_frequencies_they_say():
    signal = BandLimited(3, 10, generator())
    values = signal(grid(64))
    spectrum = torch.fft.fft(values).abs()
    assert spectrum[:, 1:11].min() > 1e-3
    assert spectrum[:, 11:54].max() < 1e-10
    torch.testing.assert_close(values.square().mean(1), torch.ones(3, dtype=F64))
    torch.testing.assert_close(signal(grid(64) + 1), values, rtol=0, atol=1e-10)
    assert signal(grid(64).expand(3, 64)).shape == (3, 64)


def test_lipschitz_signals_keep_their_constant():
    signal = Lipschitz(4, generator())
    x = grid(20000)
    steepest = 20000 * (signal(x + 1 / 20000) - signal(x)).abs().amax(1)
    assert (steepest <= signal.bound(1.0) * (1 + 1e-9)).all()
    assert (steepest > 0.5 * signal.bound(1.0)).all()
    torch.testing.assert_close(signal(x - 1), signal(x), rtol=0, atol=1e-9)


def test_cartoons_have_the_jumps_they_say():
    signal = Cartoon(2, 4, generator())
    values = signal(grid(4096))
    jumps = (values - values.roll(1, 1)).abs()
    assert (jumps > 0.3).sum(1).tolist() == [8, 8]
    torch.testing.assert_close(jumps.amax(1), signal.heights.amax((1, 2)), rtol=0, atol=1e-3)
    torch.testing.assert_close(signal(grid(4096) - 1), values, rtol=0, atol=1e-9)


def test_noise_is_white_and_moves_by_whole_cells():
    signal = Noise(2, 4096, generator())
    values = signal(grid(4096))
    assert torch.equal(values, signal.values)
    assert torch.equal(signal(grid(4096) - 3 / 4096), values.roll(3, 1))
    assert (values * values.roll(1, 1)).mean().abs() < 5 / (2 * 4096) ** 0.5


# --- what a reader can get wrong --------------------------------------------------------------------------------------


def network(*layers):
    return FeatureExtractor(layers or [Layer(FACTORIES["wavelets"])])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wavelet_frame(1, 3), "n must be an integer of at least 2, got 1"),
        (lambda: wavelet_frame(8, 0), "octaves must be an integer of at least 1, got 0"),
        (lambda: wavelet_frame(8, 1.5), "octaves must be an integer of at least 1, got 1.5"),
        (lambda: weyl_heisenberg_frame(8, 1), "channels must be an integer of at least 2, got 1"),
        (lambda: filter_frame(TAPS, 8), "n must be an integer of at least 9, got 8"),
        (lambda: filter_frame(TAPS[:1], 16), "taps must be"),
        (lambda: filter_frame(TAPS * torch.nan, 16), "taps must be"),
        (lambda: filter_frame(0 * TAPS, 16), "taps must be"),
        (lambda: directional_frame(8, []), "number_of_octaves must be an integer of at least 1, got 0"),
        (lambda: directional_frame(8, [8, 1]), "wedges_per_octave must be an integer of at least 2, got 1"),
        (lambda: directional_frame(1, [8]), "n must be an integer of at least 2"),
        (lambda: Frame(torch.ones(2, 8), torch.ones(9)), r"atoms must have the shape .* \(2, 8\) and \(9,\)"),
        (lambda: Layer(FACTORIES["wavelets"], "gelu"), "nonlinearity must be one of modulus, .*, got 'gelu'"),
        (lambda: Layer(FACTORIES["wavelets"], pooling="max"), "pooling must be one of none, .*, got 'max'"),
        (lambda: Layer(FACTORIES["wavelets"], factor=2), "factor must be 1 without pooling, got 2"),
        (lambda: Layer(FACTORIES["wavelets"], pooling="average", factor=0), "factor must be an integer"),
        (lambda: FeatureExtractor([]), "layers is empty"),
        (lambda: MIXED(noise(2, 36)), "factor must divide the length of its layer: 2 in layer 3 of 9"),
        (lambda: MIXED.admissible(36), "factor must divide"),
        (lambda: network()(noise(64)), r"f must be finite with axes .* got shape \(64,\)"),
        (lambda: network()(torch.full((1, 64), torch.nan)), "f must be finite"),
        (lambda: network()(noise(1, 8, 8)), r"f must live on the grid \(8,\) of its frame, got \(8, 8\)"),
        (lambda: feature_distance(MIXED(noise(1, 64)), MIXED(noise(1, 72))), "features of one extractor"),
        (lambda: deform(torch.sin, 0.2 * torch.sin(2 * math.pi * grid(64))), "tau must be finite .* got 1.25"),
        (lambda: deform(torch.sin, torch.full((8,), torch.nan)), "tau must be finite"),
        (lambda: bandlimited_bound(1, -0.1), "must not be negative, got R=1, tau_sup=-0.1"),
        (lambda: BandLimited(1, 0, generator()), "R must be an integer of at least 1, got 0"),
        (lambda: Lipschitz(0, generator()), "count must be an integer of at least 1"),
        (lambda: Cartoon(1, 0, generator()), "pieces must be an integer of at least 1"),
        (lambda: Noise(1, 1, generator()), "n must be an integer of at least 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
