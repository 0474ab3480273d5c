"""Pairwise Dice: Zenk et al., 2025, https://arxiv.org/abs/2406.03323, who found it best of an ensemble."""

from __future__ import annotations

import numpy as np

from anysite.detectors import Detector, Output, Vector, Vectors


class PairwiseDice(Detector):
    """How far the segmentations of the image and of its mirror images disagree: 1 minus their mean Dice.

    The benchmark compared members of an ensemble; mirrored views come with test-time augmentation and cost nothing
    more. Without them it says nothing.
    """

    reason = "mirrored, the image is segmented differently"
    of_shift = False

    def describe(self, output: Output) -> Vector:
        """Return the disagreement, 0 where there is one view only."""
        return np.array([0.0 if output.agreement is None else 1 - output.agreement.pairwise_dice])

    def fit(self, vectors: Vectors) -> None:
        """Learn nothing: agreement needs no reference."""

    def distance(self, vector: Vector) -> float:
        """Return the disagreement."""
        return float(vector[0])
