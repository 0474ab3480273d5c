"""How alike two images are in structure at every voxel, whatever their brightness and contrast."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

SIGMA_VOXELS = 1.5
RANGE = 2.0  # of images from -1 to 1


def compare_contrast(one: Float[Tensor, "b c *s"], other: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
    """Return the contrast and structure term of SSIM, which a change of brightness leaves alone."""
    return _ssim(one, other)[1]


def compare_ssim(one: Float[Tensor, "b c *s"], other: Float[Tensor, "b c *s"]) -> Float[Tensor, "b c *s"]:
    """Return SSIM of images from -1 to 1: Wang et al., 2004, https://doi.org/10.1109/TIP.2003.819861."""
    return _ssim(one, other)[0]


def compare_correlation(
    one: Float[Tensor, "b c *s"], other: Float[Tensor, "b c *s"]
) -> Float[Tensor, "b c *s"]:
    """Return the squared local normalised cross-correlation: Avants et al., 2008, https://doi.org/10.1016/j.media.2007.06.004."""
    from monai.losses.image_dissimilarity import LocalNormalizedCrossCorrelationLoss  # slow to import

    dimension = one.ndim - 2
    size = min(9, *(n - 1 + n % 2 for n in one.shape[2:]))
    measure = LocalNormalizedCrossCorrelationLoss(
        dimension, kernel_size=size, reduction="none", smooth_nr=0.0, smooth_dr=1e-5
    )
    # Beyond the image MONAI sees zeros, of which the border would be unlike for their brightness alone.
    inside = (..., *(slice(size // 2, size // 2 + n) for n in one.shape[2:]))
    one, other = _pad(one, size // 2), _pad(other, size // 2)
    channels = [-measure(a, b) for a, b in zip(one.split(1, 1), other.split(1, 1), strict=True)]
    return torch.cat(channels, 1)[inside]


def compare_neighbourhoods(
    one: Float[Tensor, "b c *s"], other: Float[Tensor, "b c *s"]
) -> Float[Tensor, "b c *s"]:
    """Return 1 minus the mean difference of MIND descriptors: Heinrich et al., 2012, https://doi.org/10.1016/j.media.2012.05.008."""
    difference = (describe_neighbourhoods(one) - describe_neighbourhoods(other)).abs()
    return 1 - difference.mean(0)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contrast": compare_contrast,
    "ssim": compare_ssim,
    "correlation": compare_correlation,
    "mind": compare_neighbourhoods,
}


def compare(
    name: str, one: Float[Tensor, "b c *s"], other: Float[Tensor, "b c *s"]
) -> Float[Tensor, "b c *s"]:
    """Return the likeness of two images from -1 to 1 by one of `SIMILARITIES`, in float32.

    Variances are differences of near equal numbers, of which bfloat16 leaves nothing.
    """
    with torch.autocast(one.device.type, enabled=False):
        return SIMILARITIES[name](one.float(), other.float())


def mean_over(values: Float[Tensor, "b c *s"], region: Bool[Tensor, "b 1 *s"]) -> Float[Tensor, " b"]:
    """Return the mean of a map over a region of each sample, over channels too; 0 where the region is empty."""
    inside = region.to(values.dtype)
    total = (values.mean(1, keepdim=True) * inside).flatten(1).sum(1)
    return total / inside.flatten(1).sum(1).clamp(min=1)


def grow(region: Bool[Tensor, "b 1 *s"], voxels: int) -> Bool[Tensor, "b 1 *s"]:
    """Return a region with everything within so many voxels of it along the axes, a box."""
    pool = F.max_pool2d if region.ndim == 4 else F.max_pool3d
    grown = region.float()
    for axis in range(region.ndim - 2):  # one after the other, which is much quicker
        along = [int(other == axis) for other in range(region.ndim - 2)]
        grown = pool(grown, [2 * voxels * a + 1 for a in along], 1, [voxels * a for a in along])
    return grown > 0


def describe_neighbourhoods(image: Float[Tensor, "b c *s"]) -> Float[Tensor, "n b c *s"]:
    """Return MIND: how like each of the nearest neighbours every voxel's surroundings are, 1 for the likest."""
    dimension = image.ndim - 2
    padded = _pad(image, 1)
    distances = []
    for axis, step in itertools.product(range(dimension), (-1, 1)):
        shifted = padded
        for other, size in enumerate(image.shape[2:]):
            shifted = shifted.narrow(2 + other, 1 + (step if other == axis else 0), size)
        distances.append(_smooth((image - shifted).square()))
    distance = torch.stack(distances)
    variance = distance.mean(0).clamp(min=1e-6)
    descriptor = torch.exp(-distance / variance)
    return descriptor / descriptor.amax(0).clamp(min=1e-6)


def _ssim(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    dimension = one.ndim - 2
    # 11 voxels as published in 2-D; 7 in 3-D, where windows hold as many voxels sooner.
    window = 11 if dimension == 2 else 7
    one, other = _pad(one, window // 2), _pad(other, window // 2)
    moments = torch.stack([one, other, one * one, other * other, one * other])
    mean, other_mean, square, other_square, product = _smooth_gaussian(moments, dimension, window)
    means = mean * other_mean
    squares = mean.square() + other_mean.square()
    luminance, contrast = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    structure = (2 * (product - means) + contrast) / (square + other_square - squares + contrast)
    return (2 * means + luminance) / (squares + luminance) * structure, structure


def _smooth_gaussian(maps: Float[Tensor, "*s"], dimension: int, window: int) -> Float[Tensor, "*t"]:
    """Return Gaussian means over windows along the last axes, wherever a whole window lies.

    Axis by axis and as products with matrices, in a fraction of the time of a convolution (benchmarks/similarity.py).
    """
    places = torch.arange(window, device=maps.device) - (window - 1) / 2
    weights = torch.exp(-places.square() / (2 * SIGMA_VOXELS**2))
    weights = (weights / weights.sum())[None, None]
    for axis in range(-dimension, 0):
        identity = torch.eye(maps.shape[axis], device=maps.device)[:, None]
        matrix = F.conv1d(identity, weights)[:, 0]
        maps = (maps.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return maps


def _smooth(image: Tensor) -> Tensor:
    pool = F.avg_pool2d if image.ndim == 4 else F.avg_pool3d
    return pool(_pad(image, 1), 3, 1)


def _pad(image: Tensor, voxels: int) -> Tensor:
    return F.pad(image, [voxels] * (2 * (image.ndim - 2)), mode="replicate")
