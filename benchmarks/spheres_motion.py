"""Spheres without against spheres with motion, the toy on which spectral signatures have a published figure.

Run as `python benchmarks/spheres_motion.py --output results/judging_spheres.jsonl`. The toy follows that of MedicOOD
(Lambert et al., 2023, https://arxiv.org/abs/2307.15647), whose page reports an AUROC of 0.979 for one layer and 1.000
for several; the images are drawn here. A network learns spheres in volumes that held still;
images with motion are a site it never saw.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from anysite.benchmark import benchmark, list_jobs
from anysite.data.layouts import open_dataset
from anysite.report.judging import describe_judgement
from anysite.report.read import Row
from anysite.rows import read_rows

SIZE, STILL, MOVED = 40, 80, 20
MOVES, LARGEST_MOVE, LARGEST_TURN_DEGREES = 2, 10.0, 10.0
DETECTORS = ("spectral", "histogram", "mahalanobis", "nearest", "entropy", "pairwise_dice")


def draw_spheres(chooser: np.random.Generator, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume of one to three bright spheres in white noise, and where they are."""
    grid = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"))
    label = np.zeros([SIZE] * 3, np.uint8)
    for _ in range(chooser.integers(1, 4)):
        centre, radius = chooser.uniform(8, SIZE - 8, 3), chooser.uniform(3, 7)
        label |= (np.linalg.norm(grid - centre[:, None, None, None], axis=0) < radius).astype(np.uint8)
    image = 0.3 + label * chooser.uniform(0.4, 0.6) + chooser.normal(0, noise, label.shape)
    return image.astype(np.float32), label


def move_while_scanned(image: np.ndarray, chooser: np.random.Generator) -> np.ndarray:
    """Return what a scan shows whose later parts of k-space are of the volume turned and shifted.

    With two moves of up to 10 voxels and 10 degrees along each axis, as the transform of TorchIO that the toy used
    (Perez-Garcia et al., 2021, https://doi.org/10.1016/j.cmpb.2021.106236) does by default.
    """
    spectrum = np.fft.fftshift(np.fft.fftn(image))
    for start in np.sort(chooser.integers(SIZE // 8, SIZE, MOVES)):
        moved = image
        for axes in ((0, 1), (0, 2), (1, 2)):
            angle = chooser.uniform(-LARGEST_TURN_DEGREES, LARGEST_TURN_DEGREES)
            moved = ndimage.rotate(moved, angle, axes, reshape=False, order=1, mode="nearest")
        moved = ndimage.shift(moved, chooser.uniform(-LARGEST_MOVE, LARGEST_MOVE, 3), order=1, mode="nearest")
        spectrum[start:] = np.fft.fftshift(np.fft.fftn(moved))[start:]
    return np.abs(np.fft.ifftn(np.fft.ifftshift(spectrum))).astype(np.float32)


def write_spheres(folder: Path, noise: float) -> Path:
    """Write a dataset of two sites, `still` and `moved`."""
    chooser = np.random.default_rng(0)
    for site, count in (("still", STILL), ("moved", MOVED)):
        for number in range(count):
            image, label = draw_spheres(chooser, noise)
            if site == "moved":
                image = move_while_scanned(image, chooser)
            for kind, array in (("images", image), ("masks", label)):
                path = folder / site / kind / f"{site}_{number:02d}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(array, np.eye(4)), path)  # pyright: ignore[reportPrivateImportUsage]
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--noise", default="0,0.02,0.05", help="deviations, of spheres about 0.5 bright")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    overrides = [
        "network.width=8", "train.steps=200", "train.batch_size=2", "plan.patch_size=[40, 40, 40]", "plan.dimension=3d",
        "train.validation_cases=0", "train.validation_fraction=0.4", "judge.held_out_cases=12",
        f"judge.detectors={{{', '.join(f'{detector} = {{}}' for detector in DETECTORS)}}}",
    ]  # fmt: skip
    for noise in arguments.noise.split(","):
        with tempfile.TemporaryDirectory() as name:
            path = write_spheres(Path(name) / f"spheres_noise_{noise}", float(noise))
            seeds = [int(seed) for seed in arguments.seeds.split(",")]
            jobs = list_jobs(
                open_dataset(path), path, ["baseline"], seeds, "leave-one-out", overrides, test_domains=["moved"],
                metrics=["dice", "verdict"],
            )  # fmt: skip
            for outcome in benchmark(jobs, arguments.output):
                if outcome.error:
                    raise SystemExit(outcome.error)
        rows = [Row.model_validate(row) for row in read_rows(arguments.output)]
        judgement = describe_judgement("baseline", [row for row in rows if row.dataset == path.name])
        assert judgement is not None
        for score, (auroc, false_positives) in judgement.shifts[0].scores.items():
            print(f"noise {noise:5} {score:14} AUROC {auroc:.3f}  FPR95 {false_positives:.3f}", flush=True)


if __name__ == "__main__":
    main()
