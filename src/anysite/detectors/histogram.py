"""Intensity histogram: Vasiliuk, Frolova, Belyaev, Shirokikh, 2023, https://doi.org/10.3390/jimaging9090191."""

from __future__ import annotations

import numpy as np

from anysite.detectors import Detector, Output, Vector, Vectors
from anysite.detectors.mahalanobis import learn_components, measure
from anysite.networks import require_counts, require_fractions

LOWEST, HIGHEST = (
    -4.0,
    6.0,
)  # of normalised intensities, in standard deviations; beyond counts in the outer bins


class Histogram(Detector):
    """How unlike training images the distribution of normalised intensities is: no network needed.

    The distance is Mahalanobis' in principal components. Published are 150 bins of windowed intensities.

    Args:
        bins: A channel.
        variance: Share of the variance that the principal components kept must hold.

    Raises:
        ConfigError: a setting out of range.
    """

    reason = "the distribution of its intensities is unlike that of the training images"

    def __init__(self, *, bins: int = 64, variance: float = 0.99) -> None:
        super().__init__()
        require_counts("detectors.histogram", bins=bins)
        require_fractions("detectors.histogram", variance=variance)
        self.bins, self.variance = bins, variance

    def describe(self, output: Output) -> Vector:
        """Return the square roots of the shares of every bin, channel after channel."""
        edges = np.linspace(LOWEST, HIGHEST, self.bins + 1)
        counts = [np.histogram(np.clip(c, LOWEST, HIGHEST), edges)[0] for c in output.image]
        shares = np.concatenate(counts) / output.image[0].size
        return np.sqrt(shares)

    def fit(self, vectors: Vectors) -> None:
        """Learn the principal components of training histograms."""
        self.memory = learn_components(vectors, self.variance)

    def distance(self, vector: Vector) -> float:
        """Return the distance over the components and beyond them."""
        return measure(vector, self.memory)
