import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.interpolate import BSpline

from anysite import augment as module
from anysite.augment import augment
from anysite.axes import mixed_axes
from anysite.config import parse
from anysite.errors import ConfigError
from anysite.random_convolution import convolve_at_random
from anysite.settings import AugmentSettings
from anysite.sides import find_mirrored_sides

GEOMETRY = ("affine", "elastic", "flip")
INTENSITY = (
    "bias_field",
    "noise",
    "blur",
    "brightness",
    "contrast",
    "low_resolution",
    "gamma",
    "random_convolution",
)
OFF = dict.fromkeys((*GEOMETRY, *INTENSITY), 0.0)
SHAPES = [(48, 40), (24, 28, 20), (6, 40, 36)]


def only(**changes):
    return AugmentSettings(**{**OFF, **changes})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(shape, count=2, channels=1, seed=0):
    image = torch.randn((count, channels, *shape), generator=seeded(seed))
    label = torch.randint(0, 4, (count, *shape), generator=seeded(seed + 1))
    return image, label


def blobs(shape, count=4):
    """Smooth images, thick slices alike, with the label that a threshold of 0 gives."""
    noise = np.random.default_rng(0).standard_normal((count, *shape))
    smooth = ndimage.gaussian_filter(noise, (0, *(n / 8 for n in shape)), mode="reflect")
    image = torch.tensor(smooth / smooth.std(), dtype=torch.float32)[:, None]
    return image, (image[:, 0] > 0).long()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_is_a_pure_function_of_batch_and_seed(shape, channels, count):
    always = AugmentSettings(**dict.fromkeys(OFF, 1.0))
    image, label = batch(shape, count, channels)
    before = image.clone(), label.clone()
    first = augment(image, label, always, seeded(3))
    second = augment(image, label, always, seeded(3))
    other = augment(image, label, always, seeded(4))
    assert torch.equal(image, before[0])
    assert torch.equal(label, before[1])
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert (first[0].shape, first[0].dtype) == (image.shape, image.dtype)
    assert (first[1].shape, first[1].dtype) == (label.shape, label.dtype)
    assert first[0].isfinite().all()


def test_disabled_returns_the_inputs_themselves():
    image, label = batch((8, 8))
    result = augment(image, label, AugmentSettings(enabled=False), seeded())
    assert result[0] is image
    assert result[1] is label


@pytest.mark.parametrize("shape", SHAPES)
def test_all_probabilities_zero_is_the_identity(shape):
    image, label = batch(shape)
    moved, classes = augment(image, label, only(), seeded())
    assert torch.equal(moved, image)
    assert torch.equal(classes, label)


def test_channels_last_and_other_types_give_the_same():
    image, label = batch((24, 32), channels=3)
    expected, classes = augment(image, label, AugmentSettings(), seeded(5))
    last, small = augment(
        image.to(memory_format=torch.channels_last), label.to(torch.int16), AugmentSettings(), seeded(5)
    )
    double, _ = augment(image.double(), label, AugmentSettings(), seeded(5))
    assert torch.equal(last, expected)
    assert small.dtype == torch.int16
    assert torch.equal(small.long(), classes)
    assert torch.equal(double, expected.double())


@pytest.mark.parametrize("name", [*GEOMETRY, *INTENSITY])
def test_each_transform_alone_changes_only_the_samples_drawn(name):
    image, label = batch((12, 10), count=64, channels=2)
    flip_axes = {"flip_axes": (0,)} if name == "flip" else {}
    moved, classes = augment(image, label, only(**{name: 0.5}, **flip_axes), seeded(7))
    changed = (moved != image).flatten(1).any(1)
    assert 16 <= changed.sum() <= 48
    label_changed = (classes != label).flatten(1).any(1)
    assert not (label_changed & ~changed).any()
    assert label_changed.any() == (name in GEOMETRY)
    # A drawn sample is altered throughout, not in a corner.
    assert (moved != image)[changed].float().mean() > 0.4


@pytest.mark.parametrize("shape", [(96, 80), (48, 44, 40), (10, 64, 64)])
@pytest.mark.parametrize("seed", range(3))
def test_image_and_label_move_together(shape, seed):
    image, label = blobs(shape)
    moved, classes = augment(image, label, only(affine=1.0, elastic=1.0, flip=0.5), seeded(seed))
    assert not torch.equal(classes, label)
    mask = moved[:, 0] > 0
    dice = 2 * (mask & (classes == 1)).sum() / (mask.sum() + classes.sum())
    assert dice > 0.95


