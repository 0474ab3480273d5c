"""Intensities brought to a common scale: of the image, of the training images, or of each voxel's surroundings."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from scipy.ndimage import convolve, gaussian_filter
from torch.nn import functional as F

CLIP_PERCENTILES = (0.5, 99.5)
LEAST_SIZE = 32  # coarse voxels along an axis, where the image has as many
FINE = 8.0  # coarse voxels a standard deviation; a map so smooth needs no more of them
# Of noise what it is, of a plane or an edge along an axis nothing: in units of independent noise's deviation.
MIXED_DIFFERENCE = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32) / 6
MEDIAN_OF_NORMAL = 0.6745


class Normalisation(BaseModel):
    """How one channel's intensities are brought to zero mean and unit variance.

    "case" uses the statistics of the image at hand, "local" after it those around each voxel, "dataset" those of the
    training cases' foreground (for units that mean something, as in CT), "none" leaves the values alone.

    Attributes:
        sigma_voxels: Of "local", how far surroundings reach along each axis of the plan's grid: the standard
            deviation of a Gaussian, 0 for an axis across which slices are not compared.
        least_contrast: Of "local", in standard deviations of the image, what is added to those of the surroundings.
        noise_contrast: Of "local", how many times the image's noise is added as well.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["case", "local", "dataset", "none"] = "case"
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 1.0
    sigma_voxels: tuple[float, ...] = ()
    least_contrast: float = 0.1
    noise_contrast: float = 0.0


def normalise_as_a_whole(
    channel: Float[np.ndarray, "*s"], normalisation: Normalisation
) -> tuple[Float[np.ndarray, "*s"], float]:
    """Return one channel of an image on the plan's grid, normalised alike everywhere, and what became of no signal.

    Of "local" this comes first. No signal is an intensity of 0, of Hounsfield units the lower end of their window.
    """
    if normalisation.kind == "none":
        return channel, 0.0
    if normalisation.kind == "dataset":
        clipped = np.clip(channel, normalisation.low, normalisation.high)
        nothing = (normalisation.low - normalisation.mean) / normalisation.std
        return (clipped - normalisation.mean) / normalisation.std, nothing
    low, high = np.percentile(channel, CLIP_PERCENTILES)
    # Where nearly every voxel has one value, clipping would leave nothing of the rest.
    clipped = np.clip(channel, low, high) if low < high else channel
    mean, contrast = _measure_contrast(clipped)
    return ((clipped - mean) / contrast).astype(np.float32), -mean / contrast


def compare_to_surroundings(
    channel: Float[np.ndarray, "*s"], normalisation: Normalisation
) -> Float[np.ndarray, "*s"]:
    """Return a channel that is normalised as a whole, of "local" by each voxel's surroundings too."""
    if normalisation.kind != "local":
        return channel
    least = normalisation.least_contrast
    if normalisation.noise_contrast:
        least += normalisation.noise_contrast * measure_noise(channel)
    evened = even_out(channel, normalisation.sigma_voxels, least)
    mean, contrast = _measure_contrast(evened)
    return ((evened - mean) / contrast).astype(np.float32)


def even_out(
    values: Float[np.ndarray, "*s"], sigma_voxels: tuple[float, ...], least_contrast: float
) -> Float[np.ndarray, "*s"]:
    """Return how far each voxel lies from its surroundings' mean, in their standard deviations.

    Local contrast normalisation: Jarrett, Kavukcuoglu, Ranzato, LeCun, 2009,
    https://doi.org/10.1109/ICCV.2009.5459469. Shading and differences in contrast across an image go, and with them
    much of what scanners disagree about.

    Args:
        values: Of unit variance.
        sigma_voxels: Standard deviation of the Gaussian that weighs the surroundings, for each axis.
        least_contrast: Added to the deviations: the larger, the less noise in air looks like anatomy.
    """
    centred = values - _smooth(values, sigma_voxels)
    contrast = _smooth(np.square(centred), sigma_voxels)
    np.sqrt(contrast, out=contrast)
    contrast += least_contrast
    return np.divide(centred, contrast, out=centred)


def measure_noise(values: Float[np.ndarray, "*s"]) -> float:
    """Return the standard deviation of an image's noise, as far as it differs from voxel to voxel.

    Differences of differences along the last two axes (Immerkær, 1996, https://doi.org/10.1006/cviu.1996.0060), of
    which the median counts, because contours are few (Donoho, Johnstone, 1994,
    https://doi.org/10.1093/biomet/81.3.425).
    """
    if min(values.shape[-2:]) < 3:
        return 0.0
    kernel = MIXED_DIFFERENCE.reshape((1,) * (values.ndim - 2) + MIXED_DIFFERENCE.shape)
    return float(np.median(np.abs(convolve(values, kernel, mode="nearest")))) / MEDIAN_OF_NORMAL


def _measure_contrast(values: Float[np.ndarray, "*s"]) -> tuple[float, float]:
    """Return the mean, and the standard deviation or, of a constant, 1."""
    # Over voxels in float64: float32 sums lose digits on large volumes.
    mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    # What rounding makes of a constant is no contrast; how small the numbers are says nothing.
    return mean, std if std > 1e-6 * np.abs(values).max() else 1.0


def _smooth(values: Float[np.ndarray, "*s"], sigma_voxels: tuple[float, ...]) -> Float[np.ndarray, "*s"]:
    """Return Gaussian means, computed on a grid as coarse as they allow: an image's time, however wide they are."""
    shape = values.shape
    coarse = [
        max(int(np.ceil(n / max(1.0, sigma // FINE))), min(n, LEAST_SIZE))
        for n, sigma in zip(shape, sigma_voxels, strict=True)
    ]
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    volume = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    small = F.interpolate(volume, size=coarse, mode="area")[0, 0].numpy()
    sigma_coarse = [sigma * m / n for sigma, m, n in zip(sigma_voxels, coarse, shape, strict=True)]
    means = torch.from_numpy(gaussian_filter(small, sigma_coarse, mode="reflect"))[None, None]
    return F.interpolate(means, size=shape, mode=mode, align_corners=False)[0, 0].numpy()
