"""Labels from DICOM: segmentation objects placed on the grid of their image, or contours of a structure set."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from anysite.data.dicom import Series
from anysite.data.dicom_contours import draw_contours
from anysite.data.dicom_geometry import make_plane
from anysite.data.dicom_headers import (
    functional_group,
    guarded,
    number_of,
    numbers_of,
    read_dataset,
    read_headers,
)
from anysite.data.dicom_members import opened, split_choice
from anysite.data.dicom_pixels import decode_frames
from anysite.data.limits import MAX_VOXELS
from anysite.data.volume import Volume
from anysite.errors import FileFormatError, GeometryError, LabelError

KINDS = ("SEG", "RTSTRUCT")
OFF_GRID = 0.1  # in voxels: how far rounded headers may put a frame beside the grid


def read_label(path: Path, grid: Volume, series: Series | None) -> Volume:
    """Read the label map `(1, *S)` on an image's grid.

    Values are the numbers of segments or regions of interest. Of a path that ends in `#2` or `#1+3` only those.

    Args:
        grid: The image, or its grid alone.
        series: Where the image is a DICOM series, that series: a label of other images is refused.

    Raises:
        FileFormatError: damaged, or no such label.
        GeometryError: not on the image's grid, or of other images.
        LabelError: segments that overlap.
    """
    base, choice = split_choice(path)
    with guarded(base), opened(base) as members:
        found = [one for one in read_headers(members, base) if one.header.get("Modality") in KINDS]
        if len(found) != 1:
            raise FileFormatError(f"{len(found)} segmentations or structure sets", expected="one file")
        dataset = read_dataset(members, found[0].name, base)
        if dataset.Modality == "SEG" or not _names_images(dataset):
            _require_same_frame(dataset, series)
        if dataset.Modality == "SEG":
            array = _place_segments(dataset, grid, choice)
        else:
            images = {str(one.get("SOPInstanceUID")) for one in series.headers} if series else None
            array = draw_contours(dataset, grid, choice, images)
    return grid.with_array(array[None])


def is_label(path: Path) -> bool:
    """Tell whether a path holds a segmentation object or a structure set.

    Raises:
        FileFormatError: it cannot be read.
    """
    base, _ = split_choice(path)
    with guarded(base), opened(base) as members:
        return any(one.header.get("Modality") in KINDS for one in read_headers(members, base))


def _names_images(dataset: Dataset) -> bool:
    """Tell whether every contour names the image it was drawn on, which says more than a frame of reference."""
    return all(
        contour.get("ContourImageSequence")
        for item in dataset.get("ROIContourSequence") or []
        for contour in item.get("ContourSequence") or []
    )


def _require_same_frame(dataset: Dataset, series: Series | None) -> None:
    frames = {str(dataset.get("FrameOfReferenceUID") or "")} - {""}
    frames |= {
        str(item.get("FrameOfReferenceUID") or "")
        for item in dataset.get("ReferencedFrameOfReferenceSequence") or []
    } - {""}
    image = str(series.headers[0].get("FrameOfReferenceUID") or "") if series else ""
    if image and frames and image not in frames:
        raise GeometryError(
            "a label in another frame of reference than its image",
            fix="choose the image that it was drawn on",
        )


def _place_segments(dataset: Dataset, grid: Volume, choice: Collection[int]) -> np.ndarray:
    kind = str(dataset.get("SegmentationType") or "")
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise FileFormatError("a segmentation of unknown type", expected="BINARY, FRACTIONAL or LABELMAP")
    if dataset.get("TotalPixelMatrixRows"):
        raise FileFormatError("a tiled segmentation of a whole-slide image", expected="one of a volume")
    count = int(dataset.get("NumberOfFrames") or 1)
    size = float(dataset.get("Rows") or 0) * (dataset.get("Columns") or 0) * count
    if size > MAX_VOXELS or count > MAX_VOXELS // 2**10:
        raise FileFormatError(f"{size:.0f} voxels in {count} frames", expected=f"at most {MAX_VOXELS}")
    if len(own := dataset.get("PerFrameFunctionalGroupsSequence") or []) != count:
        raise FileFormatError(f"{count} frames and the places of {len(own)}", expected="a place a frame")
    known = {int(item.SegmentNumber) for item in dataset.get("SegmentSequence") or []}
    if missing := sorted(set(choice) - known):
        raise LabelError(f"no segment {missing[0]}", expected=f"one of {_listed(known)}")
    stored = decode_frames(dataset, palette=True)
    if kind == "FRACTIONAL":
        highest = number_of(dataset, "MaximumFractionalValue", 255)
        stored = stored >= 0.5 * highest
    array = np.zeros(grid.shape, np.int32)
    for frame, pixels in enumerate(stored):
        if kind == "LABELMAP":
            values = _values_of_labelmap(pixels, dataset, known)
        else:
            group = functional_group(dataset, frame, "SegmentIdentificationSequence")
            number = int(group.ReferencedSegmentNumber)
            if number not in known or number == 0:
                raise LabelError(f"a frame of segment {number}", expected=f"one of {_listed(known)}")
            values = (pixels != 0).astype(np.int32) * number
        if choice:
            values = np.where(np.isin(values, list(choice)), values, 0)
        _place_frame(array, values, _index_of_frame(dataset, frame, grid), frame)
    return array


def _values_of_labelmap(pixels: np.ndarray, dataset: Dataset, known: Collection[int]) -> np.ndarray:
    """Return segment numbers, 0 where the pixel padding value says that there is none."""
    values = pixels.astype(np.int32)
    if (padding := dataset.get("PixelPaddingValue")) is not None:
        values = np.where(values == int(padding), 0, values)
    if unknown := set(np.unique(values).tolist()) - {0} - set(known):
        raise LabelError(f"pixels of segment {min(unknown)}", expected=f"one of {_listed(known)}")
    return values


def _index_of_frame(dataset: Dataset, frame: int, grid: Volume) -> np.ndarray:
    """Return the voxel `(D, rows, columns)` of the image that each pixel of a frame lies on."""
    rows, columns = np.mgrid[: int(dataset.Rows), : int(dataset.Columns)]
    if grid.dimension == 2:
        if rows.shape != grid.shape:
            raise GeometryError(
                f"a segmentation of {rows.shape} pixels", expected=f"{grid.shape} as the image"
            )
        return np.stack([rows, columns])
    plane = make_plane(
        numbers_of(functional_group(dataset, frame, "PlanePositionSequence"), "ImagePositionPatient"),
        numbers_of(functional_group(dataset, frame, "PlaneOrientationSequence"), "ImageOrientationPatient"),
        numbers_of(functional_group(dataset, frame, "PixelMeasuresSequence"), "PixelSpacing"),
    )
    to_voxel = np.linalg.inv(grid.affine) @ plane.affine(plane.normal)
    along_row, along_column, origin = to_voxel[:3, 0], to_voxel[:3, 1], to_voxel[:3, 3]
    steps = np.stack([along_row, along_column])
    whole = np.rint(steps)
    drift = np.abs(steps - whole) * [[columns.shape[1]], [rows.shape[0]]]
    beside = np.abs(origin - np.rint(origin)).max()
    if (np.abs(whole).sum(axis=1) != 1).any() or drift.max() > OFF_GRID or beside > OFF_GRID:
        raise GeometryError(
            f"frame {frame + 1} of a segmentation off the image's grid",
            expected="frames on slices of the image, with its pixels",
            fix="choose the image that was segmented, or resample the segmentation to it",
        )
    index = np.rint(origin)[:, None, None] + whole[0][:, None, None] * columns
    return (index + whole[1][:, None, None] * rows).astype(np.int64)


def _place_frame(array: np.ndarray, values: np.ndarray, index: np.ndarray, frame: int) -> None:
    found = values != 0
    index, values = index[:, found], values[found]
    limits = np.array(array.shape)[:, None]
    if ((index < 0) | (index >= limits)).any():
        raise GeometryError(
            f"frame {frame + 1} of a segmentation reaches beyond the image",
            expected="segments within the image",
            fix="choose the image that was segmented",
        )
    before = array[tuple(index)]
    if (taken := (before != 0) & (before != values)).any():
        pair = sorted((int(before[taken][0]), int(values[taken][0])))
        raise LabelError(
            f"segments {pair[0]} and {pair[1]} overlap",
            expected="one class a voxel",
            fix=f"name the segments to read behind the file, such as #{pair[0]}, in a dataset for each",
        )
    array[tuple(index)] = values


def _listed(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers)[:20])) or "none"
