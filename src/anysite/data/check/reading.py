"""Reading the files of one case, each once: what is wrong with them by themselves, and what is kept of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from anysite.data import files
from anysite.data.case import Case
from anysite.data.check.likeness import Likeness, describe
from anysite.data.check.measures import Intensities, LabelShape, measure_intensities, measure_label
from anysite.data.check.problems import Problem, of_case
from anysite.data.classes import count_values
from anysite.data.volume import Volume
from anysite.errors import DataError, FileFormatError, LabelError


@dataclass
class Reading:
    """What is kept of a case once its voxels are let go.

    Attributes:
        digest: Of the image's voxels; empty where a file of it could not be read.
        values: Voxels of the label by value; empty without a label that can be read.
        label_digest: Of the label's voxels; empty alike.
    """

    case: Case
    problems: list[Problem] = field(default_factory=list)
    grid: Volume | None = None
    channels: int = 0
    digest: str = ""
    constant: bool = False
    intensities: list[Intensities] = field(default_factory=list)
    likeness: Likeness | None = None
    values: dict[int, int] = field(default_factory=dict)
    label_digest: str = ""
    label: LabelShape | None = None

    def add(self, rule: str, file: Path, observed: str, expected: str, fix: str) -> None:
        """Note a problem of a file of the case."""
        self.problems.append(of_case(rule, self.case, file, observed, expected, fix))


def read_case(case: Case, background: int = 0, measured: bool = True) -> Reading:
    """Read image and label of a case.

    Args:
        case: Where the files are.
        background: The label value of the background.
        measured: Also measure what the rules on intensities, labels and copies compare; otherwise find errors alone.
    """
    reading = Reading(case)
    images = _read_images(reading)
    if measured and images:
        _measure_images(reading, images)
    if case.label_path is not None:
        label = None
        if case.label_path in case.image_paths:
            _note_image_as_label(reading)
        else:
            read = partial(files.read_label, image_path=case.image_paths[0])
            label = _read_file(reading, case.label_path, read)
        if label is not None:
            _take_label(reading, label, images)
            if measured and not reading.problems:
                reading.label = measure_label(label.array[0], background)
    return reading


def _read_images(reading: Reading) -> list[Volume]:
    case, images = reading.case, []
    content = hashlib.sha256()
    for path in case.image_paths:
        image = _read_file(reading, path, files.read)
        if image is None:
            continue
        images.append(image)
        reading.channels += image.array.shape[0]
        content.update(repr((image.array.shape, image.array.dtype.str)).encode())
        content.update(np.ascontiguousarray(image.array).data)
        _note_constant(reading, path, image.array)
        if reading.grid is None:
            reading.grid = image.without_voxels()
        elif not image.same_grid(reading.grid):
            expected = f"{describe_grid(reading.grid)} as {case.image_paths[0].name}"
            reading.add(
                "channels on different grids",
                path,
                describe_grid(image),
                expected,
                "resample it to the first",
            )
    reading.digest = content.hexdigest() if len(images) == len(case.image_paths) else ""
    return images


def _note_constant(reading: Reading, path: Path, array: np.ndarray) -> None:
    if array.min() == array.max():
        reading.constant = True
        reading.add("constant image", path, f"every voxel is {array.flat[0]}", "contrast", "exclude it")
        return
    for number, channel in enumerate(array):
        if channel.min() == channel.max():
            reading.add(
                "constant channel", path, f"every voxel of channel {number} is {channel.flat[0]}", "contrast",
                "export the channel again, or leave it out everywhere",
            )  # fmt: skip


def _measure_images(reading: Reading, images: Sequence[Volume]) -> None:
    channels = [channel for image in images for channel in image.array]
    reading.intensities = [measure_intensities(channel) for channel in channels]
    if reading.constant or len({channel.shape for channel in channels}) > 1:
        return
    grey = np.zeros(channels[0].shape, np.float32)
    for channel in channels:
        values = channel.astype(np.float32)
        grey += values if len(channels) == 1 else (values - values.mean()) / max(float(values.std()), 1e-6)
    reading.likeness = describe(grey)


def _take_label(reading: Reading, label: Volume, images: Sequence[Volume]) -> None:
    path = reading.case.label_path
    assert path is not None
    reading.values = count_values(label.array)
    reading.label_digest = hashlib.sha256(np.ascontiguousarray(label.array).data).hexdigest()
    if any(np.array_equal(image.array, label.array) for image in images):
        _note_image_as_label(reading)
    elif reading.grid is not None and not label.same_grid(reading.grid):
        reading.add(
            "image and label on different grids",
            path,
            describe_grid(label),
            f"{describe_grid(reading.grid)} as the image",
            "resample the label to its image, or copy the header if only that is wrong",
        )


def _note_image_as_label(reading: Reading) -> None:
    path = reading.case.label_path
    assert path is not None
    reading.values, reading.label_digest = {}, ""
    reading.add(
        "label is the image",
        path,
        "the values of the image itself",
        "a label map",
        "find the right label file",
    )


def _read_file(reading: Reading, path: Path, read: Callable[[Path], Volume]) -> Volume | None:
    try:
        return read(path)
    except LabelError as error:
        rule = "label values"
        found = error
    except DataError as error:
        rule = "unreadable file" if isinstance(error, FileFormatError) else "unusable geometry"
        if not files.exists(path):
            rule = "missing file"
        elif "NaN" in error.found or "no data" in error.found:
            rule = "non-finite values"
        found = error
    reading.add(
        rule, path, found.found, found.expected or "a file that can be read", found.fix or "replace the file"
    )
    return None


def describe_grid(volume: Volume) -> str:
    """Return shape, spacing and place of a grid in words."""
    corner = f", first voxel at {numbers(volume.affine[:-1, -1])}" if volume.unit == "mm" else ""
    return f"shape {volume.shape}, spacing {numbers(volume.spacing)} {volume.unit}{corner}"


def numbers(values: Iterable[float]) -> str:
    """Return numbers joined by crosses."""
    return " x ".join(f"{value:.4g}" for value in values)
