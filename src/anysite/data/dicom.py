"""DICOM series as volumes through pydicom: a folder, a ZIP, or one file of one or several images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from anysite.data.dicom_geometry import Plane, make_plane, order_slices
from anysite.data.dicom_headers import (
    MAX_FRAMES,
    Instance,
    choose_series,
    functional_group,
    guarded,
    list_numbers,
    number_of,
    numbers_of,
    read_dataset,
    read_headers,
)
from anysite.data.dicom_members import Members, opened, split_choice
from anysite.data.dicom_pixels import COLOUR, decode_frames, rescale
from anysite.data.limits import MAX_VOXELS
from anysite.data.volume import Volume, in_order
from anysite.errors import DataError, FileFormatError, GeometryError

# Storage classes of single slices with a place in the patient; of other images a place is not asked.
PLACED = {
    *("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128"),
    *("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.130"),
}
PLACED_MODALITIES = {"CT", "MR", "PT"}


@dataclass(frozen=True)
class Slice:
    """One image of a series: which file, which of its frames, and what its values mean."""

    instance: Instance
    frame: int
    slope: float
    intercept: float


@dataclass(frozen=True)
class Series:
    """A series whose slices were found to form one grid, without its pixels.

    Attributes:
        slices: In the order of the volume's last axis.
        grid: A volume `(1, X, Y, Z)`, or `(1, H, W)` of a picture, that has no values yet.
    """

    slices: tuple[Slice, ...]
    grid: Volume

    @property
    def headers(self) -> list[Dataset]:
        """The header of every file, in the order of its first slice."""
        return [instance.header for instance in {s.instance.name: s.instance for s in self.slices}.values()]


def read(path: Path) -> Volume:
    """Read a series as `(C, X, Y, Z)` in RAS, or a picture as `(C, H, W)` in pixels.

    X counts columns, Y rows and Z slices along the normal of their rows and columns, wherever the files put them.
    Values are those of the modality (rescale slope and intercept); no window is applied.

    Raises:
        FileFormatError: a file that is damaged, too large, or of a kind that is no image.
        DataError: no series or several of them, several patients, or values in several units.
        GeometryError: slices that form no regular grid.
    """
    base, choice = split_choice(path)
    with guarded(base), opened(base) as members:
        series = _read_series(members, choice, base)
        slices = series.slices
        stored = _decode_all(series, members, base)
        values = rescale(stored, [s.slope for s in slices], [s.intercept for s in slices])
    if series.grid.dimension == 2:
        picture = np.moveaxis(values[0], -1, 0) if values.ndim == 4 else values
        return Volume.of_pixels(np.ascontiguousarray(picture))
    channels = np.moveaxis(values, -1, 0) if values.ndim == 4 else values[None]
    return Volume(in_order(channels.transpose(0, 3, 2, 1)), series.grid.affine)


def read_series(path: Path) -> Series:
    """Read which images form a series and the grid they lie on, without any pixels.

    Raises:
        FileFormatError, DataError, GeometryError: as for `read`.
    """
    base, choice = split_choice(path)
    with guarded(base), opened(base) as members:
        return _read_series(members, choice, base)


def list_series(path: Path) -> list[int]:
    """Return the numbers of the image series in a folder or ZIP, without localisers beside others.

    Raises:
        FileFormatError: a file that cannot be read.
    """
    base, choice = split_choice(path)
    with guarded(base), opened(base) as members:
        return list(choice) or list_numbers(read_headers(members, base))


def is_picture(path: Path) -> bool:
    """Tell whether the images have no place in a patient; False where nothing can be read."""
    base, choice = split_choice(path)
    try:
        with guarded(base), opened(base) as members:
            series = choose_series(read_headers(members, base), choice, base)
            return not any(_is_placed(instance.header) for instance in series.instances)
    except DataError:
        return False


def _read_series(members: Members, choice: tuple[int, ...], base: Path) -> Series:
    instances = choose_series(read_headers(members, base), choice, base).instances
    _require_alike(instances)
    first = instances[0].header
    rows, columns = int(first.get("Rows") or 0), int(first.get("Columns") or 0)
    if any(instance.header.get("TotalPixelMatrixRows") for instance in instances):
        raise FileFormatError("a tiled whole-slide image", expected="an image of one piece")
    frames = sum(instance.frames for instance in instances)
    samples = int(first.get("SamplesPerPixel") or 1)
    if rows <= 0 or columns <= 0 or any(instance.frames < 1 for instance in instances):
        raise FileFormatError("an image without rows, columns or frames")
    if frames > MAX_FRAMES or float(rows) * columns * samples * frames > MAX_VOXELS:
        raise FileFormatError(f"{columns} x {rows} x {frames} voxels", expected=f"at most {MAX_VOXELS}")
    slices, units = [], set()
    for instance in instances:
        own = instance.header.get("PerFrameFunctionalGroupsSequence")
        if own is not None and len(own) != instance.frames:
            raise FileFormatError(f"positions of {len(own)} frames", expected=f"{instance.frames}")
        for frame in range(instance.frames):
            values = functional_group(instance.header, frame, "PixelValueTransformationSequence")
            slope = number_of(values, "RescaleSlope", 1.0)
            slices.append(Slice(instance, frame, slope, number_of(values, "RescaleIntercept", 0.0)))
            units.add(
                (str(values.get("RescaleType") or ""), str(instance.header.get("Units") or "")),
            )
    if len(units) > 1:
        raise DataError("slices of several rescale units", expected="one unit")
    if any(instance.header.get("ModalityLUTSequence") for instance in instances):
        raise FileFormatError("a modality lookup table", expected="a rescale slope and intercept")
    blank = np.zeros((), np.uint8)
    if not any(_is_placed(instance.header) for instance in instances):
        if len(slices) > 1:
            raise GeometryError(
                f"{len(slices)} images without position and orientation",
                expected="slices with a place in the patient, or one picture",
                fix="name one file of them",
            )
        return Series(tuple(slices), Volume.of_pixels(np.broadcast_to(blank, (1, rows, columns))))
    order, affine = order_slices([_plane_of(one) for one in slices])
    grid = Volume(np.broadcast_to(blank, (1, columns, rows, len(slices))), affine)
    return Series(tuple(slices[index] for index in order), grid)


def _decode_all(series: Series, members: Members, base: Path) -> list[np.ndarray]:
    """Return the stored values of every slice, reading each file once."""
    places: dict[str, list[int]] = {}
    for place, one in enumerate(series.slices):
        places.setdefault(one.instance.name, []).append(place)
    stored: list[np.ndarray] = [np.empty(0)] * len(series.slices)
    for name, indices in places.items():
        instance = series.slices[indices[0]].instance
        with guarded(base if len(members) == 1 else f"{base}: {instance.title}"):
            frames = decode_frames(read_dataset(members, name, base))
        for index in indices:
            stored[index] = frames[series.slices[index].frame]
    return stored


def _require_alike(instances: Sequence[Instance]) -> None:
    """Refuse images that cannot be of one scan, without naming what tells them apart."""

    def differ(*names: str) -> int:
        return len({tuple(str(instance.header.get(name) or "") for name in names) for instance in instances})

    if (count := differ("PatientID", "PatientName")) > 1:
        raise DataError(f"images of {count} patients", expected="one", fix="separate the files")
    if (count := differ("FrameOfReferenceUID")) > 1:
        raise GeometryError(
            f"images in {count} frames of reference", expected="one", fix="separate the files"
        )
    if (count := differ("Rows", "Columns")) > 1:
        raise GeometryError(f"images of {count} different sizes", expected="one", fix="separate the files")
    kinds = {str(instance.header.get("PhotometricInterpretation") or "") for instance in instances}
    if len(kinds) > 1 and not kinds <= set(COLOUR):
        raise FileFormatError(
            f"images of {len(kinds)} photometric interpretations", expected="one", fix="separate the files"
        )


def _is_placed(header: Dataset) -> bool:
    """Tell whether an image has, or should have, a place in the patient."""
    if any(header.get(name) for name in ("ImagePositionPatient", "ImageOrientationPatient")):
        return True
    if str(header.get("SOPClassUID") or "") in PLACED or header.get("PerFrameFunctionalGroupsSequence"):
        return True
    return not header.get("SOPClassUID") and header.get("Modality") in PLACED_MODALITIES


def _plane_of(one: Slice) -> Plane:
    header, frame = one.instance.header, one.frame
    own = header.get("PerFrameFunctionalGroupsSequence")
    if one.instance.frames > 1 and not own:
        raise GeometryError(
            f"{one.instance.frames} frames in one file without their positions",
            expected="an enhanced multi-frame image, or one file a slice",
        )
    position = functional_group(header, frame, "PlanePositionSequence")
    orientation = functional_group(header, frame, "PlaneOrientationSequence")
    measures = functional_group(header, frame, "PixelMeasuresSequence")
    found = {
        "ImagePositionPatient": numbers_of(position, "ImagePositionPatient"),
        "ImageOrientationPatient": numbers_of(orientation, "ImageOrientationPatient"),
        "PixelSpacing": numbers_of(measures, "PixelSpacing"),
    }
    for name, numbers in found.items():
        if not numbers:
            raise GeometryError(f"{one.instance.title} has no {name}", expected="a place in the patient")
    thickness = number_of(measures, "SpacingBetweenSlices", 0.0) or number_of(measures, "SliceThickness", 0.0)
    # A negative spacing between slices tells their order in some nuclear images; positions tell it as well.
    return make_plane(*found.values(), thickness=abs(thickness))
