"""The image, mask and truth of one predicted case, read where the prediction found them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anysite.data import files
from anysite.data.volume import Volume
from anysite.errors import CASE_ERRORS, AnysiteError
from anysite.report.format import without_folders
from anysite.report.read import PredictedCase, PredictedDataset


@dataclass(frozen=True)
class CaseImages:
    """What a case can be shown by; both label maps hold class indices, and `truth` is None without a label."""

    image: Volume
    prediction: Volume
    truth: Volume | None


def read_images(folder: Path, case: PredictedCase, dataset: PredictedDataset) -> CaseImages | str:
    """Read what a prediction folder says of a case, or return a sentence on why it cannot be shown."""
    if not case.mask:
        return "No mask was written for this case."
    if not case.images or not files.exists(folder / case.images[0]):
        return "The image file is no longer where it was when the mask was predicted."
    try:
        image = files.read(image_path := folder / case.images[0])
        prediction = files.read_label(folder / case.mask, image_path)
        truth = None
        if case.label and files.exists(folder / case.label):
            indices = dataset.tasks.get(case.task) or {v: i for i, v in enumerate(dataset.label_values)}
            truth = _class_indices(files.read_label(folder / case.label, image_path), indices)
    except CASE_ERRORS as error:
        found = error.found if isinstance(error, AnysiteError) else type(error).__name__
        return without_folders(f"A file of this case cannot be read: {found}.")
    if any(other is not None and other.shape != image.shape for other in (prediction, truth)):
        return "Image, label and mask have different shapes."
    return CaseImages(image, prediction, truth)


def _class_indices(label: Volume, indices: dict[int, int]) -> Volume:
    if all(value == index for value, index in indices.items()):
        return label
    result = np.zeros_like(label.array)
    for value, index in indices.items():
        result[label.array == value] = index
    return label.with_array(result)


def as_grey(array: np.ndarray) -> np.ndarray:
    """Return intensities as bytes of the same shape, black and white at the 1st and 99th percentile."""
    low, high = np.percentile(array, (1, 99))
    if high <= low:
        low, high = float(array.min()), float(array.max())
    scaled = (array.astype(np.float32) - low) / max(high - low, 1e-6)
    return np.rint(scaled.clip(0, 1) * 255).astype(np.uint8)
