"""Entropy of the prediction, one of the scores compared: Zenk et al., 2025, https://arxiv.org/abs/2406.03323."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from anysite.detectors import Detector, Output, Vector, Vectors

EDGE = 2  # voxels to either side
LEAST = 1e-30  # probability; its logarithm is finite


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
        box = _around_everything(output.foreground)
        label = output.label[box]
        around = ndimage.binary_dilation(label > 0, iterations=EDGE)
        if self.region == "inside":
            edge = ndimage.maximum_filter(label, 2 * EDGE + 1) != ndimage.minimum_filter(label, 2 * EDGE + 1)
            around = around & ~edge if (around & ~edge).any() else around  # thin structures are all edge
        if not around.any():
            around[...] = True
        entropy = np.zeros(np.count_nonzero(around), np.float32)
        for chance in output.probabilities:  # one at a time, for the sake of memory
            chosen = chance[box][around]
            entropy -= chosen * _logarithm(chosen)
            if output.overlapping:
                entropy -= (1 - chosen) * _logarithm(1 - chosen)
        count = len(output.probabilities)
        entropy /= count * np.log(2) if output.overlapping else np.log(count)
        return np.array([entropy.mean()])

    def fit(self, vectors: Vectors) -> None:
        """Learn nothing: the network's own doubt needs no reference."""

    def distance(self, vector: Vector) -> float:
        """Return the entropy."""
        return float(vector[0])


def _logarithm(chances: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.log(np.maximum(chances, LEAST))


def _around_everything(found: Bool[np.ndarray, "*s"]) -> tuple[slice, ...]:
    """Return the smallest box about all that was found, with a margin for its edge; all where nothing was."""
    boxes = ndimage.find_objects(found.astype(np.uint8))
    if not boxes:
        return (slice(None),) * found.ndim
    return tuple(slice(max(0, part.start - 2 * EDGE), part.stop + 2 * EDGE) for part in boxes[0])
