"""Reading and writing image and label files of every known format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from anysite import atomic
from anysite.data import dicom_members, image2d, itk, nifti
from anysite.data.limits import MAX_INTENSITY
from anysite.data.volume import Volume
from anysite.errors import FileFormatError, GeometryError, LabelError

FORMATS = {
    ".nii": nifti,
    ".nii.gz": nifti,
    ".nrrd": itk,
    ".mha": itk,
    ".mhd": itk,
    ".png": image2d,
    ".jpg": image2d,
    ".jpeg": image2d,
    ".tif": image2d,
    ".tiff": image2d,
}
DICOM = ".dcm"  # stands for folders, ZIPs and files without a suffix as well
KNOWN = f"{', '.join(FORMATS)}, or DICOM (a folder of one series, .dcm, .zip)"


def suffix_of(path: Path) -> str:
    """Return the known image suffix of a file name, such as ".nii.gz", or "" where there is none.

    It is ".dcm" of whatever holds DICOM: a folder, a ZIP, a file whatever its name, and one series of them (`study#3`).
    """
    name = Path(path).name.lower()
    suffix = max((suffix for suffix in FORMATS if name.endswith(suffix)), key=len, default="")
    return suffix or (DICOM if dicom_members.is_dicom(Path(path)) else "")


def stem_of(path: Path) -> str:
    """Return the file name without its image suffix; of the series `study.zip#3`, `study_3`."""
    base, choice = dicom_members.split_choice(Path(path))
    name = base.name
    for suffix in (suffix_of(path), *dicom_members.SUFFIXES):
        if suffix and name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    else:
        name = name if suffix_of(path) else base.stem
    return "_".join([name, *map(str, choice)])


def exists(path: Path) -> bool:
    """Tell whether something lies at a path, which may choose one series of it or be a name that no file can have."""
    return dicom_members.is_there(dicom_members.split_choice(Path(path))[0])


def has_choice(path: Path) -> bool:
    """Tell whether a path names one series of what lies there."""
    return bool(dicom_members.split_choice(Path(path))[1])


def files_of(path: Path) -> list[Path]:
    """Return the files that an image lies in: one, those directly in a folder, or a header and its voxels."""
    base, _ = dicom_members.split_choice(Path(path))
    if base.is_dir():
        return sorted(entry for entry in base.iterdir() if entry.is_file())
    return [base, *itk.find_voxels(base)] if base.suffix.lower() == ".mhd" else [base]


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files that an image lies in.

    Raises:
        OSError: nothing is there.
    """
    base, _ = dicom_members.split_choice(Path(path))
    found = files_of(path)
    if found == [base]:
        return atomic.sha256(base)
    listed = [f"{entry.name}\0{atomic.sha256(entry)}\n" for entry in found]
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def list_series(path: Path) -> list[int]:
    """Return the numbers of the image series in a folder, ZIP or file of DICOM.

    Raises:
        FileFormatError: a file that cannot be read.
    """
    return _format_of(path).list_series(Path(path))


def is_picture(path: Path) -> bool:
    """Tell whether a DICOM path holds a picture without a place in a patient, by its header alone."""
    return _format_of(path).is_picture(Path(path))


def is_in_pixels(path: Path) -> bool:
    """Tell whether an image has no place in a patient, by its suffix and, of DICOM, its header alone."""
    return _format_of(path) is image2d or (suffix_of(path) == DICOM and is_picture(path))


def read(path: Path, as_label: bool = False) -> Volume:
    """Read one image as a volume `(C, *S)` with the values it stores; DICOM may be a folder or a ZIP.

    Args:
        as_label: Whether of a picture with a palette its indices are meant, and not its colours.

    Raises:
        FileFormatError: the file is missing, truncated, too large, of unknown format or unreadable.
        DataError: DICOM files that are not the images of one scan.
        GeometryError: its header describes no usable grid.
    """
    path = Path(path)
    if not exists(path) or (path.is_dir() and suffix_of(path) != DICOM):
        raise FileFormatError("no such file", where=path)
    try:
        kind = _format_of(path)
        volume = image2d.read(path, as_label) if kind is image2d else kind.read(path)
    except GeometryError as error:
        where = error.where or path
        raise GeometryError(error.found, where=where, expected=error.expected, fix=error.fix) from None
    if volume.array.dtype.kind == "f" and not np.isfinite(volume.array).all():
        bad = int((~np.isfinite(volume.array)).sum())
        raise FileFormatError(
            f"{bad} voxels that are NaN or infinite", where=path, fix="repair or exclude the file"
        )
    if volume.array.dtype.kind == "f" and (extent := float(np.abs(volume.array).max())) > MAX_INTENSITY:
        raise FileFormatError(
            f"intensities as large as {extent:.3g}, such as stand for no data",
            where=path,
            expected=f"at most {MAX_INTENSITY:g}",
            fix="write another value where the image has none",
        )
    return volume


