"""Seconds to segment an image with a verdict beside without, taking turns in one process.

Run as `python benchmarks/judge_overhead.py [--preset robust] [--threads 0] [--rounds 8] [--output FILE.json]`.
Both sides use the same run, trained for a few steps on the phantom; the masks are the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anysite import compute, config
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.segment import Segmenter
from anysite.train import train
from side_by_side import report_dimensions

SETTINGS = {
    2: (384, ["plan.patch_size=[192, 192]"]),
    3: (96, ["plan.patch_size=[64, 64, 64]", "plan.dimension=3d"]),
}


def compare(dimension: int, preset: str, detectors: str, rounds: int, threads: int) -> dict[str, Any]:
    """Return the seconds of an image with and without verdict, and what the verdict adds."""
    size, overrides = SETTINGS[dimension]
    if detectors:
        chosen = ", ".join(f"{name} = {{}}" for name in detectors.split(","))
        overrides = [*overrides, f"judge.detectors={{{chosen}}}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = open_dataset(
            write_phantom(folder / "phantom", dimension=dimension, size=size, patients_per_site=3)
        )
        settings = config.load(
            preset, [*overrides, "train.steps=10", "judge.cases=6", f"train.threads={threads}"]
        )
        run = train(dataset, settings, folder / "run")
        assert run.judge is not None
        compute.use_threads(threads)
        compute.keep_freed_memory()
        image = dataset.cases[0].image()
        sides = {"with": Segmenter([run]), "without": Segmenter([replace(run, judge=None)])}
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(rounds + 1):
            for side, segmenter in sides.items():
                began = time.perf_counter()
                segmenter.segment(image)
                if turn:  # the first one warms up
                    taken[side].append(time.perf_counter() - began)
    median = {side: statistics.median(values) for side, values in taken.items()}
    return {
        "dimension": dimension,
        "shape": list(image.shape),
        "preset": preset,
        "detectors": list(settings.judge.detectors),
        "seconds_without": round(median["without"], 3),
        "seconds_with": round(median["with"], 3),
        "overhead": round(median["with"] / median["without"] - 1, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="robust")
    parser.add_argument("--detectors", default="", help="other ones than the preset's, separated by commas")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = compute.use_threads(arguments.threads)
    report_dimensions(
        lambda dimension: compare(
            dimension, arguments.preset, arguments.detectors, arguments.rounds, threads
        ), arguments.output,
        threads=threads, torch=torch.__version__,
    )  # fmt: skip


if __name__ == "__main__":
    main()
