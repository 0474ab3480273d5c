"""Pictures that show what a network or an objective makes of an image, as one PNG that names its columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from anysite import atomic


def write_preview(path: Path, images: Mapping[str, Float[Tensor, "b _ *s"]], colour: bool) -> None:
    """Write images with values from -1 to 1 as one picture, a row a sample and a column an image.

    Args:
        path: Of a PNG, whose text names the columns.
        images: By the name of their column, of one size; of volumes the middle slice is drawn.
        colour: Whether the channels are red, green and blue; otherwise the middle one is drawn in grey.

    Raises:
        FileFormatError: it cannot be written.
    """
    pictures = np.stack([_as_pictures(image, colour) for image in images.values()], 1)
    rows, count, height, width, _ = pictures.shape
    whole = pictures.transpose(0, 2, 1, 3, 4).reshape(rows * height, count * width, 3)
    text = PngInfo()
    text.add_text("columns", ", ".join(images))
    with atomic.replacing(path) as temporary:
        Image.fromarray(whole).save(temporary, format="PNG", pnginfo=text)


def _as_pictures(image: Tensor, colour: bool) -> np.ndarray:
    image = image.float().cpu()
    if image.ndim == 5:
        image = image[:, :, image.shape[2] // 2]
    middle = image.shape[1] // 2
    colours = image if colour else image[:, [middle] * 3]
    return ((colours.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()
