"""What is measured of every image and label while it is in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from anysite.data.classes import count_values

LEVELS = np.linspace(0.005, 0.995, 67)  # the quantiles that describe a distribution
SAMPLED = 2**17  # voxels at most to take quantiles of
COUNTED = 256  # classes at most whose parts are counted
ISLAND = 8, 0.002  # voxels, and share of the largest part, that an island has at most
MAIN = 30, 0.95  # voxels, and share of the class, that the largest part has at least


@dataclass(frozen=True)
class Intensities:
    """The values of one channel.

    Attributes:
        dtype: As stored in the file.
        minimum: The smallest value.
        maximum: The largest value.
        quantiles: At `LEVELS`.
        share_of_maximum: The share of voxels that have the largest value.
        share_of_median: The share that have the value in the middle.
    """

    dtype: str
    minimum: float
    maximum: float
    quantiles: np.ndarray
    share_of_maximum: float
    share_of_median: float

    @property
    def extent(self) -> float:
        """How far the usual values reach."""
        return float(self.quantiles[-1] - self.quantiles[0])


@dataclass(frozen=True)
class LabelShape:
    """The form of a label map.

    Attributes:
        values: Voxels by value.
        border: Voxels on the outermost rows and columns (not slices) by value.
        parts: Connected parts by value.
        islands: By value, the small parts far from a large one that is nearly everything.
    """

    values: dict[int, int]
    border: dict[int, int]
    parts: dict[int, int]
    islands: dict[int, int]


def measure_intensities(channel: np.ndarray) -> Intensities:
    """Measure a channel `(*S)`."""
    flat = channel.reshape(-1)
    step = max(1, flat.size // SAMPLED) | 1  # odd, or some columns would never be seen
    quantiles = np.quantile(flat[::step].astype(np.float32), LEVELS)
    minimum, maximum = flat.min(), flat.max()
    middle = np.partition(flat[::step], flat[::step].size // 2)[flat[::step].size // 2]
    return Intensities(
        channel.dtype.name,
        float(minimum),
        float(maximum),
        quantiles,
        float(np.count_nonzero(flat == maximum) / flat.size),
        float(np.count_nonzero(flat == middle) / flat.size),
    )


def measure_label(label: np.ndarray, background: int) -> LabelShape:
    """Measure a label map `(*S)`; the slices of a volume, its shortest axis, have no border of their own."""
    border = np.zeros(label.shape, bool)
    shortest = int(np.argmin(label.shape)) if label.ndim == 3 else -1
    for axis in range(label.ndim):
        if axis != shortest:
            np.moveaxis(border, axis, 0)[[0, -1]] = True
    values = count_values(label)
    parts, islands = {}, {}
    if len(values) <= COUNTED and max(values) < 2**16:
        boxes = ndimage.find_objects(label)
        for value in values:
            if value != background and value > 0:
                parts[value], islands[value] = _count_parts(label[boxes[value - 1]] == value)
    return LabelShape(values, count_values(label[border]), parts, islands)


def _count_parts(inside: np.ndarray) -> tuple[int, int]:
    """Count the connected parts of a class, and the small ones far from a large one."""
    marked = np.empty(inside.shape, np.int32)
    count = int(np.asarray(ndimage.label(inside, np.ones((3,) * inside.ndim), output=marked)))
    if count == 1:
        return 1, 0
    sizes = np.bincount(marked.ravel())[1:]
    main = int(sizes.argmax())
    if sizes[main] < MAIN[0] or sizes[main] < MAIN[1] * sizes.sum():
        return count, 0
    boxes = ndimage.find_objects(marked)
    small = np.flatnonzero(sizes <= max(ISLAND[0], ISLAND[1] * sizes[main]))
    return count, sum(_is_far(boxes[part], boxes[main]) for part in small if part != main)


def _is_far(part: tuple[slice, ...], main: tuple[slice, ...]) -> bool:
    """Tell whether a part lies further from a box, along any axis, than half of the box's length."""
    gaps = (
        max(p.start - m.stop, m.start - p.stop) > (m.stop - m.start) / 2
        for p, m in zip(part, main, strict=True)
    )
    return any(gaps)
