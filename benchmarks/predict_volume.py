"""Seconds and memory to segment a 192 x 192 x 96 volume, beside MONAI's sliding window in float32.

Run as `python benchmarks/predict_volume.py [--rounds 3] [--steps 250] [--output benchmarks/predict_volume.json]`.
A 3-D network is trained on the phantom first, so that the masks compared are real ones. Both sides take the same
grid tensor, weights, windows (64^3, half overlapping, Gaussian) and batch of windows, and end with probabilities;
neither mirrors. Peak memory is that of this process with both sides in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from monai.inferers.utils import sliding_window_inference

from anysite import atomic, compute, config, runs
from anysite.data.layouts import open_dataset
from anysite.data.phantom import write_phantom
from anysite.segment import Segmenter
from anysite.train import train

SHAPE = (96, 192, 192)


def dice_of(a: torch.Tensor, b: torch.Tensor, classes: int) -> float:
    """Return the smallest Dice over foreground classes of two label maps."""
    scores = []
    for index in range(1, classes):
        one, other = a == index, b == index
        if one.any() or other.any():
            scores.append(2 * int((one & other).sum()) / (int(one.sum()) + int(other.sum())))
    return min(scores)


def compare(rounds: int, steps: int) -> dict[str, float | int | str]:
    """Return seconds of both sides, their ratio and the agreement of their masks."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_phantom(Path(name) / "phantom", dimension=3, size=72, patients_per_site=4)
        dataset = open_dataset(folder)
        settings = config.load(
            "baseline", [f"train.steps={steps}", "plan.patch_size=[64, 64, 64]", "plan.dimension=3d"]
        )
        run = train(dataset, settings, Path(name) / "run")
        # The same anatomy on a finer grid: a volume of the size that clinics have.
        image = dataset.cases[0].image().oriented(run.plan.axes).resampled_to(SHAPE, "cubic")
        spacing = image.spacing
        plan = run.plan.model_copy(update={"spacing": spacing})
        run = dataclasses.replace(run, plan=plan)
        grid = plan.to_grid(image)
        predict = settings.predict.model_copy(update={"flips": False, "batch_size": 4})
        segmenter = Segmenter([run], predict)
        network = run.network()
        taken: dict[str, list[float]] = {"anysite": [], "monai": []}
        ours = theirs = torch.empty(0)
        for _ in range(rounds):
            began = time.perf_counter()
            ours = segmenter.predict_grid(grid)[0]
            taken["anysite"].append(time.perf_counter() - began)
            began = time.perf_counter()
            with torch.inference_mode():
                logits = sliding_window_inference(
                    grid[None], plan.patch_size, 4, network, overlap=0.5, mode="gaussian", sigma_scale=0.125
                )
                assert isinstance(logits, torch.Tensor)
                theirs = torch.softmax(logits, dim=1)[0]
            taken["monai"].append(time.perf_counter() - began)
    median = {side: statistics.median(values) for side, values in taken.items()}
    return {
        "shape": "x".join(map(str, SHAPE)),
        "anysite_seconds": round(median["anysite"], 2),
        "monai_seconds": round(median["monai"], 2),
        "ratio": round(median["monai"] / median["anysite"], 2),
        "smallest_class_dice_between_masks": round(
            dice_of(ours.argmax(0), theirs.argmax(0), plan.outputs), 5
        ),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    threads = compute.use_threads()
    row = compare(arguments.rounds, arguments.steps)
    row |= {"threads": threads, "precision": compute.choose_precision("auto"), "commit": runs.commit()}
    print(row)
    if arguments.output:
        atomic.write_json(arguments.output, [row])


if __name__ == "__main__":
    main()
