"""NRRD and MetaImage files through SimpleITK, refused when shorter or longer than their header says."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from anysite.data.limits import require_modest
from anysite.data.volume import Volume, in_order, require_usable
from anysite.errors import FileFormatError, GeometryError

MAX_HEADER_BYTES = 2**20
CHUNK_BYTES = 2**22
FLIP_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's axes point to the left and to the back
META_BYTES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4,
    "MET_LONG": 4, "MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8,
}  # fmt: skip
NRRD_BYTES = {
    1: ("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"),
    2: ("short", "short int", "signed short", "signed short int", "int16", "int16_t", "ushort", "unsigned short",
        "unsigned short int", "uint16", "uint16_t"),
    4: ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float"),
    8: ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t",
        "ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t", "double"),
}  # fmt: skip


@dataclass(frozen=True)
class _Payload:
    """Where the voxels lie: in `path` from `offset` on, in a zlib or gzip stream or as they are."""

    path: Path
    offset: int
    compressed: bool
    size: int


def read(path: Path) -> Volume:
    """Read an NRRD or MetaImage file; components and a fourth axis become channels.

    Raises:
        FileFormatError: another kind of file, truncated, too large, or SimpleITK is not installed.
        GeometryError: more than four axes, or a grid without right angles.
    """
    payload = _find_nrrd(path) if path.suffix.lower() == ".nrrd" else _find_meta(path)
    _require_length(path, payload)
    sitk = _simpleitk()
    reader = sitk.ImageFileReader()
    # Named, because it would be chosen by the suffix, in which capitals count.
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() == ".nrrd" else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise FileFormatError(f"not readable by SimpleITK ({_last_line(error)})", where=path) from None
    array = sitk.GetArrayFromImage(image)  # the last axis first, components last
    dimension = image.GetDimension()
    if image.GetNumberOfComponentsPerPixel() == 1:
        array = array[..., None]
    channels_first = np.moveaxis(array, -1, 0)
    if dimension == 4 and channels_first.shape[0] == 1:
        channels_first = channels_first[0]
    elif dimension == 2:
        channels_first = channels_first[:, None]
    elif dimension != 3:
        raise GeometryError(f"{dimension} axes", where=path, expected="2 or 3, or 4 with one component")
    axes = (0, *range(channels_first.ndim - 1, 0, -1))
    return Volume(in_order(channels_first.transpose(axes)), _affine_of(image))


def write_label(volume: Volume, path: Path, image_path: Path | None = None) -> None:
    """Write a label map `(1, X, Y, Z)`, compressed.

    Args:
        volume: The label map.
        path: A file name that ends in .nrrd or .mha.
        image_path: The image it belongs to, in one of these formats, whose place is then repeated.

    Raises:
        FileFormatError: it cannot be written, or SimpleITK is not installed.
    """
    sitk = _simpleitk()
    array = volume.array[0].astype(np.uint8 if volume.array.max() < 256 else np.uint16)
    image = sitk.GetImageFromArray(array.transpose())
    spacing = np.array(volume.spacing)
    affine = FLIP_TO_RAS @ volume.affine
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    if image_path is not None:
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(image_path))
        reader.ReadImageInformation()
        if reader.GetDimension() == 3:
            image.SetSpacing(reader.GetSpacing())
            image.SetOrigin(reader.GetOrigin())
            image.SetDirection(reader.GetDirection())
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        raise FileFormatError(f"cannot be written ({_last_line(error)})", where=path) from None


def _affine_of(image: Any) -> np.ndarray:
    """Return the affine to RAS of a SimpleITK image; the place of further axes than three is disregarded."""
    dimension = image.GetDimension()
    spacing = np.array(image.GetSpacing())
    direction = np.array(image.GetDirection()).reshape(dimension, dimension)
    origin = np.array(image.GetOrigin())
    kept = min(dimension, 3)
    affine = np.eye(4)
    affine[:kept, :kept] = (direction * spacing)[:kept, :kept]
    affine[:kept, 3] = origin[:kept]
    affine = FLIP_TO_RAS @ affine
    require_usable(affine)
    return affine


def find_voxels(header: Path) -> list[Path]:
    """Return the file of voxels beside a MetaImage header, none where they are in it or it cannot be read."""
    try:
        found = _find_meta(header).path
    except (OSError, FileFormatError):
        return []
    return [found] if found != header else []


def _find_meta(path: Path) -> _Payload:
    fields, end = _header_fields(path, "=", lambda key, line: key == "elementdatafile")
    try:
        sizes = [int(n) for n in fields["dimsize"].split()]
        channels = int(fields.get("elementnumberofchannels", "1"))
        width = META_BYTES[fields["elementtype"].upper()]
        file = fields["elementdatafile"]
        binary = fields.get("binarydata", "true").lower() == "true"
        compressed = fields.get("compresseddata", "false").lower() == "true"
        skipped = int(fields.get("headersize", "0"))
    except (KeyError, ValueError) as error:
        raise FileFormatError(f"a MetaImage header without a usable {error}", where=path) from None
    if not binary or skipped:
        raise FileFormatError("voxels as text or behind a foreign header", where=path, expected="binary data")
    if file.upper() == "LOCAL":
        _require_stated_size(path, fields, path.stat().st_size - end, compressed)
        return _Payload(path, end, compressed, _count_bytes(path, [*sizes, channels], width))
    if Path(file).name != file or "%" in file or file.upper().startswith("LIST"):
        raise FileFormatError(
            f"voxels in {Path(file).name!r}", where=path, expected="one data file in the folder of the header"
        )
    if not (path.parent / file).is_file():
        raise FileFormatError(f"no data file {file}", where=path, fix="keep .mhd and its data together")
    voxels = path.parent / file
    _require_stated_size(path, fields, voxels.stat().st_size, compressed)
    return _Payload(voxels, 0, compressed, _count_bytes(voxels, [*sizes, channels], width))


def _require_stated_size(path: Path, fields: dict[str, str], stored: int, compressed: bool) -> None:
    """Refuse compressed voxels whose length is not that of the header: ITK would leave memory as it found it."""
    stated = fields.get("compresseddatasize", "none")
    if compressed and stated != str(stored):
        raise FileFormatError(
            f"CompressedDataSize {stated}", where=path, expected=f"{stored}, as many bytes as follow",
            fix="save it again, or uncompressed",
        )  # fmt: skip


def _find_nrrd(path: Path) -> _Payload:
    fields, end = _header_fields(path, ":", lambda key, line: not line)
    try:
        sizes = [int(n) for n in fields["sizes"].split()]
        kind, encoding = fields["type"].lower(), fields["encoding"].lower()
    except (KeyError, ValueError) as error:
        raise FileFormatError(f"an NRRD header without a usable {error}", where=path) from None
    width = next((size for size, names in NRRD_BYTES.items() if kind in names), 0)
    if not width:
        raise FileFormatError(f"values of type {kind!r}", where=path, expected="numbers")
    if encoding not in ("raw", "gzip", "gz"):
        raise FileFormatError(f"voxels encoded as {encoding!r}", where=path, expected="raw or gzip")
    if {"data file", "datafile", "line skip", "byte skip"} & set(fields):
        raise FileFormatError(
            "voxels in another file or behind a gap", where=path, expected="voxels after the header"
        )
    return _Payload(path, end, encoding != "raw", _count_bytes(path, sizes, width))


def _header_fields(
    path: Path, separator: str, ends: Callable[[str, str], bool]
) -> tuple[dict[str, str], int]:
    """Return the fields of a text header by lower-case key, and the position of the byte after it."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while line := file.readline(MAX_HEADER_BYTES):
            if file.tell() > MAX_HEADER_BYTES:
                break
            text = line.decode("latin-1").strip()
            key, found, value = text.partition(separator)
            key = key.strip().lower()
            if found and not text.startswith("#"):
                fields.setdefault(key, value.lstrip("=").strip())
            if ends(key, text):
                return fields, file.tell()
    raise FileFormatError(
        "a header without an end", where=path, fix="the file is truncated or damaged: copy it again"
    )


