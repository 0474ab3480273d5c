"""Detectors tell how far one output lies from those of training; they see outputs and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Integer

from anysite.calibration import find_likeliest

Vector = Float[np.ndarray, " _"]
Vectors = Float[np.ndarray, "n _"]


@dataclass(frozen=True, eq=False)
class Layer:
    """Sums over the positions of one layer's features, from which mean and spectrum follow.

    Attributes:
        count: Number of positions.
        total: Sum of the features.
        gram: Sum of their outer products, so that windows add up; none where a window gives so few positions that
            the number of windows would shape the spectrum.
    """

    count: int
    total: Float[np.ndarray, " w"]
    gram: Float[np.ndarray, "w w"] | None

    def __add__(self, other: Layer) -> Layer:
        gram = None if self.gram is None or other.gram is None else self.gram + other.gram
        return Layer(self.count + other.count, self.total + other.total, gram)


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far several segmentations of one image agree, summed over windows.

    Attributes:
        shared: Of each two of them the voxels that both give to a class or region, the background left out; of
            one with itself, the voxels that it gives.
    """

    shared: Float[np.ndarray, "v v k"]

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.shared + other.shared)

    @property
    def pairwise_dice(self) -> float:
        """The mean Dice of each two, over what either found; 1 where nothing was found or there is but one."""
        given = np.einsum("vvk->vk", self.shared)
        one, other = np.triu_indices(len(self.shared), 1)
        total = given[one] + given[other]
        found = total > 0
        return float((2 * self.shared[one, other][found] / total[found]).mean()) if found.any() else 1.0


@dataclass(frozen=True, eq=False)
class Output:
    """What one image made of a network, on the plan's grid.

    Attributes:
        image: Normalised intensities.
        probabilities: One map a class, or a region where they are `overlapping`.
        layers: Of the encoder, bottleneck last.
        agreement: Of the segmentations of mirrored views, or, without them, of windows that overlap; none where one
            view of one window saw it all.
        whole: Intensities normalised alike everywhere, where `image` is normalised by each voxel's surroundings, which
            takes away much of what scanners differ in.
        nothing: What no signal became by normalisation, channel by channel, of `whole` or else `image`; none where that
            is not known.
        slice_wise: Whether it is a volume that is segmented slice by slice.
        decide: How a class is found from the probabilities, as for the mask that is written.
    """

    image: Float[np.ndarray, "c *s"]
    probabilities: Float[np.ndarray, "k *s"]
    overlapping: bool
    layers: tuple[Layer, ...]
    agreement: Agreement | None = None
    whole: Float[np.ndarray, "c *s"] | None = None
    nothing: tuple[float, ...] | None = None
    slice_wise: bool = False
    decide: Callable[[np.ndarray], np.ndarray] = find_likeliest

    @property
    def compared(self) -> Float[np.ndarray, "c *s"]:
        """Intensities normalised alike everywhere, which tell what scanners differ in."""
        return self.image if self.whole is None else self.whole

    @cached_property
    def label(self) -> Integer[np.ndarray, "*s"]:
        """The class of every voxel; of regions a number for every set of them."""
        if not self.overlapping:
            return self.decide(self.probabilities)
        label = np.zeros(self.probabilities.shape[1:], np.int32)
        for index, chance in enumerate(self.probabilities):
            label |= (chance > 0.5).astype(np.int32) << index
        return label

    @property
    def masks(self) -> Bool[np.ndarray, "m *s"]:
        """Which voxels belong to each region, or to each class but the background."""
        if self.overlapping:
            return self.probabilities > 0.5
        return np.stack([self.label == index for index in range(1, len(self.probabilities))])

    @property
    def foreground(self) -> Bool[np.ndarray, "*s"]:
        """Where anything but background was found."""
        return np.asarray(self.label > 0)


class Detector(ABC):
    """A distance from training; keyword arguments of the constructor are its settings.

    An output is first described by a short vector; a detector remembers nothing else of it, so that references
    are small and hold no image. What `fit` learns lies in `memory`, arrays by name, and is stored with the run.

    Attributes:
        reason: What a high distance means, in words for a reader of images.
        of_shift: Whether it speaks of the image; otherwise of the segmentation, whose values on images
            trained on are better than on any other.
        in_dice: Whether the distance is what is lost of a Dice.
    """

    reason: ClassVar[str]
    of_shift: ClassVar[bool] = True
    in_dice: ClassVar[bool] = False

    def __init__(self) -> None:
        self.memory: dict[str, np.ndarray] = {}

    @property
    def usual_intensities(self) -> Float[np.ndarray, "c k"] | None:
        """The shares of a training image's voxels in bins of intensity, channel by channel, where it knows them."""
        return None

    def can_describe(self, output: Output) -> bool:
        """Tell whether an output holds what this detector looks at."""
        return True

    @abstractmethod
    def describe(self, output: Output) -> Vector:
        """Return the vector that stands for an output."""

    @abstractmethod
    def fit(self, vectors: Vectors) -> None:
        """Learn from the vectors of training."""

    @abstractmethod
    def distance(self, vector: Vector) -> float:
        """Return how far a vector lies from training; higher is further."""

    def leave_one_out(self, vectors: Vectors, patients: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Return the distance of every vector from those of all other patients."""
        kept = self.memory
        distances = np.empty(len(vectors))
        for patient in dict.fromkeys(patients):
            own = np.array([other == patient for other in patients])
            self.fit(vectors[~own])
            distances[own] = [self.distance(vector) for vector in vectors[own]]
        self.memory = kept
        return distances


def mean_feature(layer: Layer) -> Vector:
    """Return the mean over positions."""
    return layer.total / layer.count


def add_layers(one: Sequence[Layer], other: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return the sums of two parts of an image."""
    return tuple(a + b for a, b in zip(one, other, strict=True)) if one else tuple(other)


def scale_apart(vectors: Vectors) -> Mapping[str, np.ndarray]:
    """Return mean and deviation of every entry; entries that never vary get deviation 1."""
    deviation = vectors.std(0)
    return {"mean": vectors.mean(0), "deviation": np.where(deviation > 0, deviation, 1.0)}
