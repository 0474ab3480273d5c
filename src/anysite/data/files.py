"""Reading and writing image and label files of every known format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anysite import atomic
from anysite.data import image2d, nifti
from anysite.data.volume import Volume
from anysite.errors import FileFormatError, GeometryError, LabelError

FORMATS = {
    ".nii": nifti,
    ".nii.gz": nifti,
    ".png": image2d,
    ".jpg": image2d,
    ".jpeg": image2d,
    ".tif": image2d,
    ".tiff": image2d,
}


def suffix_of(path: Path) -> str:
    """Return the known image suffix of a file name, such as ".nii.gz", or "" where there is none."""
    name = Path(path).name.lower()
    return max((suffix for suffix in FORMATS if name.endswith(suffix)), key=len, default="")


def stem_of(path: Path) -> str:
    """Return the file name without its image suffix."""
    name = Path(path).name
    return name[: len(name) - len(suffix_of(path))] if suffix_of(path) else Path(path).stem


def read(path: Path) -> Volume:
    """Read one image file as a volume `(C, *S)` with the values it stores.

    Raises:
        FileFormatError: the file is missing, truncated, too large, of unknown format or unreadable.
        GeometryError: its header describes no usable grid.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError("no such file", where=path)
    suffix = suffix_of(path)
    if not suffix:
        raise FileFormatError("an unknown file format", where=path, expected=f"one of {', '.join(FORMATS)}")
    try:
        volume = FORMATS[suffix].read(path)
    except GeometryError as error:
        raise GeometryError(error.found, where=path, expected=error.expected, fix=error.fix) from None
    if not np.isfinite(volume.array).all():
        bad = int((~np.isfinite(volume.array)).sum())
        raise FileFormatError(
            f"{bad} voxels that are NaN or infinite", where=path, fix="repair or exclude the file"
        )
    return volume


def read_label(path: Path) -> Volume:
    """Read one label file as a volume `(1, *S)` of integers.

    Raises:
        FileFormatError: as for `read`.
        LabelError: several channels, or values that are negative, not whole numbers or beyond 32 bits.
    """
    volume = read(path)
    array = volume.array
    if array.shape[0] > 1 and (array == array[:1]).all():  # grey mask saved as RGB
        array = array[:1]
    if array.shape[0] > 1:
        raise LabelError(
            f"a label with {array.shape[0]} channels",
            where=path,
            expected="one channel of class indices",
            fix="convert colours to class indices",
        )
    whole = array if array.dtype.kind in "bui" else np.rint(array)
    if (whole != array).any() or whole.min() < 0 or whole.max() >= 2**31:
        raise LabelError("label values that are negative, not whole numbers or beyond 32 bits", where=path)
    return volume.with_array(whole.astype(np.int32))


def write_label(volume: Volume, path: Path) -> None:
    """Write a label map atomically, and read it back to compare every voxel and the affine.

    Raises:
        FileFormatError: the suffix has no writer, the file cannot be written, or what was read back differs.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if not suffix:
        raise FileFormatError("an unknown file format", where=path, expected=f"one of {', '.join(FORMATS)}")
    if suffix in (".jpg", ".jpeg"):
        raise FileFormatError("JPEG would alter class indices", where=path, expected="a lossless format")
    with atomic.replacing(path) as temporary:
        FORMATS[suffix].write_label(volume, temporary)
        written = read_label(temporary)
        if not np.array_equal(written.array, volume.array) or not written.same_grid(volume):
            raise FileFormatError("the mask read back differs from the one written", where=path)
