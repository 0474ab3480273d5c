"""What images are compared by to find copies of one: their details, made small, and landmarks among them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

SIDE = {2: 64, 3: 24}  # of the small picture, whatever the image's shape
MAP_SIDE = {2: 96, 3: 48}  # at most, of the map in which landmarks are looked for
PATCH = {2: 13, 3: 7}
LANDMARKS = 24
FRAME_CONTRAST = 0.02  # rows of less are a frame, not image
FINE, COARSE = 0.7, 3.0  # detail lies between these blurs
EVEN = 0.2  # of the usual contrast: what is fainter counts for less
SMALLEST = 4, 8  # voxels: the shortest axis, and the others


@dataclass(frozen=True)
class Likeness:
    """An image made small, in grey.

    Attributes:
        whole: The details of the image resized to `SIDE` along every axis; as a vector of length 1.
        inner: As `whole`, of the image without its empty frame.
        average: The resized image itself, with its light and shade; as a vector of length 1.
        cells: The means of the whole image in cells of `cell` voxels along every axis.
    """

    whole: np.ndarray
    inner: np.ndarray
    average: np.ndarray
    cells: np.ndarray
    cell: int


def describe(grey: np.ndarray) -> Likeness | None:
    """Return what an image `(*S)` is compared by, or None where it is too small or too empty to tell."""
    dimension = grey.ndim
    inner = grey[_frame(grey)]
    if min(inner.shape) < SMALLEST[0] or sorted(inner.shape)[1] < SMALLEST[1]:
        return None
    square = (SIDE[dimension],) * dimension
    average = _resized(grey, square)
    whole = standardised(details_of(average))
    cropped = whole if inner.shape == grey.shape else standardised(details_of(_resized(inner, square)))
    cell = 1
    while max(grey.shape) / cell > MAP_SIDE[dimension]:
        cell *= 2
    return Likeness(whole, cropped, standardised(average), pooled(grey, cell).astype(np.float32), cell)


def turned(pictures: np.ndarray) -> Iterator[np.ndarray]:
    """Yield pictures `(n, *S)` in every attitude that flips and quarter turns give them, first as they are."""
    dimension = pictures.ndim - 1
    for order in itertools.permutations(range(1, dimension + 1)):
        for flips in itertools.product((False, True), repeat=dimension):
            axes = tuple(1 + axis for axis, flip in enumerate(flips) if flip)
            yield np.flip(pictures.transpose(0, *order), axes)


def pooled(array: np.ndarray, cell: int) -> np.ndarray:
    """Return the means over whole cells of `cell` voxels along every axis, of the full extent where it has none."""
    shape = tuple(max(1, n // cell) for n in array.shape)
    covered = tuple(
        slice(0, n * cell) if n * cell <= m else slice(None) for n, m in zip(shape, array.shape, strict=True)
    )
    return _resized(array[covered], shape)


def details_of(array: np.ndarray) -> np.ndarray:
    """Return what is finer than light and shade, no edge much stronger than what surrounds it."""
    fine = ndimage.gaussian_filter(array, FINE, mode="nearest")
    details = fine - ndimage.gaussian_filter(array, COARSE, mode="nearest")
    around = np.sqrt(ndimage.gaussian_filter(details**2, COARSE, mode="nearest"))
    return details / (around + EVEN * float(around.mean()) + 1e-12)


def standardised(array: np.ndarray) -> np.ndarray:
    """Return an array with mean 0 and, as a vector, length 1, so that products are correlations."""
    centred = array - array.mean()
    return centred / max(float(np.linalg.norm(centred)), 1e-12)


def find_landmarks(details: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where details are strongest `(n, d)`, and the standardised cells around each `(n, m)`."""
    half = PATCH[details.ndim] // 2
    strength = np.abs(details)
    peaks = strength == ndimage.maximum_filter(strength, size=half, mode="nearest")
    inside = np.zeros_like(peaks)
    inside[tuple(slice(half, max(half, n - half)) for n in details.shape)] = True
    places = np.argwhere(peaks & inside)
    places = places[np.argsort(-strength[tuple(places.T)], kind="stable")[:LANDMARKS]]
    patches = [
        standardised(details[tuple(slice(p - half, p + half + 1) for p in place)]).ravel() for place in places
    ]
    return places, np.array(patches, np.float32).reshape(-1, PATCH[details.ndim] ** details.ndim)


def _frame(grey: np.ndarray) -> tuple[slice, ...]:
    """Return the part of an image within its frame of nearly one value."""
    contrast = FRAME_CONTRAST * float(grey.max() - grey.min())
    inner = []
    for axis in range(grey.ndim):
        others = tuple(other for other in range(grey.ndim) if other != axis)
        filled = np.flatnonzero(grey.max(axis=others) - grey.min(axis=others) > contrast)
        inner.append(slice(int(filled[0]), int(filled[-1]) + 1) if len(filled) else slice(None))
    return tuple(inner)


def _resized(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the means over what each new voxel covers: a turned image comes out turned, and nothing else."""
    for axis, size in enumerate(shape):
        if array.shape[axis] != size:
            weights = _coverage(array.shape[axis], size)
            array = np.moveaxis(np.tensordot(weights, array, (1, axis)), 0, axis)
    return np.ascontiguousarray(array, np.float32)


@lru_cache(maxsize=64)
def _coverage(count: int, size: int) -> np.ndarray:
    """Return how much of each of `size` new voxels each of `count` old ones fills, `(size, count)`."""
    edges = np.linspace(0, count, size + 1)
    old = np.arange(count)
    shared = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    return (np.maximum(shared, 0) * size / count).astype(np.float32)
