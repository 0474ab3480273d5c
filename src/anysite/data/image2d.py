"""PNG, JPEG and TIFF files through Pillow and tifffile."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageOps, ImageSequence

from anysite.data.limits import require_modest
from anysite.data.volume import Volume
from anysite.errors import FileFormatError, describe_cause

MAX_PIXELS = 2**28
# Compressions that tifffile decodes by itself (none, deflate, PackBits); Pillow's libtiff knows the others.
TIFF_COMPRESSIONS = (1, 8, 32946, 32773)
# What Pillow and tifffile raise for files that lie about themselves.
DAMAGED = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, MemoryError),
    *(RuntimeError, AssertionError, Warning, struct.error, zlib.error),
)
# Pillow raises for twice this many pixels, before it decodes anything.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2


def read(path: Path, as_label: bool = False) -> Volume:
    """Read a picture as `(C, H, W)`, upright as viewers show it; transparency is dropped.

    A TIFF of several pages is a volume `(1, pages, H, W)` in pixel units.

    Args:
        as_label: Whether a palette's indices are what the picture means, and not its colours.

    Raises:
        FileFormatError: damaged, too large or of a kind that is not a picture.
    """
    try:
        is_tiff = path.suffix.lower() in (".tif", ".tiff")
        array = _read_tiff(path, as_label) if is_tiff else _read_pillow(path, as_label)
    except FileFormatError:
        raise
    except DAMAGED as error:
        raise FileFormatError(
            f"not readable as a picture ({describe_cause(error, path)})", where=path
        ) from error
    except Image.DecompressionBombError as error:
        raise FileFormatError("too many pixels", where=path, expected=f"at most {MAX_PIXELS}") from error
    return Volume.of_pixels(array)


def write_label(volume: Volume, path: Path, image_path: Path | None = None) -> None:
    """Write a label map `(1, H, W)` as 8-bit grey, or 16-bit where there are more than 256 classes.

    `image_path` is the picture it belongs to, of which nothing is taken: pictures know no place.

    Raises:
        FileFormatError: a volume with three spatial axes for a format that has two.
    """
    array = volume.array[0].astype(np.uint8 if volume.array.max() < 256 else np.uint16)
    if path.suffix.lower() in (".tif", ".tiff"):
        tifffile.imwrite(path, array, photometric="minisblack", compression="deflate")
    elif array.ndim != 2:
        raise FileFormatError(
            "a mask with three spatial axes", where=path, expected="NIfTI or TIFF for volumes"
        )
    else:
        Image.fromarray(array).save(path)


def _read_pillow(path: Path, as_label: bool) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of half of what is refused
        with Image.open(path) as image:
            if image.format == "PNG" and image.mode in ("RGB", "RGBA", "LA") and _bits_of_png(path) == 16:
                raise FileFormatError(
                    "a PNG of 16-bit colours, which would be cut to 8 bits",
                    where=path,
                    fix="save it as TIFF, or one grey PNG a channel",
                )
            if getattr(image, "n_frames", 1) > 1 and image.format == "TIFF":
                return np.stack([np.array(frame) for frame in ImageSequence.Iterator(image)])[None]
            with suppress(
                SyntaxError, ValueError, TypeError, LookupError, struct.error
            ):  # no word of a turn is left
                image = ImageOps.exif_transpose(image)
            if image.mode == "P" and as_label:
                _require_rising(image, path)
            elif image.mode == "P":
                image = _without_palette(image)
            elif image.mode in ("RGBA", "CMYK", "YCbCr", "LAB", "HSV"):
                image = image.convert("RGB")
            elif image.mode in ("LA", "1"):
                image = image.convert("L")
            array = np.array(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(np.moveaxis(array, -1, 0))


def _without_palette(image: Image.Image) -> Image.Image:
    """Return the colours that a palette means, as grey where all of them are."""
    colours = image.convert("RGB")
    red, green, blue = colours.split()
    grey = red.tobytes() == green.tobytes() == blue.tobytes()
    return red if grey else colours


def _require_rising(image: Image.Image, path: Path) -> None:
    """Refuse a label whose palette is grey and not in the indices' order: which of the two is meant nobody knows.

    Programs that make a palette of a black and white mask may begin with white.
    """
    used = np.flatnonzero(np.bincount(np.asarray(image).ravel()))
    colours = np.resize(np.array(image.getpalette("RGB") or [0], int), (256, 3))[used]
    light = colours[:, 0]
    if (colours == colours[:, :1]).all() and ((np.diff(light) <= 0).any() or (used[0] > 0) != (light[0] > 0)):
        raise FileFormatError(
            f"a label of the indices {', '.join(map(str, used[:5]))} that a palette shows as the greys "
            f"{', '.join(map(str, light[:5]))}",
            where=path, expected="indices and greys in one order", fix="save it in 8-bit grey, without a palette",
        )  # fmt: skip


def _bits_of_png(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[24]  # in its first chunk, which has a fixed place


def _read_tiff(path: Path, as_label: bool) -> np.ndarray:
    with tifffile.TiffFile(path, _multifile=False) as tiff:
        series = tiff.series[0]
        voxels = math.prod(map(int, series.shape))
        require_modest(path, voxels, voxels * (series.dtype or np.dtype(float)).itemsize)
        if np.prod(series.shape, dtype=float) > MAX_PIXELS:
            raise FileFormatError(f"{series.shape} pixels", where=path, expected=f"at most {MAX_PIXELS}")
        if any(not other.keyframe.is_reduced for other in tiff.series[1:]):
            raise FileFormatError("pages of different shapes", where=path, expected="pages of one shape")
        _require_all_pages(tiff, path)
        _require_own_pages(tiff, path)
        axes, array = series.axes, None
        if series.keyframe.tags.valueof("Orientation", 1) not in (0, 1):  # which Pillow turns wrongly
            raise FileFormatError(
                "a TIFF that has to be turned (Orientation)", where=path, expected="upright pages",
                fix="save it upright, without that tag",
            )  # fmt: skip
        by_palette = series.keyframe.photometric == tifffile.PHOTOMETRIC.PALETTE
        coloured = by_palette and (not as_label or len(series.pages) == 1)
        white_is_zero = series.keyframe.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        bits, samples = int(series.keyframe.bitspersample), int(series.keyframe.samplesperpixel)
        if white_is_zero and bits > 1 and as_label:
            raise FileFormatError(
                "a label in which 0 stands for white (MINISWHITE)", where=path, expected="0 for black",
                fix="save it anew with PhotometricInterpretation BlackIsZero",
            )  # fmt: skip
        if coloured and len(series.pages) > 1:
            raise FileFormatError("pages coloured by a palette", where=path, expected="grey values")
        if series.keyframe.compression in TIFF_COMPRESSIONS and not coloured:
            array = series.asarray()
        signed = series.dtype == np.int8
        alpha = [kind in (1, 2) for kind in map(int, series.keyframe.extrasamples)]
    if array is None and bits > 8 and (samples > 1 or white_is_zero):
        raise FileFormatError(
            f"{bits}-bit values in a compression that would be cut to 8 bits or turned", where=path,
            fix="save it uncompressed or with deflate",
        )  # fmt: skip
    if array is None:
        picture = _read_pillow(path, as_label)
        # Pillow knows no signed bytes.
        return picture.view(np.int8) if signed and picture.dtype == np.uint8 else picture
    if white_is_zero:
        array = ~array if array.dtype == bool else _from_white(array, bits, path)
    if array.dtype == bool:  # as Pillow does for 1-bit PNG
        array = array.astype(np.uint8) * 255
    if "S" in axes:  # samples: colour, with or without transparency
        array = np.moveaxis(array, axes.index("S"), 0)
        opaque = [not hidden for hidden in ([False] * (samples - len(alpha)) + alpha)]
        return np.ascontiguousarray(array[opaque])
    return array[None]


def _from_white(array: np.ndarray, bits: int, path: Path) -> np.ndarray:
    """Return grey values of which 0 stood for white."""
    if array.dtype.kind != "u":
        raise FileFormatError(f"{array.dtype} values of which 0 is white", where=path, expected="0 for black")
    return array.dtype.type(2**bits - 1) - array


def _require_all_pages(tiff: tifffile.TiffFile, path: Path) -> None:
    """Follow the last page's link: tifffile only logs where a truncated file lost the pages after it."""
    layout, file, pages = tiff.tiff, tiff.filehandle, tiff.pages
    start = pages[len(pages) - 1].offset
    file.seek(start)
    (tags,) = struct.unpack(layout.tagnoformat, file.read(layout.tagnosize))
    file.seek(start + layout.tagnosize + tags * layout.tagsize)
    (following,) = struct.unpack(layout.offsetformat, file.read(layout.offsetsize))
    if following:
        raise FileFormatError(
            f"only {len(pages)} pages can be read", where=path, fix="the file is truncated: copy it again"
        )


def _require_own_pages(tiff: tifffile.TiffFile, path: Path) -> None:
    """Refuse descriptions (OME, tifffile's own) of other pages than the file holds: tifffile fills in zeros."""
    series = tiff.series[0]
    described, held = list(series.pages), len(tiff.pages)
    if series.kind not in ("ome", "shaped") or (held == 1 and len(described) == 1):
        return
    if None in described or len(described) != held:
        raise FileFormatError(
            f"a description of {len(described)} pages", where=path, expected=f"the {held} that the file holds",
            fix="save all pages in one file, or without that description",
        )  # fmt: skip
