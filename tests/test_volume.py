from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import aff2axcodes
from scipy import ndimage

from anysite.data.volume import Volume, in_order, interpolate, interpolation_matrix
from anysite.errors import GeometryError

AXES = ["".join(order) for letters in product("RL", "AP", "SI") for order in permutations(letters)]
shapes = st.tuples(*[st.integers(2, 6)] * 3)
spacings = st.tuples(*[st.floats(0.3, 6)] * 3)
seeds = st.integers(0, 2**16)


def oblique(shape: tuple[int, ...], spacing: tuple[float, ...], seed: int, channels: int = 2) -> Volume:
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(np.eye(3) + rng.normal(0, 0.1, (3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.sign(np.diag(rotation)) @ np.diag(spacing)
    affine[:3, 3] = rng.normal(0, 50, 3)
    return Volume(rng.normal(size=(channels, *shape)), affine)


def world(volume: Volume, index: np.ndarray) -> np.ndarray:
    return volume.affine[:-1, :-1] @ index + volume.affine[:-1, -1]


@pytest.mark.parametrize("axes", AXES)
def test_orientation_keeps_every_voxel_at_its_place_and_comes_back(axes):
    volume = oblique((3, 4, 5), (1.0, 2.0, 3.0), seed=1)
    turned = volume.oriented(axes)
    assert "".join(str(code) for code in aff2axcodes(turned.affine)) == axes
    inverse = np.linalg.inv(volume.affine)
    for index in np.ndindex(*turned.shape):
        old = inverse[:3, :3] @ world(turned, np.array(index)) + inverse[:3, 3]
        i, j, k = np.rint(old).astype(int)
        np.testing.assert_allclose(old, (i, j, k), atol=1e-9)
        np.testing.assert_array_equal(turned.array[:, *index], volume.array[:, i, j, k])
    back = turned.oriented("RAS")
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(shapes, spacings, spacings, seeds)
def test_resampling_keeps_the_extent(shape, spacing, target, seed):
    volume = oblique(shape, spacing, seed)
    resampled = volume.resampled(target)
    # The affine has the spacing to the last digit or so: half a voxel more may be rounded either way.
    voxels = np.maximum(1, np.array(shape) * spacing / np.array(target))
    np.testing.assert_allclose(resampled.shape, voxels, rtol=0, atol=0.5 + 1e-6)
    for corner in product((0, 1), repeat=3):  # the outer corners of the outer voxels
        old = np.array(corner) * shape - 0.5
        new = np.array(corner) * resampled.shape - 0.5
        np.testing.assert_allclose(world(resampled, new), world(volume, old), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(shapes, seeds, st.tuples(*[st.integers(2, 12)] * 3))
def test_resampling_a_ramp_reads_world_positions(shape, seed, new_shape):
    volume = oblique(shape, (1.0, 2.0, 3.0), seed)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    places = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    resampled = volume.with_array(np.moveaxis(places, -1, 0)).resampled_to(new_shape)
    for new in np.ndindex(*new_shape):
        old = np.linalg.solve(volume.affine, [*world(resampled, np.array(new)), 1])[:3]
        if (old >= 0).all() and (old <= np.array(shape) - 1).all():  # beyond them the border is repeated
            np.testing.assert_allclose(resampled.array[:, *new], world(resampled, np.array(new)), atol=2e-3)


def test_a_marker_stays_at_its_place():
    array = np.zeros((1, 20, 20, 20), np.float32)
    array[0, 6:10, 12:14, 4:10] = 1
    volume = Volume(array, np.diag([1.0, 2.0, 1.5, 1.0]))
    for interpolation in ("linear", "cubic", "label"):
        fine = volume.resampled((0.5, 1.0, 0.75), interpolation)
        weights = np.clip(fine.array[0], 0, None)
        centre = np.array([(weights * i).sum() for i in np.indices(fine.shape)]) / weights.sum()
        np.testing.assert_allclose(world(fine, centre), world(volume, np.array([7.5, 12.5, 6.5])), atol=0.02)


@settings(deadline=None, max_examples=40)
@given(shapes, seeds, st.tuples(*[st.integers(1, 12)] * 3))
def test_label_resampling_is_the_largest_interpolated_class(shape, seed, new_shape):
    labels = np.random.default_rng(seed).choice([0, 2, 7], size=(1, *shape)).astype(np.int32)
    volume = Volume(labels, np.eye(4))
    resampled = volume.resampled_to(new_shape, "label")
    assert resampled.array.dtype == labels.dtype
    assert set(np.unique(resampled.array)) <= set(np.unique(labels))
    classes = np.unique(labels)
    scores = [volume.with_array((labels == c).astype(float)).resampled_to(new_shape).array for c in classes]
    clear = np.subtract(*np.sort([*scores, np.zeros_like(scores[0])], axis=0)[:-3:-1]) > 0.001
    np.testing.assert_array_equal(resampled.array[clear], classes[np.argmax(scores, axis=0)][clear])
    own = np.take_along_axis(np.array(scores), np.searchsorted(classes, resampled.array)[None], 0)[0]
    np.testing.assert_allclose(own, np.max(scores, axis=0), atol=0.001)  # of a tie, one that takes part


@settings(deadline=None, max_examples=60)
@given(shapes, shapes, st.sampled_from([0, 1, 3]), seeds)
def test_interpolation_is_scipys(shape, new_shape, order, seed):
    array = np.random.default_rng(seed).normal(size=shape)
    expected = np.empty(new_shape)
    zoom = np.divide(new_shape, shape)
    ndimage.zoom(array, zoom, output=expected, order=order, mode="nearest", grid_mode=True)
    found = interpolate(array, new_shape, order)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_no_weight_of_an_interpolation_is_so_small_that_processors_are_slow_with_it():
    weights = abs(interpolation_matrix(512, 256, 3))
    assert weights[weights > 0].min() > np.finfo(np.float32).tiny


def test_halfway_between_two_voxels_the_nearest_one_counts():
    label = Volume(np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 0], np.int32)[None, :, None, None], np.eye(4))
    halved = label.resampled_to((5, 1, 1), "label").array.ravel()
    assert halved.sum() == 2  # not 1, as if every tie were the background's


@given(shapes, spacings, seeds)
def test_resampling_to_the_same_grid_is_the_identity(shape, spacing, seed):
    volume = oblique(shape, spacing, seed)
    assert volume.resampled_to(shape) is volume
    assert volume.resampled(volume.spacing, "cubic") is volume


def test_two_axes_are_pixels_without_orientation():
    image = Volume.of_pixels(np.arange(12.0).reshape(1, 3, 4))
    assert (image.dimension, image.unit, image.spacing) == (2, "px", (1.0, 1.0))
    assert image.oriented("LPI") is image
    assert image.resampled((0.5, 2.0)).shape == (6, 2)


def test_same_grid_looks_at_shape_place_and_unit():
    volume = oblique((3, 4, 5), (1.0, 1.0, 1.0), seed=0)
    moved = volume.affine.copy()
    moved[0, 3] += 0.1
    turned = volume.affine.copy()
    turned[0, 0] += 0.03
    assert volume.same_grid(Volume(volume.array[:1], volume.affine + 1e-6))
    assert not volume.same_grid(Volume(volume.array, moved))
    assert not volume.same_grid(Volume(volume.array, turned))
    assert not volume.same_grid(Volume(volume.array, volume.affine, "px"))
    assert not volume.same_grid(Volume(volume.array[:, 1:], volume.affine))


@pytest.mark.parametrize(
    ("shape", "affine"),
    [
        ((1, 4), np.eye(2)),
        ((1, 4, 0), np.eye(3)),
        ((1, 4, 4), np.eye(4)),
        ((1, 4, 4), np.diag([0.0, 1, 1])),
        ((1, 4, 4), np.full((3, 3), np.nan)),
        ((1, 2, 2, 2, 2), np.eye(5)),
    ],
)
def test_impossible_geometry_is_refused(shape, affine):
    with pytest.raises(GeometryError):
        Volume(np.zeros(shape), affine)


def test_an_array_of_another_shape_is_refused():
    with pytest.raises(GeometryError, match="spatial shape"):
        Volume.of_pixels(np.zeros((1, 3, 3))).with_array(np.zeros((1, 3, 4)))


@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (1, 6, 1, 4), (3, 4, 5), (1, 5, 5, 1)])
@pytest.mark.parametrize("dtype", ["<i2", ">f4", "u1"])
def test_voxels_are_put_in_order_in_memory_and_stay_where_they_are(
    shape: tuple[int, ...], dtype: str
) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    for stored in (array, np.asfortranarray(array), array[:, ::-1], np.flip(np.asfortranarray(array))):
        ordered = in_order(stored)
        assert ordered.flags.c_contiguous
        assert ordered.dtype == dtype
        np.testing.assert_array_equal(ordered, stored)
    assert in_order(array) is array
