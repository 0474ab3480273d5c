"""Small copies of volumes for the viewer of the page, as NIfTI without a word of the original's header."""

from __future__ import annotations

import base64
import gzip
from dataclasses import dataclass

import nibabel
import numpy as np

from anysite.data.volume import Volume
from anysite.report.images import CaseImages, as_grey

LONGEST = 96  # voxels along an axis
MARGIN = 0.3  # of the extent of the structures, on either side
LEAST_SHARE = 0.4  # of an axis that is kept in any case


@dataclass(frozen=True)
class SmallVolume:
    """Image, prediction and, where there is one, truth as gzipped NIfTI in base64, by these names."""

    parts: dict[str, str]
    text: str


def embed(images: CaseImages) -> SmallVolume | None:
    """Return copies around the structures with at most 96 voxels along an axis; None of 2-D images.

    Grey values are 8 bits. Axes are RAS, and the place in the scanner is left out: the middle is the origin.
    """
    if images.image.dimension != 3:
        return None
    image = images.image.with_array(as_grey(images.image.array[:1])).oriented()
    labels = {"prediction": images.prediction} | ({"truth": images.truth} if images.truth else {})
    labels = {name: label.oriented() for name, label in labels.items()}
    window = _window(np.any([label.array[0] > 0 for label in labels.values()], axis=0))
    cropped = _crop(image, window)
    shape = tuple(min(size, LONGEST) for size in cropped.shape)
    parts = {"image": _encode(cropped.resampled_to(shape))}
    parts |= {
        name: _encode(_crop(label, window).resampled_to(shape, "label")) for name, label in labels.items()
    }
    whole = cropped.shape == image.shape
    voxels = " × ".join(map(str, shape))
    text = f"{'all of it' if whole else 'cropped'}, {voxels} voxels"
    return SmallVolume(parts, text + ("" if shape == cropped.shape else " of less detail than the image"))


def _window(foreground: np.ndarray) -> tuple[slice, ...]:
    """Return the part around the structures, or everything where there are none."""
    window = []
    for axis, size in enumerate(foreground.shape):
        found = np.flatnonzero(foreground.any(axis=tuple(a for a in range(3) if a != axis)))
        first, last = (found[0], found[-1] + 1) if found.size else (0, size)
        extent = max((last - first) * (1 + 2 * MARGIN), LEAST_SHARE * size)
        length = min(size, round(extent))
        start = min(max(0, round((first + last - length) / 2)), size - length)
        window.append(slice(start, start + length))
    return tuple(window)


def _crop(volume: Volume, window: tuple[slice, ...]) -> Volume:
    return Volume(volume.array[(slice(None), *window)], volume.affine, volume.unit)


def _encode(volume: Volume) -> str:
    extent = np.array(volume.shape) * volume.spacing
    affine = np.diag([*volume.spacing, 1.0])
    affine[:3, 3] = (np.array(volume.spacing) - extent) / 2
    array = np.rint(volume.array[0]).clip(0, 255).astype(np.uint8)
    content = nibabel.Nifti1Image(array, affine).to_bytes()
    return base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")
