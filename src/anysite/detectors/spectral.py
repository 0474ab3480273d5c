"""Spectral signatures of features: Karimi, Gholipour, 2022, https://doi.org/10.1109/TAI.2022.3159510.

The signature is the logarithm of the singular values of a layer's features (positions by channels), scaled to
unit length; the distance is that from the nearest training image. Over several layers as by Lambert et al., 2023,
https://arxiv.org/abs/2307.15647.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from anysite.detectors import Detector, Layer, Output, Vector, Vectors

POSITIONS = 10_000  # to which every image is scaled, so that its size does not count
SMALLEST = 1e-5  # singular value, relative to the largest
FULL = (
    16  # positions a channel that one window must give; with fewer the number of windows shapes the spectrum
)


class Spectral(Detector):
    """How unlike those of training images the singular values of the network's features are.

    Args:
        layers: "all" of the encoder whose windows have at least 16 times as many positions as channels, each in
            units of how far training images lie apart, or the deepest of them ("bottleneck").
    """

    reason = "its texture and structure, as the network sees them, are unlike those of the training images"

    def __init__(self, *, layers: Literal["all", "bottleneck"] = "all") -> None:
        super().__init__()
        self.layers = layers

    def describe(self, output: Output) -> Vector:
        """Return the signatures of the layers one after the other, each led by its length."""
        chosen = [layer for layer in output.layers if layer.per_window >= FULL * len(layer.total)]
        chosen = chosen or [max(output.layers, key=lambda layer: layer.per_window / len(layer.total))]
        if self.layers == "bottleneck":
            chosen = chosen[-1:]
        signatures = [signature(layer) for layer in chosen]
        return np.concatenate([part for s in signatures for part in ([len(s)], s)])

    def fit(self, vectors: Vectors) -> None:
        """Remember all signatures, and how far each layer's lie apart."""
        split = [split_signatures(vector) for vector in vectors]
        self.memory = {"references": vectors}
        apart = []
        for layer in zip(*split, strict=True):
            stacked = np.stack(layer)
            distances = np.linalg.norm(stacked[:, None] - stacked[None], axis=2)
            np.fill_diagonal(distances, np.inf)
            nearest = distances.min(1) if len(stacked) > 1 else np.zeros(1)
            apart.append((nearest.mean(), max(nearest.std(), 1e-9)))
        self.memory |= {"mean": np.array([a[0] for a in apart]), "deviation": np.array([a[1] for a in apart])}

    def distance(self, vector: Vector) -> float:
        """Return the distance from the nearest reference, the mean over layers, each in its own units."""
        own = split_signatures(vector)
        references = [split_signatures(reference) for reference in self.memory["references"]]
        nearest = [
            min(float(np.linalg.norm(mine - theirs)) for theirs in layer)
            for mine, layer in zip(own, zip(*references, strict=True), strict=True)
        ]
        if self.layers == "bottleneck":
            return nearest[0]
        return float(((np.array(nearest) - self.memory["mean"]) / self.memory["deviation"]).mean())


def signature(layer: Layer) -> Vector:
    """Return the logarithms of a layer's singular values, descending, as a vector of unit length.

    From the Gram matrix: its eigenvalues are the squares of the singular values.
    """
    scaled = layer.gram * (POSITIONS / layer.count)
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(scaled)[::-1], 0, None))
    logarithms = np.log(np.maximum(singular, SMALLEST * max(singular[0], 1e-300)))
    return logarithms / max(float(np.linalg.norm(logarithms)), 1e-300)


def split_signatures(vector: Vector) -> list[Vector]:
    """Return the signatures that `describe` joined."""
    parts, place = [], 0
    while place < len(vector):
        length = int(vector[place])
        parts.append(vector[place + 1 : place + 1 + length])
        place += 1 + length
    return parts
