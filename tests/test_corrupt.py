from __future__ import annotations

import io
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from anysite import corrupt as module
from anysite.corrupt import CORRUPTIONS, corrupt, fingerprint
from anysite.data.phantom import Anatomy, examine
from anysite.data.phantom_sites import SITES
from anysite.data.volume import Volume
from anysite.errors import ConfigError

NAMES = list(CORRUPTIONS)
KINDS = ["grey", "colour", "volume"]
SEVERITIES = range(1, 6)
RANDOM = {
    *("gaussian_noise", "rician_noise", "speckle_noise", "poisson_noise", "impulse_noise", "motion_blur"),
    *("motion_ghosting", "ghosting", "spike", "bias_field", "low_dose", "streaks"),
}


@cache
def phantom(kind: str, seed: int = 0) -> Volume:
    rng = np.random.default_rng(seed)
    dimension, size = (3, 24) if kind == "volume" else (2, 64)
    image, _ = examine(Anatomy.draw(dimension, True, rng), SITES["east"], dimension, size, rng)
    if kind == "colour":
        channels = [np.rint(image.array[0] * gain + offset) for gain, offset in ((1, 0), (0.7, 30), (0.5, 9))]
        image = Volume.of_pixels(np.clip(channels, 0, 255).astype(np.uint8))
    image.array.setflags(write=False)
    return image


