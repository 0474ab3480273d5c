"""A prediction folder of small volumes made up for the report: balls at two sites, with a mask and a truth each."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np

SHAPE = (40, 36, 24)
SPACING_MM = (1.5, 1.5, 3.0)
VERDICTS = ("accept", "review", "reject")
SECRET = "Jane Doe 1970-01-01"


def ball(centre: tuple[float, ...], radius_mm: float, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Return a ball of ones around a voxel, `(*shape)`."""
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm((places - centre) * SPACING_MM, axis=-1)
    return (distance < radius_mm).astype(np.uint8)


def write_predictions(folder: Path, cases: int = 6, shape: tuple[int, ...] = SHAPE) -> Path:
    """Write images, labels and masks of `cases` volumes, and what a prediction and its evaluation say of them.

    Case 0 has the best mask; the further on, the further its mask is moved. Sites and verdicts alternate.
    """
    images, folder = folder / "images", folder / "masks"
    images.mkdir(parents=True)
    folder.mkdir()
    affine = np.diag([-SPACING_MM[0], SPACING_MM[1], SPACING_MM[2], 1.0])  # LAS
    affine[:3, 3] = (71.0, -203.0, 417.0)
    header = nibabel.Nifti1Header()
    header["descrip"], header["db_name"] = SECRET, SECRET[:17]
    noise = np.random.default_rng(0).normal(0, 8, shape)
    centre = tuple(size / 2 for size in shape)
    label = np.maximum(ball(centre, 14, shape), 2 * ball(centre, 7, shape)).astype(np.uint8)
    listed, rows = {}, []
    for number in range(cases):
        name, site = f"case{number:03d}", "AB"[number % 2]
        mask = np.roll(label, min(number, shape[0] // 2), axis=0)
        for path, array in (
            (images / f"{name}.nii.gz", (200 * (label > 0) + 80 * (label > 1) + noise).astype(np.int16)),
            (images / f"{name}_label.nii.gz", label),
            (folder / f"{name}.nii.gz", mask),
        ):
            nibabel.save(nibabel.Nifti1Image(array, affine, header), path)
        place = {"case": name, "domain": site, "split": ("in_domain", "unseen")[number % 2], "patient": name}
        both = {"dataset": "balls", "method": "baseline", "seed": 0, "train_domains": ["A"], **place}
        for value, kind in ((1, "shell"), (2, "core")):
            dice = (
                2
                * ((mask == value) & (label == value)).sum()
                / ((mask == value).sum() + (label == value).sum())
            )
            rows.append({**both, "class": kind, "metric": "dice", "value": float(dice)})
        listed[name] = {
            "status": "done", "mask": f"{name}.nii.gz", "images": [f"../images/{name}.nii.gz"],
            "label": f"../images/{name}_label.nii.gz", "seconds": 1.0, **place,
            "verdict": {"decision": VERDICTS[number % 3], "reasons": ["made up"] if number % 3 else []},
        }  # fmt: skip
    dataset = {"name": "balls", "classes": ["background", "shell", "core"], "label_values": [0, 1, 2]}
    (folder / "predictions.json").write_text(json.dumps({"dataset": dataset, "cases": listed}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
