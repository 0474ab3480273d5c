"""Seconds and peak memory of checking, planning and predicting one volume of 512 x 512 x 1000 voxels.

Run as `python benchmarks/large_volume.py [--slices 1000] [--output benchmarks/large_volume.json]`. The volume is made
up: a body, lungs and a few organs in Hounsfield units, 0.75 x 0.75 x 1 mm, written as .nii.gz. Each verb of the
command line runs in a process of its own, as a user starts it, and its peak memory is what the kernel counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
from nibabel.openers import Opener

SIDE = 512
SPACING_MM = (0.75, 0.75, 1.0)
ORGANS = {1: (0.35, 0.5, 0.5, 0.1), 2: (0.62, 0.45, 0.55, 0.07), 3: (0.5, 0.6, 0.3, 0.05)}
HOUNSFIELD = {1: 110.0, 2: 60.0, 3: 180.0}
PLAN = """
import sys
from anysite.settings import PlanSettings
from anysite.data.layouts import open_dataset
from anysite.planning import learn_plan
print(learn_plan(open_dataset(sys.argv[1]), PlanSettings()).reasons)
"""
SETTINGS = (
    "train.steps=2", "plan.dimension=3d", "plan.spacing=[1.5,1.5,1.5]", "plan.patch_size=[64,64,64]", "network.width=8",
    "train.batch_size=1", "predict.flips=false", "predict.overlap=0.25", "judge.shifted_copies=0",
)  # fmt: skip


def write_ct(folder: Path, name: str, slices: int, seed: int) -> None:
    """Write a made-up CT and its label, slab by slab."""
    rng = np.random.default_rng(seed)
    image = np.empty((SIDE, SIDE, slices), np.int16, order="F")
    label = np.zeros((SIDE, SIDE, slices), np.uint8, order="F")
    x, y = np.meshgrid(*[np.linspace(0, 1, SIDE)] * 2, indexing="ij")
    body = (x - 0.5) ** 2 / 0.2 + (y - 0.5) ** 2 / 0.1 < 1
    for index in range(slices):
        z = index / slices
        plane = np.where(body, 40.0, -1000.0)
        for value, (cx, cy, cz, radius) in ORGANS.items():
            inside = (x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 < radius**2
            plane[inside] = HOUNSFIELD[value]
            label[..., index][inside] = value
        image[..., index] = plane + rng.normal(0, 15, plane.shape)
    affine = np.diag([*SPACING_MM, 1.0])
    for kind, array in (("images", image), ("masks", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Opener.default_compresslevel = 1
        nibabel.Nifti1Image(array, affine).to_filename(folder / kind / f"{name}.nii.gz")


def run(*arguments: str) -> tuple[float, int]:
    """Run Python with these arguments; return its seconds and its peak memory in MiB."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise SystemExit(f"{arguments} ended with {process.returncode}")
    return round(time.monotonic() - began, 1), round(usage.ru_maxrss / 1024)


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large, small, trained = folder / "large", folder / "small", folder / "run"
        write_ct(large, "p0", options.slices, 0)
        for patient in (1, 2):
            write_ct(small, f"p{patient}", 64, patient)
        sets = [argument for setting in SETTINGS for argument in ("--set", setting)]
        run("-m", "anysite", "train", str(small), "--output", str(trained), *sets)
        measured = {
            "check": run("-m", "anysite", "check", str(large)),
            "plan": run("-c", PLAN, str(large)),
            "predict": run(
                "-m", "anysite", "predict", str(trained), str(large / "images"), "--output", f"{name}/out"
            ),
        }
    result = {
        "shape": [SIDE, SIDE, options.slices],
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{f"{verb}_seconds": seconds for verb, (seconds, _) in measured.items()},
        **{f"{verb}_peak_memory_mib": peak for verb, (_, peak) in measured.items()},
    }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
