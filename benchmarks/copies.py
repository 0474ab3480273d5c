"""How many planted copies of images the dataset check finds, and how many unrelated pairs it takes for copies.

Run as `python benchmarks/copies.py DATASET [--copies 25] [--output benchmarks/copies.json]`. Of every so many-th image
one copy of each kind is planted under a patient of its own among all images, and what the check would report is
compared with what was planted.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from anysite.data.check.copies import compare
from anysite.data.check.likeness import Likeness, describe
from anysite.data.layouts import open_dataset
from anysite.data.volume import interpolate


def crop(grey: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return a part that keeps so much of every side of more than 12 voxels."""
    sizes = [int(share * n) if n > 12 else n for n in grey.shape]
    starts = [int(rng.integers(0, n - size + 1)) for n, size in zip(grey.shape, sizes, strict=True)]
    return grey[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]


def as_jpeg(grey: np.ndarray) -> np.ndarray:
    """Return a picture after 8 bits and JPEG of quality 75; of a volume every slice."""
    if grey.ndim == 3:
        return np.stack([as_jpeg(plane) for plane in np.moveaxis(grey, -1, 0)], axis=-1)
    scaled = 255 * (grey - grey.min()) / max(float(np.ptp(grey)), 1e-6)
    file = io.BytesIO()
    Image.fromarray(scaled.astype(np.uint8)).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file), np.float32)


def clip(grey: np.ndarray) -> np.ndarray:
    """Return the image in the window between its 5th and 95th percentile."""
    return np.clip(grey, *np.percentile(grey, (5, 95)))


KINDS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "rescaled": lambda grey, rng: 0.3 * grey + 17,
    "flipped": lambda grey, rng: grey[::-1],
    "turned": lambda grey, rng: np.swapaxes(grey, 0, 1)[:, ::-1],
    "padded": lambda grey, rng: np.pad(grey, 9, constant_values=float(grey.min())),
    "resized": lambda grey, rng: interpolate(grey, [int(0.6 * n) if n > 12 else n for n in grey.shape], 1),
    "clipped": lambda grey, rng: clip(grey),
    "gamma": lambda grey, rng: ((grey - grey.min()) / max(float(np.ptp(grey)), 1e-6)) ** 1.5,
    "jpeg": lambda grey, rng: as_jpeg(grey),
    "noise": lambda grey, rng: grey + rng.normal(0, 0.05 * grey.std(), grey.shape),
    "crop 0.9": lambda grey, rng: crop(grey, 0.9, rng),
    "crop 0.8": lambda grey, rng: crop(grey, 0.8, rng),
}


def main() -> None:
    """Print the shares, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--copies", type=int, default=25)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dataset = open_dataset(options.dataset)
    images: list[np.ndarray] = []
    likenesses: list[Likeness] = []
    patients: list[str] = []
    for case in dataset.cases:
        grey = case.image().array.astype(np.float32).mean(0)
        likeness = describe(grey)
        if likeness is not None:
            images.append(grey)
            likenesses.append(likeness)
            patients.append(case.patient)
    chosen = range(0, len(images), max(1, len(images) // options.copies))
    rng = np.random.default_rng(0)
    found: dict[str, float] = {}
    for name, change in KINDS.items():
        copies = [describe(np.ascontiguousarray(change(images[i], rng), np.float32)) for i in chosen]
        planted = [(i, copy) for i, copy in zip(chosen, copies, strict=True) if copy is not None]
        names = np.array([*patients, *(f"copy {i}" for i, _ in planted)])
        pairs = compare([*likenesses, *(copy for _, copy in planted)], names[:, None] == names)
        hits = [(i, len(images) + position) in pairs for position, (i, _) in enumerate(planted)]
        found[name] = round(float(np.sum(hits)) / len(chosen), 3)
        print(f"{name:10} {found[name]:.0%} of {len(chosen)}")
    names = np.array(patients)
    unrelated = compare(likenesses, names[:, None] == names)
    result = {
        "dataset": dataset.name, "images": len(images), "copies_of_each_kind": len(chosen), "found": found,
        "pairs_of_two_patients": int((names[:, None] != names).sum() // 2), "of_them_reported": len(unrelated),
    }  # fmt: skip
    print(
        f"{result['of_them_reported']} of {result['pairs_of_two_patients']} pairs of two patients are reported"
    )
    if options.output:
        kept = json.loads(options.output.read_text()) if options.output.exists() else []
        kept = [row for row in kept if row["dataset"] != dataset.name]
        options.output.write_text(json.dumps([*kept, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
