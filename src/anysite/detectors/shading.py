"""Contrast and shading: Van Leemput, Maes, Vandermeulen, Suetens, 1999, https://doi.org/10.1109/42.811268."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional as F

from anysite.detectors import Detector, Output, Vector, Vectors
from anysite.detectors.mahalanobis import learn_components, measure
from anysite.networks import require_fractions

SIDE = 16  # blocks along an axis whose means are looked at
WAVES = 3  # cosines along each axis, of no, half a and one period, as a coil's sensitivity is smooth
DARKEST = 0.05  # of the mean signal: darker blocks count as that


class Shading(Detector):
    """How unlike training images the contrast and the shading of an image are: no network needed.

    Both are relative to the mean signal above none, as magnitudes of MR, counts and gray levels have a zero. Shading
    are the lowest waves of the logarithm, in which a coil's sensitivity adds to the anatomy; published is how to
    correct it. The distance is Mahalanobis' in principal components.

    Args:
        variance: Share of the variance that the principal components kept must hold.

    Raises:
        ConfigError: a setting out of range.
    """

    reason = "its contrast or shading is unlike that of the training images"

    def __init__(self, *, variance: float = 0.99) -> None:
        super().__init__()
        require_fractions("detectors.shading", variance=variance)
        self.variance = variance

    def can_describe(self, output: Output) -> bool:
        """Tell whether it is known what no signal became."""
        return output.nothing is not None

    def describe(self, output: Output) -> Vector:
        """Return of every channel the logarithm of its contrast, and the lowest waves of that of its signal."""
        nothing = output.nothing or (0.0,) * len(output.image)
        return np.concatenate([_measure(*one) for one in zip(output.compared, nothing, strict=True)])

    def fit(self, vectors: Vectors) -> None:
        """Learn the principal components."""
        self.memory = learn_components(vectors, self.variance)

    def distance(self, vector: Vector) -> float:
        """Return the distance over the components and beyond them."""
        return measure(vector, self.memory)


def _measure(channel: Float[np.ndarray, "*s"], nothing: float) -> Vector:
    darkest = min(nothing, float(channel.min()))  # images with values below zero have no other zero
    mean = float(channel.mean(dtype=np.float64)) - darkest
    if mean <= 0:  # no signal at all
        return np.zeros(WAVES**channel.ndim)
    blocks = torch.from_numpy(np.ascontiguousarray(channel, np.float32))[None, None]
    blocks = F.interpolate(blocks, size=[min(n, SIDE) for n in channel.shape], mode="area")[0, 0].double()
    waves = np.log(np.maximum((blocks.numpy() - darkest) / mean, DARKEST))
    for count in waves.shape:
        cosines = np.cos(np.pi * np.outer(range(WAVES), np.arange(count) + 0.5) / count) / count
        cosines[count:] = 0  # of so few blocks faster waves cannot be told from slower ones
        waves = np.moveaxis(waves, 0, -1) @ cosines.T
    contrast = np.log(max(float(channel.std(dtype=np.float64)) / mean, DARKEST**2))
    return np.concatenate([[contrast], waves.ravel()[1:]])
