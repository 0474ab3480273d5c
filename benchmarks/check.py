"""Seconds to check 1,000 pictures of 512 x 512 and 200 volumes of 64 x 64 x 32, on two threads.

Run as `python benchmarks/check.py [--output benchmarks/check.json]`. The datasets are made up: smooth noise with an
organ of two classes, as 8-bit grey PNG and compressed 16-bit NIfTI, at four sites. Making them is not timed.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
from scipy import ndimage

from anysite import atomic, provenance
from anysite.data.check import inspect_dataset

THREADS = 2
SITES = ("north", "east", "south", "west")


def make(folder: Path, shape: tuple[int, ...], cases: int) -> Path:
    """Write a dataset of images that have nothing in common but their make."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"), -1)
    rows = [("case", "patient", "domain", "image", "label")]
    for number in range(cases):
        coarse = rng.standard_normal([max(4, n // 8) for n in shape])
        signal = ndimage.zoom(coarse, np.array(shape) / coarse.shape, order=1, mode="nearest", grid_mode=True)
        depth = np.linalg.norm(grid - rng.uniform(-0.3, 0.3, len(shape)), axis=-1)
        label = (depth < 0.5).astype(np.uint8) + (depth < 0.25)
        signal = 400 + 100 * signal + 150 * label + 20 * rng.standard_normal(shape)
        suffix = ".png" if len(shape) == 2 else ".nii.gz"
        for name, array in (("image", signal), ("label", label)):
            path = folder / f"{name}_{number}{suffix}"
            if len(shape) == 2:
                scaled = np.clip(array / 4, 0, 255) if name == "image" else array
                Image.fromarray(scaled.astype(np.uint8)).save(path)
            else:
                nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), np.diag([1.0, 1, 2, 1])), path)
        files = (f"image_{number}{suffix}", f"label_{number}{suffix}")
        rows.append((f"case{number}", f"case{number}", SITES[number % 4], *files))
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def measure(name: str, shape: tuple[int, ...], cases: int) -> dict[str, object]:
    """Return the seconds of one check."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = make(Path(folder), shape, cases)
        load, began = os.getloadavg()[0], time.perf_counter()
        inspection = inspect_dataset(dataset, threads=THREADS)
        seconds = time.perf_counter() - began
    return {
        "name": name,
        "shape": "x".join(map(str, shape)),
        "cases": cases,
        "seconds": round(seconds, 1),
        "threads": THREADS,
        "processors": os.cpu_count(),
        "load_before": round(load, 1),
        "problems": len(inspection.problems),
        "commit": provenance.commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = [measure("pictures", (512, 512), 1000), measure("volumes", (64, 64, 32), 200)]
    for row in rows:
        print(row)
    if arguments.output:
        atomic.write_json(arguments.output, rows)


if __name__ == "__main__":
    main()