@given(
    st.lists(st.integers(4, 9), min_size=2, max_size=3),
    st.lists(st.integers(0, 60000), min_size=1, max_size=3),
    st.integers(0, 2**30),
)
@hypothesis_settings(max_examples=40, deadline=None)
def test_no_label_value_is_invented(shape, values, seed):
    label = torch.tensor(values)[torch.randint(0, len(values), (2, *shape), generator=seeded(seed))]
    image = torch.randn((2, 1, *shape), generator=seeded(seed))
    settings = AugmentSettings(affine=1.0, elastic=1.0, rotation_degrees=180)
    moved, classes = augment(image, label, settings, seeded(seed))
    assert set(classes.unique().tolist()) <= set(values)
    assert moved.isfinite().all()


@pytest.mark.parametrize("shape", [(24, 40), (20, 16, 24)])
def test_warp_is_rigid_in_voxels_like_scipy(shape):
    image, label = batch(shape)
    angles = torch.tensor([[0.6], [-1.1]]) if len(shape) == 2 else torch.tensor([[0.3, -0.5, 0.4], [1, 0, 0]])
    matrix = module.rotation(angles) / 1.31
    moved, classes = module.warp(image, label, matrix)
    centre = (np.array(shape) - 1) / 2
    for sample in range(2):
        m = matrix[sample].double().numpy()
        offset: Any = centre - m @ centre
        grey, mask = image[sample, 0].numpy(), label[sample].numpy()
        expected = ndimage.affine_transform(grey, m, offset, order=1, mode="reflect")
        np.testing.assert_allclose(moved[sample, 0], expected, atol=2e-4)
        nearest = ndimage.affine_transform(mask, m, offset, order=0, mode="reflect")
        assert (classes[sample].numpy() != nearest).mean() < 1e-3  # ties between two voxels


def test_rotation_matches_scipy_rotate_and_its_matrices_are_rotations():
    image, label = batch((25, 41))
    moved, _ = module.warp(image, label, module.rotation(torch.full((2, 1), math.radians(20))))
    expected = ndimage.rotate(image[0, 0].numpy(), -20, reshape=False, order=1, mode="reflect")
    np.testing.assert_allclose(moved[0, 0], expected, atol=1e-4)
    matrices = module.rotation(torch.rand((5, 3), generator=seeded()))
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).expand(5, 3, 3))
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(5))


@pytest.mark.parametrize("shape", [(24, 40), (12, 16, 20)])
def test_scale_matches_scipy_zoom(shape):
    image, label = batch(shape)
    moved, _ = augment(image, label, only(affine=1.0, rotation_degrees=0, scale=(2, 2)), seeded())
    zoomed: Any = ndimage.zoom(image[0, 0].numpy(), 2, order=1, mode="reflect", grid_mode=True)
    centre = tuple(slice(n // 2, n // 2 + n) for n in shape)
    np.testing.assert_allclose(moved[0, 0], zoomed[centre], atol=1e-5)


def test_smooth_field_is_a_cubic_b_spline():
    coefficients = torch.randn((2, 1, 7, 5), generator=seeded())
    field = module.smooth_field(coefficients, (24, 10))
    rows = BSpline(np.arange(-3, 8), np.eye(7), 3)((np.arange(24) + 0.5) / 6)
    columns = BSpline(np.arange(-3, 6), np.eye(5), 3)((np.arange(10) + 0.5) / 5)
    np.testing.assert_allclose(field[1, 0], rows @ coefficients[1, 0].numpy() @ columns.T, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 40), (24, 24, 24)])
def test_the_strongest_elastic_displacement_does_not_fold(shape):
    strength = torch.full((20,), 0.4)
    signs = module._draw_coefficients(strength, len(shape), shape, seeded()).sign() * strength[0]
    displacement = module.smooth_field(signs, shape) * (shape[0] / module.CELLS)
    gradients = torch.stack(torch.gradient(displacement, dim=list(range(2, 2 + len(shape)))), 2)
    jacobian = gradients.movedim((1, 2), (-2, -1)) + torch.eye(len(shape))
    assert torch.linalg.det(jacobian).min() > 0


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), ()])
def test_only_the_named_axes_are_mirrored(axes):
    image, label = batch((5, 6, 7), channels=2)
    moved, classes = augment(image, label, only(flip=1.0, flip_axes=axes), seeded())
    assert torch.equal(moved, image.flip([2 + axis for axis in axes]))
    assert torch.equal(classes, label.flip([1 + axis for axis in axes]))


def test_an_axis_that_the_patch_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="axis 2; expected spatial axes 0 to 1"):
        augment(*batch((8, 8)), AugmentSettings(flip_axes=(2,)), seeded())


@pytest.mark.parametrize("value", [[1.4, 0.7], [0.0, 1.0], [-1.0, 1.0]])
def test_a_range_that_is_not_one_is_refused(value):
    with pytest.raises(ConfigError, match="expected two positive numbers, the smaller one first"):
        parse({"augment": {"scale": value}})


