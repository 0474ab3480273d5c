"""Pairwise Dice: Zenk et al., 2025, https://arxiv.org/abs/2406.03323, who found it best of an ensemble."""

from __future__ import annotations

import numpy as np

from anysite.detectors import Detector, Output, Vector, Vectors


class PairwiseDice(Detector):
    """How far several segmentations of the image disagree: 1 minus their mean Dice.

    The benchmark compared members of an ensemble. Here they are those that cost nothing more: of mirrored views, which
    test-time augmentation makes anyway, or, of networks that know none, of windows that overlap, each of which sees
    the same voxels in a context of its own. Of an image in one window it then says nothing.
    """

    reason = "seen otherwise (mirrored, or in another window), it is segmented differently"
    of_shift = False
    in_dice = True

    def can_describe(self, output: Output) -> bool:
        """Tell whether there is more than one view."""
        return output.agreement is not None

    def describe(self, output: Output) -> Vector:
        """Return the disagreement."""
        assert output.agreement is not None
        return np.array([1 - output.agreement.pairwise_dice])

    def fit(self, vectors: Vectors) -> None:
        """Learn nothing: agreement needs no reference."""

    def distance(self, vector: Vector) -> float:
        """Return the disagreement."""
        return float(vector[0])
