"""Entropy of the prediction, one of the scores compared: Zenk et al., 2025, https://arxiv.org/abs/2406.03323."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import ndimage, special

from anysite.detectors import Detector, Output, Vector, Vectors

EDGE = 2  # voxels to either side


class Entropy(Detector):
    """How unsure the network is, on average over the voxels of what it found and around it.

    Args:
        region: "foreground", what it found with its surroundings, or "inside", without the borders between
            classes, where every network is unsure.
    """

    reason = "the network is less sure of its mask than on images it knows"
    of_shift = False

    def __init__(self, *, region: Literal["foreground", "inside"] = "foreground") -> None:
        super().__init__()
        self.region = region

    def describe(self, output: Output) -> Vector:
        """Return the mean entropy, 1 if nothing were known; over the whole image where nothing was found."""
        entropy = np.zeros(output.probabilities.shape[1:], np.float32)
        label = np.zeros(entropy.shape, np.int32)
        for index, chance in enumerate(output.probabilities):  # one at a time, for the sake of memory
            entropy += special.entr(chance)
            if output.overlapping:
                entropy += special.entr(1 - chance)
                label |= (chance > 0.5).astype(np.int32) << index
        if not output.overlapping:
            label = output.probabilities.argmax(0)
        count = len(output.probabilities)
        entropy /= count * np.log(2) if output.overlapping else np.log(count)
        around = ndimage.binary_dilation(label > 0, iterations=EDGE)
        if self.region == "inside":
            edge = ndimage.maximum_filter(label, 2 * EDGE + 1) != ndimage.minimum_filter(label, 2 * EDGE + 1)
            around = around & ~edge if (around & ~edge).any() else around  # thin structures are all edge
        return np.array([entropy[around].mean() if around.any() else entropy.mean()])

    def fit(self, vectors: Vectors) -> None:
        """Learn nothing: the network's own doubt needs no reference."""

    def distance(self, vector: Vector) -> float:
        """Return the entropy."""
        return float(vector[0])