def blobs(shape: tuple[int, ...], seed: int = 0, sigma: float = 3) -> np.ndarray:
    """Smooth 64-bit images of which 0 and 1 are the robust range, and the extremes too."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    smooth = ndimage.gaussian_filter(noise, (0, *[sigma] * (len(shape) - 1)), mode="wrap")
    low, high = np.percentile(smooth, (2, 98))
    return np.clip((smooth - low) / (high - low), 0, 1)


def applied(name: str, image: np.ndarray, strength: float, seed: int = 0) -> np.ndarray:
    """Apply a corruption of any strength to a slice `(H, W)` or slices `(Z, H, W)`."""
    slices = image.reshape(1, -1, *image.shape[-2:])
    return CORRUPTIONS[name].apply(slices, strength, np.random.default_rng(seed)).reshape(image.shape)


def test_the_table_is_complete():
    assert len(CORRUPTIONS) >= 18
    assert {c.family for c in CORRUPTIONS.values()} == {"noise", "blur", "MR", "CT", "contrast", "sampling"}
    for name, corruption in CORRUPTIONS.items():
        steps = np.diff(corruption.strengths)
        assert len(steps) == 4, name
        assert (steps > 0).all() or (steps < 0).all(), name
        assert corruption.meaning, name
        assert "\n" not in corruption.meaning, name
        assert corruption.apply.__doc__, name
    assert len({c.meaning for c in CORRUPTIONS.values()}) == len(CORRUPTIONS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_grid_and_type_stay_and_the_seed_decides(name, kind):
    image = phantom(kind)
    before = image.array.copy()
    first, again, other = (corrupt(image, name, 3, seed) for seed in (7, 7, 8))
    assert first.array.shape == image.array.shape
    assert first.array.dtype == image.array.dtype
    assert first.array.flags.c_contiguous
    assert np.array_equal(first.affine, image.affine)
    assert first.unit == image.unit
    assert np.array_equal(image.array, before)
    assert np.array_equal(first.array, again.array)
    assert np.array_equal(first.array, other.array) == (name not in RANDOM)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_severity_grows_and_the_anatomy_stays_recognisable(name, kind):
    differences, correlations = np.zeros((2, 3, 5))
    for seed in range(3):
        clean = phantom(kind, seed).array.astype(float)
        for severity in SEVERITIES:
            corrupted = corrupt(phantom(kind, seed), name, severity, seed).array.astype(float)
            differences[seed, severity - 1] = np.abs(corrupted - clean).mean()
            correlations[seed, severity - 1] = np.corrcoef(corrupted.ravel(), clean.ravel())[0, 1]
    assert (differences[:, 0] > 0).all()
    assert (np.diff(differences.mean(0)) > 0).all()
    assert correlations[:, 0].min() > 0.9
    assert correlations[:, 4].min() > 0.6


@pytest.mark.parametrize("kind", ["grey", "volume"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_moves(name, kind):
    image = phantom(kind)
    for severity in (3, 5):
        spectra = [
            np.fft.fftn(a[0] - a[0].mean()) for a in (image.array, corrupt(image, name, severity).array)
        ]
        correlation = np.fft.ifftn(spectra[0].conj() * spectra[1]).real
        assert np.argmax(correlation) == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_a_constant_image_comes_back_as_it_is(name, dtype):
    for shape in ((1, 12, 10), (3, 12, 10), (2, 8, 9, 5)):
        image = Volume(np.full(shape, 7, dtype), np.eye(len(shape)))
        assert np.array_equal(corrupt(image, name, 5).array, image.array)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_channel_leaves_the_others_alone(name):
    image = phantom("volume")
    both = image.with_array(np.concatenate([image.array, np.full_like(image.array, -3)]))
    corrupted = corrupt(both, name, 3).array
    assert (corrupted[1] == -3).all()
    assert (corrupted[0] != image.array[0]).any()


@given(
    st.sampled_from(NAMES),
    st.integers(1, 5),
    st.lists(st.integers(1, 9), min_size=3, max_size=4),
    st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_is_served(name, severity, shape, seed):
    array = np.random.default_rng(seed).integers(-1000, 1000, shape, np.int16)
    image = Volume(array, np.diag([1.0, 3.0, 2.0, 1.0][: len(shape) - 1] + [1.0]))
    assert corrupt(image, name, severity, seed).shape == image.shape
    single = corrupt(image.with_array(array.astype(np.float32)), name, severity, seed)
    assert np.isfinite(single.array).all()


@given(st.sampled_from(NAMES), st.integers(-9, 9))
@settings(max_examples=50, deadline=None)
def test_strengths_are_relative_to_the_range(name, exponent):
    image = Volume(blobs((1, 24, 20, 6)), np.diag([1.0, 1.0, 4.0, 1.0]))
    scaled = image.with_array(image.array * 2.0**exponent)
    expected = corrupt(image, name, 4).array * 2.0**exponent
    np.testing.assert_allclose(corrupt(scaled, name, 4).array, expected, rtol=0, atol=1e-7 * 2.0**exponent)


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_rounded_and_clipped(name):
    picture = (255 * blobs((1, 32, 32))).astype(np.uint8)
    whole = corrupt(Volume.of_pixels(picture), name, 5).array
    exact = corrupt(Volume.of_pixels(picture.astype(np.float32)), name, 5).array
    np.testing.assert_array_equal(whole, np.clip(np.rint(exact), 0, 255))


@pytest.mark.parametrize("name", NAMES)
def test_slices_are_found_by_their_spacing(name):
    image = phantom("volume")
    assert int(np.argmax(image.spacing)) == 2
    order = [2, 0, 1]
    turned = Volume(image.array.transpose(0, 3, 1, 2), image.affine[:, [*order, 3]])
    expected = corrupt(image, name, 4).array.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(corrupt(turned, name, 4).array, expected)


@pytest.mark.parametrize(("unit", "slice_axis"), [("mm", 2), ("px", 0)])
def test_of_equal_spacings_the_custom_of_the_format_decides(unit, slice_axis):
    array = np.random.default_rng(0).standard_normal((1, 11, 11, 11))
    changed = corrupt(Volume(array, np.eye(4), unit), "field_of_view", 5).array[0] != array[0]
    through_the_centre = changed[:, 5, 5], changed[5, :, 5], changed[5, 5, :]
    assert [bool(line.any()) for line in through_the_centre] == [axis != slice_axis for axis in range(3)]


def test_unknown_names_and_severities_are_refused():
    with pytest.raises(ConfigError, match="unknown name 'gausian_noise'; expected one of gaussian_noise, "):
        corrupt(phantom("grey"), "gausian_noise", 1)
    with pytest.raises(ConfigError, match="Did you mean 'gaussian_noise'?"):
        fingerprint("gausian_noise")
    for severity in (0, 6, -1):
        with pytest.raises(ConfigError, match=f"'jpeg': severity {severity}; expected 1, 2, 3, 4 or 5"):
            corrupt(phantom("grey"), "jpeg", severity)


def test_fingerprints_tell_versions_apart(monkeypatch):
    before = {name: fingerprint(name) for name in NAMES}
    assert all(len(digits) == 12 and int(digits, 16) >= 0 for digits in before.values())
    assert len(set(before.values())) == len(NAMES)
    assert {name: fingerprint(name) for name in NAMES} == before

    jpeg = CORRUPTIONS["jpeg"]
    monkeypatch.setitem(CORRUPTIONS, "jpeg", replace(jpeg, strengths=(*jpeg.strengths[:4], 3)))
    assert [name for name in NAMES if fingerprint(name) != before[name]] == ["jpeg"]
    monkeypatch.setitem(CORRUPTIONS, "jpeg", replace(jpeg, apply=CORRUPTIONS["spike"].apply))
    assert [name for name in NAMES if fingerprint(name) != before[name]] == ["jpeg"]
    monkeypatch.setitem(CORRUPTIONS, "jpeg", jpeg)
    assert fingerprint("jpeg") == before["jpeg"]

    with monkeypatch.context() as patch:
        patch.setattr(module, "_robust_range", blobs)
        assert all(fingerprint(name) != before[name] for name in NAMES)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    assert all(fingerprint(name) != before[name] for name in NAMES)


def test_the_draw_is_the_same_at_every_severity():
    image = Volume(blobs((1, 40, 40)), np.eye(3))
    for name in ("gaussian_noise", "speckle_noise", "spike", "low_dose"):
        weak, strong = (corrupt(image, name, severity, 3).array - image.array for severity in (1, 5))
        ratio = CORRUPTIONS[name].strengths[4] / CORRUPTIONS[name].strengths[0]
        np.testing.assert_allclose(strong, ratio * weak, atol=1e-6)
    weak, strong = (corrupt(image, "impulse_noise", severity, 3).array != image.array for severity in (1, 5))
    assert (strong | ~weak).all()


def test_colours_share_their_range_and_channels_of_volumes_have_their_own():
    array = blobs((1, 40, 40)) * np.array([1.0, 0.5, 0.1])[:, None, None]
    picture = Volume.of_pixels(array)
    noise = (corrupt(picture, "gaussian_noise", 3).array - array).std((1, 2))
    np.testing.assert_allclose(noise, noise.mean(), rtol=0.08)
    slices = Volume(array[..., None].repeat(4, -1), np.diag([1.0, 1.0, 5.0, 1.0]))
    noise = (corrupt(slices, "gaussian_noise", 3).array - slices.array).std((1, 2, 3))
    np.testing.assert_allclose(noise / noise[0], [1.0, 0.5, 0.1], rtol=0.08)


def test_white_noise_has_the_stated_deviation():
    image = np.full((200, 200), 0.5)
    for name in ("gaussian_noise", "rician_noise"):
        noise = applied(name, image, 0.05) - image
        assert noise.std() == pytest.approx(0.05, rel=0.02)
        assert abs(noise.mean()) < 0.004
    assert (applied("speckle_noise", image, 0.1) / image - 1).std() == pytest.approx(0.1, rel=0.02)


def test_rician_noise_of_no_signal_is_rayleigh():
    noise = applied("rician_noise", np.zeros((200, 200)), 0.05)
    assert noise.min() >= 0
    assert noise.mean() == pytest.approx(0.05 * np.sqrt(np.pi / 2), rel=0.02)
    assert noise.std() == pytest.approx(0.05 * np.sqrt(2 - np.pi / 2), rel=0.02)


def test_counts_are_poisson():
    counts = applied("poisson_noise", np.full((200, 200), 0.5), 20) * 20
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-9)
    assert counts.mean() == pytest.approx(10, rel=0.02)
    assert counts.var() == pytest.approx(10, rel=0.05)


def test_impulses_are_black_and_white_in_equal_shares():
    drawn = applied("impulse_noise", np.full((300, 300), 0.5), 0.1)
    assert (drawn == 0).mean() == pytest.approx(0.05, rel=0.1)
    assert (drawn == 1).mean() == pytest.approx(0.05, rel=0.1)
    assert ((drawn == 0.5) | (drawn == 0) | (drawn == 1)).all()


def test_blur_is_gaussian_in_the_slice():
    image = blobs((1, 3, 40, 60))[0]
    blurred = applied("gaussian_blur", image, 0.05)
    for clean, filtered in zip(image, blurred, strict=True):
        np.testing.assert_allclose(filtered, ndimage.gaussian_filter(clean, 2.0, truncate=5), atol=0.01)
    point = np.zeros((31, 31))
    point[15, 15] = 1
    for sigma_voxels in (0.3, 1.0, 1.7):
        spread = applied("gaussian_blur", point, sigma_voxels / 31)
        variance = (spread.sum(0) * (np.arange(31) - 15) ** 2).sum()
        assert variance == pytest.approx(sigma_voxels**2, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_motion_blur_spreads_a_point_evenly_over_a_centred_line(seed):
    point = np.zeros((61, 61))
    point[30, 30] = 1
    line = applied("motion_blur", point, 12 / 61, seed)
    assert line.sum() == pytest.approx(1)
    np.testing.assert_allclose(line, line[::-1, ::-1], atol=1e-12)
    rows, columns = np.indices(line.shape) - 30
    moments = np.array([[(line * a * b).sum() for a in (rows, columns)] for b in (rows, columns)])
    across, along = np.linalg.eigvalsh(moments)
    assert across < 0.4
    assert along == pytest.approx(12**2 / 12, abs=0.8)


def test_motion_ghosting_keeps_energy_and_the_centre_of_k_space():
    image = blobs((1, 4, 48, 64))[0] + 2.0
    moved = applied("motion_ghosting", image, 0.004)
    np.testing.assert_allclose((moved**2).sum((1, 2)), (image**2).sum((1, 2)))
    np.testing.assert_allclose(moved.mean((1, 2)), image.mean((1, 2)), rtol=1e-3)
    changes = (moved - image).reshape(4, -1)
    assert np.abs(np.corrcoef(changes) - np.eye(4)).max() < 0.9  # every slice by itself


@pytest.mark.parametrize("seed", range(4))
def test_ghosts_are_copies_on_both_sides(seed):
    point = np.zeros((60, 60))
    point[30, 20] = 1
    ghosts = applied("ghosting", point, 0.2, seed)
    (rows, columns), levels = np.nonzero(ghosts), ghosts[ghosts > 0]
    assert sorted(np.round(levels, 6)) == [0.2, 0.2, 1.0]
    offsets = (rows - 30) % 60 + (columns - 20) % 60
    shift = sorted(offsets)[1]
    assert sorted(offsets) == [0, shift, 60 - shift]
    assert shift in (60 // period for period in range(3, 7))
    assert len(set(rows)) == 1 or len(set(columns)) == 1


def test_spikes_are_three_plane_waves():
    image = np.zeros((2, 96, 96))
    waves = applied("spike", image, 0.1)
    assert np.abs(waves).max() <= 0.3
    np.testing.assert_allclose(waves.var((1, 2)), 3 * 0.1**2 / 2, rtol=0.15)
    window = np.hanning(96)
    power = np.abs(np.fft.fft2(waves * window[:, None] * window)) ** 2
    strongest = np.sort(power.reshape(2, -1), 1)[:, ::-1]
    assert (strongest[:, : 6 * 16].sum(1) > 0.98 * strongest.sum(1)).all()
    assert np.abs(np.corrcoef(waves.reshape(2, -1))[0, 1]) < 0.5


def test_gibbs_ringing_has_no_high_frequencies_and_all_low_ones():
    image = blobs((1, 3, 40, 50), sigma=1)[0]
    clean, truncated = np.fft.fft2(image), np.fft.fft2(applied("gibbs_ringing", image, 0.5))
    rows, columns = np.abs(np.fft.fftfreq(40))[:, None], np.abs(np.fft.fftfreq(50))
    kept = (rows <= 0.25) & (columns <= 0.25)
    np.testing.assert_allclose(truncated[:, kept], clean[:, kept], atol=1e-9)
    np.testing.assert_allclose(truncated[:, ~kept], 0, atol=1e-9)


def test_the_bias_field_is_a_smooth_bounded_factor_common_to_all_channels():
    image = np.random.default_rng(0).uniform(0.2, 1, (2, 6, 40, 48))
    shaded = CORRUPTIONS["bias_field"].apply(image, 0.7, np.random.default_rng(1))
    logarithm = np.log(shaded / image)
    assert np.abs(logarithm).max() == pytest.approx(0.7, rel=1e-6)
    np.testing.assert_allclose(logarithm[0], logarithm[1], atol=1e-9)
    assert all(np.abs(np.diff(logarithm, axis=axis)).max() < 0.12 for axis in (2, 3))


def test_low_dose_noise_is_that_of_filtered_back_projection():
    body = np.zeros((128, 128))
    rows, columns = np.indices(body.shape) - 64
    body[(rows / 24) ** 2 + (columns / 56) ** 2 < 1] = 1
    noise = np.stack([applied("low_dose", body, 0.05, seed) - body for seed in range(20)])
    np.testing.assert_allclose(noise.std((1, 2)), 0.05)
    spread = noise.std(0)
    assert spread[56:72, 56:72].mean() > 2 * spread[:16, :16].mean()
    power = (np.abs(np.fft.fft2(noise)) ** 2).mean(0)
    radius = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128))
    ring = [power[(radius > low) & (radius < low + 0.04)].mean() for low in (0.01, 0.06, 0.12)]
    assert ring[0] < ring[1] < ring[2]
    assert power[radius > 0.5].max() < 0.05 * power.max()
    # The rays along the broad side, the columns, cross the most tissue: the noise changes faster across rows.
    centre = noise[:, 56:72, 56:72]
    assert np.diff(centre, axis=1).std() > 1.2 * np.diff(centre, axis=2).std()


def test_few_views_keep_the_spokes_of_the_spectrum():
    image = np.random.default_rng(0).standard_normal((64, 64))
    np.testing.assert_allclose(applied("streaks", image, 3), image, atol=1e-9)
    ratio = np.fft.fft2(applied("streaks", image, 8 / 64)) / np.fft.fft2(image)
    weight = ratio.real[1:32, 1:32]  # away from the Nyquist frequency, which is its own mirror image
    np.testing.assert_allclose(ratio.imag[1:32, 1:32], 0, atol=1e-6)
    radius = np.hypot(*np.ogrid[1:32, 1:32])
    assert ratio[0, 0] == pytest.approx(1)
    assert (weight[radius > 20] < 1e-6).mean() > 0.5
    assert weight.max() <= np.pi * radius.max() / 8 + 1e-6
    assert weight.mean() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_follows_its_formulas(severity):
    picture = Volume.of_pixels(blobs((1, 40, 40)))
    x = picture.array

    def strength(name: str) -> float:
        return CORRUPTIONS[name].strengths[severity - 1]

    for name in ("gamma_dark", "gamma_bright"):
        np.testing.assert_allclose(corrupt(picture, name, severity).array, x ** strength(name), atol=1e-9)
    for name in ("low_contrast", "high_contrast"):
        expected = x.mean() + strength(name) * (x - x.mean())
        np.testing.assert_allclose(corrupt(picture, name, severity).array, expected, atol=1e-9)
    for name in ("brightness_up", "brightness_down"):
        np.testing.assert_allclose(corrupt(picture, name, severity).array, x + strength(name), atol=1e-9)


def test_gamma_leaves_what_lies_outside_the_range():
    image = np.array([[-0.4, 0.25, 1.5]])
    np.testing.assert_allclose(applied("gamma_dark", image, 2), [[-0.4, 0.0625, 1.5]])


def test_low_resolution_is_means_and_interpolation():
    image = blobs((1, 20, 30), sigma=1)[0]
    means = image.reshape(10, 2, 15, 2).mean((1, 3))
    rows = np.stack([np.interp((np.arange(20) - 0.5) / 2, np.arange(10), line) for line in means.T], 1)
    expected = np.stack([np.interp((np.arange(30) - 0.5) / 2, np.arange(15), line) for line in rows])
    np.testing.assert_allclose(applied("low_resolution", image, 0.5), expected, atol=1e-12)
    ramp = np.add.outer(np.arange(60.0), 2 * np.arange(60.0))
    lowered = applied("low_resolution", ramp, 0.35)
    np.testing.assert_allclose(lowered[4:-4, 4:-4], ramp[4:-4, 4:-4], atol=0.1)  # nothing shifts


def test_anisotropy_mixes_slices_or_the_rows_of_a_picture():
    image = blobs((1, 12, 20, 20), sigma=1)[0]
    thick = applied("anisotropy", image, 1 / 3)
    np.testing.assert_allclose(thick[1::3], image.reshape(4, 3, 20, 20).mean(1), atol=1e-12)
    picture = applied("anisotropy", image[0][:18], 1 / 3)
    np.testing.assert_allclose(picture[1::3], image[0][:18].reshape(6, 3, 20).mean(1), atol=1e-12)


def test_the_field_of_view_loses_its_border_in_the_plane():
    image = blobs((1, 4, 40, 60))[0] - 0.5
    cut = applied("field_of_view", image, 0.1)
    np.testing.assert_array_equal(cut[:, 4:-4, 6:-6], image[:, 4:-4, 6:-6])
    border = np.ones(image.shape, bool)
    border[:, 4:-4, 6:-6] = False
    assert (cut[border] == image.min()).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_pillows_round_trip(channels, severity):
    picture = np.rint(255 * blobs((channels, 40, 48))).astype(np.uint8)
    file = io.BytesIO()
    pixels = picture[0] if channels == 1 else picture.transpose(1, 2, 0)
    quality = int(CORRUPTIONS["jpeg"].strengths[severity - 1])
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file))
    result = corrupt(Volume.of_pixels(picture), "jpeg", severity).array
    np.testing.assert_array_equal(result.transpose(1, 2, 0).squeeze(), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_quantisation_leaves_as_many_levels_as_stated(severity):
    quantised = corrupt(Volume(blobs((1, 60, 60)), np.eye(3)), "quantisation", severity).array
    levels = CORRUPTIONS["quantisation"].strengths[severity - 1]
    found = np.unique(np.round(quantised, 9))
    np.testing.assert_allclose(found, np.linspace(0, 1, int(levels)), atol=1e-9)
