"""Intensities on a common scale: the image's own, the training images', and each voxel's surroundings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from anysite.normalisation import (
    Normalisation,
    compare_to_surroundings,
    even_out,
    measure_noise,
    normalise_as_a_whole,
)


def normalise(channel: np.ndarray, normalisation: Normalisation) -> np.ndarray:
    return compare_to_surroundings(normalise_as_a_whole(channel, normalisation)[0], normalisation)


def textured(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape)
    values = gaussian_filter(values, 2.0) * 8 + gaussian_filter(values, 6.0) * 20
    return ((values - values.mean()) / values.std()).astype(np.float32)


def even_out_slowly(values: np.ndarray, sigma_voxels: tuple[float, ...], least_contrast: float) -> np.ndarray:
    """What `even_out` says it does, on the full grid and in double precision."""
    wide = values.astype(float)
    centred = wide - gaussian_filter(wide, sigma_voxels, mode="reflect")
    contrast = np.sqrt(gaussian_filter(centred**2, sigma_voxels, mode="reflect"))
    return centred / (contrast + least_contrast)


@pytest.mark.parametrize("least_contrast", [0.1, 0.6])
@pytest.mark.parametrize(
    ("shape", "sigma_voxels", "tolerance"),
    [
        ((60, 50), (6.0, 6.0), 1e-5),  # as fine as the image
        ((300, 250), (31.0, 31.0), 0.01),
        ((5, 120, 90), (0.0, 20.0, 11.0), 0.01),  # slices by themselves
        ((40, 60, 50), (9.0, 18.0, 18.0), 0.01),
        ((3, 4), (0.5, 20.0), 1e-5),  # surroundings wider than the image
    ],
)
def test_surroundings_are_those_of_a_gaussian(
    shape: tuple[int, ...], sigma_voxels: tuple[float, ...], tolerance: float, least_contrast: float
) -> None:
    values = textured(shape)
    found = even_out(values, sigma_voxels, least_contrast)
    expected = even_out_slowly(values, sigma_voxels, least_contrast)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_slices_do_not_look_at_each_other() -> None:
    volume = textured((4, 40, 40))
    other = volume.copy()
    other[1:] = 0
    sigma_voxels = (0.0, 20.0, 20.0)
    found, expected = (even_out(values, sigma_voxels, 0.1) for values in (volume, other))
    np.testing.assert_array_equal(found[0], expected[0])


@settings(deadline=None, max_examples=20)
@given(gain=st.floats(0.01, 1000), offset=st.floats(-100, 100), seed=st.integers(0, 99))
def test_scale_and_offset_do_not_count(gain: float, offset: float, seed: int) -> None:
    local = Normalisation(kind="local", sigma_voxels=(8.0, 8.0))
    image = textured((40, 50), seed)
    found = normalise(image, local)
    assert float(found.mean()) == pytest.approx(0, abs=1e-5)
    assert float(found.std()) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(normalise(gain * image + gain * offset, local), found, atol=2e-2)


def test_shading_goes_where_the_whole_image_cannot_tell_it() -> None:
    image = textured((128, 128))
    ramp = np.linspace(0, 1, 128, dtype=np.float32)
    shaded = (image + 10) * (0.5 + ramp) + 8 * ramp[:, None]

    def difference(kind: Any) -> float:
        one = Normalisation(kind=kind, sigma_voxels=(16.0, 16.0))
        return float(np.abs(normalise(shaded, one) - normalise(image, one)).mean())

    assert difference("local") < difference("case") / 3


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_an_image_of_one_value_becomes_zero(value: float) -> None:
    flat = np.full((20, 30), value, np.float32)
    assert not normalise(flat, Normalisation(kind="local", sigma_voxels=(4.0, 4.0))).any()


def test_noise_in_air_stays_below_anatomy() -> None:
    image = textured((128, 128)) * 100
    image[:, 64:] = np.random.default_rng(1).normal(size=(128, 64))

    def noise(least_contrast: float) -> float:
        local = Normalisation(kind="local", sigma_voxels=(8.0, 8.0), least_contrast=least_contrast)
        found = normalise(image, local)
        return float(found[:, 100:].std() / found[:, :40].std())

    assert noise(0.6) < noise(0.1) / 2 < 0.1


def test_a_larger_field_of_view_changes_no_surroundings() -> None:
    image = textured((256, 256))
    local = Normalisation(kind="local", sigma_voxels=(16.0, 16.0))
    larger = normalise(np.pad(image, 64, mode="symmetric"), local)[64:-64, 64:-64]
    np.testing.assert_allclose(larger[64:-64, 64:-64], normalise(image, local)[64:-64, 64:-64], atol=0.1)


@pytest.mark.parametrize("shape", [(200, 180), (12, 60, 60)])
def test_noise_is_measured_beside_anatomy(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    image = textured(shape)
    image[..., 40:] += 3  # a contour
    assert measure_noise(image) < 0.05
    noisy = (image + rng.normal(0, 0.5, shape)).astype(np.float32)
    assert measure_noise(noisy) == pytest.approx(0.5, rel=0.05)
    assert measure_noise(image[..., :2]) == 0.0  # too thin to tell


def test_noisy_images_are_compared_to_their_surroundings_the_less(rng: np.random.Generator) -> None:
    image = textured((128, 128))
    image[:, 64:] *= 0.1
    noisy = image + rng.normal(0, 0.3, image.shape).astype(np.float32)

    def lifted(values: np.ndarray, noise_contrast: float) -> float:
        local = Normalisation(kind="local", sigma_voxels=(8.0, 8.0), noise_contrast=noise_contrast)
        found = normalise(values, local)
        return float(found[:, 90:].std() / found[:, :40].std())

    assert lifted(noisy, 3.0) < 0.7 * lifted(noisy, 0.0)
    assert lifted(image, 3.0) == pytest.approx(lifted(image, 0.0), rel=0.1)


@pytest.mark.parametrize("kind", ["none", "case", "local", "dataset"])
def test_what_no_signal_becomes_is_what_a_voxel_without_any_becomes(kind: Any) -> None:
    channel = 90 + 20 * textured((40, 30))
    channel[:8] = 0
    normalisation = Normalisation(kind=kind, mean=40.0, std=25.0, low=0.0, high=150.0)
    whole, nothing = normalise_as_a_whole(channel, normalisation)
    assert nothing == pytest.approx(float(whole[0, 0]), abs=1e-5)
    assert nothing == pytest.approx(float(whole.min()), abs=1e-5)
