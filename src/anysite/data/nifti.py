"""NIfTI files through nibabel, refused when shorter or longer than their header says."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from anysite.data.limits import require_modest
from anysite.data.nifti_place import copy_place, find_affine
from anysite.data.volume import Volume, in_order
from anysite.errors import FileFormatError, GeometryError, describe_cause

MAX_EXTENSIONS = 2**24  # bytes between header and voxels
# What nibabel raises for files that lie about themselves.
DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, ArithmeticError, MemoryError, AssertionError, zlib.error),
    *(ImageFileError, HeaderDataError, WrapStructError, LookupError),
)


def read(path: Path) -> Volume:
    """Read a NIfTI file; a fourth axis becomes channels.

    Raises:
        FileFormatError: not NIfTI, truncated, or larger than an image can be.
        GeometryError: fewer than two or more than four axes, or a header that `find_affine` refuses.
    """
    try:
        with _open(path) as stream:
            header = _read_header(stream)
            _require_modest(path, header)
            stream.seek(0)
            image = _kind_of(header).from_stream(stream)
            shape, dtype = image.shape, np.dtype(image.get_data_dtype())
            expected = int(image.dataobj.offset) + math.prod(shape) * dtype.itemsize  # pyright: ignore[reportAttributeAccessIssue]
            _require_length(path, expected)
            affine = find_affine(header)
            array = np.asanyarray(image.dataobj)
            if _is_packed(path) and stream.read(1):  # whose length is known once it is unpacked
                raise _of_length(path, f"more than {expected}", expected)
    except (FileFormatError, GeometryError):
        raise
    except DAMAGED as error:
        raise FileFormatError(f"not readable as NIfTI ({describe_cause(error, path)})", where=path) from error
    if array.dtype.kind not in "biuf":
        raise FileFormatError("a NIfTI of colour or structured values", where=path, expected="numbers")
    while array.ndim > 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 5 and array.shape[3] == 1:  # the NIfTI convention for vector values
        array = array[..., 0, :]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim not in (3, 4):
        raise GeometryError(
            f"a NIfTI of shape {shape}", where=path, expected="3 axes, or 4 with channels last"
        )
    channels_first = array[None] if array.ndim == 3 else np.moveaxis(array, -1, 0)
    return Volume(in_order(channels_first), affine)


def write_label(volume: Volume, path: Path, image_path: Path | None = None) -> None:
    """Write a label map `(1, X, Y, Z)` placed by the volume's affine, as sform and qform.

    Args:
        volume: The label map.
        path: A file name with a NIfTI suffix.
        image_path: The NIfTI image it belongs to, whose statements on its place are then repeated as they are.
    """
    dtype = np.uint8 if volume.array.max() < 256 else np.uint16
    array = volume.array[0].astype(dtype)
    if image_path is None:
        image = nibabel.Nifti1Image(array, volume.affine)
        image.set_qform(volume.affine, 2)  # the sform's code, which the constructor sets
        image.header.set_xyzt_units("mm")
    else:
        with _open(image_path) as stream:
            source = _read_header(stream)
        image = _kind_of(source)(array, source.get_best_affine())
        copy_place(source, image.header)
    image.to_filename(path)


def _is_packed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if _is_packed(path) else path.open("rb")


def _read_header(stream: io.BufferedIOBase) -> Nifti1Header:
    """Return the header as it lies in the file: nibabel's loader mends, say, a voxel size of 0 into 1.

    It is read alone, before nibabel reads the extensions after it, which may be of any length.
    """
    block = stream.read(nibabel.Nifti2Header.sizeof_hdr)
    kind = nibabel.Nifti2Header if nibabel.Nifti2Header.may_contain_header(block) else nibabel.Nifti1Header
    return kind(block[: kind.sizeof_hdr], check=False)


def _kind_of(header: Nifti1Header) -> type[nibabel.Nifti1Image]:
    return nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image


def _require_modest(path: Path, header: Nifti1Header) -> None:
    shape, offset = header.get_data_shape(), float(header["vox_offset"])
    voxels = math.prod(map(int, shape))
    if min(shape, default=0) < 0:
        raise FileFormatError(f"a shape of {shape}", where=path, expected="numbers of voxels")
    if not 0 <= offset <= MAX_EXTENSIONS:
        raise FileFormatError(
            f"voxels that begin at byte {offset:g}", where=path, expected=f"at most {MAX_EXTENSIONS}"
        )
    scaled = header["scl_slope"] not in (0, 1) or header["scl_inter"] != 0
    size = max(header.get_data_dtype().itemsize, 8 if scaled else 0)
    require_modest(path, voxels, voxels * size)


def _require_length(path: Path, expected: int) -> None:
    """Compare a file's length in bytes with what its header claims, which of a packed one is not known yet."""
    found = path.stat().st_size
    if found != expected and not _is_packed(path):
        raise _of_length(path, str(found), expected)


def _of_length(path: Path, found: str, expected: int) -> FileFormatError:
    return FileFormatError(
        f"{found} bytes",
        where=path,
        expected=f"exactly {expected} by its header",
        fix="the file is truncated or damaged: copy it again",
    )