def _count_bytes(path: Path, sizes: list[int], width: int) -> int:
    if not sizes or min(sizes) < 1:
        raise FileFormatError(
            f"{' x '.join(map(str, sizes))} voxels", where=path, expected="1 or more an axis"
        )
    voxels = math.prod(sizes)
    require_modest(path, voxels, voxels * width)
    return voxels * width


def _require_length(path: Path, payload: _Payload) -> None:
    """Compare the length of the voxels, uncompressed, with what the header claims: ITK fills up with zeros."""
    try:
        found = sum(len(chunk) for chunk in _chunks(payload))
    except zlib.error as error:
        raise FileFormatError(f"damaged compressed voxels ({error})", where=path) from None
    if found != payload.size:
        raise FileFormatError(
            f"{'more than ' if found > payload.size else ''}{found} bytes of voxels",
            where=path,
            expected=f"exactly {payload.size} by its header",
            fix="the file is truncated or damaged: copy it again",
        )


def _chunks(payload: _Payload) -> Iterator[bytes]:
    """Yield the voxels' bytes, at most one chunk beyond the size that the header claims."""
    left = payload.size + 1
    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # zlib or gzip
    with payload.path.open("rb") as file:
        file.seek(payload.offset)
        while left > 0 and (chunk := file.read(CHUNK_BYTES)):
            while chunk and left > 0:
                piece = (
                    decompressor.decompress(chunk, min(left, CHUNK_BYTES)) if payload.compressed else chunk
                )
                chunk = decompressor.unconsumed_tail if payload.compressed else b""
                left -= len(piece)
                yield piece
                if payload.compressed and decompressor.eof:
                    return


def _simpleitk() -> ModuleType:
    try:
        import SimpleITK
    except ImportError:
        raise FileFormatError(
            "NRRD and MetaImage need SimpleITK", fix='install it: pip install "anysite[itk]"'
        ) from None
    SimpleITK.ProcessObject.GlobalWarningDisplayOff()
    return SimpleITK


def _last_line(error: BaseException) -> str:
    """Return what ITK says at the end, without the paths of its sources."""
    text = str(error).strip().splitlines()[-1]
    return re.sub(r"^ITK ERROR: \w+\([^)]*\): ", "", text)[:200]
