"""Intensity histogram: Vasiliuk, Frolova, Belyaev, Shirokikh, 2023, https://doi.org/10.3390/jimaging9090191."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from anysite.detectors import Detector, Output, Vector, Vectors
from anysite.detectors.mahalanobis import learn_components, measure
from anysite.intensities import measure_shares
from anysite.networks import require_counts, require_fractions


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
        """Return the square roots of the shares of every bin, channel after channel, twice.

        First of intensities normalised alike everywhere, which are compared, then of those that the network sees.
        """
        seen = measure_shares(output.image, self.bins)
        compared = seen if output.whole is None else measure_shares(output.compared, self.bins)
        return np.sqrt([compared, seen]).ravel()

    @property
    def usual_intensities(self) -> Float[np.ndarray, "c k"] | None:
        """What the network sees: shares of every bin in training images; none of a run of before they were kept."""
        shares = self.memory.get("shares")
        return None if shares is None else shares.reshape(-1, self.bins)

    def fit(self, vectors: Vectors) -> None:
        """Learn the principal components of training histograms, and what they are on average."""
        compared, seen = np.split(vectors, 2, axis=1)
        self.memory = learn_components(compared, self.variance) | {"shares": np.square(seen).mean(0)}

    def distance(self, vector: Vector) -> float:
        """Return the distance over the components and beyond them."""
        return measure(np.split(vector, 2)[0], self.memory)
