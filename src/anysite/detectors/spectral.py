"""Spectral signatures of features: Karimi, Gholipour, 2022, https://doi.org/10.1109/TAI.2022.3159510.

The signature is the logarithm of the singular values of a layer's features (positions by channels), scaled to
unit length; the distance is that from the nearest training image. Over several layers as by Lambert et al., 2023,
https://arxiv.org/abs/2307.15647. Every singular value counts in units of how far it varies over training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from anysite.detectors import Detector, Output, Vector, Vectors

POSITIONS = 10_000  # to which every image is scaled, so that its size does not count
SMALLEST = 1e-5  # singular value, relative to the largest
LEAST_SPREAD = 1e-6  # of a signature's component over training images


class Spectral(Detector):
    """How unlike those of training images the singular values of the network's features are.

    Args:
        layers: "all" of the encoder whose windows have enough positions for their channels, each in units of how
            far training images lie apart, or the deepest of them ("bottleneck").
    """

    reason = "its texture and structure, as the network sees them, are unlike those of the training images"

    def __init__(self, *, layers: Literal["all", "bottleneck"] = "all") -> None:
        super().__init__()
        self.layers = layers

    def describe(self, output: Output) -> Vector:
        """Return the signatures of the layers one after the other, each led by its length."""
        grams = [(layer.gram, layer.count) for layer in output.layers if layer.gram is not None]
        if self.layers == "bottleneck":
            grams = grams[-1:]
        return _join([signature(gram, count) for gram, count in grams])

    def fit(self, vectors: Vectors) -> None:
        """Remember all signatures, how far each of their values varies, and how far each layer's lie apart."""
        layers = [np.stack(layer) for layer in zip(*map(split_signatures, vectors), strict=True)]
        spreads = [np.maximum(layer.std(0), LEAST_SPREAD) for layer in layers]
        apart = []
        for layer, spread in zip(layers, spreads, strict=True):
            scaled = layer / spread
            distances = np.linalg.norm(scaled[:, None] - scaled[None], axis=2)
            np.fill_diagonal(distances, np.inf)
            nearest = distances.min(1) if len(scaled) > 1 else np.zeros(1)
            apart.append(max(nearest.std(), 1e-9))
        self.memory = {"references": vectors, "spread": _join(spreads), "deviation": np.array(apart)}

    def distance(self, vector: Vector) -> float:
        """Return the distance from the nearest reference, the mean over layers, each in its own units."""
        own = split_signatures(vector)
        # Runs of before kept none, and learned the rest of their memory without; others took the mean off.
        kept = self.memory.get("spread")
        spreads = [np.ones(len(part)) for part in own] if kept is None else split_signatures(kept)
        references = [split_signatures(reference) for reference in self.memory["references"]]
        nearest = [
            min(float(np.linalg.norm((mine - theirs) / spread)) for theirs in layer)
            for mine, spread, layer in zip(own, spreads, zip(*references, strict=True), strict=True)
        ]
        if self.layers == "bottleneck":
            return nearest[0]
        return float(((np.array(nearest) - self.memory.get("mean", 0)) / self.memory["deviation"]).mean())


def signature(gram: Float[np.ndarray, "w w"], count: int) -> Vector:
    """Return the logarithms of a layer's singular values, descending, as a vector of unit length.

    Args:
        gram: Sum over positions of the features' outer products, whose eigenvalues are the squares of the singular
            values.
        count: Of the positions.
    """
    scaled = gram * (POSITIONS / count)
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(scaled)[::-1], 0, None))
    logarithms = np.log(np.maximum(singular, SMALLEST * max(singular[0], 1e-300)))
    return logarithms / max(float(np.linalg.norm(logarithms)), 1e-300)


def _join(parts: Sequence[Vector]) -> Vector:
    """Return vectors one after the other, each led by its length."""
    return np.concatenate([piece for part in parts for piece in ([len(part)], part)])


def split_signatures(vector: Vector) -> list[Vector]:
    """Return the signatures that `describe` joined."""
    parts, place = [], 0
    while place < len(vector):
        length = int(vector[place])
        parts.append(vector[place + 1 : place + 1 + length])
        place += 1 + length
    return parts
