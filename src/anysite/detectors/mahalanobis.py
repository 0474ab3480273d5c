"""Mahalanobis distance of features: Lee, Lee, Lee, Shin, 2018, https://arxiv.org/abs/1807.03888.

In principal components, as advised for few images by Woodland et al., MELBA 2024:020.
"""

from __future__ import annotations

import numpy as np

from anysite.detectors import Detector, Output, Vector, Vectors, mean_feature
from anysite.networks import require_fractions


class Mahalanobis(Detector):
    """The distance of the bottleneck's mean feature, in units of how far training images spread in each direction.

    Args:
        variance: Share of the variance that the principal components kept must hold; at most a third as many
            components as training images.

    Raises:
        ConfigError: the share is out of range.
    """

    reason = "the network's summary of the image is unlike that of any training image"

    def __init__(self, *, variance: float = 0.95) -> None:
        super().__init__()
        require_fractions("detectors.mahalanobis", variance=variance)
        self.variance = variance

    def describe(self, output: Output) -> Vector:
        """Return the mean feature of the bottleneck."""
        return mean_feature(output.layers[-1])

    def fit(self, vectors: Vectors) -> None:
        """Learn the mean, the principal directions and the spread along each."""
        self.memory = learn_components(vectors, self.variance)

    def distance(self, vector: Vector) -> float:
        """Return the root mean square distance over the components and what lies beyond them."""
        return measure(vector, self.memory)


def learn_components(vectors: Vectors, variance: float) -> dict[str, np.ndarray]:
    """Return mean, principal directions `(m, d)`, spread `(m)` along each and `rest` `(1)` beyond them."""
    mean = vectors.mean(0)
    _, singular, directions = np.linalg.svd(vectors - mean, full_matrices=False)
    spread = singular / np.sqrt(max(1, len(vectors) - 1))
    total = np.square(spread).sum()
    share = np.cumsum(np.square(spread)) / total if total > 0 else np.ones_like(spread)
    count = min(int(np.searchsorted(share, variance)) + 1, max(1, len(vectors) // 3))
    count = min(count, int((spread > 1e-12 * max(1e-300, spread.max(initial=0))).sum()))
    rest = np.sqrt(np.square(spread[count:]).sum())
    return {
        "mean": mean,
        "directions": directions[:count],
        "spread": spread[:count],
        "rest": np.array([max(rest, 1e-3 * np.sqrt(total), 1e-9)]),
    }


def measure(vector: Vector, components: dict[str, np.ndarray]) -> float:
    """Return the root mean square of a vector's coordinates and its distance beyond them, each in its own units."""
    centred = vector - components["mean"]
    coordinates = components["directions"] @ centred
    beyond = np.linalg.norm(centred - coordinates @ components["directions"])
    scaled = [*(coordinates / components["spread"]), beyond / components["rest"][0]]
    return float(np.sqrt(np.square(scaled).mean()))
