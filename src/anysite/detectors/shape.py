"""Shape of a mask: Albà et al., 2018, https://doi.org/10.1016/j.media.2017.10.001, who tell bad ones by it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from anysite.detectors import Detector, Output, Vector, Vectors
from anysite.detectors.mahalanobis import learn_components, measure
from anysite.networks import require_fractions


class Shape(Detector):
    """How unlike those of known masks the sizes, pieces and surfaces of the structures are.

    Albà et al. learned from good and bad contours; here known masks alone set the scale, as Mahalanobis distance in
    principal components.

    Args:
        variance: Share of the variance that the principal components kept must hold.

    Raises:
        ConfigError: a setting out of range.
    """

    reason = "the size or shape of what was found is unlike that of known masks"
    of_shift = False

    def __init__(self, *, variance: float = 0.99) -> None:
        super().__init__()
        require_fractions("detectors.shape", variance=variance)
        self.variance = variance

    def describe(self, output: Output) -> Vector:
        """Return four logarithms a class: of its size, its pieces, the share of the largest, and its surface."""
        return np.concatenate([_describe(mask) for mask in output.masks])

    def fit(self, vectors: Vectors) -> None:
        """Learn the principal components of known masks."""
        self.memory = learn_components(vectors, self.variance)

    def distance(self, vector: Vector) -> float:
        """Return the distance over the components and beyond them."""
        return measure(vector, self.memory)


def _describe(mask: Bool[np.ndarray, "*s"]) -> Vector:
    size = int(mask.sum())
    box = mask[_bounds(mask)]
    pieces = np.zeros(box.shape, np.int32)
    count = int(ndimage.label(box, output=pieces))  # pyright: ignore[reportArgumentType]
    largest = int(np.bincount(pieces[box]).max()) if count else 0
    share = largest / size if size else 1.0
    return np.log([(size + 1) / mask.size, count + 1, share, size - _count_inside(box) + 1])


def _bounds(mask: Bool[np.ndarray, "*s"]) -> tuple[slice, ...]:
    """Return the box around what is True; an empty one where nothing is."""
    others = [tuple(a for a in range(mask.ndim) if a != axis) for axis in range(mask.ndim)]
    found = [np.flatnonzero(mask.any(axes)) for axes in others]
    return tuple(slice(places[0], places[-1] + 1) if len(places) else slice(0) for places in found)


def _count_inside(box: Bool[np.ndarray, "*s"]) -> int:
    """Return how many voxels a binary erosion leaves, all of whose neighbours across a face are True, too."""
    padded = np.pad(box, 1)
    inside = box.copy()
    for axis in range(box.ndim):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)[(slice(1, -1),) * box.ndim]
    return int(inside.sum())
