"""Clean made-up datasets for the tests of the check, and the means to plant faults in them."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image
from scipy import ndimage

from anysite.data import files

SITES = ("north", "east", "south")


@dataclass
class Planted:
    """A dataset of one CSV manifest, whose rows and files can be altered."""

    folder: Path
    rows: list[dict[str, str]] = field(default_factory=list)

    def save(self) -> None:
        """Write the manifest."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with (self.folder / "index.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, columns, restval="")
            table.writeheader()
            table.writerows(self.rows)

    def row(self, case: int) -> dict[str, str]:
        """Return the row of a case by its number."""
        return self.rows[case]

    def path(self, case: int, column: str = "image") -> Path:
        """Return a file of a case."""
        return self.folder / self.rows[case][column]

    def read(self, case: int, column: str = "image") -> np.ndarray:
        """Return the array of a file, without channel axis for one channel."""
        array = files.read(self.path(case, column)).array
        return array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)

    def affine(self, case: int, column: str = "image") -> np.ndarray:
        """Return the affine of a NIfTI file."""
        return np.array(files.read(self.path(case, column)).affine)

    def put(self, case: int, array: np.ndarray, column: str = "image", affine: Any = None) -> None:
        """Replace a file, whose suffix stays."""
        path = self.path(case, column)
        if path.suffix == ".png":
            affine = None
        elif affine is None:
            affine = self.affine(case, column)
        write(path, array, affine)

    def rename(self, case: int, name: str, column: str = "image") -> None:
        """Name another file in the manifest."""
        self.rows[case][column] = name
        self.save()


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write a picture, or with an affine a NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if affine is None:
        Image.fromarray(array).save(path)
        return
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def draw(rng: np.random.Generator, shape: tuple[int, ...], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a body with one organ a class: the signal from 0 to 1, and the label."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"), -1)
    radius = np.linalg.norm(grid / rng.uniform(0.75, 0.9, len(shape)), axis=-1)
    signal = np.where(radius < 1, 0.35, 0.03) * np.ones(shape)
    label = np.zeros(shape, np.uint8)
    turn = rng.uniform(-0.3, 0.3)
    waver = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    waver *= 0.07 / waver.std()
    for number in range(classes):
        angle = turn + 2 * np.pi * number / max(classes, 2)
        centre = 0.42 * np.array([np.cos(angle), np.sin(angle), 0.0])[: len(shape)]
        inside = np.linalg.norm((grid - centre) / rng.uniform(0.2, 0.28, len(shape)), axis=-1) + waver < 1
        label[inside] = number + 1
        signal[inside] = 0.5 + 0.08 * number
    for sigma, size in ((3.0, 0.09), (1.2, 0.06), (0.5, 0.02)):
        noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma)
        signal += size * noise / noise.std() * (radius < 1.05)
    return np.clip(signal + 0.01 * rng.standard_normal(shape), 0, 1).astype(np.float32), label


def scaled(signal: np.ndarray, kind: str) -> np.ndarray:
    """Return a signal from 0 to 1 in the values of a kind of file."""
    if kind == "ct":
        return np.rint(2000 * signal - 1000 - 30 * (signal == 0)).astype(np.int16)
    if kind == "float":
        return (900 * signal).astype(np.float32)
    if kind == "16-bit":
        return np.rint(4000 * signal).astype(np.uint16)
    return np.rint(250 * signal).astype(np.uint8)


def make(
    folder: Path,
    *,
    kind: str = "8-bit",
    shape: tuple[int, ...] = (56, 64),
    classes: int = 2,
    channels: int = 1,
    sites: tuple[str, ...] = SITES,
    patients: int = 5,
    visits: int = 1,
    spacing: tuple[float, ...] = (1.0, 1.0, 2.0),
    seed: int = 0,
    values: tuple[int, ...] = (),
) -> Planted:
    """Write a clean dataset.

    Args:
        folder: New.
        kind: Of intensities: "8-bit", "16-bit", "float" or "ct".
        shape: Two numbers for PNG, three for NIfTI.
        classes: Organs.
        channels: Three in two dimensions are colour; others are files of their own.
        sites: Names.
        patients: Of each site.
        visits: Cases of each patient.
        spacing: In mm, of volumes.
        seed: Of everything.
        values: The label value of each class, background first, if not 0, 1, 2.
    """
    rng, data = np.random.default_rng(seed), Planted(folder)
    suffix = ".png" if len(shape) == 2 else ".nii.gz"
    lookup = np.array(values or range(classes + 1), np.uint8)
    for site in sites:
        gain = rng.uniform(0.8, 1.0)
        for patient in range(patients):
            for visit in range(visits):
                name = f"{site}-p{patient:02d}" + (f"-v{visit}" if visits > 1 else "")
                signal, label = draw(rng, shape, classes)
                affine = np.diag([*spacing, 1.0]) if len(shape) == 3 else None
                row = {"case": name, "patient": f"{site}-p{patient:02d}", "domain": site}
                stack = [scaled(gain * w * signal, kind) for w in (1.0, 0.62, 0.36)[:channels]]
                if channels == 3 and len(shape) == 2:
                    stack = [np.stack(stack, -1)]
                for number, array in enumerate(stack):
                    column = f"image_{number}" if number else "image"
                    row[column] = f"{site}/images/{name}_{number}{suffix}"
                    write(folder / row[column], array, affine)
                row["label"] = f"{site}/masks/{name}{suffix}"
                write(folder / row["label"], lookup[label], affine)
                data.rows.append(row)
    data.save()
    names = {"background": 0} | {f"organ {n}": int(lookup[n]) for n in range(1, classes + 1)}
    (folder / "dataset.json").write_text(json.dumps({"name": "made up", "labels": names}))
    return data
