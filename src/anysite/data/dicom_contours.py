"""Contours of a DICOM structure set, filled on the slices of the image they were drawn on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import reduce

import numpy as np
from pydicom.dataset import Dataset

from anysite.data.dicom_geometry import LPS_TO_RAS
from anysite.data.dicom_headers import numbers_of
from anysite.data.volume import Volume
from anysite.errors import FileFormatError, GeometryError, LabelError

OFF_SLICE = 0.1  # in slices: how far rounded points may lie beside one
CLOSED, EXCLUSIVE = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"), "CLOSEDPLANAR_XOR"
ROUGH = 2, 0.1  # voxels, or share of a contour, by which it may reach over another


def draw_contours(
    dataset: Dataset, grid: Volume, choice: Collection[int], images: Collection[str] | None
) -> np.ndarray:
    """Return the numbers of regions of interest `(*S)`: voxels whose centre lies inside a region.

    A contour within another of its region is a hole, and one drawn twice is one; those of the kind CLOSEDPLANAR_XOR
    enclose what lies within an odd number of them. Points mark nothing.

    Args:
        choice: Regions to draw; all where it is empty.
        images: What the image's own files are called, None where nobody knows.

    Raises:
        FileFormatError: contours that are no points in space.
        GeometryError: contours off the image's slices or beyond the image, or drawn on other images.
        LabelError: no such region, open contours, contours that cross, or regions that overlap.
    """
    if grid.dimension != 3:
        raise GeometryError("contours for a picture", expected="an image with a place in the patient")
    regions = [
        (int(item.ReferencedROINumber), item.get("ContourSequence") or [])
        for item in dataset.get("ROIContourSequence") or []
    ]
    numbers = [number for number, _ in regions]
    if len(set(numbers)) < len(numbers) or min(numbers, default=1) < 1:
        raise LabelError(
            f"regions numbered {', '.join(map(str, numbers[:20]))}", expected="different positive numbers"
        )
    if missing := sorted(set(choice) - set(numbers)):
        raise LabelError(f"no region {missing[0]}", expected=f"one of {', '.join(map(str, sorted(numbers)))}")
    to_voxel = np.linalg.inv(grid.affine) @ LPS_TO_RAS
    array = np.zeros(grid.shape, np.int32)
    for number, contours in regions:
        if choice and number not in choice:
            continue
        inside = _fill_region(contours, number, to_voxel, grid.shape, images)
        if other := int(array[inside].max(initial=0)):
            raise LabelError(
                f"regions {other} and {number} overlap",
                expected="one class a voxel",
                fix=f"name the regions to read behind the file, such as #{number} or #1+3",
            )
        array[inside] = number
    return array


def _fill_region(
    contours: Collection[Dataset],
    number: int,
    to_voxel: np.ndarray,
    shape: tuple[int, ...],
    images: Collection[str] | None,
) -> np.ndarray:
    drawn: dict[int, list[np.ndarray]] = defaultdict(list)
    exclusive: set[int] = set()
    for contour in contours:
        kind = str(contour.get("ContourGeometricType") or "")
        if kind == "POINT":
            continue
        if kind not in CLOSED:
            raise LabelError(
                f"region {number} has open contours", expected="closed ones, which have an inside"
            )
        references = [
            str(r.get("ReferencedSOPInstanceUID")) for r in contour.get("ContourImageSequence") or []
        ]
        if images is not None and not set(references) <= set(images):
            raise GeometryError(
                f"region {number} was drawn on other images", fix="choose the image that it was drawn on"
            )
        values = numbers_of(contour, "ContourData")
        if len(values) % 3 or len(values) < 9 or not np.isfinite(values).all():
            raise FileFormatError(f"a contour of {len(values)} numbers", expected="three a point")
        points = np.reshape(values, (-1, 3)) @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        place = np.rint(points[0, 2])
        if np.abs(points[:, 2] - place).max() > OFF_SLICE:
            raise GeometryError(
                f"a contour of region {number} that lies on no slice of the image",
                expected="contours on slices",
                fix="choose the image that it was drawn on",
            )
        if not 0 <= place < shape[2] or points[:, :2].min() < -1 or (points[:, :2] > shape[:2]).any():
            raise GeometryError(
                f"a contour of region {number} reaches beyond the image",
                expected="contours within the image",
                fix="choose the image that it was drawn on",
            )
        if kind == EXCLUSIVE:
            exclusive.add(int(place))
        drawn[int(place)].append(fill_polygon(points[:, :2], (shape[0], shape[1])))
    inside = np.zeros(shape, bool)
    for place, outlines in drawn.items():
        inside[:, :, place] = (
            reduce(np.logical_xor, outlines) if place in exclusive else _unite(outlines, number)
        )
    return inside


def _unite(outlines: Sequence[np.ndarray], number: int) -> np.ndarray:
    """Return what the contours of one region on one slice enclose.

    One within another is a hole, and one drawn twice is one.

    Raises:
        LabelError: contours that cross, of which nobody knows what is meant.
    """
    inside = np.zeros_like(outlines[0])
    done: list[np.ndarray] = []
    for outline in sorted(outlines, key=lambda one: -int(one.sum())):
        if any(np.array_equal(outline, other) for other in done):
            continue
        done.append(outline)
        within, everything = np.count_nonzero(outline & inside), np.count_nonzero(outline)
        if min(within, everything - within) > max(ROUGH[0], ROUGH[1] * everything):
            raise LabelError(
                f"contours of region {number} that cross each other",
                expected="contours apart from each other, or one within another",
                fix="unite them where they were drawn",
            )
        inside = inside & ~outline if 2 * within > everything else inside | outline
    return inside


def fill_polygon(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return which pixel centres of `(X, Y)` lie inside a polygon `(N, 2)`, by the even-odd rule.

    Of two polygons that share an edge, a centre on that edge belongs to one of them.
    """
    starts, ends = points, np.roll(points, -1, axis=0)
    parity = np.zeros((shape[0] + 1, shape[1]), np.int64)
    for (x0, y0), (x1, y1) in zip(starts, ends, strict=True):
        if y0 == y1:
            continue
        low, high = min(y0, y1), max(y0, y1)
        first, last = max(0, int(np.ceil(low))), min(shape[1], int(np.ceil(high)))
        if first >= last:
            continue
        lines = np.arange(first, last)
        crossings = x0 + (lines - y0) * (x1 - x0) / (y1 - y0)
        after = np.clip(np.ceil(crossings), 0, shape[0]).astype(np.int64)
        np.add.at(parity, (after, lines), 1)
    return np.cumsum(parity, axis=0)[:-1] % 2 == 1