def test_thick_slices_are_not_mixed():
    shape = (6, 32, 32)
    settings = only(affine=1.0, elastic=1.0, rotation_degrees=180, blur=1.0, low_resolution=1.0)
    levels = torch.arange(6.0).view(6, 1, 1).expand(2, 1, *shape)
    moved, classes = augment(levels, levels[:, 0].long(), settings, seeded())
    torch.testing.assert_close(moved, levels, atol=1e-5, rtol=0)
    assert torch.equal(classes, levels[:, 0].long())
    image, label = batch(shape[1:])
    image, label = image[:, :, None].expand(2, 1, *shape), label[:, None].expand(2, *shape)
    moved, classes = augment(image, label, settings, seeded())
    assert (classes != label).any()
    torch.testing.assert_close(moved, moved[:, :, :1].expand_as(moved), atol=1e-5, rtol=0)
    assert torch.equal(classes, classes[:, :1].expand_as(classes))
    assert mixed_axes((16, 32, 32)) == (0, 1, 2)
    assert mixed_axes((15, 32, 32)) == (1, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_matches_scipy(shape):
    image, _ = batch(shape, channels=2)
    blurred = module.blur(image, torch.tensor([0.5, 1.2]))
    for sample, channel in itertools.product(range(2), range(2)):
        sigma = np.zeros(len(shape))
        sigma[list(mixed_axes(shape))] = (0.5, 1.2)[sample]
        expected = ndimage.gaussian_filter(image[sample, channel].numpy(), sigma, truncate=7)
        np.testing.assert_allclose(blurred[sample, channel], expected, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_low_resolution_matches_indexing_and_numpy_interpolation(shape):
    image, _ = batch(shape)
    lowered = module.lower_resolution(image, torch.tensor([0.5, 0.8]))
    for sample, factor in enumerate((0.5, 0.8)):
        expected = image[sample, 0].numpy()
        for axis in mixed_axes(shape):
            n, kept = shape[axis], round(shape[axis] * factor)
            nearest = np.floor((np.arange(kept) + 0.5) * n / kept).astype(int)
            position = (np.arange(n) + 0.5) * kept / n - 0.5

            def interpolate(line, nearest=nearest, position=position):
                return np.interp(position, np.arange(len(nearest)), line[nearest])

            expected = np.apply_along_axis(interpolate, axis, expected)
        np.testing.assert_allclose(lowered[sample, 0], expected, atol=1e-5)


@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_keeps_order_mean_and_deviation(inverted):
    image = batch((40, 40), channels=2)[0] * 30 + 100
    bent = module.change_gamma(image, torch.full((2, 1), 1.5), torch.full((2, 1), inverted))
    torch.testing.assert_close(bent.mean((2, 3)), image.mean((2, 3)))
    torch.testing.assert_close(bent.std((2, 3)), image.std((2, 3)))
    x = image[0, 1].double().numpy() * (-1 if inverted else 1)
    expected = ((x - x.min()) / (x.max() - x.min())) ** 1.5 * (-1 if inverted else 1)
    expected = (expected - expected.mean()) / expected.std() * x.std() + image[0, 1].mean().item()
    np.testing.assert_allclose(bent[0, 1], expected, atol=1e-3)


def test_noise_has_the_given_share_of_each_channels_deviation():
    image = batch((120, 120), channels=2)[0] * torch.tensor([1.0, 50.0]).view(2, 1, 1)
    sigma = torch.tensor([0.05, 0.2])
    noise = module.add_noise(image, sigma, seeded()) - image
    torch.testing.assert_close(
        noise.std((2, 3)) / image.std((2, 3)), sigma[:, None].expand(2, 2), rtol=0.03, atol=0
    )
    assert (noise.mean((2, 3)).abs() < 4 * noise.std((2, 3)) / 120).all()


def test_contrast_keeps_mean_direction_and_range():
    image = torch.rand((2, 1, 30, 30), generator=seeded())
    flat = module.change_contrast(image, torch.tensor([[0.5], [0.5]]))
    mean = image.mean((2, 3), keepdim=True)
    torch.testing.assert_close(flat, (image - mean) * 0.5 + mean)
    steep = module.change_contrast(image, torch.tensor([[3.0], [3.0]]))
    assert torch.equal(steep.amax((2, 3)), image.amax((2, 3)))
    assert torch.equal(steep.amin((2, 3)), image.amin((2, 3)))


@pytest.mark.parametrize("channelwise", [True, False])
def test_brightness_multiplies_each_channel_or_all_alike(channelwise):
    image, label = batch((10, 10), channels=3)
    changed, _ = augment(image, label, only(brightness=1.0, channelwise=channelwise), seeded())
    factor = changed / image
    assert factor.std((2, 3)).max() < 1e-5
    assert 0.7 <= factor.min() <= factor.max() <= 1.3
    assert bool((factor[:, 0, 0, 0] - factor[:, 1, 0, 0]).abs().max() > 1e-3) == channelwise


def test_bias_field_is_a_smooth_bounded_factor_common_to_all_channels():
    image, label = batch((64, 48), channels=2)
    changed, _ = augment(image, label, only(bias_field=1.0, bias_field_strength=0.5), seeded())
    low = image.amin((2, 3), keepdim=True)
    above = image - low > 0.5
    logarithm = ((changed - low) / (image - low)).log()
    assert logarithm[above].abs().max() <= 0.5
    assert logarithm[above].std() > 0.02
    both = above.all(1)
    torch.testing.assert_close(logarithm[:, 0][both], logarithm[:, 1][both], atol=1e-4, rtol=0)
    adjacent = above[..., 1:] & above[..., :-1]
    assert logarithm.diff(dim=-1)[adjacent].abs().max() < 0.08


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channelwise", [True, False])
def test_random_convolution_matches_a_plain_loop(shape, channelwise):
    image, _ = batch(shape, count=2, channels=2)
    share, axes = torch.tensor([0.3, 1.0]), mixed_axes(shape)
    made = convolve_at_random(image, share, axes, channelwise, seeded(5))
    generator = seeded(5)
    for sample in range(2):
        alike = [[0], [1]] if channelwise else [[0, 1]]
        for channels in alike:
            layers = draw_random_network(len(shape), axes, generator)
            own = image[sample, channels].numpy().astype(np.float64)
            seen = np.stack([apply_plainly(channel, layers) for channel in own])
            seen = (seen - seen.mean()) / seen.std() * own.std() + own.mean()
            blend = (1 - float(share[sample])) * own + float(share[sample]) * seen
            blend = (blend - blend.mean()) / blend.std() * own.std() + own.mean()
            np.testing.assert_allclose(made[sample, channels].numpy(), blend, atol=2e-4)


def draw_random_network(dimension, axes, generator):
    layers = []
    for inputs, outputs in ((1, 2), (2, 2), (2, 2), (2, 1)):
        side = (1, 3)[int(torch.randint(2, (), generator=generator))]
        size = [side if axis in axes else 1 for axis in range(dimension)]
        weight = torch.randn((outputs, inputs, *size), generator=generator)
        layers.append((weight.double().numpy(), torch.randn(outputs, generator=generator).double().numpy()))
    return layers


def apply_plainly(channel, layers):
    planes = [channel]
    for number, (weights, shifts) in enumerate(layers):
        sums = [
            sum(
                ndimage.correlate(plane, kernel, mode="nearest")
                for plane, kernel in zip(planes, row, strict=True)
            )
            + shift
            for row, shift in zip(weights, shifts, strict=True)
        ]
        last = number == len(layers) - 1
        planes = sums if last else [np.where(plane > 0, plane, 0.01 * plane) for plane in sums]
    return planes[0]


@pytest.mark.parametrize("name", INTENSITY)
def test_a_constant_image_stays_finite(name):
    image, label = torch.full((2, 1, 12, 12), 3.0), torch.zeros((2, 12, 12), dtype=torch.long)
    changed, _ = augment(image, label, only(**{name: 1.0}), seeded())
    assert changed.isfinite().all()
    if name != "brightness":
        torch.testing.assert_close(changed, image)


@pytest.mark.parametrize(
    ("settings", "axes", "classes", "expected"),
    [
        ({}, "SAR", ("background", "left_kidney", "Right_Kidney"), (2, "left_kidney", "Right_Kidney")),
        ({}, "AR", ("background", "hippocampus L", "hippocampus R"), (1, "hippocampus L", "hippocampus R")),
        ({}, "", ("background", "lung-left", "lung-right"), (1, "lung-left", "lung-right")),
        ({}, "SA", ("background", "left_kidney", "right_kidney"), None),  # slices from side to side
        ({"flip": 0}, "SAR", ("background", "left_kidney", "right_kidney"), None),
        ({"flip_axes": (0, 1)}, "SAR", ("background", "left_kidney", "right_kidney"), None),
        ({"enabled": False}, "SAR", ("background", "left_kidney", "right_kidney"), None),
        ({}, "SAR", ("background", "LeftKidney", "RightKidney"), (2, "LeftKidney", "RightKidney")),
        ({}, "SAR", ("background", "KIDNEY LEFT", "KIDNEY RIGHT"), (2, "KIDNEY LEFT", "KIDNEY RIGHT")),
        ({}, "SAR", ("background", "left_kidney", "liver", "cleft", "bright"), None),
    ],
)
def test_classes_that_mirroring_mixes_up_are_found(settings, axes, classes, expected):
    assert find_mirrored_sides(AugmentSettings(**settings), axes, classes) == expected
