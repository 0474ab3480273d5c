"""Fragments of structures that are in one piece; from source cases alone, as nnU-Net decides on its postprocessing.

Isensee, Jaeger, Kohl, Petersen, Maier-Hein, 2021, https://doi.org/10.1038/s41592-020-01008-z.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Integer
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage

LabelMap = Integer[np.ndarray, "*s"]
TOLERATED = 0.05  # of a structure's voxels, that may be fragments in a label: slips of the pen
SIZES = (0.1, 0.25, 0.5)  # that fragments may be, as shares of the largest piece
WORTHWHILE = 0.005  # of Dice, that a larger size has to gain more
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
    numbers = np.zeros(fragments.shape, np.int32)
    ndimage.label(fragments, output=numbers)
    owners, near = _find_surroundings(numbers)
    winners = _find_majorities(owners, label[near], int(numbers.max()) + 1)
    label[fragments] = winners[numbers[fragments]]


def _find_surroundings(
    numbers: Integer[np.ndarray, "*s"],
) -> tuple[Integer[np.ndarray, " n"], tuple[Integer[np.ndarray, " n"], ...]]:
    """Return each number with the places of all zeros that share a face with it, every place once a number."""
    places, shape = np.nonzero(numbers), numbers.shape
    owners = numbers[places].astype(np.int64)
    found = [np.zeros(0, np.int64)]
    for axis, step in itertools.product(range(numbers.ndim), (-1, 1)):
        moved = places[axis] + step
        inside = (moved >= 0) & (moved < shape[axis])
        near = tuple((moved if a == axis else place)[inside] for a, place in enumerate(places))
        free = numbers[near] == 0
        place = np.ravel_multi_index(tuple(side[free] for side in near), shape)
        found.append(owners[inside][free] * numbers.size + place)
    owners, place = np.divmod(np.unique(np.concatenate(found)), numbers.size)
    return owners, np.unravel_index(place, shape)


def _find_majorities(
    owners: Integer[np.ndarray, " n"], classes: Integer[np.ndarray, " n"], count: int
) -> Integer[np.ndarray, " count"]:
    """Return the most frequent class of each owner, the first of equals, but 0 where it has any 0 or nothing."""
    several = int(classes.max(initial=0)) + 1
    votes, number = np.unique(owners * several + classes, return_counts=True)
    owners, classes = np.divmod(votes, several)
    most_votes_last = np.lexsort((-classes, number))
    winners = np.zeros(count, np.int64)
    winners[owners[most_votes_last]] = classes[most_votes_last]
    winners[owners[classes == 0]] = 0
    return winners


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
    labels: Iterable[tuple[LabelMap, Sequence[int]]], sizes: Sequence[float]
) -> dict[float, tuple[int, ...]]:
    """Return for each size the classes that have no fragments below it to speak of in any label.

    Args:
        labels: Label maps, and the classes that each tells of.
        sizes: What a fragment may be, as shares of the largest piece.
    """
    seen: Counter[int] = Counter()
    broken: set[tuple[float, int]] = set()
    for label, known in labels:
        for index, box in enumerate(ndimage.find_objects(label), 1):
            whole = [size for size in sizes if (size, index) not in broken]
            if box is None or index not in known or not whole:
                continue
            seen[index] += 1
            voxels, _ = _measure_pieces(label[box] == index)
            for size in whole:
                if voxels[voxels < size * voxels.max()].sum() > TOLERATED * voxels.sum():
                    broken.add((size, index))
    enough = sorted(index for index, count in seen.items() if count >= LEAST_LABELS)
    return {size: tuple(index for index in enough if (size, index) not in broken) for size in sizes}


def measure_gain(
    pairs: Iterable[tuple[LabelMap, LabelMap, Sequence[int]]], single: Mapping[float, Sequence[int]]
) -> dict[float, dict[int, float]]:
    """Return by how much taking fragments out raises the Dice of each class, the mean over cases that hold it.

    What other classes gain or lose by enclosed fragments that become theirs is not counted.

    Args:
        pairs: A predicted label map, the true one, and the classes that it tells of.
        single: For each size that a fragment may be, the classes to take them out of.
    """
    gains: dict[float, dict[int, list[float]]] = {size: {} for size in single}
    for predicted, truth, known in pairs:
        boxes = dict(enumerate(ndimage.find_objects(predicted), 1))
        for index in set().union(*single.values()) & {*known}:
            true = int((truth == index).sum())
            box = boxes.get(index)
            if box is None:  # nothing to take out
                voxels = hits = np.zeros(0, int)
            else:
                voxels, hits = _measure_pieces(predicted[box] == index, truth[box] == index)
            if not len(voxels) and not true:
                continue
            for size, classes in single.items():
                kept = voxels >= size * voxels.max(initial=0)
                if index in classes:
                    after, before = (
                        2 * hits[chosen].sum() / (voxels[chosen].sum() + true)
                        for chosen in (kept, slice(None))
                    )
                    gains[size].setdefault(index, []).append(float(after - before))
    return {
        size: {index: float(np.mean(values)) for index, values in sorted(of_size.items())}
        for size, of_size in gains.items()
    }


def choose_size(gains: Mapping[float, Mapping[int, float]]) -> tuple[float, dict[float, float]]:
    """Return which size fragments are taken out below, and the mean gain of every one.

    The smallest that no larger one gains clearly more than: one that gains as much may harm more where pieces of a
    structure come apart.

    Args:
        gains: For each size, what each class gains; classes that lose are left alone.
    """
    classes = set().union(*gains.values())
    means = {
        size: sum(max(gain, 0) for gain in of_size.values()) / max(len(classes), 1)
        for size, of_size in gains.items()
    }
    chosen = next(
        size
        for size in sorted(means)
        if all(mean < means[size] + WORTHWHILE for larger, mean in means.items() if larger > size)
    )
    return chosen, means


def _measure_pieces(
    mask: Bool[np.ndarray, "*s"], truth: Bool[np.ndarray, "*s"] | None = None
) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
    """Return the voxels of each connected piece, and how many of them are true."""
    pieces, count = _number_pieces(mask)
    voxels = np.bincount(pieces[mask], minlength=count + 1)[1:]
    hits = np.bincount(pieces[mask & truth], minlength=count + 1)[1:] if truth is not None else voxels
    return voxels, hits
