"""Fragments of structures that are in one piece; from source cases alone, as nnU-Net decides on its postprocessing.

Isensee, Jaeger, Kohl, Petersen, Maier-Hein, 2021, https://doi.org/10.1038/s41592-020-01008-z.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Integer
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage

LabelMap = Integer[np.ndarray, "*s"]
TOLERATED = 0.05  # of a structure's voxels, that may be fragments in a label: slips of the pen
LEAST_LABELS = 3  # that show a structure, before it is called one that is in one piece


class Postprocessing(BaseModel):
    """What is taken out of a mask after its voxels have been decided on.

    Attributes:
        classes: Indices of those whose fragments are taken out.
        smaller_than: What a fragment is: a connected piece with less than this share of the largest one's voxels.
    """

    model_config = ConfigDict(frozen=True)

    classes: tuple[int, ...] = ()
    smaller_than: float = Field(default=0.1, gt=0, le=1)

    def apply(self, label: LabelMap) -> None:
        """Take the fragments out of a label map, in place."""
        fragments = np.zeros(label.shape, bool)
        for index, box in enumerate(ndimage.find_objects(label), 1):
            if box is not None and index in self.classes:
                fragments[box] |= find_fragments(label[box] == index, self.smaller_than)
        remove(label, fragments)


def remove(label: LabelMap, fragments: Bool[np.ndarray, "*s"]) -> None:
    """Give fragments the class around them, in place: what most voxels around have, if none of them is background.

    A fragment that touches background becomes background. Around it are the voxels that share a face with it and
    are of no fragment themselves; of classes that are as frequent the first counts.
    """
    found = ndimage.find_objects(fragments.view(np.uint8))
    if not found:
        return
    box = _widen(found[0])
    label, fragments = label[box], fragments[box]
    numbers, _ = _number_pieces(fragments)
    for number, smallest in enumerate(ndimage.find_objects(numbers), 1):
        near = _widen(smallest)
        fragment = numbers[near] == number
        around = label[near][ndimage.binary_dilation(fragment) & ~fragments[near]]
        label[near][fragment] = np.bincount(around).argmax() if around.all() and around.size else 0


def _widen(box: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)


def _number_pieces(mask: Bool[np.ndarray, "*s"]) -> tuple[Integer[np.ndarray, "*s"], int]:
    pieces = np.zeros(mask.shape, np.int32)
    count = ndimage.label(mask, np.ones((3,) * mask.ndim), output=pieces)
    return pieces, int(count)  # pyright: ignore[reportArgumentType]


def combine(rules: Sequence[Postprocessing]) -> Postprocessing:
    """Return what several runs would all take out of a mask."""
    shared = set(rules[0].classes).intersection(*(rule.classes for rule in rules))
    return Postprocessing(
        classes=tuple(sorted(shared)), smaller_than=min(rule.smaller_than for rule in rules)
    )


def find_fragments(mask: Bool[np.ndarray, "*s"], smaller_than: float) -> Bool[np.ndarray, "*s"]:
    """Return the voxels of connected pieces with less than a share of the largest one's voxels.

    Voxels that touch by a corner are connected.
    """
    pieces, count = _number_pieces(mask)
    fragments = np.zeros(mask.shape, bool)
    if count > 1:
        numbers = pieces[mask]
        sizes = np.bincount(numbers)
        fragments[mask] = (sizes < smaller_than * sizes.max())[numbers]
    return fragments


def find_single_classes(
    labels: Iterable[tuple[LabelMap, Sequence[int]]], smaller_than: float
) -> tuple[int, ...]:
    """Return the classes that have no fragments to speak of in any label.

    Args:
        labels: Label maps, and the classes that each tells of.
        smaller_than: What a fragment is, as a share of the largest piece.
    """
    seen: dict[int, int] = {}
    broken: set[int] = set()
    for label, known in labels:
        for index in sorted({*known} - {0} - broken):
            mask = label == index
            if not mask.any():
                continue
            seen[index] = seen.get(index, 0) + 1
            if find_fragments(mask, smaller_than).sum() > TOLERATED * mask.sum():
                broken.add(index)
    return tuple(
        sorted(index for index, count in seen.items() if count >= LEAST_LABELS and index not in broken)
    )


def measure_gain(
    pairs: Iterable[tuple[LabelMap, LabelMap, Sequence[int]]], rule: Postprocessing
) -> dict[int, float]:
    """Return by how much taking fragments out raises the Dice of each class, the mean over cases that hold it.

    Args:
        pairs: A predicted label map, the true one, and the classes that it tells of.
        rule: What would be taken out.
    """
    gains: dict[int, list[float]] = {}
    for predicted, truth, known in pairs:
        for index in {*rule.classes} & {*known}:
            found, true = predicted == index, truth == index
            if not found.any() and not true.any():
                continue
            kept = found & ~find_fragments(found, rule.smaller_than)
            gains.setdefault(index, []).append(_dice(kept, true) - _dice(found, true))
    return {index: float(np.mean(values)) for index, values in sorted(gains.items())}


def _dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * int((one & other).sum()) / (int(one.sum()) + int(other.sum()))
