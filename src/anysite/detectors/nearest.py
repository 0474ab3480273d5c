"""Nearest training images in feature space: Sun, Ming, Zhu, Li, 2022, https://arxiv.org/abs/2204.06507."""

from __future__ import annotations

import numpy as np

from anysite.detectors import Detector, Output, Vector, Vectors, mean_feature, scale_apart
from anysite.networks import require_counts


class Nearest(Detector):
    """The mean distance of the bottleneck's mean feature from its nearest training images.

    Args:
        neighbours: How many of them.

    Raises:
        ConfigError: not a count.
    """

    reason = "no training image looks like it to the network"

    def __init__(self, *, neighbours: int = 3) -> None:
        super().__init__()
        require_counts("detectors.nearest", neighbours=neighbours)
        self.neighbours = neighbours

    def describe(self, output: Output) -> Vector:
        """Return the mean feature of the bottleneck."""
        return mean_feature(output.layers[-1])

    def fit(self, vectors: Vectors) -> None:
        """Remember all vectors, every entry in units of its spread."""
        scale = scale_apart(vectors)
        self.memory = {**scale, "references": (vectors - scale["mean"]) / scale["deviation"]}

    def distance(self, vector: Vector) -> float:
        """Return the mean distance from the nearest."""
        scaled = (vector - self.memory["mean"]) / self.memory["deviation"]
        distances = np.sort(np.linalg.norm(self.memory["references"] - scaled, axis=1))
        return float(distances[: self.neighbours].mean())