def read_label(path: Path, image_path: Path | None = None) -> Volume:
    """Read one label file as a volume `(1, *S)` of integers.

    Args:
        image_path: The image it belongs to, whose grid segmentations and contours in DICOM are placed on. On the grid
            of a DICOM image, other labels are turned to its axes without interpolation.

    Raises:
        FileFormatError: as for `read`, or DICOM without its image.
        GeometryError: a label that does not lie on its image's grid.
        LabelError: several channels, overlapping segments, or values that are negative, not whole numbers or
            beyond 32 bits.
    """
    path = Path(path)
    if exists(path) and suffix_of(path) == DICOM:
        return _read_dicom_label(path, image_path)
    volume = _as_label(read(path, as_label=True), path)
    if volume.dimension == 3 and image_path is not None and suffix_of(image_path) == DICOM:
        grid = _format_of(image_path).read_series(Path(image_path)).grid
        if grid.dimension == 3:
            return volume.oriented(grid.axes)
    return volume


def write_label(volume: Volume, path: Path, image_path: Path | None = None) -> None:
    """Write a label map atomically, and read it back to compare every voxel and the affine.

    Args:
        volume: Class indices `(1, *S)`.
        path: Where to; the suffix chooses the format.
        image_path: The image it belongs to; in a file of the same format the mask says of its place what the
            image says, word for word.

    Raises:
        FileFormatError: the suffix has no writer, the file cannot be written, or what was read back differs.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if suffix not in FORMATS:
        raise FileFormatError("an unknown file format", where=path, expected=f"one of {', '.join(FORMATS)}")
    if suffix in (".jpg", ".jpeg"):
        raise FileFormatError("JPEG would alter class indices", where=path, expected="a lossless format")
    if suffix == ".mhd":
        raise FileFormatError("MHD would be two files", where=path, expected="MHA, which is one")
    kind = FORMATS[suffix]
    alike = image_path is not None and FORMATS.get(suffix_of(image_path)) is kind
    with _reading_back(volume, path, None) as temporary:
        kind.write_label(volume, temporary, image_path if alike else None)


def write_segmentation(
    volume: Volume, path: Path, image_path: Path, classes: Sequence[str], labelmap: bool = False
) -> None:
    """Write a label map of class indices as a DICOM segmentation of its image, and read it back as `write_label` does.

    Args:
        image_path: The DICOM series that was segmented.
        classes: Names by class index, the background first.
        labelmap: As a label map instead of one binary segment a class.

    Raises:
        FileFormatError: the image is not DICOM, or what was read back differs.
    """
    path = Path(path)
    if suffix_of(image_path) != DICOM:
        raise FileFormatError(
            "a DICOM segmentation of an image that is not DICOM",
            where=path,
            expected="--format auto or nifti",
        )
    try:
        from anysite.data import dicom_seg
    except ModuleNotFoundError as error:
        raise _without_extra(path, error) from None
    with _reading_back(volume, path, image_path) as temporary:
        dicom_seg.write(volume, temporary, image_path, classes, labelmap)


@contextmanager
def _reading_back(volume: Volume, path: Path, image_path: Path | None) -> Iterator[Path]:
    """Yield a temporary file that takes the place of `path` where it is read back as it was meant."""
    with atomic.replacing(path) as temporary:
        yield temporary
        written = read_label(temporary, image_path)
        if not np.array_equal(written.array, volume.array) or not written.same_grid(volume):
            raise FileFormatError("the mask read back differs from the one written", where=path)


def _format_of(path: Path) -> ModuleType:
    suffix = suffix_of(path)
    if suffix in FORMATS:
        return FORMATS[suffix]
    if suffix != DICOM:
        raise FileFormatError("an unknown file format", where=path, expected=f"one of {KNOWN}")
    try:
        from anysite.data import dicom
    except ModuleNotFoundError as error:
        raise _without_extra(path, error) from None
    return dicom


def _read_dicom_label(path: Path, image_path: Path | None) -> Volume:
    try:
        from anysite.data import dicom_labels
    except ModuleNotFoundError as error:
        raise _without_extra(path, error) from None
    if not dicom_labels.is_label(path):
        return _as_label(read(path), path)
    if image_path is None:
        raise FileFormatError("a DICOM label without its image", where=path, expected="the image it lies on")
    if suffix_of(image_path) != DICOM:
        return dicom_labels.read_label(path, read(image_path), None)
    series = _format_of(image_path).read_series(Path(image_path))
    return dicom_labels.read_label(path, series.grid, series)


def _as_label(volume: Volume, path: Path) -> Volume:
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
    if (whole is not array and (whole != array).any()) or whole.min() < 0 or whole.max() >= 2**31:
        raise LabelError("label values that are negative, not whole numbers or beyond 32 bits", where=path)
    return volume.with_array(whole.astype(np.int32))


def _without_extra(path: Path, error: ModuleNotFoundError) -> FileFormatError:
    return FileFormatError(
        f"a DICOM image, and no {error.name} to read it",
        where=path,
        fix='install it: pip install "anysite[dicom]"',
    )
