"""Which share of `anysite predict` on a 3-D volume is the network, and what the rest is.

Run as `python benchmarks/predict_profile.py [--rounds 3] [--output benchmarks/predict_profile.json]`. A small 3-D
training on the phantom, with its judge; then one volume of 192 x 192 x 96 voxels, half as far apart again as on the
network's grid, from `.nii.gz` to mask and verdict on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from anysite import compute, config, predict
from anysite.data import files
from anysite.data.case import Case
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.judge import Judge
from anysite.networks.unet import UNet
from anysite.plan import Plan
from anysite.train import train

SHAPE = (192, 192, 96)
PARTS: list[tuple[str, object, str]] = [
    ("network", UNet, "encode"), ("network", UNet, "decode"), ("reading", files, "read"),
    ("to the grid", Plan, "to_grid"), ("from the grid", Plan, "rows_from_grid"), ("judging", Judge, "judge"),
    ("writing", files, "write_label"),
]  # fmt: skip
SETTINGS = (
    "train.steps=30", "plan.patch_size=[48,48,48]", "predict.flips=false", "judge.shifted_copies=0",
    'test_domains=["west"]',
)  # fmt: skip


def watch(seconds: defaultdict[str, float]) -> None:
    """Let every part add up the seconds that it takes."""

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds[part] += time.perf_counter() - began

        return call

    for part, owner, name in PARTS:
        setattr(owner, name, timed(part, getattr(owner, name)))


def write_volume(source: Case, spacing: float, path: Path) -> None:
    """Write copies of a case side by side, `SHAPE` voxels of half again the spacing of the network's grid."""
    image = source.image()
    repeated = np.tile(image.array[0], [n // s + 1 for n, s in zip(SHAPE, image.shape, strict=True)])
    volume = repeated[tuple(slice(0, n) for n in SHAPE)]
    nibabel.Nifti1Image(volume, np.diag([1.5 * spacing] * 3 + [1.0])).to_filename(path)


def main() -> None:
    """Print seconds and shares, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    compute.use_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = open_dataset(write_phantom(folder / "phantom", dimension=3, patients_per_site=4))
        run = train(dataset, config.load("baseline", SETTINGS), folder / "run")
        write_volume(dataset.cases[0], min(run.plan.spacing), folder / "volume.nii.gz")
        case = Case("volume", "volume", "here", (folder / "volume.nii.gz",))
        seconds: defaultdict[str, float] = defaultdict(float)
        watch(seconds)
        rounds: list[dict[str, float]] = []
        for number in range(options.rounds + 1):
            seconds.clear()
            began = time.perf_counter()
            outcomes = list(predict.predict([run], [case], folder / f"masks{number}"))
            assert [outcome.status for outcome in outcomes] == ["done"]
            rounds.append({"everything": time.perf_counter() - began, **seconds})
        # The first round starts threads and fills caches.
        median = {part: statistics.median(r[part] for r in rounds[1:]) for part in rounds[0]}
    # What is read again to be compared is part of writing.
    result = {
        "shape": SHAPE,
        "rounds": options.rounds,
        "seconds": {part: round(value, 3) for part, value in median.items()},
        "share": {part: round(value / median["everything"], 3) for part, value in median.items()},
    }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
