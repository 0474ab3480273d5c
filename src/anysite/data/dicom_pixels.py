"""Pixels of DICOM files: decoded through pydicom, and what their values mean."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import pixel_array

from anysite.errors import DataError, FileFormatError

GREY = ("MONOCHROME2", "MONOCHROME1")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
FLOATS = {"FloatPixelData": np.float32, "DoubleFloatPixelData": np.float64}


def decode_frames(dataset: Dataset, palette: bool = False) -> np.ndarray:
    """Return the stored values `(frames, rows, columns)`, or `(frames, rows, columns, 3)` in colour.

    MONOCHROME1 is inverted within the range of the stored bits, so that higher is brighter; YBR becomes RGB.

    Args:
        palette: Whether indices into a palette are what is wanted, as of a label.

    Raises:
        FileFormatError: no pixels, not as many as the header claims, or of an unknown kind.
    """
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if not rows or not columns:
        raise FileFormatError("an image without rows or columns")
    kind = str(dataset.get("PhotometricInterpretation") or "missing")
    known = (*GREY, *COLOUR, *(["PALETTE COLOR"] if palette else []))
    if kind not in known:
        raise FileFormatError(
            f"the photometric interpretation {''.join(c for c in kind[:20] if c.isalnum() or c in ' _')}",
            expected=f"one of {', '.join(known)}",
        )
    samples = int(dataset.get("SamplesPerPixel") or 1)
    if samples != (3 if kind in COLOUR else 1):
        raise FileFormatError(f"{samples} samples a pixel of {kind}", expected="3 of colours, 1 of others")
    present = [name for name in ("PixelData", *FLOATS) if dataset.get(name)]
    if len(present) != 1:
        raise FileFormatError(
            "no pixel data", expected="an image", fix="the file is truncated or damaged: copy it again"
        )
    if present == ["PixelData"]:
        _require_extent(dataset, rows, columns, frames, samples)
    array = np.asarray(pixel_array(dataset)).reshape(frames, rows, columns, *([3] if samples == 3 else []))
    if present != ["PixelData"] or samples == 3:
        return array
    return _stored_values(array, dataset, inverted=kind == "MONOCHROME1")


def _stored_values(array: np.ndarray, dataset: Dataset, inverted: bool) -> np.ndarray:
    """Drop bits beyond those stored, which may hold overlays, and keep the sign."""
    allocated = array.dtype.itemsize * 8
    stored, high = int(dataset.BitsStored), int(dataset.HighBit)
    if dataset.BitsAllocated == 1:
        return array
    if not 0 < stored <= allocated or high != stored - 1:
        raise FileFormatError(
            f"{stored} bits stored up to bit {high} of {allocated}", expected="the lowest bits in use"
        )
    if stored < allocated:
        shift = array.dtype.type(allocated - stored)
        array = np.right_shift(np.left_shift(array, shift), shift)
    if inverted:
        highest = -1 if array.dtype.kind == "i" else 2**stored - 1
        array = (highest - array.astype(np.int64)).astype(array.dtype)
    return array


def rescale(frames: Sequence[np.ndarray], slopes: Sequence[float], intercepts: Sequence[float]) -> np.ndarray:
    """Return all frames stacked with each frame's slope and intercept applied.

    Integers stay integers where slopes and intercepts are whole numbers, in the smallest type of 16 bits or more that
    holds them (or as stored, where nothing is to be done); everything else becomes float32.

    Raises:
        DataError: a slope or intercept that is not finite, or a slope of 0.
    """
    if not np.isfinite([*slopes, *intercepts]).all() or 0 in slopes:
        raise DataError(
            "a rescale slope or intercept that is 0, infinite or no number",
            expected="finite numbers and a slope other than 0",
        )
    dtype = np.result_type(*{frame.dtype for frame in frames})
    if all(slope == 1 for slope in slopes) and not any(intercepts):
        return np.stack(frames).astype(np.float32 if dtype.kind == "f" else dtype, copy=False)
    pairs = list(zip(frames, slopes, intercepts, strict=True))
    whole = dtype.kind in "iu" and all(float(n).is_integer() for n in (*slopes, *intercepts))
    if whole:
        ends = [int(edge) * int(s) + int(i) for f, s, i in pairs for edge in (f.min(), f.max())]
        for target in (np.int16, np.uint16, np.int32):
            if np.iinfo(target).min <= min(ends) and max(ends) <= np.iinfo(target).max:
                result = np.empty((len(frames), *frames[0].shape), target)
                for index, (frame, slope, intercept) in enumerate(pairs):
                    result[index] = frame.astype(np.int64) * int(slope) + int(intercept)
                return result
    result = np.empty((len(frames), *frames[0].shape), np.float32)
    for index, (frame, slope, intercept) in enumerate(pairs):
        result[index] = frame.astype(np.float64) * slope + intercept
    return result


def _require_extent(dataset: Dataset, rows: int, columns: int, frames: int, samples: int) -> None:
    """Compare the pixel data with what the header claims, before anything is decoded."""
    data: Any = dataset.PixelData
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        bits = rows * columns * frames * int(dataset.BitsAllocated)
        bits *= 2 if dataset.PhotometricInterpretation == "YBR_FULL_422" else samples
        expected = (bits + 7) // 8
        if len(data) not in (expected, expected + expected % 2):
            raise FileFormatError(
                f"{len(data)} bytes of pixels",
                expected=f"{expected} by the header",
                fix="the file is truncated or damaged: copy it again",
            )
        return
    for stream in generate_frames(data, number_of_frames=frames):
        extent = _extent_of(stream)
        if extent not in (None, (rows, columns)):
            raise FileFormatError(f"{extent} compressed pixels", expected=f"{(rows, columns)} by the header")


def _extent_of(stream: bytes) -> tuple[int, int] | None:
    """Return the rows and columns that a JPEG family codestream claims, None of other compressions."""
    start = stream[:512].find(b"\xff\x4f\xff\x51")
    if start >= 0:  # JPEG 2000
        width, height, left, top = struct.unpack_from(">4I", stream, start + 8)
        return height - top, width - left
    if stream[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == 0xFF:
            place += 1
        elif (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            height, width = struct.unpack_from(">2H", stream, place + 5)
            return height, width
        else:
            (length,) = struct.unpack_from(">H", stream, place + 2)
            place += 2 + length
    raise FileFormatError("a compressed image without a size", fix="the file is damaged: copy it again")
