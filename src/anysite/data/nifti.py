"""NIfTI files through nibabel, refused when shorter or longer than their header says."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header
from nibabel.openers import ImageOpener
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
        _require_modest(path)
        image = nibabel.load(path)
        assert isinstance(image, nibabel.Nifti1Image)
        shape, dtype = image.shape, np.dtype(image.get_data_dtype())
        offset = int(image.dataobj.offset)  # pyright: ignore[reportAttributeAccessIssue]
        _require_length(path, offset + int(np.prod(shape)) * dtype.itemsize)
        affine = find_affine(_read_header(path, type(image.header)))
        array = np.asanyarray(image.dataobj)
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
        source = nibabel.load(image_path)
        assert isinstance(source, nibabel.Nifti1Image)  # NIfTI-2, whose numbers are longer, is one too
        image = type(source)(array, source.affine)
        copy_place(_read_header(image_path, type(source.header)), image.header)
    image.to_filename(path)


def _read_header(path: Path, kind: type[Nifti1Header]) -> Nifti1Header:
    """Return the header as it lies in the file: nibabel's loader mends, say, a voxel size of 0 into 1."""
    with ImageOpener(str(path)) as file:
        return kind.from_fileobj(file, check=False)


def _require_modest(path: Path) -> None:
    """Read the header alone, before nibabel reads the extensions after it, which may be of any length."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        block = stream.read(nibabel.Nifti2Header.sizeof_hdr)
    kind = nibabel.Nifti2Header if nibabel.Nifti2Header.may_contain_header(block) else nibabel.Nifti1Header
    header = kind(block[: kind.sizeof_hdr], check=False)
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
    """Compare a file's length in bytes, uncompressed, with what its header claims."""
    if path.name.lower().endswith(".gz"):
        found = 0
        with gzip.open(path) as stream:
            while chunk := stream.read(1 << 22):
                found += len(chunk)
                if found > expected:
                    break
    else:
        found = path.stat().st_size
    if found != expected:
        raise FileFormatError(
            f"{'more than ' if found > expected else ''}{found} bytes",
            where=path,
            expected=f"exactly {expected} by its header",
            fix="the file is truncated or damaged: copy it again",
        )
