"""Pictures of a case: the image with the contours of truth and prediction, as self-contained SVG."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from anysite.data.volume import Volume
from anysite.report.contours import draw_contour
from anysite.report.images import CaseImages, as_grey, read_images
from anysite.report.read import PredictedCase, PredictedDataset

SIDE_PX = 320
MARGIN = 0.6
OKABE_ITO = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2")


@dataclass(frozen=True)
class Picture:
    """An SVG, or, where it cannot be drawn, `problem` says why."""

    svg: Markup = Markup("")
    slice_text: str = ""
    cropped: bool = False
    problem: str = ""


def draw_case(folder: Path, case_id: str, case: PredictedCase, dataset: PredictedDataset) -> Picture:
    """Draw one predicted case; of a volume, the slice in which truth and prediction differ most."""
    images = read_images(folder, case, dataset)
    return Picture(problem=images) if isinstance(images, str) else draw_images(case_id, images)


def draw_images(case_id: str, images: CaseImages) -> Picture:
    """Draw what was read of a case; of a volume, the slice in which truth and prediction differ most."""
    image, truth, prediction = images.image, images.truth, images.prediction
    pixels, truth_map, mask, aspect, slice_text = _plane(image, truth, prediction)
    window = _window((mask > 0) if truth_map is None else (mask > 0) | (truth_map > 0), aspect)
    cropped = (window[0].stop - window[0].start, window[1].stop - window[1].start) != mask.shape
    height, width = mask[window].shape
    scale = SIDE_PX / max(height * aspect, width)
    size = (max(1, round(width * scale)), max(1, round(height * aspect * scale)))
    layers = [("truth", truth_map), ("prediction", mask)]
    paths = [
        Markup('<g class="{} c{}">{}</g>').format(name, (index - 1) % len(OKABE_ITO), contour)
        for name, label in layers
        if label is not None
        for index in range(1, int(label[window].max()) + 1)
        if (contour := draw_contour(label[window] == index, size))
    ]
    svg = Markup(
        '<svg class="case" viewBox="0 0 {w} {h}" role="img"><title>{title}</title><desc>{desc}</desc>'
        '<image width="{w}" height="{h}" preserveAspectRatio="none" href="{href}"/>{paths}</svg>'
    ).format(
        w=size[0],
        h=size[1],
        title=f"{case_id}: {'prediction' if truth is None else 'truth and prediction'}",
        desc="The prediction is drawn as dashed coloured lines"
        + ("." if truth is None else ", the truth as solid pale lines."),
        href=_data_uri(pixels[window], size),
        paths=Markup("").join(paths),
    )
    return Picture(svg, slice_text, cropped)


def _plane(
    image: Volume, truth: Volume | None, prediction: Volume
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, float, str]:
    """Return image `(H, W)` or `(H, W, 3)`, both label maps `(H, W)`, pixel aspect (height/width), slice."""
    slice_text = ""
    if image.dimension == 3:
        axis = _slice_axis(image)
        reference = prediction if truth is None else truth
        differs = (prediction.array != reference.array) if truth is not None else prediction.array > 0
        others = tuple(a for a in range(4) if a != axis + 1)
        counts = differs.sum(axis=others)
        if not counts.any():  # perfect agreement: where the structures are largest
            counts = (reference.array > 0).sum(axis=others)
        index = int(counts.argmax()) if counts.any() else image.shape[axis] // 2
        slice_text = f"slice {index + 1} of {image.shape[axis]}"
        image, prediction = _slice(image, axis, index), _slice(prediction, axis, index)
        truth = _slice(truth, axis, index) if truth is not None else None
    spacing = image.spacing
    colour = image.array.shape[0] == 3 and image.array.dtype == np.uint8
    pixels = np.moveaxis(image.array, 0, -1) if colour else as_grey(image.array[0])
    truth_map = None if truth is None else truth.array[0]
    return pixels, truth_map, prediction.array[0], spacing[0] / spacing[1], slice_text


def _slice_axis(volume: Volume) -> int:
    spacing = np.array(volume.spacing)
    if min(volume.shape) == 1:
        return volume.shape.index(1)
    if spacing.max() > 1.5 * np.median(spacing):
        return int(spacing.argmax())
    return int(np.argmin(volume.shape))


def _slice(volume: Volume, axis: int, index: int) -> Volume:
    """Take one slice as rows by columns, anatomical ones as radiologists see them."""
    flat = Volume(volume.array.take([index], axis + 1), volume.affine, volume.unit)
    array, spacing = flat.array, flat.spacing
    if volume.unit == "mm":  # columns towards the patient's left or back, rows towards back or feet
        flat = flat.oriented("LPI")
        axis = int(np.argmin(flat.shape))
        array, spacing = np.swapaxes(flat.array.squeeze(axis + 1), 1, 2), flat.spacing[::-1]
        kept = [s for a, s in enumerate(spacing) if a != 2 - axis]
    else:
        array = array.squeeze(axis + 1)
        kept = [s for a, s in enumerate(spacing) if a != axis]
    return Volume(array, np.diag([*kept, 1.0]), volume.unit)


def _window(foreground: np.ndarray, aspect: float) -> tuple[slice, slice]:
    """Return the part to show: a square around the structures, or everything where they are large."""
    height, width = foreground.shape
    rows, columns = np.flatnonzero(foreground.any(axis=1)), np.flatnonzero(foreground.any(axis=0))
    if not rows.size:
        return slice(0, height), slice(0, width)
    extent = max((rows[-1] - rows[0] + 1) * aspect, columns[-1] - columns[0] + 1) * (1 + 2 * MARGIN)
    side = max(extent, 0.3 * max(height * aspect, width))
    return _span(rows, side / aspect, height), _span(columns, side, width)


def _span(found: np.ndarray, length: float, limit: int) -> slice:
    size = min(limit, round(length))
    start = round((found[0] + found[-1] + 1 - size) / 2)
    start = min(max(0, start), limit - size)
    return slice(start, start + size)


def _data_uri(pixels: np.ndarray, size: tuple[int, int]) -> str:
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC)
    with io.BytesIO() as buffer:
        image.save(buffer, "JPEG", quality=88)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
